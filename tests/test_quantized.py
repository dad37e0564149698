"""quantize, dequantize, quantized_matmul and the layer made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxops.nn
from jaxops.reference.quantized_matmul import quantized_matmul as reference
from tests.compare import check, some_and_all

DTYPES = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")


def plain(x, w, scales, zeros=None, x_scales=None, bias=None):
    dtype = x.dtype if x_scales is None else x_scales.dtype
    return reference(x, w, scales, zeros, x_scales, bias, dtype=dtype.name)


def operands_of(leading, k, n, *, groups=1, kind="int8", zeros=False, whole=False, bias=True):
    random = np.random.default_rng(0)
    most = 127 if kind == "int8" else 7
    whole_x = lambda: random.integers(-127, 128, (*leading, k)).astype(np.int8)
    made = {
        "x": whole_x() if whole else random.standard_normal((*leading, k)),
        "w": np.asarray(jnp.asarray(random.integers(-most, most + 1, (k, n)), kind)),
        "scales": random.uniform(0.5, 1.5, (groups, n)) / most,
    }
    if zeros:
        made["zeros"] = random.integers(-5, 6, (groups, n)).astype(np.float64)
    if whole:
        made["x_scales"] = random.uniform(0.5, 1.5, (*leading, 1)) / 127
    if bias:
        made["bias"] = random.standard_normal(n)
    return made


# leading shape, k, n, dtype, the rest of `operands_of`
CASES = [
    ((1,), 1, 1, "float32", {}),
    ((17,), 130, 65, "bfloat16", {"groups": 2, "zeros": True}),
    pytest.param((2, 9), 96, 33, "float32", {"groups": 3, "kind": "int4"}, marks=pytest.mark.slow),
    pytest.param((5,), 128, 40, "float16", {"bias": False}, marks=pytest.mark.slow),
    pytest.param((), 64, 31, "float32", {"zeros": True, "kind": "int4"}, marks=pytest.mark.slow),
    pytest.param((2, 7), 100, 31, "float32", {"whole": True}, marks=pytest.mark.slow),
    ((8,), 128, 31, "bfloat16", {"whole": True, "groups": 4, "kind": "int4", "zeros": True}),
    ((0,), 8, 3, "float32", {}),
    ((4,), 8, 0, "float32", {}),
]


@pytest.mark.optimized
@pytest.mark.parametrize(("leading", "k", "n", "dtype", "rest"), CASES)
def test_values_and_gradients(leading, k, n, dtype, rest):
    operands = operands_of(leading, k, n, **rest)
    differentiable = tuple(name for name in operands if name != "w" and not (name == "x" and "whole" in rest))
    check(jaxops.quantized_matmul, plain, operands, differentiable=differentiable, dtype=dtype, transforms=())


@some_and_all
def test_transforms(transforms):
    operands = operands_of((16,), 12, 7, groups=2, zeros=True)
    check(
        jaxops.quantized_matmul,
        plain,
        operands,
        differentiable=("x", "scales", "zeros", "bias"),
        sharded={"x": 0},
        transforms=transforms,
    )


def test_integers_are_exact():
    random = np.random.default_rng(0)
    x, w = (random.integers(-127, 128, shape, np.int8) for shape in ((33, 4096), (4096, 65)))
    ones = jnp.ones((1, 65)), jnp.ones((33, 1))
    y = jaxops.quantized_matmul(x, w, ones[0], x_scales=ones[1])
    np.testing.assert_array_equal(y, (x.astype(np.int64) @ w.astype(np.int64)).astype(np.float32))


@pytest.mark.parametrize("w_kind", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("x_kind", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("groups", [1, 2])
def test_float8_activations(x_kind, w_kind, groups):
    """The product of what the numbers stand for, its value and its gradients."""
    random = np.random.default_rng(0)
    rows = jaxops.quantize(random.standard_normal((33, 130)).astype(np.float32), x_kind)
    w = jaxops.quantize(random.standard_normal((130, 65)).astype(np.float32), w_kind, axis=0, group_size=130 // groups)
    operands = dict(scales=w.scales, x_scales=rows.scales, bias=jnp.asarray(random.standard_normal(65), jnp.float32))

    def oracle(scales, x_scales, bias):
        wide = lambda x: np.asarray(x).astype(np.float64)
        return (wide(rows.values) * x_scales) @ (wide(w.values) * np.repeat(scales, 130 // groups, 0)) + bias

    ours = lambda operands: jaxops.quantized_matmul(rows.values, w.values, **operands)
    y = jax.jit(ours)(operands)
    exact = {name: np.asarray(x, np.float64) for name, x in operands.items()}
    want = oracle(**exact)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    _, pull = jax.vjp(ours, operands)
    (gradients,) = pull(jnp.ones_like(y))
    for name, x in exact.items():  # y is linear in each
        change = (oracle(**exact | {name: x * 2}) - want).sum()
        assert np.sum(np.asarray(gradients[name], np.float64) * x) == pytest.approx(change, rel=1e-4, abs=1e-3)


def test_one_scale_a_column_of_float8_is_left_to_xla():
    x, e4m3 = jnp.ones((16, 256), jnp.bfloat16), jnp.float8_e4m3fn
    for groups, kind, runs in ((1, e4m3, "xla"), (2, e4m3, "pallas"), (1, jnp.int8, "pallas")):
        told = jaxops.explain(
            jaxops.quantized_matmul, x, jnp.ones((256, 128), kind), jnp.ones((groups, 128)), target="v5e"
        )
        assert [line.implementation for line in told.lines] == [runs]


ARRAYS = st.tuples(st.just(3), st.sampled_from([1, 2]), st.just(5), st.integers(0, 2**32 - 1))  # each shape is compiled


@settings(deadline=None, max_examples=50)
@given(ARRAYS, st.sampled_from(DTYPES), st.booleans(), st.floats(-30, 30))
def test_the_error_is_within_half_a_step(sizes, dtype, symmetric, exponent):
    rows, groups, size, seed = sizes
    symmetric = symmetric or dtype.startswith("float8")
    x = np.random.default_rng(seed).standard_normal((rows, groups * size)).astype(np.float32) * np.float32(2**exponent)
    quantized = jaxops.quantize(x, dtype, group_size=size, symmetric=symmetric)
    assert quantized.values.dtype == jnp.dtype(dtype) and quantized.scales.shape == (rows, groups)
    error = np.abs(np.asarray(jaxops.dequantize(quantized)) - x).reshape(rows, groups, size)
    step = np.asarray(quantized.scales)[..., None]
    if dtype.startswith("float8"):  # relative steps, and those of the smallest numbers
        info = jnp.finfo(dtype)
        bound = np.abs(x).reshape(error.shape) * float(info.eps) / 2 + step * float(info.smallest_subnormal) / 2
    else:  # zero points are rounded too
        bound = step * (0.5 if symmetric else 1.0)
    assert (error <= bound * (1 + 1e-5) + np.abs(x).reshape(error.shape) * 1e-6).all()


@settings(deadline=None, max_examples=50)
@given(ARRAYS, st.sampled_from(DTYPES), st.integers(0, 1))
def test_what_is_representable_comes_back(sizes, dtype, axis):
    """Values, by powers of 2, with the largest of each group among them."""
    rows, groups, size, seed = sizes
    random = np.random.default_rng(seed)
    most = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float8_e5m2": 57344}[dtype]
    values = np.array(jnp.asarray(random.integers(-7, 8, (rows, groups, size)), dtype).astype(jnp.float32))
    values[..., random.integers(size)] = most
    x = (values * 2.0 ** random.integers(-20, 20, (rows, groups, 1))).astype(np.float32).reshape(rows, -1)
    x, values = (a if axis else a.T for a in (x, values.reshape(rows, -1)))
    quantized = jaxops.quantize(x, dtype, axis=axis, group_size=size)
    np.testing.assert_array_equal(quantized.values.astype(jnp.float32), values)
    np.testing.assert_array_equal(jaxops.dequantize(quantized), x)


def test_zero_stays_zero_and_groups_of_zeros_are_fine():
    x = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 5.0, 3.0], [-4.0, -1.0, 0.0, -3.0]])
    for symmetric in (True, False):
        back = jaxops.dequantize(jaxops.quantize(x, "int4", symmetric=symmetric))
        assert np.isfinite(back).all() and (np.asarray(back)[np.asarray(x) == 0] == 0).all()


def test_jit_vmap_and_constant_scales():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 8)), jnp.float32)
    both = jax.jit(jax.vmap(jaxops.quantize))(x)
    one = jaxops.quantize(x[1])
    for a, b in zip(both[:2], one[:2], strict=True):
        np.testing.assert_array_equal(a[1], b)
    gradient = jax.grad(lambda x: jaxops.dequantize(jaxops.quantize(x)).sum())(x)
    np.testing.assert_array_equal(gradient, 0)


X, W, S = jnp.ones((4, 6)), jnp.ones((6, 7), jnp.int8), jnp.ones((2, 7))
call = jaxops.quantized_matmul


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: call(X, W.astype(float), S), TypeError, "w must be of one of int8, int4, .*got float32"),
        (lambda: call(X, W.T, S), ValueError, r"w must have shape \(6, n\) for x \(4, 6\), got \(7, 6\); is it trans"),
        (lambda: call(X.astype(jnp.int32), W, S), TypeError, "x must be float32, .*got int32"),
        (lambda: call(X.astype(jnp.int8), W, S), ValueError, "x_scales must be given for an int8 or float8 x, got"),
        (
            lambda: call(X, W, S, x_scales=jnp.ones((4, 1))),
            ValueError,
            "x_scales are for an int8 or float8 x, not float32",
        ),
        (
            lambda: call(X.astype(jnp.int8), W, S, x_scales=jnp.ones(4)),
            ValueError,
            r"x_scales must have shape \(4, 1\)",
        ),
        (lambda: call(X, W, S[0]), ValueError, r"scales must have shape \(g, 7\) with g dividing 6, got \(7,\)"),
        (lambda: call(X, W, jnp.ones((4, 7))), ValueError, r"g dividing 6, got \(4, 7\)"),
        (lambda: call(X, W, S.astype(int)), TypeError, "scales must be of a floating dtype, got int32"),
        (
            lambda: call(X, W, S, zeros=S[:1]),
            ValueError,
            r"zeros must have the shape of scales, \(2, 7\), got \(1, 7\)",
        ),
        (
            lambda: call(X, W.astype(jnp.float8_e5m2), S, zeros=S),
            ValueError,
            "zeros are for integer w, not float8_e5m2",
        ),
        (lambda: call(X, W, S, bias=jnp.ones(6)), ValueError, r"bias must have shape \(7,\)"),
        (lambda: call(X, W, S, dtype="int8"), TypeError, "dtype must be floating, got int8"),
        (lambda: call(X, W, S, implementation="pallas"), ValueError, "k must be a multiple of 128, got 6"),
        (lambda: jaxops.quantize(jnp.ones(3, int)), TypeError, "x must be of a floating dtype, got int32"),
        (lambda: jaxops.quantize(X, "int16"), TypeError, "dtype must be one of int8, int4, .*got int16"),
        (lambda: jaxops.quantize(X, axis=2), ValueError, r"axis must be in \[-2, 2\) for 2 axes, got 2"),
        (lambda: jaxops.quantize(X, group_size=4), ValueError, "a divisor of the 6 elements of axis 1, got 4"),
        (lambda: jaxops.quantize(X, group_size=2.0), TypeError, "group_size must be an int, got float"),
        (lambda: jaxops.quantize(X, "float8_e5m2", symmetric=False), ValueError, "symmetric must be True for float8"),
        (lambda: jaxops.quantize(X, symmetric=1), TypeError, "symmetric must be a bool, got int"),
        (lambda: jaxops.dequantize(jaxops.Quantized(W, S[:, :3])), ValueError, "each axis of scales must divide"),
        (lambda: jaxops.dequantize(jaxops.quantize(X), "int8"), TypeError, "dtype must be floating, got int8"),
        (
            lambda: jaxops.nn.QuantizedLinear(jaxops.quantize(X, axis=0), activations="int4"),
            ValueError,
            "activations must be None or 'int8', got 'int4'",
        ),
        (lambda: jaxops.nn.QuantizedLinear.of(X), TypeError, "linear must be an nnx.Linear or nnx.LinearGeneral, got"),
    ],
)
def test_bad_input(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("dtype, tolerance", [("int8", 0.02), ("int4", 0.2), ("float8_e4m3fn", 0.06)])
def test_a_layer_of_a_trained_one(dtype, tolerance, activations):
    linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    layer = jaxops.nn.QuantizedLinear.of(linear, dtype, group_size=32, activations=activations)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 64)), jnp.float32)
    y, exact = nnx.jit(lambda layer, x: layer(x))(layer, x), linear(x)
    assert y.dtype == exact.dtype
    assert float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)) < tolerance
    assert layer.values[...].dtype == jnp.dtype(dtype) and layer.scales[...].shape == (2, 32)
    assert set(nnx.state(layer, nnx.Param).flat_state().paths) == {("bias",)}
