"""conv on the TPU: interpreted, races detected, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxops.ops.activations import silu
from jaxops.reference.conv import conv as reference
from pallas_kernels import chips, tpu

f32, bf16 = "float32", "bfloat16"
slow = pytest.mark.slow
Tiles = tpu.conv.Tiles
NHWC, NCHW, NWC = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NWC", "WIO", "NWC")
# shapes of lhs and rhs, padding, dilation of rhs, dimension numbers, dtype, what comes after, tiles
CASES = {
    "rows laid out anew": ((2, 4, 10, 5), (3, 3, 5, 7), ((1, 1), (1, 1)), (1, 1), NHWC, bf16, True, Tiles(51, 7)),
    "as they arrive, a batch at once": (
        (8, 5, 6, 128),
        (3, 2, 128, 256),
        ((1, 1), (0, 1)),
        (1, 1),
        NHWC,
        bf16,
        True,
        None,
    ),
    "dilated, columns in blocks": (
        (1, 9, 16, 128),
        (2, 3, 128, 200),
        ((3, 0), (4, 1)),
        (2, 3),
        NHWC,
        f32,
        True,
        Tiles(32, 128),
    ),
    "one axis": ((3, 21, 6), (4, 6, 5), ((3, 3),), (2,), NWC, f32, False, None),
    "channels first": ((2, 5, 6, 7), (9, 5, 3, 3), ((1, 0), (2, 5)), (1, 1), NCHW, f32, False, None),
}


def geometry(padding, dilation, numbers, lhs, rhs, precision="highest"):
    return dict(
        padding=padding,
        rhs_dilation=dilation,
        lhs_dilation=(1,) * len(dilation),
        window_strides=(1,) * len(dilation),
        dimension_numbers=lax.conv_dimension_numbers(lhs, rhs, numbers),
        feature_group_count=1,
        batch_group_count=1,
        precision=precision,
    )


@pytest.mark.parametrize("chip", ["v5e", pytest.param("v5p", marks=slow)])  # fetches ahead, and does not
@pytest.mark.parametrize("case", [c if c == "one axis" else pytest.param(c, marks=slow) for c in CASES])
def test_tpu(case, chip):
    lhs, rhs, padding, dilation, numbers, dtype, after, tiles = CASES[case]
    random = np.random.default_rng(0)
    static = dict(activation=silu if after else None, dtype=dtype, **geometry(padding, dilation, numbers, lhs, rhs))
    x, w = (jnp.asarray(random.standard_normal(shape), dtype) for shape in (lhs, rhs))
    shape = jax.eval_shape(lambda x, w: reference(x, w, **static), x, w).shape
    channel = shape[static["dimension_numbers"].out_spec[1]]
    operands = {"lhs": x, "rhs": w}
    if after:
        operands |= {"bias": jnp.asarray(random.standard_normal(channel), dtype)}
        operands |= {"residual": jnp.asarray(random.standard_normal(shape), dtype)}
    dy = jnp.asarray(random.standard_normal(shape), dtype)

    def both(operands, dy):
        (y,), residuals = tpu.conv.forward(**operands, **static, tiles=tiles)
        saved = dict(outputs=(y,), residuals=residuals, cotangents=(dy,))
        return {"y": y} | tpu.conv.backward(**operands, **saved, **static)

    with chips.target(chips.named(chip)):
        assert tpu.conv.unsupported(**operands, **static) is None
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=1)):
            got = jax.tree.map(np.asarray, jax.block_until_ready(jax.jit(both)(operands, dy)))

    def plain(operands, dy, dtype):
        static["dtype"] = dtype
        y, pull = jax.vjp(lambda operands: reference(**operands, **static), operands)
        return {"y": y} | pull(dy)[0]

    theirs = plain(operands, dy, dtype)
    with jax.enable_x64():
        wide = lambda a: jnp.asarray(a, jnp.float64)
        exact = plain(jax.tree.map(wide, operands), wide(dy), "float64")
    for name, want in exact.items():
        want, like = np.asarray(want), operands.get(name, dy)
        assert (got[name].shape, got[name].dtype) == (like.shape, like.dtype), name
        error, peer = (np.abs(np.asarray(a[name], np.float64) - want).max() for a in (got, theirs))
        assert error <= 2 * peer + 8 * float(jnp.finfo(f32).eps) * np.abs(want).max(), (name, error, peer)


REFUSED = {
    "strides and lhs_dilation must be 1": dict(window_strides=(2, 1)),
    "groups have no kernel, got 2 of features": dict(feature_group_count=2),
    "must not be negative": dict(padding=((0, 0), (-1, 0))),
    "one of the sizes (0, 7)": dict(padding=((0, 0), (0, 0)), rhs_dilation=(3, 1)),
    "in one precision": dict(precision=("highest", "default")),
    "not high": dict(precision="high"),
    "must be float32 or bfloat16 on a TPU, got float16": dict(dtype="float16"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    lhs, rhs = (2, 6, 9, 8), (3, 3, 8, 4)
    options = dict(activation=None, dtype=f32, **geometry(((0, 0), (0, 0)), (1, 1), NHWC, lhs, rhs)) | REFUSED[reason]
    told = tpu.conv.unsupported(*(jax.ShapeDtypeStruct(s, f32) for s in (lhs, rhs)), **options)
    assert told is not None and reason in told
