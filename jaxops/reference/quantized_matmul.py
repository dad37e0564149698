"""quantized_matmul in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    x_scales: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    dtype: str,
) -> tuple[jax.Array]:
    """y = (x_scales · x) · (scales · (w - zeros)) + bias: x[..., k], w[k, n], scales and zeros[g, n] for g groups of
    rows of w, x_scales[..., 1], bias[n]; sums in float32 (of integers in int32), rounded to `dtype` once."""
    wide = jnp.promote_types(dtype, jnp.float32)
    if scales.shape[0] == 1 and zeros is None:  # one number for the whole sum: the product is of w as it is
        kind, sums = as_they_are(x.dtype, w.dtype, wide)
        y = jnp.dot(x.astype(kind), w.astype(kind), preferred_element_type=sums)
        y = y.astype(wide) * scales[0].astype(wide)
    else:
        grouped = w.astype(wide).reshape(scales.shape[0], -1, w.shape[1])
        if zeros is not None:
            grouped = grouped - zeros.astype(wide)[:, None]
        weights = (grouped * scales.astype(wide)[:, None]).reshape(w.shape)
        kind = wide if x_scales is not None else x.dtype
        y = jnp.dot(x.astype(kind), weights.astype(kind), preferred_element_type=wide)
    if x_scales is not None:
        y = y * x_scales.astype(wide)
    if bias is not None:
        y = y + bias.astype(wide)
    return (y.astype(dtype),)


def as_they_are(x: Any, w: Any, wide: Any) -> tuple[Any, Any]:
    """The dtype in which the product of values of dtypes x and w is taken, exactly if x is quantised, and that of its
    sums."""
    if jnp.issubdtype(x, jnp.integer):
        return (jnp.int8, jnp.int32) if jnp.issubdtype(w, jnp.integer) else (wide, wide)
    if jnp.finfo(x).bits == 8:  # bfloat16 holds float8 and int8
        return (jnp.bfloat16 if wide == jnp.float32 else wide), wide
    return x, wide
