"""add_rms_norm: public function and XLA rules."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.ops.rms_norm import gradients
from jaxops.quantization import Quantized
from jaxops.reference.add_rms_norm import add_rms_norm as reference
from pallas_kernels import gpu, tpu


def _forward(x, residual, scale, *, eps, scale_offset, dtype):
    return reference(x, residual, scale, eps=eps, scale_offset=scale_offset, dtype=dtype), ()


def _backward(x, residual, scale, *, outputs, residuals, cotangents, eps, scale_offset, dtype):
    """The gradient of total, from y and its own cotangent, is that of x and of the residual."""
    del x, residual, residuals, dtype
    dtotal, dscale = gradients(outputs[1], scale, *cotangents, eps=eps, scale_offset=scale_offset)
    return {"x": dtotal, "residual": dtotal, "scale": dscale}


_OPERATOR = Operator(
    name="add_rms_norm",
    differentiable=("x", "residual", "scale"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.add_rms_norm,
    gpu=gpu.add_rms_norm,
    partition=lambda spec: (spec, spec),
    differentiable_outputs=2,
)


def in_int8(operator: Operator) -> Operator:
    """A norm of a sum, of outputs (total, values, scales): total alone has gradients, of x and residual."""
    return dataclasses.replace(
        operator,
        differentiable=("x", "residual"),
        xla=Rules(operator.xla.forward, None),
        partition=lambda spec: (spec, spec, PartitionSpec(*spec[:-1], None)),
        differentiable_outputs=1,
    )


_QUANTISED = in_int8(_OPERATOR)


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    dtype: Any = None,
    implementation: Implementation = None,
) -> Any:
    """total = x + residual;  y = total · rsqrt(mean(total²) + eps) · (scale + scale_offset), over the last axis.

    y is made of total as it is returned, rounded; a backward pass reads total and nothing else of forward.

    Args:
      x: floating [..., features]; sum and statistics are in float32 whatever its dtype (float64 for float64).
      residual: floating, the shape of x.
      scale: floating [features]; None: the gain is 1, whatever the offset.
      eps: added to the mean square, at least 0.
      scale_offset: added to `scale` (1.0 where the parameter is stored as its difference from one, as in Gemma).
      dtype: of y: floating, or int8; None: that of total. It is rounded once, from float32.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      (y, total), each [..., features]; total in the common dtype of x and residual. Both are differentiable. In int8 y
      is a `Quantized` as `jaxops.quantize` gives it, values[..., features] and float32 scales[..., 1], which
      `jaxops.quantized_matmul` takes; it is constant to derivatives, total is not.

    Raises:
      TypeError: x, residual or scale is not floating, dtype neither floating nor int8, or another
        option is not a Python number.
      ValueError: a shape does not fit, eps is negative, or `implementation` is unknown or, alone, cannot run.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    x = checks.floating("add_rms_norm", "x", x)
    residual = checks.floating("add_rms_norm", "residual", residual, shape=x.shape, of="the shape of x")
    dtype = checks.rounded_to("add_rms_norm", dtype, jnp.promote_types(x.dtype, residual.dtype))
    eps = checks.number("add_rms_norm", "eps", eps)
    scale_offset = checks.finite("add_rms_norm", "scale_offset", scale_offset)
    if scale is None:
        scale, scale_offset = jnp.ones(x.shape[-1:], x.dtype), 0.0
    else:
        scale = checks.floating("add_rms_norm", "scale", scale, shape=x.shape[-1:], of="the last axis of x")
    operands: dict[str, Any] = dict(x=x, residual=residual, scale=scale)
    options: dict[str, Any] = dict(implementation=implementation, eps=eps, scale_offset=scale_offset, dtype=dtype)
    if dtype == "int8":
        total, values, scales = _QUANTISED(operands, **options)
        return Quantized(values, scales), total
    y, total = _OPERATOR(operands, **options)
    return y, total
