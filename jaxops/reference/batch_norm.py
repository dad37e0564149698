"""batch_norm in plain JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float) -> tuple[jax.Array, ...]:
    """y = (x - mean) · rsqrt(var + eps) · scale + bias, with the mean and the variance of each channel, the last axis;
    and these two."""
    mean, var = statistics(x)
    return normalized(x, mean, var, scale, bias, eps=eps), mean, var


def statistics(
    x: jax.Array, mask: jax.Array | None = None, total: Callable[[Any], Any] = lambda sums: sums
) -> tuple[jax.Array, jax.Array]:
    """The mean and the variance of each channel where `mask` is True; 0 where it nowhere is.

    total: makes of sums over x those over all parts of the batch.
    """
    axes, wide = tuple(range(x.ndim - 1)), jnp.promote_types(x.dtype, jnp.float32)
    within = True if mask is None else jnp.broadcast_to(mask, x.shape)
    count = jnp.full(x.shape[-1:], x.size // max(x.shape[-1], 1), wide)
    if mask is not None:
        count = jnp.sum(within, axes, dtype=wide)
    count = jnp.maximum(total(count), 1)
    mean = total(jnp.sum(x.astype(wide), axes, where=within)) / count
    # Two passes: mean(x²) - mean(x)² cancels where |mean| is large.
    return mean, total(jnp.sum(jnp.square(x.astype(wide) - mean), axes, where=within)) / count


def normalized(x, mean, var, scale, bias, *, eps: float) -> jax.Array:
    """(x - mean) · rsqrt(var + eps) · scale + bias, for statistics that are given."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    gain = lax.rsqrt(var.astype(wide) + eps) * scale.astype(wide)
    return ((x.astype(wide) - mean.astype(wide)) * gain + bias.astype(wide)).astype(x.dtype)
