"""A ragged batch, sequences of tokens one after another, cut into tiles of rows that belong to one sequence each.

The tokens are cut at every multiple of `rows` and wherever a sequence starts. Tile i is found by a binary search in the
starts of the sequences, alike for one i on a chip's scalar unit and for an array of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Cut:
    """`tokens` of `sequences` sequences, cut into tiles of at most `rows`.

    `start(b)`, in the methods, is the first token of sequence b, in [0, tokens]. What is left behind the last sequence
    counts as one more, so that every token is in a tile.
    """

    tokens: int
    sequences: int
    rows: int

    @property
    def count(self) -> int:
        """How many tiles there are at most, whatever the starts; some may be empty."""
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

    def place(self, token, start: Callable[[Any], Any]):
        """(tile, row) of a token."""
        b = self._last(lambda b: start(b) <= token, token)
        tile = self._first_tile(start, b) + self._div(token) - self._div(start(b))
        return tile, token - jnp.maximum(start(b), self._div(token) * self.rows)
