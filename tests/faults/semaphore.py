"""y = 2 · x, copied by hand; the mistake: nobody waits for the copy that brings x."""

import functools
import types

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxops.autodiff import Operator, Rules

ROWS = 8


def reference(x):
    return (2 * x,)


def kernel(x_ref, y_ref, tile, arrived, left, *, waits):
    rows = pl.ds(pl.program_id(0) * ROWS, ROWS)
    bring = pltpu.make_async_copy(x_ref.at[rows], tile, arrived)
    bring.start()
    if waits:
        bring.wait()
    tile[...] = 2 * tile[...]
    take = pltpu.make_async_copy(tile, y_ref.at[rows], left)
    take.start()
    take.wait()


def double(x, waits):
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(kernel, waits=waits),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] // ROWS,),
        in_specs=[anywhere],
        out_specs=anywhere,
        scratch_shapes=[pltpu.VMEM((ROWS, x.shape[1]), x.dtype), pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA],
    )(x)


def backward(x, *, outputs, residuals, cotangents):
    return {"x": 2 * cotangents[0]}


def unsupported(x):
    return None if x.shape[0] % ROWS == 0 else f"x must have a multiple of {ROWS} rows, got {x.shape[0]}"


def operator(waits):
    return Operator(
        name="double",
        differentiable=("x",),
        reference=reference,
        xla=Rules(lambda x: (reference(x), ()), backward),
        tpu=types.SimpleNamespace(
            unsupported=unsupported, forward=lambda x: ((double(x, waits),), ()), backward=backward
        ),
        gpu="double has no Mosaic GPU kernel",
    )


RIGHT, WRONG = operator(True), operator(False)


def right(x, *, implementation=None):
    return RIGHT({"x": x}, implementation=implementation)[0]


def wrong(x, *, implementation=None):
    return WRONG({"x": x}, implementation=implementation)[0]
