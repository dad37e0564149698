"""rope against its reference, rotation of complex numbers, and Llama 3's frequencies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.ops.rope import RopeScaling, rope, rope_projection
from jaxops.reference.rope import frequencies
from jaxops.reference.rope import rope as reference
from tests.compare import check, error, some_and_all

LLAMA = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
PLAIN = dict(base=10000.0, scaling=None)
# shape of x, shape of positions, dtype, options.
CASES = [
    ((1, 1, 2), (1,), "float32", PLAIN),
    ((2, 127, 3, 64), (127,), "float32", PLAIN),
    ((2, 129, 1, 128), (2, 129), "bfloat16", dict(base=500000.0, scaling=LLAMA)),
    ((128, 2, 6), (), "float16", dict(base=100.0, scaling=4.0)),
    ((1000, 2, 16), (1000,), "float32", dict(base=10000.0, scaling=2.0)),
    ((2, 0, 3, 4), (0,), "float32", PLAIN),
]


def operands_of(shape, positions):
    random = np.random.default_rng(0)
    return dict(x=random.standard_normal(shape), positions=random.integers(0, 1000, positions, dtype=np.int32))


@pytest.mark.optimized
@pytest.mark.parametrize(("shape", "positions", "dtype", "static"), CASES, ids=str)
def test_values_and_gradients(shape, positions, dtype, static):
    operands = operands_of(shape, positions)
    check(rope, reference, operands, differentiable=("x",), dtype=dtype, transforms=(), **static)


@some_and_all
def test_transforms(transforms):
    operands = operands_of((16, 3, 2, 4), (16, 3))
    options = dict(differentiable=("x",), sharded={"x": 0, "positions": 0}, transforms=transforms)
    check(rope, reference, operands, **options, **PLAIN)


def projection(x, w, positions, bias=None, **options):
    z = jnp.tensordot(x, w, 1, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return reference(z if bias is None else z + bias.astype(z.dtype), positions, **options).astype(x.dtype)


# leading axes and T, D, N, H, shape of positions, bias, dtype, options.
PROJECTIONS = [
    ((1,), 1, 1, 2, (1,), False, "float32", PLAIN),
    pytest.param(((2, 127), 65, 3, 64, (127,), True, "float32", PLAIN), marks=pytest.mark.slow),
    ((2, 33), 128, 2, 128, (2, 33), True, "bfloat16", dict(base=500000.0, scaling=LLAMA)),
    pytest.param(((20,), 30, 2, 6, (), False, "float16", dict(base=100.0, scaling=4.0)), marks=pytest.mark.slow),
    ((2, 0), 4, 3, 4, (0,), False, "float32", PLAIN),
]


def projected(leading, depth, heads, dim, positions, bias):
    random = np.random.default_rng(0)
    operands = dict(x=random.standard_normal((*leading, depth)), w=random.standard_normal((depth, heads, dim)))
    operands["w"] /= depth**0.5
    operands["positions"] = random.integers(0, 1000, positions, dtype=np.int32)
    return operands | ({"bias": random.standard_normal((heads, dim))} if bias else {})


@pytest.mark.optimized
@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_projections_and_gradients(case):
    *sizes, dtype, static = case
    operands = projected(*sizes)
    differentiable = tuple(name for name in operands if name != "positions")
    check(rope_projection, projection, operands, differentiable=differentiable, dtype=dtype, transforms=(), **static)


@some_and_all
def test_transforms_of_a_projection(transforms):
    operands = projected((16, 3), 5, 2, 4, (16, 3), True)
    options = dict(differentiable=("x", "w", "bias"), sharded={"x": 0, "positions": 0}, transforms=transforms)
    check(rope_projection, projection, operands, **options, **PLAIN)


def test_kernels_are_used_where_they_are_asked_for():
    operands = {name: jnp.asarray(x, jnp.bfloat16) for name, x in operands_of((2, 8, 3, 128), ()).items()}
    turn = lambda x, how: rope(x, jnp.arange(8), implementation=how).astype(jnp.float32).sum()
    assert (
        "mosaic_gpu"
        not in jax.jit(turn, static_argnums=1).trace(operands["x"], None).lower(lowering_platforms=("cuda",)).as_text()
    )
    for f in (turn, jax.grad(turn)):
        program = jax.jit(f, static_argnums=1).trace(operands["x"], ("pallas", "xla"))
        assert "mosaic_gpu" in program.lower(lowering_platforms=("cuda",)).as_text()
        assert "tpu_custom_call" in program.lower(lowering_platforms=("tpu",)).as_text()
    np.testing.assert_array_equal(turn(operands["x"], ("pallas", "xla")), turn(operands["x"], None))


def test_rotates_the_halves_as_complex_numbers():
    operands = operands_of((5, 3, 8), (5,))
    x = operands["x"]
    angle = operands["positions"][:, None, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    assert error(rope(**operands), np.concatenate([turned.real, turned.imag], -1)) < 1e-4


def test_scores_depend_on_distance_only():
    q, k = (jnp.asarray(np.random.default_rng(seed).standard_normal((1, 1, 64)), jnp.float32) for seed in (0, 1))
    score = lambda i, j: jnp.sum(rope(q, jnp.array([i])) * rope(k, jnp.array([j])))
    assert score(7, 3) == pytest.approx(float(score(107, 103)), rel=1e-4)


def test_llama_3_frequencies():
    plain, scaled = frequencies(128, 500000.0, None), frequencies(128, 500000.0, LLAMA)
    for frequency, got in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            want = frequency
        elif wavelength > 8192:
            want = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * frequency / 8 + smooth * frequency
        assert got == pytest.approx(want, rel=1e-12)


X, W = jnp.ones((5, 2, 4)), jnp.ones((3, 1, 6))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: rope(jnp.ones((5, 2, 3)), jnp.arange(5)), ValueError, "with H even"),
        (lambda: rope(jnp.ones((2, 4)), jnp.arange(2)), ValueError, r"x must have shape \[..., T, N, H\]"),
        (lambda: rope(jnp.ones((5, 2, 4), int), jnp.arange(5)), TypeError, "x must be of a floating dtype, got int32"),
        (lambda: rope(X, jnp.arange(2)), ValueError, r"positions must broadcast to \(5,\).*got shape \(2,\)"),
        (lambda: rope(X, jnp.ones(5, bool)), TypeError, "positions must be integer or floating, got bool"),
        (lambda: rope(X, jnp.arange(5), base=0), ValueError, "base must be above 0"),
        (lambda: rope(X, jnp.arange(5), scaling=-2.0), ValueError, "scaling must be above 0"),
        (lambda: rope(X, jnp.arange(5), scaling="yarn"), TypeError, "scaling must be a Python number, got str"),
        (lambda: rope(X, jnp.arange(5), scaling=RopeScaling(8, 4, 4, 99)), ValueError, "high_frequency_factor must"),
        (lambda: rope(X, jnp.arange(5), scaling=RopeScaling(0, 1, 4, 99)), ValueError, "scaling.factor must be"),
        (
            lambda: rope(X, jnp.arange(5.0), implementation="pallas"),
            ValueError,
            "floating positions have a gradient, in XLA",
        ),
        (lambda: rope_projection(X[0], W, jnp.arange(2)), ValueError, r"w must have shape \(4, N, H\) for x \(2, 4\)"),
        (lambda: rope_projection(jnp.ones(3), W, 0), ValueError, r"x must have shape \[..., T, D\], got \(3,\)"),
        (
            lambda: rope_projection(jnp.ones((2, 3)), W, jnp.arange(4)),
            ValueError,
            r"positions must broadcast to \(2,\)",
        ),
        (
            lambda: rope_projection(jnp.ones((2, 3)), W, 0, bias=jnp.ones(6)),
            ValueError,
            r"bias must have shape \(1, 6\) \(the heads of w\)",
        ),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
