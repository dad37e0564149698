"""y = (x_scales · x) · (scales · (w - zeros)) + bias on Hopper GPUs, of weights in few bits.

One or two warpgroups stream tiles of x and, as they are stored, of w to shared memory and widen those of w to bfloat16,
which holds them exactly, in two tiles that take turns; two others, or one, multiply. A product of one group is summed
in the accumulators and scaled at the end. Of several groups each is summed by itself and then scaled:

    y = Σ_groups scales_g · (x_g · w_g - (Σ_row x_g) · zeros_g)

Few rows wait for the memory: a block then takes 64 rows, most of them empty, of few columns, and the rows of w may be
split over blocks, whose sums XLA adds. Integers times integers are exact: wgmma sums what 24 bits hold, and the rest is
summed in int32. Where their rows are many, XLA transposes w, in 8 bits, and wgmma multiplies integers: it wants both
operands contiguous along k. Float8 is widened, too: wgmma's own sums of it keep about 14 bits (DeepSeek-V3,
arXiv:2412.19437, section 3.3.2).
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
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips, tuned
from pallas_kernels.gpu.attention_scores import across, down, smem
from pallas_kernels.gpu.products import PIECE, ROWS, WGMMA, no_wgmma, specialised, stream, summed
from pallas_kernels.padding import pad_to, round_up

f32 = jnp.float32
FLOATS = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))
THREADS = 3  # warpgroups
TURNS = 2  # tiles of widened weights
UNIT = 64  # rows of w that are widened at a time
EXACT = 1 << 24  # up to which float32 counts
MANY = 512  # rows of x from which it pays to transpose w
STEP = 128  # of one step of integers along k: a row of swizzled shared memory
_SPARE = 2048  # shared memory for barriers and alignment


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A block takes `rows` (64, or 128 by two warpgroups) and `columns`, and one of `splits` of the rows of w in steps
    of `depth`, of which `stages` are in flight."""

    rows: int
    columns: int
    depth: int
    stages: int
    splits: int = 1

    @staticmethod
    def default(s: "Sizes") -> "Tiles":
        """Large, as long as there is a block for nearly every core. Few rows wait for the memory: narrow blocks or, if
        their sums are little beside w, of a part of its rows, in steps of some KiB of which many are on their way."""
        if s.integer:
            return s.staged(128, min(256, round_up(s.n, PIECE)), STEP)
        cores, rows = chips.current("gpu").cores, ROWS if s.m <= ROWS else 128
        blocks = lambda columns: pl.cdiv(s.m, rows) * pl.cdiv(s.n, columns)
        widths = (128, 64) if s.parted or rows == ROWS else (256, 128, 64)
        columns = next((c for c in widths if c <= s.n and blocks(c) >= 0.9 * cores), 64)
        if rows == 128:
            return s.staged(rows, columns, UNIT)
        splits = next((n for n in (16, 8, 4, 2) if s.splits(n) and n * blocks(columns) <= 1.5 * cores), 1)
        if splits == 1 and s.m <= 16 and s.bits == 8 and blocks(32) <= cores:
            columns = 32
        depth = 128 if s.part(splits) % 128 == 0 else 64
        return s.staged(ROWS, columns, depth, splits)

    def allowed(self, s: "Sizes") -> bool:
        """Whether these are sizes that the kernel takes and shared memory holds."""
        if self.rows not in (64, 128) or self.columns not in (32, 64, 128, 192, 256) or self.stages < 2:
            return False
        if s.integer:
            fits = self.rows == 128 and self.columns >= PIECE and (self.depth, self.splits) == (STEP, 1)
        else:
            fits = self.columns * s.bits >= 256 and self.columns <= (128 if s.parted else 256) and self.stages % 2 == 0
            fits = fits and (self.splits == 1 or s.splits(self.splits)) and self.depth in (64, 128, 256)
            fits = fits and s.part(self.splits) % self.depth == 0
        return fits and s.memory(self) <= chips.current("gpu").smem_bytes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of x[m, k] and w[k, n] in `groups` groups; `x` and `w` are their dtypes, `out` that of the result."""

    m: int
    n: int
    k: int
    groups: int
    zeros: bool
    x: Any
    w: Any
    out: Any

    @staticmethod
    def of(x, w, scales, zeros, dtype: str) -> "Sizes":
        m = math.prod(x.shape[:-1])
        dtypes = map(jnp.dtype, (x.dtype, w.dtype, dtype))
        return Sizes(m, w.shape[1], w.shape[0], scales.shape[0], zeros is not None, *dtypes)

    @property
    def bits(self) -> int:
        return 4 if self.w == jnp.int4 else 8

    @property
    def integer(self) -> bool:
        """Whether wgmma multiplies integers."""
        whole = self.x == jnp.int8 and self.w not in FLOATS and self.groups == 1 and not self.zeros
        return whole and self.m >= MANY and self.k % STEP == 0

    @property
    def counted(self) -> bool:
        """Whether the result is a sum of integers, scaled at the end."""
        return self.x == jnp.int8 and self.w not in FLOATS and self.groups == 1 and not self.zeros

    @property
    def parted(self) -> bool:
        """Whether the accumulators are emptied before the end."""
        return self.groups > 1 or self.zeros or (self.counted and self.part(1) < self.k)

    def part(self, splits: int) -> int:
        """Rows of w that are summed in the accumulators."""
        most = self.k // self.groups if self.groups > 1 or self.zeros else self.k // splits
        if self.x != jnp.int8 or self.w in FLOATS:
            return most
        exact = EXACT >> (7 + self.bits - 1)
        return max(part for part in range(UNIT, min(most, exact) + 1, UNIT) if most % part == 0)

    def splits(self, count: int) -> bool:
        """Whether the rows of w can be split so, and the bytes of the sums are few beside those of w."""
        whole = self.k % (count * UNIT) == 0 and self.k % (count * self.part(count)) == 0
        return whole and count * (4 * round_up(self.m, 8) + 4 * self.m) <= 0.07 * self.k * self.bits / 8

    def staged(self, rows: int, columns: int, depth: int, splits: int = 1) -> Tiles:
        """As many stages as shared memory holds, up to eight, an even number, so that a widener keeps its slots."""
        found = (Tiles(rows, columns, depth, stages, splits) for stages in (8, 6, 4, 2))
        return next((t for t in found if t.allowed(self)), Tiles(rows, columns, depth, 2, splits))

    def memory(self, t: Tiles) -> int:
        """Bytes of shared memory of a block."""
        wide = 1 if self.integer else 2
        stage = wide * t.rows * t.depth + t.depth * t.columns * self.bits // 8
        if self.integer:
            stage = t.depth * (t.rows + t.columns)
        turns = 0 if self.integer else TURNS * 2 * t.depth * t.columns
        return t.stages * stage + turns + 4 * t.rows * min(PIECE, t.columns) + _SPARE


def unsupported(x, w, scales, zeros=None, x_scales=None, bias=None, *, dtype: str) -> str | None:
    """Why the kernel cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del x_scales, bias
    if reason := no_wgmma():
        return reason
    s = Sizes.of(x, w, scales, zeros, dtype)
    if s.x not in (jnp.bfloat16, jnp.int8, *FLOATS):
        return f"x must be bfloat16, int8 or float8 on a GPU, got {s.x}"
    if s.w not in (jnp.int8, jnp.int4, *FLOATS):
        return f"w must be int8, int4, float8_e4m3fn or float8_e5m2, got {s.w}"
    if s.out not in (jnp.float32, jnp.bfloat16):
        return f"the result must be float32 or bfloat16, got {s.out}"
    if s.n % PIECE:
        return f"n must be a multiple of 64, the width of the tiles that TMA copies, got {s.n}"
    if (s.k // s.groups) % UNIT:
        return f"k, and the rows of a group, must be multiples of 64, got {s.k} in {s.groups} groups"
    if max(pl.cdiv(s.m, ROWS), pl.cdiv(s.n, 32)) > 65535:
        return f"the grid is limited to 65535 blocks of 64 rows and of 32 columns, got {s.m} rows and {s.n} columns"
    return None


def tiles(phase: str, x, w, scales, zeros=None, x_scales=None, bias=None, *, dtype: str) -> Tiles:
    """What `forward` takes when it is given no tiles."""
    del phase, x_scales, bias
    return _tiles(Sizes.of(x, w, scales, zeros, dtype))


def _tiles(s: Sizes) -> Tiles:
    return tuned.choose(
        "gpu.quantized_matmul.forward",
        chips.current("gpu"),
        {"m": s.m, "n": s.n, "k": s.k, "groups": s.groups},
        f"{s.x.name}, {s.w.name}",
        Tiles,
        lambda tiles: tiles.allowed(s),
        Tiles.default(s),
    )


def candidates(phase: str, x, w, scales, zeros=None, *others, dtype: str, **named) -> Iterator[Tiles]:
    """Tiles worth trying that shared memory holds, the default first."""
    del phase, others, named
    s = Sizes.of(x, w, scales, zeros, dtype)
    rows, depths = (ROWS if s.m <= ROWS else 128), ((STEP,) if s.integer else (256, 128, 64))
    found = [Tiles.default(s)]
    for columns, depth, splits in itertools.product((256, 128, 64, 32), depths, (1, 2, 4)):
        found.append(s.staged(rows, columns, depth, splits))
    yield from (t for t in dict.fromkeys(found) if t.allowed(s))


def memory(phase: str, tiles: Tiles, x, w, scales, zeros=None, *others, dtype: str, **named) -> int:
    """Bytes of shared memory of a block."""
    del phase, others, named
    return Sizes.of(x, w, scales, zeros, dtype).memory(tiles)


def _packed(dtype: Any, bits: int, n: int, *shape: int):
    """Tiles of weights in shared memory: rows of 128 numbers, or of what divides n."""
    width = next(w for w in (128 * bits, 512, 256) if shape[-1] * bits % w == 0 and n * bits % w == 0)
    tiled = (plgpu.TilingTransform((8, width // bits)), plgpu.SwizzleTransform(width // 8))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=tiled)


def _wide(dtype: Any, columns: int, *shape: int):
    """Tiles that are multiplied with others of `columns`: both are swizzled alike."""
    if columns >= PIECE:
        return smem(dtype, *shape)
    tiled = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=tiled)


@dataclasses.dataclass(frozen=True)
class _Finish:
    """What is done with a sum of a block: references in HBM, or None."""

    scales: Any
    zeros: Any
    sums: Any  # of x over each part
    x_scales: Any
    bias: Any

    def scaled(self, z, part, group, row, column):
        """The sum of a part of a group, scaled."""
        height, width = z.shape
        load = lambda ref: across(plgpu.load(ref, layout=WGMMA.reduce(0), optimized=False), z.shape)
        if self.zeros is not None:
            of_rows = plgpu.load(self.sums.at[part, pl.ds(row, height)], layout=WGMMA.reduce(1), optimized=False)
            z = z - down(of_rows, z.shape) * load(self.zeros.at[group, pl.ds(column, width)])
        return z * load(self.scales.at[group, pl.ds(column, width)])

    def write(self, total, out, tile, row, column, *, scaled: bool):
        """total, of rows from `row` and columns from `column`, to `out` by way of `tile`, a piece at a time."""
        width = tile.shape[1]
        for start in range(0, total.shape[1], width):
            z = lax.slice(total, (0, start), (ROWS, start + width))
            if not scaled:
                z = self.scaled(z.astype(f32), 0, 0, row, column + start)
            if self.x_scales is not None:
                of_rows = plgpu.load(self.x_scales.at[pl.ds(row, ROWS)], layout=WGMMA.reduce(1), optimized=False)
                z = z * down(of_rows, z.shape)
            if self.bias is not None:
                over = self.bias.at[pl.ds(column + start, width)]
                z = z + across(plgpu.load(over, layout=WGMMA.reduce(0), optimized=False), z.shape)
            tile[...] = z.astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[pl.ds(row, ROWS), pl.ds(column + start, width)])
            plgpu.wait_smem_to_gmem(0)


def _widened(v):
    if v.dtype in FLOATS:
        v = v.astype(jnp.float16).astype(f32)
    return v.astype(jnp.bfloat16)


def _launch(body, name: str, s: Sizes, t: Tiles, operands: dict, out_dtype, scratch: dict):
    """[splits, m rounded up, n] of `body(operands by name …, out, **scratch)`."""

    def named(*refs, **memory):
        given = dict(zip((*operands, "out"), refs, strict=True))
        finish = _Finish(**{field.name: given.pop(field.name, None) for field in dataclasses.fields(_Finish)})
        body(**given, **memory, finish=finish)

    piece = (t.rows // ROWS, ROWS, min(PIECE, t.columns))
    (out,) = plgpu.kernel(
        named,
        kernel_name=name,
        out_type=[jax.ShapeDtypeStruct((t.splits, round_up(s.m, 8), s.n), out_dtype)],
        scratch_types=scratch | {"out_tile": plgpu.SMEM(piece, out_dtype)},
        grid=(pl.cdiv(s.m, t.rows), pl.cdiv(s.n, t.columns), t.splits),
        grid_names=("row", "column", "split"),
        num_threads=THREADS,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands.values())
    return out


def _widening(s: Sizes, t: Tiles, operands: dict, out_dtype):
    """[splits, m, n], of x in bfloat16 and w as it is stored."""
    consumers = t.rows // ROWS
    wideners, height = THREADS - consumers, min(ROWS, round_up(s.m, 8))
    part = s.part(t.splits)
    per_part, parts, steps = part // t.depth, s.k // t.splits // part, s.k // t.splits // t.depth
    stages, parts_of_group = t.stages, max(1, s.k // s.groups // part)
    width = min(t.columns, 128)  # columns that are widened at a time
    single = parts == 1 and not (s.groups > 1 or s.zeros)

    def body(x, w, out, finish, x_tiles, w_tiles, wide, out_tile, ready, widened, taken):
        first_row, first_column = lax.axis_index("row") * t.rows, lax.axis_index("column") * t.columns
        split = lax.axis_index("split")

        def load(i):
            slot, depth = lax.rem(i, stages), pl.ds((split * steps + i) * t.depth, t.depth)
            for g in range(consumers):
                rows, here = pl.ds(first_row + g * ROWS, height), x_tiles.at[slot, g, pl.ds(0, height)]
                plgpu.copy_gmem_to_smem(x.at[rows, depth], here, ready.at[slot])
            over = pl.ds(first_column, t.columns)
            plgpu.copy_gmem_to_smem(w.at[depth, over], w_tiles.at[slot], ready.at[slot])

        def widener(which):
            mine = lambda n: n * wideners + which

            def one(n, _):
                i = mine(n)
                slot, turn = lax.rem(i, stages), lax.rem(i, TURNS)

                def follow():  # the tiles that were just multiplied are free
                    plgpu.barrier_wait(taken.at[turn])
                    pl.when(i - TURNS + stages < steps)(lambda: load(i - TURNS + stages))

                pl.when(i >= TURNS)(follow)
                plgpu.barrier_wait(ready.at[slot])
                for row, column in itertools.product(range(0, t.depth, UNIT), range(0, t.columns, width)):
                    here = pl.ds(row, UNIT), pl.ds(column, min(width, t.columns - column))
                    narrow = plgpu.load(w_tiles.at[slot, *here], layout=plgpu.Layout.WGMMA_UPCAST_4X)
                    wide[turn, *here] = _widened(narrow)
                plgpu.commit_smem()  # and orders the loads before the copies that overwrite what they read
                plgpu.barrier_arrive(widened.at[turn])

            for n in range(stages // wideners):
                pl.when(mine(n) < steps)(functools.partial(load, mine(n)))
            lax.fori_loop(0, lax.div(steps - which + wideners - 1, jnp.int32(wideners)), one, None)

        def consumer(group):
            row = first_row + group * ROWS

            def product(first):
                def accumulate(acc):
                    def step(n, _):
                        i = first + n
                        slot, turn = lax.rem(i, stages), lax.rem(i, TURNS)
                        plgpu.barrier_wait(ready.at[slot])
                        plgpu.barrier_wait(widened.at[turn])
                        plgpu.wgmma(acc, x_tiles.at[slot, group], wide.at[turn])
                        plgpu.wgmma_wait(1)
                        pl.when(n > 0)(lambda: done(i - 1))

                    lax.fori_loop(0, per_part, step, None)
                    plgpu.wgmma_wait(0)
                    return acc[...]

                found = pl.run_scoped(accumulate, plgpu.ACC((ROWS, t.columns), f32))
                done(first + per_part - 1)
                return found

            def done(i):
                plgpu.barrier_arrive(taken.at[lax.rem(i, TURNS)])

            def add(p, total):
                z = product(p * per_part)
                if s.counted:
                    return total + z.astype(jnp.int32)
                p = split * parts + p
                return total + finish.scaled(z, p, lax.div(p, jnp.int32(parts_of_group)), row, first_column)

            if single:
                total = product(0)
            else:
                zeros = jnp.zeros((ROWS, t.columns), jnp.int32 if s.counted else f32)
                total = lax.fori_loop(0, parts, add, plgpu.layout_cast(zeros, WGMMA))
            scaled = finish.scales is None or not (single or s.counted)
            finish.write(total, out.at[split], out_tile.at[group], row, first_column, scaled=scaled)

        group = lax.axis_index("group")

        @pl.when(group < consumers)
        def _():
            plgpu.set_max_registers(200, action="increase")
            consumer(group)

        @pl.when(group >= consumers)
        def _():
            plgpu.set_max_registers(104, action="decrease")
            widener(group - consumers)

    scratch = dict(
        x_tiles=_wide(jnp.bfloat16, t.columns, stages, consumers, ROWS, t.depth),
        w_tiles=_packed(s.w, s.bits, s.n, stages, t.depth, t.columns),
        wide=_wide(jnp.bfloat16, t.columns, TURNS, t.depth, t.columns),
        ready=plgpu.Barrier(num_barriers=stages, num_arrivals=consumers + 1),
        widened=plgpu.Barrier(num_barriers=TURNS),
        taken=plgpu.Barrier(num_barriers=TURNS, num_arrivals=consumers),
    )
    return _launch(body, "quantized_matmul", s, t, operands, out_dtype, scratch)


def _integers(s: Sizes, t: Tiles, operands: dict, out_dtype):
    """[1, m, n], of int8 x[m, k] and w[n, k]."""
    groups = t.rows // ROWS

    def body(x, w, out, finish, x_tiles, w_tiles, out_tile, ready, free):
        first_row, first_column = lax.axis_index("row") * t.rows, lax.axis_index("column") * t.columns
        steps = s.k // STEP

        def producer():
            def load(i, slot):
                depth = pl.ds(i * STEP, STEP)
                for g in range(groups):
                    rows = pl.ds(first_row + g * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(x.at[rows, depth], x_tiles.at[slot, g], ready.at[slot])
                plgpu.copy_gmem_to_smem(w.at[pl.ds(first_column, t.columns), depth], w_tiles.at[slot], ready.at[slot])

            stream(load, steps, free, t.stages)

        def consumer(group):
            def multiply(i, slot, accs):
                del i
                plgpu.wgmma(accs[0], x_tiles.at[slot, group], w_tiles.at[slot].T)

            (total,) = summed(multiply, (ROWS, t.columns), 1, steps, ready, free, t.stages, jnp.int32)
            row = first_row + group * ROWS
            finish.write(total, out.at[0], out_tile.at[group], row, first_column, scaled=False)

        specialised(consumer, producer)

    scratch = dict(
        x_tiles=_packed(jnp.int8, 8, s.k, t.stages, groups, ROWS, STEP),
        w_tiles=_packed(jnp.int8, 8, s.k, t.stages, t.columns, STEP),
        ready=plgpu.Barrier(num_barriers=t.stages, num_arrivals=groups + 1),
        free=plgpu.Barrier(num_barriers=t.stages, num_arrivals=groups),
    )
    return _launch(body, "quantized_matmul_integers", s, t, operands, out_dtype, scratch)


def forward(
    x: jax.Array,
    w: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    x_scales: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    dtype: str,
    tiles: Tiles | None = None,
):
    """((y,), ()): x[..., k], w[k, n], scales and zeros[g, n], x_scales[..., 1], bias[n]; y[..., n] in `dtype`."""
    s = Sizes.of(x, w, scales, zeros, dtype)
    t = tiles or _tiles(s)
    x_shape, whole = x.shape, (round_up(s.m, t.rows), round_up(s.n, t.columns))
    x = x.reshape(s.m, s.k)
    over_columns = lambda a: pad_to(a.astype(f32), a.ndim - 1, whole[1])
    of_rows = lambda a: pad_to(a.astype(f32), a.ndim - 1, whole[0])
    plain = s.groups == 1 and zeros is None
    flat = None if x_scales is None else x_scales.reshape(s.m)
    operands: dict[str, Any] = {}
    if t.splits == 1 or not plain:
        operands["scales"] = over_columns(scales)
    if zeros is not None:
        parts = x.astype(f32).reshape(s.m, s.k // s.part(t.splits), -1)
        operands |= {"zeros": over_columns(zeros), "sums": of_rows(jnp.sum(parts, 2).T)}
    if t.splits == 1:
        operands |= {} if flat is None else {"x_scales": of_rows(flat)}
        operands |= {} if bias is None else {"bias": over_columns(bias)}
    sums_dtype = s.out if t.splits == 1 else jnp.int32 if s.counted else f32
    if s.integer:
        found = _integers(s, t, {"x": pad_to(x, 0, round_up(s.m, 8)), "w": w.astype(jnp.int8).T} | operands, sums_dtype)
    else:
        x = pad_to(x.astype(jnp.bfloat16), 0, round_up(s.m, 8))
        found = _widening(s, t, {"x": x, "w": w} | operands, sums_dtype)
    y = found[0, : s.m]
    if t.splits > 1:
        y = jnp.sum(found[:, : s.m], 0).astype(f32)
        y = y * scales[0].astype(f32) if plain else y
        y = y if flat is None else y * flat.astype(f32)[:, None]
        y = (y if bias is None else y + bias.astype(f32)).astype(s.out)
    return (y.reshape(*x_shape[:-1], s.n),), ()
