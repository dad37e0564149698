"""y = (x_scales · x) · (scales · (w - zeros)) + bias on TPU (Mosaic), of weights in few bits.

A grid of output tiles times steps along k. A block of w comes as it is stored and is widened in VMEM. Where a group of
its rows is a multiple of 128, the product of the group is taken first, of numbers that bfloat16 holds exactly, and its
sum in float32 is scaled:

    y = Σ_groups scales_g · (x_g · w_g - (Σ_row x_g) · zeros_g)

Smaller groups, of 32 or 64 rows, are scaled before the product, rounded to the dtype of x as XLA would. Quantised x is
multiplied as it is, in integers, or of float8 in bfloat16, which holds it exactly, and each row scaled at the end.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.padding import round_up

f32 = jnp.float32
FLOATS = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))
LANES = 128
SLACK = 6 << 20  # VMEM left to the compiler


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`m` rows of x, `n` columns of w, `k` rows of w a step: it divides k, and is whole groups or a part of one."""

    m: int
    n: int
    k: int

    @staticmethod
    def default(s: "Sizes") -> "Tiles":
        """Few rows wait for the memory: blocks of w of about two MiB. Many rows want large tiles of the output, the
        more so where the matrix unit is 256 wide and takes half the time: x is read once if k is whole."""
        rows = s.m if s.m <= 512 else 512 if s.m <= 2048 else 1024
        sizes = [(1024, 2048), (1024, 1024), (512, 1024), (512, 512), (256, 512), (256, 256), (128, 128)]
        if chips.current("tpu").mxu == 256 and s.m >= 4096:
            rows, sizes = 2048, [(1024, s.k), (2048, 1024), *sizes]
        for n, k in sizes:
            tiles = s.cut(Tiles(rows, n, k))
            if s.memory(tiles) <= chips.current("tpu").vmem_bytes * 3 // 4:
                return tiles
        return s.cut(Tiles(min(rows, 128), 128, 128))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of x[m, k] and w[k, n] in `groups` groups; `x` and `w` are their dtypes, `out` that of the result."""

    m: int
    n: int
    k: int
    groups: int
    x: Any
    w: Any
    out: Any

    @staticmethod
    def of(x, w, scales, dtype: str, **_) -> "Sizes":
        m = math.prod(x.shape[:-1])
        return Sizes(m, w.shape[1], w.shape[0], scales.shape[0], *map(jnp.dtype, (x.dtype, w.dtype, dtype)))

    @property
    def group(self) -> int:
        return self.k // self.groups

    @property
    def integer(self) -> bool:
        return self.x == jnp.int8

    @property
    def kind(self) -> Any:
        """The dtype in which the matrix unit takes x and w; of integers int8."""
        return jnp.dtype(jnp.bfloat16) if self.x in FLOATS else self.x

    @property
    def bits(self) -> int:
        return jnp.iinfo(self.w).bits if jnp.issubdtype(self.w, jnp.integer) else 8

    def cut(self, tiles: Tiles) -> Tiles:
        """No tile is past the end of its axis, and one of k ends with k and with groups, or within one."""
        steps = [k for k in range(LANES, self.k + 1, LANES) if self.k % k == 0]
        fits = [k for k in steps if k % self.group == 0 or self.group % k == 0]
        k = max((k for k in fits if k <= tiles.k), default=min(fits))
        return Tiles(min(tiles.m, self.m), min(tiles.n, self.n), k)

    def strip(self, tiles: Tiles) -> int:
        """Rows of x that are multiplied at a time: many are a loop, or the program would be long."""
        strip = 2 * chips.current("tpu").mxu
        return strip if tiles.m > 2 * strip and tiles.m % strip == 0 else tiles.m

    def widened(self, tiles: Tiles) -> bool:
        """Whether a block of w is widened once, and kept for the strips."""
        return self.strip(tiles) < tiles.m and self.w != self.kind

    def memory(self, tiles: Tiles) -> int:
        """Bytes of VMEM: blocks twice, the sums, and a block of w widened."""
        m, n, k = round_up(tiles.m, 32), round_up(tiles.n, LANES), round_up(tiles.k, LANES)
        blocks = 2 * (m * k * self.x.itemsize + k * n * self.bits // 8 + m * n * self.out.itemsize)
        blocks += 2 * 2 * 4 * n * max(8, tiles.k // self.group) + 2 * 4 * m * LANES
        blocks += m * k * self.kind.itemsize * (self.kind != self.x)
        return (
            SLACK + blocks + 3 * 4 * m * n + k * n * max(self.kind.itemsize, 2) + 4 * k * n * (self.group % LANES > 0)
        )


def unsupported(x, w, scales, zeros=None, x_scales=None, bias=None, *, dtype: str) -> str | None:
    """Why the kernel cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del x_scales, bias
    s = Sizes.of(x, w, scales, dtype)
    if s.x not in (jnp.float32, jnp.bfloat16, jnp.int8, *FLOATS):
        return f"x must be bfloat16, float32, int8 or float8 on a TPU, got {s.x}"
    if s.w not in (jnp.int8, jnp.int4, *FLOATS):
        return f"w must be int8, int4, float8_e4m3fn or float8_e5m2 for the TPU kernel, got {s.w}"
    if s.integer and s.w in FLOATS:
        return f"an int8 x is multiplied by int8 or int4 w in the TPU kernel, got {s.w}"
    if s.out not in (jnp.float32, jnp.bfloat16):
        return f"the result must be float32 or bfloat16 on a TPU, got {s.out}"
    if s.k % LANES:
        return f"k must be a multiple of 128, got {s.k}"
    if s.group % 32:
        return f"a group must have a multiple of 32 rows, got {s.group}"
    if s.group % LANES and LANES % s.group:
        return f"a group of more than 64 rows must be a multiple of 128, got {s.group}"
    if s.x not in (jnp.float32, jnp.bfloat16) and (s.group % LANES or zeros is not None):
        return "a quantised x is served with groups of a multiple of 128 rows, without zeros"
    if zeros is not None and s.group % LANES:
        return f"zeros are served with groups of a multiple of 128 rows, got {s.group}"
    return None


def tiles(phase: str, x, w, scales, zeros=None, x_scales=None, bias=None, *, dtype: str) -> Tiles:
    """What `forward` takes when it is given no tiles."""
    del phase, zeros, x_scales, bias
    return Tiles.default(Sizes.of(x, w, scales, dtype))


_tiles = tiles


def candidates(phase: str, x, w, scales, *others, dtype: str, **named) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM, the default first."""
    del phase, others, named
    s = Sizes.of(x, w, scales, dtype)
    found = [Tiles.default(s)]
    found += [s.cut(Tiles(m, n, k)) for m in (1024, 512, 256) for n in (2048, 1024, 512) for k in (4096, 2048, 1024)]
    yield from (t for t in dict.fromkeys(found) if s.memory(t) <= chips.current("tpu").vmem_bytes)


def memory(phase: str, tiles: Tiles, x, w, scales, *others, dtype: str, **named) -> int:
    """Bytes of VMEM that the kernel is estimated to take."""
    del phase, others, named
    return Sizes.of(x, w, scales, dtype).memory(tiles)


def _kernel(x_ref, w_ref, scales_ref, zeros_ref, x_scales_ref, bias_ref, y_ref, *scratch, s: Sizes, t: Tiles):
    step, steps = pl.program_id(2), s.k // t.k
    kind, whole = s.kind, s.groups == 1 and zeros_ref is None  # whole: scaled once, at the end
    precision = lax.Precision.HIGHEST if kind == f32 else None
    height, rest = s.strip(t), list(scratch)
    total: Any = rest.pop(0) if steps > 1 else None
    wide: Any = rest.pop(0) if s.widened(t) else None

    def widened(rows):
        w = w_ref[rows, :]
        if s.integer:
            return w.astype(jnp.int8)
        if s.w in FLOATS and not s.group % LANES:
            return w.astype(kind)
        w = (w.astype(jnp.int32) if s.bits < 8 else w).astype(f32)
        if s.group % LANES:  # scaled before the product
            of_group = scales_ref[...].astype(f32)[:, None, :]
            w = (w.reshape(t.k // s.group, s.group, t.n) * of_group).reshape(t.k, t.n)
        return w.astype(kind)

    if wide is not None:
        if s.group % LANES:
            wide[...] = widened(slice(None))
        else:

            def widen(i, _):
                rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
                wide[rows, :] = widened(rows)

            lax.fori_loop(0, t.k // LANES, widen, None)
    weights = widened if wide is None else lambda rows: wide[rows, :]

    def taken(strip, rows):
        x = x_ref[strip, rows]
        return x.astype(kind)

    def product(x, rows):
        return lax.dot(x, weights(rows), precision=precision, preferred_element_type=jnp.int32 if s.integer else f32)

    def new(strip):
        if whole or s.group % LANES:
            return product(taken(strip, slice(None)), slice(None))
        y: Any = 0
        size = min(s.group, t.k)
        for g in range(t.k // size):
            rows = slice(g * size, (g + 1) * size)
            x = taken(strip, rows)
            part = product(x, rows).astype(f32)
            if zeros_ref is not None:
                part = part - jnp.sum(x.astype(f32), 1, keepdims=True) * zeros_ref[g : g + 1].astype(f32)
            y = y + part * scales_ref[g : g + 1].astype(f32)
        return y

    def keep(strip, y):
        total[strip, :] = y

    def finish(strip, y):
        if whole:
            y = y.astype(f32) * scales_ref[...]
        if x_scales_ref is not None:
            y = y * x_scales_ref[strip, :]
        if bias_ref is not None:
            y = y + bias_ref[...]
        y_ref[strip, :] = y.astype(y_ref.dtype)

    def each(then, add):
        """then(strip, sums) of every strip of rows."""

        def turn(i):
            strip = slice(None) if height == t.m else pl.ds(pl.multiple_of(i * height, height), height)
            then(strip, total[strip, :] + new(strip) if add else new(strip))

        if height == t.m:
            turn(0)
        else:
            lax.fori_loop(0, t.m // height, lambda i, _: turn(i), None)

    if steps == 1:
        each(finish, add=False)
        return
    pl.when(step == 0)(lambda: each(keep, add=False))
    pl.when((step > 0) & (step < steps - 1))(lambda: each(keep, add=True))
    pl.when(step == steps - 1)(lambda: each(finish, add=True))


def forward(
    x: jax.Array,
    w: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    x_scales: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    dtype: str,
    tiles: Tiles | None = None,
):
    """((y,), ()): x[..., k], w[k, n], scales and zeros[g, n], x_scales[..., 1], bias[n]; y[..., n] in `dtype`."""
    s = Sizes.of(x, w, scales, dtype)
    t = s.cut(tiles or _tiles("forward", x, w, scales, dtype=dtype))
    steps = (pl.cdiv(s.m, t.m), pl.cdiv(s.n, t.n), s.k // t.k)
    per_step = max(t.k // s.group, 1)
    # The scales of a step are a block by themselves: there may be fewer than 8, or steps that share one.
    shared = max(s.group // t.k, 1)
    by_step = lambda a: a.astype(f32).reshape(s.groups // per_step, per_step, s.n)
    of_groups = pl.BlockSpec((None, per_step, t.n), lambda i, j, k: (k // shared, 0, j))
    rows = lambda a: a.reshape(s.m, a.shape[-1])
    operands = [rows(x), w, by_step(scales)]
    specs: list[Any] = [
        pl.BlockSpec((t.m, t.k), lambda i, j, k: (i, k)),
        pl.BlockSpec((t.k, t.n), lambda i, j, k: (k, j)),
        of_groups,
    ]
    there = [zeros is not None, x_scales is not None, bias is not None]
    if zeros is not None:
        operands.append(by_step(zeros))
        specs.append(of_groups)
    if x_scales is not None:
        operands.append(rows(x_scales.astype(f32)))
        specs.append(pl.BlockSpec((t.m, 1), lambda i, j, k: (i, 0)))
    if bias is not None:
        operands.append(bias.astype(f32)[None])
        specs.append(pl.BlockSpec((1, t.n), lambda i, j, k: (0, j)))

    def kernel(*refs):
        given = iter(refs[3 : len(operands)])
        optional = [next(given) if yes else None for yes in there]
        _kernel(*refs[:3], *optional, *refs[len(operands) :], s=s, t=t)

    scratch = [pltpu.VMEM((t.m, t.n), jnp.int32 if s.integer and s.groups == 1 else f32)] * (steps[2] > 1)
    scratch += [pltpu.VMEM((t.k, t.n), s.kind)] * s.widened(t)

    launch = pl.pallas_call(
        kernel,
        grid=steps,
        in_specs=specs,
        out_specs=pl.BlockSpec((t.m, t.n), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((s.m, s.n), s.out),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(s.memory(t) + SLACK, chips.current("tpu").vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * s.m * s.n * s.k,
            transcendentals=0,
            bytes_accessed=s.m * s.k * s.x.itemsize + s.k * s.n * s.bits // 8 + s.m * s.n * s.out.itemsize,
        ),
        name="quantized_matmul",
    )
    # Under `vmap` the calls follow one another, and shared weights stay shared.
    y = jax.custom_batching.sequential_vmap(lambda *arrays: launch(*arrays))(*operands)
    return (y.reshape(*x.shape[:-1], s.n),), ()
