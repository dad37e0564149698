"""y = activation(x · w + bias) + residual on Hopper GPUs, of a w of which only some blocks are stored, and gradients.

    y_c = Σ_i x_r(i) · w_i,   dx_r = Σ_i dz_c(i) · w_iᵀ,   dw_i = x_r(i)ᵀ · dz_c(i),   for the stored blocks i

A block of threads takes 128 or 256 rows of y and columns of one block of w, and goes through the stored blocks of that
column alone: where they begin and end, and which part of x each meets, it reads from lists in HBM. It works as those of
`products` do; so does dx, of lists that are sorted by row. Blocks of dw take one stored block, and all rows of x and dz
pass by.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import activations, chips, tuned
from pallas_kernels.gpu import products
from pallas_kernels.gpu.attention_scores import across, smem
from pallas_kernels.gpu.elementwise import lowered
from pallas_kernels.gpu.products import CONSUMERS, DEPTH, PIECE, ROWS, WGMMA
from pallas_kernels.padding import pad_to, round_up

_SPARE = 2048  # shared memory for barriers and alignment


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A block of threads takes `rows`, 128 or 256, in steps of which `stages` are in flight."""

    rows: int
    stages: int

    @staticmethod
    def default(s: "Sizes") -> "Tiles":
        """As many rows as there are, as blocks of w are narrow; as many stages as fit, up to four."""
        rows = 256 if s.m > 128 else 128
        return next((t for t in (Tiles(rows, stages) for stages in (4, 3, 2)) if t.allowed(s)), Tiles(128, 2))

    def allowed(self, s: "Sizes") -> bool:
        fine = self.rows in (128, 256) and self.stages >= 2
        return fine and s.memory(self) <= chips.current("gpu").smem_bytes

    def columns(self, outer: int) -> int:
        """Columns that are taken at a time of a block that has `outer`: the sums fill half of the registers."""
        most = 256 * 128 // self.rows
        return max(c for c in range(PIECE, min(most, outer) + 1, PIECE) if outer % c == 0)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of x[m, k] and `count` blocks [bk, bn] of w[k, n]."""

    m: int
    k: int
    n: int
    count: int
    bk: int
    bn: int

    @staticmethod
    def of(x, w, size: int) -> "Sizes":
        return Sizes(math.prod(x.shape[:-1]), x.shape[-1], size, *w.shape)

    def memory(self, t: Tiles) -> int:
        """Bytes of shared memory of a block, in the product or the gradient that takes most."""
        used = lambda rows, columns: 2 * t.stages * DEPTH * (rows + columns) + 2 * rows * columns
        both = [used(t.rows, t.columns(outer)) for outer in (self.bn, self.bk)]
        return max(*both, used(CONSUMERS * ROWS, Tiles(128, 2).columns(self.bn))) + _SPARE


def unsupported(
    x, w, rows, columns, bias=None, residual=None, *, size: int, activation: Callable | None, precision: Any
) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del rows, columns, bias, precision  # products of bfloat16 are exact in every precision
    if reason := products.no_wgmma():
        return reason
    for what, array in (("x", x), ("w", w), ("residual", residual)):
        if array is not None and array.dtype != jnp.bfloat16:
            return f"{what} must be bfloat16, got {array.dtype}"
    s = Sizes.of(x, w, size)
    if s.bk % PIECE or s.bn % PIECE:
        return f"the sides of a block must be multiples of 64, the width of what TMA copies, got {s.bk} × {s.bn}"
    if max(pl.cdiv(s.m, 128), pl.cdiv(s.k, PIECE), pl.cdiv(s.n, PIECE), s.count) > 65535:
        return f"the grid is limited to 65535 blocks, got {s.m} rows, {s.k} × {s.n} and {s.count} stored blocks"
    return activations.unsupported(activation, products.refusal, products.computed)


def tiles(phase: str, x, w, rows, columns, bias=None, residual=None, *, size: int, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return _tiles(phase, Sizes.of(x, w, size))


def _tiles(phase: str, s: Sizes) -> Tiles:
    return tuned.choose(
        f"gpu.block_sparse_matmul.{phase}",
        chips.current("gpu"),
        {"m": s.m, "k": s.k, "n": s.n, "count": s.count},
        "bfloat16",
        Tiles,
        lambda tiles: tiles.allowed(s),
        Tiles.default(s),
    )


def candidates(phase: str, x, w, rows, columns, bias=None, residual=None, *, size: int, **options) -> Iterator[Tiles]:
    """Tiles worth trying that shared memory holds, the default first."""
    s = Sizes.of(x, w, size)
    found = [Tiles.default(s), *(Tiles(*both) for both in itertools.product((256, 128), (4, 3, 2)))]
    yield from (t for t in dict.fromkeys(found) if t.allowed(s))


def memory(phase: str, tiles: Tiles, x, w, rows, columns, bias=None, residual=None, *, size: int, **options) -> int:
    """Bytes of shared memory of a block."""
    return Sizes.of(x, w, size).memory(tiles)


def _launch(body, name: str, operands: dict, results: list, scratch: dict, grid: dict[str, int]) -> list[jax.Array]:
    return plgpu.kernel(
        body,
        kernel_name=name,
        out_type=results,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands.values())


def _product(
    name: str, x, w, take, give, place, size: int, t: Tiles, *, transposed=False, bias=None, residual=None, finish=None,
    results: int = 1,
) -> list[jax.Array]:  # fmt: skip
    """Arrays [m, size], what `finish` makes of the sums, bias and residual (None: the sums): x_take · w_place (or wᵀ)
    summed over the stored blocks, in the order of the part `give` of the result."""
    (m, _), (count, bk, bn) = x.shape, w.shape
    inner, outer = (bn, bk) if transposed else (bk, bn)
    height, columns, per_block = round_up(m, 8), t.columns(outer), inner // DEPTH
    tall, stages, over = t.rows // (CONSUMERS * ROWS), t.stages, outer // columns
    starts = jnp.searchsorted(give, jnp.arange(size // outer + 1, dtype=jnp.int32), method="compare_all")
    operands = {"x": pad_to(x, 0, height), "w": w.reshape(count * bk, bn), "take": take, "place": place}
    operands["starts"] = starts.astype(jnp.int32)
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32)
    if residual is not None:
        operands["residual"] = pad_to(residual, 0, height)

    def body(*arrays, x_tiles, w_tiles, out_tiles, ready, free, arrived):
        refs, outs = dict(zip(operands, arrays, strict=False)), arrays[len(operands) :]
        column = lax.axis_index("column")
        part, within = lax.div(column, jnp.int32(over)), lax.rem(column, jnp.int32(over)) * columns
        begin = refs["starts"][part]
        steps = (refs["starts"][part + 1] - begin) * per_block
        first_row, there = lax.axis_index("row") * t.rows, pl.ds(column * columns, columns)

        def tiles_of(group):
            """(number, rows) of those of one warpgroup."""
            mine = [group * tall + i for i in range(tall)]
            return [(n, pl.ds(first_row + n * ROWS, ROWS)) for n in mine]

        def consumer(group):
            for n, rows in tiles_of(group):
                if residual is not None:  # where the result will be
                    plgpu.copy_gmem_to_smem(refs["residual"].at[rows, there], out_tiles.at[n], arrived.at[group])

            def multiply(i, slot, accs):
                del i
                for acc, (n, _) in zip(accs, tiles_of(group), strict=True):
                    tile = w_tiles.at[slot]
                    plgpu.wgmma(acc, x_tiles.at[slot, n], tile.T if transposed else tile)

            sums = products.summed(multiply, (ROWS, columns), tall, steps, ready, free, stages)
            if residual is not None:
                plgpu.barrier_wait(arrived.at[group])

            def finished(total, n, start):
                here, shape = pl.ds(start, PIECE), (ROWS, PIECE)
                z = lax.slice(total, (0, start), (ROWS, start + PIECE))
                if finish is None:
                    return (z,)
                row = add = None
                if bias is not None:
                    of_columns = refs["bias"].at[pl.ds(column * columns + start, PIECE)]
                    row = across(plgpu.load(of_columns, layout=WGMMA.reduce(0), optimized=False), shape)
                if residual is not None:
                    add = plgpu.load(out_tiles.at[n, :, here], layout=WGMMA).astype(jnp.float32)
                return finish(z, row, add)

            for which, out in enumerate(outs):
                for total, (n, rows) in zip(sums, tiles_of(group), strict=True):
                    for start in range(0, columns, PIECE):
                        out_tiles[n, :, pl.ds(start, PIECE)] = finished(total, n, start)[which].astype(x.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_tiles.at[n], out.at[rows, there])
                plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(i, slot):
                block = begin + lax.div(i, jnp.int32(per_block))
                depth = lax.rem(i, jnp.int32(per_block)) * DEPTH
                along = pl.ds(refs["take"][block] * inner + depth, DEPTH)
                for n in range(CONSUMERS * tall):
                    rows = pl.ds(first_row + n * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(refs["x"].at[rows, along], x_tiles.at[slot, n], ready.at[slot])
                top = refs["place"][block] * bk
                if transposed:
                    of_block = pl.ds(top + within, columns), pl.ds(depth, DEPTH)
                else:
                    of_block = pl.ds(top + depth, DEPTH), pl.ds(within, columns)
                plgpu.copy_gmem_to_smem(refs["w"].at[*of_block], w_tiles.at[slot], ready.at[slot])

            products.stream(load, steps, free, stages)

        products.specialised(consumer, producer)

    found = _launch(
        body,
        name,
        operands,
        [jax.ShapeDtypeStruct((height, size), x.dtype)] * results,
        dict(
            x_tiles=smem(x.dtype, stages, CONSUMERS * tall, ROWS, DEPTH),
            w_tiles=smem(x.dtype, stages, *((columns, DEPTH) if transposed else (DEPTH, columns))),
            out_tiles=smem(x.dtype, CONSUMERS * tall, ROWS, columns),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS * tall + 1),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
            arrived=plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=tall),
        ),
        {"row": pl.cdiv(m, t.rows), "column": size // columns},
    )
    return [y[:m] for y in found]


def _sums(x, dz, rows, columns, s: Sizes, t: Tiles) -> jax.Array:
    """dw[count, bk, bn] of x[m, k] and dz[m, n]. Rows of x past the end are read as zeros."""
    width, height, stages = Tiles(128, 2).columns(s.bn), round_up(s.m, 8), t.stages
    steps, high = pl.cdiv(height, DEPTH), CONSUMERS * ROWS

    def body(x_ref, dz_ref, row, column, out_ref, x_tiles, dz_tiles, out_tiles, ready, free):
        block, top, left = lax.axis_index("block"), lax.axis_index("inner") * high, lax.axis_index("outer") * width
        first, over = row[block] * s.bk + top, pl.ds(column[block] * s.bn + left, width)

        def consumer(group):
            def multiply(i, slot, accs):
                del i
                plgpu.wgmma(accs[0], x_tiles.at[slot, group].T, dz_tiles.at[slot])

            (total,) = products.summed(multiply, (ROWS, width), 1, steps, ready, free, stages)

            @pl.when(top + group * ROWS < s.bk)  # a block may have but 64 rows
            def _():
                out_tiles[group] = total.astype(x.dtype)
                plgpu.commit_smem()
                there = pl.ds(block * s.bk + top + group * ROWS, ROWS), pl.ds(left, width)
                plgpu.copy_smem_to_gmem(out_tiles.at[group], out_ref.at[*there])
                plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(i, slot):
                here = pl.ds(i * DEPTH, DEPTH)
                for g in range(CONSUMERS):
                    inner = pl.ds(first + g * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(x_ref.at[here, inner], x_tiles.at[slot, g], ready.at[slot])
                plgpu.copy_gmem_to_smem(dz_ref.at[here, over], dz_tiles.at[slot], ready.at[slot])

            products.stream(load, steps, free, stages)

        products.specialised(consumer, producer)

    (out,) = _launch(
        body,
        "block_sparse_matmul_weights",
        {"x": pad_to(x, 0, height), "dz": pad_to(dz, 0, height), "rows": rows, "columns": columns},
        [jax.ShapeDtypeStruct((s.count * s.bk, s.bn), x.dtype)],
        dict(
            x_tiles=smem(x.dtype, stages, CONSUMERS, DEPTH, ROWS),
            dz_tiles=smem(x.dtype, stages, DEPTH, width),
            out_tiles=smem(x.dtype, CONSUMERS, ROWS, width),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS + 1),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        ),
        {"outer": s.bn // width, "inner": pl.cdiv(s.bk, high), "block": s.count},
    )
    return out.reshape(s.count, s.bk, s.bn)


def forward(
    x: jax.Array,
    w: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    size: int,
    activation: Callable | None,
    precision: Any,
    tiles: Tiles | None = None,
    saving: bool = True,
):
    """((y,), residuals): x[..., k], the blocks w[s, bk, bn] sorted by column; z is saved if there is an activation,
    unless not `saving`."""
    del precision
    s = Sizes.of(x, w, size)
    active = lowered(activation) if activation is not None else lambda z: z

    def finish(z, bias, residual):
        z = z if bias is None else z + bias
        y = active(z)
        return (y if residual is None else y + residual), z

    flat = lambda a: None if a is None else a.reshape(s.m, a.shape[-1])
    plain = activation is None and bias is None and residual is None
    found = _product(
        *("block_sparse_matmul", flat(x), w, rows, columns, jnp.arange(s.count, dtype=jnp.int32), size),
        tiles or _tiles("forward", s),
        bias=bias,
        residual=flat(residual),
        finish=None if plain else finish,
        results=1 + (saving and activation is not None),
    )
    y, *saved = (a.reshape(*x.shape[:-1], size) for a in found)
    return (y,), tuple(saved)


def value(*operands, **options):
    """(y,), with nothing saved: `forward` for a call that is not differentiated."""
    return forward(*operands, **options, saving=False)[0]


def backward(
    x: jax.Array,
    w: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    outputs,
    residuals,
    cotangents,
    size: int,
    activation: Callable | None,
    precision: Any,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of the operands that are present, from the cotangent of y. XLA makes dz and the sums for the bias."""
    del outputs, precision
    s = Sizes.of(x, w, size)
    t = tiles or _tiles("backward", s)
    dz, gradients = activations.before(activation, residuals, cotangents[0], bias, residual)
    flat = lambda a: a.reshape(s.m, a.shape[-1])
    dz = flat(dz).astype(x.dtype)
    order = jnp.argsort(rows, stable=True).astype(jnp.int32)
    (dx,) = _product("block_sparse_matmul_inputs", dz, w, columns[order], rows[order], order, s.k, t, transposed=True)
    return gradients | {"x": dx.reshape(x.shape), "w": _sums(flat(x), dz, rows, columns, s, t)}
