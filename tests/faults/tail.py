"""y_i = Σ_j x_ij by tiles of 128 columns; the mistake: what lies past the last column is added too."""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxops.autodiff import Operator, Rules

TILE = 128


def reference(x):
    return (jnp.sum(x, axis=1),)


def kernel(x_ref, y_ref, *, columns, masked):
    j = pl.program_id(0)

    @pl.when(j == 0)
    def _():
        y_ref[...] = jnp.zeros(y_ref.shape, y_ref.dtype)

    x = x_ref[...]
    if masked:
        column = j * TILE + lax.broadcasted_iota(jnp.int32, x.shape, 1)
        x = jnp.where(column < columns, x, 0)
    y_ref[...] += jnp.sum(x, axis=1, keepdims=True)


def forward(x, *, masked):
    rows, columns = x.shape
    y = pl.pallas_call(
        functools.partial(kernel, columns=columns, masked=masked),
        out_shape=jax.ShapeDtypeStruct((rows, 1), x.dtype),
        grid=(pl.cdiv(columns, TILE),),
        in_specs=[pl.BlockSpec((rows, TILE), lambda j: (0, j))],
        out_specs=pl.BlockSpec((rows, 1), lambda j: (0, 0)),
    )(x)
    return (y[:, 0],), ()


def backward(x, *, outputs, residuals, cotangents):
    return {"x": jnp.broadcast_to(cotangents[0][:, None], x.shape)}


def operator(masked):
    return Operator(
        name="row_sum",
        differentiable=("x",),
        reference=reference,
        xla=Rules(lambda x: (reference(x), ()), backward),
        tpu=types.SimpleNamespace(
            unsupported=lambda x: None, forward=functools.partial(forward, masked=masked), backward=backward
        ),
        gpu="row_sum has no Mosaic GPU kernel",
    )


RIGHT, WRONG = operator(True), operator(False)


def right(x, *, implementation=None):
    return RIGHT({"x": x}, implementation=implementation)[0]


def wrong(x, *, implementation=None):
    return WRONG({"x": x}, implementation=implementation)[0]
