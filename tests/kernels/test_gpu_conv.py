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
# The same where every channel is a group, whose tiles are rows, pixels and warpgroups.
DEPTHWISE = {
    "rows that divide no block": ((2, 7, 10, 72), (3, 3, 1, 72), (1, 1), "SAME", (1, 1), NHWC, True, (3, 8, 2)),
    "dilated, more rows out than in": ((2, 5, 9, 8), (3, 2, 1, 8), (1, 1), ((4, 3), (3, 0)), (2, 3), NHWC, True, None),
    "fewer rows out than in": ((1, 9, 17, 5), (4, 3, 1, 5), (1, 1), "VALID", (1, 2), NHWC, False, (4, 16, 4)),
    "many taps": ((1, 4, 8, 40), (3, 11, 1, 40), (1, 1), "SAME", (1, 1), NHWC, False, None),
    "strides, depthwise": ((2, 9, 8, 70), (3, 3, 1, 70), (2, 2), "SAME", (1, 1), NHWC, True, None),
    "strides, cropped, depthwise": ((1, 8, 9, 8), (2, 3, 1, 8), (3, 1), ((-2, 0), (1, -2)), (1, 2), NHWC, False, None),
    "causal": ((2, 40, 8), (4, 1, 8), (1,), ((3, 0),), (1,), NWC, True, (1, 16, 2)),
    "channels first, depthwise": ((2, 5, 6, 7), (5, 1, 3, 3), (1, 1), ((1, 0), (2, 1)), (1, 1), NCHW, False, None),
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
    plain = lambda x, w: reference(x, w, activation=None, dtype=bf16, **static)
    shape = jax.eval_shape(plain, *operands.values()).shape
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
@pytest.mark.parametrize(
    "case", [c if c in ("odd channels, dilated", "strides") else pytest.param(c, marks=slow) for c in CASES]
)
def test_against_float64(case):
    against_float64(gpu.conv, *CASES[case])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", [c if c == "causal" else pytest.param(c, marks=slow) for c in DEPTHWISE])
def test_depthwise(case):
    *call, tiles = DEPTHWISE[case]
    lhs, numbers = call[0], call[5]
    tiles = tiles and gpu.depthwise_conv.Tiles(*tiles)
    against_float64(gpu.depthwise_conv, *call, tiles, groups=lhs[numbers[0].index("C")])


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


@slow
@pytest.mark.timeout(300)
def test_images_are_apart():
    """NaN in an image, or in the one after it, stays out of what it does not reach: also of the gradient of rhs."""
    static = geometry((1, 3, 10, 8), (3, 1, 1, 8), (1, 1), "SAME", (1, 1), NHWC, groups=8)
    operands, dy = made((2, 3, 10, 8), (3, 1, 1, 8), False, static)
    static |= dict(activation=None, dtype="bfloat16")
    dy = dy.at[1, 0].set(jnp.nan)  # no first tap of the window meets it
    with chips.target(chips.named("h100")), interpreter():
        (y,), _ = gpu.depthwise_conv.forward(**operands | {"lhs": operands["lhs"].at[1].set(jnp.nan)}, **static)
        saved = dict(outputs=(y,), residuals=(), cotangents=(dy,))
        got = gpu.depthwise_conv.backward(**operands, **saved, **static, tiles=gpu.depthwise_conv.Tiles(2, 8, 2))
        y, dx, dw = (np.asarray(a, np.float32) for a in jax.block_until_ready((y, got["lhs"], got["rhs"])))
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()
    assert np.isfinite(dx[0]).all() and np.isfinite(dx[1, 2]).all() and np.isnan(dx[1, :2]).all()
    assert np.isfinite(dw[0]).all() and np.isnan(dw[1:]).all()


FAULTS = {  # what is forgotten
    "a product's windows": (gpu.conv, "barrier_wait"),
    "a product's result": (gpu.conv, "commit_smem"),
    "a depthwise result": (gpu.depthwise_conv, "commit_smem"),
    "what a depthwise window reads": (gpu.depthwise_conv, "barrier_wait"),
    "that a slot is taken": (gpu.depthwise_conv, "wait_smem_to_gmem"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", FAULTS)
def test_a_planted_fault_is_found(monkeypatch, what):
    """A result that leaves before it is written, or what is read before it has arrived."""
    kernel, fault = FAULTS[what]
    groups, width = (1, 64) if kernel is gpu.conv else (8, 8)
    shapes = (1, 2, 48, width), (1, 1, width // groups, width)
    static = geometry(*shapes, (1, 1), "SAME", (1, 1), NHWC, groups)
    operands, _ = made(*shapes, False, static)
    with chips.target(chips.named("h100")), interpreter():
        monkeypatch.setattr(plgpu, fault, lambda *_, **__: None)
        with pytest.raises(Exception, match=r"RACE DETECTED|phase|barrier"):
            jax.block_until_ready(kernel.value(**operands, activation=None, dtype="bfloat16", **static))
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
    ("h100", {"padding": ((200, 0), (0, 0))}, "begin at most 128 outside the image, got 3 elements and padding"),
    ("h100", {"activation": jnp.sin}, "activation or its gradient uses sin, which the kernel cannot compile"),
    ("h100", {"lhs": shape(1 << 15, 28, 28, 64)}, "the grid is limited to 65535 blocks of 128 rows"),
]


@pytest.mark.parametrize(("chip", "changes", "reason"), REFUSED)
def test_refusals(chip, changes, reason):
    lhs, rhs, *_ = CALL
    call = dict(lhs=shape(*lhs), rhs=shape(*rhs), activation=None, dtype="bfloat16") | geometry(*CALL)
    with chips.target(chips.named(chip)):
        assert reason in gpu.conv.unsupported(**(call | changes))


DEPTHWISE_REFUSED = [
    ("a100", {}, "needs compute capability 9.0, got 8.0"),
    ("h100", {"rhs": shape(3, 3, 1, 128)}, "every channel must be a group of one output, got 64 and 128 channels"),
    ("h100", {"dtype": "float8_e4m3fn"}, "the result must be float32, bfloat16 or float16"),
    ("h100", {"residual": shape(8, 28, 28, 64, dtype="float32")}, "the dtype of the result, bfloat16, got float32"),
    ("h100", {"lhs_dilation": (1, 2)}, "lhs_dilation must be 1, got (1, 2)"),
    ("h100", {"padding": ((0, 0), (0, 0)), "rhs_dilation": (14, 1)}, "one of the sizes (0, 26)"),
    ("h100", {"rhs": shape(9, 8, 1, 64)}, "the weights of at most 64 taps, got 9 x 8"),
    ("h100", {"padding": ((200, 0), (0, 0))}, "begin at most 128 outside the image"),
    ("h100", {"lhs": shape(1, 1300, 1300, 64), "rhs_dilation": (600, 1)}, "bytes of shared memory"),
]


@pytest.mark.parametrize(("chip", "changes", "reason"), DEPTHWISE_REFUSED)
def test_depthwise_refusals(chip, changes, reason):
    lhs, rhs = (8, 28, 28, 64), (3, 3, 1, 64)
    call = dict(lhs=shape(*lhs), rhs=shape(*rhs), activation=None, dtype="bfloat16")
    call |= geometry(lhs, rhs, *CALL[2:], groups=64)
    with chips.target(chips.named(chip)):
        assert reason in gpu.depthwise_conv.unsupported(**(call | changes))


def test_depthwise_tiles_fit():
    """And move little twice: so many bytes over those of the image and the result."""
    lhs, rhs = (8, 56, 56, 256), (3, 3, 1, 256)
    call = dict(activation=None, dtype="bfloat16", **geometry(lhs, rhs, *CALL[2:], groups=256))
    with chips.target(chips.named("h100")):
        for phase in ("forward", "backward"):
            chosen = gpu.depthwise_conv.tiles(phase, shape(*lhs), shape(*rhs), **call)
            memory = gpu.depthwise_conv.memory(phase, chosen, shape(*lhs), shape(*rhs), **call)
            assert 2 * memory <= chips.named("h100").smem_bytes
            assert next(gpu.depthwise_conv.candidates(phase, shape(*lhs), shape(*rhs), **call)) == chosen
            rows = 7 * (chosen.rows + 2) - 2  # inside of the image
            arrays, partials = (2, 0) if phase == "forward" else (3, 2 * 4 * 56 * 9 / 56**2 / 8 / 2)
            assert (rows / 56 + arrays - 1 + partials) / arrays <= 1.2


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
