"""Normalisation of rows on Mosaic GPU: what RMS norm and layer norm share, with an addition before them or not.

    x̂ = (x - m) · r,   r = rsqrt(mean((x - m)²) + eps),   y = x̂ · w + bias,   w = scale + scale_offset
    g = dy · w,   dx = r · (g - mean(g) - x̂ · mean(g · x̂)),   dscale = Σ_rows dy · x̂,   dbias = Σ_rows dy

Layer norm: m = mean(x). RMS norm: m = 0, no bias, and the mean(g) term is absent. With a residual, x is the sum of two
arrays, rounded and written beside y; then dx gains the cotangent of that sum. y has a dtype of its own; in int8 it is
divided by the largest of its row / 127, which is written beside it.

A team of `split` warpgroups owns one row at a time, each a piece of it: the piece lies across its 128 threads, a mean
is one reduction, and one exchange through shared memory where there are several pieces. Rows stream through shared
memory by TMA. A sweep over the row reads it from shared memory again instead of keeping it in registers: what the
registers hold across rows are only the float32 sums for the parameters' gradients. Each warpgroup writes those once,
after its last row, and XLA adds the few hundred partial sums.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips, tuned
from pallas_kernels.padding import pad_to, round_up

THREADS = 128  # of one warpgroup
MAX_COPY = 256  # elements one TMA copy moves along an axis
GROUPS = 4  # warpgroups of a block: each thread may use 128 registers
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
PHASES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Row:
    """`features` numbers in `split` pieces of [used, width], each laid over a warpgroup as a tile [padded, width].

    A piece is a multiple of `least`."""

    features: int
    split: int = 1
    least: int = 8

    @property
    def piece(self) -> int:
        """Features of a piece, rounded up to what TMA copies at once: 16-byte multiples, at most 256 × 256."""
        multiples = (multiple for multiple in (8, 16, 32, 64, 128, 256) if multiple >= self.least)
        sizes = (round_up(pl.cdiv(self.features, self.split), multiple) for multiple in multiples)
        return next((size for size in sizes if size <= MAX_COPY * math.gcd(size, MAX_COPY)), MAX_COPY * MAX_COPY)

    @property
    def width(self) -> int:
        return math.gcd(self.piece, MAX_COPY)

    @property
    def used(self) -> int:
        return self.piece // self.width

    @property
    def view(self) -> tuple[int, int, int]:
        return self.split, self.used, self.width

    def _padded(self, vector: int) -> int:
        return round_up(self.used, THREADS * vector // math.gcd(THREADS * vector, self.width))

    @property
    def vector(self) -> int:
        """Elements a thread reads at once: the most that do not lengthen the padding."""
        return max((8, 4, 2, 1), key=lambda vector: (-self._padded(vector), vector))

    @property
    def shape(self) -> tuple[int, int]:
        return self._padded(self.vector), self.width

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layout(self):
        return plgpu.Layout.WG_STRIDED(self.shape, vec_size=self.vector)


@dataclasses.dataclass(frozen=True)
class Load:
    """What a kernel holds of a row: its features, and for each of them the bytes that arrive, the bytes that leave,
    those of the parameters, and the float32 sums that stay in registers; `least` features are 16 bytes of the narrowest
    array."""

    features: int
    arriving: int
    leaving: int
    parameters: int
    sums: int
    least: int = 8

    @staticmethod
    def of(phase: str, x, scale, bias=None, residual=None, *, dtype=None) -> "Load":
        """Of a norm whose y has a dtype; backward, x is the sum if there is a residual, and of the parameters only the
        scale is read."""
        rows = [x.dtype] if residual is None else [x.dtype, residual.dtype]
        size, widths = jnp.result_type(*rows).itemsize, [p.dtype.itemsize for p in (scale, bias) if p is not None]
        result = size if dtype is None else jnp.dtype(dtype).itemsize  # y, or its cotangent
        least = 16 // min(size, result)
        if phase == "backward":
            return Load(x.shape[-1], len(rows) * size + result, size, widths[0], len(widths), least)
        leaving = (len(rows) - 1) * size + result
        return Load(x.shape[-1], sum(dtype.itemsize for dtype in rows), leaving, sum(widths), 0, least)

    def row(self, split: int) -> Row:
        return Row(self.features, split, self.least)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`blocks` of `groups` warpgroups, `split` to a row, with `stages` slots to arrive in and `stores` to leave."""

    blocks: int
    groups: int
    split: int
    stages: int
    stores: int

    def smem_bytes(self, load: Load) -> int:
        """Shared memory of a block: rows, parameters, then reductions, barriers and alignment."""
        slots = self.groups * (self.stages * load.arriving + self.stores * load.leaving)
        return load.row(self.split).size * (slots + self.split * load.parameters) + 512 * self.groups + 4096

    @staticmethod
    def default(load: Load) -> "Tiles | None":
        """The fewest pieces that fit the registers and, two rows at a time, the shared memory; then the most rows.

        None: nothing fits.
        """
        chip = chips.current("gpu")
        # A short row costs mostly latency: a second block on the multiprocessor hides it.
        share = 2 if load.features <= 1024 else 1
        for split, stages, stores in (
            *((split, *depth) for split in (1, 2, 4) for depth in ((4, 2), (3, 2), (2, 2), (2, 1))),
            (GROUPS, 1, 1),
        ):
            tiles = Tiles(share * chip.cores, GROUPS, split, stages, stores)
            # Half of a thread's 128 registers stay free if more pieces can be had.
            enough = tiles.registers(load) <= (64 if split < GROUPS else 128)
            if enough and tiles.smem_bytes(load) * share <= chip.smem_bytes:
                return tiles
        return None

    def registers(self, load: Load) -> int:
        """Registers of a thread: two rows pass through them besides the sums."""
        return load.row(self.split).size // THREADS * (2 + load.sums)

    def allowed(self, load: Load) -> bool:
        """Whether the sizes divide as they have to, and registers and shared memory suffice."""
        chip = chips.current("gpu")
        if min(dataclasses.astuple(self)) < 1 or self.groups > 8 or self.groups % self.split:
            return False
        share = pl.cdiv(self.blocks, chip.cores)  # blocks of a multiprocessor that all fit it at once
        fits = self.smem_bytes(load) * share <= chip.smem_bytes
        return fits and self.registers(load) * self.groups <= 128 * GROUPS


def tiles(name: str, phase: str, x, load: Load) -> Tiles:
    """The tuned tiles of the nearest x[..., features] that this one allows, else the default."""
    default = Tiles.default(load)
    assert default is not None, "`unsupported` refuses what no tiles fit"
    return tuned.choose(
        f"gpu.{name}.{phase}",
        chips.current("gpu"),
        {"rows": x.size // load.features, "features": load.features},
        jnp.dtype(x.dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(load),
        default,
    )


_tiles = tiles  # where an argument has this name


def candidates(load: Load) -> Iterator[Tiles]:
    """The default, then one, two or four warpgroups to a row, with more or fewer rows on their way."""
    cores, depths = chips.current("gpu").cores, ((2, 1), (2, 2), (3, 2), (4, 2))
    found = [
        Tiles(share * cores, groups, split, *depth)
        for groups, split, share, depth in itertools.product((GROUPS, 2, 8), (1, 2, 4), (1, 2), depths)
    ]
    yield from (t for t in dict.fromkeys([Tiles.default(load), *found]) if t is not None and t.allowed(load))


def unsupported(*loads: Load, x, dtype: str | None = None, **operands) -> str | None:
    """Why these kernels do not take `x`, whose rows are what `loads` say, the dtype of y and the other named operands,
    or None."""
    chip = chips.current("gpu")
    if chip.capability < (9, 0):
        capability = ".".join(map(str, chip.capability))
        return f"the rows are streamed by TMA, which needs compute capability 9.0, got {capability}"
    dtypes = {name: operand.dtype for name, operand in {"x": x, **operands}.items() if operand is not None}
    if dtype not in (None, "int8"):
        dtypes["dtype"] = jnp.dtype(dtype)
    for name, found in dtypes.items():
        if found not in DTYPES:
            return f"{name} must be float32, bfloat16 or float16, got {found}"
    if any(Tiles.default(load) is None for load in loads):
        return (
            f"a row, its results and its parameters must fit {chip.smem_bytes} bytes of shared memory and the "
            f"registers, got {loads[0].features} features of {x.dtype}"
        )
    return None


def share(rows: int, tiles: Tiles) -> tuple[int, int]:
    """(rows of one team, blocks that have any)."""
    teams = tiles.groups // tiles.split
    each = pl.cdiv(rows, tiles.blocks * teams)
    return each, pl.cdiv(rows, each * teams)


def stream(sources, slots, ready, count, stages, body, init):
    """Folds `body(i, slot, carry)` over i < count while the next rows are on their way.

    Copies go from `sources[k](i)` to `slots[k](slot)` and arrive on the barrier `ready(slot)`. `init` may be a
    function, called once the first are on their way.
    """

    def fetch(i):
        slot = lax.rem(i, stages)
        for source, target in zip(sources, slots, strict=True):
            plgpu.copy_gmem_to_smem(source(i), target(slot), ready(slot))

    def step(i, carry):
        ahead = i + stages - 1
        pl.when(ahead < count)(lambda: fetch(ahead))
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(ready(slot))
        return body(i, slot, carry)

    for i in range(stages - 1):
        pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))
    return lax.fori_loop(0, count, step, init() if callable(init) else init)


class Piece:
    """What one warpgroup does with its piece of the rows.

    `exchange` and `met` hold, for each team, slots for partial sums and the barrier that says they are filled.
    """

    def __init__(self, row: Row, tiles: Tiles, count: int, exchange, met):
        group = lax.axis_index("group")
        self.row, self.exchange, self.met = row, exchange, met
        self.team, self.index = lax.div(group, tiles.split), lax.rem(group, tiles.split)
        self.group, self.used = group, pl.ds(0, row.used)
        teams = tiles.groups // tiles.split
        self.worker = lax.axis_index("block") * teams + self.team  # this team among those of all blocks
        each, _ = share(count, tiles)
        self.first = self.worker * each
        self.count = lax.clamp(0, count - self.first, each)

    def keep(self, value, fill=0.0):
        """`value` with `fill` where the tile has no feature."""
        row = self.row
        if row.size * row.split == row.features:
            return value
        axes = [plgpu.broadcasted_iota(jnp.int32, row.shape, axis, layout=row.layout) for axis in (0, 1)]
        size = row.features if row.split == 1 else lax.clamp(0, row.features - self.index * row.piece, row.piece)
        return jnp.where(axes[0] * row.width + axes[1] < size, value, fill)

    def load(self, ref, fill=0.0):
        """The piece in float32. The end of a slot is never written, so it must not be trusted."""
        return self.keep(plgpu.load(ref, layout=self.row.layout).astype(jnp.float32), fill)

    def combined(self, i, start, *numbers, by=jnp.add):
        """Each of the numbers that the pieces of the i-th row have, combined `by`; they are the `start`-th and
        following of that row."""
        if self.row.split == 1:
            return numbers
        turn = lax.rem(i, 2)  # a slot is written again two rows on, when every warpgroup has read it
        for k, partial in enumerate(numbers, start):
            self.exchange[self.team, turn, k, self.index] = partial
        plgpu.barrier_arrive(self.met.at[self.team])
        plgpu.barrier_wait(self.met.at[self.team])
        pieces = range(self.row.split)
        return [
            functools.reduce(by, [self.exchange[self.team, turn, k, piece] for piece in pieces])
            for k in range(start, start + len(numbers))
        ]

    def means(self, i, start, *values):
        """Mean of each value over the i-th row, as `combined`."""
        return [total * (1 / self.row.features) for total in self.combined(i, start, *map(jnp.sum, values))]

    def statistics(self, i, x_slot, eps: float, centered: bool):
        """(m, r) of the row in `x_slot`."""
        (mean,) = self.means(i, 0, self.load(x_slot)) if centered else (0.0,)
        # A second sweep: E[x²] - E[x]² would cancel for rows far from zero.
        deviation = self.keep(self.load(x_slot) - mean) if centered else self.load(x_slot)
        (variance,) = self.means(i, 1, deviation * deviation)
        return mean, lax.rsqrt(variance + eps)

    def normal(self, x_slot, mean, inverse, centered: bool):
        """x̂ of the row in `x_slot`."""
        value = self.load(x_slot)
        return (self.keep(value - mean) if centered else value) * inverse

    def fetch_parameters(self, refs, slots, ready):
        """The first team copies the parameters for the whole block, everyone waits."""

        @pl.when(self.team == 0)
        def _():
            for ref, slot in zip(refs, slots, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[self.index], slot.at[self.index, self.used], ready)

        plgpu.barrier_wait(ready)


def scratch(row: Row, tiles: Tiles, arriving, leaving, parameters=()):
    """Slots for the rows that arrive and leave, barriers, the exchange of the teams; if there are parameters, slots for
    them and a barrier more."""
    return [
        [plgpu.SMEM((tiles.groups, tiles.stages, *row.shape), a.dtype) for a in arriving],
        [plgpu.SMEM((tiles.groups, tiles.stores, *row.shape), a.dtype) for a in leaving],
        plgpu.Barrier(num_barriers=(tiles.groups, tiles.stages), num_arrivals=len(arriving)),
        plgpu.SMEM((tiles.groups // tiles.split, 2, 4, tiles.split), jnp.float32),
        plgpu.Barrier(num_barriers=tiles.groups // tiles.split, num_arrivals=tiles.split),
        *(
            (
                [plgpu.SMEM((tiles.split, *row.shape), p.dtype) for p in parameters],
                plgpu.Barrier(num_arrivals=len(parameters) * tiles.split),
            )
            if parameters
            else ()
        ),
    ]


def call(body, name, out_type, scratch, blocks, tiles):
    """The kernel `body`, by name, in a row of `blocks`, each of `tiles.groups` warpgroups."""
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=tiles.groups,
        thread_name="group",
    )


def copies(piece: Piece, refs, slots) -> tuple[list, list]:
    """Where the pieces of the rows come from and where they go, for `stream`."""
    return (
        [lambda i, ref=ref: ref.at[piece.first + i, piece.index] for ref in refs],
        [lambda slot, smem=smem: smem.at[piece.group, slot, piece.used] for smem in slots],
    )


def to_rows(row: Row, array):
    """`array[..., features]` as [rows, split, used, width]."""
    return pad_to(array.reshape(-1, row.features), 1, row.split * row.piece).reshape(-1, *row.view)


def from_rows(row: Row, array, shape):
    """The inverse of `to_rows`."""
    return array.reshape(-1, row.split * row.piece)[:, : row.features].reshape(shape)


def forward(
    x, scale, bias, residual=None, *, eps: float, scale_offset: float, dtype: str | None, tiles: Tiles | None, name: str
):
    """(y[..., features],) in `dtype` or x's; with a bias it is layer norm, with None RMS norm.

    With a residual (y, x + residual), the sum in the common dtype. In int8 y is (values, scales), the sum before them.
    """
    centered, added = bias is not None, residual is not None
    parameters = [scale, bias] if centered else [scale]
    load = Load.of("forward", x, scale, bias, residual, dtype=dtype)
    t = tiles or _tiles(name, "forward", x, load)
    row = load.row(t.split)
    sources = [to_rows(row, a) for a in (x, residual) if a is not None]
    rows, count = len(sources[0]), len(sources)
    common = jnp.result_type(*(a.dtype for a in sources))
    results = [jax.ShapeDtypeStruct(sources[0].shape, kind) for kind in [dtype or common] + [common] * added]
    scales = [jax.ShapeDtypeStruct((rows,), jnp.float32)] if dtype == "int8" else []

    def body(*refs):
        left = iter(refs)
        source_refs, parameter_refs, result_refs, scales_ref = (
            [next(left) for _ in a] for a in (sources, parameters, results, scales)
        )
        arrived, leaving, ready, exchange, met, parameter_smem, parameters_ready = left
        piece = Piece(row, t, rows, exchange, met)
        group, used = piece.group, piece.used
        piece.fetch_parameters(parameter_refs, parameter_smem, parameters_ready)

        def normalise(i, slot, _):
            x_slot, out = arrived[0].at[group, slot], lax.rem(i, t.stores)

            def store(which, value):
                leaving[which][group, out] = value.astype(result_refs[which].dtype)

            def wait():
                plgpu.wait_smem_to_gmem(count * (t.stores - 1), wait_read_only=True)  # the slots' last stores have left

            if added:
                wait()
                store(1, piece.load(x_slot) + piece.load(arrived[1].at[group, slot]))
                x_slot = leaving[1].at[group, out]  # what is normalised is what was rounded
            mean, inverse = piece.statistics(i, x_slot, eps, centered)
            weight = piece.load(parameter_smem[0].at[piece.index]) + scale_offset
            y = piece.normal(x_slot, mean, inverse, centered) * weight
            if centered:
                y += piece.load(parameter_smem[1].at[piece.index])
            if scales:
                (largest,) = piece.combined(i, 2, jnp.max(jnp.abs(y)), by=jnp.maximum)
                unit = largest * (1 / 127)
                unit = jnp.where(unit >= jnp.finfo(jnp.float32).tiny, unit, 1.0)  # a row of zeros
                pl.when(piece.index == 0)(functools.partial(scales_ref[0].__setitem__, piece.first + i, unit))
                y = jnp.round(y * (1 / unit))
            if not added:
                wait()
            store(0, y)
            plgpu.commit_smem()  # orders the reads of x and the writes of y before the copies that follow
            for smem, ref in zip(leaving, result_refs, strict=True):
                plgpu.copy_smem_to_gmem(smem.at[group, out, used], ref.at[piece.first + i, piece.index])
            return ()

        stream(
            *copies(piece, source_refs, arrived), lambda slot: ready.at[group, slot],
            piece.count, t.stages, normalise, (),
        )  # fmt: skip
        plgpu.wait_smem_to_gmem(0)

    found = call(
        body,
        f"{name}_forward",
        [*results, *scales],
        scratch(row, t, sources, results, parameters),
        share(rows, t)[1],
        t,
    )(*sources, *(to_rows(row, p)[0] for p in parameters))
    whole = tuple(from_rows(row, y, x.shape) for y in found[:count])
    return (*whole[::-1], found[-1].reshape(*x.shape[:-1], 1)) if scales else whole


def backward(x, scale, bias, dy, added=None, *, eps: float, scale_offset: float, tiles: Tiles | None, name: str):
    """(dx, dscale, dbias), each like its operand; with no bias, that of RMS norm and None for dbias.

    added: what dx gains, as x, or None.
    """
    centered = bias is not None
    load = Load.of("backward", x, scale, bias, added, dtype=dy.dtype)
    t = tiles or _tiles(name, "backward", x, load)
    row = load.row(t.split)
    sources = [to_rows(row, a) for a in (x, dy, added) if a is not None]
    rows, sums = len(sources[0]), 2 if centered else 1

    def body(*refs):
        source_refs, (scale_ref, dx_ref, sums_ref, *scratch) = refs[: len(sources)], refs[len(sources) :]
        arrived, (dx_smem,), ready, exchange, met, scale_smem, scale_ready = scratch
        piece = Piece(row, t, rows, exchange, met)
        group, used = piece.group, piece.used
        piece.fetch_parameters([scale_ref], scale_smem, scale_ready)

        def differentiate(i, slot, totals):
            x_slot, dy_slot, *added_slot = (smem.at[group, slot] for smem in arrived)
            mean, inverse = piece.statistics(i, x_slot, eps, centered)

            def normal():
                return piece.normal(x_slot, mean, inverse, centered)

            def weighted():
                return piece.load(dy_slot) * (piece.load(scale_smem[0].at[piece.index]) + scale_offset)

            slope, *level = piece.means(i, 2, weighted() * normal(), *([weighted()] if centered else []))
            out = lax.rem(i, t.stores)
            plgpu.wait_smem_to_gmem(t.stores - 1, wait_read_only=True)  # the slot's last store has left
            dx = weighted() - normal() * slope
            dx = inverse * (dx - level[0] if centered else dx)
            dx_smem[group, out] = (dx + piece.load(added_slot[0]) if added_slot else dx).astype(dx_ref.dtype)
            terms = (piece.load(dy_slot) * normal(), *([piece.load(dy_slot)] if centered else []))
            plgpu.commit_smem()  # orders the reads of what arrived and the writes of dx before the copies that follow
            plgpu.copy_smem_to_gmem(dx_smem.at[group, out, used], dx_ref.at[piece.first + i, piece.index])
            return tuple(total + term for total, term in zip(totals, terms, strict=True))

        zeros = plgpu.layout_cast(jnp.zeros(row.shape, jnp.float32), row.layout)
        totals = stream(
            *copies(piece, source_refs, arrived), lambda slot: ready.at[group, slot],
            piece.count, t.stages, differentiate, (zeros,) * sums,
        )  # fmt: skip
        for which, total in enumerate(totals):
            sums_ref[piece.worker, which, piece.index] = total
        plgpu.wait_smem_to_gmem(0)

    blocks = share(rows, t)[1]
    partials = (blocks * (t.groups // t.split), sums, t.split, *row.shape)
    like = jax.ShapeDtypeStruct(sources[0].shape, x.dtype)
    dx, partial = call(
        body,
        f"{name}_backward",
        [like, jax.ShapeDtypeStruct(partials, jnp.float32)],
        scratch(row, t, sources, [like], [scale]),
        blocks,
        t,
    )(*sources, to_rows(row, scale)[0])
    totals = partial.sum(0).reshape(sums, t.split, row.size)[:, :, : row.piece].reshape(sums, -1)[:, : row.features]
    dbias = totals[1].astype(bias.dtype) if centered else None
    return from_rows(row, dx, x.shape), totals[0].astype(scale.dtype), dbias
