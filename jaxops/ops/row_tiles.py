"""Functions of rows and sums over them, a few rows at a time, so that what lies between stays in the cache."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch

# Of one tile: 64 KiB in float32, so that a tile of two arrays and what is computed from them fit a core's own cache.
_TILE_ELEMENTS = 1 << 14
# Of what products make: the C library maps an array of 32 MiB or more anew in every call, and its pages are cleared one
# by one. Blocks of 8 MiB cost nothing beside that: each reads all of a weight.
_MAPPED_ELEMENTS = 1 << 23
_BLOCK_ELEMENTS = 1 << 21
# Every leading axis is cut into up to this many parts that are worked on at the same time. The loop runs inside a part,
# so an axis sharded over that many devices (or a divisor of it) is never communicated.
_PARTS = 8

Numbers = tuple[jax.Array, ...]
Weighted = tuple[tuple[jax.Array, jax.Array], ...]
Rows = Callable[..., tuple[Numbers, Weighted]]


def reduce_rows(rows: Rows, *arrays: jax.Array) -> tuple[Numbers, tuple[jax.Array, ...]]:
    """(n, …), (Σ_r w_r a_rf, …) for rows(*arrays) = (n, …), ((w, a), …), where every row is independent of the others.

    What a gradient over rows needs before it can be written in one elementwise pass: numbers of every row, and sums
    over all rows. Nothing of the size of the arrays is formed.

    Args:
      rows: maps equally shaped blocks [..., features] to numbers n[..., 1] and pairs w[..., 1], a[..., features].
      arrays: equally shaped, [..., features].

    Returns:
      each n[..., 1] and each sum[features].
    """
    return _by_rows(rows, arrays, _TILE_ELEMENTS, arrays[0].shape[-1])


def map_rows(rows: Rows, columns: int, *arrays: jax.Array) -> tuple[Numbers, tuple[jax.Array, ...]]:
    """As `reduce_rows`, for arrays and numbers of any last axis, and `rows` with products in it.

    columns: how many numbers `rows` makes on its way for each row. Unless that is large, all rows are taken at once.
    """
    if math.prod(arrays[0].shape[:-1]) * columns < _MAPPED_ELEMENTS:
        return _whole(rows, arrays)
    return _by_rows(rows, arrays, _BLOCK_ELEMENTS, columns)


def outer_products(x: jax.Array, y: jax.Array, precision: lax.PrecisionLike = None) -> jax.Array:
    """xᵀ · y[features, columns] = Σ_r x_r ⊗ y_r, in float32 or more, for x[..., features] and y[..., columns]."""
    product = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
    )
    axes = tuple(range(x.ndim - 1))

    def transposed(x, y):
        # XLA's fast path takes rows alone, in and out; it would widen both for a layout of its own choice.
        x = dispatch.row_major(jnp.moveaxis(x, -1, 0))
        return dispatch.row_major(product(x, y, ((tuple(range(1, x.ndim)), axes), ((), ()))))

    plain = lambda x, y: product(x, y, ((axes, axes), ((), ())))
    return dispatch.on_cpu(transposed, plain, x, y) if x.dtype == y.dtype == jnp.bfloat16 else plain(x, y)


def row_mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_f x_f · weights_f / features for x[..., features], with the axis kept.

    As a product: a CPU vectorises that, but adds the elements of a row up one after the other.
    """
    return jnp.einsum("...f,f->...", x, weights, precision=lax.Precision.HIGHEST)[..., None] / x.shape[-1]


def _by_rows(rows: Rows, arrays, elements: int, columns: int):
    return dispatch.on_cpu(lambda *xs: _tiled(rows, xs, elements, columns), lambda *xs: _whole(rows, xs), *arrays)


def _whole(rows: Rows, arrays):
    numbers, pairs = rows(*arrays)
    return numbers, tuple(jnp.sum(w * a, range(a.ndim - 1)) for w, a in pairs)


def _tiled(rows: Rows, arrays, elements: int, columns: int):
    leading = arrays[0].shape[:-1]
    parts = [math.gcd(size, _PARTS) for size in leading]
    lengths = [size // count for size, count in zip(leading, parts, strict=True)]
    length = max(lengths, default=1)
    width = max(1, elements * length // (math.prod(leading) * columns))
    if width >= length:
        return _whole(rows, arrays)
    dim = 2 * lengths.index(length) + 1
    split = [size for pair in zip(parts, lengths, strict=True) for size in pair]
    arrays = [x.reshape(*split, x.shape[-1]) for x in arrays]
    inside = range(1, 2 * len(leading), 2)

    def block(start, size):
        numbers, pairs = rows(*(lax.dynamic_slice_in_dim(x, start, size, dim) for x in arrays))
        return numbers, tuple(part_sums(w, a) for w, a in pairs)

    def part_sums(w, a):
        # One sum for each part: adding the parts up here would communicate in every step.
        if len(leading) > 1:
            return jnp.sum(w * a, inside)
        return jnp.einsum("pwo,pwf->pf", w, a, precision=lax.Precision.HIGHEST)

    def put(whole, numbers, start):
        return tuple(lax.dynamic_update_slice_in_dim(x, n, start, dim) for x, n in zip(whole, numbers, strict=True))

    def step(i, carry):
        whole, sums = carry
        numbers, more = block(i * width, width)
        return put(whole, numbers, i * width), tuple(map(jnp.add, sums, more))

    like_numbers, like_sums = jax.eval_shape(lambda: block(0, width))
    whole = tuple(jnp.zeros((*split, n.shape[-1]), n.dtype) for n in like_numbers)
    sums = tuple(jnp.zeros(s.shape, s.dtype) for s in like_sums)
    rest = length % width
    if rest:
        numbers, sums = block(length - rest, rest)
        whole = put(whole, numbers, length - rest)
    whole, sums = lax.fori_loop(0, length // width, step, (whole, sums))
    return tuple(n.reshape(*leading, n.shape[-1]) for n in whole), tuple(jnp.sum(s, range(s.ndim - 1)) for s in sums)
