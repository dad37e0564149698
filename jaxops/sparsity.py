"""Weights with zeros: which numbers to keep, and how to store only those. Plain JAX; the operators are others.

Blocks: w[k, n] is cut into blocks of bk × bn, and only those that are not zero are stored.
2:4: of any 4 consecutive rows of a column of w at most 2 are not zero; those 2 are stored, and where they stand.
"""

import dataclasses
import functools
from collections.abc import Callable
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxops.ops import checks
from jaxops.reference.block_sparse_matmul import columns_of, expanded
from jaxops.reference.sparse_2_4_matmul import expanded as expanded_2_4

Block = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which blocks of a matrix are stored: those of column c are offsets[c] … offsets[c + 1] - 1, and block i stands in
    the block row rows[i].

    Constant: it compares and hashes by value, so that it can be a static part of a pytree. rows: int32 [s], rising in
    every column. offsets: int32 [n / bn + 1], from 0 to s. shape: [k, n] of the matrix; block: (bk, bn).

    Raises `ValueError` if blocks do not divide the matrix, an index is out of range or not rising, or `offsets` do not
    rise from 0 to s.
    """

    rows: np.ndarray
    offsets: np.ndarray
    shape: tuple[int, int]
    block: Block

    def __post_init__(self) -> None:
        name = "BlockPattern"
        k, n = grid(name, self.shape, self.block)
        for field in ("rows", "offsets"):
            object.__setattr__(self, field, _constant(name, field, getattr(self, field)))
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        object.__setattr__(self, "block", tuple(map(int, self.block)))
        check_indices(name, self.rows, self.offsets, k, n)
        inside = np.ones(len(self.rows), bool)
        inside[self.offsets[:-1][self.offsets[:-1] < len(self.rows)]] = False
        if wrong := np.flatnonzero(inside[1:] & (np.diff(self.rows) <= 0)).tolist():
            raise ValueError(f"{name}: rows must rise in every column, got {self.rows[wrong[0] : wrong[0] + 2]}")

    @staticmethod
    def of(mask: ArrayLike, block: Block) -> "BlockPattern":
        """The pattern that stores the blocks which are True in `mask`[k / bk, n / bn]."""
        there = np.asarray(mask)
        if there.ndim != 2 or there.dtype != np.bool_:
            raise ValueError(
                f"BlockPattern.of: mask must be boolean and have two axes, got {there.dtype}{list(there.shape)}"
            )
        columns, rows = np.nonzero(there.T)
        offsets = np.searchsorted(columns, np.arange(there.shape[1] + 1))
        return BlockPattern(rows, offsets, (there.shape[0] * block[0], there.shape[1] * block[1]), block)

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """bool [k / bk, n / bn]: which blocks are stored."""
        there = np.zeros(grid("BlockPattern", self.shape, self.block), bool)
        there[self.rows, np.repeat(np.arange(there.shape[1]), np.diff(self.offsets))] = True
        return there

    @property
    def density(self) -> float:
        """Stored blocks of all blocks."""
        return float(self.mask.mean()) if self.mask.size else 0.0

    @functools.cached_property
    def _value(self) -> tuple:
        return self.shape, self.block, self.rows.tobytes(), self.offsets.tobytes()

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, BlockPattern) and self._value == other._value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """A matrix w[k, n] of which only some blocks are stored, as `jaxops.block_sparse_matmul` takes it.

    blocks: floating [s, bk, bn], sorted by column and in it by row; the one leaf of this pytree, so that `jax.grad`, an
    optimizer and a checkpoint see an array. pattern: where they stand; static. Operators with the pattern as arrays
    (one compiled program for many patterns) take `blocks`, `pattern.rows` and `pattern.offsets`.
    """

    blocks: jax.Array
    pattern: BlockPattern = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    @property
    def dtype(self) -> Any:
        return self.blocks.dtype

    @staticmethod
    def from_dense(w: ArrayLike, block: Block | None = None, pattern: BlockPattern | None = None) -> "BlockSparse":
        """The blocks of w[k, n] that are in `pattern`, or else those of size `block` that hold a number other than 0.

        Without a pattern w must be known, not traced. Numbers outside the pattern are dropped.

        Raises `ValueError` if w is no matrix, blocks do not divide it, or neither or both of `block` and `pattern` are
        given, or the pattern is of another shape; `TypeError` if w is traced and there is no pattern.
        """
        name = "BlockSparse.from_dense"
        w = checks.array(name, "w", w)
        if (block is None) == (pattern is None):
            raise ValueError(f"{name}: one of block and pattern must be given, got {block} and {pattern}")
        if pattern is None:
            assert block is not None
            grid(name, w.shape, block)
            if isinstance(w, jax.core.Tracer):
                raise TypeError(f"{name}: w must be known where there is no pattern, got a traced array")
            pattern = BlockPattern.of(np.asarray(jnp.any(blocks_of(w, block) != 0, (2, 3))), block)
        if w.shape != pattern.shape:
            raise ValueError(f"{name}: w must have the shape of the pattern, {pattern.shape}, got {w.shape}")
        columns = columns_of(jnp.asarray(pattern.offsets), len(pattern.rows))
        return BlockSparse(blocks_of(w, pattern.block)[pattern.rows, columns], pattern)

    def to_dense(self) -> jax.Array:
        """w[k, n], exactly."""
        columns = columns_of(jnp.asarray(self.pattern.offsets), len(self.pattern.rows))
        return expanded(self.blocks, jnp.asarray(self.pattern.rows), columns, self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse24:
    """A matrix w[k, n] of which at most 2 of any 4 consecutive rows of a column are not zero.

    values: floating [k / 2, n], 2 for each 4 rows. indices: uint8 [⌈k / 8⌉, n], where they stand among the 4, 2 bits
    each, those of 4 values in a byte from the lowest bits up.
    """

    values: jax.Array
    indices: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return 2 * self.values.shape[0], self.values.shape[1]

    @staticmethod
    def from_dense(w: ArrayLike) -> "Sparse24":
        """Raises `ValueError` if w[k, n] is not 2:4 (with the first place), or k no multiple of 4; `TypeError` if w is
        traced: whether it is 2:4 must be known."""
        name = "Sparse24.from_dense"
        w = checks.array(name, "w", w)
        if w.ndim != 2 or w.shape[0] % 4:
            raise ValueError(f"{name}: w must have shape (k, n) with k a multiple of 4, got {w.shape}")
        if isinstance(w, jax.core.Tracer):
            raise TypeError(f"{name}: w must be known, got a traced array")
        grouped = w.reshape(-1, 4, w.shape[1])
        counts = np.asarray(jnp.sum(grouped != 0, 1))
        if (wrong := np.argwhere(counts > 2)).size:
            group, column = wrong[0].tolist()
            raise ValueError(
                f"{name}: w must be 2:4 along its rows, got {counts[group, column]} numbers that are not 0 in rows "
                f"{4 * group} … {4 * group + 3} of column {column}"
            )
        places = jnp.sort(jnp.argsort(grouped == 0, axis=1, stable=True)[:, :2], axis=1)
        values = jnp.take_along_axis(grouped, places, 1).reshape(-1, w.shape[1])
        flat = places.reshape(-1, w.shape[1]).astype(jnp.uint8)
        flat = jnp.pad(flat, ((0, -flat.shape[0] % 4), (0, 0))).reshape(-1, 4, w.shape[1])
        shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
        return Sparse24(values, jnp.sum(flat << shifts, 1, dtype=jnp.uint8))

    def to_dense(self) -> jax.Array:
        """w[k, n], exactly."""
        return expanded_2_4(self.values, self.indices)


def prune_mask(
    w: ArrayLike, sparsity: ArrayLike | None = None, *, pattern: str = "unstructured", block: Block | None = None
) -> jax.Array:
    """mask = True where w is kept: where |w| is large.

    Args:
      w: floating; [..., k, n] for "blocks" and "2:4".
      sparsity: how much becomes zero, from 0 to 1, of the whole array; may be traced, so that a schedule can be part of
        a compiled step. None for "2:4", which is one half.
      pattern: "unstructured": the numbers of least |w|; "blocks": the blocks of least Σ w²; "2:4": of 4
        consecutive rows of a column the 2 of least |w|.
      block: (bk, bn) for "blocks".

    Returns:
      A boolean array of the shape of w. Exactly round(sparsity · count) numbers or blocks are False, also among equals.

    Raises:
      TypeError: w is not floating.
      ValueError: the pattern is unknown, sparsity is missing, superfluous or out of range, or blocks or 4 rows do not
        divide the matrix.

    Sources: Han et al., arXiv:1506.02626 (magnitude); Narang et al., arXiv:1711.02782 (blocks); Mishra et al.,
    arXiv:2104.08378 (2:4).
    """
    name = "prune_mask"
    w = jax.lax.stop_gradient(checks.floating(name, "w", w))
    if pattern not in ("unstructured", "blocks", "2:4"):
        raise ValueError(f"{name}: pattern must be 'unstructured', 'blocks' or '2:4', got {pattern!r}")
    if (block is not None) != (pattern == "blocks"):
        raise ValueError(f"{name}: block must be given for pattern='blocks' alone, got {block} for {pattern!r}")
    if (sparsity is None) != (pattern == "2:4"):
        raise ValueError(f"{name}: sparsity must be given, but for pattern='2:4', got {sparsity} for {pattern!r}")
    if sparsity is not None and not isinstance(sparsity, jax.core.Tracer) and not 0 <= float(np.asarray(sparsity)) <= 1:
        raise ValueError(f"{name}: sparsity must be from 0 to 1, got {sparsity}")
    if pattern == "unstructured":
        assert sparsity is not None
        return _largest(jnp.abs(w).reshape(-1), sparsity).reshape(w.shape)
    if w.ndim < 2:
        raise ValueError(f"{name}: w must have at least two axes for {pattern!r}, got shape {w.shape}")
    k, n = w.shape[-2:]
    if pattern == "2:4":
        if k % 4:
            raise ValueError(f"{name}: w must have a multiple of 4 rows for '2:4', got {k}")
        grouped = jnp.abs(w).reshape(-1, 4, n)
        rank = jnp.argsort(jnp.argsort(grouped, axis=1, stable=True), axis=1)
        return (rank >= 2).reshape(w.shape)
    assert block is not None and sparsity is not None
    rows, columns = grid(name, (k, n), block)
    squares = jnp.square(w.astype(jnp.promote_types(w.dtype, jnp.float32)))
    sums = jnp.sum(squares.reshape(-1, rows, block[0], columns, block[1]), (2, 4))
    kept = _largest(sums.reshape(-1), sparsity).reshape(sums.shape)
    return jnp.repeat(jnp.repeat(kept, block[0], 1), block[1], 2).reshape(w.shape)


def prune(
    w: ArrayLike, sparsity: ArrayLike | None = None, *, pattern: str = "unstructured", block: Block | None = None
) -> jax.Array:
    """y = w where `jaxops.prune_mask(w, …)`, else 0. Arguments and errors are those of `prune_mask`."""
    w = checks.floating("prune", "w", w)
    return jnp.where(prune_mask(w, sparsity, pattern=pattern, block=block), w, 0)


def pruning_schedule(final: float, begin: int, end: int, *, initial: float = 0.0) -> Callable[[ArrayLike], jax.Array]:
    """sparsity(step) = final + (initial - final) · (1 - (step - begin) / (end - begin))³ between begin and end, initial
    before and final after: fast while there is much to spare, slow in the end.

    A schedule as optax has them: a function of the step, which may be traced.

    Raises `ValueError` unless 0 ≤ initial ≤ final ≤ 1 and 0 ≤ begin < end; `TypeError` for what is no number.

    Source: Zhu and Gupta, arXiv:1710.01878.
    """
    name = "pruning_schedule"
    final, initial = checks.number(name, "final", final), checks.number(name, "initial", initial)
    if not initial <= final <= 1:
        raise ValueError(f"{name}: 0 ≤ initial ≤ final ≤ 1 must hold, got initial {initial} and final {final}")
    begin, end = index(begin), index(end)
    if not 0 <= begin < end:
        raise ValueError(f"{name}: 0 ≤ begin < end must hold, got begin {begin} and end {end}")

    def schedule(step: ArrayLike) -> jax.Array:
        left = 1 - jnp.clip((jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0, 1)
        return final + (initial - final) * left**3

    return schedule


def blocks_of(w: jax.Array, block: Block) -> jax.Array:
    """[k / bk, n / bn, bk, bn] of w[k, n]."""
    bk, bn = block
    return w.reshape(w.shape[0] // bk, bk, w.shape[1] // bn, bn).transpose(0, 2, 1, 3)


def grid(name: str, shape: tuple[int, ...], block: Any) -> Block:
    """How many blocks a matrix has along both axes. Raises `ValueError` if they do not divide it."""
    try:
        bk, bn = map(index, block)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: block must be two ints, got {block!r}") from None
    if len(shape) != 2:
        raise ValueError(f"{name}: the matrix must have shape (k, n), got {tuple(shape)}")
    if bk < 1 or bn < 1 or shape[0] % bk or shape[1] % bn:
        raise ValueError(f"{name}: blocks of {bk} × {bn} must divide the matrix {tuple(shape)}")
    return shape[0] // bk, shape[1] // bn


def check_indices(name: str, rows: np.ndarray, offsets: np.ndarray, k: int, n: int) -> None:
    """Raises `ValueError` unless these are blocks of a grid of k × n: rows in range, offsets from 0 to their number."""
    if offsets.shape != (n + 1,) or offsets[0] != 0 or offsets[-1] != len(rows) or np.any(np.diff(offsets) < 0):
        raise ValueError(
            f"{name}: offsets must rise from 0 to {len(rows)}, the number of blocks, in {n + 1} steps, got {offsets}"
        )
    if len(wrong := rows[(rows < 0) | (rows >= k)]):
        raise ValueError(f"{name}: rows must be in [0, {k}), got {wrong[0]}")


def _constant(name: str, field: str, value: Any) -> np.ndarray:
    """A read-only copy in int32."""
    array = np.array(value)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
        raise ValueError(f"{name}: {field} must be integers along one axis, got {array.dtype}{list(array.shape)}")
    array = array.astype(np.int32)
    array.setflags(write=False)
    return array


def _largest(x: jax.Array, sparsity: ArrayLike) -> jax.Array:
    """True but for the round(sparsity · count) smallest of x[count]."""
    order = jnp.argsort(x, stable=True)
    drop = jnp.round(jnp.asarray(sparsity, jnp.float32) * x.size)
    return jnp.zeros(x.shape, bool).at[order].set(jnp.arange(x.size) >= drop)
