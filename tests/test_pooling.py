"""Pooling against float64 and Flax's, of any rank, with ties, padding, and windows that overlap or do not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxops
from jaxops.ops import pooling
from jaxops.reference.pooling import max_pool as reference
from jaxops.workbench.comparison import against_float64
from tests.compare import check, error, some_and_all

slow = pytest.mark.slow
CASES = [  # shape, window, strides, padding
    ((2, 7, 9, 5), (2, 3), (2, 3), "VALID"),
    ((2, 7, 9, 5), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 7, 9, 5), (2, 3), (2, 3), "SAME"),
    ((3, 11, 4), (3,), None, "SAME"),
    ((2, 5, 6, 7, 3), (2, 2, 2), (2, 2, 2), ((0, 1), (1, 1), (1, 0))),
    ((6, 8, 3), (2, 2), (2, 2), "VALID"),  # no batch
    ((2, 3, 6, 8, 3), (2, 2), (3, 1), "VALID"),  # two batch axes
    ((2, 3, 8, 3), (5, 2), (5, 2), "VALID"),  # no window fits
]
SOME_AND_ALL = [*CASES[:2], *(pytest.param(*case, marks=slow) for case in CASES[2:])]


def numbers(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tied(shape, seed=0):
    """Few different numbers: most windows have several largest."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 3, shape), jnp.float32)


def with_gradient(f, x):
    def loss(x):
        y = f(x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    return y, gradient


@pytest.mark.parametrize(("shape", "window", "strides", "padding"), SOME_AND_ALL, ids=str)
def test_max_pool_is_flax_max_pool(shape, window, strides, padding):
    """Where several are largest too: the first has the gradient."""
    for x in (numbers(shape), tied(shape)):
        got = with_gradient(lambda x: jaxops.max_pool(x, window, strides, padding), x)
        want = with_gradient(lambda x: nn.max_pool(x, window, strides, padding), x)
        assert all(jnp.array_equal(a, b) for a, b in zip(got, want, strict=True))


SHIFTED = [  # shape, window, strides, padding
    ((2, 9, 8, 3), (3, 3), (2, 2), ((0, 1), (1, 1))),
    ((2, 9, 8, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((9, 8, 3), (3, 2), (2, 3), ((0, 0), (1, 0))),
    ((2, 9, 8, 3), (2, 4), (3, 1), ((1, 1), (3, 3))),
    ((2, 9, 8, 3), (5, 1), (1, 2), ((4, 6), (0, 0))),
    ((2, 3, 5), (9,), (2,), ((1, 0),)),  # no window fits
]


@pytest.mark.parametrize(("shape", "window", "strides", "padding"), SHIFTED, ids=str)
def test_shifted_reads_are_windows(shape, window, strides, padding):
    """What a TPU does with windows that overlap, with numbers that are not finite."""
    x = numbers(shape).at[..., :3, 0].set(-jnp.inf).at[..., 1, :1, 1].set(jnp.nan)
    how = dict(window=window, strides=strides, padding=padding)
    got = jax.jit(lambda x: pooling.shifted(x, -jnp.inf, jax.lax.max, **how))(x)
    assert np.array_equal(got, reference(x, **how)[0], equal_nan=True)


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(("shape", "window", "strides", "padding"), SOME_AND_ALL, ids=str)
def test_avg_pool_is_flax_avg_pool(shape, window, strides, padding, count_include_pad):
    x = numbers(shape)
    got = with_gradient(lambda x: jaxops.avg_pool(x, window, strides, padding, count_include_pad), x)
    want = with_gradient(lambda x: nn.avg_pool(x, window, strides, padding, count_include_pad), x)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
@pytest.mark.parametrize("strides", [(2, 2), pytest.param((1, 2), marks=slow)])
def test_against_float64(dtype, strides):
    x = numbers((2, 7, 8, 5)).astype(dtype)
    static = dict(window=(2, 2), strides=strides, padding=((0, 1), (1, 0)))
    operator = lambda inputs, **static: jaxops.max_pool(inputs, *static.values())
    check(operator, reference, {"inputs": x}, differentiable=("inputs",), dtype=dtype, transforms=(), **static)
    for f in (
        lambda inputs: jaxops.avg_pool(inputs, (2, 2), strides, "SAME", False),
        lambda inputs: jaxops.adaptive_avg_pool(inputs, (3, 5)),
        jaxops.global_avg_pool,
        jaxops.global_max_pool,
    ):
        rows = against_float64(f, {"inputs": x})
        assert len(rows) == 2 and all(row.holds for row in rows), list(map(str, rows))


@some_and_all
def test_transforms_of_max_pool(transforms):
    static = dict(window=(2, 3), strides=(2, 3), padding=((1, 0), (0, 1)))
    operator = lambda inputs, **static: jaxops.max_pool(inputs, *static.values())
    options = dict(differentiable=("inputs",), sharded={"inputs": 0}, transforms=transforms, **static)
    check(operator, reference, {"inputs": np.asarray(numbers((8, 4, 5, 2)))}, **options)


@slow
@pytest.mark.parametrize("pool", ["avg_pool", "adaptive_avg_pool", "overlapping max_pool"])
def test_transforms_of_the_others(pool):
    f = {
        "avg_pool": lambda x: jaxops.avg_pool(x, (2, 3), (2, 1), "SAME"),
        "adaptive_avg_pool": lambda x: jaxops.adaptive_avg_pool(x, (3, 5)),
        "overlapping max_pool": lambda x: jaxops.max_pool(x, (3, 3), (2, 2), "SAME"),
    }[pool]
    x = {"x": np.asarray(numbers((8, 4, 5, 2)))}
    plain = {"overlapping max_pool": lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")}.get(pool, f)
    check(f, plain, x, differentiable=("x",), sharded={"x": 0})


def test_adaptive_windows_are_torchs():
    """The windows that torch documents: they overlap where sizes do not divide."""
    x = numbers((2, 7, 10, 3))
    for shape in ((7, 10), (3, 4), (1, 1), (5, 20)):
        want = np.zeros((2, *shape, 3))
        for i in range(shape[0]):
            for j in range(shape[1]):
                rows = slice(i * 7 // shape[0], -(-(i + 1) * 7 // shape[0]))
                columns = slice(j * 10 // shape[1], -(-(j + 1) * 10 // shape[1]))
                want[:, i, j] = np.asarray(x, np.float64)[:, rows, columns].mean((1, 2))
        assert error(jaxops.adaptive_avg_pool(x, shape), want) < 1e-6


def test_global_pools():
    x = tied((3, 4, 5, 2))
    assert error(jaxops.global_avg_pool(x), x.mean((1, 2))) < 1e-6
    assert jnp.array_equal(jaxops.global_max_pool(x, keepdims=True), x.max((1, 2), keepdims=True))
    (_, got), (_, want) = (
        with_gradient(f, x) for f in (jaxops.global_max_pool, lambda x: nn.max_pool(x, (4, 5)).reshape(3, 2))
    )
    assert jnp.array_equal(got, want)
    assert jnp.array_equal(jaxops.global_max_pool(x[:, 0, 0]), x[:, 0, 0])
    assert jaxops.global_avg_pool(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_numbers_that_are_none():
    """NaN is the maximum and has the gradient; a window of -inf gives its first place the gradient, not the padding."""
    x = jnp.asarray([[1.0, jnp.nan, 3.0, 2.0, -jnp.inf, -jnp.inf, -jnp.inf]])[..., None]
    y, dx = with_gradient(lambda x: jaxops.max_pool(x, (2,), (2,), ((1, 0),)), x)
    assert jnp.isnan(y[0, 1, 0]) and jnp.array_equal(y[0, [0, 2, 3], 0], jnp.asarray([1.0, 2.0, -jnp.inf]))
    assert (dx[0, :, 0] != 0).tolist() == [True, True, False, True, False, True, False]


def test_nothing_is_scattered_where_windows_do_not_overlap():
    x = jax.ShapeDtypeStruct((8, 32, 32, 16), jnp.float32)
    program = lambda strides: (
        jax.jit(jax.grad(lambda x: jnp.sum(jaxops.max_pool(x, (2, 2), strides) ** 2))).lower(x).as_text()
    )
    assert "select_and_scatter" not in program((2, 2)) and "reduce_window" not in program((2, 2))
    assert "select_and_scatter" in program((1, 1))


BAD = [
    (lambda x: jaxops.max_pool(x, 2), TypeError, "window_shape must be a sequence of ints, got 2"),
    (lambda x: jaxops.max_pool(x, (2, 0)), ValueError, "window_shape must be ints of at least 1"),
    (lambda x: jaxops.max_pool(x, (2,) * 5), ValueError, "inputs must have 5 spatial axes"),
    (lambda x: jaxops.avg_pool(x, (2, 2), (2,)), ValueError, r"strides must be 2 ints.*got \(2,\)"),
    (lambda x: jaxops.avg_pool(x, (2, 2), padding="FULL"), ValueError, "padding must be 'SAME', 'VALID'.*got 'FULL'"),
    (lambda x: jaxops.max_pool(x, (2, 2), padding=(1, 1)), TypeError, "padding must be 'SAME', 'VALID' or pairs"),
    (lambda x: jaxops.max_pool(x, (2, 2), padding=((1, 1),)), ValueError, "padding must be a pair of ints"),
    (lambda x: jaxops.max_pool(x.astype(int), (2, 2)), TypeError, "inputs must be of a floating dtype, got int32"),
    (lambda x: jaxops.max_pool(x, (2, 2), implementation="pallas"), ValueError, "has no Pallas kernel yet"),
    (lambda x: jaxops.global_avg_pool(x[:, :0]), ValueError, "no empty axis between"),
    (lambda x: jaxops.global_max_pool(x[0, 0, 0]), ValueError, r"a batch axis and channels.*got shape \(3,\)"),
    (lambda x: jaxops.adaptive_avg_pool(x, (0, 1)), ValueError, "output_shape must be ints of at least 1"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(jnp.ones((2, 4, 5, 3)))
