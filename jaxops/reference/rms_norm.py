"""rms_norm in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, scale_offset: float) -> tuple[jax.Array]:
    """y = x · rsqrt(mean(x²) + eps) · (scale + scale_offset), over the last axis."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, gain = x.astype(wide), scale.astype(wide) + scale_offset
    inverse = lax.rsqrt(jnp.mean(x_wide * x_wide, -1, keepdims=True) + eps)
    return ((x_wide * inverse * gain).astype(x.dtype),)
