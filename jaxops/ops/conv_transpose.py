"""conv_transpose: a convolution of an image between whose elements lie zeros."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.ops.conv import conv, geometry_of, numbers_of, per_axis
from jaxops.ops.matmul import Activation

_NAME = "conv_transpose"
_NUMBERS = {
    2: ("NC", "IO", "NC"),
    3: ("NHC", "HIO", "NHC"),
    4: ("NHWC", "HWIO", "NHWC"),
    5: ("NHWDC", "HWDIO", "NHWDC"),
}


def conv_transpose(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    transpose_kernel: bool = False,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    use_consistent_padding: bool = False,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """y = activation(z + bias) + residual,   z[n, p, o] = Σ_{k, c} u[n, p + d·k - low, c] · rhs[k, c, o],

    where u is lhs with s - 1 zeros between its elements, u[n, s·q, c] = lhs[n, q, c], and zeros around it; s is a
    stride, d a dilation. A drop-in for `jax.lax.conv_transpose`: what `jaxops.conv` with `lhs_dilation=strides` makes.
    With `transpose_kernel` it is the gradient of a convolution with these strides by its input.

    Args:
      lhs: floating, as in `jaxops.conv`.
      rhs: floating, the window; its input channels are those of lhs, with `transpose_kernel` its output channels.
      strides: of each spatial axis: how many times as long it becomes, about.
      padding: "SAME" (s times as long), "VALID", or (low, high) of each spatial axis, around the widened lhs.
      rhs_dilation: of each spatial axis; None: 1.
      dimension_numbers: as in `jaxops.conv`; None: channels last, as ("NHWC", "HWIO", "NHWC").
      transpose_kernel: turns the window around and exchanges its input and output channels.
      precision, preferred_element_type, bias, activation, residual, implementation: as in `jaxops.conv`.
      use_consistent_padding: pairs in `padding` are those of the convolution that this transposes.

    Returns:
      y, as `jaxops.conv` does. Differentiable in lhs, rhs, bias and residual, to any order.

    Raises:
      TypeError, ValueError: as `jaxops.conv`; and for another word than "SAME" and "VALID" in `padding`.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285, chapter 4.
    """
    lhs, rhs = (checks.floating(_NAME, which, x) for which, x in (("lhs", lhs), ("rhs", rhs)))
    if dimension_numbers is None:
        if lhs.ndim not in _NUMBERS:
            raise ValueError(f"{_NAME}: dimension_numbers must be given for lhs of rank {lhs.ndim}, got None")
        dimension_numbers = _NUMBERS[lhs.ndim]
    if rhs.ndim != lhs.ndim:
        raise ValueError(f"{_NAME}: lhs and rhs must have the same rank, got {lhs.shape} and {rhs.shape}")
    numbers = numbers_of(_NAME, lhs, rhs, dimension_numbers)
    strides = per_axis(_NAME, "strides", strides, lhs.ndim - 2)
    dilation = per_axis(_NAME, "rhs_dilation", rhs_dilation, lhs.ndim - 2)
    windows = [(rhs.shape[axis] - 1) * d for axis, d in zip(numbers.rhs_spec[2:], dilation, strict=True)]
    padding = _around(padding, windows, strides, use_consistent_padding)
    if transpose_kernel:
        rhs = jnp.flip(rhs, numbers.rhs_spec[2:]).swapaxes(*numbers.rhs_spec[:2])
    one = (1,) * len(strides)
    geometry_of(_NAME, lhs, rhs, one, padding, strides, dilation, numbers, 1, 1, precision)
    return conv(
        lhs,
        rhs,
        one,
        padding,
        strides,
        dilation,
        numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        bias=bias,
        activation=activation,
        residual=residual,
        implementation=implementation,
    )


def _around(padding: Any, windows: list[int], strides: Sequence[int], consistent: bool) -> Any:
    """(low, high) of each spatial axis around the widened image; `windows`: from the first tap to the last."""
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"{_NAME}: padding must be 'SAME', 'VALID' or pairs (low, high), got {padding!r}")
        return [_of_word(padding, window, s) for window, s in zip(windows, strides, strict=True)]
    if not consistent or not isinstance(padding, Sequence) or len(padding) != len(windows):
        return padding  # `geometry_of` says what is wrong with it
    return [(window - low, window - high) for window, (low, high) in zip(windows, padding, strict=True)]


def _of_word(padding: str, window: int, stride: int) -> tuple[int, int]:
    """So that a convolution with this word in place of a padding, and this stride, goes the other way."""
    if padding == "VALID":
        return window, max(window, stride - 1)
    low = window if stride > window else -(-(window + stride - 1) // 2)
    return low, window + stride - 1 - low
