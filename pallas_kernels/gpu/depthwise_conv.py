"""conv of every channel by itself on GPUs with TMA: y = activation(x ∗ w + bias) + residual, over one or two axes, and
its gradients.

    z[h, q, c] = Σ_{i, j} x[s·h + i·d - p, t·q + j·e - r, c] · w[i, j, c] + bias[c],   dz = activation'(z) · dy
    dx = dz ∗ (w turned around),   dw[i, j, c] = Σ_{h, q} x[h, q, c] · dz[h - i·d + p, q - j·e + r, c]

A block has some rows and pixels of the result and some channels; what they read lies in shared memory, with the zeros
around the image, which TMA makes (`conv` says how; windows of one element). A warpgroup takes strips of pixels from the
top to the bottom: what it reads of a row serves all rows of the result that the window reaches from there. Backward,
the same kernel convolves dz, and what it reads serves dw, too: the sums of a block are joined in shared memory, those
of all blocks by XLA. With strides the gradients are XLA's.
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
from pallas_kernels.convolution import beside, image, turned, unimage
from pallas_kernels.gpu import conv, products
from pallas_kernels.gpu.elementwise import lowered, refusal
from pallas_kernels.gpu.group_norm import Columns
from pallas_kernels.gpu.row_norm import DTYPES
from pallas_kernels.padding import pad_to, round_up

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported", "value"]
f32 = jnp.float32
MOST = 64  # taps: a thread has the weights of all
HEIGHT = 8  # rows of a block: its program is written out
SLOTS = 2  # strips of a warpgroup that leave or arrive


@dataclasses.dataclass(frozen=True)
class Problem:
    """x[images, *axes, channels]; `read`: another array is read beside the result, `saved`: z is written, too;
    `summed`: what is read beside is multiplied with all that the window reaches."""

    images: int
    axes: tuple[conv.Axis, conv.Axis]
    channels: int
    dtype: str
    out_dtype: str
    read: bool
    saved: bool
    summed: bool = False

    @property
    def columns(self) -> Columns:
        """The channels of a block; few to a thread that holds the weights, and the sums, of many taps."""
        held = math.prod(axis.taps for axis in self.axes) * (1 + self.summed)
        vector = 4 if held <= 16 else 2 if held <= 32 else 1
        return Columns(min(64, 32 * vector), vector)

    @property
    def out(self) -> tuple[int, int]:
        height, width = self.axes
        return height.count, width.count

    @property
    def windows(self) -> conv.Windows:
        """Every element with those outside of the image is a window of its own."""
        single = [dataclasses.replace(axis, taps=1, count=axis.blocks_read) for axis in self.axes]
        return conv.Windows(self.images, tuple(single), self.channels)

    @property
    def deep(self) -> int:
        return pl.cdiv(self.channels, self.columns.width)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A block of `groups` warpgroups takes `rows` and `pixels`, a multiple of those of a strip."""

    rows: int
    pixels: int
    groups: int

    def extent(self, problem: Problem) -> tuple[int, int]:
        """Rows and, of each phase, pixels that a block reads."""
        height, width = problem.axes
        return height.stride * (self.rows - 1) + height.reach + 1, self.pixels + width.reach // width.stride

    def smem_bytes(self, problem: Problem) -> int:
        """Shared memory of a block: what it reads, the strips of its warpgroups, sums, barriers and alignment."""
        columns, (rows, pixels) = problem.columns, self.extent(problem)
        arriving = rows * problem.axes[1].stride * pixels * columns.width * jnp.dtype(problem.dtype).itemsize
        strip = self.rows * columns.rows * columns.width * jnp.dtype(problem.out_dtype).itemsize
        taps = math.prod(axis.taps for axis in problem.axes)
        sums = 4 * self.groups * (columns.rows + taps) * columns.width if problem.summed else 0
        return arriving + self.groups * SLOTS * strip * (1 + problem.saved) + sums + 2048

    def blocks(self, problem: Problem) -> tuple[int, int, int, int]:
        """Of images, rows, pixels and channels."""
        height, width = problem.out
        return problem.images, pl.cdiv(height, self.rows), pl.cdiv(width, self.pixels), problem.deep

    def moved(self, problem: Problem) -> int:
        """Elements that all blocks read."""
        return math.prod(self.blocks(problem)) * math.prod(self.extent(problem))

    def allowed(self, problem: Problem) -> bool:
        """Whether copies are short enough and shared memory holds them."""
        _, pixels = self.extent(problem)
        if (
            min(self.rows, self.pixels, self.groups) < 1
            or self.pixels % problem.columns.rows
            or self.groups % problem.columns.joined_rows
        ):
            return False
        short = pixels <= 1024 and self.rows <= 2 * HEIGHT and self.groups <= 4
        return short and self.smem_bytes(problem) <= chips.current("gpu").smem_bytes

    @staticmethod
    def default(problem: Problem) -> "Tiles | None":
        """Those that read least, two blocks to a multiprocessor: one computes while the other waits. None: nothing
        fits."""
        found = [tiles for tiles in _all(problem) if 2 * tiles.smem_bytes(problem) <= chips.current("gpu").smem_bytes]
        least = lambda tiles: (tiles.moved(problem), -tiles.rows * tiles.pixels)
        return min(found, key=least, default=next(iter(_all(problem)), None))


def _all(problem: Problem) -> Iterator[Tiles]:
    (height, width), strip = problem.out, problem.columns.rows
    pixels = [round_up(pl.cdiv(width, parts), strip) for parts in range(1, 17)] + [256, 128, 64, 32, strip]
    for rows in dict.fromkeys(min(height, rows) for rows in (HEIGHT, 7, 6, 5, 4, 3, 2, 1)):
        for p in dict.fromkeys(pixels):
            if p <= round_up(width, strip) and (tiles := Tiles(rows, p, problem.columns.joined_rows)).allowed(problem):
                yield tiles


def _problem(lhs, rhs, residual=None, *, dtype, saving=True, activation=None, summed=False, **static) -> Problem | str:
    """What the kernel is made for, or why there is none."""
    chip, numbers, groups = chips.current("gpu"), static["dimension_numbers"], static["feature_group_count"]
    if chip.capability < (9, 0):
        capability = ".".join(map(str, chip.capability))
        return f"tiles are gathered by TMA, which needs compute capability 9.0, got {capability}"
    channels, columns = lhs.shape[numbers.lhs_spec[1]], rhs.shape[numbers.rhs_spec[0]]
    if not channels == columns == groups or static["batch_group_count"] != 1:
        return f"every channel must be a group of one output, got {channels} and {columns} channels in {groups} groups"
    for what, found in (("lhs", lhs.dtype), ("the result", jnp.dtype(dtype))):
        if found not in DTYPES:
            return f"{what} must be float32, bfloat16 or float16, got {found}"
    if residual is not None and residual.dtype != jnp.dtype(dtype):
        return f"residual must have the dtype of the result, {dtype}, got {residual.dtype}"
    if any(one != 1 for one in static["lhs_dilation"]):
        return f"lhs_dilation must be 1, got {static['lhs_dilation']}"
    if len(static["lhs_dilation"]) not in (1, 2):
        return f"conv must have one or two spatial axes on a GPU, got {len(static['lhs_dilation'])}"
    windows = conv.windows_of(lhs, rhs, **static)
    height, width = windows.axes if len(windows.axes) == 2 else (conv.Axis(1, 1, 1, 1, 1, 0), *windows.axes)
    unit = 64 if width.stride > 1 else conv.EIGHT
    names = jnp.dtype(lhs.dtype).name, jnp.dtype(dtype).name
    kept = residual is not None or summed, saving and activation is not None, summed
    problem = Problem(windows.images, (height, width), round_up(channels, unit), *names, *kept)
    if min(problem.out) < 1:
        return f"there must be a result, got one of the sizes {problem.out}"
    if height.taps * width.taps > MOST:
        return f"a thread holds the weights of at most {MOST} taps, got {height.taps} x {width.taps}"
    if reason := problem.windows.unsupported():
        return reason
    if Tiles.default(problem) is None:
        return (
            f"what a row of results reads must fit {chip.smem_bytes} bytes of shared memory, got windows that reach "
            f"over {height.reach} rows"
        )
    return problem


def unsupported(lhs, rhs, bias=None, residual=None, *, activation: Callable | None, **static: Any) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    found = _problem(lhs, rhs, residual, activation=activation, **static)
    return found if isinstance(found, str) else activations.unsupported(activation, refusal, products.computed)


def _of(phase: str, lhs, rhs, residual, dtype, **static: Any) -> Any:
    """The problem of the kernel of `phase`, or why there is none; backward, that of dz with the window turned."""
    if phase == "forward":
        return _problem(lhs, rhs, residual, dtype=dtype, **static)
    if any(stride != 1 for stride in static["window_strides"]):
        return "with strides it is a convolution of a dilated dz"
    geometry = {name: value for name, value in static.items() if name != "activation"}
    dz = jax.eval_shape(
        lambda a, b: lax.conv_general_dilated(a, b, **geometry),
        *(jax.ShapeDtypeStruct(x.shape, lhs.dtype) for x in (lhs, rhs)),
    )
    around = turned(lhs, rhs, geometry)
    numbers, rhs_spec = around["dimension_numbers"], geometry["dimension_numbers"].rhs_spec
    around["dimension_numbers"] = type(numbers)(numbers.lhs_spec, rhs_spec, numbers.out_spec)
    return _problem(dz, rhs, None, summed=True, **around)


def _chosen(phase: str, problem: Problem) -> Tiles:
    default = Tiles.default(problem)
    assert default is not None, "`unsupported` refuses what no tiles fit"
    height, width = problem.out
    return tuned.choose(
        f"gpu.depthwise_conv.{phase}",
        chips.current("gpu"),
        {
            "images": problem.images,
            "height": height,
            "width": width,
            "channels": problem.channels,
            "window": math.prod(axis.taps for axis in problem.axes),
        },
        problem.dtype,
        Tiles,
        lambda tiles: tiles.allowed(problem),
        default,
    )


def _either(phase: str, lhs, rhs, residual, dtype, **static) -> Problem:
    """The problem of the kernel of `phase`, else that of the forward one."""
    found = _of(phase, lhs, rhs, residual, dtype, **static)
    return _of("forward", lhs, rhs, residual, dtype, **static) if isinstance(found, str) else found


def tiles(phase: str, lhs, rhs, bias=None, residual=None, *, dtype, **static) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return _chosen(phase, _either(phase, lhs, rhs, residual, dtype, **static))


def candidates(phase: str, lhs, rhs, bias=None, residual=None, *, dtype, **static) -> Iterator[Tiles]:
    """The default, then all others, and those with more warpgroups."""
    problem = _either(phase, lhs, rhs, residual, dtype, **static)
    more = (dataclasses.replace(tiles, groups=4) for tiles in _all(problem))
    found = dict.fromkeys(itertools.chain([Tiles.default(problem)], _all(problem), more))
    yield from (one for one in found if one is not None and one.allowed(problem))


def memory(phase: str, tiles: Tiles, lhs, rhs, bias=None, residual=None, *, dtype, **static) -> int:
    """Bytes of shared memory of a block."""
    return tiles.smem_bytes(_either(phase, lhs, rhs, residual, dtype, **static))


def _convolve(problem: Problem, tiles: Tiles, x, w, bias, other, activation):
    """[y, z if it is saved, the sums of blocks if `summed`] of x[images, height, width, channels],
    w[taps, channels], and `other` like y."""
    columns, (height, width), windows = problem.columns, problem.axes, problem.windows
    px, lanes, groups = columns.rows, columns.width, tiles.groups
    rows_in, pitch = tiles.extent(problem)
    counts = tiles.blocks(problem)
    strips, taps = tiles.pixels // px, list(itertools.product(range(height.taps), range(width.taps)))
    out_dtype, chain = jnp.dtype(problem.out_dtype), 1 + problem.saved
    whole = problem.out[0] % tiles.rows == 0 and problem.out[1] % tiles.pixels == 0
    active = lowered(activation) if activation is not None else lambda z: z
    channels = problem.deep * lanes
    operands = [windows.of(x), pad_to(w.astype(f32), 1, channels)]
    if bias is not None:
        operands.append(pad_to(bias.astype(f32), 0, channels))
    if other is not None:
        operands.append(pad_to(other, 3, problem.channels))

    def body(x_ref, w_ref, *refs, tile, strip_tiles, saved_tiles, sums, lines, ready, there, met):
        left = list(refs)
        bias_ref = left.pop(0) if bias is not None else None
        other_ref = left.pop(0) if other is not None else None
        outs, group = left[: 1 + problem.saved], lax.axis_index("group")
        place: list[Any] = []
        block = lax.axis_index("block")
        for size in reversed(counts):
            place.insert(0, lax.rem(block, size))
            block = lax.div(block, size)
        batch, row, pixel = place[0], place[1] * tiles.rows, place[2] * tiles.pixels
        over = pl.ds(place[3] * lanes, lanes)

        @pl.when(group == 0)
        def _():
            view = plgpu.im2col_ref(x_ref, **windows.view)
            for k, phase in itertools.product(range(rows_in), range(width.stride)):
                block_row = batch * height.blocks_read + row + k // height.stride
                index = [pl.ds(block_row * width.blocks_read + pixel, pitch), height.first]
                index += [k % height.stride] if height.stride > 1 else []
                index += [width.first, pl.ds(phase * problem.channels + place[3] * lanes, lanes)]
                plgpu.copy_gmem_to_smem(view.at[tuple(index)], tile.at[k, phase], ready)

        def here(ref, m):
            """The m-th strip of this warpgroup in y or its like."""
            start = pixel + (group + m * groups) * px
            return ref.at[batch, pl.ds(row, tiles.rows), pl.ds(start, px), over]

        def fetch(m):
            slot = lax.rem(m, SLOTS)
            plgpu.copy_gmem_to_smem(here(other_ref, m), strip_tiles.at[group, slot], there.at[group, slot])

        def across(ref):
            line = plgpu.load(ref, layout=columns.layout.reduce(0), optimized=False)
            return plgpu.layout_cast(lax.broadcast_in_dim(line, (px, lanes), [1]), columns.layout)

        def read(ref):
            return plgpu.load(ref, layout=columns.layout, optimized=False).astype(f32)

        def put(ref, value):
            plgpu.store(ref, value.astype(out_dtype), optimized=False)

        count = lax.div(strips - group + groups - 1, groups)
        if other is not None:
            pl.when(count > 0)(lambda: fetch(jnp.int32(0)))
        weights = {tap: across(w_ref.at[n, over]) for n, tap in enumerate(taps)}
        add = across(bias_ref.at[over]) if bias_ref is not None else None
        plgpu.barrier_wait(ready)

        def inside(r, m, value):
            """0 where there is no result: what is read there is of other rows."""
            if whole:
                return value
            index = plgpu.broadcasted_iota(jnp.int32, (px, lanes), 0, layout=columns.layout)
            limit = jnp.where(row + r < problem.out[0], problem.out[1] - pixel - (group + m * groups) * px, 0)
            return jnp.where(index < limit, value, 0.0)

        def strip(m, carry):
            slot = lax.rem(m, SLOTS)
            if other is not None:

                @pl.when(m + 1 < count)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    fetch(m + 1)

                plgpu.barrier_wait(there.at[group, slot])
            plgpu.wait_smem_to_gmem((SLOTS - 1) * chain, wait_read_only=True)  # the slot's last strip has left
            mine, start = strip_tiles.at[group, slot], (group + m * groups) * px
            z: dict[int, Any] = {}
            others: dict[int, Any] = {}
            totals = dict(zip(taps, carry, strict=True)) if problem.summed else {}
            for k in range(rows_in):
                reached = [
                    (i, r)
                    for i, r in itertools.product(range(height.taps), range(tiles.rows))
                    if k == r * height.stride + i * height.dilation + height.shift
                ]
                for r in (r for i, r in reached if i == 0 and other is not None):
                    others[r] = read(mine.at[r])
                for j in range(width.taps) if reached else ():
                    at = j * width.dilation + width.shift
                    pixels = pl.ds(start + at // width.stride, px)
                    found = read(tile.at[k, at % width.stride, pixels])
                    for i, r in reached:
                        term = found * weights[i, j]
                        z[r] = z[r] + term if r in z else term
                        if problem.summed:
                            totals[i, j] = totals[i, j] + inside(r, m, found) * others[r]
                for r in (r for i, r in reached if i == height.taps - 1):
                    value = z.pop(r) if add is None else z.pop(r) + add
                    if problem.saved:
                        put(saved_tiles.at[group, slot, r], value)
                    y, beside = active(value), others.pop(r, None)
                    put(mine.at[r], y if beside is None or problem.summed else y + beside)
            plgpu.commit_smem()  # orders the reads, and the writes, before the copies that follow
            for ref, source in zip(outs, (mine, saved_tiles.at[group, slot]), strict=False):
                plgpu.copy_smem_to_gmem(source, here(ref, m))
            return tuple(totals[tap] for tap in taps) if problem.summed else ()

        zero = lambda: plgpu.layout_cast(jnp.zeros((px, lanes), f32), columns.layout)
        totals = lax.fori_loop(0, count, strip, tuple(zero() for _ in taps) if problem.summed else ())
        plgpu.wait_smem_to_gmem(0)
        if not problem.summed:
            return
        for n, total in enumerate(totals):
            plgpu.store(sums.at[group], total, optimized=False)
            column = jnp.sum(plgpu.load(sums.at[group], layout=columns.joined, optimized=False), axis=0)
            plgpu.store(lines.at[n, group], column, optimized=False)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

        @pl.when(group == 0)
        def _():
            for n in range(len(taps)):
                column = jnp.sum(plgpu.load(lines.at[n], layout=columns.joined, optimized=False), axis=0)
                plgpu.store(
                    left[-1].at[lax.div(lax.axis_index("block"), problem.deep), n, over], column, optimized=False
                )

    y = jax.ShapeDtypeStruct((problem.images, *problem.out, problem.channels), out_dtype)
    partials = jax.ShapeDtypeStruct((math.prod(counts[:3]), len(taps), channels), f32)
    strip_shape = (groups, SLOTS, tiles.rows, px, lanes)
    found = plgpu.kernel(
        body,
        kernel_name="depthwise_conv",
        out_type=[y] * chain + [partials] * problem.summed,
        scratch_types=dict(
            tile=plgpu.SMEM((rows_in, width.stride, pitch, lanes), x.dtype),
            strip_tiles=plgpu.SMEM(strip_shape, out_dtype),
            saved_tiles=plgpu.SMEM(strip_shape if problem.saved else (1,) * 5, out_dtype),
            sums=plgpu.SMEM((groups, px, lanes) if problem.summed else (1,) * 3, f32),
            lines=plgpu.SMEM((len(taps), groups, lanes) if problem.summed else (1,) * 3, f32),
            ready=plgpu.Barrier(num_arrivals=rows_in * width.stride),
            there=plgpu.Barrier(num_barriers=(groups, SLOTS)),
            met=plgpu.Barrier(num_arrivals=groups),
        ),
        grid=(math.prod(counts),),
        grid_names=("block",),
        num_threads=groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*operands)
    return [a[..., : x.shape[3]] for a in found]


def _window(rhs, numbers):
    """rhs as [taps, channels]."""
    return rhs.transpose(*numbers.rhs_spec[2:], *numbers.rhs_spec[:2]).reshape(-1, rhs.shape[numbers.rhs_spec[0]])


def forward(lhs, rhs, bias=None, residual=None, *, activation, tiles=None, saving: bool = True, **static):
    """((y,), residuals): z is saved if there is an activation, unless not `saving`."""
    numbers = static["dimension_numbers"]
    problem: Any = _problem(lhs, rhs, residual, activation=activation, saving=saving, **static)
    found = _convolve(
        problem,
        tiles or _chosen("forward", problem),
        image(lhs, numbers.lhs_spec),
        _window(rhs, numbers),
        bias,
        None if residual is None else image(residual, numbers.out_spec),
        activation,
    )
    y, *saved = (unimage(a, numbers.out_spec) for a in found)
    return (y,), tuple(saved)


def value(*operands, **options):
    """(y,), with nothing saved: `forward` for a call that is not differentiated."""
    return forward(*operands, **options, saving=False)[0]


def backward(
    lhs, rhs, bias=None, residual=None, *, outputs, residuals, cotangents, activation, dtype, tiles=None, **geometry
) -> dict[str, jax.Array]:
    """Gradients of the operands that are present: of lhs and rhs by one kernel where it can, the rest by XLA."""
    del outputs
    numbers = geometry["dimension_numbers"]
    dz, others = beside(cotangents[0], bias, residual, residuals, activation, numbers)
    d = dz.astype(lhs.dtype)
    problem: Any = _of("backward", lhs, rhs, None, dtype, **geometry)
    if isinstance(problem, str):
        convolve = lambda lhs, rhs: lax.conv_general_dilated(lhs, rhs.astype(lhs.dtype), **geometry)
        dlhs, drhs = jax.vjp(convolve, lhs, rhs)[1](d)
        return {"lhs": dlhs, "rhs": drhs, **others}
    window = _window(rhs, numbers)
    dx, partials = _convolve(
        problem,
        tiles or _chosen("backward", problem),
        image(d, numbers.out_spec),
        window[::-1],
        None,
        image(lhs, numbers.lhs_spec),
        None,
    )
    dw = jnp.sum(partials, 0)[::-1].astype(rhs.dtype)
    spatial_first = (*numbers.rhs_spec[2:], *numbers.rhs_spec[:2])
    dw = dw.reshape([rhs.shape[axis] for axis in spatial_first])
    return {
        "lhs": unimage(dx, numbers.lhs_spec),
        "rhs": dw.transpose([spatial_first.index(axis) for axis in range(rhs.ndim)]),
        **others,
    }
