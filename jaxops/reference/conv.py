"""conv in plain JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def conv(
    lhs: jax.Array,
    rhs: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array] | None,
    dtype: Any,
    out_sharding: Any = None,
    **geometry: Any,
) -> jax.Array:
    """y = activation(lhs ∗ rhs + bias) + residual, all in float32, then one rounding to `dtype`."""
    z = linear(lhs, rhs, bias, dtype=dtype, out_sharding=out_sharding, **geometry)
    y = z if activation is None else activation(z)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return y.astype(dtype)


def linear(
    lhs: jax.Array, rhs: jax.Array, bias: jax.Array | None, *, dtype: Any, out_sharding: Any = None, **geometry: Any
) -> jax.Array:
    """lhs ∗ rhs + bias in float32, or float64 where an operand or `dtype` is. geometry: what is left of the arguments
    of `lax.conv_general_dilated`, the dimension numbers as its canonical form."""
    common = jnp.promote_types(lhs.dtype, rhs.dtype)
    wide = jnp.promote_types(jnp.promote_types(common, dtype), jnp.float32)
    z = lax.conv_general_dilated(
        lhs.astype(common), rhs.astype(common), preferred_element_type=wide, out_sharding=out_sharding, **geometry
    )
    return biased(z, bias, geometry["dimension_numbers"].out_spec[1])


def biased(z: jax.Array, bias: jax.Array | None, channels: int) -> jax.Array:
    """z + bias along the axis `channels`."""
    if bias is None:
        return z
    return z + jnp.expand_dims(bias.astype(z.dtype), [axis for axis in range(z.ndim) if axis != channels])
