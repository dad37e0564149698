"""Products of groups of rows with a matrix each, on the TPU.

    y_i = x_i · rhs_g,   dx_i = dy_i · rhs_gᵀ,   drhs_g = Σ_i x_iᵀ · dy_i,   for the rows i of group g

The rows are cut at every multiple of a tile and wherever a group begins: each piece is rows of one tile and one group.
The list of pieces is made by XLA and read as scalars before the blocks are fetched, so a grid step works on a piece. In
y and dx the whole inner dimension is in VMEM: no sum leaves the matrix unit's results, a matrix is fetched once for all
rows of its group, and columns are cut only as VMEM and the chip's cores ask for. A piece that fills its tile is one
product; of any other only the strips of rows that it touches are multiplied, so a border between groups costs a strip
and not a tile. drhs is summed in VMEM while the pieces of a group pass by.
Rows are gathered before and scattered after the kernels, by XLA.
Source: Gale et al. 2022 (MegaBlocks).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, ragged, tuned
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.tpu import matrix_unit
from pallas_kernels.tpu.matrix_unit import LANES, NN, NT, TN, dot

f32 = jnp.float32
STRIP = 128  # rows that are multiplied where a piece does not fill its tile
SLACK = 6 << 20  # VMEM left to the compiler
NOTHING, PRODUCT, ZEROS = range(3)  # what there is to do for a piece
# The rows of the list of pieces: the tile of rows and the matrix that a piece takes, the block of the result that it
# gives, its rows low … high - 1 of the tile, and what to do.
TILE, GROUP, RESULT, LOW, HIGH, ACTION = range(6)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of one tile; `columns` of rhs, whose inner dimension is whole in y and cut into `inner` in drhs.

    Multiples of 128.
    """

    rows: int
    columns: int
    inner: int = 0

    @staticmethod
    def default(k: int, n: int, itemsize: int, *, backward: bool) -> "Tiles":
        """The least that the chip's memory keeps up with, because the first blocks arrive before any product; the
        largest that fits VMEM if none does."""
        chip = chips.current("tpu")
        sizes = [Tiles(*size).fitted(k, n, backward=backward) for size in (_BACKWARD if backward else _FORWARD)]
        fitting = [tiles for tiles in sizes if tiles.vmem_bytes(k, itemsize, backward) + SLACK <= chip.vmem_bytes]
        balance = 0.8 * 2 / itemsize * chip.bandwidth / chip.flops
        fast = [tiles for tiles in fitting if tiles.traffic(backward) <= balance]
        return (fast or fitting[-1:] or sizes[:1])[0]

    def traffic(self, backward: bool) -> float:
        """Bytes of 16-bit blocks per flop, where about a thousand rows in turn are of one group."""
        if backward:
            return 1 / self.inner + 1 / self.columns + 1 / 1024
        return 1 / self.rows + 1 / self.columns

    def fitted(self, k: int, n: int, *, backward: bool) -> "Tiles":
        """No wider than the matrix, and at least one tile for each core of the chip."""
        cores = chips.current("tpu").cores
        if backward:
            inner = min(self.inner, round_up(pl.cdiv(k, cores), LANES))
            return Tiles(self.rows, min(self.columns, round_up(n, LANES)), inner)
        return Tiles(self.rows, min(self.columns, round_up(pl.cdiv(n, cores), LANES)))

    def allowed(self, k: int, itemsize: int, backward: bool) -> bool:
        """Whether these are sizes the kernels take, and everything fits VMEM."""
        sizes = (self.rows, self.columns, *((self.inner,) if backward else ()))
        if any(size <= 0 or size % LANES for size in sizes):
            return False
        return self.vmem_bytes(k, itemsize, backward) + SLACK <= chips.current("tpu").vmem_bytes

    def vmem_bytes(self, k: int, itemsize: int, backward: bool) -> int:
        """VMEM of a kernel. Blocks are there twice, the next arriving while this one is worked on. float32 operands of
        a turn are there once more, split into the parts of bfloat16 that are multiplied."""
        split = 16 if itemsize == 4 else 0
        if backward:  # x and dy; the sum, and drhs
            turn = self.rows * (min(self.inner, _TURN_INNER) + min(self.columns, _TURN_COLUMNS))
            blocks = 2 * itemsize * self.rows * (self.inner + self.columns)
            return blocks + (4 + 2 * itemsize) * self.inner * self.columns + split * turn
        k = round_up(k, LANES)
        turn = k * (self.rows + min(self.columns, _turn_columns()))
        return 2 * itemsize * k * (self.rows + self.columns) + 2 * 4 * self.rows * self.columns + split * turn


_TURN_INNER, _TURN_COLUMNS = 1024, 2048  # of drhs in one turn of a loop
_FORWARD = ((128, 128), (256, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024), (1024, 2048))
_BACKWARD = (
    (128, 128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
    (1024, 1024, 2048),
    (1024, 2048, 2048),
    (1024, 2048, 4096),
)


def _rows(lhs, lhs_rows) -> int:
    return lhs.shape[0] if lhs_rows is None else lhs_rows.shape[0]


def tiles(phase: str, lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    groups, k, n = rhs.shape
    return _tiles(_rows(lhs, lhs_rows), groups, k, n, lhs.dtype, backward=phase == "backward")


def _tiles(rows: int, groups: int, k: int, n: int, dtype, *, backward: bool) -> Tiles:
    return tuned.choose(
        f"tpu.ragged_dot.{'backward' if backward else 'forward'}",
        chips.current("tpu"),
        {"rows": rows, "groups": groups, "k": k, "n": n},
        jnp.dtype(dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(k, dtype.itemsize, backward),
        Tiles.default(k, n, dtype.itemsize, backward=backward),
    )


def candidates(
    phase: str, lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, **options
) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM: the default first, then blocks of 128, then other sizes."""
    backward, (_, k, n), itemsize = phase == "backward", rhs.shape, lhs.dtype.itemsize
    found = [Tiles.default(k, n, itemsize, backward=backward)]
    found += [Tiles(*size) for size in (_BACKWARD if backward else _FORWARD)]
    found += [dataclasses.replace(tiles, rows=rows) for tiles in tuple(found) for rows in (256, 1024)]
    seen = set()
    for tiles in found:
        cut = tiles.fitted(k, n, backward=backward)
        if cut.allowed(k, itemsize, backward) and cut not in seen:
            seen.add(cut)
            yield cut


def memory(
    phase: str, tiles: Tiles, lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, **options
) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return tiles.vmem_bytes(rhs.shape[1], lhs.dtype.itemsize, phase == "backward") + SLACK


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
    if lhs.dtype not in (f32, jnp.bfloat16):
        return f"lhs must be float32 or bfloat16 on a TPU, got {lhs.dtype}"
    if rhs.dtype != lhs.dtype:
        return f"rhs must have the dtype of lhs, {lhs.dtype}, got {rhs.dtype}"
    if dtype not in (f32, jnp.bfloat16):
        return f"the result must be float32 or bfloat16 on a TPU, got {dtype}"
    if reason := matrix_unit.unsupported(lhs.dtype, precision):
        return reason
    vmem = chips.current("tpu").vmem_bytes
    for name, size in (("k", rhs.shape[1]), ("n", rhs.shape[2])):  # each is whole in one of y and dx

        def fits(size):
            return Tiles(*_FORWARD[0]).vmem_bytes(size, lhs.dtype.itemsize, False) + SLACK <= vmem

        if not fits(size):
            most = max(s for s in range(0, size, LANES) if fits(s))
            limit = f"the least tiles must fit the {vmem >> 20} MiB of VMEM"
            return f"{limit}, that is {name} ≤ {most} in {lhs.dtype}, got {size}"
    return None


def pieces(bounds: jax.Array, rows: int, tile_rows: int, *, sums: bool) -> jax.Array:
    """int32 [6, pieces]: the rows cut at multiples of `tile_rows` and at `bounds`, in order.

    sums: the blocks of the result are the groups, and one without rows has a piece, too; otherwise they are the tiles.

    The blocks of a grid step are fetched during the step before and written during the step after, so a step that takes
    no time hides neither. Pieces that do nothing therefore follow the first one that does something, keep its block of
    the result, and take the rows and the matrix of the second.
    """
    groups, count = bounds.shape[0] - 1, pl.cdiv(rows, tile_rows)
    # A piece for each cut: at bounds, then at multiples of a tile; at one place the groups come first. Everything is
    # found by comparing all cuts with all: a handful of sorts and scans of so few numbers would take longer.
    start = jnp.concatenate([bounds, jnp.arange(count, dtype=jnp.int32) * tile_rows])
    number = jnp.arange(start.shape[0], dtype=jnp.int32)
    before = (start < start[:, None]) | ((start == start[:, None]) & (number < number[:, None]))
    end = jnp.min(jnp.where(before | (number == number[:, None]), rows, start), axis=1)
    group = jnp.where(number <= groups, number, jnp.sum(before[:, : groups + 1], axis=1, dtype=jnp.int32) - 1)
    tile = jnp.minimum(start // tile_rows, count - 1)
    product = (start < end) & (group >= 0) & (group < groups)
    if sums:
        empty = jnp.concatenate([bounds[1:] == bounds[:-1], jnp.zeros(count + 1, bool)])
        needed, action = product | empty, jnp.where(product, PRODUCT, NOTHING)
    else:
        needed = start < end
        action = jnp.where(product, PRODUCT, jnp.where(needed, ZEROS, NOTHING))
    rank = jnp.sum(before & needed, axis=1, dtype=jnp.int32)  # among the pieces that do something
    result = group if sums else tile
    result = jnp.where(needed, result, jnp.min(jnp.where(needed, result, groups + count)))

    def named(x):
        """x of this piece if it has a product, else of the next one that has, or of the last."""
        here_or_later = product & jnp.where(needed[:, None], ~before, rank > 0)
        following = jnp.min(jnp.where(here_or_later, x, groups + count), axis=1)
        return jnp.minimum(following, jnp.max(jnp.where(product, x, 0)))

    group, tile = named(group), jnp.where(needed & (action != NOTHING), tile, named(tile))
    idle = jnp.sum(~needed, dtype=jnp.int32)
    order = jnp.sum(before & ~needed, axis=1, dtype=jnp.int32)
    place = jnp.where(needed, rank + jnp.where(rank > 0, idle, 0), 1 + order)
    here = place == number[:, None]
    low, high = start - tile * tile_rows, end - tile * tile_rows
    fields = jnp.stack([tile, group, result, low, high, action])
    return jnp.sum(jnp.where(here, fields[:, None], 0), axis=2, dtype=jnp.int32)


def _turn_columns() -> int:
    """Columns of y in one turn of a loop, at most."""
    side = chips.current("tpu").mxu
    return 2 * side * side // LANES


def _turn(size: int, work: int, *, most: int | None = None) -> int:
    """As `matrix_unit.turn`, but the larger the matrix unit, the longer."""
    # The start and the end of a turn keep the matrix unit from working: of 256 it has the less time to spare, because
    # its memory is slow for it.
    passes = matrix_unit.WORK * chips.current("tpu").mxu // LANES
    return matrix_unit.turn(size, work, most=most, passes=passes)


def _loop(size: int, turn: int, body) -> None:
    """body(pl.ds(start, turn)) for start in 0, turn … size - turn."""
    if size == turn:
        body(pl.ds(0, turn))
    else:
        lax.fori_loop(0, size // turn, lambda i, _: body(pl.ds(pl.multiple_of(i * turn, turn), turn)), None)


def _strips(low, high, body) -> None:
    """body(strip, mask[STRIP, 1]) for each strip of rows that low … high - 1 touches; the mask says which rows do."""

    def one(i, _):
        start = pl.multiple_of(i * STRIP, STRIP)
        row = start + lax.broadcasted_iota(jnp.int32, (STRIP, 1), 0)
        body(pl.ds(start, STRIP), (row >= low) & (row < high))

    lax.fori_loop(lax.div(low, STRIP), lax.div(high + (STRIP - 1), STRIP), one, None)


def _product_kernel(cut, x_ref, rhs_ref, out_ref, *, transposed, precision):
    """Grid (tile of columns, piece): the piece's rows of x · rhs_g, or of x · rhs_gᵀ."""
    s = pl.program_id(1)
    (rows, columns), inner = out_ref.shape, x_ref.shape[1]
    begin, end, action = cut[LOW, s], cut[HIGH, s], cut[ACTION, s]
    whole = (begin == 0) & (end == rows)
    width = _turn(columns, LANES * inner, most=min(columns, _turn_columns()))

    def product(here, there):
        rhs = rhs_ref[0, there, :] if transposed else rhs_ref[0, :, there]
        return dot(x_ref[here], rhs, NT if transposed else NN, precision)

    @pl.when((action == PRODUCT) & whole)
    def _():
        height = _turn(rows, width * inner)

        def store(there, here):
            out_ref[here, there] = product(here, there).astype(out_ref.dtype)

        _loop(columns, width, lambda there: _loop(rows, height, functools.partial(store, there)))

    def mix(there, value):
        def one(strip, inside):
            out_ref[strip, there] = jnp.where(inside, value(strip, there).astype(out_ref.dtype), out_ref[strip, there])

        return one

    @pl.when((action == PRODUCT) & ~whole)
    def _():
        _loop(columns, width, lambda there: _strips(begin, end, mix(there, product)))

    @pl.when(action == ZEROS)
    def _():
        zeros = lambda strip, there: jnp.zeros((STRIP, width), f32)
        _loop(columns, width, lambda there: _strips(begin, end, mix(there, zeros)))


def _call(kernel, cut: jax.Array, semantics, vmem: int, flops: int, moved: int, operands, **kwargs):
    """`pl.pallas_call(kernel, …)` over the pieces. Under `vmap` the calls follow one another."""
    grid, in_specs, out_specs, scratch = (kwargs.pop(name) for name in ("grid", "in_specs", "out_specs", "scratch"))
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem + SLACK),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        **kwargs,
    )
    return jax.custom_batching.sequential_vmap(lambda *args: call(*args))(cut, *operands)


def product(x, rhs, bounds, dtype, precision, tiles: Tiles | None, *, transposed: bool = False):
    """x_i · rhs_g (or rhs_gᵀ), [m, n], rows without a group 0, from x[m, k] and rhs[g, k, n] (or [g, n, k])."""
    m, groups, (n, k) = x.shape[0], rhs.shape[0], rhs.shape[1:] if transposed else rhs.shape[:0:-1]
    tiles = (tiles or _tiles(m, groups, k, n, x.dtype, backward=False)).fitted(k, n, backward=False)
    wide, columns = round_up(k, LANES), tiles.columns
    rows = min(tiles.rows, round_up(m, STRIP))
    x = pad_to(pad_to(x, 1, wide), 0, max(m, rows))
    column_axis, inner_axis = (1, 2) if transposed else (2, 1)
    rhs = pad_to(pad_to(rhs, inner_axis, wide), column_axis, max(n, columns))
    cut = pieces(bounds, x.shape[0], rows, sums=False)
    block = (1, columns, wide) if transposed else (1, wide, columns)
    out = _call(
        functools.partial(_product_kernel, transposed=transposed, precision=precision),
        cut,
        ("parallel", "arbitrary"),
        tiles.vmem_bytes(k, x.dtype.itemsize, False),
        2 * m * k * n,
        x.size * x.dtype.itemsize * pl.cdiv(n, columns) + rhs.size * rhs.dtype.itemsize + m * n * dtype.itemsize,
        (x, rhs),
        grid=(pl.cdiv(n, columns), cut.shape[1]),
        in_specs=[
            pl.BlockSpec((rows, wide), lambda j, s, cut: (cut[TILE, s], 0)),
            pl.BlockSpec(block, lambda j, s, cut: (cut[GROUP, s], j, 0) if transposed else (cut[GROUP, s], 0, j)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda j, s, cut: (cut[RESULT, s], j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], max(n, columns)), dtype),
        scratch=[],
        name="ragged_dot_transposed" if transposed else "ragged_dot",
    )
    return out[:m, :n]


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

    def product_of(x, dtype):
        return product(x, rhs, bounds, dtype, precision, tiles)

    gather = ragged.filled_if_needed
    return (ragged.forward(product_of, lhs, lhs_rows, out_rows, out_weights, out_size, dtype, gather),), ()


# ------------------------------------------------------------------------------------------------ backward
def _sum_kernel(cut, x_ref, dy_ref, out_ref, sum_ref, *, precision):
    """Grid (tile of inner, tile of columns, piece): Σ x_iᵀ · dy_i over the pieces of a group."""
    s, last = pl.program_id(2), pl.num_programs(2) - 1
    (rows, inner), columns = x_ref.shape, dy_ref.shape[1]
    begin, end, action = cut[LOW, s], cut[HIGH, s], cut[ACTION, s]
    whole = (action == PRODUCT) & (begin == 0) & (end == rows)
    width = _turn(columns, LANES * rows, most=min(columns, _TURN_COLUMNS))
    height = _turn(inner, width * rows, most=min(inner, _TURN_INNER))

    def over(body):
        _loop(inner, height, lambda here: _loop(columns, width, functools.partial(body, here)))

    first = (s == 0) | (cut[RESULT, s] != cut[RESULT, jnp.maximum(s - 1, 0)])
    final = (s == last) | (cut[RESULT, s] != cut[RESULT, jnp.minimum(s + 1, last)])

    @pl.when(whole)
    def _():
        def add(here, there):
            # Whether it is the first of its group or the last, in one form: it hides behind the product.
            total = dot(x_ref[:, here], dy_ref[:, there], TN, precision)
            total = total + jnp.where(first, 0.0, sum_ref[here, there])
            sum_ref[here, there] = total
            out_ref[0, here, there] = total.astype(out_ref.dtype)

        over(add)

    @pl.when(first & ~whole)
    def _():
        def clear(here, there):
            sum_ref[here, there] = jnp.zeros((height, width), f32)

        over(clear)

    @pl.when((action == PRODUCT) & ~whole)
    def _():
        def add(here, there):
            def strip(rows, inside):
                # Rows of other groups, and what lies past the end of the arrays: 0 · NaN would stay a NaN.
                x, dy = (
                    jnp.where(inside, ref[rows, part], jnp.zeros((), ref.dtype))
                    for ref, part in ((x_ref, here), (dy_ref, there))
                )
                sum_ref[here, there] += dot(x, dy, TN, precision)

            _strips(begin, end, strip)

        over(add)

    @pl.when(final & ~whole)
    def _():
        def store(here, there):
            out_ref[0, here, there] = sum_ref[here, there].astype(out_ref.dtype)

        over(store)


def sums(x, dy, bounds, dtype, precision, tiles: Tiles | None):
    """Σ x_iᵀ · dy_i over the rows of each group, [g, k, n], from x[m, k] and dy[m, n]."""
    (m, k), n, groups = x.shape, dy.shape[1], bounds.shape[0] - 1
    tiles = (tiles or _tiles(m, groups, k, n, x.dtype, backward=True)).fitted(k, n, backward=True)
    rows = min(tiles.rows, round_up(m, STRIP))
    x = pad_to(pad_to(x, 1, max(k, tiles.inner)), 0, max(m, rows))
    dy = pad_to(pad_to(dy, 1, max(n, tiles.columns)), 0, max(m, rows))
    cut = pieces(bounds, x.shape[0], rows, sums=True)
    grid = (pl.cdiv(k, tiles.inner), pl.cdiv(n, tiles.columns), cut.shape[1])
    out = _call(
        functools.partial(_sum_kernel, precision=precision),
        cut,
        ("parallel", "arbitrary", "arbitrary"),
        tiles.vmem_bytes(k, x.dtype.itemsize, True),
        2 * m * k * n,
        (x.size * grid[1] + dy.size * grid[0]) * x.dtype.itemsize + groups * k * n * dtype.itemsize,
        (x, dy),
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, tiles.inner), lambda i, j, s, cut: (cut[TILE, s], i)),
            pl.BlockSpec((rows, tiles.columns), lambda i, j, s, cut: (cut[TILE, s], j)),
        ],
        out_specs=pl.BlockSpec((1, tiles.inner, tiles.columns), lambda i, j, s, cut: (cut[RESULT, s], i, j)),
        out_shape=jax.ShapeDtypeStruct((groups, x.shape[1], dy.shape[1]), dtype),
        scratch=[pltpu.VMEM((tiles.inner, tiles.columns), f32)],
        name="ragged_dot_sums",
    )
    return out[:, :k, :n]


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
    del outputs, residuals

    def product_of(dy, dtype):
        return product(dy, rhs, bounds, dtype, precision, None, transposed=True)

    def sums_of(x, dy):
        return sums(x, dy, bounds, jnp.dtype(rhs.dtype), precision, tiles)

    gather = ragged.filled_if_needed
    return ragged.backward(product_of, sums_of, lhs, lhs_rows, out_rows, out_weights, cotangents[0], gather)
