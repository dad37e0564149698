"""Backward passes over rows, done a tile at a time so that what lies between two sums over a row stays in the cache."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch

# Of one tile: 256 KiB in float32, what a core's own cache holds. A tile much larger costs a trip to memory for every
# intermediate, one much smaller costs loop overhead.
_TILE_ELEMENTS = 1 << 16
# Every leading axis is cut into up to this many parts that are worked on at the same time. The loop runs inside a part,
# so an axis sharded over that many devices (or a divisor of it) is never communicated.
_PARTS = 8

Rows = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]


def map_rows(rows: Rows, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """y, (Σ a over all rows, …) for rows(*arrays) = y, (a, …), where every row is independent of the others.

    Args:
      rows: maps equally shaped arrays [..., features] to y and summands of that shape; called on blocks of the arrays.
      arrays: equally shaped, [..., features].

    Returns:
      y[..., features] and each sum[features].
    """
    return dispatch.on_cpu(lambda *xs: _tiled(rows, xs), lambda *xs: _whole(rows, xs), *arrays)


def row_mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_f x_f · weights_f / features for x[..., features], with the axis kept.

    As a product: a CPU vectorises that, but adds the elements of a row up one after the other.
    """
    return jnp.einsum("...f,f->...", x, weights, precision=lax.Precision.HIGHEST)[..., None] / x.shape[-1]


def _whole(rows: Rows, arrays):
    y, summands = rows(*arrays)
    return y, tuple(jnp.sum(a, range(a.ndim - 1)) for a in summands)


def _tiled(rows: Rows, arrays):
    *leading, features = arrays[0].shape
    parts = [math.gcd(size, _PARTS) for size in leading]
    lengths = [size // count for size, count in zip(leading, parts, strict=True)]
    length = max(lengths, default=1)
    width = max(1, _TILE_ELEMENTS * length // arrays[0].size)
    if width >= length:
        return _whole(rows, arrays)
    dim = 2 * lengths.index(length) + 1
    split = [size for pair in zip(parts, lengths, strict=True) for size in pair]
    arrays = [x.reshape(*split, features) for x in arrays]
    inside = range(1, 2 * len(leading), 2)

    def block(start, size):
        y, summands = rows(*(lax.dynamic_slice_in_dim(x, start, size, dim) for x in arrays))
        return y, tuple(part_sums(a) for a in summands)

    def part_sums(a):
        # One sum for each part: adding the parts up here would communicate in every step.
        if len(leading) > 1:
            return jnp.sum(a, inside)
        return jnp.einsum("pw,pwf->pf", jnp.ones(a.shape[:2], a.dtype), a, precision=lax.Precision.HIGHEST)

    def step(i, carry):
        y, sums = carry
        part, more = block(i * width, width)
        return lax.dynamic_update_slice_in_dim(y, part, i * width, dim), tuple(map(jnp.add, sums, more))

    rest = length % width
    like_y, like_sums = jax.eval_shape(lambda: block(0, width))
    y = lax.empty(arrays[0].shape, like_y.dtype)  # every row is written below
    sums = tuple(jnp.zeros(s.shape, s.dtype) for s in like_sums)
    if rest:
        part, sums = block(length - rest, rest)
        y = lax.dynamic_update_slice_in_dim(y, part, length - rest, dim)
    y, sums = lax.fori_loop(0, length // width, step, (y, sums))
    return y.reshape(*leading, features), tuple(jnp.sum(s, range(s.ndim - 1)) for s in sums)
