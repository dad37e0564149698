"""Checks of arguments. A message names the operator and the argument, what was expected and what came."""

import math
import numbers
from collections.abc import Sequence
from operator import index
from typing import Any

import jax
import jax.numpy as jnp


def array(operator: str, name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """`value` as an array. Raises `TypeError` if it is none."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{operator}: {name} must be an array, got {type(value).__name__}: {error}") from error


def floating(
    operator: str, name: str, value: jax.typing.ArrayLike, *, shape: Sequence[int] | None = None, of: str = ""
) -> jax.Array:
    """`value` as a floating array of rank ≥ 1, or exactly of `shape`; `of` says where that shape comes from."""
    x = array(operator, name, value)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{operator}: {name} must be of a floating dtype, got {x.dtype}")
    if shape is None and x.ndim == 0:
        raise ValueError(f"{operator}: {name} must have at least one axis, got a scalar")
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(f"{operator}: {name} must have shape {tuple(shape)}{of and f' ({of})'}, got {x.shape}")
    return x


def weight(operator: str, name: str, value: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    """`value` as a floating matrix [k, n] for x[..., k]."""
    w = floating(operator, name, value)
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        hint = "; is it transposed?" if w.ndim == 2 and w.shape[1] == x.shape[-1] else ""
        raise ValueError(f"{operator}: {name} must have shape ({x.shape[-1]}, n) for x {x.shape}, got {w.shape}{hint}")
    return w


def integer(operator: str, name: str, value: jax.typing.ArrayLike, *, shape: Sequence[int], of: str) -> jax.Array:
    """`value` as an integer array of `shape`; `of` says where that shape comes from."""
    x = array(operator, name, value)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{operator}: {name} must be of an integer dtype, got {x.dtype}")
    if x.shape != tuple(shape):
        raise ValueError(f"{operator}: {name} must have shape {tuple(shape)} ({of}), got {x.shape}")
    return x


def boolean(operator: str, name: str, value: jax.typing.ArrayLike, *, to: Sequence[int], of: str) -> jax.Array:
    """`value` as a boolean array that broadcasts to the shape `to`; `of` says where that shape comes from."""
    x = array(operator, name, value)
    if x.dtype != jnp.bool_:
        raise TypeError(f"{operator}: {name} must be boolean, got {x.dtype}")
    broadcastable(operator, name, x, to=to, of=of)
    return x


def broadcastable(operator: str, name: str, x: jax.Array, *, to: Sequence[int], of: str) -> None:
    """Raises `ValueError` unless x broadcasts to the shape `to`."""
    fits = x.ndim <= len(to) and all(
        size in (1, full) for size, full in zip(reversed(x.shape), reversed(to), strict=False)
    )
    if not fits:
        raise ValueError(f"{operator}: {name} must broadcast to {tuple(to)} ({of}), got shape {x.shape}")


def axes(operator: str, name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """`value` as a tuple of different axes in [0, rank)."""
    try:
        chosen = tuple(map(index, value if isinstance(value, Sequence) else (value,)))
    except TypeError:
        raise TypeError(f"{operator}: {name} must be an int or a sequence of ints, got {value!r}") from None
    if any(not -rank <= axis < rank for axis in chosen):
        raise ValueError(f"{operator}: {name} must be in [{-rank}, {rank}) for {rank} axes, got {value}")
    chosen = tuple(sorted(axis % rank for axis in chosen))
    if len(set(chosen)) < len(chosen) or not chosen:
        raise ValueError(f"{operator}: {name} must name at least one axis, and none twice, got {value}")
    return chosen


def finite(operator: str, name: str, value: float) -> float:
    """`value` as a finite Python float: an option is part of the compiled program, so it cannot be traced."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{operator}: {name} must be a Python number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{operator}: {name} must be finite, got {value}")
    return float(value)


def number(operator: str, name: str, value: float, *, positive: bool = False) -> float:
    """`value` as a finite Python float that is at least 0, or above 0 if `positive`."""
    value = finite(operator, name, value)
    if value < 0 or (positive and value == 0):
        raise ValueError(f"{operator}: {name} must be {'above 0' if positive else 'at least 0'}, got {value}")
    return value


def rounded_to(operator: str, dtype: Any, default: Any) -> str:
    """The name of `dtype`, floating or int8, or of the `default` where it is None."""
    try:
        chosen = jnp.dtype(default if dtype is None else dtype)
    except TypeError as error:
        raise TypeError(f"{operator}: dtype must be floating or int8, got {dtype!r}") from error
    # 8 bits of floating point need a scale, which y in a floating dtype does not have.
    if chosen != jnp.int8 and not (jnp.issubdtype(chosen, jnp.floating) and chosen.itemsize > 1):
        raise TypeError(f"{operator}: dtype must be floating, of at least 16 bits, or int8, got {chosen}")
    return chosen.name
