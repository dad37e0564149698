"""Flash attention on Hopper GPUs, forward and backward: warpgroup matrix products fed by TMA.

    x = scale · q kᵀ    x = cap · tanh(x / cap)    x = x + bias    x = -inf where masked        (each where given)
    lse = log(Σ_j exp(x_ij) + exp(sink))    p = exp(x - lse)    out = p v
    dv = pᵀ dout    dx = p ∘ (dout vᵀ - delta)    delta = Σ_dim out ∘ dout
    ds = dx ∘ (1 - tanh²)    dq = scale · ds k    dk = scale · dsᵀ q    dbias = dx    dsink = -Σ exp(sink - lse) · delta

query, out [batch, queries, heads, dim]; key, value [batch, keys, kv_heads, dim]; lse [batch, heads, queries], float32.
After FlashAttention-3 (Shah et al., 2024): two consumer warpgroups of 64 rows each take turns at the tensor cores, one
producer warpgroup streams tiles through shared memory. Exponents are of base two with the scale folded in.

The kernels are written so that the interpreter runs the very text that the compiler compiles:
- An accumulator starts from what would be added to the product anyway (acc · alpha, -delta), not from zeros that cost
  as much as half the addition. A product that only accumulates keeps its accumulator for the loop.
- Both warpgroups observe every phase of every barrier, also for tiles that only the other one needs.
- Ragged edges are left to the copies, which read zeros and drop writes out of bounds.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips, tuned
from pallas_kernels.masks import Band
from pallas_kernels.padding import pad_to, round_up

LOG2E = math.log2(math.e)
LN2 = math.log(2)
ROWS = 64  # rows of one warpgroup: the height of a wgmma
CONSUMERS = 2
BLOCK = ROWS * CONSUMERS
LOWEST = float(jnp.finfo(jnp.float32).min)  # a running maximum that is never -inf, so that no row computes -inf - -inf
WGMMA = plgpu.Layout.WGMMA
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
WHOLE, MASKED, SKIPPED = "whole", "masked", "skipped"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Columns of one step: `keys` (forward), `keys_dq` (dq), `queries_dkv` (dk, dv). So many `stages` are in flight."""

    keys: int
    keys_dq: int
    queries_dkv: int
    stages: int = 2
    stages_backward: int = 2

    @staticmethod
    def default(dim: int, extras: bool = False) -> "Tiles":
        """`extras`: a soft cap, segments, a bias or a mask."""
        # A thread has 240 registers for the float32 tile of scores, its 16-bit copy and one or two [64, dim]
        # accumulators; within that, wide tiles amortise the barriers. Extras hold one more number per score.
        if dim > 128:
            # Least tiles; two stages of the backward would not fit shared memory.
            return Tiles(keys=64, keys_dq=64, queries_dkv=64, stages_backward=1)
        if dim == 128:
            return Tiles(keys=64 if extras else 128, keys_dq=64, queries_dkv=64)
        return Tiles(keys=128, keys_dq=64, queries_dkv=64) if extras else Tiles(keys=256, keys_dq=128, queries_dkv=128)

    def smem_bytes(self, phase: str, dim: int, itemsize: int) -> int:
        """Shared memory of a block of `phase`, the most of its kernels: what stays, what streams, then statistics,
        barriers and alignment."""
        row = 2 * dim * itemsize  # of query and dout, or of key and value
        if phase == "forward":
            return BLOCK * row // 2 + self.stages * self.keys * row + 4096
        widest = max(self.keys_dq, self.queries_dkv)
        return BLOCK * row + self.stages_backward * widest * (row + 8) + 4096

    def allowed(self, phase: str, dim: int, itemsize: int, extras: bool) -> bool:
        """Whether copies and products take these sizes, and everything fits shared memory; registers are not counted.

        Extras are padded to multiples of 256, which their tiles have to divide.
        """
        sizes = (self.keys,) if phase == "forward" else (self.keys_dq, self.queries_dkv)
        stages = self.stages if phase == "forward" else self.stages_backward
        if any(not 64 <= size <= 256 or size % 64 or (extras and 256 % size) for size in sizes) or stages < 1:
            return False
        if phase == "backward" and self.queries_dkv > BLOCK:  # lse and delta are padded to whole blocks
            return False
        return self.smem_bytes(phase, dim, itemsize) <= chips.current("gpu").smem_bytes


def _extras(bias=None, mask=None, query_segment_ids=None, logits_soft_cap=None, **others) -> bool:
    """Whether a score carries more than the product: a soft cap, segments, a bias or a mask."""
    del others
    return any(x is not None for x in (bias, mask, query_segment_ids, logits_soft_cap))


def _shape_class(query, key, *, is_causal: bool, local_window_size=None, **call) -> dict[str, int | str]:
    """What the best tiles depend on."""
    band = Band.of(is_causal, local_window_size)
    kind = "open" if band.open else "causal" if band == Band(None, 0) else "banded"
    return {
        "kind": f"{kind} extras" if _extras(**call) else kind,
        "head_dim": str(round_up(query.shape[-1], 64)),
        "group": query.shape[2] // key.shape[2],
        "queries": query.shape[1],
        "keys": key.shape[1],
    }


def tiles(phase: str, query, key, value, **call) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; `call` as for `unsupported`."""
    del value
    dim, itemsize, extras = round_up(query.shape[-1], 64), query.dtype.itemsize, _extras(**call)
    return tuned.choose(
        f"gpu.attention.{phase}",
        chips.current("gpu"),
        _shape_class(query, key, **call),
        jnp.dtype(query.dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(phase, dim, itemsize, extras),
        Tiles.default(dim, extras),
    )


_tiles = tiles  # where an argument has this name


def candidates(phase: str, query, key, value, **call) -> Iterator[Tiles]:
    """Tiles worth trying that the chip's shared memory allows: the default first, then blocks of 128.

    Some will not fit the registers: only the compiler knows.
    """
    del key, value
    dim, itemsize, extras = round_up(query.shape[-1], 64), query.dtype.itemsize, _extras(**call)
    default = Tiles.default(dim, extras)
    if phase == "forward":
        changes = [{"keys": keys, "stages": stages} for keys in (128, 64, 192, 256) for stages in (2, 3, 4)]
    else:
        changes = [
            {"keys_dq": keys, "queries_dkv": queries, "stages_backward": stages}
            for keys, queries, stages in itertools.product((128, 64, 192), (128, 64), (2, 1, 3))
        ]
    found = dict.fromkeys([default, *(dataclasses.replace(default, **change) for change in changes)])
    yield from (tiles for tiles in found if tiles.allowed(phase, dim, itemsize, extras))


def memory(phase: str, tiles: Tiles, query, key, value, **call) -> int:
    """Bytes of shared memory that a block of `phase` is estimated to take."""
    del key, value, call
    return tiles.smem_bytes(phase, round_up(query.shape[-1], 64), query.dtype.itemsize)


def unsupported(
    query,
    key,
    value,
    *,
    scale: float,
    is_causal: bool,
    local_window_size=None,
    logits_soft_cap=None,
    bias=None,
    **others,
) -> str | None:
    """Why these kernels cannot serve these operands on the current chip, in one sentence, or None.

    `others` are the optional operands that are served whatever they are: mask, lengths, segments, sinks.
    """
    del is_causal, local_window_size
    for name in ("prefix_lengths", "alibi_slopes", "dropout_rows", "score_mod", "mask_mod"):
        if others.get(name) is not None:
            return f"{name} is not served by this kernel yet"
    if value.shape[3] != query.shape[3]:
        return f"the head size of value must be that of query, {query.shape[3]}, got {value.shape[3]}"
    chip = chips.current("gpu")
    if chip.capability != (9, 0):
        capability = ".".join(map(str, chip.capability))
        return f"the kernel needs wgmma, which only GPUs of compute capability 9.0 have, not {capability} ({chip.name})"
    dtypes = [jnp.dtype(x.dtype) for x in (query, key, value)]
    if dtypes[0] not in (jnp.bfloat16, jnp.float16) or len(set(dtypes)) > 1:
        return f"query, key and value must share bfloat16 or float16, got {', '.join(x.name for x in dtypes)}"
    if query.shape[-1] > 256:
        return f"the head dimension must be at most 256, got {query.shape[-1]}"
    if not (math.isfinite(scale) and scale > 0):
        return f"scale must be positive and finite, got {scale}"
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        return f"logits_soft_cap must be positive, got {logits_soft_cap}"
    if bias is not None and bias.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"bias must be bfloat16, float16 or float32, got {bias.dtype}"
    if max(query.shape[0], pl.cdiv(query.shape[1], BLOCK), pl.cdiv(key.shape[1], BLOCK)) > 65535:
        return f"the grid is limited to 65535 batches and blocks of {BLOCK} rows, got {query.shape} and {key.shape}"
    return None


# ---- what all kernels share ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The operands as the kernels take them, and what is known before any number is seen.

    `terms` are added to the scores: [batch or 1, heads or 1, queries or 1, keys or 1], padded to whole tiles.
    """

    operands: dict[str, jax.Array]
    terms: list[jax.Array]
    scale: float
    band: Band
    cap: float | None
    dim: int  # before padding
    tiles: Tiles

    @staticmethod
    def of(
        query, key, value, scale, is_causal, local_window_size, logits_soft_cap, tiles, *, bias=None, mask=None,
        query_seq_lengths=None, key_value_seq_lengths=None, query_segment_ids=None, key_value_segment_ids=None,
        sinks=None,
    ) -> "_Problem":  # fmt: skip
        T, S, dim = query.shape[1], key.shape[1], query.shape[-1]
        padded = round_up(dim, 64)
        operands = {name: pad_to(x, 3, padded) for name, x in {"query": query, "key": key, "value": value}.items()}
        if query_seq_lengths is not None:
            operands["query_lengths"] = jnp.clip(query_seq_lengths.astype(jnp.int32), 0, T)
        if key_value_seq_lengths is not None:
            operands["key_lengths"] = jnp.clip(key_value_seq_lengths.astype(jnp.int32), 0, S)
        if query_segment_ids is not None:
            operands["query_segments"] = _whole_tiles(query_segment_ids.astype(jnp.int32), 1)
            operands["key_segments"] = _whole_tiles(key_value_segment_ids.astype(jnp.int32), 1)
        if sinks is not None:
            operands["sinks"] = sinks.astype(jnp.float32) * LOG2E
        terms = [bias] if bias is not None else []
        if mask is not None:
            terms.append(jnp.where(mask, 0.0, -jnp.inf).astype(query.dtype))
        band = Band.of(is_causal, local_window_size)
        left, right = band.left, band.right  # sides that cut nothing are open; no number may overflow
        band = Band(
            None if left is None or left >= T else max(left, -S),
            None if right is None or right >= S else max(right, -T),
        )
        return _Problem(
            operands,
            [_term(x) for x in terms],
            float(scale),
            band,
            logits_soft_cap,
            dim,
            tiles,
        )

    @property
    def shape(self):
        """(batch, queries, keys, heads, kv_heads, padded dim)"""
        (B, T, N, H), (_, S, K, _) = self.operands["query"].shape, self.operands["key"].shape
        return B, T, S, N, K, H

    @property
    def dtype(self):
        return self.operands["query"].dtype

    def exponents(self, s, terms):
        """(x, factor, tanh): the base-two exponents of the scores are x · factor; tanh is the soft cap's, or None."""
        factor, tanh = self.scale * LOG2E, None
        if self.cap is not None:
            # tanh x = 1 - 2 / (1 + exp 2x): the hardware's tanh is wrong by 2⁻¹¹, which the cap would multiply. The
            # reciprocal is a squared rsqrt, because a division costs a subroutine.
            root = lax.rsqrt(1 + jnp.exp2(s * (2 * factor / self.cap)))
            tanh = 1 - 2 * (root * root)
            s, factor = tanh * (self.cap * LOG2E), 1.0
        if terms:
            s, factor = s * factor + functools.reduce(operator.add, terms) * LOG2E, 1.0
        return s, factor, tanh


def _whole_tiles(x, axis):
    return pad_to(x, axis, round_up(x.shape[axis], 256))  # 256: the widest tile


def _term(x):
    if x.shape[2:] == (1, 1):
        x = jnp.broadcast_to(x, (*x.shape[:3], 256))
    for axis in (2, 3):
        x = _whole_tiles(x, axis) if x.shape[axis] > 1 else x
    return x


def _products(*pairs):
    """The float32 products of (lhs, rhs) pairs, or (lhs, rhs, start) for start + product, issued together."""

    def body(*accs):
        for acc, (_, _, *start) in zip(accs, pairs, strict=True):
            if start:
                acc[...] = start[0]
        for acc, (lhs, rhs, *_) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, lhs, rhs)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(body, *(plgpu.ACC((lhs.shape[0], rhs.shape[1]), jnp.float32) for lhs, rhs, *_ in pairs))


def _down(x, shape):
    """One number per row."""
    return lax.broadcast_in_dim(x, shape, [0])


def _across(x, shape):
    """One number per column."""
    return lax.broadcast_in_dim(x, shape, [1])


def _load_rows(ref):
    return plgpu.load(ref, layout=WGMMA.reduce(1), optimized=False)


def _load_columns(ref):
    return plgpu.load(ref, layout=WGMMA.reduce(0), optimized=False)


def _load_term(ref, batch, head, rows, columns, shape):
    """The tile [rows, columns] of an added term, of which any axis may be 1."""
    b, n, r, c = ref.shape
    ref = ref.at[batch if b > 1 else 0, head if n > 1 else 0]
    if r == 1:
        tile = _across(_load_columns(ref.at[0, columns]).astype(jnp.float32), shape)
    elif c == 1:
        tile = _down(_load_rows(ref.at[rows, 0]).astype(jnp.float32), shape)
    else:
        tile = plgpu.load(ref.at[rows, columns], layout=WGMMA, optimized=False).astype(jnp.float32)
    return tile


def _seen(shape, band, first, offset, last, segments):
    """Which of rows first + r see which of columns offset + c ≤ last: by band, end (None: no end) and equal segments.

    `segments` is None or (one per row, one per column). Costs about three instructions per score and condition.
    """
    columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    row = lambda side: plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA.reduce(1)) + (first + side - offset)
    conditions = []
    if band.right is not None:
        limit = row(band.right)
        conditions.append(columns <= _down(limit if last is None else jnp.minimum(limit, last - offset), shape))
    elif last is not None:
        conditions.append(columns <= last - offset)
    if band.left is not None:
        conditions.append(columns >= _down(row(-band.left), shape))
    if segments is not None:
        conditions.append(_down(segments[0], shape) == _across(segments[1], shape))
    return functools.reduce(operator.and_, conditions)


def _div(a, b):
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def _clip(x, low, high):
    return max(low, min(x, high)) if all(isinstance(v, int) for v in (x, low, high)) else lax.max(low, lax.min(x, high))


def _tiles_touched(band, first, rows, columns, tile):
    """[start, end): the tiles of columns that any of rows first … first + rows - 1 sees."""
    start, end = band.touched(first, rows, columns)
    start, end = _div(start, tile), _div(end + tile - 1, tile)
    return start, (end if isinstance(start, int) and start == 0 else lax.max(start, end))


def _sections(band, first, rows, block, columns, tile, *, ragged, segmented, wide):
    """[(begin, end, kind)]: the tiles `block` = [start, end) as rows first … first + rows - 1 go through them.

    `ragged`: the last tile holds columns past the end. `segmented`: any tile may be cut. `wide`: a loop of its own for
    tiles without a mask would not fit the registers.
    """
    start, end = block
    open_left, open_right = band.left is None, band.right is None
    mine = _tiles_touched(band, first, rows, columns, tile)
    skip_left, skip_right = (rows < BLOCK and not side for side in (open_left, open_right))
    mine_start = _clip(mine[0], start, end) if skip_left else start
    mine_end = _clip(mine[1], mine_start, end) if skip_right else end
    whole = band.whole(first, rows, columns)
    whole_start = mine_start if open_left else _clip(_div(whole[0] + tile - 1, tile), mine_start, mine_end)
    whole_end = mine_end if open_right and not ragged else _clip(_div(whole[1], tile), whole_start, mine_end)
    sections = [(start, mine_start, SKIPPED)] if skip_left else []
    if segmented or (wide and (ragged or not band.open)):
        sections += [(mine_start, mine_end, MASKED)]
    else:
        sections += [] if open_left else [(mine_start, whole_start, MASKED)]
        sections += [(whole_start, whole_end, WHOLE)]
        sections += [(whole_end, mine_end, MASKED)] if ragged or not open_right else []
    return sections + ([(mine_end, end, SKIPPED)] if skip_right else [])


def _go_through(sections, step, skip, carry):
    for begin, end, kind in sections:
        if kind == SKIPPED:
            lax.fori_loop(begin, end, skip, None)
        else:
            carry = lax.fori_loop(begin, end, functools.partial(step, masked=kind == MASKED), carry)
    return carry


class _Refs:
    """Operands, results and scratch memory of a kernel, by name."""

    def __init__(self, **refs):
        self.__dict__.update(refs)

    def terms(self, batch, head, rows, columns, shape):
        names = sorted(name for name in self.__dict__ if name.startswith("term"))
        return [_load_term(self.__dict__[name], batch, head, rows, columns, shape) for name in names]


def _launch(kernel, name, operands, terms, results, scratch, grid):
    """`kernel(refs)` returns what a consumer warpgroup (given its number) and the producer do."""
    operands = operands | {f"term{i}": x for i, x in enumerate(terms)}
    names = (*operands, *results)

    def body(*refs, **memory):
        consumer, producer = kernel(_Refs(**dict(zip(names, refs, strict=True)), **memory))
        group = lax.axis_index("group")

        @pl.when(group < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            consumer(group)

        @pl.when(group == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            producer()

    arrays = plgpu.kernel(
        body,
        kernel_name=name,
        out_type=list(results.values()),
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands.values())
    return dict(zip(results, arrays, strict=True))


def _smem(dtype, *shape):
    return plgpu.SMEM(shape, dtype, transforms=TILED)


def _barriers(stages, arrivals=1):
    return plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals)


# ---- forward -------------------------------------------------------------------------------------------------------


def _forward(problem: _Problem):
    """(out, lse), out with the padded dim, lse of base e over whole blocks of queries."""
    B, T, S, N, K, H = problem.shape
    band, keys, operands, dtype = problem.band, problem.tiles.keys, problem.operands, problem.dtype
    stages, query_tiles = min(problem.tiles.stages, pl.cdiv(S, keys)), pl.cdiv(T, BLOCK)
    ragged, segmented = S % keys != 0 or "key_lengths" in operands, "query_segments" in operands
    sunk = "sinks" in operands
    width = H if H <= 128 else 64  # of one rescaled product: [64, 256] twice would not fit the registers
    pieces = [pl.ds(start, width) for start in range(0, H, width)]

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block_first = (query_tiles - 1 - lax.axis_index("tile")) * BLOCK  # the longest rows first
        key_end = refs.key_lengths[batch] if "key_lengths" in operands else S
        query_end = refs.query_lengths[batch] if "query_lengths" in operands else None
        block = _tiles_touched(band, block_first, BLOCK, key_end, keys)
        if query_end is not None:
            block = block[0], lax.select(block_first < query_end, jnp.int32(block[1]), jnp.int32(block[0]))

        def consumer(group):
            first = block_first + group * ROWS
            rows = pl.ds(first, ROWS)
            query = refs.query_tile.at[group]
            plgpu.copy_gmem_to_smem(refs.query.at[batch, rows, head], query, refs.query_ready.at[group])
            row_segments = _load_rows(refs.query_segments.at[batch, rows]) if segmented else None
            plgpu.barrier_wait(refs.query_ready.at[group])

            def swap_turns():  # the other warpgroup's products run under this one's softmax
                plgpu.barrier_arrive(refs.turn)
                plgpu.barrier_wait(refs.turn)

            def step(j, carry, masked):
                accs, top, total = carry
                slot, columns, shape = lax.rem(j - block[0], stages), pl.ds(j * keys, keys), (ROWS, keys)
                plgpu.barrier_wait(refs.key_ready.at[slot])

                def scores(acc):
                    plgpu.wgmma(acc, query, refs.key_tiles.at[slot].T)
                    extras = refs.terms(batch, head, rows, columns, shape)  # loaded while the product runs
                    segments = None
                    if segmented:
                        segments = row_segments, _load_columns(refs.key_segments.at[batch, columns])
                    swap_turns()
                    return acc[...], extras, segments

                s, extras, segments = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(refs.key_free.at[slot])
                x, factor, _ = problem.exponents(s, extras)
                if masked:
                    seen = _seen(shape, band, first, j * keys, key_end - 1 if ragged else None, segments)
                    x = jnp.where(seen, x, -jnp.inf)
                higher = jnp.maximum(top, x.max(axis=1) * factor)
                alpha = jnp.exp2(top - higher)
                p = jnp.exp2(x * factor - _down(higher, shape))
                total = total * alpha + p.sum(axis=1)
                p = p.astype(dtype)
                plgpu.barrier_arrive(refs.turn)
                plgpu.barrier_wait(refs.value_ready.at[slot])
                plgpu.barrier_wait(refs.turn)
                scaled = []
                for acc, piece in zip(accs, pieces, strict=True):
                    scaled += _products((p, refs.value_tiles.at[slot, :, piece], acc * _down(alpha, acc.shape)))
                plgpu.barrier_arrive(refs.value_free.at[slot])
                return tuple(scaled), higher, total

            def skip(j, _):
                slot = lax.rem(j - block[0], stages)
                for ready, free in ((refs.key_ready, refs.key_free), (refs.value_ready, refs.value_free)):
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.barrier_arrive(free.at[slot])
                    swap_turns()

            row = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))
            zeros = tuple(plgpu.layout_cast(jnp.zeros((ROWS, piece.size), jnp.float32), WGMMA) for piece in pieces)
            # The sink is a key that was seen first and has no value.
            sink = jnp.maximum(refs.sinks[head], LOWEST) if sunk else LOWEST
            carry = zeros, row(sink), row(1.0 if sunk else 0.0)
            pl.when(group == 1)(swap_turns)
            sections = _sections(
                band, first, ROWS, block, key_end, keys, ragged=ragged, segmented=segmented, wide=H > 128
            )
            accs, top, total = _go_through(sections, step, skip, carry)
            pl.when(group == 0)(swap_turns)

            lse = (top + jnp.log2(total)) * LN2
            inverse = jnp.where(total > 0, 1 / total, 0.0)
            if not sunk:  # total is 0 for a row that sees nothing
                lse = jnp.where(total > 0, lse, jnp.inf)
            if query_end is not None:
                inside = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA.reduce(1)) < query_end - first
                inverse = jnp.where(inside, inverse, 0.0)
                lse = jnp.where(inside, lse, sink * LN2 if sunk else jnp.inf)
            for acc, piece in zip(accs, pieces, strict=True):
                query[:, piece] = (acc * _down(inverse, acc.shape)).astype(dtype)
            refs.lse_tile[group] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, refs.out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(refs.lse_tile.at[group], refs.lse.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(j, _):
                slot = lax.rem(j - block[0], stages)
                there = (batch, pl.ds(j * keys, keys), lax.div(head, jnp.int32(N // K)))
                for source, tiles, ready, free in (
                    (refs.key, refs.key_tiles, refs.key_ready, refs.key_free),
                    (refs.value, refs.value_tiles, refs.value_ready, refs.value_free),
                ):
                    pl.when(j - block[0] >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(source.at[there], tiles.at[slot], ready.at[slot])

            lax.fori_loop(block[0], block[1], load, None)

        return consumer, producer

    result = _launch(
        kernel,
        "attention_forward",
        operands,
        problem.terms,
        {
            "out": jax.ShapeDtypeStruct((B, T, N, H), dtype),
            "lse": jax.ShapeDtypeStruct((B, N, query_tiles * BLOCK), jnp.float32),
        },
        {
            "query_tile": _smem(dtype, CONSUMERS, ROWS, H),
            "lse_tile": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            "key_tiles": _smem(dtype, stages, keys, H),
            "value_tiles": _smem(dtype, stages, keys, H),
            "query_ready": _barriers(CONSUMERS),
            "key_ready": _barriers(stages),
            "value_ready": _barriers(stages),
            "key_free": _barriers(stages, CONSUMERS),
            "value_free": _barriers(stages, CONSUMERS),
            "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
        },
        (N, query_tiles, B),
    )
    return result["out"], result["lse"]


def forward(
    query, key, value, *, scale: float, is_causal: bool, local_window_size=None, logits_soft_cap: float | None = None,
    tiles: Tiles | None = None, **optional: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:  # fmt: skip
    """((out, lse), ()): see the head of this file. A row that sees nothing has out 0 and lse +inf, or the sink if any.

    `optional`: bias, mask, query_seq_lengths, key_value_seq_lengths, query_segment_ids, key_value_segment_ids, sinks.
    """
    band = {"is_causal": is_causal, "local_window_size": local_window_size}
    t = tiles or _tiles("forward", query, key, value, logits_soft_cap=logits_soft_cap, **band, **optional)
    problem = _Problem.of(query, key, value, scale, is_causal, local_window_size, logits_soft_cap, t, **optional)
    out, lse = _forward(problem)
    return (out[..., : problem.dim], lse[..., : query.shape[1]]), ()


# ---- backward: dk and dv; keys stay, the queries of every head of the group stream by ------------------------------


def _backward_kv(problem: _Problem, dout, lse, minus_delta, wanted: tuple[str, ...]):
    """{"key": dk, "value": dv} as far as `wanted`. Works on xᵀ = k qᵀ: pᵀ and dsᵀ are left operands as they are.

    lse is of base two and +inf for every query that attends to nothing, whole blocks of them.
    """
    B, T, S, N, K, H = problem.shape
    band, queries, dtype, heads = problem.band.transposed(), problem.tiles.queries_dkv, problem.dtype, N // K
    query_tiles = pl.cdiv(T, queries)
    stages = min(problem.tiles.stages_backward, query_tiles * heads)
    inputs = problem.operands | {"dout": dout, "lse": lse, "minus_delta": minus_delta}
    segmented = "query_segments" in inputs

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block_first = lax.axis_index("tile") * BLOCK
        query_end = query_tiles * queries
        if "query_lengths" in inputs:
            query_end = pl.cdiv(refs.query_lengths[batch], jnp.int32(queries)) * queries
        block = _tiles_touched(band, block_first, BLOCK, query_end, queries)
        if "key_lengths" in inputs:
            key_end = refs.key_lengths[batch]
            block = block[0], lax.select(block_first < key_end, jnp.int32(block[1]), jnp.int32(block[0]))
        per_head = block[1] - block[0]

        def consumer(group):
            first = block_first + group * ROWS
            rows = pl.ds(first, ROWS)
            here = (batch, rows, head)
            key, value = refs.key_tile.at[group], refs.value_tile.at[group]
            plgpu.copy_gmem_to_smem(refs.key.at[here], key, refs.key_value_ready.at[group])
            plgpu.copy_gmem_to_smem(refs.value.at[here], value, refs.key_value_ready.at[group])
            row_segments = _load_rows(refs.key_segments.at[batch, rows]) if segmented else None
            plgpu.barrier_wait(refs.key_value_ready.at[group])
            sections = _sections(
                band, block_first, BLOCK, block, query_end, queries, ragged=False, segmented=segmented, wide=H > 128
            )

            def accumulate(**sums):
                def per_member(member, _):
                    slot_of = lambda i: lax.rem(member * per_head + i - block[0], stages)

                    def step(i, _, masked):
                        slot, columns, shape = slot_of(i), pl.ds(i * queries, queries), (ROWS, queries)
                        plgpu.barrier_wait(refs.ready.at[slot])
                        column = lambda ref: _across(plgpu.load(ref.at[slot], layout=WGMMA.reduce(0)), shape)
                        query, dout = refs.query_tiles.at[slot], refs.dout_tiles.at[slot]
                        (s,) = _products((key, query.T))
                        extras = refs.terms(batch, head * heads + member, rows, columns, shape)
                        x, factor, tanh = problem.exponents(s, extras)
                        p = jnp.exp2(x * factor - column(refs.lse_tiles))
                        if masked:
                            segments = (
                                (row_segments, _load_columns(refs.query_segments.at[batch, columns]))
                                if segmented
                                else None
                            )
                            p = jnp.where(_seen(shape, band, first, i * queries, None, segments), p, 0.0)
                        weight = p if tanh is None else p * (1 - tanh * tanh)  # now: later, tanh would hold registers
                        if "value" in sums:
                            plgpu.wgmma(sums["value"], p.astype(dtype), dout)
                        if "key" in sums:
                            (dp,) = _products((value, dout.T, column(refs.minus_delta_tiles)))
                            ds = weight * dp
                            plgpu.wgmma(sums["key"], ds.astype(dtype), query)
                        plgpu.wgmma_wait(0)
                        plgpu.commit_smem()  # orders the loads of lse and delta before the copies that overwrite them
                        plgpu.barrier_arrive(refs.free.at[slot])

                    def skip(i, _):
                        plgpu.barrier_wait(refs.ready.at[slot_of(i)])
                        plgpu.barrier_arrive(refs.free.at[slot_of(i)])

                    _go_through(sections, step, skip, None)

                lax.fori_loop(0, heads, per_member, None)
                return {name: acc[...] for name, acc in sums.items()}

            sums = pl.run_scoped(accumulate, **{name: plgpu.ACC((ROWS, H), jnp.float32) for name in wanted})
            for name, tile in (("key", key), ("value", value)):
                if name in wanted:
                    total = sums[name] * problem.scale if name == "key" else sums[name]
                    if "key_lengths" in inputs:
                        inside = plgpu.broadcasted_iota(jnp.int32, (ROWS, H), 0, layout=WGMMA) < key_end - first
                        total = jnp.where(inside, total, 0.0)
                    tile[...] = total.astype(dtype)
            plgpu.commit_smem()
            for name, tile in (("key", key), ("value", value)):
                if name in wanted:
                    plgpu.copy_smem_to_gmem(tile, getattr(refs, f"d{name}").at[here])
            plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(n, _):
                slot = lax.rem(n, stages)
                rows, one = (
                    pl.ds((block[0] + lax.rem(n, per_head)) * queries, queries),
                    head * heads + lax.div(n, per_head),
                )
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
                for source, tiles in (
                    (refs.query.at[batch, rows, one], refs.query_tiles),
                    (refs.dout.at[batch, rows, one], refs.dout_tiles),
                    (refs.lse.at[batch, one, rows], refs.lse_tiles),
                    (refs.minus_delta.at[batch, one, rows], refs.minus_delta_tiles),
                ):
                    plgpu.copy_gmem_to_smem(source, tiles.at[slot], refs.ready.at[slot])

            lax.fori_loop(0, per_head * heads, load, None)

        return consumer, producer

    result = _launch(
        kernel,
        "attention_backward_" + "_".join(wanted),
        inputs,
        [x.swapaxes(2, 3) for x in problem.terms],
        {f"d{name}": jax.ShapeDtypeStruct((B, S, K, H), dtype) for name in wanted},
        {
            "key_tile": _smem(dtype, CONSUMERS, ROWS, H),
            "value_tile": _smem(dtype, CONSUMERS, ROWS, H),
            "query_tiles": _smem(dtype, stages, queries, H),
            "dout_tiles": _smem(dtype, stages, queries, H),
            "lse_tiles": plgpu.SMEM((stages, queries), jnp.float32),
            "minus_delta_tiles": plgpu.SMEM((stages, queries), jnp.float32),
            "key_value_ready": _barriers(CONSUMERS, 2),
            "ready": _barriers(stages, 4),
            "free": _barriers(stages, CONSUMERS),
        },
        (K, pl.cdiv(S, BLOCK), B),
    )
    return {name: result[f"d{name}"] for name in wanted}


# ---- backward: dq, or dx for the bias; queries stay, keys stream by ------------------------------------------------


def _backward_q(problem: _Problem, dout, lse, minus_delta, wanted: str):
    """`wanted` "query": dq. `wanted` "bias": dx [batch, heads, queries, keys] in float32, over whole tiles.

    A kernel of its own for dx: it is as large as the scores, and the compiler drops it where nobody asks for it.
    """
    B, T, S, N, K, H = problem.shape
    band, keys, dtype = problem.band, problem.tiles.keys_dq, problem.dtype
    key_tiles, query_tiles = pl.cdiv(S, keys), pl.cdiv(T, BLOCK)
    stages = min(problem.tiles.stages_backward, key_tiles)
    inputs = problem.operands | {"dout": dout, "lse": lse, "minus_delta": minus_delta}
    segmented = "query_segments" in inputs
    ragged = S % keys != 0 or "key_lengths" in inputs
    dense = wanted == "bias"  # every tile of dx is written

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block_first = (query_tiles - 1 - lax.axis_index("tile")) * BLOCK
        key_end = refs.key_lengths[batch] if "key_lengths" in inputs else S
        block = (0, key_tiles) if dense else _tiles_touched(band, block_first, BLOCK, key_end, keys)
        if "query_lengths" in inputs and not dense:
            block = (
                block[0],
                lax.select(block_first < refs.query_lengths[batch], jnp.int32(block[1]), jnp.int32(block[0])),
            )

        def consumer(group):
            first = block_first + group * ROWS
            rows = pl.ds(first, ROWS)
            query, dout = refs.query_tile.at[group], refs.dout_tile.at[group]
            plgpu.copy_gmem_to_smem(refs.query.at[batch, rows, head], query, refs.query_ready.at[group])
            plgpu.copy_gmem_to_smem(refs.dout.at[batch, rows, head], dout, refs.query_ready.at[group])
            row_lse = _load_rows(refs.lse.at[batch, head, rows])
            row_minus_delta = _load_rows(refs.minus_delta.at[batch, head, rows])
            row_segments = _load_rows(refs.query_segments.at[batch, rows]) if segmented else None
            plgpu.barrier_wait(refs.query_ready.at[group])

            def accumulate(*dq):
                def step(j, _, masked):
                    slot, columns, shape = lax.rem(j - block[0], stages), pl.ds(j * keys, keys), (ROWS, keys)
                    plgpu.barrier_wait(refs.ready.at[slot])
                    key, value = refs.key_tiles.at[slot], refs.value_tiles.at[slot]
                    s, dp = _products((query, key.T), (dout, value.T, _down(row_minus_delta, shape)))
                    x, factor, tanh = problem.exponents(s, refs.terms(batch, head, rows, columns, shape))
                    p = jnp.exp2(x * factor - _down(row_lse, shape))
                    if masked:
                        segments = (
                            (row_segments, _load_columns(refs.key_segments.at[batch, columns])) if segmented else None
                        )
                        p = jnp.where(_seen(shape, band, first, j * keys, key_end - 1, segments), p, 0.0)
                    dx = p * dp
                    if dense:
                        plgpu.store(refs.dx.at[batch, head, rows, columns], dx, optimized=False)
                    else:
                        ds = dx if tanh is None else dx * (1 - tanh * tanh)
                        plgpu.wgmma(dq[0], ds.astype(dtype), key)
                        plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(refs.free.at[slot])

                def skip(j, _):
                    plgpu.barrier_wait(refs.ready.at[lax.rem(j - block[0], stages)])
                    plgpu.barrier_arrive(refs.free.at[lax.rem(j - block[0], stages)])

                sections = (
                    [(0, key_tiles, MASKED)]
                    if dense
                    else _sections(
                        band, first, ROWS, block, key_end, keys, ragged=ragged, segmented=segmented, wide=H > 128
                    )
                )
                _go_through(sections, step, skip, None)
                return [acc[...] for acc in dq]

            if dense:
                accumulate()
            else:
                (dq,) = pl.run_scoped(accumulate, plgpu.ACC((ROWS, H), jnp.float32))
                query[...] = (dq * problem.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(query, refs.dquery.at[batch, rows, head])
                plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(j, _):
                slot = lax.rem(j - block[0], stages)
                there = (batch, pl.ds(j * keys, keys), lax.div(head, jnp.int32(N // K)))
                pl.when(j - block[0] >= stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
                plgpu.copy_gmem_to_smem(refs.key.at[there], refs.key_tiles.at[slot], refs.ready.at[slot])
                plgpu.copy_gmem_to_smem(refs.value.at[there], refs.value_tiles.at[slot], refs.ready.at[slot])

            lax.fori_loop(block[0], block[1], load, None)

        return consumer, producer

    result = (
        {"dx": jax.ShapeDtypeStruct((B, N, query_tiles * BLOCK, key_tiles * keys), jnp.float32)}
        if dense
        else {"dquery": jax.ShapeDtypeStruct((B, T, N, H), dtype)}
    )
    return _launch(
        kernel,
        f"attention_backward_{wanted}",
        inputs,
        problem.terms,
        result,
        {
            "query_tile": _smem(dtype, CONSUMERS, ROWS, H),
            "dout_tile": _smem(dtype, CONSUMERS, ROWS, H),
            "key_tiles": _smem(dtype, stages, keys, H),
            "value_tiles": _smem(dtype, stages, keys, H),
            "query_ready": _barriers(CONSUMERS, 2),
            "ready": _barriers(stages, 2),
            "free": _barriers(stages, CONSUMERS),
        },
        (N, query_tiles, B),
    )[next(iter(result))]


def backward(
    query, key, value, *, outputs, residuals, cotangents, scale: float, is_causal: bool, local_window_size=None,
    logits_soft_cap: float | None = None, tiles: Tiles | None = None, **optional: jax.Array | None,
) -> dict[str, jax.Array]:  # fmt: skip
    """The gradients of query, key and value, and of bias and sinks if given; see the head of this file.

    `outputs` is (out, lse) as `forward` returns it; of `cotangents` only that of out counts: lse is a residual.
    `optional` is as for `forward`.
    """
    del residuals
    (out, lse), dout = outputs, cotangents[0]
    band = {"is_causal": is_causal, "local_window_size": local_window_size}
    t = tiles or _tiles("backward", query, key, value, logits_soft_cap=logits_soft_cap, **band, **optional)
    problem = _Problem.of(query, key, value, scale, is_causal, local_window_size, logits_soft_cap, t, **optional)
    bias, sinks, lengths = (optional.get(name) for name in ("bias", "sinks", "query_seq_lengths"))
    _B, T, S, _N, _K, H = problem.shape
    delta = jnp.einsum("btnh,btnh->bnt", out, dout, preferred_element_type=jnp.float32)
    gradients, sunk = {}, jnp.zeros_like(delta)  # what the sink takes of the gradient of a row
    if sinks is not None:
        sunk = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse) * delta
        gradients["sinks"] = -jnp.sum(sunk, axis=(0, 2)).astype(sinks.dtype)
    if lengths is not None:  # with a sink, lse is finite beyond them
        lse = jnp.where(jnp.arange(T) < lengths[:, None, None], lse, jnp.inf)
    rows = round_up(T, BLOCK)  # and the stride of a copy is a multiple of 16 bytes
    arguments = (pad_to(dout.astype(query.dtype), 3, H), pad_to(lse * LOG2E, 2, rows, jnp.inf), pad_to(-delta, 2, rows))
    gradients["query"] = _backward_q(problem, *arguments, "query")[..., : problem.dim]
    # Beyond a dim of 128 the two sums do not fit the registers together: one kernel each.
    for wanted in (("key", "value"),) if H <= 128 else (("key",), ("value",)):
        for name, gradient in _backward_kv(problem, *arguments, wanted).items():
            gradients[name] = gradient[..., : problem.dim]
    if bias is not None:
        # A bias that is the same for every key is seen only by the sink: Σ_j dx_ij = exp(sink - lse) · delta.
        same = bias.shape[3] == 1
        dx = sunk[..., None] if same else _backward_q(problem, *arguments, "bias")[..., :T, :S]
        axes = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
        gradients["bias"] = jnp.sum(dx, axis=axes, keepdims=True).astype(bias.dtype)
    return gradients
