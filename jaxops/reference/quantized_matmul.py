"""quantized_matmul in plain JAX."""

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
        whole = x_scales is not None and jnp.issubdtype(w.dtype, jnp.integer)
        kind = jnp.int8 if whole else wide if x_scales is not None else x.dtype
        y = jnp.dot(x.astype(kind), w.astype(kind), preferred_element_type=jnp.int32 if whole else wide)
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
