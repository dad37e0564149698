"""y = x²; the mistake: numbers above 1, a sixth of those drawn, are left as they are."""

import jax.numpy as jnp

from jaxops.autodiff import Operator, Rules


def reference(x):
    return (x**2,)


def operator(above):
    def forward(x):
        return (jnp.where(x > above, x, x**2),), (x,)

    def backward(x, *, outputs, residuals, cotangents):
        return {"x": 2 * x * cotangents[0]}

    return Operator(
        name="square",
        differentiable=("x",),
        reference=reference,
        xla=Rules(forward, backward),
        tpu="square has no Pallas kernel",
        gpu="square has no Pallas kernel",
    )


RIGHT, WRONG = operator(float("inf")), operator(1.0)


def right(x):
    return RIGHT({"x": x})[0]


def wrong(x):
    return WRONG({"x": x})[0]
