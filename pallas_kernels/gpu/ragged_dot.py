"""Products of groups of rows with a matrix each, on Hopper GPUs.

    y_i = x_i · rhs_g,   dx_i = dy_i · rhs_gᵀ,   drhs_g = Σ_i x_iᵀ · dy_i,   for the rows i of group g

A block of y or dx takes 128 rows of one group (`pallas_kernels.ragged`), which it finds by a binary search in the
bounds, and works as the blocks of `products` do. Copies cut rows by eights, so the rows of a group begin at the
multiple of eight before it; a warpgroup all of whose rows are the group's writes its tile as one, any other writes the
rows it has, by copies of 32, 16, … 1 rows. Rows without a group are pieces like others, of no product. Neighbouring
blocks differ in their columns: a matrix is then read about once, however many rows its group has.

A block of drhs takes 128 × 256 of one matrix, and the rows of its group pass by; the first and the last tile of them
are cut to the group in shared memory. Rows are gathered before and scattered after the kernels, by XLA.
Source: Gale et al. 2022 (MegaBlocks).
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips, ragged, tuned
from pallas_kernels.gpu import products
from pallas_kernels.gpu.attention_scores import smem
from pallas_kernels.gpu.products import CONSUMERS, DEPTH, PIECE, ROWS, WGMMA, Sizes
from pallas_kernels.gpu.products import Tiles as Tiles
from pallas_kernels.padding import pad_to, round_up

BLOCK = CONSUMERS * ROWS
EIGHT = 8  # rows of a tile of swizzled shared memory


def _sizes(m: int, k: int, n: int, dtype, *, backward: bool) -> Sizes:
    itemsize = jnp.dtype(dtype).itemsize
    return Sizes(m, n, k, 1, itemsize, more=0 if backward else itemsize * BLOCK * PIECE)


def _tiles(sizes: Sizes, groups: int, *, backward: bool) -> Tiles:
    return tuned.choose(
        f"gpu.ragged_dot.{'backward' if backward else 'forward'}",
        chips.current("gpu"),
        {"rows": sizes.m, "groups": groups, "k": sizes.k, "n": sizes.n},
        "bfloat16",
        Tiles,
        lambda tiles: tiles.allowed(sizes),
        Tiles.default(sizes),
    )


def _call_sizes(phase: str, lhs, rhs, lhs_rows, out_rows, out_weights, dtype) -> Sizes:
    rows, (_, k, n) = (lhs if lhs_rows is None else lhs_rows).shape[0], rhs.shape
    if phase == "backward":
        return _sizes(rows, k, n, rhs.dtype, backward=True)
    return _sizes(rows, k, n, dtype if out_rows is None and out_weights is None else jnp.float32, backward=False)


def tiles(phase: str, lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, *, dtype, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    sizes = _call_sizes(phase, lhs, rhs, lhs_rows, out_rows, out_weights, dtype)
    return _tiles(sizes, rhs.shape[0], backward=phase == "backward")


def candidates(
    phase: str, lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, *, dtype, **options
) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return products.candidates(_call_sizes(phase, lhs, rhs, lhs_rows, out_rows, out_weights, dtype))


def memory(
    phase: str, tiles: Tiles, lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, *, dtype, **options
) -> int:
    """Bytes of shared memory of a block."""
    return products.memory(tiles, _call_sizes(phase, lhs, rhs, lhs_rows, out_rows, out_weights, dtype))


def unsupported(
    lhs,
    rhs,
    bounds,
    lhs_rows=None,
    out_rows=None,
    out_weights=None,
    *,
    out_size: int,
    dtype: Any,
    precision: Any,
) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del bounds, out_rows, out_weights, out_size, precision  # products of bfloat16 are exact in every precision
    if reason := products.no_wgmma():
        return reason
    for what, array in (("lhs", lhs), ("rhs", rhs)):
        if array.dtype != jnp.bfloat16:
            return f"{what} must be bfloat16, got {array.dtype}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the result must be bfloat16 or float32, got {dtype}"
    groups, k, n = rhs.shape
    if k % DEPTH or n % DEPTH:
        return f"k and n must be multiples of 64, the width of the tiles that TMA copies, got {k} and {n}"
    rows = (lhs if lhs_rows is None else lhs_rows).shape[0]
    if max(pl.cdiv(rows, BLOCK) + groups + 1, pl.cdiv(k, BLOCK)) > 65535:
        return f"the grid is limited to 65535 blocks of 128 rows, got {rows} rows, {groups} groups and k = {k}"
    return None


def product(x, rhs, bounds, dtype, tiles: Tiles | None, *, transposed: bool = False):
    """x_i · rhs_g (or rhs_gᵀ), [m, n], rows without a group 0, from x[m, k] and rhs[g, k, n] (or [g, n, k])."""
    (m, k), groups, n = x.shape, rhs.shape[0], rhs.shape[1 if transposed else 2]
    dtype, height = jnp.dtype(dtype), round_up(m, EIGHT)
    tiles = tiles or _tiles(_sizes(m, k, n, dtype, backward=False), groups, backward=False)
    columns, stages = tiles.columns, min(tiles.stages, k // DEPTH)
    # The rows before the first group count as one more, and so do those after the last.
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds, jnp.full(1, height, jnp.int32)])
    cut = ragged.Cut(height, groups + 1, BLOCK)

    def body(starts, x_ref, rhs_ref, out_ref, x_tiles, rhs_tiles, out_tile, part_tile, ready, free):
        which, here, _ = cut.tile(lax.axis_index("piece"), lambda b: starts[b])
        begin, blocks = starts[which], lambda row: lax.div(row, jnp.int32(BLOCK))
        first = lax.div(begin, jnp.int32(EIGHT)) * EIGHT + (blocks(here) - blocks(begin)) * BLOCK
        begin, end = lax.max(begin, first), lax.min(starts[which + 1], first + BLOCK)
        matrix = lax.clamp(jnp.int32(0), which - 1, jnp.int32(groups - 1))
        has_product = (which == matrix + 1) & (begin < end)
        steps = lax.select(has_product, jnp.int32(k // DEPTH), jnp.int32(0))
        over_columns = pl.ds(lax.axis_index("column") * columns, columns)

        def consumer(group):
            row = first + group * ROWS
            low, high = lax.max(begin - row, 0), lax.min(end - row, ROWS)
            out, part = out_tile.at[group], part_tile.at[group]
            mine = lax.select(low < high, steps, jnp.int32(0))

            def multiply(i, slot, accs):
                del i
                tile = rhs_tiles.at[slot]
                plgpu.wgmma(accs[0], x_tiles.at[slot, group], tile.T if transposed else tile)

            def skip(i, _):  # of the other warpgroup alone
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(ready.at[slot])
                pl.when(i + 1 < steps)(lambda: plgpu.barrier_arrive(free.at[slot]))  # nobody waits for the last

            (total,) = products.summed(multiply, (ROWS, columns), 1, mine, ready, free, stages)
            lax.fori_loop(mine, steps, skip, None)

            @pl.when((low == 0) & (high == ROWS))
            def _():
                out[...] = total.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, out_ref.at[pl.ds(row, ROWS), over_columns])
                plgpu.wait_smem_to_gmem(0)

            @pl.when((low < high) & (high - low < ROWS))
            def _():
                for start in range(0, columns, PIECE):
                    part[...] = lax.slice(total, (0, start), (ROWS, start + PIECE)).astype(dtype)
                    plgpu.commit_smem()
                    _copy_rows(part, out_ref, row, low, high, lax.axis_index("column") * columns + start)
                    plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(i, slot):
                depth = pl.ds(i * DEPTH, DEPTH)
                for g in range(CONSUMERS):
                    rows = pl.ds(first + g * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(x_ref.at[rows, depth], x_tiles.at[slot, g], ready.at[slot])
                there = (over_columns, depth) if transposed else (depth, over_columns)
                plgpu.copy_gmem_to_smem(rhs_ref.at[matrix, *there], rhs_tiles.at[slot], ready.at[slot])

            products.stream(load, steps, free, stages)

        products.specialised(consumer, producer)

    (out,) = plgpu.kernel(
        body,
        kernel_name="ragged_dot_transposed" if transposed else "ragged_dot",
        out_type=[jax.ShapeDtypeStruct((height, n), dtype)],
        scratch_types=dict(
            x_tiles=smem(x.dtype, stages, CONSUMERS, ROWS, DEPTH),
            rhs_tiles=smem(x.dtype, stages, *((columns, DEPTH) if transposed else (DEPTH, columns))),
            out_tile=_out_tile(dtype, CONSUMERS, ROWS, columns),
            part_tile=plgpu.SMEM((CONSUMERS, ROWS, PIECE), dtype),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS + 1),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        ),
        grid=(pl.cdiv(n, columns), cut.count),
        grid_names=("column", "piece"),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(starts, pad_to(x, 0, height), rhs)
    return out[:m]


def _out_tile(dtype, *shape):
    """As `smem`, of a dtype of any size: rows of 128 bytes."""
    tiled = (plgpu.TilingTransform((EIGHT, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=tiled)


def _copy_rows(tile, ref, row, low, high, column) -> None:
    """Starts the copies of rows low … high - 1 of a tile to row + low … of `ref`: a copy's size is known beforehand."""
    at, count, size = low, high - low, ROWS // 2
    while size:
        there = ref.at[pl.ds(row + at, size), pl.ds(column, PIECE)]
        pl.when(count & size != 0)(functools.partial(plgpu.copy_smem_to_gmem, tile.at[pl.ds(at, size)], there))
        at, size = at + (count & size), size // 2


def sums(x, dy, bounds, dtype, tiles: Tiles | None):
    """Σ x_iᵀ · dy_i over the rows of each group, [g, k, n], from x[m, k] and dy[m, n]."""
    (m, k), n, groups = x.shape, dy.shape[1], bounds.shape[0] - 1
    tiles = tiles or _tiles(_sizes(m, k, n, dtype, backward=True), groups, backward=True)
    columns, height = tiles.columns, round_up(m, EIGHT)
    stages, half = min(tiles.stages, pl.cdiv(height, DEPTH) + 1), PIECE * pl.cdiv(columns, CONSUMERS * PIECE)

    def body(bounds, x_ref, dy_ref, out_ref, x_tiles, dy_tiles, out_tile, ready, free, cleared):
        matrix = lax.axis_index("matrix")
        begin, end = bounds[matrix], bounds[matrix + 1]
        first = lax.div(begin, jnp.int32(EIGHT)) * EIGHT
        steps = lax.select(begin < end, lax.div(end - first + (DEPTH - 1), jnp.int32(DEPTH)), jnp.int32(0))
        inner = lax.axis_index("inner") * BLOCK
        over_columns = pl.ds(lax.axis_index("column") * columns, columns)

        def consumer(group):
            out = out_tile.at[group]

            def clear(tile, low, high):
                """Other rows are of other groups, or anything: zero times NaN would stay a NaN."""
                index = plgpu.broadcasted_iota(jnp.int32, (DEPTH, PIECE), 0, layout=WGMMA)
                found = plgpu.load(tile, layout=WGMMA)
                tile[...] = jnp.where((index >= low) & (index < high), found, jnp.zeros_like(found))

            def multiply(i, slot, accs):
                low, high = begin - (first + i * DEPTH), end - (first + i * DEPTH)

                @pl.when((low > 0) | (high < DEPTH))
                def _():
                    clear(x_tiles.at[slot, group], low, high)
                    for g in range(CONSUMERS):

                        @pl.when(group == g)
                        def _(g=g):
                            for start in range(g * half, min((g + 1) * half, columns), PIECE):
                                clear(dy_tiles.at[slot, :, pl.ds(start, PIECE)], low, high)

                    plgpu.commit_smem()
                    plgpu.barrier_arrive(cleared)
                    plgpu.barrier_wait(cleared)

                plgpu.wgmma(accs[0], x_tiles.at[slot, group].T, dy_tiles.at[slot])

            (total,) = products.summed(multiply, (ROWS, columns), 1, steps, ready, free, stages)
            out[...] = total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[matrix, pl.ds(inner + group * ROWS, ROWS), over_columns])
            plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(i, slot):
                rows = pl.ds(first + i * DEPTH, DEPTH)
                for g in range(CONSUMERS):
                    depth = pl.ds(inner + g * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(x_ref.at[rows, depth], x_tiles.at[slot, g], ready.at[slot])
                plgpu.copy_gmem_to_smem(dy_ref.at[rows, over_columns], dy_tiles.at[slot], ready.at[slot])

            products.stream(load, steps, free, stages)

        products.specialised(consumer, producer)

    (out,) = plgpu.kernel(
        body,
        kernel_name="ragged_dot_sums",
        out_type=[jax.ShapeDtypeStruct((groups, k, n), dtype)],
        scratch_types=dict(
            x_tiles=smem(x.dtype, stages, CONSUMERS, DEPTH, ROWS),
            dy_tiles=smem(x.dtype, stages, DEPTH, columns),
            out_tile=smem(dtype, CONSUMERS, ROWS, columns),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS + 1),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
            cleared=plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        grid=(pl.cdiv(n, columns), pl.cdiv(k, BLOCK), groups),
        grid_names=("column", "inner", "matrix"),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(bounds, pad_to(x, 0, height), pad_to(dy, 0, height))
    return out


def forward(
    lhs: jax.Array,
    rhs: jax.Array,
    bounds: jax.Array,
    lhs_rows: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    out_weights: jax.Array | None = None,
    *,
    out_size: int,
    dtype: Any,
    precision: Any,
    tiles: Tiles | None = None,
):
    """((out,), ()) from lhs[t, k], rhs[g, k, n], bounds[g + 1], and [m] of each of the others."""
    del precision

    def product_of(x, dtype):
        return product(x, rhs, bounds, dtype, tiles)

    return (ragged.forward(product_of, lhs, lhs_rows, out_rows, out_weights, out_size, dtype),), ()


def backward(
    lhs: jax.Array,
    rhs: jax.Array,
    bounds: jax.Array,
    lhs_rows: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    out_weights: jax.Array | None = None,
    *,
    outputs,
    residuals,
    cotangents,
    out_size: int,
    dtype: Any,
    precision: Any,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of lhs, rhs and out_weights (if present) from the cotangent [out_size, n] of out."""
    del outputs, residuals, out_size, dtype, precision

    def product_of(dy, dtype):
        return product(dy, rhs, bounds, dtype, None, transposed=True)

    def sums_of(x, dy):
        return sums(x, dy, bounds, rhs.dtype, tiles)

    return ragged.backward(product_of, sums_of, lhs, lhs_rows, out_rows, out_weights, cotangents[0])
