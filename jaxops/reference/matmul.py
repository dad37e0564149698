"""matmul in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def matmul(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array] | None,
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """y = activation(x · w + bias) + residual: x[..., k], w[k, n], bias[n], residual[..., n]; all in float32, then one
    rounding."""
    dtype = jnp.promote_types(x.dtype, w.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    y = jnp.dot(x, w, precision=precision, preferred_element_type=wide)
    if bias is not None:
        y = y + bias.astype(wide)
    if activation is not None:
        y = activation(y)
    if residual is not None:
        y = y + residual.astype(wide)
    return y.astype(dtype)
