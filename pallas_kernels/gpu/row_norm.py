"""Normalisation of rows on Mosaic GPU: what RMS norm and layer norm share.

    x̂ = (x - m) · r,   r = rsqrt(mean((x - m)²) + eps),   y = x̂ · w + bias,   w = scale + scale_offset
    g = dy · w,   dx = r · (g - mean(g) - x̂ · mean(g · x̂)),   dscale = Σ_rows dy · x̂,   dbias = Σ_rows dy

Layer norm: m = mean(x). RMS norm: m = 0, no bias, and the mean(g) term is absent.

One warpgroup owns one row at a time: the row lies across its 128 threads, so a mean is one reduction. Rows stream through
shared memory by TMA. A sweep over the row reads it from shared memory again instead of keeping it in registers: what the
registers hold across rows are only the float32 sums for the parameters' gradients. Each warpgroup writes those once, after
its last row, and XLA adds the few hundred partial sums.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips
from pallas_kernels.padding import pad_to, round_up

THREADS = 128  # of one warpgroup
MAX_COPY = 256  # elements one TMA copy moves along an axis
MAX_FEATURES = 8192
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Row:
    """`features` numbers laid over the threads of a warpgroup as a tile [padded, width], of which [used, width] are copied."""

    features: int

    @property
    def aligned(self) -> int:
        """`features` rounded up to what TMA copies at once: 16-byte multiples, at most 256 entries along both axes."""
        sizes = (round_up(self.features, multiple) for multiple in (8, 16, 32))
        return next(size for size in sizes if size <= MAX_COPY * math.gcd(size, MAX_COPY))

    @property
    def width(self) -> int:
        return math.gcd(self.aligned, MAX_COPY)

    @property
    def used(self) -> int:
        return self.aligned // self.width

    @property
    def view(self) -> tuple[int, int]:
        return self.used, self.width

    def _padded(self, vector: int) -> int:
        return round_up(self.used, THREADS * vector // math.gcd(THREADS * vector, self.width))

    @property
    def vector(self) -> int:
        """Elements a thread reads at once: the most that do not lengthen the padding."""
        return max((8, 4, 2, 1), key=lambda vector: (-self._padded(vector), vector))

    @property
    def shape(self) -> tuple[int, int]:
        return self._padded(self.vector), self.width

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layout(self):
        return plgpu.Layout.WG_STRIDED(self.shape, vec_size=self.vector)

    def keep(self, value):
        """`value` with zeros where the tile has no feature."""
        if self.size == self.features:
            return value
        index = [plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.layout) for axis in (0, 1)]
        return jnp.where(index[0] * self.width + index[1] < self.features, value, 0.0)

    def load(self, ref):
        """The row in float32. The end of a slot is never written, so it must not be trusted."""
        return self.keep(plgpu.load(ref, layout=self.layout).astype(jnp.float32))

    def mean(self, value):
        return jnp.sum(value) * (1 / self.features)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`blocks` thread blocks of `groups` warpgroups, each with `stages` rows arriving and `stores` rows leaving."""

    blocks: int
    groups: int
    stages: int
    stores: int

    def smem_bytes(self, features: int, itemsize: int, *, backward: bool, parameters: int) -> int:
        """Shared memory of a block: rows arriving and leaving, the float32 parameters at worst, barriers and reductions."""
        slots = self.groups * (self.stages * (2 if backward else 1) + self.stores)
        return Row(features).size * (slots * itemsize + parameters * 4) + 4096

    @staticmethod
    def default(features: int, itemsize: int, *, backward: bool, centered: bool) -> "Tiles":
        """As many warpgroups as the registers allow, then as many rows in flight as the shared memory allows."""
        chip = chips.current("gpu")
        sums = ((2 if centered else 1) if backward else 0)
        parameters = 2 if centered and not backward else 1
        # Two rows in flight through the registers besides the sums; 4 warpgroups leave 128 registers a thread, 2 leave 255.
        registers = pl.cdiv(features, THREADS) * (2 + sums)
        fits = functools.partial(Tiles.smem_bytes, features=features, itemsize=itemsize, backward=backward, parameters=parameters)
        # A short row costs mostly latency: a second block on the multiprocessor hides it.
        blocks, share = (2 * chip.cores, 2) if features <= 1024 else (chip.cores, 1)
        choices = (
            Tiles(blocks, groups, stages, stores)
            for groups in ((4, 2, 1) if registers <= 96 else (2, 1))
            for stages, stores in ((4, 2), (3, 2), (2, 2), (2, 1))
        )
        return next(tiles for tiles in choices if fits(tiles) * share <= chip.smem_bytes)


def unsupported(x, parameters: dict) -> str | None:
    """Why these kernels do not take `x[..., features]` and the named `parameters[features]`; None if they do."""
    chip = chips.current("gpu")
    if chip.capability < (9, 0):
        return f"the rows are streamed by TMA, which needs compute capability 9.0, got {'.'.join(map(str, chip.capability))}"
    for name, operand in {"x": x, **parameters}.items():
        if operand.dtype not in DTYPES:
            return f"{name} must be float32, bfloat16 or float16, got {operand.dtype}"
    if x.shape[-1] > MAX_FEATURES:
        return f"a warpgroup holds its sums for at most {MAX_FEATURES} features in registers, got {x.shape[-1]}"
    return None


def _share(rows: int, tiles: Tiles) -> tuple[int, int]:
    """(rows of one warpgroup, blocks that have any)."""
    each = pl.cdiv(rows, tiles.blocks * tiles.groups)
    return each, pl.cdiv(rows, each * tiles.groups)


def _stream(sources, slots, ready, count, stages, body, init):
    """Folds `body(i, slot, carry)` over i < count while the next rows are on their way.

    Copies go from `sources[k](i)` to `slots[k](slot)` and arrive on the barrier `ready(slot)`.
    """

    def fetch(i):
        slot = lax.rem(i, stages)
        for source, target in zip(sources, slots):
            plgpu.copy_gmem_to_smem(source(i), target(slot), ready(slot))

    def step(i, carry):
        ahead = i + stages - 1
        pl.when(ahead < count)(lambda: fetch(ahead))
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(ready(slot))
        return body(i, slot, carry)

    for i in range(stages - 1):
        pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))
    return lax.fori_loop(0, count, step, init)


def _statistics(row: Row, x_slot, eps: float, centered: bool):
    """(m, r) of the row in `x_slot`."""
    mean = row.mean(row.load(x_slot)) if centered else 0.0
    # Two sweeps: E[x²] - E[x]² would cancel for rows far from zero.
    deviation = row.keep(row.load(x_slot) - mean) if centered else row.load(x_slot)
    return mean, lax.rsqrt(row.mean(deviation * deviation) + eps)


def _normal(row: Row, x_slot, mean, inverse, centered: bool):
    """x̂ of the row in `x_slot`."""
    value = row.load(x_slot)
    return (row.keep(value - mean) if centered else value) * inverse


def _call(body, name, out_type, scratch, blocks, tiles):
    body.__name__ = name
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=scratch, grid=(blocks,), grid_names=("block",),
        num_threads=tiles.groups, thread_name="group",
    )


def _rows(row: Row, array):
    """`array[..., features]` as [rows, used, width]."""
    return pad_to(array.reshape(-1, row.features), 1, row.aligned).reshape(-1, *row.view)


def _unrows(row: Row, array, shape):
    """The inverse of `_rows`."""
    return array.reshape(-1, row.aligned)[:, : row.features].reshape(shape)


def _fetch_parameters(row: Row, group, refs, slots, ready):
    """One warpgroup copies the parameters for the whole block, everyone waits."""

    @pl.when(group == 0)
    def _():
        for ref, slot in zip(refs, slots):
            plgpu.copy_gmem_to_smem(ref, slot.at[pl.ds(0, row.used)], ready)

    plgpu.barrier_wait(ready)


def forward(x, scale, bias, *, eps: float, scale_offset: float, tiles: Tiles | None):
    """y like x[..., features]; with a bias it is layer norm, with None RMS norm."""
    centered = bias is not None
    row = Row(x.shape[-1])
    tiles = tiles or Tiles.default(row.features, x.dtype.itemsize, backward=False, centered=centered)
    source = _rows(row, x)
    each, blocks = _share(len(source), tiles)
    parameters = [_rows(row, p)[0] for p in ((scale, bias) if centered else (scale,))]

    def body(x_ref, *refs):
        parameter_refs, (y_ref, x_smem, y_smem, parameter_smem, ready, parameters_ready) = refs[: len(parameters)], refs[len(parameters) :]
        group = lax.axis_index("group")
        first = (lax.axis_index("block") * tiles.groups + group) * each
        used = pl.ds(0, row.used)
        _fetch_parameters(row, group, parameter_refs, parameter_smem, parameters_ready)

        def normalise(i, slot, _):
            x_slot = x_smem.at[group, slot]
            mean, inverse = _statistics(row, x_slot, eps, centered)
            y = _normal(row, x_slot, mean, inverse, centered) * (row.load(parameter_smem[0]) + scale_offset)
            if centered:
                y += row.load(parameter_smem[1])
            out = lax.rem(i, tiles.stores)
            plgpu.wait_smem_to_gmem(tiles.stores - 1, wait_read_only=True)  # the slot's last store has left
            y_smem[group, out] = y.astype(y_ref.dtype)
            plgpu.commit_smem()  # orders the reads of x and the writes of y before the copies that follow
            plgpu.copy_smem_to_gmem(y_smem.at[group, out, used], y_ref.at[first + i])
            return ()

        count = lax.clamp(0, len(source) - first, each)
        _stream(
            [lambda i: x_ref.at[first + i]], [lambda slot: x_smem.at[group, slot, used]], lambda slot: ready.at[group, slot],
            count, tiles.stages, normalise, (),
        )
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        plgpu.SMEM((tiles.groups, tiles.stages, *row.shape), x.dtype),
        plgpu.SMEM((tiles.groups, tiles.stores, *row.shape), x.dtype),
        [plgpu.SMEM(row.shape, p.dtype) for p in parameters],
        plgpu.Barrier(num_barriers=(tiles.groups, tiles.stages)),
        plgpu.Barrier(num_arrivals=len(parameters)),
    ]
    name = "layer_norm_forward" if centered else "rms_norm_forward"
    y = _call(body, name, jax.ShapeDtypeStruct(source.shape, x.dtype), scratch, blocks, tiles)(source, *parameters)
    return _unrows(row, y, x.shape)


def backward(x, scale, bias, dy, *, eps: float, scale_offset: float, tiles: Tiles | None):
    """(dx, dscale, dbias), each like its operand; with no bias, that of RMS norm and None for dbias."""
    centered = bias is not None
    row = Row(x.shape[-1])
    tiles = tiles or Tiles.default(row.features, x.dtype.itemsize, backward=True, centered=centered)
    source, cotangent = _rows(row, x), _rows(row, dy.astype(x.dtype))
    each, blocks = _share(len(source), tiles)
    sums = 2 if centered else 1

    def body(x_ref, dy_ref, scale_ref, dx_ref, sums_ref, x_smem, dy_smem, dx_smem, scale_smem, ready, scale_ready):
        group = lax.axis_index("group")
        index = lax.axis_index("block") * tiles.groups + group
        first = index * each
        used = pl.ds(0, row.used)
        _fetch_parameters(row, group, [scale_ref], [scale_smem], scale_ready)

        def differentiate(i, slot, totals):
            x_slot, dy_slot = x_smem.at[group, slot], dy_smem.at[group, slot]
            mean, inverse = _statistics(row, x_slot, eps, centered)

            def normal():
                return _normal(row, x_slot, mean, inverse, centered)

            def weighted():
                return row.load(dy_slot) * (row.load(scale_smem) + scale_offset)

            slope = row.mean(weighted() * normal())
            level = row.mean(weighted()) if centered else 0.0
            out = lax.rem(i, tiles.stores)
            plgpu.wait_smem_to_gmem(tiles.stores - 1, wait_read_only=True)  # the slot's last store has left
            dx_smem[group, out] = (inverse * (weighted() - normal() * slope - level)).astype(dx_ref.dtype)
            terms = (row.load(dy_slot) * normal(), *([row.load(dy_slot)] if centered else []))
            plgpu.commit_smem()  # orders the reads of x and dy and the writes of dx before the copies that follow
            plgpu.copy_smem_to_gmem(dx_smem.at[group, out, used], dx_ref.at[first + i])
            return tuple(total + term for total, term in zip(totals, terms))

        zeros = plgpu.layout_cast(jnp.zeros(row.shape, jnp.float32), row.layout)
        totals = _stream(
            [lambda i: x_ref.at[first + i], lambda i: dy_ref.at[first + i]],
            [lambda slot: x_smem.at[group, slot, used], lambda slot: dy_smem.at[group, slot, used]],
            lambda slot: ready.at[group, slot],
            lax.clamp(0, len(source) - first, each), tiles.stages, differentiate, (zeros,) * sums,
        )
        for which, total in enumerate(totals):
            sums_ref[index, which] = total
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        plgpu.SMEM((tiles.groups, tiles.stages, *row.shape), x.dtype),
        plgpu.SMEM((tiles.groups, tiles.stages, *row.shape), x.dtype),
        plgpu.SMEM((tiles.groups, tiles.stores, *row.shape), x.dtype),
        plgpu.SMEM(row.shape, scale.dtype),
        plgpu.Barrier(num_barriers=(tiles.groups, tiles.stages), num_arrivals=2),
        plgpu.Barrier(num_arrivals=1),
    ]
    out_type = [
        jax.ShapeDtypeStruct(source.shape, x.dtype),
        jax.ShapeDtypeStruct((blocks * tiles.groups, sums, *row.shape), jnp.float32),
    ]
    name = "layer_norm_backward" if centered else "rms_norm_backward"
    dx, partial = _call(body, name, out_type, scratch, blocks, tiles)(source, cotangent, _rows(row, scale)[0])
    totals = partial.sum(0).reshape(sums, -1)[:, : row.features]
    dbias = totals[1].astype(bias.dtype) if centered else None
    return _unrows(row, dx, x.shape), totals[0].astype(scale.dtype), dbias
