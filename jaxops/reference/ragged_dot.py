"""ragged_dot in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    bounds: jax.Array,
    lhs_rows: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    out_weights: jax.Array | None = None,
    *,
    out_size: int,
    dtype: Any,
    precision: Any,
) -> tuple[jax.Array]:
    """y_i = lhs[lhs_rows_i] · rhs_g for bounds_g ≤ i < bounds_{g+1}, else 0;  out[out_rows_i] += out_weights_i · y_i.

    lhs[T, K], rhs[G, K, N], bounds[G + 1] rising; lhs_rows[M], out_rows[M] and out_weights[M] default to i, i and 1.
    A row of lhs that is not there is 0, one of out[out_size, N] is left out. Sums are float32 (float64 for float64).
    """
    wide = jnp.result_type(lhs.dtype, rhs.dtype, dtype, jnp.float32)
    x = lhs if lhs_rows is None else lhs.at[lhs_rows].get(mode="fill", fill_value=0)
    row = jnp.arange(x.shape[0])[:, None]

    @jax.checkpoint  # else its derivative would keep lhs once for every group
    def add_group(y, group):
        weight, first, end = group
        inside = (first <= row) & (row < end)
        product = jnp.matmul(jnp.where(inside, x, 0), weight, precision=precision, preferred_element_type=wide)
        return y + jnp.where(inside, product, 0), None

    y, _ = lax.scan(add_group, jnp.zeros((x.shape[0], rhs.shape[2]), wide), (rhs, bounds[:-1], bounds[1:]))
    if out_weights is not None:
        y = y * out_weights.astype(wide)[:, None]
    if out_rows is not None:
        y = jnp.zeros((out_size, y.shape[1]), wide).at[out_rows].add(y, mode="drop")
    return (y.astype(dtype),)
