"""Attention of new tokens to a cache on TPU (Mosaic), the cache contiguous or in pages: one kernel for both.

    out_t = Σ_j p_tj v_j,  p_tj = exp(s_tj) / (exp(sink) + Σ_j exp(s_tj)),  s = cap(scale · q kᵀ),  left ≤ j ≤ t's place

Layout. A page is [page_size, key heads, head_dim], as Flax holds a cache; a contiguous cache is one page per sequence.
It is read as the matrix [page_size · key heads, head_dim] that it is in memory, whole blocks by one copy each: no head
is ever picked out. The queries of all heads are the rows of one product with such a block. A row counts the columns of
its own key head; the others cost nothing that is scarce here, for a decoding step waits for the memory, and a matrix
unit takes as long to load a block of keys as to pass a few more rows by it.

Of other head sizes XLA keeps the tokens in the lanes, as padding a row of 64 to 128 would cost twice the memory. Such a
cache, "turned", is read as the matrix [key heads · head_dim, page_size] that it is then. A row of the product has its
query in the place of its key head and zeros in the others', and takes that place of what it gets from the values.

Work. A grid step owns the tokens of one tile (`pallas_kernels.ragged`) and loops over the blocks of keys that they see:
two buffers, the next block, or the first one of the next tile, is under way while this one is computed. The softmax is
online, in base 2. Quantised keys scale the logits, quantised values the weights: integers go into the products.

Sources: Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention (arXiv 2309.06180).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.ragged import Cut, Work

f32 = jnp.float32
LOG2E = math.log2(math.e)
FLOOR = -3e38  # of the running maximum: a row that sees nothing gets exp2(-inf - FLOOR) = 0, never NaN
FAR = 1 << 30  # the place of a column that belongs to another head
MOST_ROWS, MOST_SCORES, MOST_COPY = 256, 1 << 17, 1 << 20
MOST_SMEM = 1 << 19  # bytes of tables; the rest of the scalar memory is the compiler's
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`keys` of a block, all their heads with them; `tokens` of a tile of queries, all heads with them."""

    keys: int
    tokens: int

    @staticmethod
    def default(problem: "Problem") -> "Tiles | None":
        """Blocks of a MiB, which hide the latency of a copy, unless their scores would crowd VMEM; as few tokens as
        the sequences have, since each row of a tile is computed whether it is used or not."""
        tokens = max(1, min(problem.longest, MOST_ROWS // problem.heads))
        keys = MOST_COPY // (problem.groups * problem.head_dim * problem.key_itemsize)
        keys = min(keys, MOST_SCORES // (tokens * problem.heads * problem.columns_per_key))
        keys = problem.block(max(keys, LANES // problem.columns_per_key, 1))
        tiles = Tiles(keys, tokens)
        return tiles if problem.vmem(tiles) <= _room() else None


def _room() -> int:
    return chips.current("tpu").vmem_bytes * 3 // 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a call before any number is seen."""

    tokens: int
    sequences: int
    longest: int  # tokens of a sequence, as far as the shapes tell: of each, if not paged
    heads: int  # padded
    real_heads: int
    groups: int
    head_dim: int
    pages: int
    page_size: int
    most_pages: int  # of a sequence
    paged: bool
    dtype: Any
    key_dtype: Any

    @staticmethod
    def of(query, key, lengths, page_table=None, **_) -> "Problem":
        pages, page_size, groups, head_dim = key.shape
        sequences = lengths.shape[0]
        *leading, heads, _ = query.shape
        tokens = math.prod(leading)
        spread = -(-tokens // max(sequences, 1))
        return Problem(
            tokens=tokens,
            sequences=sequences,
            longest=leading[1] if page_table is None else spread if spread > 2 else 1,
            heads=round_up(heads, _sublanes(query.dtype)),
            real_heads=heads,
            groups=groups,
            head_dim=head_dim,
            pages=pages,
            page_size=page_size,
            most_pages=1 if page_table is None else page_table.shape[1],
            paged=page_table is not None,
            dtype=jnp.dtype(query.dtype),
            key_dtype=jnp.dtype(key.dtype),
        )

    @property
    def key_itemsize(self) -> int:
        return self.key_dtype.itemsize

    @property
    def quantised(self) -> bool:
        return self.key_dtype == jnp.int8

    @property
    def turned(self) -> bool:
        """Whether a page is the matrix [key heads · head_dim, page_size]."""
        return self.head_dim % LANES != 0

    @property
    def columns_per_key(self) -> int:
        """Of the scores."""
        return 1 if self.turned else self.groups

    @property
    def depth(self) -> int:
        """What the products with keys sum over, and the width of those with values."""
        return self.groups * self.head_dim if self.turned else self.head_dim

    @property
    def aligned(self) -> int:
        """Columns of the scores that a copy of a page begins and ends at."""
        return LANES if self.quantised or self.turned else _sublanes(self.key_dtype)

    @property
    def scales_per_column(self) -> int:
        return self.groups if self.turned else 1

    def matrix(self, columns: int) -> tuple[int, int]:
        """The shape of keys, or values, for that many columns of the scores."""
        return (self.depth, columns) if self.turned else (columns, self.depth)

    def block(self, target: int) -> int:
        """The keys of a block, about `target`: whole pages, or a part of one that copies may begin and end at."""
        if self.page_size <= target:
            return self.page_size * max(1, min(target // self.page_size, self.most_pages))
        step = self.aligned // math.gcd(self.aligned, self.columns_per_key)
        return min(self.page_size, round_up(max(target, step), step))

    def cut(self, tiles: Tiles) -> Cut:
        return Cut(self.tokens, self.sequences, tiles.tokens, each=None if self.paged else self.longest)

    @property
    def smem(self) -> int:
        return 4 * self.sequences * (1 + (self.most_pages + 1 if self.paged else 0))

    def vmem(self, tiles: Tiles) -> int:
        """Bytes of VMEM: two blocks of keys and values, the queries and results, and the scores in flight."""
        columns, rows = tiles.keys * self.columns_per_key, tiles.tokens * self.heads
        scales = round_up(self.scales_per_column, 8)
        blocks = 4 * columns * self.depth * self.key_itemsize + 4 * scales * columns * 4 * self.quantised
        if self.quantised:
            blocks += 2 * columns * self.depth * self.dtype.itemsize
        size = round_up(self.head_dim, LANES)
        queries = rows * (3 * size * self.dtype.itemsize + 4 * self.depth + 3 * 4 * LANES)
        if self.turned:
            queries += (rows + size) * self.depth * (self.dtype.itemsize + 2 * 4)
        return blocks + queries + 6 * rows * columns * 4


def _sublanes(dtype) -> int:
    return 32 // jnp.dtype(dtype).itemsize


def tiles(phase: str, **call) -> Tiles:
    """What `forward` takes when it is given no tiles; `call` as for `unsupported`."""
    del phase
    found = Tiles.default(Problem.of(**call))
    assert found is not None, "`unsupported` refuses what no tiles fit"
    return found


_tiles = tiles


def candidates(phase: str, **call) -> Iterator[Tiles]:
    """The default, then blocks of half and twice as many keys, if they fit VMEM."""
    problem, default = Problem.of(**call), tiles(phase, **call)
    sizes = (default.keys, default.keys // 2, default.keys * 2, default.keys // 4)
    found = dict.fromkeys(Tiles(problem.block(max(size, 1)), default.tokens) for size in sizes)
    yield from (tiles for tiles in found if problem.vmem(tiles) <= _room())


def memory(phase: str, tiles: Tiles, **call) -> int:
    """Bytes of VMEM that the kernel is estimated to take."""
    del phase
    return Problem.of(**call).vmem(tiles)


def unsupported(query, key, value, lengths, *, scale: float, logits_soft_cap=None, **others) -> str | None:
    """Why this kernel cannot serve these operands on the current chip, in one sentence, or None."""
    del value, scale, logits_soft_cap
    p = Problem.of(query, key, lengths, **others)
    if p.dtype not in (jnp.bfloat16, jnp.float32):
        return f"query must be bfloat16 or float32, got {p.dtype.name}"
    step = _sublanes(p.key_dtype)
    if p.head_dim % step or not 0 < p.head_dim <= 512:
        return f"the head size must be a multiple of {step} for {p.key_dtype.name}, at most 512, got {p.head_dim}"
    what = "page_size" if p.paged else "the cache's length"
    if p.turned and p.page_size % LANES:
        return f"{what} must be a multiple of 128 for a head size of {p.head_dim}, got {p.page_size}"
    if p.page_size * p.columns_per_key % p.aligned:
        return (
            f"{what} times the key heads must be a multiple of {p.aligned} for {p.key_dtype.name}, "
            f"got {p.page_size} · {p.groups}"
        )
    if p.heads > MOST_ROWS:
        return f"there must be at most {MOST_ROWS} query heads, got {p.real_heads}"
    found = Tiles.default(p)
    if found is None:
        return f"no block of keys fits {_room() >> 20} MiB of VMEM with {p.real_heads} heads of {p.head_dim}"
    if p.smem > MOST_SMEM:
        return f"the tables must fit {MOST_SMEM} bytes of scalar memory, they are {p.smem}"
    return None


# ---------------------------------------------------------------------------------------------- the kernel
class _Tile(NamedTuple):
    """What a grid step works on, and the blocks begin … last - 1 that it sees."""

    work: Work
    begin: Any
    last: Any

    @property
    def sees(self):
        return self.last > self.begin


def _kernel(p: Problem, t: Tiles, steps, cores, left, factor, cap, sunk, *refs):
    names = ["lengths", *(["table", "starts"] if p.paged else []), "query", "key", "value"]
    names += [*(["key_scales", "value_scales"] if p.quantised else []), *(["sinks"] if sunk else []), "out", "lse"]
    names += ["keys", "values", "queries", "result", "statistic", "place", "slot", "arrived", "asked", "left"]
    names += ["key_factors", "value_factors"] if p.quantised else []
    r = dict(zip(names, refs, strict=True))
    core, step = pl.program_id(0), pl.program_id(1)
    columns, rows = t.keys * p.columns_per_key, t.tokens * p.heads
    whole = p.page_size > t.keys  # a block is a part of a page
    per_page = -(-p.page_size // t.keys) if whole else 1
    pieces = 1 if whole else t.keys // p.page_size
    piece = columns // pieces
    precision = lax.Precision.HIGHEST if p.dtype == f32 else None

    def tile(step):
        """This core's tile of a step."""
        number, cut = step * cores + core, p.cut(t)
        start = (lambda b: r["starts"][b]) if p.paged else (lambda b: b)
        i = jnp.minimum(number, cut.count - 1)
        work = cut.work(i, start, lambda b: r["lengths"][b], p.most_pages * p.page_size, left)
        there = number < cut.count
        work = work._replace(end=jnp.where(there, work.end, work.first), high=jnp.where(there, work.high, 0))

        def block_of(key):
            if not whole:
                return lax.div(key, jnp.int32(t.keys))
            page = lax.div(key, jnp.int32(p.page_size))
            return page * per_page + lax.div(key - page * p.page_size, jnp.int32(t.keys))

        begin = block_of(work.low)
        return _Tile(work, begin, jnp.where(work.high > 0, block_of(jnp.maximum(work.high - 1, 0)) + 1, begin))

    def place_of(block):
        """(page within the sequence, first key of the block within it, first that the block before had not)."""
        if not whole:
            return block * pieces, 0, 0
        page = lax.div(block, jnp.int32(per_page))
        fresh = (block - page * per_page) * t.keys
        return page, jnp.minimum(fresh, p.page_size - t.keys), fresh

    def part(ref, which, columns):
        """Some columns of the scores' keys, or values, of a page or a slot."""
        return ref.at[(which, slice(None), columns) if p.turned else (which, columns)]

    def copies(slot, sequence=None, block=None):
        """The copies of one block to a slot; without a block, descriptors to wait by."""
        for n in range(pieces):
            page: Any = 0
            first: Any = 0
            if block is not None:
                number, begin, _ = place_of(block)
                page, first = sequence, pl.multiple_of(begin * p.columns_per_key, p.aligned)
                if p.paged:
                    page = r["table"][sequence * p.most_pages + jnp.minimum(number + n, p.most_pages - 1)]
                    page = jnp.clip(page, 0, p.pages - 1)
            there, here = pl.ds(first, piece), pl.ds(n * piece, piece)
            for k, name in enumerate(("key", "value")):
                source, target = part(r[name], page, there), part(r[name + "s"], slot, here)
                yield pltpu.make_async_copy(source, target, r["arrived"].at[k, slot])
                if p.quantised:
                    yield pltpu.make_async_copy(
                        r[f"{name}_scales"].at[page, :, there],
                        r[f"{name}_factors"].at[slot, :, here],
                        r["arrived"].at[2 + k, slot],
                    )

    def ask(step, first):
        """The copy of the queries of a step's tile. It is shifted where it would run past the last token."""
        begin = jnp.minimum(first, p.tokens - t.tokens)
        side = lax.rem(step, 2)
        return pltpu.make_async_copy(r["query"].at[pl.ds(begin, t.tokens)], r["queries"].at[side], r["asked"].at[side])

    def start(slot, sequence, block):
        for copy in copies(slot, sequence, block):
            copy.start()

    def results(step):
        """(whether, copy) of each token of a step's tile."""
        there = tile(step).work
        for n in range(t.tokens):
            token = jnp.minimum(there.first, p.tokens - t.tokens) + n
            here = pl.ds(n * p.heads, p.heads)
            yield (
                (token >= there.first) & (token < there.end),
                pltpu.make_async_copy(r["result"].at[here], r["out"].at[token], r["left"].at[0]),
                pltpu.make_async_copy(r["statistic"].at[here], r["lse"].at[token], r["left"].at[1]),
            )

    def finish(step):
        for there, *both in results(step):

            @pl.when(there)
            def _(both=both):
                for copy in both:
                    copy.wait()

    def group_of(shape):
        """The key head of every row (token, head), none of those that there are for one that is padding."""
        return _divided(_remainder(lax.broadcasted_iota(jnp.int32, shape, 0), p.heads), p.real_heads // p.groups)

    def spread():
        """(0 or 1 [head_dim, depth]: a row once in the place of every key head, whether a row has that place)."""
        column = lax.broadcasted_iota(jnp.int32, (p.head_dim, p.depth), 1)
        place = lax.broadcasted_iota(jnp.int32, (rows, p.depth), 1)
        copies = _remainder(column, p.head_dim) == lax.broadcasted_iota(jnp.int32, (p.head_dim, p.depth), 0)
        return copies.astype(f32), _divided(place, p.head_dim) == group_of((rows, p.depth))

    def scales(factors):
        """Of every row and column: a row takes those of its key head."""
        if not p.turned:
            return factors
        group, chosen = group_of((rows, columns)), jnp.zeros((rows, columns), f32)
        for g in range(p.groups):
            chosen = jnp.where(group == g, factors[g : g + 1], chosen)
        return chosen

    @pl.when(step == 0)
    def _():
        r["slot"][0] = 0
        own = tile(step)

        def start_first():
            ask(step, own.work.first).start()
            start(0, own.work.sequence, own.begin)

        pl.when(own.sees)(start_first)
        # For row (token, head) and column (key, key head): the key's number if the heads belong together.
        column = lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
        if p.turned:
            r["place"][...] = column
        else:
            key = _divided(column, p.groups)
            r["place"][...] = jnp.where(column - key * p.groups == group_of((rows, columns)), key, FAR)

    own, following = tile(step), tile(step + 1)  # the next tile is under way before this one is done
    slot = r["slot"][0]
    after = lax.rem(slot + own.last - own.begin, 2)  # the slot of its first block

    @pl.when(following.sees)
    def _():
        ask(step + 1, following.work.first).start()

    def nothing():
        """(maximum, sum, accumulator) before any key: the sink is one that was seen first and has no value."""
        top, total = jnp.full((rows, 1), FLOOR, f32), jnp.zeros((rows, 1), f32)
        if sunk:
            top = jnp.maximum(r["sinks"][...], FLOOR)
            total = jnp.exp2(r["sinks"][...] - top)
        return top, total, jnp.zeros((rows, p.depth), f32)

    def attend():
        ask(step, own.work.first).wait()
        query = r["queries"][lax.rem(step, 2)].reshape(rows, p.head_dim)
        token = _divided(lax.broadcasted_iota(jnp.int32, (rows, 1), 0), p.heads)
        shift = own.work.first - jnp.minimum(own.work.first, p.tokens - t.tokens)
        position = own.work.place + token - shift  # of every row
        kind = query.dtype
        if p.turned:
            copies_of, own_place = spread()
            wide = lax.dot(query, copies_of.astype(kind), precision=precision, preferred_element_type=f32)
            query = jnp.where(own_place, wide, 0.0).astype(kind)

        def one(block, carry):
            top, total, acc = carry
            here = lax.rem(slot + block - own.begin, 2)
            more = block + 1 < own.last

            @pl.when(more | following.sees)
            def _():
                start(
                    1 - here,
                    jnp.where(more, own.work.sequence, following.work.sequence),
                    jnp.where(more, block + 1, following.begin),
                )

            for copy in copies(here):
                copy.wait()
            page, offset, fresh = place_of(block)
            base = page * p.page_size + offset

            @pl.when(base + t.keys > own.work.length)
            def _():  # what was never written may be NaN, and zero times NaN is NaN
                along = 1 if p.turned else 0
                number = lax.broadcasted_iota(jnp.int32, p.matrix(columns), along)
                known = number < (own.work.length - base) * p.columns_per_key
                values = r["values"][here].astype(f32)
                r["values"][here] = jnp.where(known, values, 0.0).astype(p.key_dtype)

            s = lax.dot_general(
                query,
                _exactly(r["keys"][here], kind),
                (((1,), (0 if p.turned else 1,)), ((), ())),
                preferred_element_type=f32,
                precision=precision,
            )
            if p.quantised:
                s = s * scales(r["key_factors"][here])
            x = s * factor if cap is None else jnp.tanh(s * (factor / LOG2E / cap)) * (cap * LOG2E)
            number = r["place"][...]
            seen = number <= position - base
            low: Any = 0
            if left is not None:
                low = jnp.maximum(position - left - base, 0)
            if whole and p.page_size % t.keys:
                low = jnp.maximum(low, fresh - offset)
            if not isinstance(low, int):
                seen = seen & (number >= low)
            x = jnp.where(seen, x, -jnp.inf)
            higher = jnp.maximum(top, jnp.max(x, axis=1, keepdims=True))
            weight, decay = jnp.exp2(x - higher), jnp.exp2(top - higher)
            total = total * decay + jnp.sum(weight, axis=1, keepdims=True)
            if p.quantised:
                weight = jnp.where(seen, weight * scales(r["value_factors"][here]), 0.0)
            new = lax.dot_general(
                weight.astype(kind),
                _exactly(r["values"][here], kind),
                (((1,), (1 if p.turned else 0,)), ((), ())),
                preferred_element_type=f32,
                precision=precision,
            )
            return higher, total, acc * decay + new

        return lax.fori_loop(own.begin, own.last, one, nothing())

    def put(top, total, acc):
        empty = total == 0
        safe = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, jnp.inf, (top + jnp.log2(safe)) / LOG2E)
        pl.when(step > 0)(lambda: finish(step - 1))
        if p.turned:
            copies_of, own_place = spread()
            acc = lax.dot_general(
                jnp.where(own_place, acc, 0.0),
                copies_of,
                (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=f32,
            )
        r["result"][...] = (acc / safe).astype(p.dtype)
        r["statistic"][...] = jnp.broadcast_to(lse, (rows, LANES))
        for there, *both in results(step):

            @pl.when(there)
            def _(both=both):
                for copy in both:
                    copy.start()

    @pl.when(own.sees)
    def _():
        put(*attend())

    @pl.when(~own.sees)
    def _():
        pl.when(following.sees)(lambda: start(after, following.work.sequence, following.begin))
        put(*nothing())

    r["slot"][0] = after
    pl.when(step == steps - 1)(lambda: finish(step))


def _exactly(x, dtype):
    """Integers of 8 bits in a wider type, which holds them all."""
    return x if x.dtype == dtype else x.astype(f32).astype(dtype)


def _divided(x, n: int):
    """x // n for 0 ≤ x < 2²²: the vector unit has no integer division."""
    if n & (n - 1) == 0:
        return lax.shift_right_logical(x, jnp.full_like(x, n.bit_length() - 1))
    return ((x.astype(f32) + 0.5) * (1.0 / n)).astype(jnp.int32)


def _remainder(x, n: int):
    return x - _divided(x, n) * n


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array | None = None,
    query_starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    *,
    scale: float,
    left: int | None = None,
    logits_soft_cap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
    """((out, lse), ()): see the head of this file. A row that sees nothing has out 0 and lse +inf, or the sink if any.

    Contiguous: query [B, T, N, H], key and value [B, S, K, H], lengths [B], scales [B, K, S]. Paged: query [tokens, N,
    H], key and value [P, page_size, K, H], page_table [B, M], query_starts [B + 1], scales [P, K, page_size].
    """
    p = Problem.of(query, key, lengths, page_table)
    t = tiles or _tiles("forward", query=query, key=key, lengths=lengths, page_table=page_table)
    t = dataclasses.replace(t, tokens=min(t.tokens, p.tokens))
    cores = chips.current("tpu").cores
    steps, rows, columns = -(-p.cut(t).count // cores), t.tokens * p.heads, t.keys * p.columns_per_key
    scalars = [lengths]
    if page_table is not None and query_starts is not None:
        scalars += [page_table.reshape(-1), query_starts]
    flat = pad_to(query.reshape(p.tokens, p.real_heads, p.head_dim), 1, p.heads)
    order = (0, 2, 3, 1) if p.turned else (0, 1, 2, 3)
    matrix = (p.pages, *p.matrix(p.page_size * p.columns_per_key))
    operands = [flat, *(x.transpose(order).reshape(matrix) for x in (key, value))]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [anywhere] * 3
    buffers = lambda *shape: pltpu.VMEM(shape, p.key_dtype)
    scratch = [
        buffers(2, *p.matrix(columns)),
        buffers(2, *p.matrix(columns)),
        pltpu.VMEM((2, t.tokens, p.heads, p.head_dim), p.dtype),
        pltpu.VMEM((rows, p.head_dim), p.dtype),
        pltpu.VMEM((rows, LANES), f32),
        pltpu.VMEM((rows, columns), jnp.int32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((4 if p.quantised else 2, 2)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    if p.quantised:
        assert key_scales is not None and value_scales is not None
        for scales in (key_scales, value_scales):
            ordered = scales if p.turned else scales.swapaxes(1, 2).reshape(p.pages, 1, -1)
            operands.append(ordered.astype(f32))
            scratch.append(pltpu.VMEM((2, p.scales_per_column, columns), f32))
        in_specs += [anywhere] * 2
    if sinks is not None:
        per_row = jnp.tile(pad_to(sinks.astype(f32) * LOG2E, 0, p.heads), t.tokens)[:, None]
        operands.append(per_row)
        in_specs.append(pl.BlockSpec((rows, 1), lambda *_: (0, 0)))
    launch = pl.pallas_call(
        functools.partial(_kernel, p, t, steps, cores, left, scale * LOG2E, logits_soft_cap, sinks is not None),
        name="decode_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=in_specs,
            out_specs=[anywhere] * 2,
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((p.tokens, p.heads, p.head_dim), p.dtype),
            jax.ShapeDtypeStruct((p.tokens, p.heads, LANES), f32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=min(chips.current("tpu").vmem_bytes, p.vmem(t) + (8 << 20)),
        ),
    )

    # Operands that stay in memory cannot be batched by the grid: under vmap the kernel is called once for each.
    @jax.custom_batching.sequential_vmap
    def called(*arrays):
        # Left alone, XLA may bring whole caches to VMEM before a kernel that reads only as much as the lengths say.
        first = len(scalars) + 1
        there = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays[first : first + 2]]
        return tuple(launch(*arrays[:first], *there, *arrays[first + 2 :]))

    out, lse = called(*scalars, *operands)
    out = out[:, : p.real_heads].reshape(query.shape)
    return (out, lse[:, : p.real_heads, 0].reshape(query.shape[:-1])), ()
