"""Numbers in few bits: what they stand for, and how to choose them. Plain JAX; the operators that take them are others.

x ≈ scales · (values - zeros), one scale, and one zero point if any, for each group along one axis
"""

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxops.ops import checks

INTEGERS = ("int8", "int4")
_FLOATS = ("float8_e4m3fn", "float8_e5m2")


class Quantized(NamedTuple):
    """x ≈ scales · (values - zeros).

    values: int8, int4 or float8. scales, and zeros if not None: as values, but along the axis that was quantised the
    number of groups.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None


def quantize(
    x: ArrayLike,
    dtype: Any = jnp.int8,
    *,
    axis: int | Sequence[int] = -1,
    group_size: int | None = None,
    symmetric: bool = True,
) -> Quantized:
    """values = round(x / scale) of the nearest representable number, one scale for each group of x along `axis`.

    Symmetric: scale = max|x| / largest of the dtype (127, 7, 448, 57344), and 0 stays 0. Else, of integers,
    scale = (max x - min x) / (largest - smallest) over a range that holds 0, and values - zeros is x / scale, zeros
    being integers too, so that 0 stays 0.

    Args:
      x: floating, of at least one axis, finite.
      dtype: int8, int4, float8_e4m3fn or float8_e5m2.
      axis: whose elements share scales. 0 for weights [k, n]; -1 for the rows of activations; several for windows:
        (0, 1, 2) for [h, w, in, out].
      group_size: how many consecutive elements share a scale, a divisor of the (last) axis; None: all.
      symmetric: without zero points; float8 has none.

    Returns:
      Quantized(values of x's shape, scales, zeros or None); scales and zeros in float32 with the number of groups for
      `axis` (of several axes for the last, 1 for the others). A group of zeros has scale 1.
      |x - scales · (values - zeros)| ≤ scales / 2 for integers. Values have no gradient; `scales` is constant to
      derivatives.

    Raises:
      TypeError: x is not floating, dtype none of those, axis or group_size no integer, symmetric no bool.
      ValueError: x has no axis, `axis` is out of range, group_size does not divide it, or float8 is to be asymmetric.

    Source: Jacob et al., arXiv:1712.05877.
    """
    name = "quantize"
    x = jax.lax.stop_gradient(checks.floating(name, "x", x))
    kind = _kind(name, dtype)
    if not isinstance(symmetric, bool):
        raise TypeError(f"{name}: symmetric must be a bool, got {type(symmetric).__name__}")
    *whole, axis = checks.axes(name, "axis", axis, x.ndim)
    size = x.shape[axis]
    if group_size is None:
        group_size = max(size, 1)
    try:
        group_size = index(group_size)
    except TypeError:
        raise TypeError(f"{name}: group_size must be an int, got {type(group_size).__name__}") from None
    if group_size < 1 or size % group_size:
        raise ValueError(
            f"{name}: group_size must be a divisor of the {size} elements of axis {axis}, got {group_size}"
        )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    grouped = wide.reshape(*x.shape[:axis], size // group_size, group_size, *x.shape[axis + 1 :])
    along = (*whole, axis + 1)
    if kind in _FLOATS:
        if not symmetric:
            raise ValueError(f"{name}: symmetric must be True for {kind}, which has a sign and a zero, got False")
        scale = _never_zero(jnp.max(jnp.abs(grouped), along, keepdims=True, initial=0) / float(jnp.finfo(kind).max))
        values, zero = (grouped / scale).astype(kind), None
    else:
        low, high = integer_range(kind, symmetric)
        if symmetric:
            scale, zero = _never_zero(jnp.max(jnp.abs(grouped), along, keepdims=True, initial=0) / high), None
        else:
            top = jnp.max(grouped, along, keepdims=True, initial=0)
            bottom = jnp.min(grouped, along, keepdims=True, initial=0)
            scale = _never_zero((top - bottom) / (high - low))
            zero = jnp.clip(low - jnp.round(bottom / scale), low, high)
        values = jnp.round(grouped / scale) + (0 if zero is None else zero)
        values = jnp.clip(values, low, high).astype(kind)
    scales, zeros = scale.squeeze(axis + 1), None if zero is None else zero.squeeze(axis + 1).astype(jnp.float32)
    return Quantized(values.reshape(x.shape), scales.astype(jnp.float32), zeros)


def fake_quantize(
    x: ArrayLike, scales: ArrayLike, dtype: Any = jnp.int8, *, zeros: ArrayLike | None = None
) -> jax.Array:
    """y = scales · (clip(round(x / scales) + zeros) - zeros): x as quantisation leaves it, with gradients to train by.

    The gradient of round is taken as 1 (straight through), that of clip is its own:
    dx = dy inside the range, 0 outside;
    dscales = Σ dy · (round(x / scales) - x / scales) inside, Σ dy · (bound - zeros) outside (the learned step, LSQ).

    Args:
      x: floating.
      scales: floating; each axis divides that of x, and a scale is for as many consecutive elements. Positive.
      dtype: int8 or int4; symmetric (-127 … 127) without zeros, else the whole range.
      zeros: as scales, whole numbers; constant to derivatives.

    Returns:
      y in the shape and dtype of x.

    Raises:
      TypeError: x or scales are not floating, or dtype is neither int8 nor int4.
      ValueError: scales or zeros do not fit x, or scales are known and not positive.

    Sources: Bengio et al., arXiv:1308.3432 (straight through); Esser et al., LSQ, arXiv:1902.08153.
    """
    name = "fake_quantize"
    x, scales = checks.floating(name, "x", x), checks.floating(name, "scales", scales)
    kind = _kind(name, dtype)
    if kind not in INTEGERS:
        raise TypeError(f"{name}: dtype must be one of {', '.join(INTEGERS)}, got {kind}")
    if not isinstance(scales, jax.core.Tracer) and not bool(jnp.all(scales > 0)):
        raise ValueError(f"{name}: scales must be positive, got {scales.min()}")
    low, high = integer_range(kind, zeros is None)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    step = _spread(name, "scales", scales, x.shape).astype(wide)
    zero: jax.Array | float = 0.0
    if zeros is not None:
        zero = jax.lax.stop_gradient(_spread(name, "zeros", checks.array(name, "zeros", zeros), x.shape).astype(wide))
    value = x.astype(wide) / step
    inside = (value >= low - zero) & (value <= high - zero)
    # Not clip's own gradient, which is a half at the ends, where the largest weights are.
    value = jnp.where(inside, value, jax.lax.stop_gradient(jnp.clip(value, low - zero, high - zero)))
    return ((value + jax.lax.stop_gradient(jnp.round(value) - value)) * step).astype(x.dtype)


def dequantize(quantized: Quantized, dtype: Any = jnp.float32) -> jax.Array:
    """x = scales · (values - zeros), in `dtype`.

    Args:
      quantized: as `quantize` returns it, or the same by hand: each axis of scales (and zeros) divides that of values,
        and a scale is for as many consecutive elements.
      dtype: floating.

    Raises:
      TypeError: dtype, or that of scales, is not floating.
      ValueError: scales or zeros do not fit values.
    """
    name = "dequantize"
    values, scales, zeros = quantized
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"{name}: dtype must be floating, got {jnp.dtype(dtype)}")
    values, scales = checks.array(name, "values", values), checks.floating(name, "scales", scales)
    wide = jnp.promote_types(dtype, jnp.float32)
    x = values.astype(wide)
    if zeros is not None:
        x = x - _spread(name, "zeros", checks.array(name, "zeros", zeros), values.shape).astype(wide)
    return (x * _spread(name, "scales", scales, values.shape).astype(wide)).astype(dtype)


def integer_range(dtype: Any, symmetric: bool) -> tuple[int, int]:
    """The least and the largest integer that are used: all of the dtype, or as many below 0 as above."""
    info = jnp.iinfo(dtype)
    return -int(info.max) if symmetric else int(info.min), int(info.max)


def _kind(name: str, dtype: Any) -> str:
    kind = jnp.dtype(dtype).name
    if kind not in INTEGERS + _FLOATS:
        raise TypeError(f"{name}: dtype must be one of {', '.join(INTEGERS + _FLOATS)}, got {kind}")
    return kind


def _never_zero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1)


def _spread(operator: str, name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number of x for as many consecutive elements along every axis."""
    if x.ndim != len(shape) or any(size % max(part, 1) for size, part in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{operator}: each axis of {name} must divide that of values {shape}, got {x.shape}")
    for axis, size in enumerate(shape):
        if x.shape[axis] != size and x.shape[axis] != 1:
            x = jnp.repeat(x, size // x.shape[axis], axis)
    return x
