"""Products beside the communication they need, each as one TPU kernel with remote DMA.

The devices of a mesh axis form a ring of T. A shard is cut in two halves, and the halves go round in opposite ways. A
chip with two cores gives each way a core of its own, with its own semaphores; on one core the ways alternate.

    gather       y_i[I, J_T] = x[I_T, K] · w_i[K, J_T]            halves of the rows of x travel
    scatter      y[I_T, J] = Σ_T Σ_i x_i[I, K_T] · w_i[K_T, J]    sums of half of the rows travel
    accumulate   w_i[K, J_T] = x[I_T, K]ᵀ · y_i[I, J_T]           halves of the columns of x travel

What travels lies in slots in HBM: while one is multiplied, tile by tile, and sent on, the next is received. A device
writes to a slot of its neighbour only when that is free: the first time once the neighbour has entered the kernel,
which it says at a barrier, and then with a permit, a semaphore that counts the slots which are free again. In `scatter`
a sum may be added to only after it has arrived: sums travel in pieces of a few rows, each as soon as it is there,
behind the products of all others. Sizes are padded with zeros to whole tiles of equal size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.padding import round_up
from pallas_kernels.tpu import matrix_unit
from pallas_kernels.tpu.matrix_unit import LANES, NN, NT, TN, dot
from pallas_kernels.tpu.ring import CORE, SLOTS, Ring

f32 = jnp.float32
ROWS = 16  # sublanes of a register of bfloat16
PIECES = 8  # of half of a shard, at most
LINKS = {"v5p": 90e9}  # bytes/s of a link in one direction, of the chips on which the kernels' schedules are the faster
SLACK = 8 << 20  # VMEM left to the compiler for what does not stay in registers
LEAST = 512  # rows, columns: below it the start and the end of each product take too much of its time


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A tile of each axis of a product: `m` rows of x, `n` columns and `k` rows of w. The tiles of an axis are of equal
    size, at most this one; multiples of 128, `m` of 16."""

    m: int
    n: int
    k: int

    @staticmethod
    def default(kernel: str, chip: chips.Chip, dtype: Any, precision: Any, pairs: int = 1) -> "Tiles":
        """A tile of m × n reads m + n numbers for m · n products: the largest that fits. In `scatter` half of a shard
        is to be several pieces of m rows."""
        sizes = [Tiles(1024, 1024, 512), Tiles(512, 1024, 512), Tiles(512, 512, 512), Tiles(256, 256, 256)]
        room = chip.vmem_bytes - SLACK
        fitting = (t for t in sizes[kernel == "scatter" :] if t.memory(kernel, dtype, precision, pairs) <= room)
        return next(fitting, Tiles(LANES, LANES, LANES))

    def memory(self, kernel: str, dtype: Any, precision: Any, pairs: int = 1) -> int:
        """Bytes of VMEM: tiles of both operands of all `pairs`, of what the sum begins with and of the result, each
        twice, the next one arriving; the sum; float32 in full is also split into parts of bfloat16."""
        itemsize = jnp.dtype(dtype).itemsize
        operands, sums = pairs * self.k * (self.m + self.n), self.m * self.n
        parts = 16 * self.k * (self.m + self.n) * matrix_unit.full(jnp.dtype(dtype), precision)
        return 2 * (operands * itemsize + 2 * sums * (4 if kernel == "accumulate" else itemsize)) + 8 * sums + parts


@dataclasses.dataclass(frozen=True)
class _Cut:
    """An axis of `size` as `count` tiles of equal size, the last one padded."""

    size: int
    tile: int
    count: int

    @staticmethod
    def of(size: int, most: int, unit: int) -> "_Cut":
        count = pl.cdiv(size, most)
        return _Cut(size, round_up(pl.cdiv(size, count), unit), count)

    @property
    def padded(self) -> int:
        return self.tile * self.count


# ---- the ring ------------------------------------------------------------------------------------------------------


def _circulate(ring: Ring, own: Callable, place: Callable, slots: int, sems, products: Callable, peeled: bool) -> None:
    """products(half, ref, origin, first, last), once for each half of every device's shard, this one's at first.

    own(half): this device's. place(half, arrival, origin): where on any device its arrival of this number lies, which
    is of the device `origin`. Only with `peeled` does `last` tell the last step.
    """
    send, recv, free = sems

    def sending(half, step, source):
        """What is multiplied in this step is what is sent on in it."""
        slot = lax.rem(step + 1, slots)
        there = place(half, step + 1, ring.at(half, -step))
        return pltpu.make_async_remote_copy(
            source, there, send.at[half, slot], recv.at[half, slot], device_id=ring.id(half, 1)
        )

    def step(number, turn, last):
        half = ring.half(turn)
        first = isinstance(number, int)
        origin = ring.at(half, -number)
        source = own(half) if first else place(half, number, origin)
        if not first:
            before = sending(half, number - 1, source)
            ring.receive(before)
            before.wait_send()
            ring.free_slot(free, half, number - 1, slots)

        @pl.when(number < ring.size - 1)
        def _():
            ring.await_slot(free, half, number + 1, slots)
            sending(half, number, source).start()

        products(half, source, origin, first, last)

    def steps(start, end, last):
        lax.fori_loop(
            start * ring.turns, end * ring.turns, lambda i, _: step(i // ring.turns, i % ring.turns, last), None
        )

    lax.fori_loop(0, ring.turns, lambda turn, _: step(0, turn, False), None)
    steps(1, ring.size - peeled, False)
    if peeled:
        steps(ring.size - 1, ring.size, True)


# ---- the products --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An array in HBM and its tiles: `index` maps an output tile's two numbers and a step to that of a tile."""

    ref: Any
    shape: tuple[int | None, ...]
    index: Callable

    @property
    def spec(self) -> pl.BlockSpec:
        return pl.BlockSpec(self.shape, self.index)


def _multiply(pairs, out: _Operand, before: _Operand | None, grid, total, dims, precision) -> None:
    """out = before + Σ a · b, for the pairs (a, b, steps along its contracted axis) one after the other.

    grid: how many tiles of the result there are along two axes. total: float32, of a tile.
    """
    steps = sum(count for *_, count in pairs)
    starts = [sum(count for *_, count in pairs[:i]) for i in range(len(pairs))]
    height, width = (size for size in out.shape if size is not None)
    sums = total.at[:height, :width]
    tile = max(b.shape[-2 + dims[0][1][0]] for _, b, _ in pairs)

    def within(operand, start, count):
        index = lambda i, j, k: operand.index(i, j, jnp.clip(k - start, 0, count - 1))
        return pl.BlockSpec(operand.shape, index)

    def add(rows, a, b):
        part = a[:, rows] if dims == TN else a[rows]
        sums[rows] += dot(part, b[...], dims, precision)

    def parts(one):
        # A short program, as there are three of it; what has to be transposed first takes longer to start.
        turn = matrix_unit.turn(height, width * tile, passes=matrix_unit.WORK // (2 if dims == TN else 4))
        at = lambda i: pl.ds(pl.multiple_of(i * turn, turn), turn)
        if turn == height:
            one(slice(None))
        else:
            lax.fori_loop(0, height // turn, lambda i, _: one(at(i)), None)

    def body(*tiles):
        step = pl.program_id(2)
        *factors, result = tiles

        @pl.when(step == 0)
        def _():
            sums[...] = jnp.zeros_like(sums) if before is None else factors[-1][...].astype(f32)

        for i, (start, (*_, count)) in enumerate(zip(starts, pairs, strict=True)):
            a, b = factors[2 * i : 2 * i + 2]

            @pl.when((step >= start) & (step < start + count))
            def _():
                parts(lambda rows: add(rows, a, b))

        @pl.when(step == steps - 1)
        def _():
            result[...] = sums[...].astype(result.dtype)

    operands, specs = [], []
    for start, (a, b, count) in zip(starts, pairs, strict=True):
        operands += [a.ref, b.ref]
        specs += [within(a, start, count), within(b, start, count)]
    if before is not None:
        operands.append(before.ref)
        specs.append(before.spec)
    pltpu.emit_pipeline(body, grid=(*grid, steps), in_specs=specs, out_specs=[out.spec])(*operands, out.ref)


def _weight(ref, depth: _Cut, column: _Cut, transposed: bool) -> _Operand:
    if transposed:
        return _Operand(ref, (column.tile, depth.tile), lambda i, j, k: (j, k))
    return _Operand(ref, (depth.tile, column.tile), lambda i, j, k: (k, j))


def _gather_kernel(coordinates, x_ref, *refs, ring, rows, depth, columns, blocks, keep, precision, transposed):
    """x [blocks, 2, h, k], w_i ↦ y_i [blocks, T, 2, h, n_i], and the slots [2, SLOTS, blocks, h, k] or, to keep what
    is gathered, [blocks, T, 2, h, k]."""
    count = len(columns)
    w_refs, y_refs, (slots_ref, me, total, local, *sems) = refs[:count], refs[count : 2 * count], refs[2 * count :]
    ring = ring.enter(coordinates, me)
    tile = lambda i: (i // rows.count, i % rows.count)

    def products(half, source, origin, first, last):
        del first, last
        a = _Operand(source, (None, rows.tile, depth.tile), lambda i, j, k: (*tile(i), k))
        for w_ref, y_ref, column in zip(w_refs, y_refs, columns, strict=True):
            b = _weight(w_ref, depth, column, transposed)
            shape = (None, rows.tile, column.tile)
            y = _Operand(y_ref.at[:, origin, half], shape, lambda i, j, k: (*tile(i), j))
            grid = (blocks * rows.count, column.count)
            _multiply([(a, b, depth.count)], y, None, grid, total, NT if transposed else NN, precision)

    own = lambda half: x_ref.at[:, half]
    if not keep:
        place = lambda half, arrival, origin: slots_ref.at[half, lax.rem(arrival, SLOTS)]
        _circulate(ring, own, place, SLOTS, sems, products, peeled=False)
        return
    place = lambda half, arrival, origin: slots_ref.at[:, origin, half]
    kept = [
        pltpu.make_async_copy(own(h), place(h, 0, ring.at(h, 0)), local.at[h])
        for h in map(ring.half, range(ring.turns))
    ]
    for copy in kept:
        copy.start()
    _circulate(ring, own, place, ring.size, sems, products, peeled=False)
    for copy in kept:
        copy.wait()


def _accumulate_kernel(coordinates, x_ref, *refs, ring, rows, depth, columns, blocks, precision):
    """x [blocks, h, 2k], y_i [blocks, T, h, n_i] ↦ w_i [2k, n_i], their sums so far in float32, the slots
    [2, SLOTS, blocks, h, k]."""
    count = len(columns)
    y_refs, w_refs, sum_refs = refs[:count], refs[count : 2 * count], refs[2 * count : 3 * count]
    slots_ref, me, total, *sems = refs[3 * count :]
    ring = ring.enter(coordinates, me)
    tile = lambda k: (k // rows.count, k % rows.count)
    half_of = lambda half: pl.ds(pl.multiple_of(half * depth.padded, LANES), depth.padded)

    def products(half, source, origin, first, last):
        a = _Operand(source, (None, rows.tile, depth.tile), lambda i, j, k: (*tile(k), i))
        for y_ref, w_ref, sum_ref, column in zip(y_refs, w_refs, sum_refs, columns, strict=True):
            b = _Operand(y_ref.at[:, origin], (None, rows.tile, column.tile), lambda i, j, k: (*tile(k), j))
            out = lambda ref: _Operand(ref.at[half_of(half)], (depth.tile, column.tile), lambda i, j, k: (i, j))
            so_far = None if first else out(sum_ref)
            grid = (depth.count, column.count)
            steps = blocks * rows.count
            _multiply([(a, b, steps)], out(w_ref if last else sum_ref), so_far, grid, total, TN, precision)

    own = lambda half: x_ref.at[:, :, half_of(half)]
    place = lambda half, arrival, origin: slots_ref.at[half, lax.rem(arrival, SLOTS)]
    _circulate(ring, own, place, SLOTS, sems, products, peeled=True)


def _scatter_kernel(coordinates, *refs, ring, rows, depths, column, pieces, per_piece, precision, transposed):
    """x_i [blocks, T, 2, h, k_i], w_i ↦ y [blocks, 2, h, n], what is sent [2, pieces, per piece, rows, n], what arrives
    [2, SLOTS, pieces, per piece, rows, n]."""
    count = len(depths)
    x_refs, w_refs, (y_ref, sums_ref, arrived_ref, me, total, send, recv, free) = (
        refs[:count],
        refs[count : 2 * count],
        refs[2 * count :],
    )
    ring = ring.enter(coordinates, me)

    def sending(half, piece, step):
        slot = lax.rem(step + 1, SLOTS)
        return pltpu.make_async_remote_copy(
            sums_ref.at[half, piece],
            arrived_ref.at[half, slot, piece],
            send.at[half, piece],
            recv.at[half, slot, piece],
            device_id=ring.id(half, 1),
        )

    def step(number, i, last):
        half, piece = ring.half(i % ring.turns), i // ring.turns
        chunk = ring.at(half, ring.size - 1 - number)
        tile = lambda i: ((piece * per_piece + i) // rows.count, (piece * per_piece + i) % rows.count)
        pairs = [
            (
                _Operand(x.at[:, chunk, half], (None, rows.tile, depth.tile), lambda i, j, k: (*tile(i), k)),
                _weight(w, depth, column, transposed),
                depth.count,
            )
            for x, w, depth in zip(x_refs, w_refs, depths, strict=True)
        ]
        shape = (None, rows.tile, column.tile)
        before = None
        if not isinstance(number, int):
            sent = sending(half, piece, number - 1)
            ring.receive(sent)
            sent.wait_send()
            before = _Operand(arrived_ref.at[half, lax.rem(number, SLOTS), piece], shape, lambda i, j, k: (i, 0, j))
        if last:
            out = _Operand(y_ref.at[:, half], shape, lambda i, j, k: (*tile(i), j))
        else:
            out = _Operand(sums_ref.at[half, piece], shape, lambda i, j, k: (i, 0, j))
        _multiply(pairs, out, before, (per_piece, column.count), total, NT if transposed else NN, precision)
        if not last:
            ring.await_slot(free, half, number + 1, SLOTS)
            sending(half, piece, number).start()
        ring.free_slot(free, half, number, SLOTS)

    items = pieces * ring.turns
    lax.fori_loop(0, items, lambda i, _: step(0, i, False), None)
    lax.fori_loop(items, (ring.size - 1) * items, lambda i, _: step(i // items, i % items, False), None)
    lax.fori_loop((ring.size - 1) * items, ring.size * items, lambda i, _: step(i // items, i % items, True), None)


# ---- the calls -----------------------------------------------------------------------------------------------------


def unsupported(xs: Sequence, ws: Sequence, precision: Any) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    first = xs[0]
    for array in (*xs, *ws):
        if array.dtype not in (f32, jnp.bfloat16):
            return f"operands must be float32 or bfloat16 on a TPU, got {array.dtype}"
        if array.dtype != first.dtype:
            return f"operands must have one dtype, got {first.dtype} and {array.dtype}"
        if not array.size:
            return "there is nothing to multiply"
    return matrix_unit.unsupported(first.dtype, precision)


def no_gain(chip: chips.Chip, rows: int, ws: Sequence, *, scattered: bool) -> str | None:
    """Why the kernels are not known to be faster than a ring in XLA, for a shard of `rows`, or None.

    XLA often puts the product of one half beside the transfer of a half: where that is long enough, nothing is gained.
    """
    if chip.name not in LINKS:
        return f"the kernels are known to gain on {', '.join(LINKS)}, not on {chip.name}"
    k, columns = ws[0].shape[0], sum(w.shape[1] for w in ws)
    if rows < 2 * LEAST or min(k, columns) < LEAST:
        return f"a shard of {rows} rows and weights of {k} × {columns} are less than two tiles of {LEAST}"
    work, enough = k if scattered else columns, chip.flops * ws[0].dtype.itemsize / 2 / LINKS[chip.name]
    if work > enough:
        return f"XLA has {work} products to hide each number behind that is sent, and {enough:.0f} are enough"
    return None


def _call(kernel, name, ring: Ring, chip, outs, total, semaphores, operands, flops):
    """`kernel` on every core; `outs` are the results and then what lies in HBM meanwhile."""
    mat = jax.typeof(operands[0]).mat
    itemsize = operands[0].dtype.itemsize
    call = pl.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=mat) for shape, dtype in outs],
        mesh=pltpu.TensorCoreMesh(axis_name=CORE, num_cores=ring.cores),
        scratch_types=[pltpu.SMEM((len(ring.names),), jnp.int32), pltpu.VMEM(total, f32), *semaphores],
        compiler_params=pltpu.CompilerParams(collective_id=ring.collective_id, vmem_limit_bytes=chip.vmem_bytes),
        cost_estimate=pl.CostEstimate(
            flops=flops, bytes_accessed=sum(x.size for x in operands) * itemsize, transcendentals=0
        ),
        name=name,
    )
    return call(ring.coordinates(mat), *operands)


def _padded(x, *shape):
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)]) if x.shape != shape else x


def _weights(ws, depths, columns, transposed):
    shapes = [(d.padded, c.padded) for d, c in zip(depths, columns, strict=True)]
    return [_padded(w, *(reversed(shape) if transposed else shape)) for w, shape in zip(ws, shapes, strict=True)]


_DMA, _REGULAR = pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR


def gather(
    x: jax.Array,
    ws: Sequence[jax.Array],
    *,
    axis: str,
    chip: chips.Chip,
    precision: Any = None,
    transposed: bool = False,
    keep: bool = False,
    tiles: Tiles | None = None,
    without: str | None = None,
) -> tuple[list[jax.Array], jax.Array | None]:
    """y_i[b, T · r, n_i] = x · w_i for the rows x[b, r, k] of all devices of `axis`, and with `keep` all these rows.

    ws: [k, n_i] each, or [n_i, k] if `transposed`.
    """
    tiles = tiles or Tiles.default("gather", chip, x.dtype, precision)
    ring = Ring.of((axis,), chip.cores, without)
    blocks, count, k = x.shape
    rows, depth = _Cut.of(pl.cdiv(count, 2), tiles.m, ROWS), _Cut.of(k, tiles.k, LANES)
    columns = [_Cut.of(w.shape[0 if transposed else 1], tiles.n, LANES) for w in ws]
    h, many = rows.padded, len(ws)
    slots = (blocks, ring.size, 2, h, depth.padded) if keep else (2, SLOTS, blocks, h, depth.padded)
    arrivals = ring.size if keep else SLOTS
    *ys, whole = _call(
        functools.partial(
            _gather_kernel,
            ring=ring,
            rows=rows,
            depth=depth,
            columns=columns,
            blocks=blocks,
            keep=keep,
            precision=precision,
            transposed=transposed,
        ),
        "all_gather_matmul",
        ring,
        chip,
        [((blocks, ring.size, 2, h, c.padded), x.dtype) for c in columns] + [(slots, x.dtype)],
        (rows.tile, max(c.tile for c in columns)),
        [_DMA((2,)), _DMA((2, arrivals)), _DMA((2, arrivals)), _REGULAR((2,))],
        [
            _padded(x, blocks, 2 * h, depth.padded).reshape(blocks, 2, h, depth.padded),
            *_weights(ws, [depth] * many, columns, transposed),
        ],
        flops=2 * blocks * count * ring.size * k * sum(c.size for c in columns),
    )
    joined = lambda y, size: y.reshape(blocks, ring.size, 2 * h, -1)[:, :, :count, :size].reshape(blocks, -1, size)
    return [joined(y, c.size) for y, c in zip(ys, columns, strict=True)], joined(whole, k) if keep else None


def accumulate(
    x: jax.Array,
    ys: Sequence[jax.Array],
    *,
    axis: str,
    chip: chips.Chip,
    precision: Any = None,
    tiles: Tiles | None = None,
    without: str | None = None,
) -> list[jax.Array]:
    """w_i[k, n_i] = xᵀ · y_i over the rows x[b, r, k] of all devices of `axis`, y_i[b, T · r, n_i]."""
    tiles = tiles or Tiles.default("accumulate", chip, x.dtype, precision)
    ring = Ring.of((axis,), chip.cores, without)
    blocks, count, k = x.shape
    rows, depth = _Cut.of(count, tiles.k, LANES), _Cut.of(pl.cdiv(k, 2), tiles.m, LANES)
    columns = [_Cut.of(y.shape[-1], tiles.n, LANES) for y in ys]
    h = rows.padded
    found = _call(
        functools.partial(
            _accumulate_kernel, ring=ring, rows=rows, depth=depth, columns=columns, blocks=blocks, precision=precision
        ),
        "all_gather_matmul_accumulate",
        ring,
        chip,
        [((2 * depth.padded, c.padded), x.dtype) for c in columns]
        + [((2 * depth.padded, c.padded), f32) for c in columns]
        + [((2, SLOTS, blocks, h, depth.padded), x.dtype)],
        (depth.tile, max(c.tile for c in columns)),
        [_DMA((2, SLOTS)), _DMA((2, SLOTS)), _REGULAR((2,))],
        [
            _padded(x, blocks, h, 2 * depth.padded),
            *(
                _padded(y.reshape(blocks, ring.size, count, c.size), blocks, ring.size, h, c.padded)
                for y, c in zip(ys, columns, strict=True)
            ),
        ],
        flops=2 * blocks * count * ring.size * k * sum(c.size for c in columns),
    )
    return [w[:k, : c.size] for w, c in zip(found, columns, strict=False)]


def scatter(
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    *,
    axis: str,
    chip: chips.Chip,
    precision: Any = None,
    transposed: bool = False,
    tiles: Tiles | None = None,
    without: str | None = None,
) -> jax.Array:
    """This device's y[b, r, n], of the sum over the devices of `axis` of Σ_i x_i[b, T · r, k_i] · w_i.

    ws: [k_i, n] each, or [n, k_i] if `transposed`.
    """
    tiles = tiles or Tiles.default("scatter", chip, xs[0].dtype, precision, len(xs))
    ring = Ring.of((axis,), chip.cores, without)
    blocks, whole, _ = xs[0].shape
    count = whole // ring.size
    rows = _Cut.of(pl.cdiv(count, 2), tiles.m, ROWS)
    depths = [_Cut.of(x.shape[2], tiles.k, LANES) for x in xs]
    column = _Cut.of(ws[0].shape[0 if transposed else 1], tiles.n, LANES)
    h, many = rows.padded, blocks * rows.count
    pieces = max(p for p in range(1, PIECES + 1) if many % p == 0)
    piece = (pieces, many // pieces, rows.tile, column.padded)

    def halves(x, depth):
        x = _padded(x.reshape(blocks, ring.size, count, depth.size), blocks, ring.size, 2 * h, depth.padded)
        return x.reshape(blocks, ring.size, 2, h, depth.padded)

    y, *_ = _call(
        functools.partial(
            _scatter_kernel,
            ring=ring,
            rows=rows,
            depths=depths,
            column=column,
            pieces=pieces,
            per_piece=many // pieces,
            precision=precision,
            transposed=transposed,
        ),
        "matmul_reduce_scatter",
        ring,
        chip,
        [((blocks, 2, h, column.padded), xs[0].dtype), ((2, *piece), xs[0].dtype), ((2, SLOTS, *piece), xs[0].dtype)],
        (rows.tile, column.tile),
        [_DMA((2, pieces)), _DMA((2, SLOTS, pieces)), _REGULAR((2,))],
        [*map(halves, xs, depths), *_weights(ws, depths, [column] * len(ws), transposed)],
        flops=2 * blocks * whole * column.size * sum(d.size for d in depths),
    )
    return y.reshape(blocks, 2 * h, column.padded)[:, :count, : column.size]
