"""gelu, silu, relu, squared_relu against their references and `jax.nn`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.ops.activations import gelu, relu, silu, squared_relu
from jaxops.reference import activations as reference
from tests.compare import SOME, check, error, some_and_all

ACTIVATIONS = {
    "gelu": (functools.partial(gelu, approximate=False), reference.gelu_exact),
    "gelu_tanh": (gelu, reference.gelu_tanh),
    "silu": (silu, reference.silu),
    "relu": (relu, reference.relu),
    "squared_relu": (squared_relu, reference.squared_relu),
}
CASES = [((), "float32"), ((1000,), "float32"), ((127, 129), "bfloat16"), ((1, 128), "float16"), ((0, 3), "float32")]


def operands_of(shape):
    return dict(x=np.asarray(3 * np.random.default_rng(0).standard_normal(shape)))


@pytest.mark.optimized
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_values_and_gradients(name, shape, dtype):
    check(*ACTIVATIONS[name], operands_of(shape), differentiable=("x",), dtype=dtype, transforms=())


@some_and_all
def test_transforms(transforms):
    operands = {"x": operands_of((16, 5))["x"] / 3}
    check(*ACTIVATIONS["gelu"], operands, differentiable=("x",), sharded={"x": 0}, transforms=transforms)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "gelu"])
def test_transforms_of_plain_jax(name):
    operands = {"x": operands_of((16, 5))["x"] / 3}
    check(*ACTIVATIONS[name], operands, differentiable=("x",), sharded={"x": 0}, transforms=SOME)


def test_against_jax():
    x = jnp.linspace(-12, 12, 1001)
    for ours, theirs in [
        (gelu(x), jax.nn.gelu(x)),
        (gelu(x, False), jax.nn.gelu(x, approximate=False)),
        (silu(x), jax.nn.silu(x)),
        (relu(x), jax.nn.relu(x)),
        (squared_relu(x), jax.nn.relu(x) ** 2),
    ]:
        assert error(ours, theirs) < 1e-6


def test_exact_gelu_keeps_its_left_tail():
    x = jnp.array([-5.0, -8.0, -12.0])
    with jax.enable_x64(True):
        exact = reference.gelu_exact(jnp.asarray(x, jnp.float64))[0]
    np.testing.assert_allclose(gelu(x, approximate=False), exact, rtol=1e-5)


@pytest.mark.parametrize("activation", [silu, relu, gelu, functools.partial(gelu, approximate=False)])
def test_slopes_far_out(activation):
    slopes = [float(jax.grad(activation)(x)) for x in (-1e4, 1e4, -100.0, 100.0)]
    np.testing.assert_allclose(slopes, [0, 1, 0, 1], atol=1e-6)


def test_slope_of_exact_gelu_at_infinity():
    slope = jax.grad(functools.partial(gelu, approximate=False))
    assert slope(jnp.inf) == 1 and slope(-jnp.inf) == 0


def test_exact_gelu_keeps_nothing():
    x, exact = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), functools.partial(gelu, approximate=False)
    compiled = jax.jit(lambda x, dy: jax.vjp(exact, x)[1](dy)).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1e5


@pytest.mark.parametrize("activation", [gelu, silu, relu, squared_relu])
def test_bad_input(activation):
    name = activation.__name__
    with pytest.raises(TypeError, match=f"{name}: x must be of a floating dtype, got int32"):
        activation(jnp.arange(3))
    with pytest.raises(TypeError, match=f"{name}: x must be an array"):
        activation("x")
    with pytest.raises(ValueError, match=f"{name} has no Pallas kernel yet"):
        activation(jnp.ones(3), implementation="pallas")
    with pytest.raises(ValueError, match="implementation must be"):
        activation(jnp.ones(3), implementation="triton")


def test_approximate_is_a_bool():
    with pytest.raises(TypeError, match="approximate must be a Python bool, got str"):
        gelu(jnp.ones(3), "tanh")
