"""rms_norm: public function and XLA rules."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.ops.row_tiles import reduce_rows, row_mean
from jaxops.quantization import Quantized
from jaxops.reference.rms_norm import rms_norm as reference
from pallas_kernels import gpu, tpu


def _forward(x, scale, *, eps, scale_offset, dtype):
    return reference(x, scale, eps=eps, scale_offset=scale_offset, dtype=dtype), ()


def _backward(x, scale, *, outputs, residuals, cotangents, eps, scale_offset, dtype):
    del outputs, residuals, dtype
    dx, dscale = gradients(x, scale, *cotangents, eps=eps, scale_offset=scale_offset)
    return {"x": dx, "scale": dscale}


def gradients(x, scale, dy, added=None, *, eps, scale_offset):
    """(dx, dscale) in XLA. With n = x / rms and g = dy · gain: dx = (g - n · mean(g · n)) / rms, plus what is `added`
    (a cotangent of x[..., features] from elsewhere, or None)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    gain, ones = scale.astype(wide) + scale_offset, jnp.ones(scale.shape, wide)

    def rows(x, dy):
        x, dy = x.astype(wide), dy.astype(wide)
        inverse = lax.rsqrt(row_mean(x * x, ones) + eps)
        product = x * dy
        return (inverse, inverse * inverse * row_mean(product, gain)), ((inverse, product),)

    (inverse, slope), (dscale,) = reduce_rows(rows, x, dy)
    dx = inverse * (dy.astype(wide) * gain - x.astype(wide) * slope)
    dx = dx if added is None else dx + added.astype(wide)
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


_OPERATOR = Operator(
    name="rms_norm",
    differentiable=("x", "scale"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.rms_norm,
    gpu=gpu.rms_norm,
)


def in_int8(operator: Operator) -> Operator:
    """A norm whose y is (values, scales) of integers: nothing of it is differentiable."""
    return dataclasses.replace(
        operator, differentiable=(), partition=lambda spec: (spec, PartitionSpec(*spec[:-1], None))
    )


_QUANTISED = in_int8(_OPERATOR)


def rms_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    dtype: Any = None,
    implementation: Implementation = None,
) -> Any:
    """y = x · rsqrt(mean(x²) + eps) · (scale + scale_offset), over the last axis.

    Args:
      x: floating [..., features]; the statistics are in float32 whatever its dtype (float64 for float64).
      scale: floating [features]; None: the gain is 1, whatever the offset.
      eps: added to the mean square, at least 0.
      scale_offset: added to `scale` (1.0 where the parameter is stored as its difference from one, as in Gemma).
      dtype: of y: floating, or int8; None: the dtype of x. It is rounded once, from float32.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y[..., features] in `dtype`. In int8 a `Quantized` as `jaxops.quantize` gives it, values[..., features] and
      float32 scales[..., 1], which `jaxops.quantized_matmul` takes; it is constant to derivatives.

    Raises:
      TypeError: x or scale is not floating, dtype neither floating nor int8, or another option
        is not a Python number.
      ValueError: a shape does not fit, eps is negative, or `implementation` is unknown or, alone, cannot run.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    x = checks.floating("rms_norm", "x", x)
    dtype = checks.rounded_to("rms_norm", dtype, x.dtype)
    eps = checks.number("rms_norm", "eps", eps)
    scale_offset = checks.finite("rms_norm", "scale_offset", scale_offset)
    if scale is None:
        scale, scale_offset = jnp.ones(x.shape[-1:], x.dtype), 0.0
    else:
        scale = checks.floating("rms_norm", "scale", scale, shape=x.shape[-1:], of="the last axis of x")
    operands: dict[str, Any] = dict(x=x, scale=scale)
    options: dict[str, Any] = dict(implementation=implementation, eps=eps, scale_offset=scale_offset, dtype=dtype)
    if dtype == "int8":
        return Quantized(*_QUANTISED(operands, **options))
    (y,) = _OPERATOR(operands, **options)
    return y
