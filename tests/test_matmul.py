"""matmul against its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.ops.activations import gelu, silu
from jaxops.ops.matmul import matmul
from jaxops.reference.matmul import matmul as reference
from tests.compare import check, error

PLAIN = dict(activation=None, precision=None)
SOME = ("jvp", "vmap of grad", "grad of grad", "shard_map, Explicit mesh", "jit, Explicit mesh")
# leading shape, k, n, bias, dtype, options.
CASES = [
    ((1,), 1, 1, False, "float32", PLAIN),
    ((127,), 128, 129, True, "float32", dict(activation=silu, precision="highest")),
    ((2, 129), 1000, 127, True, "bfloat16", dict(activation=gelu, precision=None)),
    ((128,), 127, 1000, False, "float16", PLAIN),
    ((), 129, 128, True, "float32", PLAIN),
    ((0,), 5, 3, True, "float32", PLAIN),
    ((4,), 0, 3, True, "float32", PLAIN),
]


def operands_of(leading, k, n, bias):
    random = np.random.default_rng(0)
    made = dict(x=random.standard_normal((*leading, k)), w=random.standard_normal((k, n)) / max(k, 1) ** 0.5)
    return dict(made, bias=random.standard_normal(n)) if bias else made


@pytest.mark.parametrize(("leading", "k", "n", "bias", "dtype", "static"), CASES)
def test_values_and_gradients(leading, k, n, bias, dtype, static):
    operands = operands_of(leading, k, n, bias)
    check(matmul, reference, operands, differentiable=tuple(operands), dtype=dtype, transforms=(), **static)


def test_transforms():
    operands = operands_of((16,), 5, 7, True)
    static = dict(activation=silu, precision=None)
    check(matmul, reference, operands, differentiable=tuple(operands), sharded={"x": 0}, transforms=SOME, **static)


def test_bfloat16_is_rounded_once():
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.standard_normal((64, 64)), jnp.bfloat16) for _ in range(2))
    exact = np.tanh(np.asarray(x, np.float64) @ np.asarray(w, np.float64) / 8)
    ours = matmul(x, w, activation=lambda y: jnp.tanh(y / 8))
    assert ours.dtype == jnp.bfloat16
    assert error(ours, exact) <= 2**-8


def test_an_activation_may_close_over_an_array():
    x, w, slope = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.asarray(2.0)
    gradient = jax.grad(lambda slope: matmul(x, w, activation=lambda y: slope * y).sum())(slope)
    assert gradient == pytest.approx(24)


X, W = jnp.ones((4, 3)), jnp.ones((3, 7))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: matmul(X, W.T), ValueError, r"w must have shape \(3, n\) for x \(4, 3\), got \(7, 3\); is it"),
        (lambda: matmul(X, W[0]), ValueError, r"w must have shape \(3, n\)"),
        (lambda: matmul(jnp.ones((4, 3), int), W), TypeError, "x must be of a floating dtype, got int32"),
        (lambda: matmul(1.0, W), ValueError, "x must have at least one axis"),
        (lambda: matmul(X, W, bias=X[0]), ValueError, r"bias must have shape \(7,\)"),
        (lambda: matmul(X, W, activation="relu"), TypeError, "activation must be a function of an array, got str"),
        (lambda: matmul(X, W, activation=jnp.sum), ValueError, r"activation must keep the shape \(4, 7\)"),
        (lambda: matmul(X, W, implementation="pallas"), ValueError, "matmul has no Pallas kernel yet"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
