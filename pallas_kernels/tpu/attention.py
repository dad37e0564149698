"""Flash attention on TPU (Mosaic): softmax(scale·q·kᵀ + bias, masked)·v, forward and one fused backward kernel.

Sources: Dao, FlashAttention-2 (arXiv 2307.08691); Milakov & Gimelshein, online softmax (arXiv 1805.02867).

Layout. The kernels see every operand with its sequence minor: q, k, v, out as [batch, heads, head_dim, sequence].
Scores are [keys, queries]: statistics of a query are one lane, sums run over sublanes, the log-sum-exp is compact for
free, and in the product with the values head_dim is the streamed dimension, so that head sizes of 64 or 80 leave no
lane empty.

Work. A grid step owns `Tiles.queries` queries of one head. The keys and values of the head stay in VMEM, or
`Tiles.span` of them if there are more: spans are independent grid steps whose partial results are merged by their
log-sum-exp. Within a span the step loops over blocks of `Tiles.keys` keys:
  corner  plain causal attention: the block on the diagonal comes first, cut into strips that end on the diagonal. Only
          the last corner of a strip is masked, nothing above the diagonal is computed, and the strips initialise the
          statistics;
  edge    blocks that a window, a length or the end of the keys cuts: masked element by element;
  whole   blocks that all queries of the step see: no band mask at all.
Blocks outside the band are never visited. In program order the scores of one item precede the softmax of the item
before, so that the matrix unit and the vector units overlap. The softmax is in base 2.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuned
from pallas_kernels.masks import Band
from pallas_kernels.padding import pad_to, round_up

f32 = jnp.float32
NN = (((1,), (0,)), ((), ()))  # a @ b
NT = (((1,), (1,)), ((), ()))  # a @ b.T
LOG2E = math.log2(math.e)
FLOOR = (
    -3e38
)  # the running max starts here, not at -inf: a row that sees nothing gets exp2(-inf - FLOOR) = 0, never NaN
MASKED = -math.inf
MAX_HEAD = 256
MOST_CANDIDATES = 48


# ---------------------------------------------------------------------------------------------- tiles
@dataclasses.dataclass(frozen=True)
class Tiles:
    """`queries` and `keys` of a block, `span` keys held in VMEM; items of `sub` queries, `strip` on the diagonal.

    `part` is the number of keys between two interleave points (forward) or of an item (backward); `lag` counts the
    items by which the gradient products trail the softmax (backward). Sizes are multiples of 128; `sub` and `strip`
    divide `queries`, `keys` divides `span` (and `queries`, on the causal diagonal).
    """

    queries: int
    keys: int
    span: int
    sub: int
    strip: int
    part: int = 512
    lag: int = 0

    @staticmethod
    def default(problem: "Problem", *, backward: bool) -> "Tiles | None":
        """The largest blocks that are worth it and fit the chip's VMEM; None if not even the smallest do.

        1024 queries amortise the prologue of a step, 2048 on a 256-wide matrix unit (forward). Masked edges
        and windows want finer blocks, a bias tile [span, queries] fewer queries. Keys are cut into spans only when
        VMEM demands it.
        """
        wide = chips.current("tpu").mxu == 256
        largest = 2048 if wide and not backward else 1024
        if problem.itemsize == 4 or problem.tiled or not problem.diagonal:
            largest = 512
        while True:
            queries = _block(problem.query_length, largest)
            keys = _divisor(queries) if problem.diagonal else _block(problem.key_length, min(1024, largest))
            sub = 256 if queries % 256 == 0 else 128
            strip = sub if wide or not backward else 128
            tiles = Tiles(queries, keys, 0, sub, strip, lag=int(wide and backward)).spanning(problem, backward)
            # A short span reloads the queries too often: give up queries first.
            fits = problem.vmem(tiles, backward) <= _room()
            if fits and (tiles.span >= min(4096, problem.key_length) or largest <= 256):
                return tiles
            if largest <= 128:
                return tiles if fits else None
            largest //= 2

    def spanning(self, problem: "Problem", backward: bool) -> "Tiles":
        """These tiles with the span that reaches all keys, halved as long as it does not fit VMEM."""
        reach = round_up(problem.query_length, self.queries) if problem.diagonal else problem.key_length
        blocks = -(-reach // self.keys)
        tiles = dataclasses.replace(self, span=self.keys * blocks)
        while problem.vmem(tiles, backward) > _room() and blocks > 1:
            blocks = -(-blocks // 2)
            tiles = dataclasses.replace(self, span=self.keys * blocks)
        return tiles

    def wastes(self, problem: "Problem", other: "Tiles") -> bool:
        """Whether more of the sequences is padding than with `other`."""
        lengths = (problem.query_length, problem.key_length)
        mine, others = (self.queries, self.span), (other.queries, other.span)
        return any(round_up(n, a) > round_up(n, b) for n, a, b in zip(lengths, mine, others, strict=True))

    def allowed(self, problem: "Problem", backward: bool) -> bool:
        """Whether the sizes divide as they have to, and everything fits VMEM."""
        sizes = (self.queries, self.keys, self.span, self.sub, self.strip, self.part)
        if any(size < 128 or size % 128 for size in sizes) or self.lag < 0:
            return False
        if self.queries % self.sub or self.queries % self.strip or self.span % self.keys:
            return False
        if problem.diagonal:
            # Whole blocks of keys lie before every block of queries, and its own last keys in the span.
            alone = self.span >= problem.key_length
            if self.queries % self.keys or (alone and self.span % self.queries):
                return False
        return problem.vmem(self, backward) <= _room()


def _room() -> int:
    """VMEM that a kernel may plan with; the rest is the compiler's."""
    return chips.current("tpu").vmem_bytes * 3 // 4


def _block(size: int, largest: int) -> int:
    """The block that cuts `size` into the fewest even pieces of at most `largest`: little is wasted on padding."""
    even = -(-size // -(-size // largest))
    return round_up(even, 128 if even <= 512 else 256)


def _divisor(queries: int) -> int:
    return max(n for n in range(128, min(queries, 1024) + 1, 128) if queries % n == 0)


def _tiles(problem: "Problem", *, backward: bool) -> Tiles:
    """The tuned tiles of the nearest problem, if there are any that this one allows, else the default."""
    default = Tiles.default(problem, backward=backward)
    assert default is not None, "`unsupported` refuses what no tiles fit"
    return tuned.choose(
        f"tpu.attention.{'backward' if backward else 'forward'}",
        chips.current("tpu"),
        problem.shape_class(),
        problem.dtype,
        Tiles,
        lambda tiles: tiles.allowed(problem, backward) and not tiles.wastes(problem, default),
        default,
        lambda tiles: tiles.spanning(problem, backward),
    )


def _candidates(problem: "Problem", *, backward: bool) -> Iterator[Tiles]:
    """The default, blocks of 128, then the others, those that differ least from the default first."""
    default = Tiles.default(problem, backward=backward)
    if default is None:
        return
    longest = round_up(problem.query_length, 128)
    shortest = round_up(problem.key_length, 128)
    found: dict[Tiles, None] = {}
    for queries, keys in itertools.product((128, 256, 512, 1024, 2048), (128, 256, 512, 1024)):
        if queries > max(longest, 128) or keys > shortest or (problem.diagonal and queries % keys):
            continue
        for sub, part, lag in itertools.product((128, 256), (256, 512), (0, 1) if backward else (0,)):
            if sub > queries or part > max(keys, 256):
                continue
            strips = {sub, 128} if problem.diagonal and backward else {sub}
            for strip in strips:
                found[Tiles(queries, keys, 0, sub, strip, part, lag).spanning(problem, backward)] = None
    small = Tiles(*[128] * 6)  # a grid step for each pair of blocks of 128

    def far(tiles: Tiles) -> float:
        """Doublings from the default, each field for itself."""
        pairs = zip(dataclasses.astuple(tiles), dataclasses.astuple(default), strict=True)
        return sum(abs(math.log2((a or 0.5) / (b or 0.5))) for a, b in pairs)

    order = [default, small, *sorted(found, key=far)]
    fitting = (tiles for tiles in dict.fromkeys(order) if tiles.allowed(problem, backward))
    allowed = (tiles for tiles in fitting if not tiles.wastes(problem, default))
    yield from itertools.islice(allowed, MOST_CANDIDATES)


def tiles(phase: str, **call) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; `call` as for `unsupported`."""
    return _tiles(_problem(**call), backward=phase == "backward")


def candidates(phase: str, **call) -> Iterator[Tiles]:
    """Tiles worth trying that the problem and the chip's VMEM allow: the default first, then blocks of 128."""
    return _candidates(_problem(**call), backward=phase == "backward")


def memory(phase: str, tiles: Tiles, **call) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return _problem(**call).vmem(tiles, phase == "backward")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a call before any number is seen."""

    query_length: int
    key_length: int  # of the keys that any query can see
    head_dim: int  # padded
    group: int  # query heads per key head
    dtype: str
    band: Band
    lengths: bool  # query and key lengths come with the data
    additive: tuple[str, ...]  # "tile", "keys" or "queries" for each of bias, mask present
    bias: bool
    scale: float
    cap: float | None

    @property
    def diagonal(self) -> bool:
        """Plain causal: the queries of a block start where its last keys start."""
        return self.band == Band(None, 0) and not self.lengths and self.key_length == self.query_length

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def shape_class(self) -> dict[str, int | str]:
        """What the best tiles depend on. A window counts by its reach, and lengths as if they were full."""
        kind = "causal" if self.diagonal else "open" if self.band.open else "banded"
        extras = [name for name, there in (("tiled", self.tiled), ("lengths", self.lengths)) if there]
        sides = {"left": self.band.left, "right": self.band.right} if kind == "banded" else {}
        reach = {name: max(side, 1) for name, side in sides.items() if side is not None}
        return {
            "kind": " ".join([kind, *extras]),
            "head_dim": str(self.head_dim),
            "group": self.group,
            "queries": self.query_length,
            "keys": self.key_length,
            **reach,
        }

    @property
    def tiled(self) -> bool:
        return "tile" in self.additive or self.bias

    def vmem(self, tiles: Tiles, backward: bool) -> int:
        """Bytes of VMEM of a kernel: operands twice (they are double-buffered), scratch, and the tiles in flight."""
        size, dim, wide = self.itemsize, self.head_dim, round_up(self.head_dim, 128)
        queries, span, sequences = tiles.queries, tiles.span, 4 if backward else 2
        blocks = 2 * sequences * dim * queries * size + 2 * sequences * dim * span * size
        scratch = dim * queries * 4 + 24 * queries * 4 + (2 if backward else 1) * span * wide * size
        if backward:
            scratch += 2 * dim * span * 4
        blocks += 2 * self.additive.count("tile") * span * queries * 4 + 2 * 8 * 4 * (3 * span + 3 * queries)
        if backward and self.bias:
            blocks += 2 * span * queries * 4
        flight = 24 * tiles.sub * (min(tiles.part, tiles.keys) if backward else tiles.keys)
        return blocks + scratch + flight


# ---------------------------------------------------------------------------------------------- shared by both kernels
@dataclasses.dataclass(frozen=True)
class View:
    """What one grid step sees of the problem: where it stands, and the logits of its tiles."""

    p: Problem
    t: Tiles
    refs: dict[str, Any]
    block: Any  # index of the query block
    base: Any  # first key of the span; a Python 0 if there is only one
    precision: Any

    @property
    def row(self):
        return pl.multiple_of(self.block * self.t.queries, self.t.queries)

    @property
    def limits(self):
        """Number of queries and of keys that count."""
        if self.p.lengths:
            return self.refs["lengths"][0, 0], self.refs["lengths"][0, 1]
        return self.p.query_length, self.p.key_length

    def dot(self, a, b, dims):
        return lax.dot_general(a, b, dims, preferred_element_type=f32, precision=self.precision)

    def loops(self, run) -> None:
        """Calls `run(items)` until every key block is visited. An item is (query, queries, key, keys, kind)."""
        t = self.t
        if self.p.diagonal and t.span >= self.p.key_length:
            run(
                [
                    (a * t.strip, t.strip, self.row, (a + 1) * t.strip, "corner")
                    for a in reversed(range(t.queries // t.strip))
                ]
            )
            first, last, left, right = 0, 0, 0, self.block * (t.queries // t.keys)
        else:
            first, last, left, right = self.ranges()

        def body(kind, place):
            def step(turn, _):
                key = pl.multiple_of(place(turn) * t.keys, t.keys)
                width = t.part if "dk" in self.refs else t.keys  # the backward's items are cut in keys, too
                cuts = [(u, min(width, t.keys - u)) for u in range(0, t.keys, width)]
                run([(a, t.sub, key + u, w, kind) for u, w in cuts for a in range(0, t.queries, t.sub)])
                return 0

            return step

        edges = (left - first) + (last - right) if not self._causal_only() else 0
        if not (isinstance(edges, int) and edges == 0):
            lax.fori_loop(
                0, edges, body("edge", lambda n: jnp.where(n < left - first, first + n, right + n - (left - first))), 0
            )
        if not (isinstance(right, int) and isinstance(left, int) and left == right):
            lax.fori_loop(left, right, body("whole", lambda n: n), 0)

    def _causal_only(self):
        return self.p.diagonal and self.t.span >= self.p.key_length

    def ranges(self):
        """Blocks of the span: [first, last) are seen by any query of the step, [left, right) by all."""
        t, keys = self.t, self.p.key_length
        start, end = self.p.band.touched(self.row, t.queries, keys)
        inner, outer = self.p.band.whole(self.row, t.queries, keys)
        if self.p.lengths:
            queries, count = self.limits
            end = jnp.where(self.row < queries, jnp.minimum(end, count), 0)
            outer = jnp.minimum(outer, count)
        start, end, inner, outer = (_clip(x - self.base, 0, t.span) for x in (start, end, inner, outer))
        first = _div(start, t.keys)
        last = _clip(_div(end + t.keys - 1, t.keys), first, None)
        left = _clip(_div(inner + t.keys - 1, t.keys), first, last)
        return first, last, left, _clip(_div(outer, t.keys), left, last)

    def logits(self, s, item, offset):
        """Base-2 logits of the products `s` [keys, queries], whose first key is `offset` past the item's; the cap's
        tanh."""
        query, queries, key, keys, kind = item
        key, width = key + offset, s.shape[0]
        at, tanh = (pl.ds(key, width), pl.ds(query, queries)), None
        # Scaled here, in float32: queries scaled beforehand would be rounded to their own type once more.
        if self.p.cap is None:
            s = s * (self.p.scale * LOG2E)
        else:
            tanh = jnp.tanh(s * (self.p.scale / self.p.cap))
            s = tanh * (self.p.cap * LOG2E)
        for n, shape in enumerate(self.p.additive):
            ref = self.refs[f"additive{n}"]
            value = ref[at] if shape == "tile" else ref[:, at[1]] if shape == "queries" else _column(ref, at[0])
            s = s + value.astype(f32) * LOG2E
        if "query_segment_ids" in self.refs:
            same = _column(self.refs["key_value_segment_ids"], at[0]) == self.refs["query_segment_ids"][:, at[1]]
            s = jnp.where(same, s, MASKED)
        if kind == "edge":
            column = lax.broadcasted_iota(jnp.int32, s.shape, 0) + (self.base + key)
            seen = self.p.band.allowed(lax.broadcasted_iota(jnp.int32, s.shape, 1) + (self.row + query), column)
            s = jnp.where(seen & (column < self.limits[1]), s, MASKED)
        elif kind == "corner" and offset + width > keys - queries:
            clear = max(keys - queries - offset, 0)  # keys of this part that lie before the corner
            corner = s[clear:]
            column = lax.broadcasted_iota(jnp.int32, corner.shape, 0) + (offset + clear - (keys - queries))
            corner = jnp.where(lax.broadcasted_iota(jnp.int32, corner.shape, 1) >= column, corner, MASKED)
            s = corner if not clear else jnp.concatenate([s[:clear], corner], 0)
        return s, tanh


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


def _fold(x, op):
    """[8n, m] → [8, m] without crossing sublanes."""
    return op(x.reshape(x.shape[0] // 8, 8, x.shape[1]), axis=0)


# ---------------------------------------------------------------------------------------------- forward
def _forward_kernel(refs, out, scratch, *, p: Problem, t: Tiles, spans: int, precision):
    """scratch: peak, total the running max and (eight partial) sums; acc: outᵀ in float32; keys: K, head_dim minor."""
    block, span = pl.program_id(3), pl.program_id(2)
    view = View(p, t, refs, block, span * t.span if spans > 1 else 0, precision)
    queries, keys, values = refs["query"], scratch["keys"], refs["value"]
    peak, total, acc = scratch["peak"], scratch["total"], scratch["acc"]

    @pl.when(block == 0)
    def _per_head():
        keys[...] = refs["key"][...].T

    if not view._causal_only():
        peak[...] = jnp.full(peak.shape, FLOOR, f32)
        total[...] = jnp.zeros(total.shape, f32)
        acc[...] = jnp.zeros(acc.shape, f32)

    def scores(item, offset, width):
        s = view.dot(keys[pl.ds(item[2] + offset, width), :], queries[:, pl.ds(item[0], item[1])], NN)
        s, _ = view.logits(s, item, offset)
        return s, _fold(s, jnp.max)

    def cuts(item):
        return [(u, min(t.part, item[3] - u)) for u in range(0, item[3], t.part)]

    def run(items):
        before: Any = None  # the scores of the item before, by part, and their eight partial maxima
        for n in range(len(items) + 1):
            new = cuts(items[n]) if n < len(items) else []
            now, top, sums, update = [], None, None, None
            old: list[tuple[int, int]] = []
            if before is not None:
                item = items[n - 1]
                old, columns = cuts(item), (slice(None), pl.ds(item[0], item[1]))
                high = jnp.maximum(before[1].max(0, keepdims=True), FLOOR if item[4] == "corner" else peak[columns])
                if item[4] != "corner":
                    shrink = jnp.exp2(peak[columns] - high)
                peak[columns] = high
            for part in range(max(len(new), len(old))):
                if part < len(new):
                    s, partial = scores(items[n], *new[part])
                    now.append(s)
                    top = partial if top is None else jnp.maximum(top, partial)
                if part < len(old):
                    offset, width = old[part]
                    weight = jnp.exp2(before[0][part] - high)
                    add = view.dot(values[:, pl.ds(item[2] + offset, width)], weight.astype(values.dtype), NN)
                    weight = _fold(weight, jnp.sum)
                    sums, update = (weight, add) if sums is None else (sums + weight, update + add)
            if old:
                if item[4] == "corner":
                    total[columns], acc[columns] = sums, update
                else:
                    total[columns] = shrink * total[columns] + sums
                    acc[columns] = shrink * acc[columns] + update
            before = now, top

    view.loops(run)

    sums, high, result = total[...].sum(0, keepdims=True), peak[...], acc[...]
    if "sinks" in refs:  # one more logit without a value; it counts in the first span only
        sink = jnp.where(span == 0, refs["sinks"][0, 0] * LOG2E, MASKED)
        with_sink = jnp.maximum(high, sink)
        shrink = jnp.exp2(high - with_sink)
        sums, high, result = sums * shrink + jnp.exp2(sink - with_sink), with_sink, result * shrink
    some = sums > 0
    if p.lengths:
        some &= lax.broadcasted_iota(jnp.int32, sums.shape, 1) + view.row < view.limits[0]
    divisor = jnp.where(some, sums, 1.0)
    out["out"][...] = (result * jnp.where(some, 1 / divisor, 0.0)).astype(out["out"].dtype)
    out["lse"][...] = jnp.where(some, (high + jnp.log2(divisor)) / LOG2E, jnp.inf)


# ---------------------------------------------------------------------------------------------- backward
def _backward_kernel(refs, out, scratch, *, p: Problem, t: Tiles, spans: int, precision):
    """Five products an item. dQᵀ of the block and dKᵀ, dVᵀ of the span are summed in float32 in VMEM, over the query
    heads of a group too: no partial result reaches HBM (but for dQ, when the keys are cut into spans)."""
    span, member, block = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    view = View(p, t, refs | {"dk": out["dk"]}, block, span * t.span if spans > 1 else 0, precision)
    keys, values, delta, stat = (scratch[n] for n in ("keys", "values", "delta", "stat"))
    dq, dk, dv, queries, dout = scratch["dq"], scratch["dk"], scratch["dv"], refs["query"], refs["dout"]

    @pl.when((member == 0) & (block == 0))
    def _per_head():
        keys[...], values[...] = refs["key"][...].T, refs["value"][...].T
        dk[...], dv[...] = jnp.zeros(dk.shape, f32), jnp.zeros(dv.shape, f32)

    delta[...] = (refs["out"][...].astype(f32) * dout[...].astype(f32)).sum(0, keepdims=True)
    stat[...] = refs["lse"][...] * LOG2E
    dq[...] = jnp.zeros(dq.shape, f32)
    if p.bias:
        out["dbias"][...] = jnp.zeros(out["dbias"].shape, f32)

    def products(item):
        columns, rows = pl.ds(item[0], item[1]), pl.ds(item[2], item[3])
        return view.dot(keys[rows, :], queries[:, columns], NN), view.dot(values[rows, :], dout[:, columns], NN)

    def softmax(item, s, dp):
        columns, rows = pl.ds(item[0], item[1]), pl.ds(item[2], item[3])
        s, tanh = view.logits(s, item, 0)
        weight = jnp.exp2(s - stat[:, columns])
        ds = weight * (dp - delta[:, columns])
        if p.bias:
            out["dbias"][rows, columns] = ds
        if tanh is not None:
            ds = ds * (1 - tanh * tanh)
        return weight.astype(dout.dtype), ds.astype(dout.dtype)

    def gradients(item, weight, ds):
        columns, rows = pl.ds(item[0], item[1]), pl.ds(item[2], item[3])
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

    view.loops(run)
    out["dq"][...] = (dq[...] * p.scale).astype(out["dq"].dtype)

    @pl.when((member == pl.num_programs(3) - 1) & (block == pl.num_programs(4) - 1))
    def _store():
        out["dk"][...] = (dk[...] * p.scale).astype(out["dk"].dtype)
        out["dv"][...] = dv[...].astype(out["dv"].dtype)


# ---------------------------------------------------------------------------------------------- launching
def _problem(
    query,
    key,
    bias=None,
    mask=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    *,
    scale,
    is_causal=False,
    local_window_size=None,
    logits_soft_cap=None,
    **others,
) -> Problem:
    """`others` (value, segment ids, sinks) have no say in it."""
    del others
    band = Band.of(is_causal, local_window_size)
    keys = key.shape[1]
    if band.right is not None:  # keys past the last query's reach are never read
        keys = max(min(keys, query.shape[1] + band.right), 1)
    return Problem(
        query_length=query.shape[1],
        key_length=keys,
        head_dim=round_up(query.shape[3], 16),
        group=query.shape[2] // key.shape[2],
        dtype=jnp.dtype(query.dtype).name,
        band=band,
        lengths=query_seq_lengths is not None or key_value_seq_lengths is not None,
        additive=tuple(_kind(x) for x in (bias, mask) if x is not None),
        bias=bias is not None,
        scale=float(scale),
        cap=None if logits_soft_cap is None else float(logits_soft_cap),
    )


def _kind(x) -> str:
    """Which of queries and keys a [.., T, S] operand varies over."""
    return "queries" if x.shape[3] == 1 else "keys" if x.shape[2] == 1 else "tile"


def _sequence_minor(x, length: int, size: int, dim: int):
    """[batch, sequence, heads, head_dim] → [batch, heads, dim, size]: the first `length`, then zeros."""
    return pad_to(pad_to(jnp.transpose(x[:, :length], (0, 2, 3, 1)), 2, dim), 3, size)


def _sequence_third(x, length: int, dim: int):
    """The way back: [batch, heads, dim, size] → [batch, length, heads, head_dim]."""
    return jnp.transpose(x[:, :, :dim, :length], (0, 3, 1, 2))


class _Operands:
    """Arrays as the kernels read them, each with its block.

    `place` maps the indices of the grid to (batch, head, key head, span, block).
    """

    def __init__(self, p: Problem, t: Tiles, place):
        self.p, self.t, self.place = p, t, place
        self.size_q, self.size_k = round_up(p.query_length, t.queries), round_up(p.key_length, t.span)
        self.arrays: dict[str, jax.Array] = {}
        self.specs: dict[str, pl.BlockSpec] = {}

    def spec(self, block, index, **space) -> pl.BlockSpec:
        return pl.BlockSpec(block, lambda *grid: index(*self.place(*grid)), **space)

    def of_queries(self, *lead) -> pl.BlockSpec:
        """[.., heads, head_dim, queries]; with `lead` the array has one entry per span in front."""
        d, q = self.p.head_dim, self.t.queries
        if lead:
            return self.spec((None, None, None, d, q), lambda b, n, h, s, i: (s, b, n, 0, i))
        return self.spec((None, None, d, q), lambda b, n, h, s, i: (b, n, 0, i))

    def of_keys(self) -> pl.BlockSpec:
        return self.spec((None, None, self.p.head_dim, self.t.span), lambda b, n, h, s, i: (b, h, 0, s))

    def add(self, name, array, spec):
        self.arrays[name], self.specs[name] = array, spec

    def add_queries(self, **named):
        for name, x in named.items():
            self.add(name, _sequence_minor(x, self.p.query_length, self.size_q, self.p.head_dim), self.of_queries())

    def add_keys(self, **named):
        for name, x in named.items():
            self.add(name, _sequence_minor(x, self.p.key_length, self.size_k, self.p.head_dim), self.of_keys())

    def add_masks(self, bias, mask, lengths, segments):
        """Bias, mask, and the pairs (of queries, of keys) of lengths and of segment ids."""
        p, t = self.p, self.t
        additive = [] if bias is None else [bias if bias.dtype == jnp.bfloat16 else bias.astype(f32)]
        if mask is not None:  # bfloat16 holds 0 and -inf exactly
            additive.append(jnp.where(mask, 0.0, MASKED).astype(jnp.bfloat16))
        for n, x in enumerate(additive):
            batch, heads, kind = x.shape[0] > 1, x.shape[1] > 1, p.additive[n]
            where = lambda b, n, batch=batch, heads=heads: (b if batch else 0, n if heads else 0)
            x = jnp.swapaxes(x, 2, 3)
            if kind == "tile":
                x = pad_to(pad_to(x[:, :, : p.key_length], 2, self.size_k), 3, self.size_q)
                spec = self.spec((None, None, t.span, t.queries), lambda b, n, h, s, i, w=where: (*w(b, n), s, i))
            elif kind == "keys":
                x = pad_to(jnp.swapaxes(x, 2, 3)[..., : p.key_length].astype(f32), 3, self.size_k)
                spec = self.spec((None, None, 1, t.span), lambda b, n, h, s, i, w=where: (*w(b, n), 0, s))
            else:
                x = jnp.broadcast_to(x.astype(f32), (*x.shape[:3], p.query_length))
                x = pad_to(x, 3, self.size_q)
                spec = self.spec((None, None, 1, t.queries), lambda b, n, h, s, i, w=where: (*w(b, n), 0, i))
            self.add(f"additive{n}", x, spec)
        if segments[0] is not None:
            ids = pad_to(segments[0].astype(jnp.int32)[:, None], 2, self.size_q)
            self.add("query_segment_ids", ids, self.spec((None, 1, t.queries), lambda b, n, h, s, i: (b, 0, i)))
            ids = pad_to(segments[1].astype(jnp.int32)[:, None, : p.key_length], 2, self.size_k)
            self.add("key_value_segment_ids", ids, self.spec((None, 1, t.span), lambda b, n, h, s, i: (b, 0, s)))
        if p.lengths:
            given = tuple(zip(lengths, (p.query_length, p.key_length), strict=True))
            batch = next(x.shape[0] for x, _ in given if x is not None)
            ends = [jnp.full((batch,), full, jnp.int32) if x is None else jnp.clip(x, 0, full) for x, full in given]
            both = jnp.stack(ends, 1).astype(jnp.int32)[:, None]
            self.add("lengths", both, self.spec((None, 1, 2), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM))

    def launch(self, kernel, name, grid, out_shape, out_specs, scratch):
        spans = self.size_k // self.t.span
        # float32 in several passes: one pass of the matrix unit would round the operands to bfloat16
        precision = lax.Precision.HIGHEST if self.p.itemsize == 4 else None
        return pl.pallas_call(
            functools.partial(kernel, p=self.p, t=self.t, spans=spans, precision=precision),
            grid=grid,
            in_specs=[self.specs],
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL,) * 3 + (pltpu.ARBITRARY,) * (len(grid) - 3),
                vmem_limit_bytes=chips.current("tpu").vmem_bytes * 7 // 8,
            ),
            name=name,
        )(self.arrays)


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
    score_mod=None,
    mask_mod=None,
    dropout_rate: float = 0.0,
) -> str | None:
    """Why the kernels cannot serve this call on the chip being compiled for, or None. Operands may be abstract."""
    del dropout_rate
    missing = {
        "prefix_lengths": prefix_lengths,
        "alibi_slopes": alibi_slopes,
        "dropout": dropout_rows,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
    }
    for name, given in missing.items():
        if given is not None:
            return f"{name} is not served by this kernel yet"
    if value.shape[3] != query.shape[3]:
        return f"the head size of value must be that of query, {query.shape[3]}, got {value.shape[3]}"
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"query must be float32 or bfloat16 (the TPU's matrix unit takes no other), got {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
    if query.shape[3] > MAX_HEAD:
        return f"the TPU attention kernel takes head sizes up to {MAX_HEAD}, got {query.shape[3]}"
    if not scale > 0:
        return f"scale must be positive, got {scale}"
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        return "segment ids of queries and of keys must come together"
    problem = _problem(
        *(query, key, bias, mask, query_seq_lengths, key_value_seq_lengths),
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
    )
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
    scale: float,
    is_causal: bool = False,
    local_window_size: tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
    """out = softmax(mask(cap·tanh(scale·q·kᵀ/cap) + bias))·v,  lse = log Σ_j exp(logit_j) (+ exp(sink)).

    query [B,T,N,H], key and value [B,S,K,H] of one dtype, float32 or bfloat16, N a multiple of K; bias and mask 4-D,
    broadcastable to [B,N,T,S]; lengths [B], segment ids [B,T] and [B,S], sinks [N]. Returns ((out [B,T,N,H] in query's
    dtype, lse [B,N,T] float32), ()). A row that sees nothing, or that lies past its query length, has out = 0 and lse
    = +inf, or its sink if there is one.
    """
    p = _problem(
        *(query, key, bias, mask, query_seq_lengths, key_value_seq_lengths),
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
    )
    t = tiles or _tiles(p, backward=False)
    batch, _, heads, dim = query.shape
    operands = _Operands(p, t, lambda b, n, s, i: (b, n, n // p.group, s, i))
    operands.add_queries(query=query)
    operands.add_keys(key=key, value=value)
    lengths, segments = (query_seq_lengths, key_value_seq_lengths), (query_segment_ids, key_value_segment_ids)
    operands.add_masks(bias, mask, lengths, segments)
    if sinks is not None:
        one = operands.spec((None, 1, 1), lambda b, n, h, s, i: (n, 0, 0), memory_space=pltpu.SMEM)
        operands.add("sinks", sinks.astype(f32)[:, None, None], one)
    size, spans = operands.size_q, operands.size_k // t.span
    shape = jax.ShapeDtypeStruct
    result = operands.launch(
        _forward_kernel,
        "attention_forward",
        (batch, heads, spans, size // t.queries),
        {
            "out": shape((spans, batch, heads, p.head_dim, size), query.dtype if spans == 1 else f32),
            "lse": shape((spans, batch, heads, 1, size), f32),
        },
        {
            "out": operands.of_queries("span"),
            "lse": operands.spec((None, None, None, 1, t.queries), lambda b, n, h, s, i: (s, b, n, 0, i)),
        },
        {
            "peak": pltpu.VMEM((1, t.queries), f32),
            "total": pltpu.VMEM((8, t.queries), f32),
            "acc": pltpu.VMEM((p.head_dim, t.queries), f32),
            "keys": pltpu.VMEM((t.span, p.head_dim), query.dtype),
        },
    )
    out, lse = (result["out"][0], result["lse"][0]) if spans == 1 else _merge(result["out"], result["lse"])
    out, lse = _sequence_third(out.astype(query.dtype), p.query_length, dim), lse[:, :, 0, : p.query_length]
    if sinks is not None and query_seq_lengths is not None:
        lse = jnp.where(_inside(query_seq_lengths, p), lse, sinks.astype(f32)[:, None])
    return (out, lse), ()


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
    outputs: tuple[jax.Array, jax.Array],
    residuals: tuple[()],
    cotangents: tuple[jax.Array, Any],
    scale: float,
    is_causal: bool = False,
    local_window_size: tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """P = exp(logits - lse), dV = Pᵀ·dO, dS = P∘(dO·Vᵀ - rowsum(O∘dO)), dQ = scale·dS·K, dK = scale·dSᵀ·Q, dbias = dS.

    Arguments as in `forward`, with its outputs and the cotangent of `out`; that of `lse` is ignored. Returns the
    gradients of query, key and value, and of bias and sinks where given. dbias is formed as [B,N,T,S] float32, then
    reduced to bias's shape.
    """
    del residuals
    out, lse = outputs
    dout = cotangents[0].astype(query.dtype)
    p = _problem(
        *(query, key, bias, mask, query_seq_lengths, key_value_seq_lengths),
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
    )
    if query_seq_lengths is not None:
        lse = jnp.where(_inside(query_seq_lengths, p), lse, jnp.inf)
    t = tiles or _tiles(p, backward=True)
    batch, _, heads, dim = query.shape
    operands = _Operands(p, t, lambda b, h, s, g, i: (b, h * p.group + g, h, s, i))
    operands.add_queries(query=query, out=out, dout=dout)
    operands.add_keys(key=key, value=value)
    lengths, segments = (query_seq_lengths, key_value_seq_lengths), (query_segment_ids, key_value_segment_ids)
    operands.add_masks(bias, mask, lengths, segments)
    size, spans = operands.size_q, operands.size_k // t.span
    statistic = operands.spec((None, None, 1, t.queries), lambda b, n, h, s, i: (b, n, 0, i))
    operands.add("lse", pad_to(lse[:, :, None], 3, size, jnp.inf), statistic)  # +inf: a padded row weighs nothing
    shape = jax.ShapeDtypeStruct
    of_key = shape(operands.arrays["key"].shape, key.dtype)
    out_shape = {
        "dq": shape((spans, batch, heads, p.head_dim, size), query.dtype if spans == 1 else f32),
        "dk": of_key,
        "dv": of_key,
    }
    out_specs = {"dq": operands.of_queries("span"), "dk": operands.of_keys(), "dv": operands.of_keys()}
    if bias is not None:
        out_shape["dbias"] = shape((batch, heads, operands.size_k, size), f32)
        out_specs["dbias"] = operands.spec((None, None, t.span, t.queries), lambda b, n, h, s, i: (b, n, s, i))
    result = operands.launch(
        _backward_kernel,
        "attention_backward",
        (batch, heads // p.group, spans, p.group, size // t.queries),
        out_shape,
        out_specs,
        {
            "keys": pltpu.VMEM((t.span, p.head_dim), query.dtype),
            "values": pltpu.VMEM((t.span, p.head_dim), query.dtype),
            "delta": pltpu.VMEM((1, t.queries), f32),
            "stat": pltpu.VMEM((1, t.queries), f32),
            "dq": pltpu.VMEM((p.head_dim, t.queries), f32),
            "dk": pltpu.VMEM((p.head_dim, t.span), f32),
            "dv": pltpu.VMEM((p.head_dim, t.span), f32),
        },
    )
    dq = result["dq"][0] if spans == 1 else result["dq"].sum(0).astype(query.dtype)
    grads = {"query": _sequence_third(dq, p.query_length, dim)}
    for name, grad in (("key", result["dk"]), ("value", result["dv"])):
        grads[name] = pad_to(_sequence_third(grad, p.key_length, dim), 1, key.shape[1])
    if bias is not None:
        full = jnp.swapaxes(result["dbias"], 2, 3)[:, :, : p.query_length, : p.key_length]
        full = pad_to(full, 3, key.shape[1])
        summed = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
        grads["bias"] = full.sum(summed, keepdims=True).astype(bias.dtype)
    if sinks is not None:
        delta = jnp.einsum("btnh,btnh->bnt", out.astype(f32), dout.astype(f32))
        grads["sinks"] = -(jnp.exp(sinks.astype(f32)[:, None] - lse) * delta).sum((0, 2)).astype(sinks.dtype)
    return grads
