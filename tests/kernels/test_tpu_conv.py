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
from pallas_kernels.tpu import conv_gradients

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
# The same for the tiles of the gradients.
GRADIENTS = {
    "one axis, few channels": ((3, 21, 6), (4, 6, 5), ((3, 2),), (1,), NWC, bf16, True, None),
    "few channels, rows that divide no block": (
        (2, 7, 10, 5),
        (3, 3, 5, 40),
        ((1, 1), (1, 1)),
        (1, 1),
        NHWC,
        bf16,
        True,
        (4, 5),
    ),
    "a share for each core": ((8, 5, 6, 256), (3, 2, 256, 128), ((0, 2), (1, 0)), (1, 1), NHWC, bf16, True, (2, 128)),
    "more rows of dz": ((2, 5, 16, 128), (2, 3, 128, 30), ((2, 2), (3, 3)), (2, 3), NHWC, f32, True, (2, 128)),
    "fewer rows of dz": ((2, 7, 9, 130), (4, 3, 130, 5), ((0, 0), (0, 0)), (1, 2), NHWC, f32, False, (3, 130)),
}
# The same where every channel is a group.
DEPTHWISE = {
    "rows that divide no block": (
        (2, 7, 10, 200),
        (3, 3, 1, 200),
        ((1, 1), (1, 1)),
        (1, 1),
        NHWC,
        bf16,
        True,
        (3, 128),
    ),
    "a batch at once, wide": ((8, 4, 35, 130), (2, 3, 1, 130), ((1, 0), (0, 2)), (1, 1), NHWC, f32, True, (2, 130)),
    "dilated, more rows out than in": (
        (2, 5, 9, 8),
        (3, 2, 1, 8),
        ((4, 3), (3, 0)),
        (2, 3),
        NHWC,
        f32,
        True,
        (4, 8),
    ),
    "fewer rows out than in": ((3, 9, 17, 5), (4, 3, 1, 5), ((0, 0), (0, 0)), (1, 2), NHWC, bf16, False, (4, 5)),
    "one axis, depthwise": ((3, 21, 6), (4, 1, 6), ((3, 0),), (1,), NWC, f32, True, None),
    "channels first, depthwise": ((2, 5, 6, 7), (5, 1, 3, 3), ((1, 0), (2, 1)), (1, 1), NCHW, bf16, False, None),
}


def geometry(padding, dilation, numbers, lhs, rhs, precision="highest", groups=1):
    return dict(
        padding=padding,
        rhs_dilation=dilation,
        lhs_dilation=(1,) * len(dilation),
        window_strides=(1,) * len(dilation),
        dimension_numbers=lax.conv_dimension_numbers(lhs, rhs, numbers),
        feature_group_count=groups,
        batch_group_count=1,
        precision=precision,
    )


@pytest.mark.parametrize("chip", ["v5e", pytest.param("v5p", marks=slow)])  # fetches ahead, and does not
@pytest.mark.parametrize("case", [c if c == "one axis" else pytest.param(c, marks=slow) for c in CASES])
def test_tpu(case, chip):
    against_float64(tpu.conv, chip, *CASES[case])


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("case", [c if c[:3] == "one" else pytest.param(c, marks=slow) for c in GRADIENTS])
def test_gradients(case, cores):
    *shapes, tiles = GRADIENTS[case]
    tiles = tiles and conv_gradients.Tiles(*tiles)
    against_float64(tpu.conv, "v5e" if cores == 1 else "v5p", *shapes, None, backward=tiles, cores=cores)


@pytest.mark.parametrize("case", [c if c[:3] == "one" else pytest.param(c, marks=slow) for c in DEPTHWISE])
def test_depthwise(case):
    *shapes, tiles = DEPTHWISE[case]
    lhs, _, _, _, numbers, _, _ = shapes
    tiles = tiles and tpu.depthwise_conv.Tiles(*tiles)
    against_float64(tpu.depthwise_conv, "v5e", *shapes, tiles, tiles, groups=lhs[numbers[0].index("C")])


def against_float64(
    kernel, chip, lhs, rhs, padding, dilation, numbers, dtype, after, tiles, backward=None, groups=1, cores=1
):
    random = np.random.default_rng(0)
    static = dict(activation=silu if after else None, dtype=dtype)
    static |= geometry(padding, dilation, numbers, lhs, rhs, groups=groups)
    x, w = (jnp.asarray(random.standard_normal(shape), dtype) for shape in (lhs, rhs))
    shape = jax.eval_shape(lambda x, w: reference(x, w, **static), x, w).shape
    channel = shape[static["dimension_numbers"].out_spec[1]]
    operands = {"lhs": x, "rhs": w}
    if after:
        operands |= {"bias": jnp.asarray(random.standard_normal(channel), dtype)}
        operands |= {"residual": jnp.asarray(random.standard_normal(shape), dtype)}
    dy = jnp.asarray(random.standard_normal(shape), dtype)

    def both(operands, dy):
        (y,), residuals = kernel.forward(**operands, **static, tiles=tiles)
        saved = dict(outputs=(y,), residuals=residuals, cotangents=(dy,))
        return {"y": y} | kernel.backward(**operands, **saved, **static, tiles=backward)

    with chips.target(chips.named(chip)):
        assert kernel.unsupported(**operands, **static) is None
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)):
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


REFUSED_DEPTHWISE = {
    "every channel must be a group of one output, got 8 and 16 channels in 8 groups": dict(rhs=(3, 3, 1, 16)),
    "every channel must be a group of one output, got 8 and 8 channels in 4 groups": dict(
        rhs=(3, 3, 2, 8), feature_group_count=4
    ),
    "padding must be within the window": dict(padding=((3, 0), (0, 0))),
    "strides and lhs_dilation must be 1": dict(lhs_dilation=(2, 1)),
    "a row must have at most 1024 pixels": dict(lhs=(2, 6, 1025, 8)),
}


@pytest.mark.parametrize("reason", REFUSED_DEPTHWISE)
def test_depthwise_refused(reason):
    options = dict(lhs=(2, 6, 9, 8), rhs=(3, 3, 1, 8)) | REFUSED_DEPTHWISE[reason]
    lhs, rhs = options.pop("lhs"), options.pop("rhs")
    static = geometry(((0, 0), (0, 0)), (1, 1), NHWC, lhs, rhs, groups=8) | options
    shapes = (jax.ShapeDtypeStruct(s, f32) for s in (lhs, rhs))
    told = tpu.depthwise_conv.unsupported(*shapes, activation=None, dtype=f32, **static)
    assert told is not None and reason in told


def test_what_does_not_fit():
    for kernel, groups, rhs in ((tpu.conv, 1, (31, 31, 512, 512)), (tpu.depthwise_conv, 512, (999, 99, 1, 512))):
        lhs = (1, 8, 8, 512)
        options = geometry(((rhs[0] - 1, 0), (rhs[1] - 1, 0)), (1, 1), NHWC, lhs, rhs, "default", groups)
        shapes = (jax.ShapeDtypeStruct(s, f32) for s in (lhs, rhs))
        told = kernel.unsupported(*shapes, activation=None, dtype=f32, **options)
        assert told is not None and "must fit the 64 MiB of VMEM" in told
