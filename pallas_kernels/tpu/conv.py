"""y = activation(x ∗ w + bias) + residual on the TPU, over one or two axes with stride 1, and its gradients.

    z[h, q] = Σ_{i, j} x[h + i·d - p, q + j·e - r] · w[i, j] + bias,   dz = activation'(z) · dy
    dx = dz ∗ (w turned around, in and out exchanged),   dw and dbias in XLA,   dresidual = dy

An implicit product: no array of windows is made in HBM, nor a padded input. A grid step has some rows of the image with
those around them in VMEM; rows outside are cleared there. A row of pixels is multiplied with the weights of a column j
of the window as it lies, and the product, not the input, is moved by j·e - r pixels: it is float32, whose rows can be
moved, and what falls outside is left out. Pixels are rows of a matrix; where the width of an image is no multiple of
8 but the batch is one of 8, all images of the batch are taken at once, a pixel of each beside the others, which is how
XLA keeps them: then pixels are moved by whole registers. Few channels fill the matrix unit by the rows i of the
window side by side as one contracted axis, and its columns j as one axis of results.
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
from pallas_kernels.tpu.matrix_unit import LANES, NN, dot

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported", "value"]
f32 = jnp.float32
SLACK = 8 << 20  # VMEM left to the compiler for what does not stay in registers
LONGEST = 1024  # pixels of a row (of all images taken at once): a turn's program is written out for them
TURN = 512  # pixels of a turn, about


@dataclasses.dataclass(frozen=True)
class Geometry:
    """x[images, height, width, channels] with a window of `size`, `pads` (low, high) and `dilation`, each for two axes;
    `joined`: the batch that is taken at once, beside the pixels, or 1."""

    images: int
    height: int
    width: int
    channels: int
    columns: int
    size: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    joined: int
    dtype: Any
    out_dtype: Any
    read: int
    saved: int
    full: bool

    @property
    def out(self) -> tuple[int, int]:
        window = [(size - 1) * d + 1 for size, d in zip(self.size, self.dilation, strict=True)]
        height, width = (
            size + sum(pads) - w + 1 for size, pads, w in zip((self.height, self.width), self.pads, window, strict=True)
        )
        return height, width

    @property
    def pixels(self) -> int:
        """Pixels of a row of the input."""
        return self.width * self.joined


@dataclasses.dataclass(frozen=True)
class Problem(Geometry):
    """What the kernel is made for."""

    @property
    def staged(self) -> bool:
        """Whether rows are laid out anew in VMEM; else they can be multiplied as they arrive."""
        return self.pixels % 16 != 0 or self.channels % LANES != 0

    def rows_in(self, rows: int) -> int:
        return rows + (self.size[0] - 1) * self.dilation[0]

    @property
    def turn(self) -> int:
        """Rows of a turn."""
        return max(1, TURN // round_up(max(self.pixels, self.out[1] * self.joined), 16))

    def vmem_bytes(self, tiles: "Tiles") -> int:
        """Bytes of VMEM that the kernel is estimated to take; blocks are there twice, the next one arriving."""
        size, out_size = jnp.dtype(self.dtype).itemsize, jnp.dtype(self.out_dtype).itemsize
        window, columns = math.prod(self.size), round_up(tiles.columns, LANES)
        lanes, pixels = round_up(self.channels, LANES), round_up(self.pixels, 16)
        x = self.rows_in(tiles.rows) * pixels * lanes * size
        stage = tiles.rows * pixels * round_up(self.size[0] * self.channels, LANES) * size * self.staged
        w = window * round_up(self.channels, 16) * columns * size
        y = tiles.rows * round_up(self.out[1] * self.joined, 16) * columns * out_size
        turn = self.turn * pixels * columns * 4 * (self.size[1] + 2)
        parts = 8 * self.full * (turn + w)
        return SLACK + 2 * (x + w + (1 + self.saved + self.read) * y) + stage + turn + parts


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of the result of a block, a multiple of the rows of a turn, and its `columns` (channels)."""

    rows: int
    columns: int

    @staticmethod
    def default(problem: Problem) -> "Tiles":
        """All channels where the weights are small, so that they are read once, and about eight blocks of rows in all,
        fewer where they are small: the first one has to arrive before anything is computed."""
        columns = problem.columns if problem.columns <= 512 else 256
        turn, height = problem.turn, problem.out[0]
        blocks = max(1, 8 // max(problem.images, 1))
        rows = round_up(pl.cdiv(height, blocks), turn)
        while rows > turn and problem.vmem_bytes(Tiles(rows, columns)) > chips.current("tpu").vmem_bytes // 2:
            rows = round_up(pl.cdiv(rows, 2), turn)
        return Tiles(rows, columns)

    def allowed(self, problem: Problem) -> bool:
        """Whether everything fits VMEM and the rows are whole turns."""
        fits = problem.vmem_bytes(self) <= chips.current("tpu").vmem_bytes
        return self.rows > 0 and self.rows % problem.turn == 0 and self.columns > 0 and fits


def _two(first: Any, second: Any) -> tuple[Any, Any]:
    return first, second


def problem_of(
    kind: type[Geometry],
    lhs,
    rhs,
    residual,
    *,
    activation,
    dtype,
    dimension_numbers,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    feature_group_count,
    batch_group_count,
    precision,
    saving=True,
) -> Any:
    """The problem, of a `kind`, or why no kernel has it: of groups, precision and memory the callers know more."""
    del feature_group_count, batch_group_count
    if len(window_strides) not in (1, 2):
        return f"conv must have one or two spatial axes on a TPU, got {len(window_strides)}"
    if lhs.dtype not in (jnp.float32, jnp.bfloat16) or rhs.dtype != lhs.dtype:
        return f"lhs and rhs must both be float32 or bfloat16 on a TPU, got {lhs.dtype} and {rhs.dtype}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"the result must be float32 or bfloat16 on a TPU, got {dtype}"
    if residual is not None and residual.dtype not in (jnp.float32, jnp.bfloat16):
        return f"residual must be float32 or bfloat16 on a TPU, got {residual.dtype}"
    if any(one != 1 for one in (*window_strides, *lhs_dilation)):
        return f"strides and lhs_dilation must be 1, got {window_strides} and {lhs_dilation}"
    precision = precision[0] if isinstance(precision, tuple) else precision
    one: tuple[int, ...] = (1,) * (2 - len(window_strides))
    batch, channels, *image = (lhs.shape[axis] for axis in dimension_numbers.lhs_spec)
    columns, _, *window = (rhs.shape[axis] for axis in dimension_numbers.rhs_spec)
    height, width = _two(*one, *image)
    joined = batch if width % 8 and batch % 8 == 0 and batch * width <= LONGEST else 1
    problem = kind(
        images=batch // joined,
        height=height,
        width=width,
        channels=channels,
        columns=columns,
        size=_two(*one, *window),
        pads=_two(*[(0, 0)] * len(one), *padding),
        dilation=_two(*one, *rhs_dilation),
        joined=joined,
        dtype=jnp.dtype(lhs.dtype).name,
        out_dtype=jnp.dtype(dtype).name,
        read=int(residual is not None),
        saved=int(saving and activation is not None),
        full=matrix_unit.full(lhs.dtype, precision),
    )
    if min(problem.out) < 1:
        return f"there must be a result, got one of the sizes {problem.out}"
    widest = max(problem.pixels, problem.out[1])
    if widest > LONGEST:
        return f"a row must have at most {LONGEST} pixels, got {widest}"
    if min(low for low, _ in problem.pads) < 0 or min(high for _, high in problem.pads) < 0:
        return f"padding must not be negative on a TPU, got {padding}"
    return problem


def _problem(lhs, rhs, residual, **static: Any) -> Problem | str:
    """The problem, or why there is no kernel for it."""
    features, batches, precision = (static[name] for name in ("feature_group_count", "batch_group_count", "precision"))
    if (features, batches) != (1, 1):
        return f"groups have no kernel, got {features} of features and {batches} of the batch"
    if isinstance(precision, tuple) and precision[0] != precision[1]:
        return f"lhs and rhs must be multiplied in one precision on a TPU, got {precision}"
    if reason := matrix_unit.unsupported(lhs.dtype, precision[0] if isinstance(precision, tuple) else precision):
        return reason
    problem = problem_of(Problem, lhs, rhs, residual, **static)
    if isinstance(problem, str):
        return problem
    if not Tiles.default(problem).allowed(problem):
        vmem = chips.current("tpu").vmem_bytes >> 20
        return (
            f"{problem.turn} rows of the image and the weights must fit the {vmem} MiB of VMEM, got {problem.channels}"
            f" channels and a window of {problem.size}"
        )
    return problem


def unsupported(lhs, rhs, bias=None, residual=None, *, activation: Callable | None, **static: Any) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    found = _problem(lhs, rhs, residual, activation=activation, **static)
    return found if isinstance(found, str) else activations.unsupported(activation, elementwise.refusal)


def turned(lhs, rhs, geometry: dict[str, Any]) -> dict[str, Any]:
    """The options of the convolution of dz with the window turned around that is the gradient of lhs."""
    numbers = geometry["dimension_numbers"]
    sizes = [rhs.shape[axis] - 1 for axis in numbers.rhs_spec[2:]]
    around = [size * step for size, step in zip(sizes, geometry["rhs_dilation"], strict=True)]
    pads = zip(around, geometry["padding"], strict=True)
    specs = numbers.out_spec, (numbers.rhs_spec[1], numbers.rhs_spec[0], *numbers.rhs_spec[2:]), numbers.lhs_spec
    return {
        **geometry,
        "activation": None,
        "dtype": lhs.dtype.name,
        "padding": tuple((window - low, window - high) for window, (low, high) in pads),
        "dimension_numbers": type(numbers)(*specs),
    }


def _of(phase: str, lhs, rhs, residual, activation, dtype, geometry) -> Problem:
    """The problem of the kernel of `phase`; backward it is that of the gradient of lhs, if there is a kernel for it."""
    static = {"activation": activation, "dtype": dtype, **geometry}
    found: Any = _problem(lhs, rhs, residual, **static)
    if phase == "backward":
        dz = jax.eval_shape(
            lambda a, b: lax.conv_general_dilated(a, b, **geometry),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (lhs, rhs)),
        )
        around = _problem(dz, rhs, None, **turned(lhs, rhs, geometry))
        found = around if isinstance(around, Problem) else found
    return found


def _chosen(phase: str, problem: Problem) -> Tiles:
    return tuned.choose(
        f"tpu.conv.{phase}",
        chips.current("tpu"),
        {
            "images": problem.images * problem.joined,
            "height": problem.height,
            "width": problem.width,
            "channels": problem.channels,
            "columns": problem.columns,
            "window": math.prod(problem.size),
        },
        problem.dtype,
        Tiles,
        lambda tiles: tiles.allowed(problem),
        Tiles.default(problem),
    )


def tiles(phase: str, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return _chosen(phase, _of(phase, lhs, rhs, residual, activation, dtype, geometry))


def candidates(phase: str, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> Iterator[Tiles]:
    """The default, then more and fewer turns in a block, and fewer columns."""
    problem = _of(phase, lhs, rhs, residual, activation, dtype, geometry)
    default = Tiles.default(problem)
    most = round_up(problem.out[0], problem.turn)
    rows = [min(problem.turn * turns, most) for turns in (1, 2, 4, 8, 16, 32)]
    found = [Tiles(r, c) for c in (default.columns, 256, 128) if c <= default.columns for r in rows]
    yield from (one for one in dict.fromkeys([default, *found]) if one.allowed(problem))


def memory(phase: str, tiles: Tiles, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return _of(phase, lhs, rhs, residual, activation, dtype, geometry).vmem_bytes(tiles)


def _moved(z: jax.Array, by: int, width: int, out: int) -> jax.Array:
    """z[rows, pixels, columns], of which `width` pixels count, such that pixel q is its pixel q + by, for q < out; 0
    where there is none."""
    first, last = max(0, -by), min(out, width - by)
    if first >= last:
        return jnp.zeros((z.shape[0], out, z.shape[2]), z.dtype)
    parts = [z[:, first + by : last + by]]
    if first:
        parts.insert(0, jnp.zeros((z.shape[0], first, z.shape[2]), z.dtype))
    if last < out:
        parts.append(jnp.zeros((z.shape[0], out - last, z.shape[2]), z.dtype))
    return jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]


def _ahead() -> bool:
    """Whether the rows of the next block are fetched while this one is computed. Two cores would not know which block
    is the first."""
    return chips.current("tpu").cores == 1


def _parts(problem: Problem, rows: int) -> list[tuple[int, int, int, int]]:
    """(first, last, low, high): of the blocks first to last, the rows low to high are inside the image."""
    found: dict[tuple[int, int], list[int]] = {}
    for block in range(pl.cdiv(problem.out[0], rows)):
        start, count = block * rows - problem.pads[0][0], problem.rows_in(rows)
        low = min(max(0, -start), count)
        found.setdefault((low, max(low, min(count, problem.height - start))), []).append(block)
    return [(blocks[0], blocks[-1], low, high) for (low, high), blocks in found.items()]


def _rows(x_ref, images, arrived, problem, tiles, block, act, clear=False):
    """act(copy) of the rows of the input that a block of the result needs; those outside are cleared if wanted."""
    blocks, slot = pl.num_programs(1), lax.rem(block, 2)
    image, place = lax.div(block, blocks), lax.rem(block, blocks)
    parts = _parts(problem, tiles.rows)
    for first, last, low, high in parts:

        def some(low=low, high=high):
            if high > low:
                inside = pl.ds(place * tiles.rows - problem.pads[0][0] + low, high - low)
                there = images.at[slot, pl.ds(low, high - low)]
                act(pltpu.make_async_copy(x_ref.at[image, inside], there, arrived.at[slot]))
            if clear:

                def clear_row(row, _):
                    images[slot, row] = jnp.zeros(images.shape[2:], images.dtype)
                    return 0

                lax.fori_loop(0, low, clear_row, 0)
                lax.fori_loop(high, images.shape[1], clear_row, 0)

        if len(parts) == 1:
            some()
        else:
            pl.when((place >= first) & (place <= last))(some)


def _kernel(x_ref, w_ref, bias_ref, residual_ref, *refs, problem, tiles, activation, precision):
    outs, (images, arrived, *stages) = refs[: 1 + problem.saved], refs[1 + problem.saved :]
    (taps, across), (step, apart) = problem.size, problem.dilation
    pixels, joined, turn = problem.pixels, problem.joined, problem.turn
    (left, _), out, columns = problem.pads[1], problem.out[1] * joined, tiles.columns
    block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    slot = lax.rem(block, 2)
    rows_of = functools.partial(_rows, x_ref, images, arrived, problem, tiles)

    @pl.when(pl.program_id(2) == 0)
    def arrive():
        if _ahead():
            pl.when(block == 0)(lambda: rows_of(block, lambda copy: copy.start()))
            following = block + 1
            last = pl.num_programs(0) * pl.num_programs(1)
            pl.when(following < last)(lambda: rows_of(following, lambda copy: copy.start()))
        else:
            rows_of(block, lambda copy: copy.start())
        rows_of(block, lambda copy: copy.wait(), clear=True)
        if problem.staged:

            def stage(index, _):
                here = pl.ds(index * turn, turn)
                beside = [images[slot, pl.ds(index * turn + i * step, turn)] for i in range(taps)]
                stages[0][here, :pixels] = jnp.concatenate(beside, 2) if taps > 1 else beside[0]
                return 0

            lax.fori_loop(0, tiles.rows // turn, stage, 0)

    def products(row):
        """The product with each column of the window, [rows of the turn, pixels, columns]."""
        if problem.staged:
            here = stages[0][pl.ds(row, turn)]
            all_z = dot(here.reshape(-1, here.shape[2]), w_ref[0], NN, precision).reshape(*here.shape[:2], -1)
            for j in range(across):
                yield all_z[:, :, j * columns : (j + 1) * columns]
        else:
            for j in range(across):
                z: Any = 0
                for i in range(taps):
                    here = images[slot, pl.ds(row + i * step, turn)]
                    z = z + dot(here.reshape(-1, here.shape[2]), w_ref[i, j], NN, precision)
                yield z.reshape(turn, pixels, columns)

    def compute(index, _):
        row = index * turn
        z: Any = 0
        for j, product in enumerate(products(row)):
            z = z + _moved(product, (j * apart - left) * joined, pixels, out)
        if bias_ref is not None:
            z = z + bias_ref[...].astype(f32).reshape(1, 1, columns)
        y = z if activation is None else activation(z.reshape(-1, columns)).reshape(z.shape)
        here = pl.ds(row, turn)
        if residual_ref is not None:
            y = y + residual_ref[0, here].astype(f32)
        for ref, array in zip(outs, (y, z), strict=False):
            ref[0, here] = array.astype(ref.dtype)
        return 0

    lax.fori_loop(0, tiles.rows // turn, compute, 0)


def image(a, spec: tuple[int, ...]):
    """a, whose axes are said by `spec`, as [batch, height, width, channels]."""
    a = a.transpose(spec[0], *spec[2:], spec[1])
    return a if a.ndim == 4 else a[:, None]


def unimage(a, spec: tuple[int, ...]):
    """The inverse of `image`."""
    order = (spec[0], *spec[2:], spec[1])
    a = a if len(spec) == 4 else a[:, 0]
    return a.transpose([order.index(axis) for axis in range(len(spec))])


def view(a, problem: Geometry, width: int):
    """a[batch, height, width, channels] as [images, height, pixels, channels]."""
    if problem.joined > 1:
        a = a.transpose(1, 2, 0, 3)
    return a.reshape(problem.images, -1, width * problem.joined, a.shape[-1])


def back(a, problem: Geometry, width: int):
    """The inverse of `view`."""
    if problem.joined > 1:
        return a.reshape(-1, width, problem.joined, a.shape[-1]).transpose(2, 0, 1, 3)
    return a.reshape(problem.images, -1, width, a.shape[-1])


def _convolve(problem: Problem, tiles: Tiles, x, w, bias, residual, activation, precision):
    """[y, z if it is saved] of x[batch, height, width, channels] and w[taps, across, channels, columns]."""
    height, width = problem.out
    columns, grid_columns = tiles.columns, pl.cdiv(problem.columns, tiles.columns)
    blocks, (taps, across) = pl.cdiv(height, tiles.rows), problem.size
    if problem.staged:
        w = pad_to(w, 3, grid_columns * columns).reshape(taps, across, problem.channels, grid_columns, columns)
        w = w.transpose(3, 0, 2, 1, 4).reshape(grid_columns, taps * problem.channels, across * columns)
        w_spec = pl.BlockSpec((1, *w.shape[1:]), lambda g, h, c: (c, 0, 0))
    else:
        w_spec = pl.BlockSpec((*w.shape[:3], columns), lambda g, h, c: (0, 0, 0, c))
    y_spec = pl.BlockSpec((1, tiles.rows, width * problem.joined, columns), lambda g, h, c: (g, h, 0, c))
    stage = (tiles.rows, round_up(problem.pixels, 16), taps * problem.channels)
    shape = (problem.images, height, width * problem.joined, problem.columns)
    pixels = problem.images * height * width * problem.joined
    once = (
        x.size * x.dtype.itemsize
        + w.size * w.dtype.itemsize
        + (1 + problem.saved + problem.read) * 2 * math.prod(shape)
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, problem=problem, tiles=tiles, activation=activation, precision=precision),
        grid=(problem.images, blocks, grid_columns),
        in_specs=[
            pl.BlockSpec(memory_space=pl.ANY),
            w_spec,
            None if bias is None else pl.BlockSpec((1, columns), lambda g, h, c: (0, c)),
            None if residual is None else y_spec,
        ],
        out_specs=[y_spec] * (1 + problem.saved),
        out_shape=[jax.ShapeDtypeStruct(shape, problem.out_dtype)] * (1 + problem.saved),
        scratch_shapes=[
            pltpu.VMEM((2, problem.rows_in(tiles.rows), problem.pixels, problem.channels), x.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            *[pltpu.VMEM(stage, x.dtype)] * problem.staged,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if _ahead() else "parallel",) * 2 + ("arbitrary",),
            vmem_limit_bytes=min(problem.vmem_bytes(tiles) + SLACK, chips.current("tpu").vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pixels * problem.columns * problem.channels * taps * across,
            transcendentals=0,
            bytes_accessed=once,
        ),
        name="conv",
    )
    call = jax.custom_batching.sequential_vmap(lambda *operands: kernel(*operands))  # shared weights stay shared
    row = None if bias is None else bias.astype(bias.dtype if bias.dtype in (f32, jnp.bfloat16) else f32)[None]
    residual = None if residual is None else view(residual, problem, width)
    found = call(view(x, problem, problem.width), w, row, residual)
    return [back(a, problem, width) for a in found]


def forward(
    lhs,
    rhs,
    bias=None,
    residual=None,
    *,
    activation,
    dtype,
    dimension_numbers,
    precision,
    tiles: Tiles | None = None,
    saving: bool = True,
    phase: str = "forward",
    **geometry,
):
    """((y,), residuals): z is saved if there is an activation, unless not `saving`."""
    numbers = dimension_numbers
    problem: Any = _problem(
        lhs,
        rhs,
        residual,
        activation=activation,
        dtype=dtype,
        dimension_numbers=numbers,
        precision=precision,
        saving=saving,
        **geometry,
    )
    w = rhs.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    found = _convolve(
        problem,
        tiles or _chosen(phase, problem),
        image(lhs, numbers.lhs_spec),
        w if lhs.ndim == 4 else w[None],
        bias,
        None if residual is None else image(residual, numbers.out_spec),
        activation,
        precision[0] if isinstance(precision, tuple) else precision,
    )
    y, *saved = (unimage(a, numbers.out_spec) for a in found)
    return (y,), tuple(saved)


def value(*operands, **options):
    """(y,), with nothing saved: `forward` for a call that is not differentiated."""
    return forward(*operands, **options, saving=False)[0]


def backward(
    lhs, rhs, bias=None, residual=None, *, outputs, residuals, cotangents, activation, dtype, tiles=None, **geometry
) -> dict[str, jax.Array]:
    """Gradients of the operands that are present: of lhs by the kernel where it can, of rhs by XLA's convolution."""
    del outputs
    numbers, around = geometry["dimension_numbers"], turned(lhs, rhs, geometry)
    dz, others = beside(cotangents[0], bias, residual, residuals, activation, numbers)
    d = dz.astype(lhs.dtype)
    convolve = lambda lhs, rhs: lax.conv_general_dilated(lhs, rhs, **geometry)
    flipped = lax.rev(rhs, numbers.rhs_spec[2:])
    if unsupported(d, rhs, **around) is None:
        ((dlhs,), _) = forward(d, flipped, **around, tiles=tiles, phase="backward")
    else:
        (dlhs,) = jax.vjp(lambda lhs: convolve(lhs, rhs), lhs)[1](d)
    (drhs,) = jax.vjp(lambda rhs: convolve(lhs, rhs), rhs)[1](d)
    return {"lhs": dlhs, "rhs": drhs, **others}


def beside(dy, bias, residual, residuals, activation, numbers) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(dz in float32, the gradients of bias and residual that are present)."""
    wide = dy.astype(f32)
    dz = wide if not residuals else activations.along(activation, residuals[0].astype(f32), wide)[1]
    gradients = {}
    if bias is not None:
        others = [axis for axis in range(dz.ndim) if axis != numbers.out_spec[1]]
        gradients["bias"] = jnp.sum(dz, others).astype(bias.dtype)
    if residual is not None:
        gradients["residual"] = dy.astype(residual.dtype)
    return dz, gradients
