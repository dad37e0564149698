"""Random numbers of an element's position: the same on every chip, in every tile, forward and backward, on any mesh.

    x = w₀(row) + column · φ;   x ^= x >> 16;   x *= m₁;   x ^= x >> 15;   x += w₁(row);   x *= m₂

modulo 2³², with two words w₀, w₁ per row by Threefry (Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
SC 2011) and per element a Weyl sequence that is mixed (Steele, Lea & Flood, Fast splittable pseudorandom number
generators, OOPSLA 2014; the multipliers are those of lowbias32). A row's words cost little beside its elements, and an
element costs two products and a few shifts, so that a kernel makes it again wherever it needs it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

_WEYL, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def row_words(
    key_data: jax.Array,
    batch: int,
    heads: int,
    queries: int,
    start: tuple[Any, Any, Any] = (0, 0, 0),
    all_heads: int | None = None,
) -> jax.Array:
    """The two words of every row, uint32 [batch, heads, 2, queries]: Threefry of its position under the key.

    key_data: uint32 [2], or [4] as the keys of JAX's "rbg" generators have. start: the position (batch, head, query) of
    the first row in a whole that has `all_heads` heads.

    They belong to the whole of a problem. Whoever cuts a problem cuts them too, like its queries, or says where the
    piece begins; whoever cuts its keys counts columns from the first key of the whole, or gives the piece that begins
    at key j the first words plus j · φ (`shifted`).
    """
    words = key_data.reshape(-1, 2)
    key = words[0]
    for more in words[1:]:
        key = jnp.stack(threefry2x32_p.bind(key[0], key[1], more[0], more[1]))
    shape = (batch, heads, queries)
    first_batch, first_head, first_query = (jnp.asarray(position).astype(jnp.uint32) for position in start)
    head = (lax.broadcasted_iota(jnp.uint32, shape, 0) + first_batch) * (all_heads or heads)
    head = head + lax.broadcasted_iota(jnp.uint32, shape, 1) + first_head
    query = lax.broadcasted_iota(jnp.uint32, shape, 2) + first_query
    first, second = (jnp.broadcast_to(word, shape) for word in key)
    # Inside shard_map a start differs from device to device, the key does not: threefry wants one type for all.
    alike = (head ^ head) + (query ^ query)
    return jnp.stack(threefry2x32_p.bind(*(word + alike for word in (first, second, head, query))), axis=2)


def shifted(words: jax.Array, columns) -> jax.Array:
    """The words, [batch, heads, 2, queries], of the same rows from column `columns` on, counted from 0 again."""
    offset = jnp.asarray(columns).astype(jnp.uint32) * jnp.uint32(_WEYL)
    return words.at[:, :, 0].add(offset)


def kept(words0: jax.Array, words1: jax.Array, column: jax.Array, rate: float) -> jax.Array:
    """Whether an element survives, true with probability 1 - rate; the arguments broadcast.

    words0, words1: the words of the row, uint32 or int32. column: int32, the index of the element in the row.
    rate: a Python number in [0, 1).

    All of it is int32: no chip has to compare unsigned numbers. The high bits decide, which are mixed best.
    """
    x = words0.astype(jnp.int32) + column.astype(jnp.int32) * _int32(_WEYL)
    x = x ^ _right(x, 16)
    x = x * _int32(_FIRST)
    x = x ^ _right(x, 15)
    x = (x + words1.astype(jnp.int32)) * _int32(_SECOND)
    # Of all 2³² values the `rate` that are lowest, from the most negative on, are dropped.
    return x >= np.int32(min(round(rate * 2**32), 2**32 - 1) - 2**31)


def _int32(word: int) -> np.int32:
    return np.int32(word - 2**32 if word >= 2**31 else word)


def _right(x: jax.Array, bits: int) -> jax.Array:
    return lax.shift_right_logical(x, jnp.full_like(x, bits))
