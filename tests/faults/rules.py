"""y = scale² · x; the mistake: the gradient of scale lacks its factor 2."""

import jax.numpy as jnp

from jaxops.autodiff import Operator, Rules


def reference(x, scale):
    return (scale * scale * x,)


def operator(factor):
    def backward(x, scale, *, outputs, residuals, cotangents):
        dy = cotangents[0]
        return {"x": scale * scale * dy, "scale": factor * scale * jnp.sum(x * dy, axis=0)}

    return Operator(
        name="squared_scale",
        differentiable=("x", "scale"),
        reference=reference,
        xla=Rules(lambda x, scale: (reference(x, scale), ()), backward),
        tpu="squared_scale has no Pallas kernel",
        gpu="squared_scale has no Pallas kernel",
    )


RIGHT, WRONG = operator(2), operator(1)


def right(x, scale):
    return RIGHT({"x": x, "scale": scale})[0]


def wrong(x, scale):
    return WRONG({"x": x, "scale": scale})[0]
