"""block_sparse_matmul in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxops.reference.matmul import matmul


def block_sparse_matmul(
    x: jax.Array,
    w: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    size: int,
    activation: Callable[[jax.Array], jax.Array] | None,
    precision: jax.lax.PrecisionLike,
) -> tuple[jax.Array]:
    """y = activation(x · dense(w) + bias) + residual: x[..., k], of the matrix [k, size] the blocks w[s, bk, bn] that
    stand at rows[s] and columns[s] of its grid; the rest is zero."""
    dense = expanded(w, rows, columns, (x.shape[-1], size))
    return (matmul(x, dense, bias, residual, activation=activation, precision=precision),)


def expanded(w: jax.Array, rows: jax.Array, columns: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The matrix of `shape` with the blocks w[s, bk, bn]; those at the same place are added."""
    _, bk, bn = w.shape
    grid = jnp.zeros((shape[0] // bk, shape[1] // bn, bk, bn), w.dtype).at[rows, columns].add(w)
    return grid.transpose(0, 2, 1, 3).reshape(shape)


def columns_of(offsets: jax.Array, count: int) -> jax.Array:
    """The column of each of `count` blocks, of which those of column c are offsets[c] … offsets[c + 1] - 1."""
    columns = jnp.sum(jnp.arange(count, dtype=jnp.int32)[:, None] >= offsets[1:], 1, dtype=jnp.int32)
    return jnp.minimum(columns, offsets.shape[0] - 2)
