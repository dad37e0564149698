"""A gradient summed over a ring of devices, the optimizer's step of each one's shard, the new parameters gathered: one
TPU kernel with remote DMA.

    g[I_D, J] = Σ_D g[I, J]
    p, m, v[I_D, J] ← update(p, g, m, v)          in place
    p[I, J] = all-gather of p[I_D, J]             in place

Of D devices, each has its own g and all of p, which are cut into D chunks of rows, and the moments of its own chunk. A
chunk is cut into an even number of tiles; one half of them goes round one way, the other half the other way. For each
tile of a half the ring makes D - 1 steps. In step s of tile b, device i (counted along the way, modulo D)

    1. receives the sum that it was sent in the step before, of chunk i-1-s, and adds its own g
    2. sends that sum on; in the first step of a tile, its own g of chunk i-1
    3. in the first step of a tile: what it received in 1 is the whole sum of tile b-1 of chunk i. It updates
    4. sends new parameters of tile b-1: in the first step its own, then those that it received in the step before

so that sums of one tile and parameters of the one before travel at the same time, and both halves in turn.

Who waits for what: a device sends nothing before those that it will write to have entered the kernel (a barrier). Sums
travel from VMEM to VMEM, into slots: a slot is used again once the receiver has sent on what was in it, which it says
with a permit. Parameters arrive where they stay: nothing else is read or written there, so they need no permit; but as
permits for sums hold a device back, no more than D - 1 + slots of them can be on their way to one device, which has a
semaphore for each, since transfers may overtake each other. The g of a device is read from HBM while the sum travels,
its p and moments while the sums of their tile do.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
arXiv:1910.02054 (what is summed, updated and gathered where); Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", JPDC 2009 (the ring).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.padding import round_up
from pallas_kernels.tpu.matrix_unit import LANES
from pallas_kernels.tpu.ring import SLOTS, Ring

f32 = jnp.float32
ROWS = 16  # sublanes of a register of bfloat16
AT_ONCE = 8192  # elements that are computed together: eight registers of each operand
DTYPES = (jnp.dtype(f32), jnp.dtype(jnp.bfloat16))

Update = Callable[[jax.Array, jax.Array, Sequence[jax.Array], Sequence[Any]], tuple[jax.Array, Sequence[jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile, at most; multiples of 16 and 128."""

    rows: int
    columns: int

    @staticmethod
    def default() -> "Tiles":
        """512 KiB of float32: some microseconds on a link, longer than it takes to start a transfer; and the 20 tiles
        that AdamW needs for both halves are 10 MiB, which every chip has."""
        return Tiles(256, 512)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A chunk of `shape` as tiles: `down` · `across` of them, an even number, of rows × columns; the last padded."""

    shape: tuple[int, int]
    rows: int
    columns: int
    down: int
    across: int

    @staticmethod
    def of(shape: tuple[int, int], tiles: Tiles) -> "_Cut":
        def cut(down, across):
            rows, columns = (pl.cdiv(size, count) for size, count in zip(shape, (down, across), strict=True))
            return _Cut(shape, round_up(rows, ROWS), round_up(columns, LANES), down, across)

        down, across = pl.cdiv(shape[0], tiles.rows), pl.cdiv(shape[1], tiles.columns)
        if down * across % 2 == 0:
            return cut(down, across)
        return min(cut(down + 1, across), cut(down, across + 1), key=lambda one: math.prod(one.padded))

    @property
    def padded(self) -> tuple[int, int]:
        return self.rows * self.down, self.columns * self.across

    @property
    def each(self) -> int:
        """Tiles of a half."""
        return self.down * self.across // 2

    def tile(self, ref, half, number, *chunk):
        """The tile of a half of this number, in HBM."""
        number = half * self.each + number
        row, column = (
            pl.ds(pl.multiple_of(i * size, size), size)
            for i, size in ((lax.div(number, self.across), self.rows), (lax.rem(number, self.across), self.columns))
        )
        return ref.at[(*chunk, row, column)]


def _kernel(coordinates, scalars, g_ref, *refs, ring: Ring, cut: _Cut, update: Update, count: int):
    """g [D, rows, columns], p like it, `count` - 1 moments [rows, columns]: p and moments once as operands and once
    more, the same memory, as results."""
    p_ref, *moment_refs = refs[count : 2 * count]
    me, numbers, slots, own, after_ref, *scratch = refs[2 * count :]
    before, after = scratch[:count], (after_ref, *scratch[count : 2 * count - 1])
    added, read, written, send, recv, send_new, recv_new, free = scratch[2 * count - 1 :]
    pltpu.sync_copy(scalars, numbers)
    ring = ring.enter(coordinates, me)
    steps, tiles = ring.size - 1, cut.each
    sums = tiles * steps  # that a device sends each way, and as many tiles of parameters

    def summing(half, number, source):
        """The sum that is sent in this step, from `source` to a slot of the next device."""
        slot = lax.rem(number, SLOTS)
        there = slots.at[half, slot]
        return pltpu.make_async_remote_copy(
            source, there, send.at[half], recv.at[half, slot], device_id=ring.id(half, 1)
        )

    def gathering(half, number, source):
        """The parameters that are sent in this step, to where they are to be on the next device."""
        there = cut.tile(p_ref, half, lax.div(number, steps) - 1, ring.at(half, -lax.rem(number, steps)))
        arrival = recv_new.at[half, lax.rem(number, recv_new.shape[1])]
        return pltpu.make_async_remote_copy(source, there, send_new.at[half], arrival, device_id=ring.id(half, 1))

    def own_part(half, number):
        """This device's part of the sum that it receives in return for the one of this step."""
        chunk = ring.at(half, -2 - lax.rem(number, steps))
        source = cut.tile(g_ref, half, lax.div(number, steps), chunk)
        return pltpu.make_async_copy(source, own.at[half], added.at[half])

    def kept(half, tile):
        """Where this device's parameters and moments of a tile are."""
        return [cut.tile(p_ref, half, tile, ring.at(half, 0)), *(cut.tile(ref, half, tile) for ref in moment_refs)]

    def reading(half, tile):
        places = zip(kept(half, tile), before, strict=True)
        return [pltpu.make_async_copy(x, ref.at[half], read.at[half, i]) for i, (x, ref) in enumerate(places)]

    def writing(half, tile):
        places = zip(kept(half, tile), after, strict=True)
        return [pltpu.make_async_copy(ref.at[half], x, written.at[half, i]) for i, (x, ref) in enumerate(places)]

    def in_parts(one):
        sizes = (r for r in range(ROWS, cut.rows + 1, ROWS) if cut.rows % r == 0 and r * cut.columns <= AT_ONCE)
        rows = max(sizes, default=ROWS)
        part = lambda i: pl.ds(pl.multiple_of(i * rows, rows), rows)
        lax.fori_loop(0, cut.rows // rows, lambda i, _: one(part(i)), None)

    def step(number, half):
        tile, position = lax.div(number, steps), lax.rem(number, steps)
        first = position == 0
        slot = lax.rem(number + SLOTS - 1, SLOTS)  # of what was received last

        @pl.when((number >= 1) & (number <= sums))
        def _():
            sent = summing(half, number - 1, slots.at[half, slot])
            ring.receive(sent)
            own_part(half, number - 1).wait()

            def add(rows):
                total = slots[half, slot, rows].astype(f32) + own[half, rows].astype(f32)
                slots[half, slot, rows] = total.astype(slots.dtype)

            in_parts(add)
            if ring.without != "departure":
                sent.wait_send()
            # What was sent was the arrival before, if it was not this device's g.
            pl.when(position != 1 % steps)(lambda: ring.free_slot(free, half, number - 1, SLOTS, sums))

        @pl.when(number > steps)
        def _():
            sent = gathering(half, number - 1, after_ref.at[half])
            sent.wait_send()
            if ring.without != "gathered":
                sent.wait_recv()

        @pl.when(number < sums)
        def _():
            own_part(half, number).start()
            ring.await_slot(free, half, number + 1, SLOTS)
            send_own = lambda: summing(half, number, cut.tile(g_ref, half, tile, ring.at(half, -1))).start()
            lax.cond(first, send_own, lambda: summing(half, number, slots.at[half, slot]).start())

        @pl.when(first & (tile >= 1) & (tile <= tiles))
        def _():
            for copy in reading(half, tile - 1):
                copy.wait()

            @pl.when(tile >= 2)
            def _():
                for copy in writing(half, tile - 2):
                    copy.wait()

            def change(rows):
                p, *moments = (ref[half, rows] for ref in before)
                g = slots[half, slot, rows].astype(f32)
                p, changed = update(p, g, moments, [numbers[i] for i in range(numbers.shape[0])])
                for ref, new in zip(after, (p, *changed), strict=True):
                    ref[half, rows] = new

            in_parts(change)
            for copy in writing(half, tile - 1):
                copy.start()
            ring.free_slot(free, half, number, SLOTS, sums)

        @pl.when(first & (tile < tiles))
        def _():
            for copy in reading(half, tile):
                copy.start()

        @pl.when((tile >= 1) & (tile <= tiles))
        def _():
            send_own = lambda: gathering(half, number, after_ref.at[half]).start()
            chunk = ring.at(half, -position)
            send_on = lambda: gathering(half, number, cut.tile(p_ref, half, tile - 1, chunk)).start()
            lax.cond(first, send_own, send_on)

    every = sums + steps + 1  # the last one only receives
    lax.fori_loop(0, every * ring.turns, lambda i, _: step(lax.div(i, ring.turns), lax.rem(i, ring.turns)), None)
    for half in range(ring.turns):
        for copy in writing(half, tiles - 1):
            copy.wait()


def unsupported(g: Any, p: Any, moments: Sequence[Any]) -> str | None:
    """Why the kernel cannot take these arrays (or ShapeDtypeStructs), or None."""
    for array in (g, p, *moments):
        if jnp.dtype(array.dtype) not in DTYPES:
            return f"gradients, parameters and moments must be float32 or bfloat16, got {array.dtype}"
    return None if p.size else "there is nothing to update"


def forward(
    g: jax.Array,
    p: jax.Array,
    moments: Sequence[jax.Array],
    scalars: jax.Array,
    update: Update,
    *,
    axes: tuple[str, ...],
    chip: chips.Chip,
    tiles: Tiles | None = None,
    without: str | None = None,
) -> tuple[jax.Array, list[jax.Array]]:
    """(p[D · r, …] of all devices, moments[r, …] of this one) after `update` by the sum of all g[D · r, …].

    update(p, g, moments, scalars) ↦ (p, moments), elementwise, of g in float32; `scalars` are float32. Sums travel in
    the dtype of g. Tiles hold the last dimension along their rows; of vectors, pieces of 128.
    """
    ring = Ring.of(axes, 1, without)
    part = (p.shape[0] // ring.size, *p.shape[1:])
    folded = (pl.cdiv(part[0], LANES), LANES) if len(part) == 1 else (math.prod(part[:-1]), part[-1])
    cut = _Cut.of(folded, tiles or Tiles.default())

    def tiled(x, *lead):
        if len(part) == 1:
            x = _padded(x.reshape(*lead, -1), *lead, math.prod(folded))
        return _padded(x.reshape(*lead, *folded), *lead, *cut.padded)

    def back(x, *lead):
        x = x[(..., *map(slice, folded))].reshape(*lead, -1)
        return x[..., : math.prod(part)].reshape(*lead, *part)

    operands = [tiled(p, ring.size), *map(tiled, moments)]
    tile = lambda dtype, *lead: pltpu.VMEM((2, *lead, cut.rows, cut.columns), dtype)
    dma = lambda *shape: pltpu.SemaphoreType.DMA((2, *shape))
    count, anywhere = len(operands), pl.BlockSpec(memory_space=pl.ANY)
    new = pl.pallas_call(
        functools.partial(_kernel, ring=ring, cut=cut, update=update, count=count),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).mat) for x in operands],
        in_specs=[anywhere] * (3 + count),
        out_specs=[anywhere] * count,
        input_output_aliases={3 + i: i for i in range(count)},
        scratch_shapes=[
            pltpu.SMEM((len(ring.names),), jnp.int32),
            pltpu.SMEM(scalars.shape, f32),
            tile(g.dtype, SLOTS),
            tile(g.dtype),
            tile(p.dtype),
            *(tile(x.dtype) for x in operands),
            *(tile(x.dtype) for x in moments),
            dma(),
            dma(count),
            dma(count),
            dma(),
            dma(SLOTS),
            dma(),
            dma(ring.size - 1 + SLOTS),
            pltpu.SemaphoreType.REGULAR((2,)),
        ],
        compiler_params=pltpu.CompilerParams(collective_id=ring.collective_id, vmem_limit_bytes=chip.vmem_bytes),
        cost_estimate=pl.CostEstimate(
            flops=20 * math.prod(part) + g.size, bytes_accessed=_traffic(g, p, moments), transcendentals=0
        ),
        name="reduce_update_gather",
    )(ring.coordinates(jax.typeof(g).mat), scalars, tiled(g, ring.size), *operands)
    return back(new[0], ring.size).reshape(p.shape), [back(x) for x in new[1:]]


def _traffic(g, p, moments) -> int:
    """Bytes of HBM that are read or written: g, p and moments of the own part twice, p twice as it goes round."""
    of = lambda x: x.size * x.dtype.itemsize
    return of(g) + 2 * of(p) + 2 * sum(map(of, moments))


def _padded(x, *shape):
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)]) if x.shape != shape else x
