"""group_norm on the TPU: y = (x - mean) · r · scale + bias, r = rsqrt(var + eps), over all axes but the first and the
last and over the channels of a group.

    dx = r · (h - mean(h) - x̂ · mean(h · x̂)),   h = dy · scale,   x̂ = (x - mean) · r
    dscale = Σ dy · x̂,   dbias = Σ dy

x[batch, ..., channels] is float32 or bfloat16; sums are float32. All axes between are one, the positions. A sum runs
over the positions of each channel first; a product with the matrix of which channel is in which group makes those of
the groups. Where the positions of a batch fit VMEM, x is read once, else twice: for the sums, a block of positions at a
time, and again for the result. Statistics of blocks are joined as Chan, Golub and LeVeque do (1983): nothing cancels.
Where every channel is a group, a block may hold some of the channels: then the positions of more batches fit.

`batch_norm` is the same with all its positions in one batch.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuned
from pallas_kernels.padding import round_up
from pallas_kernels.tpu import row_norm
from pallas_kernels.tpu.row_norm import LANES, ROWS, SLACK, SUBLANES, f32

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]
PHASE, BLOCK = 2, 3  # of the grid (batches, shares of the channels, phases, blocks of positions)
VECTORS = 16  # float32 arrays [8, channels] that are held besides: statistics, parameters, sums


@dataclasses.dataclass(frozen=True)
class Load:
    """What a kernel holds of x[batch, positions, channels]: `width` bytes of an element in all arrays of that size."""

    positions: int
    channels: int
    groups: int
    dtype: jnp.dtype
    width: int

    batch: int

    @staticmethod
    def of(phase: str, x, num_groups: int) -> "Load":
        width = (3 if phase == "backward" else 2) * x.dtype.itemsize
        return Load(math.prod(x.shape[1:-1]), x.shape[-1], num_groups, jnp.dtype(x.dtype), width, x.shape[0])

    def vmem_bytes(self, rows: int, channels: int | None = None) -> int:
        columns = round_up(channels or self.channels, LANES)
        members = 0 if self.groups == self.channels else 2 * columns * round_up(self.groups, LANES) * 4
        return columns * (2 * round_up(rows, ROWS) * self.width + VECTORS * SUBLANES * 4) + members

    def shares(self) -> Iterator[int | None]:
        """How many channels a block may hold (None: all), the best first: eight blocks, if not so many as can be."""
        if self.groups < self.channels or self.channels <= LANES or self.batch >= 8:
            yield None
        if self.groups == self.channels > LANES:
            share = self.channels * self.batch // 8 // LANES * LANES
            yield from range(min(max(share, LANES), self.channels // LANES * LANES), 0, -LANES)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of a block, all positions or a multiple of `group`, the rows of a turn (of 16), and its `columns` (of
    128). `channels` of a block, a multiple of 128, where every channel is a group; None: all."""

    rows: int
    group: int
    columns: int
    channels: int | None = None

    @staticmethod
    def default(load: Load) -> "Tiles":
        """All positions of a batch where they fit: then x is read once. A turn holds 64 registers, as tall as can be:
        its rows are added up at the end of each.

        Channels that are groups are shared out among blocks until there are eight, so that one is computed while
        others are moved; where their positions do not fit either, among two, one for each core.
        """
        room = chips.current("tpu").vmem_bytes - SLACK
        for channels in load.shares():
            columns = min(round_up(channels or load.channels, LANES), 256)
            group = 64 * 1024 // columns
            if load.positions <= group or load.vmem_bytes(load.positions, channels) <= room:
                return Tiles(load.positions, min(group, round_up(load.positions, ROWS)), columns, channels)
        channels = None
        if load.groups == load.channels > LANES and load.batch == 1:
            channels = round_up(load.channels, 2 * LANES) // 2
        columns = min(round_up(channels or load.channels, LANES), 256)
        rows = min(4 << 20, room // 8) // (load.width * round_up(channels or load.channels, LANES))
        group = max(min(64 * 1024 // columns, rows // ROWS * ROWS), ROWS)
        return Tiles(max(rows // group, 1) * group, group, columns, channels)

    def allowed(self, load: Load) -> bool:
        """Whether the sizes divide as they have to, no block lies past the end, and everything fits VMEM."""
        if min(self.rows, self.group, self.columns) < 1 or self.group % ROWS or self.columns % LANES:
            return False
        if self.rows != load.positions and (self.rows % self.group or self.rows > load.positions):
            return False
        if self.channels is not None and (load.groups < load.channels or self.channels % LANES or self.channels < 1):
            return False
        return load.vmem_bytes(self.rows, self.channels) + SLACK <= chips.current("tpu").vmem_bytes


def unsupported(x, scale, bias, *, num_groups: int, eps: float) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    return refusal(x, num_groups)


def refusal(x, num_groups: int) -> str | None:
    """Why the kernels cannot take x[batch, ..., channels], or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16 on a TPU, got {x.dtype}"
    vmem = chips.current("tpu").vmem_bytes
    if not all(Tiles.default(load := Load.of(p, x, num_groups)).allowed(load) for p in ("forward", "backward")):
        return (
            f"16 positions and the sums of all channels must fit the {vmem >> 20} MiB of VMEM, got {x.shape[-1]} "
            f"channels in {num_groups} groups"
        )
    return None


def tiles(phase: str, x, scale, bias, *, num_groups: int, eps: float) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return best("group_norm", phase, x, num_groups)


def best(operator: str, phase: str, x, num_groups: int) -> Tiles:
    """The tuned tiles of an operator for x[batch, ..., channels], else the default."""
    load = Load.of(phase, x, num_groups)
    return tuned.choose(
        f"tpu.{operator}.{phase}",
        chips.current("tpu"),
        {"batch": x.shape[0], "positions": load.positions, "features": load.channels},
        load.dtype.name,
        Tiles,
        lambda tiles: tiles.allowed(load),
        Tiles.default(load),
    )


_tiles = tiles  # where an argument has this name


def candidates(phase: str, x, scale, bias, *, num_groups: int, eps: float) -> Iterator[Tiles]:
    """The default, then narrower and wider turns of the same blocks, and blocks of part of the positions."""
    load = Load.of(phase, x, num_groups)
    default = Tiles.default(load)
    found = [default]
    for columns in (128, 256, 512, 1024):
        for registers in (64, 32, 128):
            group = registers * 1024 // columns
            found.append(Tiles(default.rows, group, columns, default.channels))
            found.extend(Tiles(rows // group * group, group, columns, default.channels) for rows in (2048, 512))
    yield from (tiles for tiles in dict.fromkeys(found) if tiles.allowed(load))


def memory(phase: str, tiles: Tiles, x, scale, bias, *, num_groups: int, eps: float) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return Load.of(phase, x, num_groups).vmem_bytes(tiles.rows, tiles.channels) + SLACK


def _turns(rows, tiles, body, carry):
    """carry = body(rows of the block, carry) for each group of `rows`, of which the last may be short."""
    whole = rows // tiles.group
    if whole:
        carry = lax.fori_loop(
            0, whole, lambda i, c: body(pl.ds(pl.multiple_of(i * tiles.group, tiles.group), tiles.group), c), carry
        )
    return body(pl.ds(whole * tiles.group, rows % tiles.group), carry) if rows % tiles.group else carry


def _sums(rows, valid, tiles, c, terms, count):
    """Σ over the first `valid` of `rows` of each of terms(rows)[rows, columns], [1, columns]; valid None: of all."""

    def add(here, carry):
        found = terms(here)
        if valid is not None:  # rows past the end hold anything, also NaN
            row = here.start + lax.broadcasted_iota(jnp.int32, found[0].shape, 0)
            found = [jnp.where(row < valid, term, 0.0) for term in found]
        return tuple(s + jnp.sum(term, 0, keepdims=True) for s, term in zip(carry, found, strict=True))

    return _turns(rows, tiles, add, (jnp.zeros((1, c), f32),) * count)


def _over_groups(sums, groups):
    """The sums of each group for every one of its channels: of each row of sums[8, channels]."""
    channels = sums.shape[1]
    if groups == channels:
        return sums
    size = channels // groups
    channel = lax.broadcasted_iota(jnp.int32, (channels, groups), 0)
    first = lax.broadcasted_iota(jnp.int32, (channels, groups), 1) * size
    member = jnp.where((channel >= first) & (channel < first + size), 1.0, 0.0)
    dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=f32)
    return dot(dot(sums, member, (((1,), (0,)), ((), ()))), member, (((1,), (1,)), ((), ())))


def _columns(ref_width, width, body):
    """body(columns, their number) for each slice of at most `width` channels; unrolled, there are few."""
    for start in range(0, ref_width, width):
        stop = min(start + width, ref_width)
        body(slice(start, stop), stop - start)


def _valid(rows, positions):
    """How many rows of this block are positions; None: all, always."""
    return positions - pl.program_id(BLOCK) * rows if positions % rows else None


def _phases(blocks, collect, finish, write):
    """Collects from all blocks, then finishes once and writes all blocks; of a single block all at once."""
    if blocks == 1:
        collect()
        finish()
        write()
        return
    pl.when(pl.program_id(PHASE) == 0)(collect)

    @pl.when(pl.program_id(PHASE) == 1)
    def _():
        pl.when(pl.program_id(BLOCK) == 0)(finish)
        write()


def _forward_kernel(x_ref, scale_ref, bias_ref, y_ref, mean_ref, var_ref, *, tiles, positions, groups, eps):
    """mean_ref and var_ref hold the statistics of every channel until those of its group are known."""
    rows, channels = x_ref.shape
    blocks, valid = pl.cdiv(positions, rows), _valid(rows, positions)

    def collect():
        before = pl.program_id(BLOCK) * rows  # positions seen already
        now = rows if valid is None else jnp.minimum(valid, rows)
        count = jnp.asarray(now, f32)
        share = count / (before + now).astype(f32) if blocks > 1 else 1.0

        def channel(c, n):
            read = lambda here: x_ref[here, c].astype(f32)
            (total,) = _sums(rows, valid, tiles, n, lambda here: (read(here),), 1)
            mean = total / count
            (square,) = _sums(rows, valid, tiles, n, lambda here: (jnp.square(read(here) - mean),), 1)
            if blocks > 1:
                first = pl.program_id(BLOCK) == 0
                apart = mean - jnp.where(first, 0.0, mean_ref[:, c])
                square += jnp.where(first, 0.0, var_ref[:, c] + jnp.square(apart) * (share * jnp.asarray(before, f32)))
                mean = jnp.where(first, mean, mean_ref[:, c] + apart * share)
            mean_ref[:, c], var_ref[:, c] = mean, square

        _columns(channels, tiles.columns, channel)

    def finish():
        size = channels // groups
        spread = lambda value: _over_groups(jnp.broadcast_to(value, (SUBLANES, channels)), groups)[:1]
        mean = spread(mean_ref[...]) / size
        square = var_ref[...] + positions * jnp.square(mean_ref[...] - mean)
        mean_ref[...], var_ref[...] = mean, spread(square) / (size * positions)

    def write():
        def channel(c, n):
            gain = lax.rsqrt(var_ref[:, c] + eps) * scale_ref[:, c]

            def turn(here, _):
                y = (x_ref[here, c].astype(f32) - mean_ref[:, c]) * gain + bias_ref[:, c]
                y_ref[here, c] = y.astype(y_ref.dtype)
                return 0

            _turns(rows, tiles, turn, 0)

        _columns(channels, tiles.columns, channel)

    _phases(blocks, collect, finish, write)


def _backward_kernel(
    x_ref,
    dy_ref,
    scale_ref,
    mean_ref,
    inverse_ref,
    less_ref,
    dx_ref,
    shift_ref,
    slope_ref,
    level_ref,
    *,
    tiles,
    positions,
    groups,
):
    """shift = Σ dy and slope = Σ dy · x̂ of every channel; level_ref[0:2]: the two means of dx, less less_ref[0:2]."""
    rows, channels = x_ref.shape
    blocks, valid = pl.cdiv(positions, rows), _valid(rows, positions)

    def collect():
        def channel(c, n):
            def terms(here):
                dy = dy_ref[here, c].astype(f32)
                return dy, dy * ((x_ref[here, c].astype(f32) - mean_ref[:, c]) * inverse_ref[:, c])

            for ref, total in zip((shift_ref, slope_ref), _sums(rows, valid, tiles, n, terms, 2), strict=True):
                ref[:, c] = total if blocks == 1 else jnp.where(pl.program_id(BLOCK) == 0, 0.0, ref[:, c]) + total

        _columns(channels, tiles.columns, channel)

    def finish():
        gain = scale_ref[...] * (groups / (channels * positions))
        row = lax.broadcasted_iota(jnp.int32, (SUBLANES, channels), 0)
        both = jnp.where(row == 0, shift_ref[...] * gain, slope_ref[...] * gain)
        level_ref[...] = _over_groups(both, groups) - less_ref[...]

    def write():
        def channel(c, n):
            def turn(here, _):
                normal = (x_ref[here, c].astype(f32) - mean_ref[:, c]) * inverse_ref[:, c]
                h = dy_ref[here, c].astype(f32) * scale_ref[:, c]
                dx = inverse_ref[:, c] * (h - level_ref[0:1, c] - normal * level_ref[1:2, c])
                dx_ref[here, c] = dx.astype(dx_ref.dtype)
                return 0

            _turns(rows, tiles, turn, 0)

        _columns(channels, tiles.columns, channel)

    _phases(blocks, collect, finish, write)


def _call(kernel, load, tiles, arrays, vectors, outputs, scratch, flops, name, **static):
    """The kernel's `outputs`, an array like x and so many vectors of every batch. arrays: like x[batch, positions,
    channels]; vectors: float32, [n, channels] or [batch, 1, channels]."""
    blocks, width = pl.cdiv(load.positions, tiles.rows), tiles.channels or load.channels
    # While sums are collected the block to write stays the first one, which is written when its turn comes.
    block = pl.BlockSpec((None, tiles.rows, width), lambda b, c, p, i: (b, i, c))
    result = pl.BlockSpec((None, tiles.rows, width), lambda b, c, p, i: (b, i * p if blocks > 1 else i, c))
    shared = lambda n: pl.BlockSpec((n, width), lambda b, c, p, i: (0, c))
    of_batch = pl.BlockSpec((None, 1, width), lambda b, c, p, i: (b, 0, c))
    groups = width if load.groups == load.channels else load.groups
    return row_norm.call(
        functools.partial(kernel, tiles=tiles, positions=load.positions, groups=groups, **static),
        ("parallel", "parallel", "arbitrary", "arbitrary"),
        load.vmem_bytes(tiles.rows, tiles.channels),
        (*arrays, *vectors),
        (jax.ShapeDtypeStruct(arrays[0].shape, load.dtype),)
        + (jax.ShapeDtypeStruct((load.batch, 1, load.channels), f32),) * outputs,
        flops=flops,
        grid=(load.batch, pl.cdiv(load.channels, width), 1 if blocks == 1 else 2, blocks),
        in_specs=[block] * len(arrays) + [shared(len(v)) if v.ndim == 2 else of_batch for v in vectors],
        out_specs=(result,) + (of_batch,) * outputs,
        scratch_shapes=[pltpu.VMEM((rows, width), f32) for rows in scratch],
        name=name,
    )


def normalized(x, scale, bias, load: Load, tiles: Tiles, *, eps: float, name: str):
    """(y like x[batch, positions, channels], mean, variance), both float32 [batch, 1, channels]."""
    parameters = [p.astype(f32)[None] for p in (scale, bias)]
    return _call(_forward_kernel, load, tiles, [x], parameters, 2, (), 8, name, eps=eps)


def gradients(x, dy, scale, mean, inverse, less, load: Load, tiles: Tiles, *, name: str):
    """(dx like x[batch, positions, channels], Σ dy, Σ dy · x̂), these and the statistics float32 [batch, 1, channels].

    less: float32 [8, channels]; its first two rows are taken off mean(h) and mean(h · x̂).
    """
    vectors = [scale.astype(f32)[None], mean, inverse, less]
    return _call(_backward_kernel, load, tiles, [x, dy], vectors, 2, (SUBLANES,), 16, name)


def forward(x, scale, bias, *, num_groups: int, eps: float, tiles: Tiles | None = None):
    """((y like x,), (mean, inverse deviation)), both float32 [batch, num_groups]."""
    load = Load.of("forward", x, num_groups)
    t = tiles or _tiles("forward", x, scale, bias, num_groups=num_groups, eps=eps)
    flat = x.reshape(x.shape[0], load.positions, load.channels)
    y, *statistics = normalized(flat, scale, bias, load, t, eps=eps, name="group_norm")
    mean, var = (s[:, 0, :: load.channels // num_groups] for s in statistics)
    return (y.reshape(x.shape),), (mean, lax.rsqrt(var + eps))


def backward(
    x, scale, bias, *, outputs, residuals, cotangents, num_groups: int, eps: float, tiles: Tiles | None = None
) -> dict[str, jax.Array]:
    """Gradients of x, scale and bias from the cotangent of y."""
    load = Load.of("backward", x, num_groups)
    t = tiles or _tiles("backward", x, scale, bias, num_groups=num_groups, eps=eps)
    flat, dy = (a.reshape(x.shape[0], load.positions, load.channels) for a in (x, cotangents[0]))
    mean, inverse = (jnp.repeat(s, load.channels // num_groups, 1)[:, None] for s in residuals)
    less = jnp.zeros((SUBLANES, load.channels), f32)
    dx, shift, slope = gradients(flat, dy, scale, mean, inverse, less, load, t, name="group_norm_backward")
    sums = {"scale": slope.sum((0, 1)).astype(scale.dtype), "bias": shift.sum((0, 1)).astype(bias.dtype)}
    return {"x": dx.reshape(x.shape), **sums}
