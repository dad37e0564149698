"""add_layer_norm: public function and XLA rules."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.ops.add_rms_norm import in_int8
from jaxops.ops.layer_norm import gradients
from jaxops.quantization import Quantized
from jaxops.reference.add_layer_norm import add_layer_norm as reference
from pallas_kernels import gpu, tpu


def _forward(x, residual, scale, bias, *, eps, scale_offset, dtype):
    return reference(x, residual, scale, bias, eps=eps, scale_offset=scale_offset, dtype=dtype), ()


def _backward(x, residual, scale, bias, *, outputs, residuals, cotangents, eps, scale_offset, dtype):
    """The gradient of total, from y and its own cotangent, is that of x and of the residual."""
    del x, residual, residuals, dtype
    dtotal, dscale, dbias = gradients(outputs[1], scale, bias, *cotangents, eps=eps, scale_offset=scale_offset)
    return {"x": dtotal, "residual": dtotal, "scale": dscale, "bias": dbias}


_OPERATOR = Operator(
    name="add_layer_norm",
    differentiable=("x", "residual", "scale", "bias"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.add_layer_norm,
    gpu=gpu.add_layer_norm,
    partition=lambda spec: (spec, spec),
    differentiable_outputs=2,
)

_QUANTISED = in_int8(_OPERATOR)


def add_layer_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    dtype: Any = None,
    implementation: Implementation = None,
) -> Any:
    """total = x + residual;  y = (total - mean) · rsqrt(var + eps) · (scale + scale_offset) + bias, the mean and the
    variance of total over the last axis.

    y is made of total as it is returned, rounded; a backward pass reads total and nothing else of forward.

    Args:
      x: floating [..., features]; sum and statistics are in float32 whatever its dtype (float64 for float64).
      residual: floating, the shape of x.
      scale: floating [features]; None: the gain is 1, whatever the offset.
      bias: floating [features]; None: no bias.
      eps: added to the variance, at least 0.
      scale_offset: added to `scale` (1.0 where the parameter is stored as its difference from one).
      dtype: of y: floating, or int8; None: that of total. It is rounded once, from float32.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      (y, total), each [..., features]; total in the common dtype of x and residual. Both are differentiable. In int8 y
      is a `Quantized` as `jaxops.quantize` gives it, values[..., features] and float32 scales[..., 1], which
      `jaxops.quantized_matmul` takes; it is constant to derivatives, total is not.

    Raises:
      TypeError: x, residual, scale or bias is not floating, dtype neither floating nor int8, or another
        option is not a Python number.
      ValueError: a shape does not fit, eps is negative, or `implementation` is unknown or, alone, cannot run.

    Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    x = checks.floating("add_layer_norm", "x", x)
    residual = checks.floating("add_layer_norm", "residual", residual, shape=x.shape, of="the shape of x")
    expected: dict[str, Any] = dict(shape=x.shape[-1:], of="the last axis of x")
    dtype = checks.rounded_to("add_layer_norm", dtype, jnp.promote_types(x.dtype, residual.dtype))
    eps = checks.number("add_layer_norm", "eps", eps)
    scale_offset = checks.finite("add_layer_norm", "scale_offset", scale_offset)
    if scale is None:
        scale, scale_offset = jnp.ones(x.shape[-1:], x.dtype), 0.0
    else:
        scale = checks.floating("add_layer_norm", "scale", scale, **expected)
    if bias is None:
        bias = jnp.zeros(x.shape[-1:], x.dtype)
    else:
        bias = checks.floating("add_layer_norm", "bias", bias, **expected)
    operands: dict[str, Any] = dict(x=x, residual=residual, scale=scale, bias=bias)
    options: dict[str, Any] = dict(implementation=implementation, eps=eps, scale_offset=scale_offset, dtype=dtype)
    if dtype == "int8":
        total, values, scales = _QUANTISED(operands, **options)
        return Quantized(values, scales), total
    y, total = _OPERATOR(operands, **options)
    return y, total
