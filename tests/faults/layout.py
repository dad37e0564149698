"""y[t, n, :] = x[t, n, :] · w; the mistake: rows are computed heads first and never put back."""

import jax.numpy as jnp

from jaxops.autodiff import Operator, Rules


def reference(x, w):
    return (jnp.einsum("tnh,hk->tnk", x, w),)


def operator(put_back):
    def forward(x, w):
        tokens, heads, _ = x.shape
        y = jnp.einsum("tnh,hk->ntk", x, w)
        return (y.swapaxes(0, 1) if put_back else y.reshape(tokens, heads, -1),), ()

    def backward(x, w, *, outputs, residuals, cotangents):
        dy = cotangents[0]
        return {"x": jnp.einsum("tnk,hk->tnh", dy, w), "w": jnp.einsum("tnh,tnk->hk", x, dy)}

    return Operator(
        name="project_heads",
        differentiable=("x", "w"),
        reference=reference,
        xla=Rules(forward, backward),
        tpu="project_heads has no Pallas kernel",
        gpu="project_heads has no Pallas kernel",
    )


RIGHT, WRONG = operator(True), operator(False)


def right(x, w):
    return RIGHT({"x": x, "w": w})[0]


def wrong(x, w):
    return WRONG({"x": x, "w": w})[0]
