"""softmax against its reference and `jax.nn.softmax`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.ops.softmax import softmax
from jaxops.reference.softmax import softmax as reference
from tests.compare import check, error, some_and_all

# shape of x, axes, dtype, shape of `where`, temperature.
CASES = [
    ((1,), (0,), "float32", None, 1.0),
    ((127, 1000), (1,), "float32", None, 0.5),
    ((128, 129), (0,), "bfloat16", None, 1.0),
    ((129, 3, 127), (0, 2), "float32", (127,), 3.0),
    ((1000, 1), (0,), "float16", (1000, 1), 1.0),
    ((5, 128), (1,), "bfloat16", (5, 1), 2.0),
    ((0, 3), (1,), "float32", None, 1.0),
    ((3, 0), (1,), "float32", None, 1.0),
]


def operands_of(shape, where):
    random = np.random.default_rng(0)
    made = dict(x=4 * random.standard_normal(shape))
    return made if where is None else dict(made, where=random.random(where) < 0.6)


@pytest.mark.optimized
@pytest.mark.parametrize(("shape", "axis", "dtype", "where", "temperature"), CASES, ids=str)
def test_values_and_gradients(shape, axis, dtype, where, temperature):
    options = dict(differentiable=("x",), dtype=dtype, transforms=(), axis=axis, temperature=temperature)
    check(softmax, reference, operands_of(shape, where), **options)


@some_and_all
def test_transforms(transforms):
    operands = operands_of((16, 12), (16, 12))
    options = dict(differentiable=("x",), sharded={"x": 0, "where": 0}, transforms=transforms)
    check(softmax, reference, operands, **options, axis=(1,), temperature=0.8)


@pytest.mark.parametrize("axis", [-1, 0, (0, -1), [1]])
def test_against_jax(axis):
    o = {name: jnp.asarray(x) for name, x in operands_of((4, 5, 6), (5, 6)).items()}
    ours, theirs = softmax(o["x"], axis, o["where"]), jax.nn.softmax(o["x"], axis, where=o["where"])
    assert error(ours, theirs) < 1e-6
    assert error(softmax(o["x"], axis), jax.nn.softmax(o["x"], axis)) < 1e-6
    assert error(softmax(o["x"], axis, temperature=0.5), jax.nn.softmax(2 * o["x"], axis)) < 1e-6


def test_a_sum_over_nothing_is_zero_and_so_is_its_gradient():
    x = jnp.array([[1.0, 2.0], [jnp.inf, -jnp.inf]])
    where = jnp.array([[True, True], [False, False]])
    loss = lambda x: jnp.sum(softmax(x, where=where)[:, 0])
    y, dx = softmax(x, where=where), jax.grad(loss)(x)
    assert not y[1].any() and not dx[1].any() and y[0].sum() == pytest.approx(1)


def test_only_the_output_is_kept():
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    pull_back = jax.jit(lambda x, dy: jax.vjp(softmax, x)[1](dy)).lower(x, x).compile()
    assert pull_back.memory_analysis().temp_size_in_bytes <= 1.02 * x.size * 4


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: softmax(jnp.arange(3)), TypeError, "x must be of a floating dtype, got int32"),
        (lambda: softmax(1.0), ValueError, "x must have at least one axis"),
        (lambda: softmax(jnp.ones(3), 1), ValueError, r"axis must be in \[-1, 1\)"),
        (lambda: softmax(jnp.ones((3, 3)), (0, -2)), ValueError, "none twice"),
        (lambda: softmax(jnp.ones(3), ()), ValueError, "at least one axis"),
        (lambda: softmax(jnp.ones(3), 0.5), TypeError, "axis must be an int or a sequence of ints"),
        (lambda: softmax(jnp.ones(3), where=jnp.ones(3)), TypeError, "where must be boolean, got float32"),
        (lambda: softmax(jnp.ones(3), where=jnp.ones(2, bool)), ValueError, r"where must broadcast to \(3,\)"),
        (lambda: softmax(jnp.ones(3), temperature=0), ValueError, "temperature must be above 0, got 0"),
        (lambda: softmax(jnp.ones(3), temperature=jnp.ones(())), TypeError, "temperature must be a Python number"),
        (
            lambda: softmax(jnp.ones((3, 3)), 0, implementation="pallas"),
            ValueError,
            "axis must be the last of the 2 axes",
        ),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
