"""quantized_conv against the convolution of what its integers stand for, and against convolutions of integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxops
from jaxops.ops.activations import relu, silu
from tests.compare import check, some_and_all

NHWC = ("NHWC", "HWIO", "NHWC")
call = jaxops.quantized_conv


def plain(lhs, rhs, scales, window_strides, padding, *, lhs_scales=None, zeros=None, bias=None, residual=None, **more):
    """What a user of lax writes: all is widened, then convolved."""
    activation = more.pop("activation", None)
    dtype = lhs.dtype if lhs_scales is None else lhs_scales.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    lhs = lhs.astype(wide) * (1 if lhs_scales is None else lhs_scales.astype(wide))
    spread = lambda x: jnp.kron(
        x.astype(wide), jnp.ones([a // max(b, 1) for a, b in zip(rhs.shape, x.shape, strict=True)])
    )
    weights = (rhs.astype(wide) - (0 if zeros is None else spread(zeros))) * spread(scales)
    kind = dtype if lhs_scales is None else wide
    lhs, weights = lhs.astype(kind), weights.astype(kind)
    y = lax.conv_general_dilated(lhs, weights, window_strides, padding, preferred_element_type=wide, **more)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, more.get("dimension_numbers"))
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(wide), [i for i in range(y.ndim) if i != numbers.out_spec[1]])
    y = y if activation is None else activation(y)
    return (y if residual is None else y + residual.astype(wide)).astype(dtype)


def operands_of(lhs, rhs, scales, *, kind="int8", zeros=False, images=None, top=127, bias=None, residual=None):
    random = np.random.default_rng(0)
    most = 127 if kind != "int4" else 7
    made = {
        "lhs": random.standard_normal(lhs) if images is None else random.integers(-top, top + 1, lhs).astype(np.int8),
        "rhs": np.asarray(jnp.asarray(random.integers(-most, most + 1, rhs), kind)),
        "scales": random.uniform(0.5, 1.5, scales) / most,
    }
    if zeros:
        made["zeros"] = random.integers(-5, 6, scales).astype(np.float64)
    if images is not None:
        made["lhs_scales"] = random.uniform(0.5, 1.5, images) / top
    for name, shape in (("bias", bias), ("residual", residual)):
        if shape is not None:
            made[name] = random.standard_normal(shape)
    return made


# shapes of lhs, rhs and scales, the rest of `operands_of`, dtype, options.
CASES = {
    "W8A16": (
        (2, 7, 5, 3),
        (3, 2, 3, 4),
        (1, 1, 1, 4),
        dict(bias=4, residual=(2, 7, 5, 4)),
        "bfloat16",
        dict(dimension_numbers=NHWC, activation=silu),
    ),
    "W4A16, groups of channels, zeros": (
        (2, 6, 7, 5),
        (4, 6, 3, 3),
        (4, 2, 1, 3),
        dict(kind="int4", zeros=True, bias=4),
        "float32",
        dict(window_strides=(2, 1)),
    ),
    "W8A8, a scale for each image": (
        (3, 9, 8, 5),
        (3, 3, 5, 7),
        (1, 1, 1, 7),
        dict(images=(3, 1, 1, 1), bias=7),
        "float32",
        dict(dimension_numbers=NHWC, rhs_dilation=(2, 1), padding=((2, 1), (-1, 3)), activation=relu),
    ),
    "W8A8, one scale each, one axis": (
        (2, 5, 9),
        (3, 5, 4),
        (1, 1, 1),
        dict(images=(1, 1, 1), residual=(2, 3, 9)),
        "bfloat16",
        {},
    ),
    "W8A8, groups and zeros, transposed": (
        (2, 4, 5, 4),
        (3, 3, 4, 6),
        (1, 1, 2, 3),
        dict(images=(2, 1, 1, 1), zeros=True),
        "float32",
        dict(dimension_numbers=NHWC, lhs_dilation=(2, 3), padding=((2, 1), (1, 2))),
    ),
    "W4A8, depthwise, mixed layouts": (
        (5, 6, 7, 6),
        (3, 3, 1, 6),
        (1, 1, 1, 6),
        dict(images=(1, 6, 1, 1), kind="int4", bias=6),
        "float32",
        dict(dimension_numbers=("HNWC", "HWIO", "NCHW"), feature_group_count=6),
    ),
    "three axes, float16": (
        (2, 3, 4, 5, 3),
        (4, 3, 2, 3, 2),
        (4, 1, 1, 1, 1),
        dict(kind="int4"),
        "float16",
        {},
    ),
    "no images": ((0, 3, 9), (4, 3, 3), (4, 1, 1), {}, "float32", {}),
    "no output channels": ((2, 3, 9), (0, 3, 3), (0, 1, 1), dict(images=(2, 1, 1)), "float32", {}),
}
FAST = ("W4A16, groups of channels, zeros", "W8A8, a scale for each image", "no images")


@pytest.mark.optimized
@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_values_and_gradients(case):
    lhs, rhs, scales, rest, dtype, options = CASES[case]
    operands = operands_of(lhs, rhs, scales, **rest)
    differentiable = tuple(name for name in operands if name != "rhs" and not (name == "lhs" and "images" in rest))
    options = dict(window_strides=(1,) * (len(lhs) - 2), padding="SAME") | options
    check(call, plain, operands, differentiable=differentiable, dtype=dtype, transforms=(), **options)


@some_and_all
def test_transforms(transforms):
    operands = operands_of((16, 4, 5), (6, 4, 3), (6, 2, 1), kind="int4", zeros=True, bias=6)
    check(
        call,
        plain,
        operands,
        differentiable=("lhs", "scales", "zeros", "bias"),
        sharded={"lhs": 0},
        transforms=transforms,
        window_strides=(1,),
        padding="SAME",
        activation=silu,
    )


@some_and_all
def test_transforms_of_integers(transforms):
    operands = operands_of((16, 4, 5), (6, 4, 3), (6, 1, 1), kind="int4", images=(16, 1, 1), top=3, bias=6)
    check(
        call,
        plain,
        operands,
        differentiable=("lhs_scales", "scales", "bias"),
        sharded={"lhs": 0, "lhs_scales": 0},
        transforms=transforms,
        window_strides=(2,),
        padding="SAME",
    )


def test_integers_are_exact():
    """Sums of 4608 products of numbers near 127, which float32 would round, with scales by which no result is."""
    random = np.random.default_rng(0)
    lhs, rhs = random.integers(100, 128, (2, 5, 6, 512), np.int8), random.integers(100, 128, (3, 3, 512, 9), np.int8)
    rhs[..., 5] *= -1
    y = jax.jit(
        lambda lhs, rhs: call(
            *(lhs, rhs, jnp.full((1, 1, 1, 9), 2.0), (1, 1), "SAME"),
            lhs_scales=jnp.full((1, 1, 1, 1), 0.5),
            dimension_numbers=NHWC,
            activation=lambda z: z - 2.0**25,
        )
    )(lhs, rhs)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(lhs.astype(np.int64), ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2)
    )
    want = np.einsum("nhwikl,klio->nhwo", windows, rhs.astype(np.int64))
    assert np.abs(want).max() > 2**24
    np.testing.assert_array_equal(y, want.astype(np.float32) - np.float32(2.0**25))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(kind):
    lhs, rhs, *rest = operands_of((2, 3, 9), (4, 3, 3), (2, 1, 1), kind=kind).values()
    for whole in (None, "int8", kind):
        rows = jaxops.quantize(lhs, whole or "int8", axis=(1, 2))
        given = (rows.values, dict(lhs_scales=rows.scales)) if whole else (jnp.float32(lhs), {})
        got, want = (f(given[0], rhs, *map(jnp.float32, rest), (1,), "SAME", **given[1]) for f in (call, plain))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_what_quantize_returns_fits():
    random = np.random.default_rng(0)
    x, w = random.standard_normal((3, 8, 8, 6)), random.standard_normal((3, 3, 6, 10))
    x[1] *= 100  # an image does not lose by another
    want = lax.conv_general_dilated(x.astype(np.float32), w.astype(np.float32), (1, 1), "SAME", dimension_numbers=NHWC)
    weights, images = jaxops.quantize(w, axis=(0, 1, 2)), jaxops.quantize(x, axis=(1, 2, 3))
    assert weights.scales.shape == (1, 1, 1, 10) and images.scales.shape == (3, 1, 1, 1)
    packed = jaxops.quantize(w, "int4", axis=(0, 1, 2), group_size=3, symmetric=False)
    assert packed.scales.shape == packed.zeros.shape == (1, 1, 2, 10)
    same = dict(dimension_numbers=NHWC)
    for allowed, y in (
        (0.01, call(x, weights.values, weights.scales, (1, 1), "SAME", **same)),
        (0.02, call(images.values, *weights[:2], (1, 1), "SAME", lhs_scales=images.scales, **same)),
        (0.15, call(x, packed.values, packed.scales, (1, 1), "SAME", zeros=packed.zeros, **same)),
    ):
        assert (np.linalg.norm(y - want, axis=(1, 2)) < allowed * np.linalg.norm(want, axis=(1, 2))).all(), allowed


X, W, S = jnp.ones((2, 6, 9)), jnp.ones((4, 6, 3), jnp.int8), jnp.ones((4, 1, 1))
ONE = ((1,), "SAME")


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: call(X, W.astype(float), S, *ONE),
            TypeError,
            "quantized_conv: rhs must be of one of int8, int4, .*32",
        ),
        (
            lambda: call(X.astype(jnp.int32), W, S, *ONE),
            TypeError,
            "lhs must be float32, .*float8 with lhs_scales, got",
        ),
        (
            lambda: call(X.astype(jnp.int8), W, S, *ONE),
            ValueError,
            "lhs_scales must be given for an int8 or float8 lhs, got",
        ),
        (
            lambda: call(X, W, S, *ONE, lhs_scales=S),
            ValueError,
            "lhs_scales are for an int8 or float8 lhs, not float32",
        ),
        (
            lambda: call(X.astype(jnp.int8), W, S, *ONE, lhs_scales=jnp.ones(2)),
            ValueError,
            r"lhs_scales must have shape \(2, 1, 1\) or \(1, 1, 1\), got \(2,\)",
        ),
        (
            lambda: call(X, W, S[:, 0], *ONE),
            ValueError,
            r"each axis of scales must divide that of rhs \(4, 6, 3\), got",
        ),
        (lambda: call(X, W, jnp.ones((3, 1, 1)), *ONE), ValueError, r"must divide .*, got \(3, 1, 1\)"),
        (lambda: call(X, W, jnp.ones((4, 0, 1)), *ONE), ValueError, r"must divide .*, got \(4, 0, 1\)"),
        (lambda: call(X, W, S.astype(int), *ONE), TypeError, "scales must be of a floating dtype, got int32"),
        (lambda: call(X, W, S, *ONE, zeros=S[:2]), ValueError, "zeros must have the shape of scales"),
        (lambda: call(X, W.astype(jnp.float8_e5m2), S, *ONE, zeros=S), ValueError, "zeros are for integer rhs"),
        (lambda: call(X, W, S, *ONE, bias=jnp.ones(6)), ValueError, r"bias must have shape \(4,\)"),
        (lambda: call(X, W, S, *ONE, residual=X), ValueError, r"residual must have shape \(2, 4, 9\)"),
        (lambda: call(X, W, S, *ONE, activation=3), TypeError, "activation must be a function"),
        (lambda: call(X, W, S, *ONE, dtype="int8"), TypeError, "dtype must be floating, got int8"),
        (lambda: call(X, W, S, (1, 1), "SAME"), ValueError, "quantized_conv: window_strides must be a sequence of 1"),
        (lambda: call(X, W, S, (1,), "FULL"), ValueError, "quantized_conv: padding must be one of SAME"),
        (lambda: call(X[:, :5], W, S, *ONE), ValueError, "quantized_conv: rhs must have 5 input channels"),
        (lambda: call(X, W, S, *ONE, feature_group_count=5), ValueError, "quantized_conv: feature_group_count must"),
        (lambda: call(X, W, S, *ONE, implementation="pallas"), ValueError, "quantized_conv has no Pallas kernel yet"),
    ],
)
def test_bad_input(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
