"""group_norm in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, num_groups: int, eps: float) -> tuple[jax.Array]:
    """y = (x - mean) · rsqrt(var + eps) · scale + bias, the mean and the variance over all axes but the first and
    the last, and over the channels of a group."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    grouped = x.astype(wide).reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
    axes = (*range(1, x.ndim - 1), -1)
    # Two passes: mean(x²) - mean(x)² cancels where |mean| is large.
    centred = grouped - jnp.mean(grouped, axes, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + eps)
    return (((centred * inverse).reshape(x.shape) * scale.astype(wide) + bias.astype(wide)).astype(x.dtype),)
