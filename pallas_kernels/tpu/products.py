"""What matmul and gated_linear_unit share on the TPU: products of one x with one or several weights, and their
gradients, with what comes after (forward) or before (backward) them done on tiles in VMEM.

    z_i = x · w_i,   (y, saved …) = finish(z_1, …)                                                   forward
    (d_1, …) = start(dy, saved …),   dx = Σ_i d_i · w_iᵀ,   dw_i = xᵀ · d_i,   db_i = Σ_rows d_i     backward

Three kernels, each a grid of output tiles times steps along the contracted axis: no operand is transposed in HBM, and
the d_i never get there. A tile is worked on in strips: the matrix units multiply one strip while the vector units
finish the one before or start the one after. Edges that a contraction crosses are cleared by selection, because memory
past the end of an array may hold NaN; others only make rows and columns that no one writes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuned
from pallas_kernels.padding import round_up
from pallas_kernels.tpu import matrix_unit
from pallas_kernels.tpu.matrix_unit import LANES, NN, NT, dot

f32 = jnp.float32
SLACK = 6 << 20  # VMEM left to the compiler for what does not stay in registers
STRIP = 256  # columns of a strip


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A tile of each axis: `m` rows of x, `n` columns and `k` rows of the weights; multiples of 128."""

    m: int
    n: int
    k: int

    @staticmethod
    def default(phase: str, sizes: "Sizes") -> "Tiles":
        """The first that fits VMEM. Reads decide: forward, a tile of m × n reads m + n numbers for m · n products.
        Where blocks of x can be fetched ahead, k is whole, and x is read once; elsewhere short steps along k start
        early. Backward, k is whole if it can be: what belongs to m × n is then read and differentiated once for dx and
        once for the weights."""
        return next((t for t in _sizes(phase, sizes) if t.allowed(phase, sizes)), Tiles(LANES, LANES, LANES))

    def allowed(self, phase: str, sizes: "Sizes") -> bool:
        """Whether these are sizes the kernels take, and everything fits VMEM."""
        if any(size <= 0 or size % LANES for size in (self.m, self.n, self.k)):
            return False
        return memory(phase, self, sizes) <= chips.current("tpu").vmem_bytes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What decides on tiles: the sizes of x[m, k] and the weights [k, n], bytes of a number, how many weights there
    are, how many arrays [m, n] are read after the products (residual), how many are saved for the backward pass,
    whether float32 is multiplied in full, and the columns of all tables."""

    m: int
    n: int
    k: int
    itemsize: int
    weights: int
    read: int
    saved: int
    full: bool
    tables: int = 0

    def cut(self, tiles: Tiles) -> "Tiles":
        """The blocks of `tiles`; none is past the end of its axis."""
        return Tiles(*map(_block, (self.m, self.n, self.k), _axes(tiles)))

    def steps(self, tiles: Tiles) -> tuple[int, int, int]:
        """How many blocks along m, n and k."""
        cut = self.cut(tiles)
        return pl.cdiv(self.m, cut.m), pl.cdiv(self.n, cut.n), pl.cdiv(self.k, cut.k)


def _block(size: int, tile: int) -> int:
    """An axis that fits one tile is one block of its own size, or two if it is long and no multiple of 128: inside a
    kernel, what is long is taken in equal parts."""
    if size > tile:
        return tile
    return size if size % LANES == 0 or size < 2 * LANES else round_up(pl.cdiv(size, 2), LANES)


def _axes(tiles: Tiles) -> tuple[int, int, int]:
    return tiles.m, tiles.n, tiles.k


def _sizes(phase: str, sizes: Sizes) -> Iterator[Tiles]:
    """Tiles in the order of preference."""
    whole = round_up(sizes.k, LANES)
    if phase == "forward":
        for rows in (2048, 1024):
            if _ahead(sizes, sizes.cut(tiles := Tiles(rows, 512, whole))):
                yield tiles
        for m, n in ((1024, 1024), (1024, 512), (512, 512), (256, 512), (256, 256), (128, 128)):
            for k in (512, 256, 128):
                yield Tiles(m, n, k)
        return
    for m, n in ((1024, 1024), (1024, 512), (512, 512), (256, 512), (256, 256), (128, 128)):
        for k in (whole, 2048, 1024, 512, 256, 128):
            yield Tiles(m, n, min(k, whole))


def _padded(rows: int, columns: int) -> int:
    return round_up(rows, 16) * round_up(columns, LANES)


def memory(phase: str, tiles: Tiles, sizes: Sizes) -> int:
    """Bytes of VMEM that the kernels of `phase` are estimated to take. Blocks are there twice, the next one arriving,
    or the last one leaving, while this one is worked on. float32 operands that are multiplied in full are there once
    more, split into the parts of bfloat16 that are multiplied."""
    t, size, count = sizes.cut(tiles), sizes.itemsize, sizes.weights
    x, w, y = _padded(t.m, t.k), _padded(t.k, t.n), _padded(t.m, t.n)
    split = [steps > 1 for steps in sizes.steps(tiles)]
    strip = 2 * count * _padded(t.m, min(t.n, STRIP))
    tables = 2 * 4 * _padded(t.m, sizes.tables)
    parts = 16 * sizes.full * (x + count * w + (count * y if phase == "backward" else 0))
    if phase == "forward":
        blocks = 2 * size * (x + count * w + (1 + sizes.saved + sizes.read) * y)
        return SLACK + tables + blocks + parts + 4 * count * (y * split[2] + strip)
    read = 2 * size * (1 + sizes.saved) * y + size * strip
    products = 2 * 4 * count * _padded(max(t.m, min(t.k, 1024)), STRIP)  # before they are added to the sums
    dx = 2 * size * (x + count * w) + 4 * x * split[1]
    dw = 2 * size * (x + count * w) + size * x + 4 * count * w * split[0] + 8 * 4 * count * 3 * round_up(t.n, LANES)
    return SLACK + tables + read + parts + products + max(dx, dw)


def tiles(name: str, phase: str, sizes: Sizes, dtype: Any) -> Tiles:
    """The tuned tiles of the nearest problem that fit this one, else the default."""
    return tuned.choose(
        f"tpu.{name}.{phase}",
        chips.current("tpu"),
        {"m": sizes.m, "n": sizes.n, "k": sizes.k},
        jnp.dtype(dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(phase, sizes),
        Tiles.default(phase, sizes),
    )


def candidates(phase: str, sizes: Sizes) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM: the default first, then blocks of 128, then every other size."""
    edges = (2048, 1024, 512, 256)
    found = [Tiles.default(phase, sizes), Tiles(LANES, LANES, LANES)]
    found += [Tiles(*edge) for edge in itertools.product(edges, edges, (*edges, round_up(sizes.k, LANES)))]
    seen = set()
    for one in found:
        if one.allowed(phase, sizes) and sizes.cut(one) not in seen:
            seen.add(sizes.cut(one))
            yield one


def unsupported(x, precision: Any, *weights) -> str | None:
    """Why x[..., k] and weights [k, n] cannot be multiplied here, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16 on a TPU, got {x.dtype}"
    for w in weights:
        if w.dtype != x.dtype:
            return f"the weights must have the dtype of x, {x.dtype}, got {w.dtype}"
    return matrix_unit.unsupported(x.dtype, precision)


def _strips(size: int, width: int) -> list[Any]:
    return [pl.ds(start, min(width, size - start)) for start in range(0, size, width)]


def _part(i, height: int, size: int):
    """The i-th of the equal parts of `size`."""
    return slice(0, size) if height == size else pl.ds(pl.multiple_of(i * height, height), height)


def _parts(i, height: int, rows: int, size: int) -> list[Any]:
    """The i-th of the equal parts of `size`, cut into smaller ones of `rows`."""
    if height == size:
        return _strips(size, rows)
    start = pl.multiple_of(i * height, height)
    return [pl.ds(start + offset, rows) for offset in range(0, height, rows)]


def _loop(count: int, body: Callable) -> None:
    """body(i) for i in range(count), the program of one turn being long."""
    if count == 1:
        body(0)
    else:
        lax.fori_loop(0, count, lambda i, _: body(i), None)


def _clear(ref, axis: int, block, size: int) -> None:
    """Zeros past the end of an array of `size` along `axis`: there lies anything, and 0 · NaN would stay a NaN."""
    width = ref.shape[axis]
    inside = size % width
    if inside:
        start = inside // LANES * LANES if axis else inside // 16 * 16
        edge = (slice(None),) * axis + (pl.ds(start, width - start),)

        @pl.when(block == size // width)
        def _():
            old = ref[edge]
            index = lax.broadcasted_iota(jnp.int32, old.shape, axis) + start
            # Mosaic chooses between 16-bit numbers only in whole registers.
            wide = old if ref.shape[1 - axis] % 16 == 0 else old.astype(f32)
            ref[edge] = jnp.where(index < inside, wide, jnp.zeros((), wide.dtype)).astype(ref.dtype)


def _call(kernel, name, phase, tiles, sizes, semantics, work, **kwargs):
    """`pl.pallas_call(kernel, …)` with the VMEM and the cost told to XLA.

    Under `vmap` the calls follow one another: one fills the chip, and shared weights stay shared.
    """
    once = sizes.m * sizes.k + sizes.weights * sizes.k * sizes.n + (1 + sizes.saved + sizes.read) * sizes.m * sizes.n
    call = pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=min(memory(phase, tiles, sizes) + SLACK, chips.current("tpu").vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * sizes.weights * sizes.m * sizes.n * sizes.k,
            transcendentals=work * sizes.m * sizes.n,
            bytes_accessed=once * sizes.itemsize,
        ),
        name=name,
        **kwargs,
    )
    return jax.custom_batching.sequential_vmap(lambda *operands: call(*operands))


# ------------------------------------------------------------------------------------------------ forward
def _forward_kernel(x_ref, w_refs, bias_ref, residual_ref, table_refs, *refs, finish, sizes, cut, precision):
    out_refs, sums = refs[: 1 + sizes.saved], list(refs[1 + sizes.saved :])
    step, steps = pl.program_id(2), pl.cdiv(sizes.k, cut.k)
    ahead, pieces = _ahead(sizes, cut), 1
    if ahead:
        pieces = _pieces(sizes, cut)
        blocks, arrived, *sums = sums
        x_ref, arrive = _fetch_rows(x_ref, blocks, arrived, pieces)
    _clear(x_ref, 1, step, sizes.k)
    for w_ref in w_refs:
        _clear(w_ref, 0, step, sizes.k)
    height = matrix_unit.turn(cut.m, cut.n * cut.k * sizes.weights)

    def products(row, column):
        return [dot(x_ref[row], w_ref[:, column], NN, precision) for w_ref in w_refs]

    def complete(row, column, zs):
        bias = None if bias_ref is None else bias_ref[:, column].astype(f32)
        residual = None if residual_ref is None else residual_ref[row, column].astype(f32)
        tables = [ref[row] for ref in table_refs]
        for ref, value in zip(out_refs, finish(zs, bias, residual, *tables), strict=True):
            ref[row, column] = value.astype(ref.dtype)

    def keep(row, column, zs):
        for ref, z in zip(sums, zs, strict=True):
            ref[row, column] = z

    def go(rest, add=False, height=height, arrive=lambda i: None):
        """rest(row, column, sums) of every strip, while the next one is multiplied."""

        def turn(i):
            arrive(i)
            rows = _parts(i, height, STRIP if height % STRIP == 0 else height, cut.m)
            before: Any = None
            for strip in itertools.product(rows, _strips(cut.n, STRIP)):
                zs = products(*strip)
                if add:
                    zs = [ref[strip] + z for ref, z in zip(sums, zs, strict=True)]
                if before is not None:
                    rest(*before)
                before = (*strip, zs)
            rest(*before)

        _loop(cut.m // height, turn)

    if ahead:
        first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
        pl.when(first)(lambda: go(complete, height=cut.m // pieces, arrive=arrive))
        pl.when(~first)(lambda: go(complete))
    elif steps == 1:
        go(complete)
    else:
        pl.when(step == 0)(lambda: go(keep))
        pl.when((step > 0) & (step < steps - 1))(lambda: go(keep, add=True))
        pl.when(step == steps - 1)(lambda: go(complete, add=True))


def _ahead(sizes: Sizes, cut: Tiles) -> bool:
    """Whether blocks of x are fetched by the kernel itself: a block that stays for a whole row of tiles is large, and
    the grid would ask for the next one only in the last tile of the row. Two cores would not know which row is first.
    """
    return sizes.k == cut.k and sizes.m % cut.m == 0 and sizes.m > cut.m and chips.current("tpu").cores == 1


def _pieces(sizes: Sizes, cut: Tiles) -> int:
    """Into how many pieces a block of x is cut: one is fetched with each tile, so that weights are not kept waiting."""
    return max(p for p in range(1, pl.cdiv(sizes.n, cut.n) + 1) if cut.m % (16 * p) == 0)


def _fetch_rows(x_ref, blocks, arrived, pieces: int):
    """The block of x of this row of tiles, a piece of the next one being on its way; and what waits for a piece of it
    in the first tile of all. It is there in every other."""
    m, i, j = blocks.shape[1], pl.program_id(0), pl.program_id(1)

    def copy(block, piece):
        slot, size = lax.rem(block, 2), m // pieces
        there = blocks.at[slot, pl.ds(piece * size, size)]
        return pltpu.make_async_copy(x_ref.at[pl.ds(block * m + piece * size, size)], there, arrived.at[slot, piece])

    @pl.when((i == 0) & (j == 0))
    def _():
        _loop(pieces, lambda piece: copy(0, piece).start())

    @pl.when((i > 0) & (j == 0))
    def _():
        _loop(pieces, lambda piece: copy(i, piece).wait())

    @pl.when((i + 1 < pl.num_programs(0)) & (j < pieces))
    def _():
        copy(i + 1, j).start()

    return blocks.at[lax.rem(i, 2)], lambda piece: copy(0, piece).wait()


def forward(
    name: str,
    x,
    ws: Sequence,
    bias,
    residual,
    finish: Callable,
    sizes: Sizes,
    tiles: Tiles,
    precision: Any,
    *,
    tables: Sequence = (),
) -> list[jax.Array]:
    """[y, saved …], each [m, n] in the dtype of x[m, k]: what `finish` makes of the products with every w[k, n].

    finish(zs, bias, residual, tables …) -> (y, saved …), of float32 tiles, the bias a row and both perhaps None.
    tables: see `_tables`.
    """
    cut, steps, outputs = sizes.cut(tiles), sizes.steps(tiles), 1 + sizes.saved
    over_mn = pl.BlockSpec((cut.m, cut.n), lambda i, j, k: (i, j))
    row = None if bias is None else bias.astype(bias.dtype if bias.dtype in (f32, jnp.bfloat16) else f32)[None]
    ahead, parallel = _ahead(sizes, cut), "parallel"
    x_spec = pl.BlockSpec((cut.m, cut.k), lambda i, j, k: (i, k))
    fetched: list[Any] = []
    if ahead:
        x_spec, parallel = pl.BlockSpec(memory_space=pl.ANY), "arbitrary"
        fetched = [pltpu.VMEM((2, cut.m, cut.k), x.dtype), pltpu.SemaphoreType.DMA((2, _pieces(sizes, cut)))]
    return _call(
        functools.partial(_forward_kernel, finish=finish, sizes=sizes, cut=cut, precision=precision),
        f"{name}_forward",
        "forward",
        tiles,
        sizes,
        (parallel, parallel, "arbitrary"),
        1,
        grid=steps,
        in_specs=[
            x_spec,
            [pl.BlockSpec((cut.k, cut.n), lambda i, j, k: (k, j))] * len(ws),
            None if row is None else pl.BlockSpec((1, cut.n), lambda i, j, k: (0, j)),
            None if residual is None else over_mn,
            _tables(tables, cut, lambda i, j, k: i),
        ],
        out_specs=[over_mn] * outputs,
        out_shape=[jax.ShapeDtypeStruct((sizes.m, sizes.n), x.dtype)] * outputs,
        scratch_shapes=[*fetched, *[pltpu.VMEM((cut.m, cut.n), f32)] * (len(ws) * (steps[2] > 1))],
    )(x, list(ws), row, residual, list(tables))


def _tables(tables: Sequence, cut: Tiles, rows: Callable) -> list[pl.BlockSpec]:
    """The blocks of float32 tables [r, columns], whose row i goes with the rows i, i + r … of x, r being m or a
    multiple of a tile; rows(…) is the block of rows of a grid step."""

    def spec(table):
        blocks = pl.cdiv(len(table), cut.m)
        return pl.BlockSpec((cut.m, table.shape[1]), lambda *step: (rows(*step) % blocks, 0))

    return [spec(table) for table in tables]


# ------------------------------------------------------------------------------------------------ backward
@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The d of a block [m, n], made strip by strip. `buffers`, [2, m, strip] for each weight, hold a strip that is
    being multiplied and the next one; without `start` there is nothing to make, and dy itself is what is multiplied.

    `axis`, the contracted one, ends at `size`; `block` is the place of the block along it. `sums`: where to add the sum
    of the rows of d, [8, n] for each weight, if wanted. `tables`, [m, columns], go to `start` after `saved`.
    """

    start: Callable | None
    dy: Any
    saved: Sequence
    buffers: Sequence
    axis: int
    block: Any
    size: int
    sums: Sequence
    tables: Sequence

    @property
    def width(self) -> int:
        columns = self.dy.shape[1]
        return STRIP if self.buffers and columns % STRIP == 0 else columns

    def read(self, rows, columns):
        """d of a part of the block, in float32; zeros past the end of the contracted axis."""
        dy = self.dy[rows, columns].astype(f32)
        ds: tuple[jax.Array, ...] = (dy,)
        if self.start is not None:
            saved, tables = (ref[rows, columns].astype(f32) for ref in self.saved), (ref[rows] for ref in self.tables)
            ds = self.start(dy, *saved, *tables)
        length = self.dy.shape[self.axis]
        if self.size % length:
            first = _first(columns if self.axis else rows) + self.block * length
            inside = lax.broadcasted_iota(jnp.int32, dy.shape, self.axis) + first < self.size
            ds = tuple(jnp.where(inside, d, 0.0) for d in ds)
        return ds

    def prepare(self, strip, slot, rows, counts=True):
        """Some rows of a strip into the buffers; they count in the sums if they were not there before."""
        columns = _part(strip, self.width, self.dy.shape[1])
        ds = self.read(rows, columns)
        for buffer, d in zip(self.buffers, ds, strict=False):
            buffer[slot, rows] = d.astype(buffer.dtype)
        for ref, d in zip(self.sums, ds, strict=False):
            height = 8 if d.shape[0] % 8 == 0 else 1
            total = jnp.sum(d.reshape(-1, height, d.shape[1]), 0)
            ref[:height, columns] += jnp.where(counts, total, 0.0)

    def multiply(self, most: int, work: int, product: Callable) -> None:
        """product(ds, columns, part) for every strip of columns, its d as narrow matrices [m, strip], and every part of
        `most` rows or columns of the result, `work` multiply-adds each for one number of d; meanwhile the next strip is
        made."""
        (height, columns), width = self.dy.shape, self.width
        strips, size = columns // width, matrix_unit.turn(most, height * width * work)
        if height % (16 * (most // size)):  # else the next strip could not be made in as many parts
            size = most
        parts = most // size
        rows = height // parts
        if self.buffers or self.sums:
            _loop(parts, lambda part: self.prepare(0, 0, _part(part, rows, height)))
        if not self.buffers:
            _clear(self.dy, self.axis, self.block, self.size)

        def turn(i):
            strip, part = i // parts, i % parts
            ds = [buffer.at[strip % 2] for buffer in self.buffers] or [self.dy]
            product(ds, _part(strip, width, columns), _part(part, size, most))
            if self.buffers and strips > 1:  # after the last one: again the first, for nothing
                following = strip + 1
                again = following % strips
                self.prepare(again, following % 2, _part(part, rows, height), counts=following < strips)

        _loop(strips * parts, turn)


def _first(part) -> Any:
    return part.start if isinstance(part, pl.Slice) else part.start or 0


def _over_rows(ref, body: Callable) -> None:
    """body(rows) for every 128 rows of an array in VMEM, or all of them at once."""
    height = LANES if ref.shape[0] % LANES == 0 else ref.shape[0]
    _loop(ref.shape[0] // height, lambda i: body(_part(i, height, ref.shape[0])))


def _accumulate(step, steps: int, sums: Sequence, outs: Sequence, add: Callable) -> None:
    """Sums of float32 over the steps of the innermost grid axis, and their rounding at its end."""

    @pl.when(step == 0)
    def _():
        for ref in sums:
            _over_rows(ref, lambda rows, ref=ref: ref.__setitem__(rows, jnp.zeros_like(ref[rows])))

    add()

    @pl.when(step == steps - 1)
    def _():
        for ref, out in zip(sums, outs, strict=False):
            _over_rows(ref, lambda rows, ref=ref, out=out: out.__setitem__(rows, ref[rows].astype(out.dtype)))


def _dx_kernel(dy_ref, saved_refs, w_refs, table_refs, dx_ref, total, *buffers, start, sizes, cut, precision):
    step = pl.program_id(2)
    for w_ref in w_refs:
        _clear(w_ref, 1, step, sizes.n)
    d = _Gradients(start, dy_ref, saved_refs, buffers, 1, step, sizes.n, (), table_refs)

    def product(ds, columns, part):
        total[:, part] += sum(
            dot(d_ref[...], w_ref[part, columns], NT, precision) for d_ref, w_ref in zip(ds, w_refs, strict=True)
        )

    _accumulate(*(step, pl.cdiv(sizes.n, cut.n), [total], [dx_ref]), lambda: d.multiply(cut.k, sizes.weights, product))


def _dw_kernel(x_ref, dy_ref, saved_refs, table_refs, *refs, start, sizes, cut, precision, with_sums):
    step, count, outs = pl.program_id(2), sizes.weights, refs[: sizes.weights]
    scratch: Sequence = refs[count:]
    sums, (transposed, *scratch) = (scratch[:count], scratch[count:]) if with_sums else ((), scratch)
    totals, buffers = scratch[:count], scratch[count:]
    _clear(x_ref, 0, step, sizes.m)
    d = _Gradients(start, dy_ref, saved_refs, buffers, 0, step, sizes.m, sums, table_refs)

    def add():
        _over_rows(transposed, lambda rows: transposed.__setitem__(rows, x_ref[:, rows].T))
        d.multiply(cut.k, count, product)

    def product(ds, columns, part):
        for d_ref, total in zip(ds, totals, strict=True):
            total[part, columns] += dot(transposed[part], d_ref[...], NN, precision)

    _accumulate(step, pl.cdiv(sizes.m, cut.m), (*totals, *sums), outs, add)


def backward(
    name: str,
    x,
    ws: Sequence,
    dy,
    saved: Sequence,
    start: Callable | None,
    sizes: Sizes,
    tiles: Tiles,
    precision: Any,
    *,
    with_sums: bool = False,
    tables: Sequence = (),
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """(dx, every dw, the sums over the rows of every d in float32, if wanted), from dy and what was saved, all [m, n].

    start(dy, saved …, tables …) -> (d_1, …), of float32 tiles; None for dy itself. tables: see `_tables`.
    """
    cut, steps = sizes.cut(tiles), sizes.steps(tiles)
    count, (m, n, k) = sizes.weights, _axes(cut)
    strip = STRIP if n % STRIP == 0 else n
    buffers = [pltpu.VMEM((2, m, strip), x.dtype)] * (count if start is not None else 0)
    static = dict(start=start, sizes=sizes, cut=cut, precision=precision)
    call = functools.partial(
        _call, phase="backward", tiles=tiles, sizes=sizes, semantics=("parallel", "parallel", "arbitrary"), work=0
    )
    over_mn = pl.BlockSpec((m, n), lambda i, j, s: (i, s))
    dx = call(
        functools.partial(_dx_kernel, **static),
        f"{name}_backward_x",
        grid=(steps[0], steps[2], steps[1]),
        in_specs=[over_mn, [over_mn] * len(saved), [pl.BlockSpec((k, n), lambda i, j, s: (j, s))] * count]
        + [_tables(tables, cut, lambda i, j, s: i)],
        out_specs=pl.BlockSpec((m, k), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((m, k), f32), *buffers],
    )(dy, list(saved), list(ws), list(tables))
    over_mn = pl.BlockSpec((m, n), lambda i, j, s: (s, j))
    dws = call(
        functools.partial(_dw_kernel, **static, with_sums=with_sums),
        f"{name}_backward_w",
        grid=(steps[2], steps[1], steps[0]),
        in_specs=[
            pl.BlockSpec((m, k), lambda i, j, s: (s, i)),
            over_mn,
            [over_mn] * len(saved),
            _tables(tables, cut, lambda i, j, s: s),
        ],
        out_specs=[
            *[pl.BlockSpec((k, n), lambda i, j, s: (i, j))] * count,
            *[pl.BlockSpec((8, n), lambda i, j, s: (i, j))] * (count * with_sums),
        ],
        out_shape=[
            *[jax.ShapeDtypeStruct(ws[0].shape, x.dtype)] * count,
            *[jax.ShapeDtypeStruct((8 * steps[2], sizes.n), f32)] * (count * with_sums),
        ],
        scratch_shapes=[pltpu.VMEM((k, m), x.dtype), *[pltpu.VMEM((k, n), f32)] * count, *buffers],
    )(x, dy, list(saved), list(tables))
    return dx, dws[:count], [total[:8].sum(0) for total in dws[count:]]
