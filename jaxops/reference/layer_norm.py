"""layer_norm in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxops.reference.rms_norm import rounded


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float, scale_offset: float, dtype: str | None = None
) -> tuple[jax.Array, ...]:
    """y = (x - mean(x)) · rsqrt(var(x) + eps) · (scale + scale_offset) + bias, over the last axis, `rounded`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, gain = x.astype(wide), scale.astype(wide) + scale_offset
    # Two passes: mean(x²) - mean(x)² cancels where |mean| is large.
    centred = x_wide - jnp.mean(x_wide, -1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    return rounded(centred * inverse * gain + bias.astype(wide), dtype or x.dtype.name)
