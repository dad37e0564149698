"""A ragged batch, sequences of tokens one after another, cut into tiles of rows that belong to one sequence each.

The tokens are cut at every multiple of `rows` and wherever a sequence starts. Tile i is found by a binary search in the
starts of the sequences, alike for one i on a chip's scalar unit and for an array of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Work(NamedTuple):
    """Tile i of a batch whose sequences have keys: tokens first … end - 1 of `sequence`, the first of them at the
    position `place` among its `length` keys. They see the keys low … high - 1; high is 0 if they see none."""

    sequence: Any
    first: Any
    end: Any
    place: Any
    length: Any
    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class Cut:
    """`tokens` of `sequences` sequences, cut into tiles of at most `rows`. `each`: how many every sequence has, if that
    is known; then tiles begin with a sequence.

    `start(b)`, in the methods, is the first token of sequence b, in [0, tokens]. What is left behind the last sequence
    counts as one more, so that every token is in a tile.
    """

    tokens: int
    sequences: int
    rows: int
    each: int | None = None

    @property
    def count(self) -> int:
        """How many tiles there are at most, whatever the starts; some may be empty."""
        if self.each is not None:
            return self.sequences * -(-self.each // self.rows)
        if self.rows == 1:
            return self.tokens
        return self.sequences + -(-self.tokens // self.rows)

    def _first_tile(self, start, b):
        """The number of the tile in which sequence b starts."""
        return self._div(start(b)) + (b if self.rows > 1 else 0)

    def _div(self, x):
        return lax.div(x, lax.full_like(x, self.rows))  # x ≥ 0

    def _last(self, at_most: Callable[[Any], Any], like):
        """The last sequence b, the one left behind included, for which `at_most(b)`, which holds up to some b ≥ 0."""
        low = jnp.zeros_like(like)
        step = 1 << self.sequences.bit_length() >> 1
        while step:
            middle = low + step
            inside = middle <= self.sequences
            low = jnp.where(inside & at_most(jnp.where(inside, middle, 0)), middle, low)
            step //= 2
        return low

    def tile(self, i, start: Callable[[Any], Any]):
        """(sequence, first, end): tile i holds the tokens first … end - 1 of that sequence; none if first ≥ end."""
        b = self._last(lambda b: self._first_tile(start, b) <= i, i)
        within = i - self._first_tile(start, b)
        multiple = (self._div(start(b)) + within) * self.rows
        first = jnp.where(within == 0, start(b), multiple)
        stop = jnp.where(b < self.sequences, start(jnp.minimum(b + 1, self.sequences)), self.tokens)
        return b, first, jnp.minimum(stop, multiple + self.rows)

    def work(
        self, i, start: Callable[[Any], Any], length: Callable[[Any], Any], most_keys: int, left: int | None
    ) -> Work:
        """What tile i holds and sees, if the newest tokens of sequence b are the last of its `length(b)` keys, of which
        each sees those before it, `left` of them at most. Numbers out of range are clipped to it."""
        if self.each is None:
            start_of = lambda b: jnp.where(b == 0, 0, jnp.clip(start(b), 0, self.tokens))
            b, first, end = self.tile(i, start_of)
            sequence, among = jnp.minimum(b, self.sequences - 1), b < self.sequences  # or of the tokens left behind
            stop = jnp.where(among, start_of(jnp.minimum(b + 1, self.sequences)), self.tokens)
            keys = jnp.where(among, length(sequence), 0)
        else:
            per_sequence = jnp.int32(-(-self.each // self.rows))
            sequence = lax.div(i, per_sequence)
            first = sequence * self.each + lax.rem(i, per_sequence) * self.rows
            stop = (sequence + 1) * self.each
            end, keys = jnp.minimum(first + self.rows, stop), length(sequence)
        keys = jnp.clip(keys, 0, most_keys)
        place = keys - (stop - first)
        high = jnp.where(end > first, jnp.clip(place + (end - first), 0, keys), 0)
        low = jnp.zeros_like(high) if left is None else jnp.clip(place - left, 0, jnp.maximum(high - 1, 0))
        return Work(sequence, first, end, place, keys, low, high)

    def place(self, token, start: Callable[[Any], Any]):
        """(tile, row) of a token."""
        b = self._last(lambda b: start(b) <= token, token)
        tile = self._first_tile(start, b) + self._div(token) - self._div(start(b))
        return tile, token - jnp.maximum(start(b), self._div(token) * self.rows)


# ---- products of groups of rows, around their kernels ---------------------------------------------------------------


def filled(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The rows of x at `indices`, zeros for those past the end."""
    return x.at[indices].get(mode="fill", fill_value=0)


def filled_if_needed(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The same in one pass where no index is past the end: XLA for the TPU fills in a second one, out of place."""
    if not len(x):
        return filled(x, indices)
    inside = indices < len(x)
    rows = x.at[indices].get(mode="clip")
    return lax.cond(jnp.all(inside), lambda rows: rows, lambda rows: jnp.where(inside[:, None], rows, 0), rows)


def forward(product: Callable, lhs, lhs_rows, out_rows, out_weights, out_size: int, dtype, gather=filled) -> jax.Array:
    """out of `ragged_dot` by product(x, dtype), the rows x_i · rhs_g, of what `gather` makes of lhs."""
    dtype, x = jnp.dtype(dtype), lhs if lhs_rows is None else gather(lhs, lhs_rows)
    if out_rows is None and out_weights is None:
        return product(x, dtype)
    return _scattered(product(x, jnp.dtype(jnp.float32)), out_rows, out_weights, out_size).astype(dtype)


def backward(
    product: Callable, sums: Callable, lhs, lhs_rows, out_rows, out_weights, cotangent, gather=filled
) -> dict[str, jax.Array]:
    """Gradients of lhs, rhs and out_weights (if present) by product(dy, dtype), the rows dy_i · rhs_gᵀ, and
    sums(x, dy), Σ x_iᵀ · dy_i over each group."""
    f32 = jnp.float32
    x = lhs if lhs_rows is None else gather(lhs, lhs_rows)
    dy = cotangent if out_rows is None else gather(cotangent, out_rows)
    plain = lhs_rows is None and out_weights is None
    # A gradient that is still to be weighted and added up stays float32.
    dx = product(dy.astype(lhs.dtype), jnp.dtype(lhs.dtype if plain else f32))
    gradients = {}
    if out_weights is not None:
        gradients["out_weights"] = jnp.sum(dx * x.astype(f32), axis=1).astype(out_weights.dtype)
        dy = dy.astype(f32) * out_weights.astype(f32)[:, None]
    gradients["lhs"] = _scattered(dx, lhs_rows, out_weights, lhs.shape[0]).astype(lhs.dtype)
    gradients["rhs"] = sums(x, dy.astype(x.dtype))
    return gradients


def _scattered(y, indices, weights, size):
    """[size, n], float32 if anything is added or weighted."""
    if weights is not None:
        y = y.astype(jnp.float32) * weights.astype(jnp.float32)[:, None]
    return y if indices is None else jnp.zeros((size, y.shape[1]), jnp.float32).at[indices].add(y, mode="drop")
