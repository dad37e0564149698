"""new_operator against float64, in XLA and in its kernels; its derivatives, its layer, bad input."""

import functools

import jax
import jax.numpy as jnp
import jaxops
import pytest
from jaxops.workbench.comparison import against_float64

import new_package.new_operator as module

# Rows that divide no tile, features that fill no register.
CASES = [((5, 7), "float32"), ((150, 129), "float32"), ((2, 75, 128), "bfloat16")]


def operands(shape, dtype):
    keys = jax.random.split(jax.random.key(0))
    return {"x": jax.random.normal(keys[0], shape, dtype), "scale": jax.random.normal(keys[1], shape[-1:], dtype)}


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_value_and_gradients(shape, dtype):
    for row in against_float64(module.new_operator, operands(shape, dtype)):
        assert row.holds, str(row)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_kernels_in_the_interpreter(shape, dtype):
    kernels = functools.partial(module.new_operator, implementation="pallas")
    within = functools.partial(jaxops.target, "v5e", interpret=True)
    for row in against_float64(kernels, operands(shape, dtype), within=within):
        assert row.holds, str(row)


def test_other_tiles_give_the_same():
    x, scale = operands((150, 129), "float32").values()
    saved = {"outputs": (), "residuals": (), "cotangents": (x,)}
    with jaxops.target("v5e", interpret=True):
        (y,), _ = module.tpu_forward(x, scale, tiles=module.Tiles(32))
        gradients = module.tpu_backward(x, scale, tiles=module.Tiles(32), **saved)
    assert jnp.allclose(y, module.reference(x, scale)[0], rtol=1e-5)
    for name, expected in module.xla_backward(x, scale, **saved).items():
        assert jnp.allclose(gradients[name], expected, rtol=1e-4, atol=1e-5), name


def test_second_derivatives_and_vmap():
    x, scale = operands((5, 7), "float32").values()
    gradient = jax.grad(lambda scale: jnp.sum(module.new_operator(x, scale) ** 2))
    _, along = jax.jvp(gradient, (scale,), (jnp.ones(7),))
    assert jnp.allclose(along, 2 * jnp.sum(module.activation(x) ** 2, axis=0), rtol=1e-5)
    mapped = jax.vmap(module.new_operator, in_axes=(0, None))
    assert jnp.allclose(mapped(x, scale), module.new_operator(x, scale), rtol=1e-6)


def test_the_layer():
    x = operands((5, 7), "float32")["x"]
    layer = module.NewOperator(7)
    assert jnp.allclose(layer(x), module.activation(x), rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"scale must have shape \(7,\)"):
        module.new_operator(jnp.ones((5, 7)), jnp.ones(8))
    with pytest.raises(TypeError, match="x must be of a floating dtype"):
        module.new_operator(jnp.ones((5, 7), int), jnp.ones(7))
