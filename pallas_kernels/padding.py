"""Sizes that divide no tile: round up, pad, cut back."""

import jax
import jax.numpy as jnp


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is ≥ `size`."""
    return -(-size // multiple) * multiple


def pad_to(x: jax.Array, axis: int, size: int, value=0) -> jax.Array:
    """`x` with `axis` grown to `size` at its end; the new entries are `value`."""
    missing = size - x.shape[axis]
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)


def to_tiles(x: jax.Array, axis: int, size: int, value=0) -> jax.Array:
    """`x` cut along `axis` into tiles of `size`, which become a new leading axis; the last is filled with `value`."""
    axis %= x.ndim
    x = pad_to(x, axis, round_up(x.shape[axis], size), value)
    x = x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def from_tiles(x: jax.Array, axis: int, size: int) -> jax.Array:
    """The inverse of `to_tiles`: the tiles of the leading axis joined along `axis` of the result, cut to `size`."""
    axis %= x.ndim - 1
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, size, axis=axis)
