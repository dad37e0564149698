"""matmul against its reference."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxops.ops import row_tiles
from jaxops.ops.activations import gelu, silu
from jaxops.ops.matmul import matmul
from jaxops.reference.matmul import matmul as reference
from tests.compare import check, error, some_and_all

exact_gelu = functools.partial(gelu, approximate=False)  # an operator in itself
PLAIN = dict(activation=None, precision=None)
BOTH, BIAS = ("bias", "residual"), ("bias",)
# leading shape, k, n, what comes after the product, dtype, options.
CASES = [
    ((1,), 1, 1, (), "float32", PLAIN),
    ((127,), 128, 129, BOTH, "float32", dict(activation=silu, precision="highest")),
    ((2, 129), 1000, 127, BIAS, "bfloat16", dict(activation=gelu, precision=None)),
    ((2, 7), 100, 127, BOTH, "bfloat16", dict(activation=exact_gelu, precision=None)),
    ((128,), 127, 1000, (), "float16", PLAIN),
    ((30,), 65, 100, BIAS, "float16", dict(activation=silu, precision=None)),
    ((), 129, 128, ("residual",), "float32", PLAIN),
    ((0,), 5, 3, BOTH, "float32", PLAIN),
    ((4,), 0, 3, BOTH, "float32", PLAIN),
]


def operands_of(leading, k, n, more):
    random = np.random.default_rng(0)
    made = dict(x=random.standard_normal((*leading, k)), w=random.standard_normal((k, n)) / max(k, 1) ** 0.5)
    shapes = dict(bias=(n,), residual=(*leading, n))
    return made | {name: random.standard_normal(shapes[name]) for name in more}


@pytest.mark.optimized
@pytest.mark.parametrize(("leading", "k", "n", "more", "dtype", "static"), CASES)
def test_values_and_gradients(leading, k, n, more, dtype, static):
    operands = operands_of(leading, k, n, more)
    check(matmul, reference, operands, differentiable=tuple(operands), dtype=dtype, transforms=(), **static)


@some_and_all
def test_transforms(transforms):
    operands = operands_of((16,), 5, 7, BOTH)
    static = dict(activation=silu, precision=None)
    check(
        matmul,
        reference,
        operands,
        differentiable=tuple(operands),
        sharded={"x": 0, "residual": 0},
        transforms=transforms,
        **static,
    )


@pytest.mark.parametrize("transforms", [(), pytest.param(None, marks=pytest.mark.slow)], ids=["none", "all"])
def test_blocks_of_rows(transforms, monkeypatch):
    monkeypatch.setattr(row_tiles, "_MAPPED_ELEMENTS", 0)
    monkeypatch.setattr(row_tiles, "_BLOCK_ELEMENTS", 33)  # three rows of eleven, of which some remain
    operands = operands_of((8, 7), 5, 11, BOTH)
    static = dict(activation=silu, precision=None)
    sharded = {"x": 0, "residual": 0}
    names = tuple(operands)
    check(matmul, reference, operands, differentiable=names, sharded=sharded, transforms=transforms, **static)
    check(matmul, reference, operands, differentiable=names, dtype="bfloat16", transforms=(), **static)


@pytest.mark.slow
def test_transforms_in_bfloat16():
    operands = operands_of((16,), 9, 13, BOTH)
    static = dict(activation=silu, precision=None, dtype="bfloat16")
    sharded = {"x": 0, "residual": 0}
    check(matmul, reference, operands, differentiable=tuple(operands), sharded=sharded, **static)


def test_the_gradient_of_a_weight_in_another_layout():
    # XLA fails where it may choose a layout for the sums of a product of bfloat16.
    x, dz = (jnp.asarray(operands_of((40,), 24, 24, ())["x"], jnp.bfloat16) for _ in range(2))
    turned = jax.jit(lambda x, dz: row_tiles.outer_products(x, dz).T)(x, dz)
    assert error(turned, np.asarray(dz, np.float64).T @ np.asarray(x, np.float64)) < 1e-5


def test_a_gradient_can_be_exported():
    x, w = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((4, 6), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda w: matmul(x, w, activation=jnp.tanh).sum(dtype=jnp.float32)))
    assert jnp.array_equal(jax.export.export(gradient, platforms=["cpu"])(w).call(w), gradient(w))


def test_rows_of_many_devices_stay_there(monkeypatch):
    monkeypatch.setattr(row_tiles, "_MAPPED_ELEMENTS", 0)
    monkeypatch.setattr(row_tiles, "_BLOCK_ELEMENTS", 1 << 10)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((256, 24), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct((24, 40), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    loss = lambda x, w: matmul(x, w, activation=jnp.tanh).sum(dtype=jnp.float32)
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, w).compile().as_text()
    assert "while(" in program and "all-reduce(" in program
    assert not any(f"{moved}(" in program for moved in ("all-gather", "all-to-all", "collective-permute"))


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
    constant = matmul(x, w, activation=lambda y: slope * y)
    assert jnp.array_equal(constant, jnp.full((2, 4), 6))


def test_float16_beyond_its_range_before_the_activation():
    x, w = jnp.full((1, 64), 60, jnp.float16), jnp.full((64, 1), 60, jnp.float16)
    y, gradient = jax.value_and_grad(lambda x: matmul(x, w, activation=lambda z: 1e-3 * z).sum())(x)
    assert y == pytest.approx(230.4, rel=1e-3)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), 0.06, rtol=1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_weight_split_over_its_columns_splits_the_result(kind):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    o = operands_of((8,), 16, 12, BOTH)
    specs = dict(x=P("data"), w=P(None, "tensor"), bias=P("tensor"), residual=P("data", "tensor"))
    placed = {
        name: jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, specs[name])) for name, x in o.items()
    }
    with jax.set_mesh(mesh):
        y = jax.jit(lambda o: matmul(**o, activation=silu))(placed)
        if kind == AxisType.Explicit:
            with pytest.raises(ValueError, match=r"wrap the call in jax\.shard_map"):
                matmul(**placed, implementation="pallas")
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "tensor")), 2)
    assert error(y, reference(**{n: jnp.asarray(x) for n, x in o.items()}, activation=silu, precision=None)) < 1e-5


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x


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
        (lambda: matmul(X, W, residual=X), ValueError, r"residual must have shape \(4, 7\) \(that of x · w\)"),
        (lambda: matmul(X, W, activation=jnp.sum), ValueError, r"activation must keep the shape .*got \(\)"),
        (lambda: matmul(X, W, activation=Unhashable()), TypeError, "activation must be a hashable function"),
        (lambda: matmul(X, W, implementation="pallas"), ValueError, "kernels run on TPU and CUDA only"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
