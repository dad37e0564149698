"""Gradients of the products of `products` on Hopper GPUs, of one x with one or several weights.

    (d_1, …) = start(dy, saved …),   dx = Σ_i d_i · w_iᵀ,   dw_i = xᵀ · d_i,   db = Σ_rows d_1

Two kernels multiply. A block of them owns 128 × 256 numbers (of several dw_i together) and works as those of `products`
do. No operand is transposed in HBM: wgmma reads a tile either way. The blocks that run at the same time are about as
many rows as columns of a result, so that L2 serves most of what they read.

What is made of dy is written once, for dw. Several weights have it made in the product dx, whose blocks in the first
column write it: a number of dy and of what was saved gives two products of 256 columns, which take the tensor cores
longer than the d_i take the other units, though every column of blocks makes them again. A single weight halves that
time; there a kernel of its own makes d, and the sums of its rows in passing, and reads what it makes it of once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import products
from pallas_kernels.gpu.attention_scores import smem
from pallas_kernels.gpu.group_norm import Columns
from pallas_kernels.gpu.products import CONSUMERS, DEPTH, ROWS, SPARE, WGMMA, Sizes, Tiles, specialised, stream, summed
from pallas_kernels.padding import pad_to, round_up

f32 = jnp.float32
BLOCK = CONSUMERS * ROWS
BAND = 16  # blocks of rows that go through the columns together
WIDTH, STEP = 128, 16  # columns of a tile of d, and the rows of it that are in registers together
STAGES = 2  # of a product that makes its left operand: there is no room for more
PART = 16  # columns that are differentiated together beside the accumulators
_COLUMNS = Columns(WIDTH, 8)


def memory(tiles: Tiles, sizes: Sizes) -> int:
    """Bytes of shared memory of a block of the largest kernel."""
    count = sizes.weights
    made = STAGES * 2 * DEPTH * ((1 + count) * BLOCK + count * count * tiles.columns) if count > 1 else 0
    return max(products.memory(tiles, sizes), made + SPARE)


def started(name: str, start: Callable, dy, saved: Sequence, rows: int, *, with_sums: bool):
    """([d] as dy, [Σ_rows d] float32 if wanted): (d,) = start(dy, saved …), of float32 tiles.

    dy and saved are [m, n], of which the first `rows` count: those of d beyond them are zero.
    """
    m, n = dy.shape
    inputs, blocks = [dy, *saved], (pl.cdiv(m, ROWS), pl.cdiv(n, WIDTH))

    def body(*refs, tiles, total_tile, ready):
        in_refs, d_ref, total_refs = refs[: len(inputs)], refs[len(inputs)], refs[len(inputs) + 1 :]
        row, over = lax.axis_index("row"), pl.ds(lax.axis_index("column") * WIDTH, WIDTH)
        here = (pl.ds(row * ROWS, ROWS), over)
        for ref, tile in zip(in_refs, tiles, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[here], tile, ready)
        plgpu.barrier_wait(ready)
        total: Any = 0.0
        for first in range(0, ROWS, STEP):
            part = pl.ds(first, STEP)
            (d,) = start(*(plgpu.load(t.at[part], layout=_COLUMNS.layout, optimized=False).astype(f32) for t in tiles))
            if rows % ROWS:
                index = plgpu.broadcasted_iota(jnp.int32, (STEP, WIDTH), 0, layout=_COLUMNS.layout)
                d = jnp.where(index < rows - row * ROWS - first, d, 0.0)
            total = total + d
            tiles[-1][part] = d.astype(dy.dtype)  # where this thread has read
        if with_sums:
            plgpu.store(total_tile, total, optimized=False)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiles[-1], d_ref.at[here])
        for ref in total_refs:
            total = plgpu.load(total_tile, layout=_COLUMNS.joined, optimized=False).sum(axis=0)
            plgpu.store(ref.at[row, over], total, optimized=False)
        plgpu.wait_smem_to_gmem(0)

    d, *partial = plgpu.kernel(
        body,
        kernel_name=f"{name}_backward",
        out_type=[jax.ShapeDtypeStruct((m, n), dy.dtype)]
        + [jax.ShapeDtypeStruct((blocks[0], blocks[1] * WIDTH), f32)] * with_sums,
        scratch_types=dict(
            tiles=[plgpu.SMEM((ROWS, WIDTH), dy.dtype)] * len(inputs),
            total_tile=plgpu.SMEM((STEP, WIDTH), f32),
            ready=plgpu.Barrier(num_arrivals=len(inputs)),
        ),
        grid=blocks,
        grid_names=("row", "column"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs)
    return [d], [sums.sum(0)[:n] for sums in partial]


def _multiplied(
    name: str,
    lefts: Sequence,
    rights: Sequence,
    tiles: Tiles,
    *,
    over_rows: bool,
    start: Any = None,
    rows: int = 0,
):
    """[leftᵀ · right_i for every i] if `over_rows`, else [left · rightᵀ]; with `start` [Σ_i d_i · right_iᵀ, d_1, …], of
    (d_1, …) = start(left_1, …), made on their way into the product and zero beyond the first `rows`."""
    dtype, count = lefts[0].dtype, len(rights)
    apart, made = count if over_rows else 1, count if start is not None else 0
    (length, height), width = (lefts[0].shape if over_rows else lefts[0].shape[::-1]), rights[0].shape[int(over_rows)]
    columns = tiles.columns if over_rows else min(tiles.columns * count, round_up(width, DEPTH))
    steps = pl.cdiv(length, DEPTH)
    stages = min(STAGES if made else tiles.stages, steps)
    blocks = pl.cdiv(height, BLOCK), pl.cdiv(width, columns)

    def body(*refs, left_tiles, right_tiles, out_tile, ready, free):
        left_refs, right_refs = refs[: len(lefts)], refs[len(lefts) :][:count]
        out_refs, d_refs = refs[len(lefts) + count :][:apart], refs[len(lefts) + count + apart :]
        row, column = plgpu.planar_snake(lax.axis_index("block"), blocks, 0, BAND)
        over_columns = pl.ds(column * columns, columns)
        rows_of = lambda group: pl.ds(row * BLOCK + group * ROWS, ROWS)

        def consumer(group):
            def make(i, slot):
                here = [tiles.at[slot, group] for tiles in left_tiles]
                read, parts = [plgpu.load(tile, layout=WGMMA) for tile in here], []
                for first in range(0, DEPTH, PART):
                    cut = [lax.slice(x, (0, first), (ROWS, first + PART)).astype(f32) for x in read]
                    ds = start(*cut)
                    if rows % ROWS:
                        index = plgpu.broadcasted_iota(jnp.int32, (ROWS, PART), 0, layout=WGMMA)
                        ds = [jnp.where(index < rows - row * BLOCK - group * ROWS, d, 0.0) for d in ds]
                    parts.append([d.astype(dtype) for d in ds])
                ds = here[-count:]  # a thread writes where it has read
                for d, pieces in zip(ds, zip(*parts, strict=True), strict=True):
                    d[...] = jnp.concatenate(pieces, 1)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those of the step before, whose tiles will be free
                plgpu.commit_smem()

                @pl.when(column == 0)
                def _():
                    for d, ref in zip(ds, d_refs, strict=True):
                        plgpu.copy_smem_to_gmem(d, ref.at[rows_of(group), pl.ds(i * DEPTH, DEPTH)])

                return ds

            def multiply(i, slot, accs):
                left = left_tiles[0].at[slot, group]
                if over_rows:
                    for acc, tiles in zip(accs, right_tiles, strict=True):
                        plgpu.wgmma(acc, left.T, tiles.at[slot])
                else:
                    for d, tiles in zip(make(i, slot) if made else [left], right_tiles, strict=True):
                        plgpu.wgmma(accs[0], d, tiles.at[slot].T)

            totals = summed(multiply, (ROWS, columns), apart, steps, ready, free, stages, started=count)
            outs = [tiles.at[0, group] for tiles in left_tiles] if made else [out_tile.at[group]]
            piece = outs[0].shape[1]
            pieces = [(*one, at) for one in zip(out_refs, totals, strict=True) for at in range(0, columns, piece)]
            for which, (ref, total, at) in enumerate(pieces):
                out = outs[which % len(outs)]
                plgpu.wait_smem_to_gmem(len(outs) - 1 if which else 0, wait_read_only=True)
                out[...] = lax.slice(total, (0, at), (ROWS, at + piece)).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, ref.at[rows_of(group), pl.ds(column * columns + at, piece)])
            plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(i, slot):
                depth = pl.ds(i * DEPTH, DEPTH)
                there = lambda others: (depth, others) if over_rows else (others, depth)
                for ref, tiles in zip(left_refs, left_tiles, strict=True):
                    for g in range(CONSUMERS):
                        plgpu.copy_gmem_to_smem(ref.at[there(rows_of(g))], tiles.at[slot, g], ready.at[slot])
                for ref, tiles in zip(right_refs, right_tiles, strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[there(over_columns)], tiles.at[slot], ready.at[slot])

            stream(load, steps, free, stages)

        specialised(consumer, producer)

    return plgpu.kernel(
        body,
        kernel_name=name,
        out_type=[jax.ShapeDtypeStruct((height, width), dtype)] * apart
        + [jax.ShapeDtypeStruct((height, length), dtype)] * made,
        scratch_types=dict(
            left_tiles=[smem(dtype, stages, CONSUMERS, ROWS, DEPTH)] * len(lefts),  # or [DEPTH, ROWS]: both are 64
            right_tiles=[smem(dtype, stages, *((DEPTH, columns) if over_rows else (columns, DEPTH)))] * count,
            out_tile=[] if made else smem(dtype, CONSUMERS, ROWS, columns),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS * len(lefts) + count),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        ),
        grid=(blocks[0] * blocks[1],),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*lefts, *rights)


def backward(
    name: str, x, ws: Sequence, dy, saved: Sequence, start: Callable | None, *, tiles: Tiles, with_sums: bool = False
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """(dx, every dw, [Σ_rows d_1] in float32 if wanted, of a single weight), of x[m, k], dy[m, n] and saved[m, n].

    start(dy, saved …) -> (d_1, …), of float32 tiles; None for dy itself, of a single weight.
    """
    rows, sums = len(x), []
    x, dy, *saved = (pad_to(a, 0, round_up(rows, 8)) for a in (x, dy, *saved))
    product = functools.partial(_multiplied, f"{name}_backward_x", tiles=tiles, over_rows=False)
    if start is not None and len(ws) > 1:
        dx, *ds = product([dy, *saved], ws, start=start, rows=rows)
    else:
        ds, sums = [dy], [dy.astype(f32).sum(0)] if with_sums else []
        if start is not None:
            ds, sums = started(name, start, dy, saved, rows, with_sums=with_sums)
        (dx,) = product(ds, ws)
    dws = _multiplied(f"{name}_backward_w", [x], ds, tiles, over_rows=True)
    return dx[:rows], list(dws), sums
