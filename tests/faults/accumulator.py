"""y_j = Σ_i x_ij, row by row; the mistake: the running sum has the dtype of x, and stalls in bfloat16."""

import jax.numpy as jnp
from jax import lax

from jaxops.autodiff import Operator, Rules


def reference(x):
    return (jnp.sum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=0).astype(x.dtype),)


def operator(wide):
    def forward(x):
        start = jnp.zeros(x.shape[1], jnp.promote_types(x.dtype, jnp.float32) if wide else x.dtype)
        total = lax.fori_loop(0, x.shape[0], lambda i, total: total + x[i], start)
        return (total.astype(x.dtype),), ()

    def backward(x, *, outputs, residuals, cotangents):
        return {"x": jnp.broadcast_to(cotangents[0], x.shape)}

    return Operator(
        name="column_sum",
        differentiable=("x",),
        reference=reference,
        xla=Rules(forward, backward),
        tpu="column_sum has no Pallas kernel",
        gpu="column_sum has no Pallas kernel",
    )


RIGHT, WRONG = operator(True), operator(False)


def right(x):
    return RIGHT({"x": x})[0]


def wrong(x):
    return WRONG({"x": x})[0]
