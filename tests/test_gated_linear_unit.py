"""gated_linear_unit against its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.ops import row_tiles
from jaxops.ops.activations import gelu, silu
from jaxops.ops.gated_linear_unit import gated_linear_unit
from jaxops.reference.gated_linear_unit import gated_linear_unit as reference
from tests.compare import check, error, some_and_all

# leading shape, k, n, dtype, activation, precision.
CASES = [
    ((1,), 1, 1, "float32", silu, None),
    ((127,), 128, 129, "float32", gelu, "highest"),
    ((2, 129), 1000, 127, "bfloat16", silu, "highest"),
    ((128,), 127, 1000, "float16", jax.nn.sigmoid, None),
    ((), 129, 128, "float32", lambda x: x, jax.lax.Precision.HIGH),
    ((0,), 5, 3, "float32", silu, None),
]


def operands_of(leading, k, n):
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((k, n)) / k**0.5 for name in ("w_gate", "w_up")}
    return dict(x=random.standard_normal((*leading, k)), **weights)


@pytest.mark.optimized
@pytest.mark.parametrize(("leading", "k", "n", "dtype", "activation", "precision"), CASES)
def test_values_and_gradients(leading, k, n, dtype, activation, precision):
    operands = operands_of(leading, k, n)
    options = dict(differentiable=tuple(operands), dtype=dtype, transforms=())
    check(gated_linear_unit, reference, operands, activation=activation, precision=precision, **options)


@some_and_all
def test_transforms(transforms):
    operands = operands_of((16,), 5, 7)
    options = dict(differentiable=tuple(operands), sharded={"x": 0}, transforms=transforms)
    check(gated_linear_unit, reference, operands, activation=silu, precision=None, **options)


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(row_tiles, "_MAPPED_ELEMENTS", 0)
    monkeypatch.setattr(row_tiles, "_BLOCK_ELEMENTS", 66)  # three rows of two times eleven, of which some remain
    operands = operands_of((8, 7), 5, 11)
    options = dict(differentiable=tuple(operands), dtype="bfloat16", transforms=())
    check(gated_linear_unit, reference, operands, activation=silu, precision=None, **options)


def test_the_formula():
    o = {name: jnp.asarray(x) for name, x in operands_of((6,), 5, 7).items()}
    gate, up = o["x"] @ o["w_gate"], o["x"] @ o["w_up"]
    assert error(gated_linear_unit(**o), gate * jax.nn.sigmoid(gate) * up) < 1e-6
    assert error(gated_linear_unit(**o, activation=lambda z: z**3), gate**3 * up) < 1e-5


@pytest.mark.parametrize("precision", [None, "highest"])
def test_all_products_have_the_precision(precision):
    """The two of the value and the four of its gradients."""
    o = {name: jnp.asarray(x, jnp.float32) for name, x in operands_of((6,), 5, 7).items()}
    program = jax.jit(jax.grad(lambda o: gated_linear_unit(**o, precision=precision).sum())).lower(o).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    wanted = "DEFAULT" if precision is None else "HIGHEST"
    assert len(products) == 6 and all(f"[{wanted}, {wanted}]" in line for line in products)


X, W = jnp.ones((4, 3)), jnp.ones((3, 7))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: gated_linear_unit(X, W.T, W), ValueError, r"w_gate must have shape \(3, n\).*is it transposed"),
        (lambda: gated_linear_unit(X, W, W[:, :2]), ValueError, r"w_up must have shape \(3, 7\) \(the shape of w_gate"),
        (lambda: gated_linear_unit(jnp.ones((4, 3), int), W, W), TypeError, "x must be of a floating dtype, got int32"),
        (lambda: gated_linear_unit(X, W, W, activation=None), TypeError, "activation must be a function of an array"),
        (lambda: gated_linear_unit(X, W, W, activation=jnp.sum), ValueError, "activation must keep the shape"),
        (lambda: gated_linear_unit(X, W, W, implementation="pallas"), ValueError, "kernels run on TPU and CUDA only"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
