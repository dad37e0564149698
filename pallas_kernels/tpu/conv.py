"""y = activation(x ∗ w + bias) + residual on the TPU, over one or two axes with stride 1, and its gradients.

    z[h, q] = Σ_{i, j} x[h + i·d - p, q + j·e - r] · w[i, j] + bias,   dz = activation'(z) · dy
    dx = dz ∗ (w turned around, in and out exchanged),   dw[i, j] = Σ xᵀ · dz,   dbias = Σ dz,   dresidual = dy

An implicit product: no array of windows is made in HBM, nor a padded input. A grid step has some rows of the image with
those around them in VMEM; rows outside are cleared there. A row of pixels is multiplied with the weights of a column j
of the window as it lies, and the product, not the input, is moved by j·e - r pixels: it is float32, whose rows can be
moved, and what falls outside is left out. Pixels are rows of a matrix; where the width of an image is no multiple of
8 but the batch is one of 8, all images of the batch are taken at once, a pixel of each beside the others, which is how
XLA keeps them: then pixels are moved by whole registers. Few channels fill the matrix unit by the rows i of the
window side by side as one contracted axis, and its columns j as one axis of results. The gradients are made by
`conv_gradients`; where that does not fit the chip, dx by this kernel and the others by XLA.
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
from pallas_kernels.convolution import beside, image, turned, unimage
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.tpu import conv_gradients, elementwise, matrix_unit
from pallas_kernels.tpu.conv_geometry import (
    Geometry,
    Rows,
    arrive,
    back,
    clear,
    divisor,
    in_hbm,
    moved,
    problem_of,
    view,
)
from pallas_kernels.tpu.matrix_unit import LANES, NN, dot

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported", "value"]
f32 = jnp.float32
SLACK = 8 << 20  # VMEM left to the compiler for what does not stay in registers
TURN = 512  # pixels of a turn, about; of many channels twice as many, as every turn ends with what follows products


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
    def most(self) -> int:
        """Rows of a turn at most."""
        pixels = TURN if self.staged or self.full else 2 * TURN
        most = max(1, pixels // round_up(max(self.pixels, self.out[1] * self.joined), 16))
        return min(most, round_up(self.out[0], 8))

    def vmem_bytes(self, tiles: "Tiles") -> int:
        """Bytes of VMEM that the kernel is estimated to take; blocks are there twice, the next one arriving."""
        size, out_size = jnp.dtype(self.dtype).itemsize, jnp.dtype(self.out_dtype).itemsize
        window, columns = math.prod(self.size), round_up(tiles.columns, LANES)
        lanes, pixels = round_up(self.channels, LANES), round_up(self.pixels, 16)
        x = self.rows_in(tiles.rows) * pixels * lanes * size
        stage = tiles.rows * pixels * round_up(self.size[0] * self.channels, LANES) * size * self.staged
        w = window * round_up(self.channels, 16) * columns * size
        y = tiles.rows * round_up(self.out[1] * self.joined, 16) * columns * out_size
        turn = divisor(tiles.rows, self.most) * pixels * columns * 4 * (self.size[1] + 2)
        parts = 8 * self.full * (turn + w)
        return SLACK + 2 * (x + w + (1 + self.saved + self.read) * y) + stage + turn + parts


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of the result of a block and its `columns` (channels)."""

    rows: int
    columns: int

    @staticmethod
    def default(problem: Problem) -> "Tiles":
        """All channels where the weights are small, so that they are read once, and about eight blocks of rows in all,
        fewer where they are small: the first one has to arrive before anything is computed."""
        columns = problem.columns if problem.columns <= 512 else 256
        turn, height = problem.most, problem.out[0]
        blocks = max(1, 8 // max(problem.images, 1))
        rows = round_up(pl.cdiv(height, blocks), turn)
        while rows > turn and problem.vmem_bytes(Tiles(rows, columns)) > chips.current("tpu").vmem_bytes // 2:
            rows = round_up(pl.cdiv(rows, 2), turn)
        return Tiles(rows, columns)

    def allowed(self, problem: Problem) -> bool:
        """Whether everything fits VMEM."""
        fits = problem.vmem_bytes(self) <= chips.current("tpu").vmem_bytes
        return self.rows > 0 and self.columns > 0 and fits


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
            f"{problem.most} rows of the image and the weights must fit the {vmem} MiB of VMEM, got {problem.channels}"
            f" channels and a window of {problem.size}"
        )
    return problem


def unsupported(lhs, rhs, bias=None, residual=None, *, activation: Callable | None, **static: Any) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    found = _problem(lhs, rhs, residual, activation=activation, **static)
    return found if isinstance(found, str) else activations.unsupported(activation, elementwise.refusal)


def _of(phase: str, lhs, rhs, bias, residual, activation, dtype, geometry) -> Any:
    """The problem of the kernel of `phase`: backward that of all gradients, else that of the gradient of lhs, else that
    of forward."""
    static = {"activation": activation, "dtype": dtype, **geometry}
    found: Any = _problem(lhs, rhs, residual, **static)
    if phase == "backward":
        dz = jax.eval_shape(
            lambda a, b: lax.conv_general_dilated(a, b, **geometry),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (lhs, rhs)),
        )
        around = turned(lhs, rhs, geometry)
        gradients = problem_of(conv_gradients.Problem, dz, rhs, None, **around)
        if isinstance(gradients, conv_gradients.Problem):
            gradients = dataclasses.replace(
                gradients,
                dy=jnp.dtype(dtype).name,
                dw=jnp.dtype(rhs.dtype).name,
                saved=int(activation is not None),
                dbias=None if bias is None else _of_row(bias).name,
            )
            if gradients.served():
                return gradients
        smaller = _problem(dz, rhs, None, **around)
        found = smaller if isinstance(smaller, Problem) else found
    return found


def _of_row(bias: Any) -> Any:
    """The dtype in which the kernels have a bias."""
    return jnp.dtype(bias.dtype if bias.dtype in (f32, jnp.bfloat16) else f32)


def _kind(problem: Any) -> Any:
    return Tiles if isinstance(problem, Problem) else conv_gradients.Tiles


def _chosen(phase: str, problem: Any) -> Any:
    kind = _kind(problem)
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
        kind,
        lambda tiles: tiles.allowed(problem),
        kind.default(problem),
    )


def tiles(phase: str, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return _chosen(phase, _of(phase, lhs, rhs, bias, residual, activation, dtype, geometry))


def candidates(phase: str, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> Iterator[Tiles]:
    """The default, then more and fewer turns in a block, and fewer columns."""
    problem = _of(phase, lhs, rhs, bias, residual, activation, dtype, geometry)
    kind, height = _kind(problem), problem.out[0]
    default = kind.default(problem)
    rows = [min(problem.most * turns, round_up(height, problem.most)) for turns in (1, 2, 4, 8, 16, 32)]
    rows += [pl.cdiv(height, share) for share in (1, 2, 4)]
    found = [kind(r, c) for c in (default.columns, 256, 128) if c <= default.columns for r in rows]
    yield from (one for one in dict.fromkeys([default, *found]) if one.allowed(problem))


def memory(phase: str, tiles: Tiles, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return _of(phase, lhs, rhs, bias, residual, activation, dtype, geometry).vmem_bytes(tiles)


def _kernel(x_ref, w_ref, bias_ref, residual_ref, *refs, problem, tiles, activation, precision):
    outs, (images, arrived, *stages) = refs[: 1 + problem.saved], refs[1 + problem.saved :]
    (taps, across), (step, apart) = problem.size, problem.dilation
    pixels, joined, turn = problem.pixels, problem.joined, divisor(tiles.rows, problem.most)
    (left, _), out, columns = problem.pads[1], problem.out[1] * joined, tiles.columns
    block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    slot = lax.rem(block, 2)
    blocks = pl.cdiv(problem.out[0], tiles.rows)
    rows = Rows(tiles.rows, problem.rows_in(tiles.rows), problem.pads[0][0], problem.height, blocks)

    @pl.when(pl.program_id(2) == 0)
    def start():
        ahead = chips.current("tpu").cores == 1  # two cores would not know which block is the first
        arrive(problem.images * blocks, block, ahead, functools.partial(rows.copies, [(x_ref, images, arrived)]))
        rows.outside(pl.program_id(1), lambda first, last: clear(images.at[slot], first, last))
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
            z = z + moved(product, (j * apart - left) * joined, pixels, out)
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
            None if bias is None else pl.BlockSpec((columns,), lambda g, h, c: (c,)),
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
            dimension_semantics=("arbitrary" if chips.current("tpu").cores == 1 else "parallel",) * 2 + ("arbitrary",),
            vmem_limit_bytes=min(problem.vmem_bytes(tiles) + SLACK, chips.current("tpu").vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pixels * problem.columns * problem.channels * taps * across,
            transcendentals=0,
            bytes_accessed=once,
        ),
        name="conv",
    )
    # Beside its gradients XLA would bring x to VMEM before, and wait; alone, it may do so while something else runs.
    there = in_hbm if problem.saved else lambda x: x
    # Under vmap the kernel is called for each: shared weights stay shared.
    call = jax.custom_batching.sequential_vmap(lambda x, *operands: kernel(there(x), *operands))
    row = None if bias is None else bias.astype(_of_row(bias))
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
    """Gradients of the operands that are present: of lhs, rhs and bias by one kernel where it can, else of lhs by the
    forward kernel and the others by XLA."""
    del outputs
    numbers, precision = geometry["dimension_numbers"], geometry["precision"]
    problem = _of("backward", lhs, rhs, bias, residual, activation, dtype, geometry)
    if isinstance(problem, conv_gradients.Problem):
        views = [(cotangents[0], numbers.out_spec, problem.width)]
        views += [(z, numbers.out_spec, problem.width) for z in residuals]
        views += [(lhs, numbers.lhs_spec, problem.out[1])]
        dy, *z, x = (view(image(a, spec), problem, width) for a, spec, width in views)
        w = rhs.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
        dx, dw, *dbias = conv_gradients.gradients(
            problem,
            tiles or _chosen("backward", problem),
            x,
            dy,
            z[0] if z else None,
            w.reshape(*problem.size, *w.shape[-2:]),
            activation,
            precision[0] if isinstance(precision, tuple) else precision,
        )
        order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
        dw = dw.reshape(w.shape).transpose([order.index(axis) for axis in range(rhs.ndim)])
        found = {"lhs": unimage(back(dx, problem, problem.out[1]), numbers.lhs_spec), "rhs": dw}
        if bias is not None:
            found["bias"] = dbias[0].reshape(-1, *bias.shape)[0].astype(bias.dtype)
        if residual is not None:
            found["residual"] = cotangents[0].astype(residual.dtype)
        return found
    around = turned(lhs, rhs, geometry)
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
