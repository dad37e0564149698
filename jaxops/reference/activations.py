"""Activations in plain JAX: float32 inside (float64 for float64), the dtype of x outside."""

import jax
import jax.numpy as jnp


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gelu_exact(x: jax.Array) -> tuple[jax.Array]:
    """y = x · Φ(x), Φ the distribution function of the normal distribution: Φ(x) = erfc(-x / √2) / 2."""
    wide = _wide(x)
    # erfc, not 1 + erf: the left tail would cancel.
    return ((0.5 * wide * jax.lax.erfc(-wide * 0.5**0.5)).astype(x.dtype),)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """y = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))."""
    return jax.nn.gelu(_wide(x), approximate=True).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    """y = x · sigmoid(x)."""
    return jax.nn.silu(_wide(x)).astype(x.dtype)


def relu(x: jax.Array) -> jax.Array:
    """y = max(x, 0); the derivative at 0 is 0."""
    return jax.nn.relu(x)


def squared_relu(x: jax.Array) -> jax.Array:
    """y = max(x, 0)²."""
    return jnp.square(relu(_wide(x))).astype(x.dtype)
