"""add_rms_norm in plain JAX."""

import jax
import jax.numpy as jnp

from jaxops.reference.rms_norm import rms_norm


def add_rms_norm(
    x: jax.Array, residual: jax.Array, scale: jax.Array, *, eps: float, scale_offset: float
) -> tuple[jax.Array, jax.Array]:
    """total = x + residual;  y = total · rsqrt(mean(total²) + eps) · (scale + scale_offset), over the last axis."""
    total = add(x, residual)
    return (*rms_norm(total, scale, eps=eps, scale_offset=scale_offset), total)


def add(x: jax.Array, residual: jax.Array) -> jax.Array:
    """x + residual in the common dtype, rounded to it once."""
    common = jnp.promote_types(x.dtype, residual.dtype)
    wide = jnp.promote_types(common, jnp.float32)
    return (x.astype(wide) + residual.astype(wide)).astype(common)
