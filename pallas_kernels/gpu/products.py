"""What matmul and gated_linear_unit share on Hopper GPUs: products of one x with one or several weights and what comes
after them, on the accumulators, in registers.

    z_i = x · w_i,   (y, saved …) = finish(z_1, …)

A block owns 128 rows: two consumer warpgroups of 64, the height of a wgmma, and a producer that streams tiles of x and
of the weights through shared memory by TMA. Ragged edges are left to the copies, which read zeros and drop writes out
of bounds; they cut rows by eights.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import activations, chips, tuned
from pallas_kernels.gpu.attention_scores import across, smem
from pallas_kernels.gpu.elementwise import derived, lowered, refusal
from pallas_kernels.padding import pad_to, round_up

ROWS = 64  # rows of one warpgroup: the height of a wgmma
CONSUMERS = 2
DEPTH = 64  # of one step along the contracted axis: 128 bytes, a row of swizzled shared memory
PIECE = 64  # columns that are finished together: more would not fit the registers beside the accumulators
WGMMA = plgpu.Layout.WGMMA
SPARE = 2048  # shared memory for barriers and alignment


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A block takes 128 rows and `columns` of each weight, in steps of which `stages` are in flight."""

    columns: int
    stages: int

    @staticmethod
    def default(sizes: "Sizes") -> "Tiles":
        """All accumulators together 256 columns wide, half of the registers: the operands of a product are then read
        least often. As many stages as shared memory holds, up to four."""
        columns = min(256 // sizes.weights, 512 // sizes.itemsize, round_up(sizes.n, PIECE))
        stages = next((s for s in (4, 3, 2) if Tiles(columns, s).allowed(sizes)), 2)
        return Tiles(columns, stages)

    def allowed(self, sizes: "Sizes") -> bool:
        """Whether registers and shared memory hold them."""
        if self.columns <= 0 or self.columns % PIECE or self.columns * sizes.weights > 256 or self.stages < 2:
            return False
        return memory(self, sizes) <= chips.current("gpu").smem_bytes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """x[m, k], `weights` of [k, n]; results of `itemsize` bytes. `more` bytes of shared memory are taken for others."""

    m: int
    n: int
    k: int
    weights: int
    itemsize: int = 2
    more: int = 0


def memory(tiles: Tiles, sizes: Sizes) -> int:
    """Bytes of shared memory of a block."""
    rows = CONSUMERS * ROWS
    step = 2 * DEPTH * (rows + sizes.weights * tiles.columns)
    return tiles.stages * step + sizes.itemsize * rows * tiles.columns + 4 * tiles.columns + sizes.more + SPARE


def tiles(name: str, phase: str, sizes: Sizes, dtype) -> Tiles:
    """The tuned tiles of the nearest problem that fit this one, else the default."""
    return tuned.choose(
        f"gpu.{name}.{phase}",
        chips.current("gpu"),
        {"m": sizes.m, "n": sizes.n, "k": sizes.k},
        jnp.dtype(dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(sizes),
        Tiles.default(sizes),
    )


def candidates(sizes: Sizes) -> Iterator[Tiles]:
    """Tiles worth trying, the default first."""
    found = [Tiles.default(sizes), *(Tiles(*both) for both in itertools.product((256, 192, 128, 64), (4, 3, 2)))]
    yield from (one for one in dict.fromkeys(found) if one.allowed(sizes))


def computed(activation: Callable, x: jax.Array, dy: jax.Array) -> jax.Array:
    """What a kernel computes of an activation whose gradient is made elsewhere."""
    del dy
    return lowered(activation)(x)


def no_wgmma() -> str | None:
    """Why the current chip cannot run these kernels, or None."""
    chip = chips.current("gpu")
    if chip.capability == (9, 0):
        return None
    capability = ".".join(map(str, chip.capability))
    return f"the kernel needs wgmma, which only GPUs of compute capability 9.0 have, not {capability} ({chip.name})"


def unsupported(activation: Callable | None, x, *arrays, residual=None) -> str | None:
    """Why x[..., k] and weights [k, n] cannot be multiplied here, or None."""
    if reason := no_wgmma():
        return reason
    for what, array in (("x", x), *(("a weight", w) for w in arrays), ("residual", residual)):
        if array is not None and array.dtype != jnp.bfloat16:
            return f"{what} must be bfloat16, got {array.dtype}"
    k, n = arrays[0].shape
    if k % DEPTH or n % PIECE:
        return f"k and n must be multiples of 64, the width of the tiles that TMA copies, got {k} and {n}"
    rows = math.prod(x.shape[:-1])
    if max(pl.cdiv(rows, CONSUMERS * ROWS), pl.cdiv(n, PIECE)) > 65535:
        return f"the grid is limited to 65535 blocks of 128 rows and of 64 columns, got {rows} rows and {n} columns"
    return activations.unsupported(activation, refusal, derived)


def specialised(consumer: Callable, producer: Callable, registers: tuple[int, int] = (240, 24)) -> None:
    """consumer(g) in the warpgroups g that multiply, producer() in the one that copies, each with its `registers`."""
    group = lax.axis_index("group")

    @pl.when(group < CONSUMERS)
    def _():
        plgpu.set_max_registers(registers[0], action="increase")
        consumer(group)

    @pl.when(group == CONSUMERS)
    def _():
        plgpu.set_max_registers(registers[1], action="decrease")
        producer()


def stream(load: Callable, steps, free, stages: int) -> None:
    """load(i, slot), which starts the copies of step i, for every step, as soon as the slot is free."""

    def one(i, _):
        slot = lax.rem(i, stages)
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        load(i, slot)

    lax.fori_loop(0, steps, one, None)


def summed(
    multiply: Callable,
    shape,
    count: int,
    steps,
    ready,
    free,
    stages: int,
    dtype=jnp.float32,
    started: int | None = None,
):
    """`count` sums of `shape`, of multiply(i, slot, accumulators) over the steps, which starts a product of what is in
    the slot for each, or `started` products. In registers, of `dtype`."""

    def accumulate(*accs):
        def step(i, _):
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(ready.at[slot])
            multiply(i, slot, accs)
            plgpu.wgmma_wait(started or count)  # those of the step before are through: its tiles are free
            pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(i - 1, stages)]))

        lax.fori_loop(0, steps, step, None)
        plgpu.wgmma_wait(0)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(accumulate, *[plgpu.ACC(shape, dtype)] * count)


def forward(
    name: str,
    x,
    ws: Sequence,
    bias,
    residual,
    finish: Callable,
    *,
    saved: int,
    tiles: Tiles,
    piece: int = PIECE,
    tables: Sequence = (),
    windows: Any = None,
) -> list[jax.Array]:
    """[y, saved …], each [m, n] in the dtype of x[m, k]: what `finish` makes of the products with every w[k, n].

    finish(zs, bias, residual, tables …) -> (y, saved …), of float32 tiles of `piece` columns, bias and residual perhaps
    None. tables: float32 [r, columns], row i for the rows i, i + r … of x, r a multiple of 64 or no less than m.
    windows: x is any array, of which `windows.tile(x, rows, i)` is what some rows are in step i, `windows.rows` in all.
    """
    rows = len(x) if windows is None else windows.rows
    (k, n), count, dtype = ws[0].shape, len(ws), x.dtype
    m = round_up(rows, 8)
    columns, steps = tiles.columns, pl.cdiv(k, DEPTH)
    stages = min(tiles.stages, steps)
    operands, period = [pad_to(x, 0, m) if windows is None else x, *ws], len(tables[0]) if tables else 0
    if bias is not None:
        operands.append(pad_to(bias.astype(jnp.float32), 0, round_up(n, columns)))
    if residual is not None:
        operands.append(pad_to(residual, 0, m))
    extras = len(operands) - 1 - count
    operands += [pad_to(table, 0, round_up(period, CONSUMERS * ROWS)) for table in tables]

    # JAX lowers copies of windows in this way alone.
    semantics = plgpu.LoweringSemantics.Warpgroup if windows is None else plgpu.LoweringSemantics.Lane

    def body(x_ref, *arrays, x_tiles, w_tiles, out_tile, bias_tile, ready, free, extras_ready):
        refs = list(arrays)
        w_refs = [refs.pop(0) for _ in ws]
        bias_ref = refs.pop(0) if bias is not None else None
        residual_ref = refs.pop(0) if residual is not None else None
        table_refs = [refs.pop(0) for _ in tables]
        first_row, first_column = lax.axis_index("row") * (CONSUMERS * ROWS), lax.axis_index("column") * columns
        over_columns = pl.ds(first_column, columns)

        def consumer(group):
            rows, out = pl.ds(first_row + group * ROWS, ROWS), out_tile.at[group]
            arrived = extras_ready.at[group]
            if bias_ref is not None:
                plgpu.copy_gmem_to_smem(bias_ref.at[over_columns], bias_tile.at[group], arrived)
            if residual_ref is not None:  # where the result will be
                plgpu.copy_gmem_to_smem(residual_ref.at[rows, over_columns], out, arrived)

            def multiply(i, slot, accs):
                del i
                for acc, tile in zip(accs, w_tiles, strict=True):
                    plgpu.wgmma(acc, x_tiles.at[slot, group], tile.at[slot])

            sums = summed(multiply, (ROWS, columns), count, steps, ready, free, stages)
            if extras:
                plgpu.barrier_wait(arrived)

            found = []
            if tables:
                of_table = pl.ds(lax.rem(first_row + group * ROWS, period) if period < m else rows.start, ROWS)
                found = [plgpu.load(ref.at[of_table], layout=WGMMA, optimized=False) for ref in table_refs]

            def finished(start):
                over, shape = pl.ds(start, piece), (ROWS, piece)
                zs = [lax.slice(z, (0, start), (ROWS, start + piece)) for z in sums]
                row = add = None
                if bias_ref is not None:
                    row = across(plgpu.load(bias_tile.at[group, over], layout=WGMMA.reduce(0)), shape)
                if residual_ref is not None:
                    add = plgpu.load(out.at[:, over], layout=WGMMA).astype(jnp.float32)
                return finish(zs, row, add, *found)

            for which, ref in enumerate(refs):
                for start in range(0, columns, piece):
                    out[:, pl.ds(start, piece)] = finished(start)[which].astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, ref.at[rows, over_columns])
                plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(i, slot):
                depth = pl.ds(i * DEPTH, DEPTH)
                for g in range(CONSUMERS):
                    rows = pl.ds(first_row + g * ROWS, ROWS)
                    source = x_ref.at[rows, depth] if windows is None else windows.tile(x_ref, rows, i)
                    plgpu.copy_gmem_to_smem(source, x_tiles.at[slot, g], ready.at[slot])
                for w_ref, tile in zip(w_refs, w_tiles, strict=True):
                    plgpu.copy_gmem_to_smem(w_ref.at[depth, over_columns], tile.at[slot], ready.at[slot])

            stream(load, steps, free, stages)

        specialised(consumer, producer, (240, 24) if windows is None else (232, 40))  # a window has more coordinates

    found = plgpu.kernel(
        body,
        kernel_name=f"{name}_forward",
        out_type=[jax.ShapeDtypeStruct((m, n), dtype)] * (1 + saved),
        scratch_types=dict(
            x_tiles=smem(dtype, stages, CONSUMERS, ROWS, DEPTH),
            w_tiles=[smem(dtype, stages, DEPTH, columns)] * count,
            out_tile=smem(dtype, CONSUMERS, ROWS, columns),
            bias_tile=plgpu.SMEM((CONSUMERS, columns), jnp.float32),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS + count),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
            extras_ready=plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=max(1, extras)),
        ),
        grid=(pl.cdiv(m, CONSUMERS * ROWS), pl.cdiv(n, columns)),
        grid_names=("row", "column"),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=semantics),
    )(*operands)
    return [y[:rows] for y in found]
