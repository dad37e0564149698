"""Gradients of the products of `products` on Hopper GPUs, of one x with one or several weights.

    (d_1, …) = start(dy, saved …),   dx = Σ_i d_i · w_iᵀ,   dw_i = xᵀ · d_i,   db_i = Σ_rows d_i

Three kernels: one makes every d_i once, in the dtype of x, and sums over rows in passing; two multiply. A block of a
product owns 128 × 256 numbers (of several dw_i together) and works as those of `products` do. No operand is transposed
in HBM: wgmma reads a tile either way. The blocks that run at the same time are about as many rows as columns of a
result, so that L2 serves most of what they read.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.attention_scores import smem
from pallas_kernels.gpu.group_norm import Columns
from pallas_kernels.gpu.products import CONSUMERS, DEPTH, ROWS, Tiles, specialised, stream, summed
from pallas_kernels.padding import pad_to, round_up

f32 = jnp.float32
BLOCK = CONSUMERS * ROWS
BAND = 16  # blocks of rows that go through the columns together
WIDTH, STEP = 128, 16  # columns of a tile of d, and the rows of it that are in registers together
_COLUMNS = Columns(WIDTH, 8)


def started(name: str, start: Callable, count: int, dy, saved: Sequence, rows: int, *, with_sums: bool):
    """([d_1, …] as dy, [Σ_rows d_1, …] float32 if wanted): the `count` results of start(dy, saved …), of float32 tiles.

    dy and saved are [m, n], of which the first `rows` count: those of d beyond them are zero.
    """
    m, n = dy.shape
    inputs, blocks = [dy, *saved], (pl.cdiv(n, WIDTH), pl.cdiv(m, ROWS))

    def body(*refs, tiles, total_tiles, ready):
        in_refs, d_refs, total_refs = refs[: len(inputs)], refs[len(inputs) :][:count], refs[len(inputs) + count :]
        column, row = lax.axis_index("column"), lax.axis_index("row")
        here = (pl.ds(row * ROWS, ROWS), pl.ds(column * WIDTH, WIDTH))
        for ref, tile in zip(in_refs, tiles, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[here], tile, ready)
        plgpu.barrier_wait(ready)
        d_tiles = tiles[len(inputs) - count :]  # a thread writes where it has read
        totals: list = [None] * count
        for first in range(0, ROWS, STEP):
            part, shape = pl.ds(first, STEP), (STEP, WIDTH)
            read = [plgpu.load(t.at[part], layout=_COLUMNS.layout, optimized=False).astype(f32) for t in tiles]
            ds = start(*read)
            if rows % ROWS:
                index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_COLUMNS.layout)
                inside = index < rows - row * ROWS - first
                ds = [jnp.where(inside, d, 0.0) for d in ds]
            for i, (d, tile) in enumerate(zip(ds, d_tiles, strict=True)):
                totals[i] = d if totals[i] is None else totals[i] + d
                tile[part] = d.astype(dy.dtype)
        if with_sums:
            for total, tile in zip(totals, total_tiles, strict=True):
                plgpu.store(tile, total, optimized=False)
        plgpu.commit_smem()
        for ref, tile in zip(d_refs, d_tiles, strict=True):
            plgpu.copy_smem_to_gmem(tile, ref.at[here])
        for ref, tile in zip(total_refs, total_tiles, strict=True):
            total = plgpu.load(tile, layout=_COLUMNS.joined, optimized=False).sum(axis=0)
            total = plgpu.layout_cast(total, _COLUMNS.joined.reduce(0))
            plgpu.store(ref.at[row, here[1]], total, optimized=False)
        plgpu.wait_smem_to_gmem(0)

    found = plgpu.kernel(
        body,
        kernel_name=f"{name}_backward",
        out_type=[jax.ShapeDtypeStruct((m, n), dy.dtype)] * count
        + [jax.ShapeDtypeStruct((blocks[1], blocks[0] * WIDTH), f32)] * (count * with_sums),
        scratch_types=dict(
            tiles=[plgpu.SMEM((ROWS, WIDTH), dy.dtype)] * len(inputs),
            total_tiles=[plgpu.SMEM((STEP, WIDTH), f32)] * (count * with_sums),
            ready=plgpu.Barrier(num_arrivals=len(inputs)),
        ),
        grid=blocks,
        grid_names=("column", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs)
    return found[:count], [partial.sum(0)[:n] for partial in found[count:]]


def _multiplied(name: str, lefts: Sequence, rights: Sequence, tiles: Tiles, *, over_rows: bool):
    """[left_1ᵀ · right_i for every i] if `over_rows`, else [Σ_i left_i · right_iᵀ]."""
    dtype, apart = lefts[0].dtype, len(rights) if over_rows else 1
    (length, height), width = (lefts[0].shape if over_rows else lefts[0].shape[::-1]), rights[0].shape[int(over_rows)]
    each = pl.cdiv(length, DEPTH)
    steps = each * len(lefts)
    stages, piece = min(tiles.stages, steps), tiles.columns
    columns = piece if over_rows else min(piece * len(rights), round_up(width, DEPTH))
    blocks = pl.cdiv(height, BLOCK), pl.cdiv(width, columns)

    def body(*refs, left_tiles, right_tiles, out_tile, ready, free):
        left_refs, right_refs, out_refs = refs[: len(lefts)], refs[len(lefts) : -apart], refs[-apart:]
        row, column = plgpu.planar_snake(lax.axis_index("block"), blocks, 0, BAND)
        over_columns = pl.ds(column * columns, columns)
        rows_of = lambda group: pl.ds(row * BLOCK + group * ROWS, ROWS)

        def consumer(group):
            def multiply(i, slot, accs):
                del i
                left = left_tiles.at[slot, group]
                for acc, tiles in zip(accs, right_tiles, strict=True):
                    right = tiles.at[slot]
                    plgpu.wgmma(acc, *((left.T, right) if over_rows else (left, right.T)))

            out = out_tile.at[group]
            totals = summed(multiply, (ROWS, columns), apart, steps, ready, free, stages)
            for ref, total in zip(out_refs, totals, strict=True):
                for start in range(0, columns, piece):
                    size = min(piece, columns - start)
                    part = out.at[:, pl.ds(0, size)]
                    part[...] = lax.slice(total, (0, start), (ROWS, start + size)).astype(dtype)
                    plgpu.commit_smem()
                    there = ref.at[rows_of(group), pl.ds(column * columns + start, size)]
                    plgpu.copy_smem_to_gmem(part, there)
                    plgpu.wait_smem_to_gmem(0)

        def producer():
            def copy(slot, depth, left_ref, of_right):
                order = (lambda depth, others: (depth, others)) if over_rows else (lambda depth, others: (others, depth))
                for g in range(CONSUMERS):
                    there = left_ref.at[order(depth, rows_of(g))]
                    plgpu.copy_gmem_to_smem(there, left_tiles.at[slot, g], ready.at[slot])
                for ref, tiles in zip(of_right, right_tiles, strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[order(depth, over_columns)], tiles.at[slot], ready.at[slot])

            def load(i, slot):
                for which, left_ref in enumerate(left_refs):  # one after the other
                    of_right = right_refs if over_rows else right_refs[which : which + 1]
                    begin = which * each

                    def one(left_ref=left_ref, of_right=of_right, begin=begin):
                        copy(slot, pl.ds((i - begin) * DEPTH, DEPTH), left_ref, of_right)

                    pl.when((i >= begin) & (i < begin + each))(one) if len(lefts) > 1 else one()

            stream(load, steps, free, stages)

        specialised(consumer, producer)

    return plgpu.kernel(
        body,
        kernel_name=name,
        out_type=[jax.ShapeDtypeStruct((height, width), dtype)] * apart,
        scratch_types=dict(
            left_tiles=smem(dtype, stages, CONSUMERS, ROWS, DEPTH),  # or [DEPTH, ROWS]: both are 64
            right_tiles=[smem(dtype, stages, *((DEPTH, columns) if over_rows else (columns, DEPTH)))] * apart,
            out_tile=smem(dtype, CONSUMERS, ROWS, piece),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS + apart),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        ),
        grid=(blocks[0] * blocks[1],),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="group",
    )(*lefts, *rights)


def backward(
    name: str, x, ws: Sequence, dy, saved: Sequence, start: Callable | None, *, tiles: Tiles, with_sums: bool = False
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """(dx, every dw, the sums over the rows of every d in float32, if wanted), of x[m, k], and of dy and what was saved,
    all [m, n]. start(dy, saved …) -> (d_1, …), of float32 tiles; None for dy itself."""
    rows, count = len(x), len(ws)
    x, dy, *saved = (pad_to(a, 0, round_up(rows, 8)) for a in (x, dy, *saved))
    if start is None:
        ds, sums = [dy], [dy.astype(f32).sum(0)] if with_sums else []
    else:
        ds, sums = started(name, start, count, dy, saved, rows, with_sums=with_sums)
    (dx,) = _multiplied(f"{name}_backward_x", ds, ws, tiles, over_rows=False)
    dws = _multiplied(f"{name}_backward_w", [x], ds, tiles, over_rows=True)
    return dx[:rows], list(dws), sums
