"""layer_norm: public function and XLA rules."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.ops.rms_norm import in_int8
from jaxops.ops.row_tiles import reduce_rows, row_mean
from jaxops.quantization import Quantized
from jaxops.reference.layer_norm import layer_norm as reference
from pallas_kernels import gpu, tpu


def _forward(x, scale, bias, *, eps, scale_offset, dtype):
    return reference(x, scale, bias, eps=eps, scale_offset=scale_offset, dtype=dtype), ()


def _backward(x, scale, bias, *, outputs, residuals, cotangents, eps, scale_offset, dtype):
    del outputs, residuals, dtype
    dx, dscale, dbias = gradients(x, scale, bias, *cotangents, eps=eps, scale_offset=scale_offset)
    return {"x": dx, "scale": dscale, "bias": dbias}


def gradients(x, scale, bias, dy, added=None, *, eps, scale_offset):
    """(dx, dscale, dbias) in XLA. With n = (x - mean) / deviation and g = dy · gain:
    dx = (g - mean(g) - n · mean(g · n)) / deviation, plus what is `added` (as in `rms_norm.gradients`)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    gain, ones = scale.astype(wide) + scale_offset, jnp.ones(scale.shape, wide)

    def rows(x, dy):
        x, dy = x.astype(wide), dy.astype(wide)
        mean = row_mean(x, ones)
        centred = x - mean
        inverse = lax.rsqrt(row_mean(centred * centred, ones) + eps)
        product = centred * dy
        slope = inverse * inverse * row_mean(product, gain)
        return (mean, inverse, row_mean(dy, gain), slope), ((inverse, product), (jnp.ones_like(inverse), dy))

    (mean, inverse, shift, slope), (dscale, dbias) = reduce_rows(rows, x, dy)
    dx = inverse * (dy.astype(wide) * gain - shift - (x.astype(wide) - mean) * slope)
    dx = dx if added is None else dx + added.astype(wide)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_OPERATOR = Operator(
    name="layer_norm",
    differentiable=("x", "scale", "bias"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.layer_norm,
    gpu=gpu.layer_norm,
)

_QUANTISED = in_int8(_OPERATOR)


def layer_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    dtype: Any = None,
    implementation: Implementation = None,
) -> Any:
    """y = (x - mean(x)) · rsqrt(var(x) + eps) · (scale + scale_offset) + bias, over the last axis.

    Args:
      x: floating [..., features]; the statistics are in float32 whatever its dtype (float64 for float64).
      scale: floating [features]; None: the gain is 1, whatever the offset.
      bias: floating [features]; None: no bias.
      eps: added to the variance, at least 0.
      scale_offset: added to `scale` (1.0 where the parameter is stored as its difference from one).
      dtype: of y: floating, or int8; None: the dtype of x. It is rounded once, from float32.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y[..., features] in `dtype`. In int8 a `Quantized` as `jaxops.quantize` gives it, values[..., features] and
      float32 scales[..., 1], which `jaxops.quantized_matmul` takes; it is constant to derivatives.

    Raises:
      TypeError: x, scale or bias is not floating, dtype neither floating nor int8, or another
        option is not a Python number.
      ValueError: a shape does not fit, eps is negative, or `implementation` is unknown or, alone, cannot run.

    Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    x = checks.floating("layer_norm", "x", x)
    expected: dict[str, Any] = dict(shape=x.shape[-1:], of="the last axis of x")
    dtype = checks.rounded_to("layer_norm", dtype, x.dtype)
    eps = checks.number("layer_norm", "eps", eps)
    scale_offset = checks.finite("layer_norm", "scale_offset", scale_offset)
    if scale is None:
        scale, scale_offset = jnp.ones(x.shape[-1:], x.dtype), 0.0
    else:
        scale = checks.floating("layer_norm", "scale", scale, **expected)
    bias = jnp.zeros(x.shape[-1:], x.dtype) if bias is None else checks.floating("layer_norm", "bias", bias, **expected)
    operands: dict[str, Any] = dict(x=x, scale=scale, bias=bias)
    options: dict[str, Any] = dict(implementation=implementation, eps=eps, scale_offset=scale_offset, dtype=dtype)
    if dtype == "int8":
        return Quantized(*_QUANTISED(operands, **options))
    (y,) = _OPERATOR(operands, **options)
    return y
