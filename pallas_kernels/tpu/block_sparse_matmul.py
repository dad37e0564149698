"""y = activation(x · w + bias) + residual on the TPU (Mosaic), of a w of which only some blocks are stored, and its
gradients.

    y_c = Σ_i x_r(i) · w_i,   dx_r = Σ_i dz_c(i) · w_iᵀ,   dw_i = x_r(i)ᵀ · dz_c(i),   for the stored blocks i

In y and dx a tile of rows is in VMEM with all columns of what is read and of what is written, and the stored blocks are
gone through in the order of what they give: as many turns as there are blocks, whatever the pattern, which is read as
scalars. The sum stays in one place; where a block begins another part of the result it starts from zero, by selection,
and it is stored after every block: the last store of a part holds. So several blocks make a turn without a branch.
Blocks that fit VMEM are fetched once, else a chunk of them at a time.
dw goes through the blocks of a chunk for each tile of rows, and adds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import activations, chips, tuned
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.tpu import elementwise, matrix_unit
from pallas_kernels.tpu.matrix_unit import LANES, NN, NT, TN, dot

f32 = jnp.float32
SLACK = 6 << 20  # VMEM left to the compiler
GROUP = 16  # blocks of a turn at most
PART = 4 << 20  # bytes of w in VMEM at a time, where it is read again and again
STRIP = 128  # rows that are summed at a time


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of x in a tile, a multiple of 16, and `chunk` stored blocks that are in VMEM at a time."""

    rows: int
    chunk: int

    @staticmethod
    def default(phase: str, s: "Sizes") -> "Tiles":
        """Many rows: what is around a turn is done once for them. Of a w that is large, a part at a time, so that the
        first product need not wait for all of it, if the rows are enough to hide that every tile of them reads w again;
        dx reads blocks in another order than they have, and wants all."""
        chip = chips.current("tpu")
        enough = s.itemsize * chip.flops / (2 * chip.bandwidth) / 0.7
        parts = pl.cdiv(s.count * s.bk * s.bn * s.itemsize, PART)
        for rows in (512, 256, 128, 64, 32, 16):
            if phase == "forward" and rows >= enough and s.m > rows:
                tiles = s.cut(Tiles(rows, pl.cdiv(s.count, parts)))
            else:
                tiles = s.cut(Tiles(rows, s.count))
            if tiles.allowed(phase, s):
                return tiles
        sizes = (s.cut(Tiles(rows, chunk)) for rows in (256, 128, 64, 32, 16) for chunk in (512, 256, 128, 64, 32, 8))
        return next((tiles for tiles in sizes if tiles.allowed(phase, s)), s.cut(Tiles(16, 8)))

    def allowed(self, phase: str, s: "Sizes") -> bool:
        """Whether these are sizes the kernels take, and everything fits VMEM."""
        return self.rows > 0 and self.rows % 16 == 0 and self.chunk > 0 and s.fits(phase, self)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of x[m, k], `count` blocks [bk, bn] of w[k, n]; bytes of a number; how many arrays [m, n] are read after the
    products, and how many are saved for the backward pass."""

    m: int
    k: int
    n: int
    count: int
    bk: int
    bn: int
    itemsize: int
    read: int = 0
    saved: int = 0

    @staticmethod
    def of(x, w, residual, *, size: int, activation=None, saving: bool = True, **_) -> "Sizes":
        read, saved = int(residual is not None), int(saving and activation is not None)
        count, bk, bn = w.shape
        m, k = math.prod(x.shape[:-1]), x.shape[-1]
        return Sizes(m, k, size, count, bk, bn, x.dtype.itemsize, read, saved)

    def cut(self, tiles: Tiles) -> Tiles:
        """No tile is past the end of its axis."""
        return Tiles(min(tiles.rows, round_up(self.m, 16)), min(tiles.chunk, self.count))

    def memory(self, phase: str, tiles: Tiles) -> int:
        """Bytes of VMEM: blocks that change are there twice; float32 is split into parts of bfloat16."""
        t = self.cut(tiles)
        size = self.itemsize
        turns = 2 if t.chunk < self.count else 1
        weights, arrays = t.chunk * self.bk * self.bn, self.k + self.n * (1 + self.read + self.saved)
        product = 2 * size * t.rows * arrays + turns * size * weights
        product += 4 * (2 + GROUP) * t.rows * max(self.bk, self.bn)
        if phase == "forward":
            return SLACK + product
        products = 2 * size * t.rows * (self.k + self.n) + (4 + 2 * size) * weights
        return SLACK + max(product, products) + 4 * size * t.rows * self.bk

    def fits(self, phase: str, tiles: Tiles) -> bool:
        return self.memory(phase, tiles) <= chips.current("tpu").vmem_bytes


def unsupported(
    x, w, rows, columns, bias=None, residual=None, *, size: int, activation: Callable | None, precision: Any
) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    if x.dtype not in (f32, jnp.bfloat16):
        return f"x must be float32 or bfloat16 on a TPU, got {x.dtype}"
    if w.dtype != x.dtype:
        return f"w must have the dtype of x, {x.dtype}, got {w.dtype}"
    if residual is not None and residual.dtype not in (f32, jnp.bfloat16):
        return f"residual must be float32 or bfloat16 on a TPU, got {residual.dtype}"
    count, bk, bn = w.shape
    if bk % LANES or bn % LANES:
        return f"the sides of a block must be multiples of 128, got {bk} × {bn}"
    if reason := matrix_unit.unsupported(x.dtype, precision):
        return reason
    if count + x.shape[-1] // bk + size // bn > 1 << 15:
        return f"the pattern must fit the scalar memory, 32768 blocks, got {count}"
    s = Sizes.of(x, w, residual, size=size, activation=activation)
    if not s.fits("backward", s.cut(Tiles(16, 8))):
        return f"16 rows of {s.k} and {s.n} columns must fit the {chips.current('tpu').vmem_bytes >> 20} MiB of VMEM"
    return activations.unsupported(activation, elementwise.refusal)


def tiles(phase: str, x, w, rows, columns, bias=None, residual=None, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return _tiles(phase, Sizes.of(x, w, residual, **options), x.dtype)


def _tiles(phase: str, s: Sizes, dtype: Any) -> Tiles:
    return tuned.choose(
        f"tpu.block_sparse_matmul.{phase}",
        chips.current("tpu"),
        {"m": s.m, "k": s.k, "n": s.n, "count": s.count},
        jnp.dtype(dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(phase, s),
        Tiles.default(phase, s),
    )


def candidates(phase: str, x, w, rows, columns, bias=None, residual=None, **options) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM, the default first."""
    s = Sizes.of(x, w, residual, **options)
    found = [Tiles.default(phase, s)]
    found += [s.cut(Tiles(rows, chunk)) for rows in (1024, 512, 256, 128) for chunk in (s.count, 512, 128, 32)]
    yield from (t for t in dict.fromkeys(found) if t.allowed(phase, s))


def memory(phase: str, tiles: Tiles, x, w, rows, columns, bias=None, residual=None, **options) -> int:
    """Bytes of VMEM that the kernels of `phase` are estimated to take."""
    return Sizes.of(x, w, residual, **options).memory(phase, tiles)


def _part(index, size: int):
    return pl.ds(pl.multiple_of(index * size, LANES), size)


def _loop(count: int, body: Callable) -> None:
    """body(i) for i in range(count)."""
    lax.fori_loop(0, count, lambda i, _: body(i), None)


def _turns(s: "Sizes", t: "Tiles", chunk, turn: Callable) -> None:
    """turn(first, count) over the blocks of a chunk, many of them at a time; the last chunk may have fewer."""

    def all_of(count: int):
        size, done = GROUP, 0
        while size:
            if times := (count - done) // size:
                _loop(times, lambda i, done=done, size=size: turn(done + i * size, size))
            done, size = done + times * size, size // 2

    rest = s.count % t.chunk
    if not rest:
        all_of(t.chunk)
    else:
        last = s.count // t.chunk
        pl.when(chunk < last)(lambda: all_of(t.chunk))
        pl.when(chunk == last)(lambda: all_of(rest))


def _product_kernel(
    take, give, place, empty, x_ref, w_ref, bias_ref, residual_ref, *refs, s: Sizes, t: Tiles, dims, finish, precision
):
    """Grid (tile of rows, chunk of blocks)."""
    *out_refs, sum_ref = refs
    inner, outer = (s.bk, s.bn) if dims == NN else (s.bn, s.bk)
    chunk, whole = pl.program_id(1), t.chunk == s.count
    base = chunk * t.chunk
    plain = finish is None
    height = STRIP if t.rows % STRIP == 0 else t.rows
    strips = [pl.ds(start, height) for start in range(0, t.rows, height)]

    def store(strip, part, z):
        there = (strip, _part(part, outer))
        bias = None if bias_ref is None else bias_ref[:, there[1]].astype(f32)
        if plain:
            values = (z if bias is None else z + bias,)
        else:
            values = finish(z, bias, None if residual_ref is None else residual_ref[there].astype(f32))
        for ref, value in zip(out_refs, values, strict=True):
            ref[there] = value.astype(ref.dtype)

    @pl.when(chunk == 0)
    def _():
        def clear(part):
            @pl.when(empty[part] != 0)
            def _():
                for strip in strips:
                    store(strip, part, jnp.zeros((height, outer), f32))

        _loop(empty.shape[0], clear)

    def turn(start, count):
        blocks = [base + start + i for i in range(count)]
        for strip in strips:
            total = sum_ref[strip, :]
            for i in blocks:
                part = give[i]
                first = (i == 0) | (part != give[jnp.maximum(i - 1, 0)])
                w = w_ref[place[i] if whole else i - base]
                product = dot(x_ref[strip, _part(take[i], inner)], w, dims, precision)
                total = jnp.where(first, 0.0, total) + product
                if plain:
                    store(strip, part, total)
                else:
                    last = (i == s.count - 1) | (part != give[jnp.minimum(i + 1, s.count - 1)])
                    pl.when(last)(functools.partial(store, strip, part, total))
            sum_ref[strip, :] = total

    _turns(s, t, chunk, turn)


def _once(whole: bool) -> dict[str, Any]:
    """A block that never changes need not be there twice."""
    return {"pipeline_mode": pl.Buffered(1)} if whole else {}


def _call(kernel, scalars, operands, name: str, s: Sizes, moved: int, vmem: int, semantics, **specs):
    """`pl.pallas_call` with the pattern as scalars. Under `vmap` the calls follow one another."""
    shape = specs.pop("out_shape")
    launch = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(scalars), **specs),
        out_shape=shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=min(vmem + SLACK, chips.current("tpu").vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * s.m * s.count * s.bk * s.bn, transcendentals=0, bytes_accessed=moved * s.itemsize
        ),
        name=name,
    )
    return jax.custom_batching.sequential_vmap(lambda *arrays: launch(*arrays))(*scalars, *operands)


def _product(
    name: str, x, w, take, give, place, bias, residual, finish, s: Sizes, t: Tiles, dims, precision, dtypes
) -> list[jax.Array]:
    """Arrays [m, size] of x[m, inner]: the blocks come in the order in which they give, block i being
    w[place[i]], or w[i]."""
    size, outer = (s.n, s.bn) if dims == NN else (s.k, s.bk)
    whole = t.chunk == s.count
    if place is None:
        place = jnp.arange(s.count, dtype=jnp.int32)
    elif not whole:
        w = w[place]
    empty = jnp.all(give[:, None] != jnp.arange(size // outer, dtype=jnp.int32), 0).astype(jnp.int32)
    over_rows = lambda columns: pl.BlockSpec((t.rows, columns), lambda i, j, *_: (i, 0))
    operands = [x, w]
    specs = [over_rows(x.shape[1]), pl.BlockSpec((t.chunk, s.bk, s.bn), lambda i, j, *_: (j, 0, 0), **_once(whole))]
    if bias is not None:
        operands.append(bias.astype(f32)[None])
        specs.append(pl.BlockSpec((1, size), lambda i, j, *_: (0, 0)))
    if residual is not None:
        operands.append(residual)
        specs.append(over_rows(size))

    def kernel(take, give, place, empty, x_ref, w_ref, *refs):
        rest = list(refs)
        bias_ref = rest.pop(0) if bias is not None else None
        residual_ref = rest.pop(0) if residual is not None else None
        _product_kernel(
            *(take, give, place, empty, x_ref, w_ref, bias_ref, residual_ref, *rest),
            **dict(s=s, t=t, dims=dims, finish=finish, precision=precision),
        )

    return _call(
        kernel,
        [take, give, place, empty],
        operands,
        name,
        s,
        s.m * (s.k + s.n * (1 + s.read + s.saved)) + w.size * (1 if whole else pl.cdiv(s.m, t.rows)),
        s.memory("forward", t),
        ("parallel", "arbitrary"),
        grid=(pl.cdiv(s.m, t.rows), pl.cdiv(s.count, t.chunk)),
        in_specs=specs,
        out_specs=[over_rows(size) for _ in dtypes],
        out_shape=[jax.ShapeDtypeStruct((s.m, size), dtype) for dtype in dtypes],
        scratch_shapes=[pltpu.VMEM((t.rows, outer), f32)],
    )


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
    s = Sizes.of(x, w, residual, size=size, activation=activation, saving=saving)
    t = s.cut(tiles or _tiles("forward", s, x.dtype))

    def finish(z, bias, residual):
        if bias is not None:
            z = z + bias
        y = z if activation is None else activation(z)
        if residual is not None:
            y = y + residual
        return (y, z) if s.saved else (y,)

    flat = lambda a: None if a is None else a.reshape(s.m, a.shape[-1])
    found = _product(
        "block_sparse_matmul",
        *(flat(x), w, rows, columns, None, bias, flat(residual)),
        None if activation is None and residual is None else finish,
        *(s, t, NN, precision, [x.dtype] * (1 + s.saved)),
    )
    y, *saved = (a.reshape(*x.shape[:-1], size) for a in found)
    return (y,), tuple(saved)


def value(*operands, **options):
    """(y,), with nothing saved: `forward` for a call that is not differentiated."""
    return forward(*operands, **options, saving=False)[0]


# ------------------------------------------------------------------------------------------------ backward
def _products_kernel(rows, columns, x_ref, dz_ref, out_ref, *scratch, s: Sizes, t: Tiles, precision):
    """Grid (chunk of blocks, tile of rows): dw_i += x_rᵀ · dz_c."""
    chunk, step = pl.program_id(0), pl.program_id(1)
    base = chunk * t.chunk
    sum_ref = scratch[0] if scratch else None

    def turn(start, count):
        for i in range(count):
            here = start + i
            x = x_ref[:, _part(rows[base + here], s.bk)]
            product = dot(x, dz_ref[:, _part(columns[base + here], s.bn)], TN, precision)
            if sum_ref is not None:
                product = jnp.where(step == 0, 0.0, sum_ref[here]) + product
                sum_ref[here] = product
            out_ref[here] = product.astype(out_ref.dtype)

    _turns(s, t, chunk, turn)


def _products(x, dz, rows, columns, s: Sizes, t: Tiles, precision, dtype) -> jax.Array:
    """dw[s, bk, bn] of x[m, k] and dz[m, n]."""
    whole = round_up(s.m, t.rows)  # what lies past the end would be summed
    x, dz = pad_to(x, 0, whole), pad_to(dz, 0, whole)
    steps = whole // t.rows
    chunks = pl.cdiv(s.count, t.chunk)
    return _call(
        functools.partial(_products_kernel, s=s, t=t, precision=precision),
        [rows, columns],
        [x, dz],
        "block_sparse_matmul_weights",
        s,
        s.m * (s.k + s.n) * chunks + s.count * s.bk * s.bn,
        s.memory("backward", t),
        ("parallel", "arbitrary"),
        grid=(chunks, steps),
        in_specs=[
            pl.BlockSpec((t.rows, s.k), lambda j, i, *_: (i, 0)),
            pl.BlockSpec((t.rows, s.n), lambda j, i, *_: (i, 0)),
        ],
        out_specs=pl.BlockSpec((t.chunk, s.bk, s.bn), lambda j, i, *_: (j, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((s.count, s.bk, s.bn), dtype),
        scratch_shapes=[pltpu.VMEM((t.chunk, s.bk, s.bn), f32)] * (steps > 1),
    )


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
    del outputs
    s = Sizes.of(x, w, None, size=size)
    t = s.cut(tiles or _tiles("backward", s, x.dtype))
    dz, gradients = activations.before(activation, residuals, cotangents[0], bias, residual)
    flat = lambda a: a.reshape(s.m, a.shape[-1])
    dz = flat(dz).astype(x.dtype)
    order = jnp.argsort(rows, stable=True).astype(jnp.int32)
    (dx,) = _product(
        "block_sparse_matmul_inputs",
        *(dz, w, columns[order], rows[order], order, None, None, None),
        *(s, t, NT, precision, [x.dtype]),
    )
    dw = _products(flat(x), dz, rows, columns, s, t, precision, w.dtype)
    return gradients | {"x": dx.reshape(x.shape), "w": dw}
