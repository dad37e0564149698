"""conv on Mosaic GPU: interpreted, races detected and unwritten memory NaN, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxops.interpreter import gpu as interpreter
from jaxops.ops.activations import silu
from jaxops.reference.conv import conv as reference
from pallas_kernels import chips, gpu
from tests.compare import no_worse

bf16 = jnp.bfloat16
slow = pytest.mark.slow
Tiles = gpu.conv.Tiles
NHWC, NCHW, NWC = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NWC", "WIO", "NWC")
NDHWC = ("NDHWC", "DHWIO", "NDHWC")
# shapes of lhs and rhs, strides, padding, dilation of rhs, dimension numbers, what comes after, tiles
CASES = {
    "two blocks of two": ((2, 9, 10, 64), (3, 3, 64, 128), (1, 1), "SAME", (1, 1), NHWC, True, Tiles(64, 2)),
    "odd channels, dilated": ((2, 9, 7, 30), (3, 2, 30, 17), (1, 1), ((3, 1), (0, 2)), (3, 2), NHWC, True, None),
    "strides": ((2, 9, 7, 30), (3, 3, 30, 17), (2, 3), "SAME", (1, 1), NHWC, True, None),
    "strides, cropped": ((1, 12, 13, 64), (2, 3, 64, 8), (2, 2), ((-3, 1), (1, -4)), (2, 1), NHWC, False, None),
    "more zeros than image": ((1, 3, 2, 8), (2, 2, 8, 8), (1, 1), ((5, 3), (4, 6)), (1, 1), NHWC, False, None),
    "one axis": ((3, 21, 6), (4, 6, 5), (1,), ((3, 3),), (2,), NWC, False, None),
    "one axis, stride": ((3, 21, 6), (4, 6, 5), (2,), ((3, 0),), (1,), NWC, False, None),
    "three axes": ((1, 4, 3, 5, 8), (2, 2, 2, 8, 8), (1, 1, 2), "SAME", (1, 1, 1), NDHWC, False, None),
    "channels first": ((2, 70, 5, 6), (9, 70, 3, 3), (1, 1), ((1, 0), (2, 5)), (1, 1), NCHW, False, None),
    "window of 1, stride": ((2, 7, 6, 64), (1, 1, 64, 64), (2, 2), "VALID", (1, 1), NHWC, True, None),
}


def geometry(lhs, rhs, strides, padding, dilation, numbers, groups=1):
    numbers = lax.conv_dimension_numbers(lhs, rhs, numbers)
    if isinstance(padding, str):
        sizes = [lhs[axis] for axis in numbers.lhs_spec[2:]]
        window = [(rhs[axis] - 1) * d + 1 for axis, d in zip(numbers.rhs_spec[2:], dilation, strict=True)]
        padding = tuple(lax.padtype_to_pads(sizes, window, strides, padding))
    return dict(
        window_strides=strides,
        padding=padding,
        lhs_dilation=(1,) * len(dilation),
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=groups,
        batch_group_count=1,
        precision=None,
    )


def made(lhs, rhs, after, static):
    """Operands and a cotangent."""
    random = np.random.default_rng(0)
    array = lambda shape: jnp.asarray(random.standard_normal(shape), bf16)
    operands = {"lhs": array(lhs), "rhs": array(rhs)}
    shape = jax.eval_shape(lambda x, w: reference(x, w, activation=None, dtype=bf16, **static), *operands.values()).shape
    if after:
        operands |= {"bias": array(shape[static["dimension_numbers"].out_spec[1]]), "residual": array(shape)}
    return operands, array(shape)


def against_float64(kernel, lhs, rhs, strides, padding, dilation, numbers, after, tiles, groups=1):
    static = geometry(lhs, rhs, strides, padding, dilation, numbers, groups)
    operands, dy = made(lhs, rhs, after, static)
    activation = silu if after else None
    static |= dict(activation=activation, dtype="bfloat16")
    with chips.target(chips.named("h100")), interpreter():
        assert kernel.unsupported(**operands, **static) is None
        (y,), residuals = kernel.forward(**operands, **static, tiles=tiles)
        saved = dict(outputs=(y,), residuals=residuals, cotangents=(dy,))
        got = {"y": y} | kernel.backward(**operands, **saved, **static)
        got = jax.tree.map(np.asarray, jax.block_until_ready(got))

    def plain(operands, dy, dtype):
        static["dtype"] = dtype
        y, pull = jax.vjp(lambda operands: reference(**operands, **static), operands)
        return {"y": y} | pull(dy)[0]

    theirs = plain(operands, dy, "bfloat16")
    with jax.enable_x64():
        exact = plain(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (operands, dy)), "float64")
    for name, want in exact.items():
        assert got[name].shape == want.shape and got[name].dtype == bf16, name
        no_worse(name, got[name], theirs[name], want, bf16)


@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize("case", [c if c in ("odd channels, dilated", "strides") else pytest.param(c, marks=slow) for c in CASES])
def test_against_float64(case):
    against_float64(gpu.conv, *CASES[case])


@pytest.mark.timeout(300)
def test_what_is_outside_is_not_read():
    """NaN in the other images, and in the phases that no tap reads, stays out."""
    static = geometry((3, 4, 6, 8), (1, 1, 8, 8), (2, 2), "VALID", (1, 1), NHWC)
    operands, _ = made((3, 4, 6, 8), (1, 1, 8, 8), False, static)
    x = operands["lhs"].at[1].set(jnp.nan).at[:, 1::2].set(jnp.nan).at[:, :, 1::2].set(jnp.nan)
    with chips.target(chips.named("h100")), interpreter():
        (y,) = gpu.conv.value(x, operands["rhs"], activation=None, dtype="bfloat16", **static)
        y = np.asarray(jax.block_until_ready(y), np.float32)
    assert np.isfinite(y[[0, 2]]).all() and np.isnan(y[1]).all()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["commit_smem", "barrier_wait"])
def test_a_planted_fault_is_found(monkeypatch, fault):
    """A result that leaves before it is written; a product that does not wait for its windows."""
    static = geometry((1, 8, 8, 64), (1, 1, 64, 64), (1, 1), "SAME", (1, 1), NHWC)
    operands, _ = made((1, 8, 8, 64), (1, 1, 64, 64), False, static)
    with chips.target(chips.named("h100")), interpreter():
        monkeypatch.setattr(plgpu, fault, lambda *_: None)
        with pytest.raises(Exception, match="RACE DETECTED|phase|barrier"):
            jax.block_until_ready(gpu.conv.value(**operands, activation=None, dtype="bfloat16", **static))
        monkeypatch.undo()


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


CALL = (8, 28, 28, 64), (3, 3, 64, 64), (1, 1), ((1, 1), (1, 1)), (1, 1), NHWC
REFUSED = [
    ("a100", {}, "needs wgmma, which only GPUs of compute capability 9.0 have, not 8.0"),
    ("h100", {"lhs": shape(8, 28, 28, 64, dtype="float32")}, "lhs must be bfloat16, got float32"),
    ("h100", {"residual": shape(8, 28, 28, 64, dtype="float32")}, "residual must be bfloat16, got float32"),
    ("h100", {"dtype": "float32"}, "the result must be bfloat16, got float32"),
    ("h100", {"feature_group_count": 2}, "groups have no kernel, got 2 of features"),
    ("h100", {"lhs_dilation": (1, 2)}, "lhs_dilation must be 1, got (1, 2)"),
    ("h100", {"padding": ((0, 0), (0, 0)), "rhs_dilation": (14, 1)}, "one of the sizes (0, 26)"),
    ("h100", {"padding": ((200, 0), (0, 0))}, "begin at most 128 outside of the image, got 3 elements and padding"),
    ("h100", {"activation": jnp.sin}, "activation or its gradient uses sin, which the kernel cannot compile"),
    ("h100", {"lhs": shape(1 << 15, 28, 28, 64)}, "the grid is limited to 65535 blocks of 128 rows"),
]


@pytest.mark.parametrize(("chip", "changes", "reason"), REFUSED)
def test_refusals(chip, changes, reason):
    lhs, rhs, *_ = CALL
    call = dict(lhs=shape(*lhs), rhs=shape(*rhs), activation=None, dtype="bfloat16") | geometry(*CALL)
    with chips.target(chips.named(chip)):
        assert reason in gpu.conv.unsupported(**(call | changes))


def test_strides_of_too_many_axes():
    lhs, rhs = (1, 8, 8, 8, 8), (2, 2, 2, 8, 8)
    static = geometry(lhs, rhs, (2, 2, 2), "SAME", (1, 1, 1), NDHWC)
    with chips.target(chips.named("h100")):
        assert "got 5" in gpu.conv.unsupported(shape(*lhs), shape(*rhs), activation=None, dtype="bfloat16", **static)


def test_tiles_fit():
    """And a problem with few rows is cut into more columns."""
    call = dict(activation=None, dtype="bfloat16", **geometry(*CALL))
    with chips.target(chips.named("h100")):
        for images, channels, columns in ((8, 256, 128), (64, 256, 256), (1, 64, 64)):
            operands = shape(images, 28, 28, channels), shape(3, 3, channels, channels)
            for phase in ("forward", "backward"):
                chosen = gpu.conv.tiles(phase, *operands, **call)
                assert chosen.columns == columns
                assert gpu.conv.memory(phase, chosen, *operands, **call) <= chips.named("h100").smem_bytes
                assert next(gpu.conv.candidates(phase, *operands, **call)) == chosen
