"""Flash attention on TPU (Mosaic): softmax(scale·q·kᵀ + bias, masked)·v, forward and one fused backward kernel.

Sources: Dao, FlashAttention-2 (arXiv 2307.08691); Milakov & Gimelshein, online softmax (arXiv 1805.02867).

Layout. The kernels see every operand with its sequence minor: q, k, v, out as [batch, heads, head_dim, sequence].
Scores are [keys, queries]: statistics of a query are one lane, sums run over sublanes, the log-sum-exp is compact for
free, and in the product with the values head_dim is the streamed dimension, so that head sizes of 64 or 80 leave no
lane empty.

Work. A grid step owns `Tiles.queries` queries of one head. The keys and values of the head stay in VMEM, or
`Tiles.span` of them if there are more: spans are independent grid steps whose partial results are merged by their
log-sum-exp. Within a span the step visits
  the corner   under a causal mask: the square on the diagonal comes first, cut into strips that end on the diagonal,
               above which nothing is computed. Of a strip only the last corner is masked, unless the schedule says that
               more than causality cuts the square. The strips initialise the statistics;
  the rim      where a causal window begins: the same mirrored, strips that begin there;
  whole blocks of `Tiles.keys` keys, which all queries of the step see: no mask at all;
  cut blocks   masked element by element.
Which blocks are whole or cut is arithmetic for a band; for every other mask it is read from a schedule in SMEM
(`masks.Blocks`). Blocks that nobody sees are never visited. In program order the scores of one item precede the softmax
of the item before, so that the matrix unit and the vector units overlap. The softmax is in base 2.

Without a maximum. Where |q|·|k| keeps all base-2 logits of a step within ±`BOUND`, 2^logit itself is neither too large
nor too small for float32, and no maximum is taken or subtracted. The kernel checks each step's queries against the
longest key, and takes the running maximum where the bound does not hold.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, modifiers, random
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.tpu import attention_tiles, elementwise
from pallas_kernels.tpu.attention_operands import Operands, sequence_third
from pallas_kernels.tpu.attention_tiles import HEADER, Problem, computed_in
from pallas_kernels.tpu.attention_tiles import Tiles as Tiles

f32 = jnp.float32
NN = (((1,), (0,)), ((), ()))  # a @ b
NT = (((1,), (1,)), ((), ()))  # a @ b.T
LOG2E = math.log2(math.e)
FLOOR = (
    -3e38
)  # the running max starts here, not at -inf: a row that sees nothing gets exp2(-inf - FLOOR) = 0, never NaN
MASKED = -math.inf
MAX_HEAD = 256
LANES = 128
# Without a maximum a row's sum is between 2^-BOUND and 2^BOUND times the number of keys, and its products with values
# within VALUES stay far from float32's ends, 2^-126 and 2^128.
BOUND = 48
VALUES = (2.0**-40, 2.0**40)


def tiles(phase: str, **call) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; `call` as for `unsupported`."""
    return attention_tiles.chosen(Problem.of(**call), backward=phase == "backward")


def candidates(phase: str, **call) -> Iterator[Tiles]:
    """Tiles worth trying that the problem and the chip's VMEM allow: the default first, then blocks of 128."""
    return attention_tiles.candidates(Problem.of(**call), backward=phase == "backward")


def memory(phase: str, tiles: Tiles, **call) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return tiles.vmem(Problem.of(**call), phase == "backward")


def tile(phase: str, tiles: Tiles, **call) -> tuple[int, int]:
    """(queries, keys) of the blocks that the schedule of `phase` counts."""
    del phase, call
    return tiles.queries, tiles.keys


# ---------------------------------------------------------------------------------------------- shared by both kernels
class Item(NamedTuple):
    """`queries` queries of the step from `query` on, and `keys` keys of the span from `key` on.

    masked: element by element, by every mask. Else only the keys [cut[0], cut[1]) of the item are, and by the band
    alone. first: nothing was accumulated for these queries before.
    """

    query: int
    queries: int
    key: Any
    keys: int
    masked: bool = False
    cut: tuple[int, int] = (0, 0)
    first: bool = False


@dataclasses.dataclass(frozen=True)
class View:
    """What one grid step sees of the problem: where it stands, and the logits of its tiles."""

    p: Problem
    t: Tiles
    refs: dict[str, Any]
    batch: Any
    head: Any
    block: Any  # index of the query block
    base: Any  # first key of the span; a Python 0 if there is only one
    precision: Any
    backward: bool

    @property
    def row(self):
        return pl.multiple_of(self.block * self.t.queries, self.t.queries)

    def length(self, which: int, full: int):
        """How many queries (0) or keys (1) count, or how long the prefix is (2)."""
        return self.refs["lengths"][0, which] if self.p.lengths else full

    def dot(self, a, b, dims):
        return lax.dot_general(a, b, dims, preferred_element_type=f32, precision=self.precision)

    def entry(self, place):
        """Of the schedule, of this step's row."""
        return self.refs["schedule"][self.block, place]

    def walk(self, run: Callable, clear: Callable, *, strips: bool = True) -> None:
        """Calls `run(items)` until every block is visited, after `clear()` if its first items are not `first`.

        strips: whether what the diagonal or a window cuts goes by strips; else it goes by cut blocks, which is less
        code.
        """
        t, p, corner = self.t, self.p, self.t.corner(self.p)
        starts = range(0, t.queries, t.strip)
        reach = round_up(p.band.left or 0, t.queries)

        def blocks(masked: bool, place: Callable):
            def step(turn, _):
                key = pl.multiple_of(place(turn) * t.keys, t.keys)
                width = t.part if self.backward else t.keys  # the backward's items are cut in keys, too
                cuts = [(u, min(width, t.keys - u)) for u in range(0, t.keys, width)]
                run([Item(a, t.sub, key + u, w, masked) for u, w in cuts for a in range(0, t.queries, t.sub)])
                return 0

            return step

        def diagonal():
            """Strips that end on the diagonal."""
            run([Item(a, t.strip, self.row, a + t.strip, cut=(a, a + t.strip), first=True) for a in starts[::-1]])

        def rim():
            """Strips that begin where the window does, of the square `reach` before the diagonal."""
            key = pl.multiple_of(self.row - reach, t.queries)
            run([Item(a, t.strip, key + a, t.queries - a, cut=(0, t.strip)) for a in starts])

        # The blocks of the square on the diagonal, unless they go by strips
        squares, own = t.queries // t.keys, self.block * (t.queries // t.keys)
        if not corner:
            squares = 0
            clear()
        elif p.scheduled:  # one that is cut by more than the diagonal is in the schedule
            clean = self.entry(2)
            squares = 0 if strips else clean * squares
            if strips:
                pl.when(clean == 1)(diagonal)
                pl.when(clean == 0)(clear)
            else:
                clear()
        elif strips:
            squares = 0
            diagonal()
        else:
            clear()

        if p.scheduled:
            left, right = 0, self.entry(0)
            edges, read = self.entry(1), self.entry
            whole, cut = (lambda n: read(HEADER + n)), (lambda n: read(HEADER + right + n))
        else:
            first, last, left, right = self.ranges()
            if corner:
                left, last, right = _least(left, own), own, own
            edges = (left - first) + (0 if corner else last - right)
            if corner and strips and p.band.left is not None and reach - p.band.left <= 1:
                pl.when(self.row >= reach)(rim)
                edges = 0
            whole, cut = (lambda n: n), (lambda n: jnp.where(n < left - first, first + n, right + n - (left - first)))
        if not (isinstance(squares, int) and squares == 0):
            edges, cut_block = edges + squares, cut
            cut = lambda n: jnp.where(n < squares, own + n, cut_block(n - squares))
        if not (isinstance(edges, int) and edges == 0):
            lax.fori_loop(0, edges, blocks(True, cut), 0)
        if not (isinstance(right, int) and isinstance(left, int) and left == right):
            lax.fori_loop(left, right, blocks(False, whole), 0)

    def ranges(self):
        """Blocks of the span: [first, last) are seen by any query of the step, [left, right) by all."""
        t, keys = self.t, self.p.key_length
        start, end = self.p.band.touched(self.row, t.queries, keys)
        inner, outer = self.p.band.whole(self.row, t.queries, keys)
        start, end, inner, outer = (_clip(x - self.base, 0, t.span) for x in (start, end, inner, outer))
        first = _div(start, t.keys)
        last = _clip(_div(end + t.keys - 1, t.keys), first, None)
        left = _clip(_div(inner + t.keys - 1, t.keys), first, last)
        return first, last, left, _clip(_div(outer, t.keys), left, last)

    def positions(self, item: Item, offset: int, shape):
        """(query, key) of every element of a tile."""
        row = lax.broadcasted_iota(jnp.int32, shape, 1) + (self.row + item.query)
        return row, lax.broadcasted_iota(jnp.int32, shape, 0) + (self.base + item.key + offset)

    def logits(self, s, item: Item, offset: int):
        """(base-2 logits, tanh of the cap, slope of score_mod) of the products `s` [keys, queries], whose first key is
        `offset` past the item's."""
        p, shape = self.p, s.shape
        rows, columns = pl.ds(item.query, item.queries), pl.ds(item.key + offset, shape[0])
        tanh = slope = None
        unit = LOG2E if p.score_mod is None else 1.0
        # Scaled here, in float32: queries scaled beforehand would be rounded to their own type once more.
        if p.cap is None:
            s = s * (p.scale * unit)
        else:
            tanh = jnp.tanh(s * (p.scale / p.cap))
            s = tanh * (p.cap * unit)
        if p.bias:
            bias = _piece(self.refs["bias"], p.bias, columns, rows).astype(f32)
            s = s + (bias if unit == 1 else bias * unit)
        if p.alibi:
            row, column = self.positions(item, offset, shape)
            s = s - jnp.abs(row - column).astype(f32) * (self.refs["alibi"][0, 0] * unit)
        if p.score_mod is not None:
            row, column = self.positions(item, offset, shape)
            whose = jnp.full(shape, self.batch, jnp.int32), jnp.full(shape, self.head, jnp.int32)
            if self.backward:
                s, slope = modifiers.score_and_slope(p.score_mod, s, *whose, row, column)
            else:
                s = p.score_mod(s, *whose, row, column)
            s = jnp.broadcast_to(s, shape) * LOG2E
        if item.masked:
            return jnp.where(self.seen(item, offset, shape), s, MASKED), tanh, slope
        start, end = (min(max(end - offset, 0), shape[0]) for end in item.cut)
        if start < end:
            inside = self.in_band(item, offset + start, (end - start, shape[1]))
            pieces = [s[:start], jnp.where(inside, s[start:end], MASKED), s[end:]]
            s = jnp.concatenate([piece for piece in pieces if piece.shape[0]], 0)
        return s, tanh, slope

    def in_band(self, item: Item, offset: int, shape):
        """Which elements of a tile the band holds, or True."""
        band = self.p.band
        # The difference of two positions, and a number that is the same for the whole tile
        ahead = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
        shift = (self.base + item.key + offset) - (self.row + item.query)
        inside = True
        if band.right is not None:
            inside = ahead >= shift - band.right
        if band.left is not None:
            near = ahead <= shift + band.left
            inside = near if inside is True else inside & near
        return inside

    def seen(self, item: Item, offset: int, shape):
        """Which elements of a tile count."""
        p, refs = self.p, self.refs
        rows, columns = pl.ds(item.query, item.queries), pl.ds(item.key + offset, shape[0])
        row, column = self.positions(item, offset, shape)
        seen = column < self.length(1, p.key_length)
        band = self.in_band(item, offset, shape)
        if band is not True:
            seen &= (band | (column < self.length(2, 0))) if p.prefix else band
        if p.segments:
            seen &= _column(refs["key_value_segment_ids"], columns) == refs["query_segment_ids"][:, rows]
        if p.mask:
            seen &= _piece(refs["mask"], p.mask, columns, rows).astype(jnp.int32) != 0
        if p.mask_mod is not None:
            whose = jnp.full(shape, self.batch, jnp.int32), jnp.full(shape, self.head, jnp.int32)
            seen &= jnp.broadcast_to(p.mask_mod(*whose, row, column), shape)
        return seen

    def kept(self, item: Item, offset: int, shape):
        """Which weights of a tile survive dropout."""
        words, rows = self.refs["dropout_rows"], pl.ds(item.query, item.queries)
        _, column = self.positions(item, offset, shape)
        return random.kept(words[0:1, rows], words[1:2, rows], column, self.p.dropout_rate)


def _piece(ref, kind: str, columns, rows):
    """Of what varies over "tile", "keys" or "queries", what broadcasts to a tile [keys, queries]."""
    return ref[columns, rows] if kind == "tile" else ref[:, rows] if kind == "queries" else _column(ref, columns)


def _column(ref, at):
    """A piece of a row [1, n] as a column [n, 1]."""
    row = ref[:, at]
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _div(a, b: int):
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def _clip(x, low, high):
    if all(v is None or isinstance(v, int) for v in (x, low, high)):
        return max(x, low) if high is None else min(max(x, low), high)
    x = jnp.maximum(x, low)
    return x if high is None else jnp.minimum(x, high)


def _least(a, b):
    return a if isinstance(a, int) and a == 0 else jnp.minimum(a, b)


def _fold(x, op):
    """[8n, m] → [8, m] without crossing sublanes."""
    return op(x.reshape(x.shape[0] // 8, 8, x.shape[1]), axis=0)


# ---------------------------------------------------------------------------------------------- forward
def _forward_kernel(refs, out, scratch, *, p: Problem, t: Tiles, spans: int, precision):
    """scratch: peak, total the running max and (eight partial) sums; acc: outᵀ in float32; keys: K, head_dim minor;
    most: the greatest |k|² and |v| of the span; running: for each step, whether it needs the running max."""
    batch, head, span, block = (pl.program_id(axis) for axis in range(4))
    view = View(p, t, refs, batch, head, block, span * t.span if spans > 1 else 0, precision, False)
    queries, keys, values = refs["query"], scratch["keys"], refs["value"]
    peak, total, acc = scratch["peak"], scratch["total"], scratch["acc"]

    @pl.when(block == 0)
    def _per_head():
        keys[...] = refs["key"][...].T
        if t.bounded:
            key, value = refs["key"][...].astype(f32), values[...].astype(f32)
            scratch["most"][0] = jnp.max((key * key).sum(0, keepdims=True))
            scratch["most"][1] = jnp.max(jnp.abs(value))

    def clear():
        total[...] = jnp.zeros(total.shape, f32)
        acc[...] = jnp.zeros(acc.shape, f32)

    def scores(item, cut, bounded):
        offset, width = cut
        s = view.dot(keys[pl.ds(item.key + offset, width), :], queries[:, pl.ds(item.query, item.queries)], NN)
        s, *_ = view.logits(s, item, offset)
        return s, None if bounded else _fold(s, jnp.max)

    def cuts(item):
        return [(u, min(t.part, item.keys - u)) for u in range(0, item.keys, t.part)]

    def run(items: Sequence[Item], bounded: bool):
        before: Any = None  # the scores of the item before, by part, and their eight partial maxima
        for n in range(len(items) + 1):
            new = cuts(items[n]) if n < len(items) else []
            now, top, sums, update = [], None, None, None
            old: list[tuple[int, int]] = []
            if before is not None:
                item = items[n - 1]
                old, columns = cuts(item), (slice(None), pl.ds(item.query, item.queries))
                if not bounded:
                    high = jnp.maximum(before[1].max(0, keepdims=True), FLOOR if item.first else peak[columns])
                    if not item.first:
                        shrink = jnp.exp2(peak[columns] - high)
                    peak[columns] = high
            for part in range(max(len(new), len(old))):
                if part < len(new):
                    s, partial = scores(items[n], new[part], bounded)
                    now.append(s)
                    top = partial if top is None or bounded else jnp.maximum(top, partial)
                if part < len(old):
                    offset, width = old[part]
                    weight = jnp.exp2(before[0][part] if bounded else before[0][part] - high)
                    sum_of = _fold(weight, jnp.sum)
                    if p.dropout_rate:
                        weight = jnp.where(view.kept(item, offset, weight.shape), weight, 0.0)
                    add = view.dot(values[:, pl.ds(item.key + offset, width)], weight.astype(values.dtype), NN)
                    sums, update = (sum_of, add) if sums is None else (sums + sum_of, update + add)
            if old:
                if item.first:
                    total[columns], acc[columns] = sums, update
                elif bounded:
                    total[columns] += sums
                    acc[columns] += update
                else:
                    total[columns] = shrink * total[columns] + sums
                    acc[columns] = shrink * acc[columns] + update
            before = now, top

    def with_running_max(strips: bool):
        peak[...] = jnp.full(peak.shape, FLOOR, f32)
        view.walk(functools.partial(run, bounded=False), clear, strips=strips)

    if t.bounded:
        query = queries[...].astype(f32)
        square = jnp.max((query * query).sum(0, keepdims=True)) * scratch["most"][0]
        small = (square <= (BOUND / (p.scale * LOG2E)) ** 2) & (scratch["most"][1] <= VALUES[1])
        small &= scratch["most"][1] >= VALUES[0]
        # In a place for each step: a model of the scalar unit takes it for 0 there, and follows the usual branch alone.
        scratch["running"][block] = 1 - small.astype(jnp.int32)
        running = scratch["running"][block]

        @pl.when(running == 0)
        def _():
            peak[...] = jnp.zeros(peak.shape, f32)
            view.walk(functools.partial(run, bounded=True), clear)

        pl.when(running != 0)(functools.partial(with_running_max, False))
    else:
        with_running_max(True)

    sums, high, result = total[...].sum(0, keepdims=True), peak[...], acc[...]
    if "sinks" in refs:  # one more logit without a value; it counts in the first span only
        sink = jnp.where(span == 0, refs["sinks"][0, 0] * LOG2E, MASKED)
        with_sink = jnp.maximum(high, sink)
        shrink = jnp.exp2(high - with_sink)
        sums, high, result = sums * shrink + jnp.exp2(sink - with_sink), with_sink, result * shrink
    some = sums > 0
    if p.lengths:
        some &= lax.broadcasted_iota(jnp.int32, sums.shape, 1) + view.row < view.length(0, p.query_length)
    divisor = jnp.where(some, sums, 1.0)
    factor = jnp.where(some, 1 / (1 - p.dropout_rate) / divisor, 0.0)
    out["out"][...] = (result * factor).astype(out["out"].dtype)
    out["lse"][...] = jnp.where(some, (high + jnp.log2(divisor)) / LOG2E, jnp.inf)


# ---------------------------------------------------------------------------------------------- backward
def _backward_kernel(refs, out, scratch, *, p: Problem, t: Tiles, spans: int, precision):
    """Five products an item. dQᵀ of the block and dKᵀ, dVᵀ of the span are summed in float32 in VMEM, over the query
    heads of a group too: no partial result reaches HBM (but for dQ, when the keys are cut into spans)."""
    batch, key_head, span, member, block = (pl.program_id(axis) for axis in range(5))
    base = span * t.span if spans > 1 else 0
    view = View(p, t, refs, batch, key_head * p.group + member, block, base, precision, True)
    keys, values, delta, stat = (scratch[n] for n in ("keys", "values", "delta", "stat"))
    dq, dk, dv, queries, dout = scratch["dq"], scratch["dk"], scratch["dv"], refs["query"], refs["dout"]
    grown = 1 / (1 - p.dropout_rate)

    @pl.when((member == 0) & (block == 0))
    def _per_head():
        keys[...], values[...] = refs["key"][...].T, refs["value"][...].T
        dk[...], dv[...] = jnp.zeros(dk.shape, f32), jnp.zeros(dv.shape, f32)

    delta[...] = (refs["out"][...].astype(f32) * dout[...].astype(f32)).sum(0, keepdims=True)
    stat[...] = refs["lse"][...] * LOG2E
    dq[...] = jnp.zeros(dq.shape, f32)
    if p.bias == "tile":
        out["dbias"][...] = jnp.zeros(out["dbias"].shape, f32)
    elif p.bias == "keys":  # the same place for all steps of a head

        @pl.when(block == 0)
        def _per_query_head():
            out["dbias"][...] = jnp.zeros(out["dbias"].shape, f32)

    def products(item):
        columns, rows = pl.ds(item.query, item.queries), pl.ds(item.key, item.keys)
        return view.dot(keys[rows, :], queries[:, columns], NN), view.dot(values[rows, :], dout[:, columns], NN)

    def softmax(item, s, dp):
        columns, rows = pl.ds(item.query, item.queries), pl.ds(item.key, item.keys)
        s, tanh, slope = view.logits(s, item, 0)
        weight = used = jnp.exp2(s - stat[:, columns])
        if p.dropout_rate:
            kept = view.kept(item, 0, weight.shape)
            used, dp = jnp.where(kept, weight, 0.0), jnp.where(kept, dp * grown, 0.0)
        ds = weight * (dp - delta[:, columns])
        if slope is not None:  # what is not seen has weight 0, but its slope may be anything
            ds = jnp.where(weight > 0, ds * slope, 0.0)
        if p.bias == "tile":
            out["dbias"][rows, columns] = ds
        elif p.bias == "keys":
            out["dbias"][rows, :] += ds.reshape(item.keys, -1, LANES).sum(1)
        if tanh is not None:
            ds = ds * (1 - tanh * tanh)
        return used.astype(dout.dtype), ds.astype(dout.dtype)

    def gradients(item, weight, ds):
        columns, rows = pl.ds(item.query, item.queries), pl.ds(item.key, item.keys)
        dv[:, rows] += view.dot(dout[:, columns], weight, NT)
        dk[:, rows] += view.dot(queries[:, columns], ds, NT)
        dq[:, columns] += view.dot(refs["key"][:, rows], ds, NN)

    def run(items):
        raw, soft = {}, {}
        for n in range(len(items) + 1 + t.lag):
            if n < len(items):
                raw[n] = products(items[n])
            if n - 1 in raw:
                soft[n - 1] = softmax(items[n - 1], *raw.pop(n - 1))
            if n - 1 - t.lag in soft:
                gradients(items[n - 1 - t.lag], *soft.pop(n - 1 - t.lag))

    view.walk(run, lambda: None)
    out["dq"][...] = (dq[...] * p.scale).astype(out["dq"].dtype)

    @pl.when((member == pl.num_programs(3) - 1) & (block == pl.num_programs(4) - 1))
    def _store():
        out["dk"][...] = (dk[...] * p.scale).astype(out["dk"].dtype)
        out["dv"][...] = (dv[...] * grown if p.dropout_rate else dv[...]).astype(out["dv"].dtype)


# ---------------------------------------------------------------------------------------------- modifiers
def _unlowered(score_mod: Callable | None, mask_mod: Callable | None, bias) -> str | None:
    """Why the modifiers cannot stand in a kernel, or None."""
    if reason := modifiers.no_kernel(score_mod, mask_mod, bias):
        return reason
    programs = []
    if score_mod is not None:
        slope = functools.partial(modifiers.score_and_slope, score_mod)
        programs += [("score_mod", modifiers.traced(score_mod, scored=True))]
        programs += [("the derivative of score_mod", modifiers.traced(slope, scored=True))]
    if mask_mod is not None:
        programs += [("mask_mod", modifiers.traced(mask_mod, scored=False))]
    for name, program in programs:
        for equation in modifiers.equations(program):
            if reason := elementwise.refusal(equation):
                return f"{name} {reason}"
    return None


# ---------------------------------------------------------------------------------------------- the module's functions
def unsupported(
    *,
    query,
    key,
    value,
    bias=None,
    mask=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    sinks=None,
    prefix_lengths=None,
    alibi_slopes=None,
    dropout_rows=None,
    scale: float = 1.0,
    is_causal: bool = False,
    local_window_size: tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    dropout_rate: float = 0.0,
) -> str | None:
    """Why the kernels cannot serve this call on the chip being compiled for, or None. Operands may be abstract."""
    problem = Problem.of(**locals())
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"query must be float32, bfloat16 or float16, got {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD:
        size = max(query.shape[3], value.shape[3])
        return f"the TPU attention kernel takes head sizes up to {MAX_HEAD}, got {size}"
    if not scale > 0:
        return f"scale must be positive, got {scale}"
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        return "segment ids of queries and of keys must come together"
    if (dropout_rows is None) != (dropout_rate == 0):
        return "dropout_rate and dropout_rows must come together"
    if reason := _unlowered(score_mod, mask_mod, bias):
        return reason
    if Tiles.default(problem, backward=False) is None or Tiles.default(problem, backward=True) is None:
        chip = chips.current("tpu")
        return f"no tiles of this attention fit the {chip.vmem_bytes >> 20} MiB of VMEM of {chip.name}"
    return None


def forward(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    dropout_rows: jax.Array | None = None,
    scale: float,
    is_causal: bool = False,
    local_window_size: tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    dropout_rate: float = 0.0,
    tiles: Tiles | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
    """out = dropout(softmax(mask(score_mod(cap·tanh(scale·q·kᵀ/cap) + bias - slope·|i - j|))))·v,  lse = log Σ_j
    exp(logit_j) (+ exp(sink)).

    query [B,T,N,H], key [B,S,K,H] and value [B,S,K,V] of one dtype, float32, bfloat16 or float16 (computed in float32),
    N a multiple of K; bias and mask 4-D, broadcastable to [B,N,T,S]; lengths and prefix_lengths [B], segment ids [B,T]
    and [B,S], sinks and alibi_slopes [N], dropout_rows uint32 [B,N,2,T] (`random.row_words`). A key before the prefix
    length is seen whatever causality or window say. Returns ((out [B,T,N,V] in query's dtype, lse [B,N,T] float32),
    ()). A row that sees nothing, or that lies past its query length, has out = 0 and lse = +inf, or its sink, if any.
    """
    call = {name: x for name, x in locals().items() if name != "tiles"}
    if query.dtype != computed_in(query.dtype):
        (out, lse), residuals = forward(**_widened(call, "query", "key", "value"), tiles=tiles)
        return (out.astype(query.dtype), lse), residuals
    p = Problem.of(**call)
    t = tiles or attention_tiles.chosen(p, backward=False)
    batch, _, heads, _ = query.shape
    operands = Operands(p, t, lambda b, n, s, i: (b, n, n // p.group, s, i))
    operands.add_queries(p.head_dim, query=query)
    operands.add_keys(p.head_dim, key=key)
    operands.add_keys(p.value_dim, value=value)
    operands.add_options(call)
    if sinks is not None:
        operands.add_of_head("sinks", sinks)
    size, spans = operands.size_q, operands.size_k // t.span
    shape = jax.ShapeDtypeStruct
    scratch = {
        "peak": pltpu.VMEM((1, t.queries), f32),
        "total": pltpu.VMEM((8, t.queries), f32),
        "acc": pltpu.VMEM((p.value_dim, t.queries), f32),
        "keys": pltpu.VMEM((t.span, p.head_dim), query.dtype),
    }
    if t.bounded:
        scratch |= {"most": pltpu.SMEM((2,), f32), "running": pltpu.SMEM((size // t.queries,), jnp.int32)}
    result = operands.launch(
        _forward_kernel,
        "attention_forward",
        (batch, heads, spans, size // t.queries),
        {
            "out": shape((spans, batch, heads, p.value_dim, size), query.dtype if spans == 1 else f32),
            "lse": shape((spans, batch, heads, 1, size), f32),
        },
        {"out": operands.of_queries_by_span(p.value_dim), "lse": operands.of_queries_by_span(1)},
        scratch,
    )
    out, lse = (result["out"][0], result["lse"][0]) if spans == 1 else _merge(result["out"], result["lse"])
    out = sequence_third(out.astype(query.dtype), p.query_length, value.shape[3])
    lse = lse[:, :, 0, : p.query_length]
    if sinks is not None and query_seq_lengths is not None:
        lse = jnp.where(_inside(query_seq_lengths, p), lse, sinks.astype(f32)[:, None])
    return (out, lse), ()


def _widened(call: dict[str, Any], *names: str) -> dict[str, Any]:
    """The call with the operands `names` in the dtype that they are computed in."""
    return call | {name: call[name].astype(computed_in(call[name].dtype)) for name in names}


def _inside(lengths, p: Problem):
    """[B, 1, T]: whether a query lies before the end of its sequence."""
    return (jnp.arange(p.query_length) < lengths[:, None])[:, None]


def _merge(out, lse):
    """Partial attentions over disjoint keys → the whole: out = Σ_s exp(lse_s - lse)·out_s; an empty span weighs
    nothing."""
    empty = jnp.isposinf(lse)
    top = jnp.max(jnp.where(empty, FLOOR, lse), 0)
    weight = jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, lse - top)))
    total = weight.sum(0)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    return (out * weight).sum(0) / safe, jnp.where(some, top + jnp.log(safe), jnp.inf)


def backward(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    dropout_rows: jax.Array | None = None,
    outputs: tuple[jax.Array, jax.Array],
    residuals: tuple[()],
    cotangents: tuple[jax.Array, Any],
    scale: float,
    is_causal: bool = False,
    local_window_size: tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    dropout_rate: float = 0.0,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """P = exp(logits - lse), Z = kept/(1 - dropout_rate), dV = (P∘Z)ᵀ·dO, dS = P∘(Z∘(dO·Vᵀ) - rowsum(O∘dO)), dQ =
    scale·dS·K, dK = scale·dSᵀ·Q, dbias = dS, dS times the slopes of score_mod and, past dbias, the cap.

    Arguments as in `forward`, with its outputs and the cotangent of `out`; that of `lse` is ignored. Returns the
    gradients of query, key and value, and of bias and sinks where given. dbias of a bias that varies over queries and
    keys is formed as [B,N,T,S] float32, then reduced to bias's shape; of one that varies over keys, as [B,N,S,128]. One
    that all keys share is seen by sinks alone: Σ_j dS = exp(sink - lse)·rowsum(O∘dO).
    """
    call = {name: x for name, x in locals().items() if name != "tiles"}
    out, lse = outputs
    if query.dtype != computed_in(query.dtype):
        wide = _widened(call, "query", "key", "value") | {"outputs": (out.astype(f32), lse)}
        grads = backward(**wide, tiles=tiles)
        return grads | {name: grads[name].astype(query.dtype) for name in ("query", "key", "value")}
    del residuals
    dout = cotangents[0].astype(query.dtype)
    p = Problem.of(**call)
    if query_seq_lengths is not None:
        lse = jnp.where(_inside(query_seq_lengths, p), lse, jnp.inf)
    t = tiles or attention_tiles.chosen(p, backward=True)
    batch, _, heads, dim = query.shape
    operands = Operands(p, t, lambda b, h, s, g, i: (b, h * p.group + g, h, s, i))
    operands.add_queries(p.head_dim, query=query)
    operands.add_queries(p.value_dim, out=out, dout=dout)
    operands.add_keys(p.head_dim, key=key)
    operands.add_keys(p.value_dim, value=value)
    operands.add_options(call)
    size, spans = operands.size_q, operands.size_k // t.span
    # +inf: a padded row weighs nothing
    operands.add("lse", pad_to(lse[:, :, None], 3, size, jnp.inf), operands.of_queries(1))
    shape = jax.ShapeDtypeStruct
    out_shape = {
        "dq": shape((spans, batch, heads, p.head_dim, size), query.dtype if spans == 1 else f32),
        "dk": shape(operands.arrays["key"].shape, key.dtype),
        "dv": shape(operands.arrays["value"].shape, key.dtype),
    }
    out_specs = {
        "dq": operands.of_queries_by_span(p.head_dim),
        "dk": operands.of_keys(p.head_dim),
        "dv": operands.of_keys(p.value_dim),
    }
    if p.bias == "tile":
        out_shape["dbias"] = shape((batch, heads, operands.size_k, size), f32)
        out_specs["dbias"] = operands.spec((None, None, t.span, t.queries), lambda b, n, h, s, i: (b, n, s, i))
    elif p.bias == "keys":
        out_shape["dbias"] = shape((batch, heads, operands.size_k, LANES), f32)
        out_specs["dbias"] = operands.spec((None, None, t.span, LANES), lambda b, n, h, s, i: (b, n, s, 0))
    result = operands.launch(
        _backward_kernel,
        "attention_backward",
        (batch, heads // p.group, spans, p.group, size // t.queries),
        out_shape,
        out_specs,
        {
            "keys": pltpu.VMEM((t.span, p.head_dim), query.dtype),
            "values": pltpu.VMEM((t.span, p.value_dim), query.dtype),
            "delta": pltpu.VMEM((1, t.queries), f32),
            "stat": pltpu.VMEM((1, t.queries), f32),
            "dq": pltpu.VMEM((p.head_dim, t.queries), f32),
            "dk": pltpu.VMEM((p.head_dim, t.span), f32),
            "dv": pltpu.VMEM((p.value_dim, t.span), f32),
        },
    )
    dq = result["dq"][0] if spans == 1 else result["dq"].sum(0).astype(query.dtype)
    grads = {"query": sequence_third(dq, p.query_length, dim)}
    for name, grad, given in (("key", result["dk"], key), ("value", result["dv"], value)):
        grads[name] = pad_to(sequence_third(grad, p.key_length, given.shape[3]), 1, given.shape[1])
    sunk = jnp.zeros(lse.shape, f32)  # what the sink takes of the gradient of a row
    if sinks is not None:
        delta = jnp.einsum("btnh,btnh->bnt", out.astype(f32), dout.astype(f32))
        sunk = jnp.exp(sinks.astype(f32)[:, None] - lse) * delta
        grads["sinks"] = -sunk.sum((0, 2)).astype(sinks.dtype)
    if bias is not None:
        full = sunk[..., None]
        if p.bias != "queries":
            columns = result["dbias"][:, :, : p.key_length]
            columns = columns.sum(3, keepdims=True) if p.bias == "keys" else columns[..., : p.query_length]
            full = pad_to(jnp.swapaxes(columns, 2, 3), 3, key.shape[1])
        summed = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
        grads["bias"] = full.sum(summed, keepdims=True).astype(bias.dtype)
    return grads
