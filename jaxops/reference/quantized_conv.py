"""quantized_conv in plain JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops.quantization import Quantized, dequantize
from jaxops.reference.quantized_matmul import as_they_are


def quantized_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    lhs_scales: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array] | None,
    dtype: str,
    **geometry: Any,
) -> tuple[jax.Array]:
    """y = activation((lhs_scales · lhs) ∗ (scales · (rhs - zeros)) + bias) + residual: scales and zeros one number for
    as many elements of rhs along each axis, lhs_scales one for each image or all; sums in float32 (of integers in
    int32), rounded to `dtype` once. geometry: as in the reference of conv."""
    numbers = geometry["dimension_numbers"]
    wide = jnp.promote_types(dtype, jnp.float32)
    whole = lhs_scales is not None
    outputs = numbers.rhs_spec[0]

    def along(axis, x):
        """The numbers of x along this axis of y."""
        return jnp.expand_dims(x.astype(wide).reshape(-1), [i for i in range(lhs.ndim) if i != axis])

    if zeros is None and scales.size == scales.shape[outputs]:  # one number for a whole sum: rhs as it is
        kind, sums = as_they_are(lhs.dtype, rhs.dtype, wide)
        z = lax.conv_general_dilated(lhs.astype(kind), rhs.astype(kind), preferred_element_type=sums, **geometry)
        each = jnp.repeat(scales.reshape(-1), rhs.shape[outputs] // max(scales.size, 1))
        z = z.astype(wide) * along(numbers.out_spec[1], each)
    else:
        kind = wide if whole else lhs.dtype
        weights = dequantize(Quantized(rhs, scales, zeros), wide)
        z = lax.conv_general_dilated(lhs.astype(kind), weights.astype(kind), preferred_element_type=wide, **geometry)
    if lhs_scales is not None:
        z = z * along(numbers.out_spec[0], lhs_scales)
    if bias is not None:
        z = z + along(numbers.out_spec[1], bias)
    y = z if activation is None else activation(z)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return (y.astype(dtype),)
