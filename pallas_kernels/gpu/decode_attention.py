"""Attention of new tokens to a cache on Hopper GPUs, the cache contiguous or in pages: one kernel for both.

    out_t = Σ_j p_tj v_j,  p_tj = exp(s_tj) / (exp(sink) + Σ_j exp(s_tj)),  s = cap(scale · q kᵀ),  left ≤ j ≤ t's place

A page is [page_size, key heads, dim], as Flax holds a cache; a contiguous cache is one page per sequence. A block takes
the tokens of one tile (`pallas_kernels.ragged`), the query heads of one key head, and one of `splits` runs of the keys
(Flash-Decoding, Dao et al., 2023), so that a few long sequences fill the chip. Its producer warpgroup streams the keys
and values of that head to shared memory as they lie, page by page; its consumer multiplies, with (token, head) as the
64 rows of wgmma, most of them empty: the memory is what a decoding step waits for. The parts of the splits are merged
by their log-sum-exps, in one elementwise pass.

Integers of 8 bits are widened on the chip; the scales go to the logits and the weights. As in `gpu.attention`, ragged
ends are left to the copies, which read zeros there; but what lies in the cache beyond a length is anything, even NaN.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips
from pallas_kernels.gpu.attention_scores import LN2, LOG2E, LOWEST, smem
from pallas_kernels.gpu.products import no_wgmma
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.ragged import Cut

ROWS = 64  # of a tile of queries: the height of a wgmma
STATISTIC = 32  # copies of a row's log-sum-exp: what a copy moves is aligned to 128 bytes
MOST_SPLITS = 32
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`keys` of a step, of which `stages` are in flight; `splits` of the keys of a sequence."""

    keys: int
    stages: int
    splits: int

    @staticmethod
    def default(problem: "Problem") -> "Tiles":
        """Two blocks for every core, if every split has 256 keys at least; as many stages as fit, up to four."""
        blocks = problem.cut.count * problem.head_blocks
        splits = max(1, min(2 * chips.current("gpu").cores // blocks, problem.most_keys // 256, MOST_SPLITS))
        tiles = Tiles(64, 4, splits)
        while tiles.stages > 1 and not tiles.allowed(problem):
            tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
        return tiles

    def allowed(self, problem: "Problem") -> bool:
        fine = self.keys in (64, 128) and self.stages >= 1 and 1 <= self.splits <= MOST_SPLITS
        return fine and problem.smem(self) <= chips.current("gpu").smem_bytes


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a call before any number is seen."""

    tokens: int
    sequences: int
    longest: int  # tokens of a sequence, as far as the shapes tell
    paged: bool
    groups: int
    real_per_group: int  # query heads of a key head
    per_group: int  # the same, as copies take them: few, or whole tiles of 8
    dim: int
    pages: int
    page_size: int
    most_pages: int  # of a sequence
    quantised: bool
    itemsize: int

    @staticmethod
    def of(query, key, lengths, page_table=None, **_) -> "Problem":
        pages, page_size, groups, dim = key.shape
        *leading, heads, _ = query.shape
        tokens, sequences = math.prod(leading), lengths.shape[0]
        spread = -(-tokens // max(sequences, 1))
        return Problem(
            tokens=tokens,
            sequences=sequences,
            longest=leading[1] if page_table is None else spread if spread > 2 else 1,
            paged=page_table is not None,
            groups=groups,
            real_per_group=heads // groups,
            per_group=heads // groups if heads // groups < 8 else round_up(heads // groups, 8),
            dim=dim,
            pages=pages,
            page_size=page_size,
            most_pages=1 if page_table is None else page_table.shape[1],
            quantised=key.dtype == jnp.int8,
            itemsize=jnp.dtype(key.dtype).itemsize,
        )

    @property
    def most_keys(self) -> int:
        return self.most_pages * self.page_size

    @property
    def stride(self) -> int:
        """Rows of a tile from one token to the next."""
        return min(ROWS, 1 << (self.per_group - 1).bit_length())

    @property
    def tile_tokens(self) -> int:
        return max(1, min(ROWS // self.stride, self.longest))

    @property
    def head_chunks(self) -> int:
        return -(-self.per_group // ROWS)

    @property
    def head_blocks(self) -> int:
        return self.groups * self.head_chunks

    @property
    def cut(self) -> Cut:
        return Cut(self.tokens, self.sequences, self.tile_tokens, each=None if self.paged else self.longest)

    def pieces(self, keys: int) -> int:
        """Pages of a block of `keys`; 1 also for a block that is a part of a page, or a page that divides no block."""
        fits = self.page_size < keys and keys % self.page_size == 0
        return keys // self.page_size if fits else 1

    def smem(self, tiles: Tiles) -> int:
        """Shared memory of a block: what streams, the queries twice, the results in float32, barriers, alignment."""
        stream = 2 * tiles.stages * tiles.keys * (self.dim * self.itemsize + 4 * self.quantised)
        widened = 2 * tiles.keys * self.dim * 2 if self.quantised else 0
        return stream + widened + ROWS * (2 * self.dim * 2 + self.dim * 4 + STATISTIC * 4) + 4096


def tiles(phase: str, **call) -> Tiles:
    """What `forward` takes when it is given no tiles; `call` as for `unsupported`."""
    del phase
    return Tiles.default(Problem.of(**call))


_tiles = tiles


def candidates(phase: str, **call) -> Iterator[Tiles]:
    """The default, then other blocks, stages and splits that the chip's shared memory allows."""
    problem, default = Problem.of(**call), tiles(phase, **call)
    changes = [{}, {"keys": 128, "stages": 2}, {"stages": 3}, {"stages": 2}]
    changes += [{"splits": default.splits * 2}, {"splits": default.splits // 2}]
    found = dict.fromkeys(dataclasses.replace(default, **change) for change in changes)
    yield from (tiles for tiles in found if tiles.allowed(problem))


def memory(phase: str, tiles: Tiles, **call) -> int:
    """Bytes of shared memory that a block is estimated to take."""
    del phase
    return Problem.of(**call).smem(tiles)


def unsupported(query, key, value, lengths, *, scale: float, logits_soft_cap=None, **others) -> str | None:
    """Why this kernel cannot serve these operands on the current chip, in one sentence, or None."""
    del value, scale, logits_soft_cap
    if reason := no_wgmma():
        return reason
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query must be bfloat16 or float16, got {jnp.dtype(query.dtype).name}"
    p = Problem.of(query, key, lengths, **others)
    if p.dim % 64 or p.dim > 256:
        return f"the head size must be a multiple of 64, at most 256, got {p.dim}"
    step = (
        32 if p.quantised and p.paged else 8
    )  # the scales of a page are copied to 128 bytes of shared memory, or more
    if p.page_size % step:
        what = "page_size" if p.paged else "the cache's length"
        return f"{what} must be a multiple of {step} for {jnp.dtype(key.dtype).name}, got {p.page_size}"
    if not Tiles.default(p).allowed(p):
        return f"no tiles fit {chips.current('gpu').smem_bytes} bytes of shared memory with heads of {p.dim}"
    if max(p.cut.count, p.head_blocks) > 65535:
        return f"the grid is limited to 65535 tiles of tokens and key heads, got {p.cut.count} and {p.head_blocks}"
    return None


def _product(lhs, rhs):
    """The float32 product, in registers."""

    def body(acc):
        plgpu.wgmma(acc, lhs, rhs)
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC((lhs.shape[0], rhs.shape[1]), jnp.float32))


def _rows(x, shape):
    """One number per row."""
    return lax.broadcast_in_dim(x, shape, [0])


def _partial(p: Problem, t: Tiles, operands: dict, left, factor: float, cap, dtype, out_dtype):
    """(out [splits, tokens, K, G, dim], statistic [splits, tokens, K, G, 32]): what each split of the keys gives."""
    keys, stages = t.keys, t.stages
    pieces = p.pieces(keys)
    piece = keys // pieces
    per_page = -(-p.page_size // keys) if pieces == 1 else 1  # blocks of a page
    width = p.dim if p.dim <= 128 else 64  # of one rescaled product: [64, 256] twice would not fit the registers
    columns_of = [pl.ds(start, width) for start in range(0, p.dim, width)]
    names = (*operands, "out", "statistic")
    heads_here = min(p.per_group, ROWS)
    shape = (ROWS, keys)

    def body(*arrays, **memory):
        refs = dict(zip(names, arrays, strict=True)) | memory
        split, head_block, tile = (lax.axis_index(name) for name in ("split", "head", "tile"))
        group = lax.div(head_block, jnp.int32(p.head_chunks))
        head = pl.ds(lax.rem(head_block, jnp.int32(p.head_chunks)) * ROWS, heads_here)

        start = (lambda b: refs["query_starts"][b]) if p.paged else (lambda b: b)
        work = p.cut.work(tile, start, lambda b: refs["lengths"][b], p.most_keys, left)
        sequence, first, end, place, length, first_key, last_key = work

        def block_of(key):
            if pieces > 1:
                return lax.div(key, jnp.int32(keys))
            page = lax.div(key, jnp.int32(p.page_size))
            return page * per_page + lax.div(key - page * p.page_size, jnp.int32(keys))

        low = block_of(first_key)
        high = jnp.where(last_key > 0, block_of(jnp.maximum(last_key - 1, 0)) + 1, low)
        share = lax.div(high - low + t.splits - 1, jnp.int32(t.splits))
        begin = jnp.minimum(low + split * share, high)
        finish = jnp.minimum(begin + share, high)

        def place_of(block):
            """(page within the sequence, first key within the page)."""
            if pieces > 1:
                return block * pieces, 0
            page = lax.div(block, jnp.int32(per_page))
            return page, (block - page * per_page) * keys

        def consumer():
            plgpu.barrier_wait(refs["asked"])
            # The copies of the heads of each token could not tile their rows.
            refs["query_tile"][...] = plgpu.load(refs["queries"], layout=WGMMA, optimized=False)
            plgpu.commit_smem()
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA.reduce(1))
            position = place + lax.shift_right_logical(row, jnp.full_like(row, p.stride.bit_length() - 1))

            def step(block, carry):
                accs, top, total = carry
                slot = lax.rem(block - begin, stages)
                page, offset = place_of(block)
                base = page * p.page_size + offset
                plgpu.barrier_wait(refs["ready"].at[slot])
                key, value = refs["keys"].at[slot], refs["values"].at[slot]
                if p.quantised:
                    for narrow, wide in ((key, refs["wide_key"]), (value, refs["wide_value"])):
                        wide[...] = plgpu.load(narrow, layout=WGMMA, optimized=False).astype(dtype)
                    key, value = refs["wide_key"], refs["wide_value"]
                    plgpu.commit_smem()

                @pl.when(base + keys > length)
                def _():  # zero times NaN is NaN
                    number = plgpu.broadcasted_iota(jnp.int32, (keys, p.dim), 0, layout=WGMMA)
                    found = plgpu.load(value, layout=WGMMA, optimized=False)
                    value[...] = jnp.where(number < length - base, found, jnp.zeros_like(found))
                    plgpu.commit_smem()

                s = _product(refs["query_tile"], key.T)
                column_scales = lambda name: lax.broadcast_in_dim(
                    plgpu.load(refs[name].at[slot], layout=WGMMA.reduce(0), optimized=False), shape, [1]
                )
                if p.quantised:
                    s = s * column_scales("key_factors")
                if cap is None:
                    x = s * factor
                else:
                    # tanh x = 1 - 2 / (1 + exp 2x): the hardware's tanh is wrong by 2⁻¹¹, which the cap would multiply.
                    root = lax.rsqrt(1 + jnp.exp2(s * (2 * factor / cap)))
                    x = (1 - 2 * (root * root)) * (cap * LOG2E)
                column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
                limit = position - base
                if pieces == 1 and p.page_size % keys:
                    limit = jnp.minimum(limit, p.page_size - 1 - offset)
                seen = column <= _rows(limit, shape)
                if left is not None:
                    seen = seen & (column >= _rows(position - left - base, shape))
                x = jnp.where(seen, x, -jnp.inf)
                higher = jnp.maximum(top, x.max(axis=1))
                alpha = jnp.exp2(top - higher)
                weight = jnp.exp2(x - _rows(higher, shape))
                total = total * alpha + weight.sum(axis=1)
                if p.quantised:
                    weight = jnp.where(seen, weight * column_scales("value_factors"), 0.0)
                weight = weight.astype(dtype)
                scaled = []
                for acc, columns in zip(accs, columns_of, strict=True):
                    new = _product(weight, value.at[:, columns])
                    scaled.append(acc * _rows(alpha, acc.shape) + new)
                plgpu.commit_smem()  # orders the loads before the copies that overwrite what they read
                plgpu.barrier_arrive(refs["free"].at[slot])
                return tuple(scaled), higher, total

            constant = lambda number: plgpu.layout_cast(jnp.full((ROWS,), number, jnp.float32), WGMMA.reduce(1))
            zeros = tuple(plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), WGMMA) for _ in columns_of)
            top, total = constant(LOWEST), constant(0.0)
            if "sinks" in operands:  # a key without a value that the first split has seen
                sink = plgpu.load(refs["sinks"].at[head_block], layout=WGMMA.reduce(1), optimized=False)
                top = jnp.maximum(sink, LOWEST)
                total = jnp.exp2(sink - top) * constant(lax.select(split == 0, jnp.float32(1), jnp.float32(0)))
            accs, top, total = lax.fori_loop(begin, finish, step, (zeros, top, total))
            inverse = jnp.where(total > 0, 1 / total, 0.0)
            lse = jnp.where(total > 0, (top + jnp.log2(total)) * LN2, -jnp.inf)
            for acc, columns in zip(accs, columns_of, strict=True):
                refs["result"][:, columns] = (acc * _rows(inverse, acc.shape)).astype(out_dtype)
            refs["row_statistic"][...] = _rows(lse, (ROWS, STATISTIC))
            plgpu.commit_smem()

            def write(n, _):
                here, there = pl.ds(n * p.stride, heads_here), (split, first + n, group, head)
                plgpu.copy_smem_to_gmem(refs["result"].at[here], refs["out"].at[there])
                plgpu.copy_smem_to_gmem(refs["row_statistic"].at[here], refs["statistic"].at[there])

            lax.fori_loop(0, jnp.maximum(end - first, 0), write, None)
            plgpu.wait_smem_to_gmem(0)

        def producer():
            for n in range(p.tile_tokens):
                token = jnp.minimum(first + n, p.tokens - 1)
                plgpu.copy_gmem_to_smem(
                    refs["query"].at[token, group, head],
                    refs["queries"].at[pl.ds(n * p.stride, heads_here)],
                    refs["asked"],
                )

            def load(block, _):
                slot = lax.rem(block - begin, stages)
                pl.when(block - begin >= stages)(lambda: plgpu.barrier_wait(refs["free"].at[slot]))
                number, offset = place_of(block)
                for n in range(pieces):
                    page, here = sequence, pl.ds(n * piece, piece)
                    if p.paged:
                        page = refs["page_table"][sequence, jnp.minimum(number + n, p.most_pages - 1)]
                        page = jnp.clip(page, 0, p.pages - 1)
                    rows = pl.ds(offset, piece)
                    for source, tiles in (("key", "keys"), ("value", "values")):
                        plgpu.copy_gmem_to_smem(
                            refs[source].at[page, rows, group], refs[tiles].at[slot, here], refs["ready"].at[slot]
                        )
                        if p.quantised:
                            plgpu.copy_gmem_to_smem(
                                refs[f"{source}_scales"].at[page, group, rows],
                                refs[f"{source}_factors"].at[slot, here],
                                refs["ready"].at[slot],
                            )

            lax.fori_loop(begin, finish, load, None)

        thread = lax.axis_index("thread")
        pl.when(thread == 0)(consumer)
        pl.when(thread == 1)(producer)

    plain = lambda kind, *shape: plgpu.SMEM(shape, kind)
    scratch: dict[str, Any] = {
        "queries": plain(dtype, ROWS, p.dim),
        "query_tile": smem(dtype, ROWS, p.dim),
        "result": plain(out_dtype, ROWS, p.dim),
        "row_statistic": plain(jnp.float32, ROWS, STATISTIC),
        "asked": plgpu.Barrier(num_arrivals=p.tile_tokens),
        "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=pieces * (4 if p.quantised else 2)),
        "free": plgpu.Barrier(num_barriers=stages),
    }
    for name in ("key", "value"):
        if p.quantised:
            scratch[f"{name}s"] = plain(jnp.int8, stages, keys, p.dim)
            scratch[f"wide_{name}"] = smem(dtype, keys, p.dim)
            scratch[f"{name}_factors"] = plain(jnp.float32, stages, keys)
        else:
            scratch[f"{name}s"] = smem(dtype, stages, keys, p.dim)
    per_row = (t.splits, p.tokens, p.groups, p.per_group)
    return plgpu.kernel(
        body,
        kernel_name="decode_attention",
        out_type=[
            jax.ShapeDtypeStruct((*per_row, p.dim), out_dtype),
            jax.ShapeDtypeStruct((*per_row, STATISTIC), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(t.splits, p.head_blocks, p.cut.count),
        grid_names=("split", "head", "tile"),
        num_threads=2,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands.values())


def _merged(out, lse):
    """Σ_s w_s out_s / Σ_s w_s,  w_s = exp(lse_s), over the splits: spelt out, so that it is one elementwise pass."""
    parts = range(out.shape[0])
    top = functools.reduce(jnp.maximum, [lse[s] for s in parts])
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = [jnp.exp(lse[s] - safe) for s in parts]
    total = functools.reduce(jnp.add, weights)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    merged = functools.reduce(jnp.add, [w * out[s] for s, w in zip(parts, weights, strict=True)])
    return merged / total, jnp.where(some, safe + jnp.log(total), -jnp.inf)


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
    operands = {
        "query": pad_to(query.reshape(p.tokens, p.groups, p.real_per_group, p.dim), 2, p.per_group),
        "key": key,
        "value": value,
        "lengths": lengths,
        "page_table": page_table,
        "query_starts": query_starts,
    }
    if key_scales is not None and value_scales is not None:
        operands |= {"key_scales": key_scales.astype(jnp.float32), "value_scales": value_scales.astype(jnp.float32)}
    if sinks is not None:  # for every row of a tile
        per_head = (sinks.astype(jnp.float32) * LOG2E).reshape(p.groups, p.real_per_group)
        per_head = pad_to(per_head, 1, p.head_chunks * p.stride).reshape(p.head_blocks, p.stride)
        operands["sinks"] = jnp.tile(per_head, (1, ROWS // p.stride))
    given = {name: x for name, x in operands.items() if x is not None}
    out_dtype = query.dtype if t.splits == 1 else jnp.float32
    out, lse = _partial(p, t, given, left, scale * LOG2E, logits_soft_cap, query.dtype, out_dtype)
    out, lse = _merged(out, lse[..., :1]) if t.splits > 1 else (out[0], lse[0, ..., :1])
    out, lse = (x[:, :, : p.real_per_group] for x in (out, jnp.where(jnp.isneginf(lse), jnp.inf, lse)))
    return (out.astype(query.dtype).reshape(query.shape), lse.reshape(query.shape[:-1])), ()
