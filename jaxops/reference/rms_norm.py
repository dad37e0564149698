"""rms_norm in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxops.quantization import quantize


def rms_norm(
    x: jax.Array, scale: jax.Array, *, eps: float, scale_offset: float, dtype: str | None = None
) -> tuple[jax.Array, ...]:
    """y = x · rsqrt(mean(x²) + eps) · (scale + scale_offset), over the last axis, `rounded`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, gain = x.astype(wide), scale.astype(wide) + scale_offset
    inverse = lax.rsqrt(jnp.mean(x_wide * x_wide, -1, keepdims=True) + eps)
    return rounded(x_wide * inverse * gain, dtype or x.dtype.name)


def rounded(y: jax.Array, dtype: str) -> tuple[jax.Array, ...]:
    """(y in `dtype`,); in int8 (values, scales) with y ≈ scales · values and one scale for each row."""
    if dtype != "int8":
        return (y.astype(dtype),)
    values, scales, _ = quantize(y)
    return values, scales
