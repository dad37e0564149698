"""add_layer_norm in plain JAX."""

import jax

from jaxops.reference.add_rms_norm import add, ordered
from jaxops.reference.layer_norm import layer_norm


def add_layer_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    eps: float,
    scale_offset: float,
    dtype: str | None = None,
) -> tuple[jax.Array, ...]:
    """total = x + residual;  y = (total - mean) · rsqrt(var + eps) · (scale + scale_offset) + bias, the mean and the
    variance of total over the last axis.

    (y, total), or in int8, where only total is differentiable, (total, values, scales).
    """
    total = add(x, residual)
    return ordered(layer_norm(total, scale, bias, eps=eps, scale_offset=scale_offset, dtype=dtype), total)
