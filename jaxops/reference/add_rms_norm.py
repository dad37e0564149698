"""add_rms_norm in plain JAX."""

import jax
import jax.numpy as jnp

from jaxops.reference.rms_norm import rms_norm


def add_rms_norm(
    x: jax.Array, residual: jax.Array, scale: jax.Array, *, eps: float, scale_offset: float, dtype: str | None = None
) -> tuple[jax.Array, ...]:
    """total = x + residual;  y = total · rsqrt(mean(total²) + eps) · (scale + scale_offset), over the last axis.

    (y, total), or in int8, where only total is differentiable, (total, values, scales).
    """
    total = add(x, residual)
    return ordered(rms_norm(total, scale, eps=eps, scale_offset=scale_offset, dtype=dtype), total)


def ordered(y: tuple[jax.Array, ...], total: jax.Array) -> tuple[jax.Array, ...]:
    """What is differentiable first: (y, total) or (total, values, scales)."""
    return (*y, total) if len(y) == 1 else (total, *y)


def add(x: jax.Array, residual: jax.Array) -> jax.Array:
    """x + residual in the common dtype, rounded to it once."""
    common = jnp.promote_types(x.dtype, residual.dtype)
    wide = jnp.promote_types(common, jnp.float32)
    return (x.astype(wide) + residual.astype(wide)).astype(common)
