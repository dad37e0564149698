"""What the attention kernels of all GPUs share: their operands, launch, walk over tiles, and a tile of scores.

    x = scale · q kᵀ    x = cap · tanh(x / cap)    x = x + bias - slope · |i - j|    x = score_mod(x, batch, head, i, j)
    x = -inf where masked                                                             (each where given)

Exponents are of base two with the scale folded in. A tile is in registers; which thread has which element is up to the
kernel, which names the layout. Where its rows are keys (dk and dv), bias and mask come transposed.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import modifiers, random
from pallas_kernels.gpu.elementwise import lowered, refusal
from pallas_kernels.masks import Band, Blocks
from pallas_kernels.padding import pad_to, round_up

LOG2E = math.log2(math.e)
LN2 = math.log(2)
LOWEST = float(jnp.finfo(jnp.float32).min)  # a running maximum that is never -inf, so that no row computes -inf - -inf
WIDEST = 256  # of all tiles: what is read without bounds is padded to a multiple of it
WHOLE, MASKED, SKIPPED = "whole", "masked", "skipped"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The operands as the kernels take them, and what is known before any number is seen.

    `queries`, `keys`, `dim` and `value_dim` are the sizes before padding. `blocks` are the arguments of `Blocks.of`
    where the mask is more than a band with lengths, else None.
    """

    operands: dict[str, jax.Array]
    queries: int
    keys: int
    dim: int
    value_dim: int
    scale: float
    band: Band
    cap: float | None
    score_mod: Callable | None
    mask_mod: Callable | None
    dropout_rate: float
    blocks: dict[str, Any] | None
    tiles: Any

    @staticmethod
    def of(
        query, key, value, *, tiles, scale, is_causal, local_window_size=None, logits_soft_cap=None, score_mod=None,
        mask_mod=None, dropout_rate=0.0, bias=None, mask=None, query_seq_lengths=None, key_value_seq_lengths=None,
        query_segment_ids=None, key_value_segment_ids=None, prefix_lengths=None, sinks=None, alibi_slopes=None,
        dropout_rows=None,
    ) -> "Problem":  # fmt: skip
        B, T, S = query.shape[0], query.shape[1], key.shape[1]
        dim, value_dim = query.shape[-1], value.shape[-1]
        operands = {
            name: whole_rows(pad_to(x, 3, round_up(x.shape[3], 64)))
            for name, x in {"query": query, "key": key, "value": value}.items()
        }
        integers = lambda x: x.astype(jnp.int32)
        if query_seq_lengths is not None:
            operands["query_lengths"] = jnp.clip(integers(query_seq_lengths), 0, T)
        if key_value_seq_lengths is not None:
            operands["key_lengths"] = jnp.clip(integers(key_value_seq_lengths), 0, S)
        if query_segment_ids is not None:
            operands["query_segments"] = _whole_tiles(integers(query_segment_ids), 1)
            operands["key_segments"] = _whole_tiles(integers(key_value_segment_ids), 1)
        if prefix_lengths is not None:
            operands["prefix"] = integers(prefix_lengths)
        if sinks is not None:
            operands["sinks"] = sinks.astype(jnp.float32) * LOG2E
        if alibi_slopes is not None:
            operands["alibi"] = alibi_slopes.astype(jnp.float32)
        if dropout_rate:
            operands["words"] = _whole_tiles(lax.bitcast_convert_type(dropout_rows, jnp.int32), 3)
        if bias is not None:
            operands["bias"] = _term(bias.astype(jnp.float32) if bias.shape[2:] == (1, 1) else bias)
        if mask is not None:
            operands["mask"] = _term(mask.astype(jnp.float32 if mask.shape[2:] == (1, 1) else query.dtype))
        blocks: dict[str, Any] | None = None
        if any(x is not None for x in (mask_mod, mask, query_segment_ids, prefix_lengths)):
            blocks = {
                "shape": (B, query.shape[2], T, S),
                "mask_mod": mask_mod,
                "mask": mask,
                "query_seq_lengths": query_seq_lengths,
                "key_value_seq_lengths": key_value_seq_lengths,
                "query_segment_ids": query_segment_ids,
                "key_value_segment_ids": key_value_segment_ids,
                "prefix_lengths": prefix_lengths,
            }
        band = Band.of(is_causal, local_window_size)
        left, right = band.left, band.right  # sides that cut nothing are open; no number may overflow
        band = Band(
            None if left is None or left >= T else max(left, -S),
            None if right is None or right >= S else max(right, -T),
        )
        return Problem(
            operands, T, S, dim, value_dim, float(scale), band, logits_soft_cap, score_mod, mask_mod,
            float(dropout_rate), blocks, tiles,
        )  # fmt: skip

    @property
    def shape(self):
        """(batch, queries, keys, heads, kv_heads, head size, value head size), the last two padded."""
        (B, _, N, H), (_, _, K, V) = self.operands["query"].shape, self.operands["value"].shape
        return B, self.queries, self.keys, N, K, H, V

    @property
    def dtype(self):
        return self.operands["query"].dtype

    @property
    def kept_rate(self) -> float:
        return 1 - self.dropout_rate

    def schedule(self, rows: int, columns: int, *, by_keys: bool = False) -> dict[str, jax.Array]:
        """The tables of a kernel whose blocks are `rows` × `columns` (keys × queries if `by_keys`), if it needs any."""
        if self.blocks is None:
            return {}
        given = dict(self.blocks)
        shape, sizes = given.pop("shape"), (columns, rows) if by_keys else (rows, columns)
        blocks = Blocks.of(shape, *sizes, self.band, **given)
        count, order = (blocks.transposed() if by_keys else blocks).schedule()
        return {"count": jnp.asarray(count), "order": jnp.asarray(order)}


def whole_rows(x):
    """[batch, length, heads, size] with the length filled up to what copies can cut, rows of eight."""
    return pad_to(x, 1, round_up(x.shape[1], 8))


def _whole_tiles(x, axis):
    return pad_to(x, axis, round_up(x.shape[axis], WIDEST))


def _term(x):
    for axis in (2, 3):
        x = _whole_tiles(x, axis) if x.shape[axis] > 1 else x
    return x


def by_keys(operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The operands for a kernel whose rows are keys."""
    return operands | {name: operands[name].swapaxes(2, 3) for name in ("bias", "mask") if name in operands}


def not_lowered(score_mod: Callable | None, mask_mod: Callable | None) -> str | None:
    """Why Mosaic GPU cannot compile a modifier, or None."""
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if function is None:
            continue
        programs = [modifiers.traced(lowered(function), scored=name == "score_mod")]
        if name == "score_mod":
            programs.append(modifiers.traced(_score_and_slope(function), scored=True))
        for program in programs:
            for equation in modifiers.equations(program):
                if reason := refusal(equation):
                    return f"{name} {reason}"
    return None


# ---- launching ----------------------------------------------------------------------------------------------------


class Refs:
    """Operands, results and scratch memory of a kernel, by name; in `x in refs`, operands by name."""

    def __init__(self, **refs):
        self.__dict__.update(refs)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the kernel was not given {name}")

    def __contains__(self, name):
        return name in self.__dict__


TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


def smem(dtype, *shape):
    """A tile in shared memory, as copies and products want it."""
    return plgpu.SMEM(shape, dtype, transforms=TILED)


def launch(body, name: str, operands, results, scratch, grid, **options) -> dict[str, jax.Array]:
    """The results, by name, of `body(refs)` over a grid of heads, tiles and batches; `options` of `plgpu.kernel`."""
    names = (*operands, *results)

    def by_name(*refs, **memory):
        body(Refs(**dict(zip(names, refs, strict=True)), **memory))

    arrays = plgpu.kernel(
        by_name,
        kernel_name=name,
        out_type=list(results.values()),
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        **options,
    )(*operands.values())
    return dict(zip(results, arrays, strict=True))


# ---- which tiles ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Walk:
    """The tiles of columns that a block of rows goes through: `tile(n)` for every step n of [start, end).

    `sections(first, rows)` says what they are to some of the rows: [(begin, end, kind)].
    """

    start: Any
    end: Any
    tile: Callable
    sections: Callable

    @property
    def steps(self):
        return self.end - self.start


def find_walk(
    refs, batch, head, block, band: Band, first, rows: int, columns, tile: int, *, limit, ragged: bool, one_loop: bool
) -> Walk:
    """The tiles of `tile` columns, of `columns`, that rows first … first + rows - 1 see, the block `block` of rows.

    By the tables if the kernel was given any, else by the band; then there are none from row `limit` on (None: there is
    no such row). `ragged`: the last tile holds columns past the end. `one_loop`: two would not fit the registers.
    """
    if "count" in refs:
        return _walk_of_table(refs, batch, head, block, one_loop)
    return _walk_of_band(band, first, rows, columns, tile, None if limit is None else first >= limit, ragged, one_loop)


def walk_of_all(tiles: int) -> Walk:
    """Every tile, masked."""
    return Walk(0, tiles, lambda step: step, lambda first, rows: [(0, tiles, MASKED)])


def _walk_of_table(refs, batch, head, block, one_loop: bool) -> Walk:
    """Whole tiles come first."""
    b, n, *_ = refs.count.shape
    place = batch if b > 1 else 0, head if n > 1 else 0, block
    whole = refs.count[*place, 0]
    end = whole + refs.count[*place, 1]
    sections = [(0, end, MASKED)] if one_loop else [(0, whole, WHOLE), (whole, end, MASKED)]
    return Walk(0, end, lambda step: refs.order[*place, step], lambda first, rows: sections)


def _walk_of_band(band: Band, first, rows: int, columns, tile: int, empty, ragged: bool, one_loop: bool) -> Walk:
    start, end = _tiles_touched(band, first, rows, columns, tile)
    if empty is not None:
        end = lax.select(empty, jnp.int32(start), jnp.int32(end))
    open_left, open_right = band.left is None, band.right is None

    def sections(mine, my_rows):
        touched = _tiles_touched(band, mine, my_rows, columns, tile)
        skip_left, skip_right = (my_rows < rows and not side for side in (open_left, open_right))
        my_start = _clip(touched[0], start, end) if skip_left else start
        my_end = _clip(touched[1], my_start, end) if skip_right else end
        whole = band.whole(mine, my_rows, columns)
        whole_start = my_start if open_left else _clip(_div(whole[0] + tile - 1, tile), my_start, my_end)
        whole_end = my_end if open_right and not ragged else _clip(_div(whole[1], tile), whole_start, my_end)
        found = [(start, my_start, SKIPPED)] if skip_left else []
        if one_loop and (ragged or not band.open):
            found += [(my_start, my_end, MASKED)]
        else:
            found += [] if open_left else [(my_start, whole_start, MASKED)]
            found += [(whole_start, whole_end, WHOLE)]
            found += [(whole_end, my_end, MASKED)] if ragged or not open_right else []
        return found + ([(my_end, end, SKIPPED)] if skip_right else [])

    return Walk(start, end, lambda step: step, sections)


def _div(a, b):
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def _clip(x, low, high):
    return max(low, min(x, high)) if all(isinstance(v, int) for v in (x, low, high)) else lax.max(low, lax.min(x, high))


def _tiles_touched(band, first, rows, columns, tile):
    """[start, end): the tiles of columns that any of rows first … first + rows - 1 sees."""
    start, end = band.touched(first, rows, columns)
    start, end = _div(start, tile), _div(end + tile - 1, tile)
    return start, (end if isinstance(start, int) and start == 0 else lax.max(start, end))


def go_through(sections, step, skip, carry):
    """The carry after `step(n, carry, masked=…)` or `skip(n, None)` for every step n of the sections."""
    for begin, end, kind in sections:
        if kind == SKIPPED:
            lax.fori_loop(begin, end, skip, None)
        else:
            carry = lax.fori_loop(begin, end, functools.partial(step, masked=kind == MASKED), carry)
    return carry


# ---- a tile of scores ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows first … first + count - 1 of a problem, and what is kept of them in registers, one number each."""

    problem: Problem
    refs: Refs
    layout: Any
    batch: Any
    first: Any
    count: int
    by_keys: bool
    segments: Any
    words: Any  # of dropout, both; None where rows are keys

    @staticmethod
    def of(problem, refs, layout, batch, head, first, count, *, by_keys=False) -> "Rows":
        rows, load = pl.ds(first, count), lambda ref: plgpu.load(ref, layout=layout.reduce(1), optimized=False)
        side = "key" if by_keys else "query"
        segments = load(getattr(refs, f"{side}_segments").at[batch, rows]) if f"{side}_segments" in refs else None
        words = None
        if problem.dropout_rate and not by_keys:
            words = [load(refs.words.at[batch, head, i, rows]) for i in range(2)]
        return Rows(problem, refs, layout, batch, first, count, by_keys, segments, words)

    def tile(self, head, first, columns: int, *, masked: bool, last=None) -> "Tile":
        """The scores of these rows with columns first … first + columns - 1, of which those up to `last` count."""
        return Tile(self, head, first, columns, masked, last, {})


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile, and what it takes beside the product: `dataclasses.replace(tile, loaded=tile.load())`."""

    rows: Rows
    head: Any
    first: Any
    columns: int
    masked: bool
    last: Any
    loaded: dict[str, Any]

    @property
    def shape(self):
        return self.rows.count, self.columns

    def load(self) -> dict[str, Any]:
        """Bias, mask, segments and words of dropout of the columns: apart, so that a product runs meanwhile."""
        rows, refs, columns = self.rows, self.rows.refs, pl.ds(self.first, self.columns)
        found: dict[str, Any] = {}
        load = lambda ref: plgpu.load(ref, layout=rows.layout.reduce(0), optimized=False)
        side = "query" if rows.by_keys else "key"
        if self.masked and rows.segments is not None:
            found["segments"] = load(getattr(refs, f"{side}_segments").at[rows.batch, columns])
        if rows.problem.dropout_rate and rows.by_keys:
            found["words"] = [load(refs.words.at[rows.batch, self.head, i, columns]) for i in range(2)]
        if "bias" in refs:
            found["bias"] = self._term(refs.bias)
        if self.masked and "mask" in refs:
            found["mask"] = self._term(refs.mask)
        return found

    def _term(self, ref):
        """The tile of an added term, of which any axis may be 1."""
        (b, n, r, c), rows = ref.shape, self.rows
        row_slice, column_slice = pl.ds(rows.first, rows.count), pl.ds(self.first, self.columns)
        ref = ref.at[rows.batch if b > 1 else 0, self.head if n > 1 else 0]
        if r == c == 1:
            return ref[0, 0]
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
        if r == 1:
            return across(load(ref.at[0, column_slice], rows.layout.reduce(0)), self.shape)
        if c == 1:
            return down(load(ref.at[row_slice, 0], rows.layout.reduce(1)), self.shape)
        return load(ref.at[row_slice, column_slice], rows.layout)

    def positions(self):
        """(batch, head, query, key), the last two of the shape of the tile."""
        index = lambda axis, first: plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.rows.layout) + first
        row, column = index(0, self.rows.first), index(1, self.first)
        return self.rows.batch, self.head, *((column, row) if self.rows.by_keys else (row, column))

    def exponents(self, s, *, slopes: bool = False):
        """(x, factor, slope of score_mod, slope of the cap): the exponents are x · factor for the products s; slopes
        are None where they are 1 and, without `slopes`, where nobody asks for them."""
        problem, refs = self.rows.problem, self.rows.refs
        factor, of_mod, of_cap = problem.scale * LOG2E, None, None
        if problem.cap is not None:
            # tanh x = 1 - 2 / (1 + exp 2x): the hardware's tanh is wrong by 2⁻¹¹, which the cap would multiply. The
            # reciprocal is a squared rsqrt, because a division costs a subroutine.
            root = lax.rsqrt(1 + jnp.exp2(s * (2 * factor / problem.cap)))
            tanh = 1 - 2 * (root * root)
            s, factor = tanh * (problem.cap * LOG2E), 1.0
            of_cap = 1 - tanh * tanh if slopes else None
        added = [self.loaded["bias"]] if "bias" in self.loaded else []
        if "alibi" in refs:
            _, _, query, key = self.positions()
            added.append(-refs.alibi[self.head] * jnp.abs(query - key).astype(jnp.float32))
        if added:
            s, factor = s * factor + functools.reduce(operator.add, added) * LOG2E, 1.0
        if problem.score_mod is not None:
            s = s * (factor * LN2)
            if slopes:
                s, of_mod = _score_and_slope(problem.score_mod)(s, *self.positions())
            else:
                s = lowered(problem.score_mod)(s, *self.positions())
            factor = LOG2E
        return s, factor, of_mod, of_cap

    def seen(self):
        """Which elements are seen: by band or prefix, end, segments, mask and mask_mod. About three instructions per
        element and condition."""
        rows, problem, refs, shape = self.rows, self.rows.problem, self.rows.refs, self.shape
        band = problem.band.transposed() if rows.by_keys else problem.band
        columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=rows.layout)
        row = lambda side: (
            plgpu.broadcasted_iota(jnp.int32, (rows.count,), 0, layout=rows.layout.reduce(1))
            + (rows.first + side - self.first)
        )
        last, prefixed = self.last, "prefix" in refs and not band.open
        within, conditions = [], []
        if band.right is not None:
            limit = row(band.right)
            if last is not None and not prefixed:  # one comparison for both
                limit, last = jnp.minimum(limit, last - self.first), None
            within.append(columns <= down(limit, shape))
        if band.left is not None:
            within.append(columns >= down(row(-band.left), shape))
        if prefixed:
            *_, key = self.positions()
            conditions.append(functools.reduce(operator.and_, within) | (key < refs.prefix[rows.batch]))
        else:
            conditions += within
        if last is not None:
            conditions.append(columns <= last - self.first)
        if "segments" in self.loaded:
            conditions.append(down(rows.segments, shape) == across(self.loaded["segments"], shape))
        if "mask" in self.loaded:
            conditions.append(jnp.broadcast_to(self.loaded["mask"] > 0, shape))
        if problem.mask_mod is not None:
            conditions.append(lowered(problem.mask_mod)(*self.positions()))
        return functools.reduce(operator.and_, conditions) if conditions else None

    def kept(self):
        """Which elements dropout keeps."""
        spread, (first, second) = (across, self.loaded["words"]) if self.rows.by_keys else (down, self.rows.words)
        *_, key = self.positions()
        return random.kept(spread(first, self.shape), spread(second, self.shape), key, self.rows.problem.dropout_rate)


def _score_and_slope(score_mod):
    return lowered(functools.partial(modifiers.score_and_slope, score_mod))


def down(x, shape):
    """One number per row."""
    return lax.broadcast_in_dim(x, shape, [0])


def across(x, shape):
    """One number per column."""
    return lax.broadcast_in_dim(x, shape, [1])
