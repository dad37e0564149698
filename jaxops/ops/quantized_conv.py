"""quantized_conv: public function. XLA's rules are the reference."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.ops.conv import geometry_of
from jaxops.ops.matmul import Activation, after_product, call_unless_traced
from jaxops.ops.quantized_matmul import quantised_operands, result_dtype
from jaxops.reference.quantized_conv import quantized_conv as reference

_NAME = "quantized_conv"


def _forward(*operands, **static):
    return reference(*operands, **static), ()


def _operator(*differentiable: str) -> Operator:
    """The operator whose integers have no gradient; the others have the reference's."""
    return Operator(
        name=_NAME,
        differentiable=differentiable,
        reference=reference,
        xla=Rules(_forward, None),
        tpu="quantized_conv has no Pallas kernel yet",
        gpu="quantized_conv has no Pallas kernel yet",
        partition=None,
    )


_BESIDE = ("scales", "zeros", "bias", "residual")
_OPERATOR = _operator("lhs", *_BESIDE)
_BOTH = _operator("lhs_scales", *_BESIDE)


def quantized_conv(
    lhs: ArrayLike,
    rhs: ArrayLike,
    scales: ArrayLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    *,
    zeros: ArrayLike | None = None,
    lhs_scales: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: Any = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = activation((lhs_scales · lhs) ∗ (scales · (rhs - zeros)) + bias) + residual, of quantised windows, and of a
    quantised input if `lhs_scales` are there; ∗ is the convolution of `jaxops.conv`.

    What `jaxops.quantize(rhs, axis=(0, 1, 2))`, for a window [h, w, in, out], and
    `jaxops.quantize(lhs, axis=(1, 2, 3))` return is what this takes.

    Args:
      lhs: floating (float32, bfloat16 or float16) or, with `lhs_scales`, int8, float8_e4m3fn or float8_e5m2; axes as in
        `jaxops.conv`.
      rhs: int8, int4, float8_e4m3fn or float8_e5m2.
      scales: floating, of the rank of rhs: each axis divides that of rhs, and a scale is for as many consecutive
        elements. [1, 1, 1, out] is one for each output channel of [h, w, in, out], [1, 1, 1, 1] one for all.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count: as in `jaxops.conv`.
      zeros: floating or integer, of the shape of scales, the values of rhs that stand for 0; None: 0. Not for float8.
      lhs_scales: floating, of the rank of lhs: 1 along every axis, or one for each image along that of the batch.
      bias: floating [output channels] or None.
      activation: an elementwise function of a float32 array or None, as in `jaxops.conv`.
      residual: floating, of the shape of the result, or None.
      dtype: of y; None: the dtype of lhs, or for a quantised lhs that of lhs_scales.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y, its axes in the order of the last of the dimension numbers. Products of an int8 lhs with integers that have one
      scale for each output channel, or for all, are summed exactly, in int32; other sums are float32. y is rounded
      once, at the end; windows with zeros or several scales for a sum are rounded to the dtype of lhs before.

    Raises:
      TypeError: a dtype is none of those above, or `activation` is not a function.
      ValueError: shapes, strides, padding, dilations or groups do not fit each other, lhs_scales are missing or
        superfluous, or `implementation` is unknown or, alone, cannot run.

    Gradients of a floating lhs, scales, zeros, lhs_scales, bias and residual are computed in XLA; rhs has none.

    Source: Jacob et al., arXiv:1712.05877.
    """
    lhs, rhs, scales, zeros = quantised_operands(_NAME, ("lhs", lhs), ("rhs", rhs), scales, zeros, lhs_scales)
    shape, geometry = geometry_of(
        _NAME, lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count
    )
    numbers = geometry["dimension_numbers"]
    pairs = zip(rhs.shape, scales.shape, strict=False)
    if scales.ndim != rhs.ndim or any(part != size and (not part or size % part) for size, part in pairs):
        raise ValueError(f"{_NAME}: each axis of scales must divide that of rhs {rhs.shape}, got {scales.shape}")
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"{_NAME}: zeros must have the shape of scales, {scales.shape}, got {zeros.shape}")
    if lhs_scales is not None:
        lhs_scales = checks.floating(_NAME, "lhs_scales", lhs_scales)
        each = tuple(size if axis == numbers.lhs_spec[0] else 1 for axis, size in enumerate(lhs.shape))
        if lhs_scales.shape not in (each, (1,) * lhs.ndim):
            raise ValueError(f"{_NAME}: lhs_scales must have shape {each} or {(1,) * lhs.ndim}, got {lhs_scales.shape}")
    words: dict[str, Any] = dict(of="the output channels of rhs", like="that of the result")
    beside, activation, known = after_product(
        _NAME, shape, bias, residual, activation, channels=numbers.out_spec[1], **words
    )
    operands: dict[str, Any] = dict(lhs=lhs, rhs=rhs, scales=scales, zeros=zeros, lhs_scales=lhs_scales, **beside)
    return call_unless_traced(
        _OPERATOR if lhs_scales is None else _BOTH,
        known,
        operands,
        implementation,
        activation=activation,
        dtype=result_dtype(_NAME, dtype, lhs if lhs_scales is None else lhs_scales),
        **geometry,
    )
