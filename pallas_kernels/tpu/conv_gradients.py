"""The gradients of a convolution with stride 1 on the TPU, of its input, its window and its bias, by one kernel.

    dz = activation'(z) · dy,   dx[h, u] = Σ_{i, j} dz[h - i·d + p, u - j·e + r] · w[i, j]ᵀ
    dw[i, j] = Σ_{h, u} x[h, u]ᵀ · dz[h - i·d + p, u - j·e + r],   dbias = Σ dz

dz is made of blocks of dy and z in VMEM, never in HBM. There it is kept once for each column j of the window, moved by
j·e - r pixels and side by side as one axis: [rows, pixels of x, (j, out)]. So both products read it as it lies: for a
row i of the window, those of dz times the weights are dx, and those of x times those of dz are dw, summed in float32.
The geometry is that of the convolution of dz with the window turned around that dx is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import activations, chips
from pallas_kernels.padding import round_up
from pallas_kernels.tpu.conv_geometry import Geometry, Rows, arrive, clear, divisor, in_hbm, moved
from pallas_kernels.tpu.matrix_unit import LANES, NN, NT, TN, dot

f32 = jnp.float32
SLACK = 8 << 20  # VMEM left to the compiler for what does not stay in registers
SUBLANES = 8
TURN = 1024  # pixels of a turn, about
GROUP = 256  # pixels of dz that are made together, about


@dataclasses.dataclass(frozen=True)
class Problem(Geometry):
    """Of the convolution of dz: `channels` are those of dz, `columns` those of dx; `saved`: z is there. `dy` and `dw`
    are the dtypes of dy (and z) and of the gradient of the window; `dbias` that of the bias, if there is one."""

    dy: Any = f32
    dw: Any = f32
    dbias: Any = None

    @property
    def summed(self) -> bool:
        return self.dbias is not None

    @property
    def across(self) -> int:
        """Those of dz for all columns of the window."""
        return self.size[1] * self.channels

    @property
    def few(self) -> bool:
        """Whether dx has so few channels that those of all rows of the window are taken as one axis."""
        return self.columns < LANES and self.size[0] > 1

    @property
    def beside(self) -> int:
        """Rows of the window whose channels are side by side."""
        return self.size[0] if self.few else 1

    @property
    def plain(self) -> bool:
        """Whether the weights are taken as they are; else turned around, those of a row of the window as one axis."""
        return not self.few and self.channels % LANES == 0

    @property
    def staged(self) -> bool:
        """Whether the rows of x are laid out anew in VMEM; else they are whole registers as they arrive."""
        return self.few or self.pitch > self.out_pixels

    @property
    def out_pixels(self) -> int:
        return self.out[1] * self.joined

    @property
    def pitch(self) -> int:
        """Pixels of a row in VMEM: whole registers, zeros at the end."""
        return round_up(self.out_pixels, 16)

    @property
    def reach(self) -> int:
        return (self.size[0] - 1) * self.dilation[0]

    def served(self) -> bool:
        """Whether the kernel is taken: it fits, and keeps all cores busy."""
        chosen, cores = Tiles.default(self), chips.current("tpu").cores
        return chosen.allowed(self) and self.columns // chosen.columns >= cores

    @property
    def most(self) -> int:
        """Rows of a turn at most."""
        return max(1, TURN // self.pitch)

    def vmem_bytes(self, tiles: "Tiles") -> int:
        """Bytes of VMEM that the kernel is estimated to take; blocks are there twice, the next one arriving."""
        size = jnp.dtype(self.dtype).itemsize
        columns, channels, across = (round_up(n, LANES) for n in (tiles.columns, self.channels, self.across))
        beside, rows_in = round_up(self.beside * tiles.columns, LANES), tiles.rows + self.reach
        dz = (1 + self.saved) * rows_in * round_up(self.pixels, 16) * channels * jnp.dtype(self.dy).itemsize
        x = tiles.rows * self.pitch * columns * size
        w = self.size[0] // self.beside * round_up(self.across, 16) * beside * size
        dw = math.prod(self.size) * round_up(tiles.columns, 16) * channels * jnp.dtype(self.dw).itemsize
        stages = rows_in * self.pitch * (across + beside * self.staged) * size
        sums = self.size[0] // self.beside * round_up(self.beside * tiles.columns, 8) * across * 4
        turn = divisor(tiles.rows, self.most) * self.pitch * (2 * beside + across) * 4 + sums // self.size[0]
        parts = 8 * self.full * (turn + sums)
        return SLACK + 2 * (dz + 2 * x + w + dw) + stages + sums + turn + parts


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of dx of a block and its `columns` (channels, all or a multiple of 128 that divides them)."""

    rows: int
    columns: int

    @staticmethod
    def default(problem: Problem) -> "Tiles":
        """All channels where they fit, so that dz is made once; one share of them for each core. About eight blocks of
        rows in all, as for the convolution, but as few as leave the rows around them few."""
        chip, height = chips.current("tpu"), problem.out[0]
        columns = problem.columns
        if chip.cores > 1 and columns % (LANES * chip.cores) == 0:
            columns //= chip.cores
        while columns % (2 * LANES) == 0 and problem.vmem_bytes(Tiles(1, columns)) > chip.vmem_bytes // 2:
            columns //= 2
        most = min(problem.most, height)
        rows = round_up(pl.cdiv(height, max(1, 8 // problem.images)), most)
        rows = min(round_up(max(rows, 3 * problem.reach), most), round_up(height, most))
        while rows > 1 and problem.vmem_bytes(Tiles(rows, columns)) > chip.vmem_bytes // 2:
            rows = pl.cdiv(rows, 2)
        return Tiles(rows, columns)

    def allowed(self, problem: Problem) -> bool:
        """Whether everything fits VMEM and the shares of channels are whole."""
        whole = self.columns == problem.columns or (self.columns % LANES == 0 and problem.columns % self.columns == 0)
        return self.rows > 0 and whole and problem.vmem_bytes(self) <= chips.current("tpu").vmem_bytes


def _kernel(x_hbm, dy_hbm, z_hbm, w_ref, dx_ref, dw_ref, *refs, problem, tiles, activation, precision):
    others = iter(refs)
    dbias_ref = next(others) if problem.summed else None
    x_ref, dy_ref = next(others), next(others)
    z_ref = next(others) if problem.saved else None
    arrived, d_ref, dw_sum = next(others), next(others), next(others)
    x_stage: Any = next(others) if problem.staged else None
    dbias_sum: Any = next(others) if problem.summed else None
    (taps, across), (step, apart) = problem.size, problem.dilation
    height, channels, beside, columns = problem.out[0], problem.channels, problem.beside, tiles.columns
    place, blocks = pl.program_id(2), pl.cdiv(height, tiles.rows)
    block, count = pl.program_id(1) * blocks + place, problem.images * blocks
    slot = lax.rem(block, 2)
    x_rows = Rows(tiles.rows, tiles.rows, 0, height, blocks)
    dz_rows = Rows(tiles.rows, tiles.rows + problem.reach, problem.pads[0][0], problem.height, blocks)

    @pl.when(block == 0)
    def begin():
        for ref in (dw_sum, dbias_sum, x_stage):
            if ref is not None:
                clear(ref, 0, ref.shape[0])

    def copies(block, act):
        share = x_hbm.at[:, :, :, pl.ds(pl.program_id(0) * columns, columns)]
        x_rows.copies([(share if columns < problem.columns else x_hbm, x_ref, arrived.at[0])], block, act)
        z = [(z_hbm, z_ref, arrived.at[2])] if problem.saved else []
        dz_rows.copies([(dy_hbm, dy_ref, arrived.at[1]), *z], block, act)

    arrive(count, block, True, copies)
    x_rows.outside(place, lambda first, last: clear(x_ref.at[slot], first, last))
    dz_rows.outside(place, lambda first, last: clear(d_ref, first, last))

    def make_dz(first, many, counted):
        """`many` rows of dz, of which dbias takes account."""
        here = pl.ds(first, many)
        d = dy_ref[slot, here].astype(f32)
        if z_ref is not None:
            flat = (a.reshape(-1, channels) for a in (z_ref[slot, here].astype(f32), d))
            d = activations.along(activation, *flat)[1].reshape(d.shape)
        if dbias_sum is not None and counted is not False:
            dbias_sum[...] += _sum(d if counted is True else jnp.where(counted, d, 0.0))
        for j in range(across):
            part = moved(d, (j * apart - problem.pads[1][0]) * problem.joined, problem.pixels, problem.out_pixels)
            if problem.pitch > problem.out_pixels:
                zeros = jnp.zeros((many, problem.pitch - problem.out_pixels, channels), f32)
                part = jnp.concatenate([part, zeros], 1)
            d_ref[here, :, pl.ds(j * channels, channels)] = part.astype(d_ref.dtype)

    def make_rows(start, end):
        low = problem.pads[0][0]
        parts = (
            (start, min(low, end), False),
            (low, low + tiles.rows, True),
            (low + tiles.rows, end, place == blocks - 1),
        )
        for first, last, counted in parts:  # the rows above are of the block before, those below of the next one
            first, last = max(first, start), min(last, end)
            _each(first, last, max(1, GROUP // problem.pitch), functools.partial(make_dz, counted=counted))

    dz_rows.each(place, make_rows)
    if x_stage is not None:

        def stage(row, many):
            rows = x_ref[slot, pl.ds(row, many)]
            if not problem.few:
                x_stage[pl.ds(row, many), : problem.out_pixels] = rows
                return
            for i in range(taps):
                lanes = pl.ds(i * columns, columns)
                x_stage[pl.ds(row + i * step, many), : problem.out_pixels, lanes] = rows

        _each(0, tiles.rows, max(1, GROUP // problem.pitch), stage)

    turn = divisor(tiles.rows, problem.most)

    def compute(index, _):
        row = index * turn
        x = x_ref[slot, pl.ds(row, turn)] if x_stage is None else x_stage[pl.ds(row, turn)]
        x = x.reshape(-1, x.shape[2])
        dx: Any = 0
        if problem.few:
            d = d_ref[pl.ds(row, turn + problem.reach)].reshape(-1, problem.across)
            product = dot(d, w_ref[0], NN, precision).reshape(-1, problem.pitch, taps * columns)
            for i in range(taps):
                dx = dx + product[i * step : i * step + turn, :, i * columns : (i + 1) * columns]
            dw_sum[0] += dot(x, d[: x.shape[0]], TN, precision)
        else:
            for i in range(taps):
                d = d_ref[pl.ds(row + i * step, turn)].reshape(-1, problem.across)
                if problem.plain:
                    for j in range(across):
                        part = d[:, j * channels : (j + 1) * channels]
                        dx = dx + dot(part, w_ref[taps - 1 - i, across - 1 - j], NT, precision)
                else:
                    dx = dx + dot(d, w_ref[i], NN, precision)
                dw_sum[i] += dot(x, d, TN, precision)
            dx = dx.reshape(turn, problem.pitch, columns)
        dx_ref[0, pl.ds(row, turn)] = dx[:, : problem.out_pixels].astype(dx_ref.dtype)
        return 0

    turns = tiles.rows // turn
    if height % tiles.rows:
        turns = jnp.minimum(turns, pl.cdiv(height - place * tiles.rows, turn))
    lax.fori_loop(0, turns, compute, 0)
    if problem.few:  # the rows of dz that only those above have beside them
        last = pl.ds(turns * turn, problem.reach)
        x, d = (ref[last].reshape(-1, ref.shape[2]) for ref in (x_stage, d_ref))
        dw_sum[0] += dot(x, d, TN, precision)

    @pl.when(block == count - 1)
    def end():
        for i in range(taps):
            for j in range(across):
                one = dw_sum[i // beside, pl.ds(i % beside * columns, columns), pl.ds(j * channels, channels)]
                dw_ref[taps - 1 - i, across - 1 - j] = one.astype(dw_ref.dtype)
        if dbias_ref is not None:
            dbias_ref[...] = jnp.sum(dbias_sum[...], 0).reshape(dbias_ref.shape).astype(dbias_ref.dtype)


def _sum(d: jax.Array) -> jax.Array:
    """Σ d[rows, pixels, columns] as 8 sums of each column, or their total and zeros."""
    if d.shape[1] % SUBLANES == 0:
        return jnp.sum(d.reshape(-1, SUBLANES, d.shape[2]), 0)
    total = jnp.sum(d, (0, 1))[None]
    return jnp.concatenate([total, jnp.zeros((SUBLANES - 1, d.shape[2]), f32)], 0)


def _each(first: int, last: int, many: int, act: Callable[[Any, int], None]) -> None:
    """act(row, how many) for the rows first to last, `many` at a time."""
    turns = max(last - first, 0) // many

    def some(index, _):
        act(first + index * many, many)
        return 0

    lax.fori_loop(0, turns, some, 0)
    if first + turns * many < last:
        act(first + turns * many, last - first - turns * many)


def gradients(problem: Problem, tiles: Tiles, x, dy, z, w, activation, precision):
    """[dx, dw[taps, across, columns, channels], dbias if it is summed], of x, dy and z [images, height, pixels,
    channels] and w [taps, across, columns, channels]."""
    height, columns = problem.out[0], tiles.columns
    taps, across = problem.size
    blocks, shares = pl.cdiv(height, tiles.rows), problem.columns // columns
    beside = problem.beside
    if problem.plain:
        w_spec = pl.BlockSpec((taps, across, columns, problem.channels), lambda share, *block: (0, 0, share, 0))
    else:
        w = jnp.flip(w, (0, 1)).reshape(-1, beside, across, problem.columns, problem.channels)
        w = w.transpose(0, 2, 4, 1, 3).reshape(-1, problem.across, beside * problem.columns)
        w_spec = pl.BlockSpec((*w.shape[:2], beside * columns), lambda share, *block: (0, 0, share))
    total: tuple[int, ...] = (problem.channels,)
    dbias_spec = pl.BlockSpec((problem.channels,), lambda *_: (0,))
    if shares > 1:  # each makes the gradient of the bias, in a place of its own: two cores may have them
        total = (shares, 1, problem.channels)
        dbias_spec = pl.BlockSpec((1, *total[1:]), lambda share, *_: (share, 0, 0))
    rows_in = tiles.rows + problem.reach
    shape = (problem.images, height, problem.out_pixels, problem.columns)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    dtype = jnp.dtype(problem.dtype)
    buffer = lambda like, rows, columns: pltpu.VMEM((2, rows, like.shape[2], columns), like.dtype)
    kernel = pl.pallas_call(
        functools.partial(_kernel, problem=problem, tiles=tiles, activation=activation, precision=precision),
        grid=(shares, problem.images, blocks),
        in_specs=[
            anywhere,
            anywhere,
            None if z is None else anywhere,
            w_spec,
        ],
        out_specs=[
            pl.BlockSpec((1, tiles.rows, problem.out_pixels, columns), lambda share, *block: (*block, 0, share)),
            pl.BlockSpec((taps, across, columns, problem.channels), lambda share, image, place: (0, 0, share, 0)),
            *[dbias_spec] * problem.summed,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(shape, problem.out_dtype),
            jax.ShapeDtypeStruct((taps, across, problem.columns, problem.channels), problem.dw),
            *([jax.ShapeDtypeStruct(total, problem.dbias)] if problem.summed else []),
        ],
        scratch_shapes=[
            buffer(x, tiles.rows, columns),
            *[buffer(dy, rows_in, problem.channels)] * (1 + problem.saved),
            pltpu.SemaphoreType.DMA((3, 2)),
            pltpu.VMEM((rows_in, problem.pitch, problem.across), dtype),
            pltpu.VMEM((taps // beside, beside * columns, problem.across), f32),
            *[pltpu.VMEM((tiles.rows + problem.reach, problem.pitch, beside * columns), dtype)] * problem.staged,
            *[pltpu.VMEM((SUBLANES, problem.channels), f32)] * problem.summed,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=min(problem.vmem_bytes(tiles) + SLACK, chips.current("tpu").vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * math.prod(shape) * problem.across * taps,
            transcendentals=0,
            bytes_accessed=sum(a.nbytes for a in (x, dy, z, w, w) if a is not None) + math.prod(shape) * dtype.itemsize,
        ),
        name="conv_gradients",
    )
    there = lambda *arrays: [a if a is None else in_hbm(a) for a in arrays]
    call = jax.custom_batching.sequential_vmap(lambda x, dy, z, w: kernel(*there(x, dy, z), w))
    return call(x, dy, z, w)
