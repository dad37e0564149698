"""group_norm on Mosaic GPU: y = (x - mean) · r · scale + bias, r = rsqrt(var + eps), over all axes but the first and
the last and over the channels of a group.

    dx = r · (h - mean(h) - x̂ · mean(h · x̂)),   h = dy · scale,   x̂ = (x - mean) · r
    dscale = Σ dy · x̂,   dbias = Σ dy

A block has a share of the channels of x[batch, positions, channels], whole groups. Where all positions of one batch fit
its shared memory, they stay there: x is read once. Else x is read twice, by two kernels, for the sums and for the
result, and a block has a share of the positions, too. Its warpgroups stream tiles by TMA. Every thread keeps the
statistics of what it sees of its channels, and joins those of each tile as Chan, Golub and LeVeque do (1983): nothing
cancels. Threads, warpgroups and blocks are joined in the same way; the last by the second kernel, which also writes the
parameters' gradients. XLA is left with those of several batches that were read once.

`batch_norm` is the same with all its positions in one batch and a group for every channel.
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
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips, tuned
from pallas_kernels.gpu import row_norm
from pallas_kernels.gpu.row_norm import DTYPES, GROUPS, MAX_COPY, PHASES, THREADS
from pallas_kernels.padding import pad_to, round_up

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]
HELD = 16  # channels of which a thread keeps sums: twice as many registers, and as many kilobytes to join them in
f32 = jnp.float32


def _tiled(tiles, warps: int, lanes: tuple[int, int]):
    """Dimensions `warps` and `lanes` of the tiles, counted from the end, across the warps and their lanes."""
    layout = fragmented_array.TiledLayout(
        fragmented_array.Tiling(tiles), (warps,), lanes, -1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(
        layout.tiling, warp_dims=layout.warp_dims, lane_dims=layout.lane_dims, vector_dim=layout.vector_dim
    )


@dataclasses.dataclass(frozen=True)
class Columns:
    """`width` channels of a tile, of which a thread reads `vector` at once; `across` of them lie across the threads."""

    width: int
    vector: int

    @property
    def across(self) -> int:
        return min(self.width & -self.width, THREADS // 4 * self.vector)

    @property
    def held(self) -> int:
        """Channels of a thread."""
        return self.width // self.across * self.vector

    @property
    def rows(self) -> int:
        """Rows that a warpgroup reads at once."""
        return THREADS * self.vector // self.across

    @property
    def layout(self):
        """Of [rows, across]: consecutive threads along a row."""
        return _tiled(((self.rows, self.across), (self.rows // 4, self.across), (1, self.vector)), -6, (-4, -3))

    @property
    def joined_rows(self) -> int:
        return THREADS // min(self.width & -self.width, THREADS)

    @property
    def joined(self):
        """Of [multiple of joined_rows, width]: the rows of a column are in one warp, which adds them up."""
        across = THREADS // self.joined_rows
        tile = (self.joined_rows, across)
        return _tiled((tile, (self.joined_rows, across // 4), (1, 1)), -5, (-4, -3))

    @property
    def piece(self) -> int:
        """Rows that are joined at once: 32 numbers of a thread."""
        return max(round_up(32 * THREADS // self.width, self.joined_rows), self.joined_rows)


@dataclasses.dataclass(frozen=True)
class Load:
    """x[batch, positions, channels] in groups of `size` channels; forward x is read, backward dy, too."""

    batch: int
    positions: int
    channels: int
    size: int
    itemsize: int
    arriving: int

    @staticmethod
    def of(phase: str, x, num_groups: int) -> "Load":
        """Of x[batch, ..., channels]; `channels` is filled up to what TMA copies, multiples of 16 bytes."""
        size, itemsize = x.shape[-1] // num_groups, x.dtype.itemsize
        channels = x.shape[-1]
        if channels * itemsize % 16:
            channels = round_up(channels, math.lcm(size, 16 // itemsize))
        positions = math.prod(x.shape[1:-1])
        return Load(x.shape[0], positions, channels, size, itemsize, 2 if phase == "backward" else 1)

    def columns(self, width: int) -> Columns | None:
        """So many channels in the widest reads that leave few to a thread; None: they cannot be a block's."""
        if width < 1 or self.channels % width or width % math.lcm(self.size, 16 // self.itemsize) or width > MAX_COPY:
            return None
        found = (
            Columns(width, vector) for vector in (8, 4, 2, 1) if vector * self.itemsize <= 16 and not width % vector
        )
        return next((columns for columns in found if columns.held <= HELD), None)

    def widths(self) -> list[int]:
        """Those a block can have, the best first: 128 bytes or what is nearest."""
        unit = math.lcm(self.size, 16 // self.itemsize)
        fit = [width for width in range(unit, MAX_COPY + 1, unit) if self.columns(width)]
        return sorted(fit, key=lambda width: (short := width * self.itemsize < 128, -width if short else width))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`blocks` of `groups` warpgroups and `width` channels. A tile is `steps` reads of a warpgroup high; each has
    `stages` slots for tiles to arrive in and `stores` to leave. No stages: all tiles stay, each in a slot of its
    own."""

    blocks: int
    groups: int
    width: int
    steps: int
    stages: int
    stores: int

    def slots(self, load: Load, columns: Columns) -> int:
        """Tiles of a warpgroup in shared memory."""
        return self.stages or pl.cdiv(pl.cdiv(load.positions, self.steps * columns.rows), self.groups)

    def smem_bytes(self, load: Load) -> int:
        """Shared memory of a block: of the kernel that takes more."""
        columns = load.columns(self.width)
        assert columns is not None
        part = THREADS * columns.held
        slot = self.steps * part * load.itemsize
        arriving, sums = self.slots(load, columns) * load.arriving * slot, 2 * part * 4
        most = max(arriving + sums, arriving + self.stores * slot) if self.stages else arriving + sums
        return self.groups * most + 32 * (columns.width + columns.piece) + 4096

    def allowed(self, load: Load) -> bool:
        """Whether the copies are short enough, and shared memory and registers suffice."""
        columns = load.columns(self.width)
        if columns is None or min(self.blocks, self.groups, self.steps, self.stores) < 1 or self.groups > 8:
            return False
        if self.steps * columns.rows > MAX_COPY or self.steps * columns.held * self.groups > 64 * GROUPS:
            return False
        if self.stages == 1 or self.stages < 0 or self.slots(load, columns) > 16:
            return False
        share = pl.cdiv(self.blocks, chips.current("gpu").cores) if self.stages else 1
        return self.smem_bytes(load) * share <= chips.current("gpu").smem_bytes

    @staticmethod
    def default(load: Load) -> "Tiles | None":
        """All positions at once where they fit and at least 32 bytes of channels to a block give most of the
        multiprocessors work. Else one block on each, tiles as high as fit: what a tile costs is then shared by most
        rows.

        None: nothing fits.
        """
        blocks = chips.current("gpu").cores
        at_once = [
            Tiles(blocks, GROUPS, width, steps, 0, 1)
            for width in load.widths()
            if width * load.itemsize >= 32 and 4 * load.batch * (load.channels // width) >= 3 * blocks
            for steps in (8, 4, 2, 1)
        ]
        depths = ((8, 2, 1), (4, 3, 2), (4, 2, 1), (2, 3, 2), (2, 2, 1), (1, 4, 2), (1, 2, 1))
        twice = [Tiles(blocks, GROUPS, width, *depth) for width in load.widths()[:1] for depth in depths]
        return next((tiles for tiles in (*at_once, *twice) if tiles.allowed(load)), None)


def unsupported(x, scale, bias, *, num_groups: int, eps: float) -> str | None:
    """Why these kernels do not take x[batch, ..., channels], scale[channels], bias[channels]; None if they do."""
    return refusal(x, scale, bias, num_groups)


def refusal(x, scale, bias, num_groups: int) -> str | None:
    """Why these kernels do not take the operands, or None."""
    chip = chips.current("gpu")
    if chip.capability < (9, 0):
        capability = ".".join(map(str, chip.capability))
        return f"tiles are streamed by TMA, which needs compute capability 9.0, got {capability}"
    for name, operand in (("x", x), ("scale", scale), ("bias", bias)):
        if operand.dtype not in DTYPES:
            return f"{name} must be float32, bfloat16 or float16, got {operand.dtype}"
    if any(Tiles.default(Load.of(phase, x, num_groups)) is None for phase in PHASES):
        size, bytes_ = x.shape[-1] // num_groups, 16 // x.dtype.itemsize
        return (
            f"groups that together are a multiple of {bytes_} channels must be at most {MAX_COPY} channels wide and "
            f"lie across the threads {HELD} to each, got groups of {size} channels"
        )
    return None


def tiles(phase: str, x, scale, bias, *, num_groups: int, eps: float) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return best("group_norm", phase, x, num_groups)


def best(operator: str, phase: str, x, num_groups: int) -> Tiles:
    """The tuned tiles of an operator for x[batch, ..., channels], else the default."""
    load = Load.of(phase, x, num_groups)
    default = Tiles.default(load)
    assert default is not None, "`unsupported` refuses what no tiles fit"
    return tuned.choose(
        f"gpu.{operator}.{phase}",
        chips.current("gpu"),
        {"batch": load.batch, "positions": load.positions, "features": load.channels},
        jnp.dtype(x.dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(load),
        default,
    )


_tiles = tiles  # where an argument has this name


def candidates(phase: str, x, scale, bias, *, num_groups: int, eps: float) -> Iterator[Tiles]:
    """The default, then lower tiles, more of them on their way, and two blocks on a multiprocessor."""
    load, cores = Load.of(phase, x, num_groups), chips.current("gpu").cores
    found = [
        Tiles(share * cores, groups, width, steps, *depth)
        for width in load.widths()[:3]
        for share, groups, steps in itertools.product((1, 2), (GROUPS, 2, 8), (8, 4, 2, 1))
        for depth in ((0, 1), (2, 1), (2, 2), (3, 2), (4, 2))
    ]
    yield from (t for t in dict.fromkeys([Tiles.default(load), *found]) if t is not None and t.allowed(load))


def memory(phase: str, tiles: Tiles, x, scale, bias, *, num_groups: int, eps: float) -> int:
    """Bytes of shared memory that a block of `phase` is estimated to take."""
    return tiles.smem_bytes(Load.of(phase, x, num_groups))


class Share:
    """What a warpgroup has of x: `count` tiles of its block's positions and channels, from the tile `first` on."""

    def __init__(self, load: Load, tiles: Tiles):
        columns = load.columns(tiles.width)
        assert columns is not None
        self.load, self.tiles, self.columns, self.slots = load, tiles, columns, tiles.slots(load, columns)
        self.height = tiles.steps * self.columns.rows
        self.slices = load.channels // self.columns.width
        total = pl.cdiv(load.positions, self.height)
        chunks = max(1, tiles.blocks // (load.batch * self.slices)) if tiles.stages else 1
        self.each = pl.cdiv(total, chunks * tiles.groups)
        self.chunks, self.total = pl.cdiv(total, self.each * tiles.groups), total
        self.span = self.each * tiles.groups * self.height  # positions of a block
        self.blocks = load.batch * self.slices * self.chunks
        self.partials = load.batch * self.chunks + self.columns.piece  # pieces are read past the end

    def enter(self):
        """Inside the kernel: who this is."""
        block, self.group = lax.axis_index("block"), lax.axis_index("group")
        self.chunk, rest = lax.rem(block, self.chunks), lax.div(block, self.chunks)
        self.slice, self.batch = lax.rem(rest, self.slices), lax.div(rest, self.slices)
        self.over = pl.ds(self.slice * self.columns.width, self.columns.width)
        self.first = self.first_of(self.group)
        self.count = self.count_of(self.first)
        return self

    def first_of(self, group):
        return (self.chunk * self.tiles.groups + group) * self.each

    def count_of(self, first):
        return lax.clamp(0, self.total - first, self.each)

    def tile(self, ref):
        """Where the i-th tile is in x or its like."""
        return lambda i: ref.at[self.batch, pl.ds((self.first + i) * self.height, self.height), self.over]

    def stream(self, refs, slots, ready, body, init):
        return row_norm.stream(
            [self.tile(ref) for ref in refs],
            [lambda slot, smem=smem: smem.at[self.group, slot] for smem in slots],
            lambda slot: ready.at[self.group, slot],
            self.count,
            self.slots,
            body,
            init,
        )

    def parts(self):
        """The columns of each part of a tile that lies across the threads."""
        return [pl.ds(start, self.columns.across) for start in range(0, self.columns.width, self.columns.across)]

    def step(self, k: int):
        return pl.ds(k * self.columns.rows, self.columns.rows)

    def read(self, slot, k, columns):
        """One part in float32."""
        return plgpu.load(slot.at[self.step(k), columns], layout=self.columns.layout, optimized=False).astype(f32)

    def along(self, vectors, which: int, columns):
        """A number of every channel, for a part."""
        line = plgpu.load(vectors.at[which, columns], layout=self.columns.layout.reduce(0), optimized=False)
        part = lax.broadcast_in_dim(line, (self.columns.rows, self.columns.across), [1])
        return plgpu.layout_cast(part, self.columns.layout)

    def line(self, ref):
        """A number of every channel, to be computed with."""
        return plgpu.load(ref, layout=self.columns.joined.reduce(0), optimized=False).astype(f32)

    def tall(self, line, rows: int):
        """The same for so many rows, to be joined."""
        return plgpu.layout_cast(lax.broadcast_in_dim(line, (rows, self.columns.width), [1]), self.columns.joined)

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros((self.columns.rows, self.columns.across), f32), self.columns.layout)

    def no_line(self):
        return plgpu.layout_cast(jnp.zeros(self.columns.width, f32), self.columns.joined.reduce(0))

    def positions(self, row, rows: int, limit, layout, shape):
        """How many of the rows row, row + rows … of the first `limit` that each of the rows of a tile meets are
        positions, in float32."""
        each = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
        left = self.load.positions - row + rows - 1 - each  # at least 0, or the quotient is of no use
        return lax.clamp(0, lax.div(jnp.maximum(left, 0), rows), limit).astype(f32)

    def joined(self, pieces, read):
        """(mean, Σ (x - mean)²) of every channel: of read(i) = (numbers, their sum, means, squares), each but the sum
        [rows, width], joined over i < pieces."""

        def join(i, carry):
            before, mean, square = carry
            numbers, count, means, squares = read(i)
            rows = numbers.shape[0]
            add = functools.partial(jnp.sum, axis=0)
            here = add(numbers * means) * (1 / jnp.maximum(count, 1.0))
            apart = means - self.tall(here, rows)
            inside = add(squares + numbers * apart * apart)
            share = count / jnp.maximum(before + count, 1.0)
            delta = here - mean
            return before + count, mean + delta * share, square + inside + delta * delta * (before * share)

        return lax.fori_loop(0, pieces, join, (jnp.float32(0), self.no_line(), self.no_line()))[1:]

    def rows_of(self, partials_ref, which, start, count):
        """Rows start … of the partial sums, 0 where there are not so many."""
        shape = (self.columns.piece, self.columns.width)
        value = plgpu.load(
            partials_ref.at[pl.ds(start, shape[0]), which, self.over], layout=self.columns.joined, optimized=False
        )
        return jnp.where(plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=self.columns.joined) < count, value, 0.0)

    def added(self, partials_ref, which, start, count):
        """Σ of `count` rows of the partial sums."""
        size = self.columns.piece

        def add(i, total):
            return total + jnp.sum(self.rows_of(partials_ref, which, start + i * size, count - i * size), axis=0)

        return lax.fori_loop(0, lax.div(count + size - 1, size), add, self.no_line())

    def over_group(self, line, lines):
        """The sum over the channels of its group, for every channel. `lines`: a line of shared memory, longer than the
        width by a piece."""
        size, width = self.load.size, self.columns.width
        if size == 1:
            return line
        rows, layout = self.columns.piece, self.columns.joined
        plgpu.store(lines.at[pl.ds(0, width)], line, optimized=False)
        shape = (rows, width)
        mine = lax.div(plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout), size)

        def add(i, total):
            theirs = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + i * rows
            value = plgpu.load(lines.at[pl.ds(i * rows, rows)], layout=layout.reduce(1), optimized=False)
            value = plgpu.layout_cast(lax.broadcast_in_dim(value, shape, [0]), layout)
            return total + jnp.sum(jnp.where(lax.div(theirs, size) == mine, value, 0.0), axis=0)

        return lax.fori_loop(0, pl.cdiv(width, rows), add, self.no_line())

    def spread(self, number):
        """number(group) for every channel of each group of this block."""
        size, width = self.load.size, self.columns.width
        channel = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=self.columns.joined.reduce(0))
        line = self.no_line()
        for group in range(width // size):
            line = jnp.where(channel >= group * size, number(group).astype(f32), line)
        return line

    def from_groups(self, ref):
        """The number of its group for every channel, from ref[batch, groups]."""
        if self.load.size == 1:
            return self.line(ref.at[self.batch, self.over])
        first = self.slice * (self.columns.width // self.load.size)
        return self.spread(lambda group: ref[self.batch, first + group])

    def pivot(self, x_ref):
        """The first element of its group for every channel: means are kept as differences from it, so that those far
        from 0 lose nothing."""
        if self.load.size == 1:
            return self.line(x_ref.at[self.batch, 0, self.over])
        first, size = self.slice * self.columns.width, self.load.size
        return self.spread(lambda group: x_ref[self.batch, 0, first + group * size])

    def to_groups(self, ref, line, lines):
        """The inverse of `from_groups`."""
        size, width = self.load.size, self.columns.width
        if size == 1:
            plgpu.store(ref.at[self.batch, self.over], line, optimized=False)
            return
        plgpu.store(lines.at[pl.ds(0, width)], line, optimized=False)
        for group in range(width // size):
            ref[self.batch, self.slice * (width // size) + group] = lines[group * size]

    def call(self, body, name, out_type, slots, leaving, vectors, summed, operands):
        """The kernel. Scratch: tiles that arrive, that leave; what warpgroups join; lines of numbers of channels."""
        tiles, columns = self.tiles, self.columns
        scratch: dict[str, Any] = dict(
            arrived=[plgpu.SMEM((tiles.groups, self.slots, self.height, columns.width), a.dtype) for a in slots],
            leaving=[plgpu.SMEM((tiles.groups, tiles.stores, self.height, columns.width), a.dtype) for a in leaving],
            ready=plgpu.Barrier(num_barriers=(tiles.groups, self.slots), num_arrivals=len(slots)),
            met=plgpu.Barrier(num_arrivals=tiles.groups),
            vectors=plgpu.SMEM((max(vectors, 1), columns.width), f32),
            sums=plgpu.SMEM((tiles.groups, 2, columns.rows, columns.width) if summed else (1,), f32),
            lines=plgpu.SMEM((columns.width + columns.piece,), f32),
        )
        return plgpu.kernel(
            body,
            kernel_name=name,
            out_type=out_type,
            scratch_types=scratch,
            grid=(self.blocks,),
            grid_names=("block",),
            num_threads=tiles.groups,
            thread_name="group",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        )(*operands)

    def first_group(self, met, compute):
        """compute() in one warpgroup; then all go on."""
        pl.when(self.group == 0)(compute)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

    def write(self, refs, ref, arrived, leaving, ready, init, result):
        """Streams tiles and writes result(columns)(parts of the arrays) to where they came from. If all tiles stay they
        have arrived, and the result takes the place of the first array."""

        def one(i, slot, _):
            target = arrived[0].at[self.group, slot]
            if self.tiles.stages:
                target = leaving[0].at[self.group, lax.rem(i, self.tiles.stores)]
                plgpu.wait_smem_to_gmem(self.tiles.stores - 1, wait_read_only=True)  # the slot's last store has left
            for columns in self.parts():
                compute = result(columns)
                for k in range(self.tiles.steps):
                    value = compute(*(self.read(smem.at[self.group, slot], k, columns) for smem in arrived))
                    plgpu.store(target.at[self.step(k), columns], value.astype(ref.dtype), optimized=False)
            plgpu.commit_smem()  # orders the reads of x and the writes of y before the copies that follow
            plgpu.copy_smem_to_gmem(target, self.tile(ref)(i))
            return ()

        if self.tiles.stages:
            self.stream(refs, arrived, ready, one, init)
        else:
            init()
            lax.fori_loop(0, self.count, lambda i, _: one(i, i, ()), ())
        plgpu.wait_smem_to_gmem(0)

    def beginning(self, met, vectors, line):
        """For `stream`: two zeros for each part, when the first warpgroup has put line() where `along` reads it."""

        def init():
            self.first_group(met, lambda: plgpu.store(vectors.at[0], line(), optimized=False))
            return tuple((self.zeros(), self.zeros()) for _ in self.parts())

        return init

    def hand_over(self, values, sums, met):
        """Puts what this warpgroup has summed, a list of values for each part, where the first one joins them."""
        for over, pair in zip(self.parts(), values, strict=True):
            for which, value in enumerate(pair):
                plgpu.store(sums.at[self.group, which, :, over], value, optimized=False)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

    def handed(self, sums, group, which):
        return plgpu.load(sums.at[group, which], layout=self.columns.joined, optimized=False)

    def statistics(self, x_ref, arrived, ready, met, sums, vectors):
        """Streams x; (mean - pivot, Σ (x - mean)²) of every channel of this block, to be called in the first
        warpgroup."""
        columns, steps, positions = self.columns, self.tiles.steps, self.load.positions
        ragged, shape = positions % self.height > 0, (columns.rows, columns.across)

        def collect(i, slot, carry):
            row, before = (self.first + i) * self.height, (i * steps).astype(f32)
            count: Any = float(steps)
            inverse, weight = 1 / count, count / (before + count)
            if ragged:
                count = self.positions(row, columns.rows, steps, columns.layout, shape)
                inverse, weight = 1 / jnp.maximum(count, 1.0), count / jnp.maximum(before + count, 1.0)
                index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=columns.layout)

            def within(values):
                """0 past the end."""
                if not ragged:
                    return values
                last = positions - row
                return [jnp.where(index + k * columns.rows < last, value, 0.0) for k, value in enumerate(values)]

            found = []
            for over, (mean, square) in zip(self.parts(), carry, strict=True):
                pivot, tile = self.along(vectors, 0, over), arrived[0].at[self.group, slot]
                values = within([self.read(tile, k, over) - pivot for k in range(steps)])
                here = functools.reduce(jnp.add, values) * inverse
                apart = within([value - here for value in values])
                delta = here - mean
                square += functools.reduce(jnp.add, [value * value for value in apart])
                found.append((mean + delta * weight, square + delta * delta * (before * weight)))
            plgpu.commit_smem()  # orders the reads before the copies that follow
            return tuple(found)

        init = self.beginning(met, vectors, lambda: self.pivot(x_ref))
        self.hand_over(self.stream([x_ref], arrived, ready, collect, init), sums, met)

        def read(group):
            first = self.first_of(group)
            count = self.count_of(first)
            whole = (columns.rows, columns.width)
            numbers = self.positions(first * self.height, columns.rows, count * steps, columns.joined, whole)
            total = lax.clamp(0, positions - first * self.height, count * self.height).astype(f32)
            return numbers, total, self.handed(sums, group, 0), self.handed(sums, group, 1)

        return lambda: self.joined(self.tiles.groups, read)

    def products(self, refs, mean_ref, spread_ref, eps, arrived, ready, met, sums, vectors):
        """Streams x and dy; (Σ dy, Σ dy · x̂) of every channel of this block, to be called in the first warpgroup."""

        def collect(i, slot, carry):
            del i
            found = []
            for over, (shift, slope) in zip(self.parts(), carry, strict=True):
                mean = self.along(vectors, 0, over)
                for k in range(self.tiles.steps):
                    x, dy = (self.read(smem.at[self.group, slot], k, over) for smem in arrived)
                    shift, slope = shift + dy, slope + dy * (x - mean)  # past the end dy is 0
                found.append((shift, slope))
            plgpu.commit_smem()  # orders the reads before the copies that follow
            return tuple(found)

        init = self.beginning(met, vectors, lambda: self.from_groups(mean_ref))
        self.hand_over(self.stream(refs, arrived, ready, collect, init), sums, met)

        def join():
            def add(group, totals):
                return tuple(t + jnp.sum(self.handed(sums, group, which), axis=0) for which, t in enumerate(totals))

            shift, slope = lax.fori_loop(0, self.tiles.groups, add, (self.no_line(), self.no_line()))
            return shift, slope * _inverse(self.from_groups(spread_ref), eps)

        return join

    def put_partials(self, partials_ref, lines):
        """In the first warpgroup, as sums of this block."""

        @pl.when(self.group == 0)
        def _():
            for which, line in enumerate(lines()):
                row = self.batch * self.chunks + self.chunk
                plgpu.store(partials_ref.at[row, which, self.over], line, optimized=False)

    @property
    def sums_of_blocks(self):
        return jax.ShapeDtypeStruct((self.partials, 2, self.load.channels), f32)


def normalized(x, scale, bias, load: Load, tiles: Tiles, *, eps: float, name: str, inverse: bool):
    """(y like x[batch, positions, channels], mean, var), both float32 [batch, groups]; r for var if `inverse`."""
    share = Share(load, tiles)
    columns, count = share.columns, load.size * load.positions

    def collect(x_ref, partials_ref, *, arrived, leaving, ready, met, vectors, sums, lines):
        s = share.enter()
        s.put_partials(partials_ref, s.statistics(x_ref, arrived, ready, met, sums, vectors))

    partials = []
    if tiles.stages:
        partials = [share.call(collect, f"{name}_statistics", share.sums_of_blocks, [x], [], 1, True, [x])]

    def body(x_ref, scale_ref, bias_ref, *refs, arrived, leaving, ready, met, vectors, sums, lines):
        *partials_ref, y_ref, mean_ref, var_ref = refs
        s = share.enter()
        MEAN, GAIN, BIAS = range(3)

        def of_blocks():
            size = columns.piece

            def read(i):
                shape, start = (size, columns.width), i * size
                index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=columns.joined)
                left = load.positions - jnp.minimum(index + start, s.chunks) * s.span
                numbers = lax.clamp(0, left, s.span).astype(f32)
                most = min(size * s.span, load.positions)  # in 32 bits
                total = lax.clamp(0, load.positions - start * s.span, most).astype(f32)
                row, rows = s.batch * s.chunks + start, s.chunks - start
                return numbers, total, *(s.rows_of(partials_ref[0], which, row, rows) for which in (0, 1))

            return s.joined(pl.cdiv(s.chunks, size), read)

        own_statistics = of_blocks if tiles.stages else s.statistics(x_ref, arrived, ready, met, sums, vectors)

        def finish():
            mean, square = own_statistics()
            if load.size > 1:
                own, mean = mean, s.over_group(mean, lines) * (1 / load.size)
                square = s.over_group(square + float(load.positions) * (own - mean) * (own - mean), lines)
            var = square * (1 / count)
            r, mean = lax.rsqrt(var + eps), mean + s.pivot(x_ref)

            @pl.when(s.chunk == 0)
            def _():
                s.to_groups(mean_ref, mean, lines)
                s.to_groups(var_ref, r if inverse else var, lines)

            found = (mean, r * s.line(scale_ref.at[s.over]), s.line(bias_ref.at[s.over]))
            for which, line in enumerate(found):
                plgpu.store(vectors.at[which], line, optimized=False)

        def result(over):
            mean, gain, add = (s.along(vectors, which, over) for which in (MEAN, GAIN, BIAS))
            return lambda x: (x - mean) * gain + add

        s.write([x_ref], y_ref, arrived, leaving, ready, lambda: s.first_group(met, finish) or (), result)

    statistic = jax.ShapeDtypeStruct((load.batch, load.channels // load.size), f32)
    leaving = [x] if tiles.stages else []
    operands = [x, scale, bias, *partials]
    return share.call(body, name, [x, statistic, statistic], [x], leaving, 3, not tiles.stages, operands)


def _inverse(spread, eps: float | None):
    """The inverse deviation, where it is a variance: eps is not None."""
    return spread if eps is None else lax.rsqrt(spread + eps)


def gradients(
    x, dy, scale, mean, spread, load: Load, tiles: Tiles, *, bias_dtype, name: str, eps=None, dmean=None, dvar=None
):
    """(dx like x[batch, positions, channels], dscale, dbias). spread: r, or with `eps` the variance; both it and mean
    are float32 [batch, groups], as dmean and dvar, the cotangents of mean and variance, or None."""
    share = Share(load, tiles)
    more = [a for a in (dmean, dvar) if a is not None]
    count = load.size * load.positions

    def collect(
        x_ref, dy_ref, mean_ref, spread_ref, partials_ref, *, arrived, leaving, ready, met, vectors, sums, lines
    ):
        s = share.enter()
        found = s.products([x_ref, dy_ref], mean_ref, spread_ref, eps, arrived, ready, met, sums, vectors)
        s.put_partials(partials_ref, found)

    partials = []
    if tiles.stages:
        operands = [x, dy, mean, spread]
        partials = [share.call(collect, f"{name}_sums", share.sums_of_blocks, [x, dy], [], 1, True, operands)]

    def body(
        x_ref, dy_ref, scale_ref, mean_ref, spread_ref, *refs, arrived, leaving, ready, met, vectors, sums, lines
    ):  # fmt: skip
        *more_refs, dx_ref, first_ref, second_ref = refs
        s = share.enter()
        MEAN, GAIN, LEVEL, SLOPE = range(4)
        if tiles.stages:
            sums_ref = more_refs.pop(0)

            def found():
                return tuple(s.added(sums_ref, which, s.batch * s.chunks, s.chunks) for which in (0, 1))
        else:
            found = s.products([x_ref, dy_ref], mean_ref, spread_ref, eps, arrived, ready, met, sums, vectors)

        def finish():
            shift, slope = found()
            if not tiles.stages:
                for ref, line in ((first_ref, slope), (second_ref, shift)):
                    plgpu.store(ref.at[s.batch, s.over], line, optimized=False)
            mean, r = s.from_groups(mean_ref), _inverse(s.from_groups(spread_ref), eps)
            weight = s.line(scale_ref.at[s.over])
            level = r * s.over_group(shift * weight, lines) * (1 / count)
            slope = r * r * s.over_group(slope * weight, lines) * (1 / count)
            left = list(more_refs)
            if dmean is not None:
                level -= s.from_groups(left.pop(0)) * (1 / count)
            if dvar is not None:
                slope -= s.from_groups(left.pop(0)) * (2 / count)
            for which, line in ((MEAN, mean), (GAIN, r * weight), (LEVEL, level), (SLOPE, slope)):
                plgpu.store(vectors.at[which], line, optimized=False)

        def result(over):
            mean, gain, level, slope = (s.along(vectors, which, over) for which in (MEAN, GAIN, LEVEL, SLOPE))
            return lambda x, dy: dy * gain - level - (x - mean) * slope

        init = lambda: s.first_group(met, finish) or ()
        s.write([x_ref, dy_ref], dx_ref, arrived, leaving, ready, init, result)
        if tiles.stages:

            @pl.when((s.group == 0) & (s.batch == 0) & (s.chunk == 0))
            def _():
                for which, ref in ((1, first_ref), (0, second_ref)):
                    line = s.added(sums_ref, which, 0, load.batch * s.chunks)
                    plgpu.store(ref.at[s.over], line.astype(ref.dtype), optimized=False)

    dtypes, leaving = (scale.dtype, bias_dtype), [x] if tiles.stages else []
    outs = [jax.ShapeDtypeStruct((load.channels,), dtype) for dtype in dtypes]
    if not tiles.stages:
        outs = [jax.ShapeDtypeStruct((load.batch, load.channels), f32)] * 2
    operands = [x, dy, scale, mean, spread, *partials, *more]
    dx, *found = share.call(body, f"{name}_backward", [x, *outs], [x, dy], leaving, 4, not tiles.stages, operands)
    if not tiles.stages:
        found = [a.sum(0).astype(dtype) for a, dtype in zip(found, dtypes, strict=True)]
    return dx, *found


def flat(a, load: Load):
    """a[batch, ..., channels] as [batch, positions, channels], filled up."""
    return pad_to(a.reshape(load.batch, load.positions, a.shape[-1]), 2, load.channels)


def forward(x, scale, bias, *, num_groups: int, eps: float, tiles: Tiles | None = None):
    """((y like x,), (mean, inverse deviation)), both float32 [batch, num_groups]."""
    load = Load.of("forward", x, num_groups)
    t = tiles or _tiles("forward", x, scale, bias, num_groups=num_groups, eps=eps)
    scale, bias = (pad_to(a, 0, load.channels) for a in (scale, bias))
    y, *statistics = normalized(flat(x, load), scale, bias, load, t, eps=eps, name="group_norm", inverse=True)
    return (y[..., : x.shape[-1]].reshape(x.shape),), tuple(s[:, :num_groups] for s in statistics)


def backward(
    x, scale, bias, *, outputs, residuals, cotangents, num_groups: int, eps: float, tiles: Tiles | None = None
) -> dict[str, jax.Array]:
    """Gradients of x, scale and bias from the cotangent of y."""
    load, channels = Load.of("backward", x, num_groups), x.shape[-1]
    t = tiles or _tiles("backward", x, scale, bias, num_groups=num_groups, eps=eps)
    mean, inverse = (pad_to(s, 1, load.channels // load.size) for s in residuals)
    dx, dscale, dbias = gradients(
        flat(x, load), flat(cotangents[0], load), pad_to(scale, 0, load.channels), mean, inverse, load, t,
        bias_dtype=bias.dtype, name="group_norm",
    )  # fmt: skip
    return {"x": dx[..., :channels].reshape(x.shape), "scale": dscale[:channels], "bias": dbias[:channels]}
