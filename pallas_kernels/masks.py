"""Which keys a query may attend to, as arithmetic on tiles.

A band lets query i see key j iff  i - left ≤ j ≤ i + right;  a side that is None is open. Causal is right = 0. Its
functions take Python or traced integers.

Every other mask becomes a schedule: for each block of queries the blocks of keys to visit, those that need no mask
first. So a kernel skips what is empty and masks only what is cut, whatever the mask is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import modifiers
from pallas_kernels.padding import pad_to, round_up

Array = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Band:
    """i - left ≤ j ≤ i + right."""

    left: int | None = None
    right: int | None = None

    @staticmethod
    def of(is_causal: bool, window: tuple[int | None, int | None] | None) -> "Band":
        """The band of `is_causal` and `local_window_size=(left, right)` together."""
        left, right = window if window is not None else (None, None)
        if is_causal:
            right = 0 if right is None else min(right, 0)
        return Band(left, right)

    @property
    def open(self) -> bool:
        return self.left is None and self.right is None

    def allowed(self, row, column):
        """Whether query `row` sees key `column` (broadcasting), or True if the band is open."""
        seen = True
        if self.left is not None:
            seen = column >= row - self.left
        if self.right is not None:
            below = column <= row + self.right
            seen = below if seen is True else seen & below
        return seen

    def touched(self, row, rows, keys):
        """[first, end): the keys, of `keys`, that any query of row … row+rows-1 sees. May be empty (first ≥ end)."""
        first = 0 if self.left is None else _clip(row - self.left, keys)
        end = keys if self.right is None else _clip(row + rows + self.right, keys)
        return first, end

    def whole(self, row, rows, keys):
        """[first, end): the keys that every query of row … row+rows-1 sees. May be empty (first ≥ end)."""
        first = 0 if self.left is None else _clip(row + rows - 1 - self.left, keys)
        end = keys if self.right is None else _clip(row + 1 + self.right, keys)
        return first, end

    def pairs(self, queries: int, keys: int) -> int:
        """Σ_i |{j: query i sees key j}| over `queries` queries and `keys` keys, Python integers."""

        def below(end):  # Σ_i min(max(i + end, 0), keys): how many keys are before i + end
            whole = min(max(keys - end, 0), queries)  # rows from here on have all of them
            first = min(max(-end, 0), whole)  # rows before this have none
            return (first + end + whole - 1 + end) * (whole - first) // 2 + keys * (queries - whole)

        ended = keys * queries if self.right is None else below(self.right + 1)
        return ended - (0 if self.left is None else below(-self.left))

    def transposed(self) -> "Band":
        """The same band seen from the keys: key j is seen by the queries j - right … j + left."""
        return Band(self.right, self.left)


def _clip(value, high):
    return min(max(value, 0), high) if isinstance(value, int) and isinstance(high, int) else jnp.clip(value, 0, high)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which blocks of logits hold any pair that is seen (`touched`) and which hold no other (`whole`).

    Both are bool [B or 1, N or 1, row blocks, column blocks]: NumPy arrays if nothing had to be looked at to know
    them, else JAX's. They may err on the safe side: a touched block may be empty, and one that is not whole may be.
    A block of keys that reaches beyond the last key is never whole; rows beyond the last query do not count.
    """

    touched: Array
    whole: Array

    @staticmethod
    def of(
        shape: tuple[int, int, int, int],
        rows: int,
        columns: int,
        band: Band = Band(),
        *,
        mask_mod: Callable | None = None,
        mask: jax.Array | None = None,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        query_segment_ids: jax.Array | None = None,
        key_value_segment_ids: jax.Array | None = None,
        prefix_lengths: jax.Array | None = None,
    ) -> "Blocks":
        """The blocks of `rows` queries × `columns` keys of logits of shape (B, N, T, S).

        A pair is seen if it is in the band or its key is before prefix_lengths[B], and everything else given allows
        it: mask_mod(batch, head, query, key), mask [B or 1, N or 1, T or 1, S or 1], lengths [B], segment ids [B, T]
        and [B, S].

        Of segment ids only the least and the greatest of a block are looked at, of a mask all.
        """
        *_, queries, keys = shape
        first_row, last_row = _ends(queries, rows)
        first_column, last_column = _ends(keys, columns)
        first_row, last_row = first_row[:, None], last_row[:, None]
        complete = first_column + columns <= keys
        touched, whole = np.ones((2, 1, 1, first_row.size, first_column.size), bool)
        if band.left is not None:
            touched, whole = (
                touched & (last_column >= first_row - band.left),
                whole & (first_column >= last_row - band.left),
            )
        if band.right is not None:
            touched = touched & (first_column <= last_row + band.right)
            whole = whole & (last_column <= first_row + band.right)
        if prefix_lengths is not None:
            prefix = prefix_lengths[:, None, None, None]
            touched, whole = touched | (first_column < prefix), whole | (last_column < prefix)
        if mask_mod is not None:
            # Counted inside the band, where nothing widens it: what both hide only together is found, too.
            within = band if prefix_lengths is None else Band()
            count = modifiers.count_seen(mask_mod, within, shape, rows, columns)
            touched = touched & (count > 0)
            whole = whole & (count == (last_row - first_row + 1) * (last_column - first_column + 1))
        if key_value_seq_lengths is not None:
            length = key_value_seq_lengths[:, None, None, None]
            touched, whole = touched & (first_column < length), whole & (last_column < length)
        if query_seq_lengths is not None:
            touched = touched & (first_row < query_seq_lengths[:, None, None, None])
        if query_segment_ids is not None and key_value_segment_ids is not None:
            (least, most), (key_least, key_most) = (
                (x[:, None, :, None], y[:, None, :, None])
                for x, y in (_extremes(query_segment_ids, rows), _extremes(key_value_segment_ids, columns))
            )
            key_least, key_most = key_least.mT, key_most.mT
            touched = touched & (least <= key_most) & (most >= key_least)
            whole = whole & (least == key_most) & (most == key_least)
        if mask is not None:
            touched = touched & _blockwise(mask, rows, columns, any_of=True)
            whole = whole & _blockwise(mask, rows, columns, any_of=False)
        return Blocks(touched, whole & touched & complete)

    def transposed(self) -> "Blocks":
        """The same seen from the keys: [B or 1, N or 1, column blocks, row blocks]."""
        return Blocks(self.touched.swapaxes(2, 3), self.whole.swapaxes(2, 3))

    def merged(self) -> "Blocks":
        """For whoever takes a block of all batches and heads at once: [1, 1, row blocks, column blocks]."""
        return Blocks(self.touched.any((0, 1), keepdims=True), self.whole.all((0, 1), keepdims=True))

    def schedule(self) -> tuple[Array, Array]:
        """(count, order) for a loop over the column blocks of each row block.

        count: int32 [B or 1, N or 1, row blocks, 2], how many blocks are whole and how many more are touched.
        order: int32 [B or 1, N or 1, row blocks, column blocks], which they are: the whole ones, then the others, each
          from first to last. What follows repeats the last one, so that whoever fetches ahead fetches nothing new; it
          is 0 where nothing is touched.
        """
        of: Any = np if isinstance(self.touched, np.ndarray) and isinstance(self.whole, np.ndarray) else jnp
        whole, partial = self.whole, self.touched & ~self.whole
        order = of.argsort(2 - 2 * whole - partial, axis=3, stable=True).astype(of.int32)
        count = of.stack([whole.sum(3), partial.sum(3)], axis=3).astype(of.int32)
        visited = count.sum(3, keepdims=True)
        place = of.minimum(of.arange(order.shape[3]), of.maximum(visited - 1, 0))
        return count, of.where(visited > 0, of.take_along_axis(order, place, axis=3), 0).astype(of.int32)


def _ends(size: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, last) index in each block of `size` indices."""
    first = np.arange(0, size, block, dtype=np.int32)
    return first, np.minimum(first + block, size) - 1


def _extremes(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """(least, greatest) id in each block of ids [B, length]."""
    missing = round_up(ids.shape[1], block) - ids.shape[1]
    ids = jnp.pad(ids, ((0, 0), (0, missing)), mode="edge").reshape(ids.shape[0], -1, block)
    return ids.min(2), ids.max(2)


def _blockwise(mask: jax.Array, rows: int, columns: int, *, any_of: bool) -> jax.Array:
    """Whether any, or else all, of each block of a mask is true; an axis of size 1 stays 1."""
    for axis, block in ((2, rows), (3, columns)):
        if mask.shape[axis] > 1:
            mask = pad_to(mask, axis, round_up(mask.shape[axis], block), not any_of)
            mask = mask.reshape(*mask.shape[:axis], -1, block, *mask.shape[axis + 1 :])
            mask = mask.any(axis + 1) if any_of else mask.all(axis + 1)
    return mask
