"""sparse_2_4_matmul in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxops.reference.matmul import matmul


def sparse_2_4_matmul(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array] | None,
    precision: jax.lax.PrecisionLike,
) -> tuple[jax.Array]:
    """y = activation(x · dense + bias) + residual: x[..., k], the matrix [k, n] of values[k / 2, n] and indices."""
    dense = expanded(values, indices)
    return (matmul(x, dense, bias, residual, activation=activation, precision=precision),)


def expanded(values: jax.Array, indices: jax.Array) -> jax.Array:
    """[k, n] of values[k / 2, n], 2 for each 4 rows, and indices uint8[⌈k / 8⌉, n], 2 bits for the place of each."""
    half, n = values.shape
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
    places = ((indices[:, None] >> shifts) & 3).reshape(-1, n)[:half].reshape(-1, 2, 1, n)
    there = places == jnp.arange(4, dtype=jnp.uint8)[:, None]
    return jnp.sum(jnp.where(there, values.reshape(-1, 2, 1, n), 0), 1, dtype=values.dtype).reshape(2 * half, n)
