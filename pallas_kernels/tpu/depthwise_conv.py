"""conv of every channel by itself on the TPU: y = activation(x ∗ w + bias) + residual, over one or two axes with stride
1, and its gradients.

    z[h, q, c] = Σ_{i, j} x[h + i·d - p, q + j·e - r, c] · w[i, j, c] + bias[c],   dz = activation'(z) · dy
    dx = dz ∗ (w turned around),   dw[i, j, c] = Σ_{h, q} x[h, q, c] · dz[h - i·d + p, q - j·e + r, c]

On the vector unit, channels on the lanes. Blocks of rows arrive once, in order, the images of the batch one below the
other; each is put, as float32, between the last rows of the block before and the first ones of the block after, in VMEM
whose margins are zeros. The result is a block behind. There a tap of the window is a read that starts some pixels
further: only float32 rows can be read from anywhere. Backward, every such read serves dx and dw.
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

from pallas_kernels import activations, chips, convolution, tuned
from pallas_kernels.padding import round_up
from pallas_kernels.tpu import conv_geometry as conv
from pallas_kernels.tpu import elementwise
from pallas_kernels.tpu.matrix_unit import LANES

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported", "value"]
f32 = jnp.float32
SLACK = 4 << 20  # VMEM left to the compiler for what does not stay in registers
SUBLANES = 8
TURN = 16  # strips that a turn of the loop makes, about
STRIP = 16  # pixels that are computed together: what a tap and the sums take stays in registers
MOST = 8  # strips of a row whose program is written out


@dataclasses.dataclass(frozen=True)
class Problem(conv.Geometry):
    """As many groups as channels; `summed`: the gradient of w is made, too."""

    summed: bool = False

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and pixels from the first to the last tap of a window."""
        rows, pixels = ((size - 1) * d for size, d in zip(self.size, self.dilation, strict=True))
        return rows, pixels * self.joined

    @property
    def left(self) -> int:
        return self.pads[1][0] * self.joined

    @property
    def out_pixels(self) -> int:
        return self.out[1] * self.joined

    @property
    def start(self) -> int:
        """The place of the first pixel of a row in VMEM."""
        return round_up(self.left, SUBLANES)

    @property
    def pitch(self) -> int:
        ends = self.pixels, round_up(self.out_pixels, SUBLANES) - self.left + self.reach[1]
        return self.start + round_up(max(ends), SUBLANES)

    def turn(self, rows: int) -> int:
        """Rows of a turn, a divisor of those of a block."""
        strips = pl.cdiv(self.out_pixels, STRIP)
        most = max(1, min(8, TURN // strips)) if strips <= MOST else 8
        return max(turn for turn in range(1, most + 1) if rows % turn == 0)

    def work(self, rows: int) -> float:
        """Rows that are computed and read in blocks of so many: more than there are, where they do not divide."""
        return _blocks(self, rows) * rows * (1 + self.reach[0] / self.turn(rows))

    @property
    def fewest(self) -> int:
        """The least rows of a block: as many as it leaves to the next one, and gives to the one before."""
        low = self.pads[0][0]
        return max(1, low, self.reach[0] - low)

    def vmem_bytes(self, tiles: "Tiles") -> int:
        """Bytes of VMEM that the kernel is estimated to take; blocks are there twice, the next one arriving."""
        size, out_size = jnp.dtype(self.dtype).itemsize, jnp.dtype(self.out_dtype).itemsize
        columns, window = round_up(tiles.columns, LANES), math.prod(self.size)
        x, y = (tiles.rows * round_up(pixels, 16) * columns for pixels in (self.pixels, self.out_pixels))
        blocks = x * size + y * out_size * (1 + self.saved + self.read) + y * size * self.summed
        stage = (tiles.rows + self.reach[0]) * self.pitch * columns * 4
        w = window * columns * 4 * (1 + SUBLANES * 2)
        return SLACK + 2 * blocks + stage + w


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of a block and its `columns` (channels, all or a multiple of 128)."""

    rows: int
    columns: int

    @staticmethod
    def default(problem: Problem) -> "Tiles":
        """About 16 blocks in all, each of which waits for its memory, while the first and the last are short; all
        channels of a pixel up to 256, but at least one share of them for each core."""
        columns = problem.channels if problem.channels <= 256 else 256
        if chips.current("tpu").cores > 1 and LANES < problem.channels <= 256:
            columns = LANES
        height = max(problem.height, problem.out[0])
        blocks = max(1, 16 // (problem.images * pl.cdiv(problem.channels, columns)))
        rows = max(pl.cdiv(height, blocks), problem.fewest, min(height, pl.cdiv(448, problem.pixels)))
        while rows > problem.fewest and problem.vmem_bytes(Tiles(rows, columns)) > chips.current("tpu").vmem_bytes // 2:
            rows = max(problem.fewest, rows // 2)
        rows = max(problem.fewest, pl.cdiv(height, pl.cdiv(height, rows)))
        return Tiles(min(range(rows, rows + rows // 4 + 2), key=problem.work), columns)

    def allowed(self, problem: Problem) -> bool:
        """Whether everything fits VMEM and blocks reach their neighbours."""
        fits = problem.vmem_bytes(self) <= chips.current("tpu").vmem_bytes
        whole = self.columns == problem.channels or (self.columns % LANES == 0 and 0 < self.columns < problem.channels)
        return whole and self.rows >= problem.fewest and fits


def _blocks(problem: Problem, rows: int) -> int:
    """Blocks of an image, counted for x and y alike."""
    return pl.cdiv(max(problem.height, problem.out[0]), rows)


def _kernel(x_ref, w_ref, bias_ref, residual_ref, beside_ref, *refs, problem, tiles, activation):
    outs, refs = refs[: 1 + problem.saved], refs[1 + problem.saved :]
    dw_ref, stage, weights, sums = refs if problem.summed else (None, *refs, None)
    (taps, across), (step, apart) = problem.size, problem.dilation
    (low, _), (reach, _) = problem.pads[0], problem.reach
    high, rows, blocks = reach - low, tiles.rows, _blocks(problem, tiles.rows)
    apart, pixels = apart * problem.joined, problem.out_pixels
    turn = problem.turn(rows)
    image, place = pl.program_id(1), pl.program_id(2)
    first, arrives = (image == 0) & (place == 0), image < problem.images
    before = jnp.where(place > 0, place - 1, blocks - 1)
    shares = [
        (share, pl.ds(share * LANES, min(LANES, tiles.columns - share * LANES)))
        for share in range(pl.cdiv(tiles.columns, LANES))
    ]
    inside = pl.ds(problem.start, problem.pixels)

    @pl.when(first)
    def clear():
        def clear_row(row, _):
            stage[:, row] = jnp.zeros((len(shares), problem.pitch, LANES), f32)
            return 0

        lax.fori_loop(0, stage.shape[1], clear_row, 0)
        weights[...] = w_ref[...].astype(f32)
        if sums is not None:
            sums[...] = jnp.zeros(sums.shape, f32)

    def put(row, to, count, there):
        """`count` rows of the block that arrived, from `row` on, as rows `to` of the stage; zeros unless `there`."""
        for share, lanes in shares:
            new = x_ref[0, pl.ds(row, count), :, lanes].astype(f32)
            stage[share, pl.ds(to, count), inside, : lanes.size] = jnp.where(there, new, 0.0)

    for row in range(high):  # what the block before has below it
        put(row, low + rows + row, 1, (place > 0) & (place * rows + row < problem.height))

    def strip_of(row, share, lanes, strip, count):
        """A strip of pixels of some channels of a turn."""
        here = 0, pl.ds(row, turn), pl.ds(strip, count), lanes
        z: Any = 0
        beside = None
        if beside_ref is not None:
            beside = beside_ref[here].astype(f32)
            if problem.out[0] % rows:
                at = lax.broadcasted_iota(jnp.int32, beside.shape, 0) + (before * rows + row)
                beside = jnp.where(at < problem.out[0], beside, 0.0)
        for j in range(across):
            start = problem.start - problem.left + j * apart + strip
            read = stage[share, pl.ds(row, turn + reach), pl.ds(start, count), : lanes.size]
            for i in range(taps):
                tap = read[i * step : i * step + turn]
                z = z + tap * weights[i, pl.ds(j, 1), lanes][None]
                if beside is None:
                    continue
                product = tap * beside
                if count % SUBLANES:
                    sums[i * across + j, pl.ds(0, 1), lanes] += jnp.sum(product, (0, 1))[None]
                else:
                    sums[i * across + j, :, lanes] += jnp.sum(product.reshape(-1, SUBLANES, lanes.size), 0)
        if bias_ref is not None:
            z = z + bias_ref[:, lanes].astype(f32).reshape(1, 1, -1)
        y = z if activation is None else activation(z.reshape(-1, lanes.size)).reshape(z.shape)
        if residual_ref is not None:
            y = y + residual_ref[here].astype(f32)
        for ref, array in zip(outs, (y, z), strict=False):
            ref[here] = array.astype(ref.dtype)

    def compute(index, _):
        row, strips = index * turn, pixels // STRIP
        together = strips if strips <= MOST else MOST // 2

        def some_strips(first, _):
            for share, lanes in shares:
                for strip in range(together):
                    strip_of(row, share, lanes, (first * together + strip) * STRIP, STRIP)
            return 0

        lax.fori_loop(0, strips // max(together, 1), some_strips, 0)
        for share, lanes in shares:
            for strip in range(strips - strips % max(together, 1), pl.cdiv(pixels, STRIP)):
                strip_of(row, share, lanes, strip * STRIP, min(STRIP, pixels - strip * STRIP))
        return 0

    @pl.when(~first & (arrives | (place == 0)) & (before * rows < problem.out[0]))
    def results():
        lax.fori_loop(0, rows // turn, compute, 0)

    for row in range(low):  # what the block that arrived has above it
        for share, _ in shares:
            stage[share, row] = jnp.where(place > 0, stage[share, rows + row], 0.0)
    whole = problem.height % rows == 0 and problem.out[0] <= problem.height

    def arrive_rows(index, _):
        row = index * turn
        if whole:
            for share, lanes in shares:
                new = x_ref[0, pl.ds(row, turn), :, lanes].astype(f32)
                stage[share, pl.ds(low + row, turn), inside, : lanes.size] = new
        else:
            for k in range(turn):
                put(row + k, low + row + k, 1, place * rows + row + k < problem.height)
        return 0

    @pl.when(arrives)
    def arrive():
        lax.fori_loop(0, rows // turn, arrive_rows, 0)

    if dw_ref is not None:

        @pl.when(~arrives & (place == 0))
        def add_up():
            for tap in range(taps * across):
                turned = taps * across - 1 - tap
                dw_ref[turned // across, turned % across, :] = jnp.sum(sums[tap], 0).astype(dw_ref.dtype)


def _convolve(problem: Problem, tiles: Tiles, x, w, bias, residual, beside, activation):
    """[y, z if it is saved, the turned dw if `beside` is given] of x[batch, height, width, channels] and
    w[taps, across, channels]."""
    height, width = problem.out
    columns, shares = tiles.columns, pl.cdiv(problem.channels, tiles.columns)
    blocks = _blocks(problem, tiles.rows)

    def rows_of(rows, late):
        """A block of an array with so many rows, of this step, or `late`, of the one before."""
        last = pl.cdiv(rows, tiles.rows) - 1

        def index(share, image, place):
            if late:
                image, place = jnp.where(place > 0, image, image - 1), jnp.where(place > 0, place - 1, blocks - 1)
            place = jnp.where(image < 0, 0, jnp.where(image < problem.images, jnp.minimum(place, last), last))
            return jnp.clip(image, 0, problem.images - 1), place, 0, share

        return index

    y_spec = pl.BlockSpec((1, tiles.rows, problem.out_pixels, columns), rows_of(height, 1))
    w_spec = pl.BlockSpec((*problem.size, columns), lambda share, image, place: (0, 0, share))
    shape = (problem.images, height, problem.out_pixels, problem.channels)
    outputs = 1 + problem.saved
    window = math.prod(problem.size)
    lanes = pl.cdiv(columns, LANES)
    kernel = pl.pallas_call(
        functools.partial(_kernel, problem=problem, tiles=tiles, activation=activation),
        grid=(shares, problem.images + 1, blocks),
        in_specs=[
            pl.BlockSpec((1, tiles.rows, problem.pixels, columns), rows_of(problem.height, 0)),
            w_spec,
            None if bias is None else pl.BlockSpec((1, columns), lambda share, image, place: (0, share)),
            None if residual is None else y_spec,
            None if beside is None else y_spec,
        ],
        out_specs=[y_spec] * outputs + [w_spec] * problem.summed,
        out_shape=[jax.ShapeDtypeStruct(shape, problem.out_dtype)] * outputs
        + [jax.ShapeDtypeStruct((*problem.size, problem.channels), w.dtype)] * problem.summed,
        scratch_shapes=[
            pltpu.VMEM((lanes, tiles.rows + problem.reach[0], problem.pitch, LANES), f32),
            pltpu.VMEM((*problem.size, columns), f32),
            *[pltpu.VMEM((window, SUBLANES, columns), f32)] * problem.summed,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=min(problem.vmem_bytes(tiles) + SLACK, chips.current("tpu").vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(shape) * window * (1 + problem.summed),
            transcendentals=0,
            bytes_accessed=x.nbytes + (1 + problem.saved + problem.read + problem.summed) * 2 * math.prod(shape),
        ),
        name="depthwise_conv",
    )
    call = jax.custom_batching.sequential_vmap(lambda *operands: kernel(*operands))  # shared weights stay shared
    row = None if bias is None else bias.astype(f32)[None]
    view = lambda a, width: None if a is None else conv.view(a, problem, width)
    found = call(view(x, problem.width), w, row, view(residual, width), view(beside, width))
    return [conv.back(a, problem, width) for a in found[:outputs]] + list(found[outputs:])


def _problem(lhs, rhs, residual, summed=False, **static: Any) -> Problem | str:
    """The problem, or why there is no kernel for it."""
    numbers, groups = static["dimension_numbers"], static["feature_group_count"]
    channels, columns = lhs.shape[numbers.lhs_spec[1]], rhs.shape[numbers.rhs_spec[0]]
    if not channels == columns == groups or static["batch_group_count"] != 1:
        return f"every channel must be a group of one output, got {channels} and {columns} channels in {groups} groups"
    problem = conv.problem_of(Problem, lhs, rhs, residual, **static)
    if isinstance(problem, str):
        return problem
    problem = dataclasses.replace(problem, summed=summed)
    window = [(size - 1) * d for size, d in zip(problem.size, problem.dilation, strict=True)]
    if any(max(pads) > reach for pads, reach in zip(problem.pads, window, strict=True)):
        return f"padding must be within the window on a TPU, got {static['padding']}"
    if not Tiles.default(problem).allowed(problem):
        vmem = chips.current("tpu").vmem_bytes >> 20
        return f"{problem.fewest} rows of the image and the window must fit the {vmem} MiB of VMEM, got {problem.size}"
    return problem


def unsupported(lhs, rhs, bias=None, residual=None, *, activation: Callable | None, **static: Any) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    for phase in ("forward", "backward"):
        found = _of(phase, lhs, rhs, residual, activation, **static)
        if isinstance(found, str):
            return found
    return activations.unsupported(activation, elementwise.refusal)


def _of(phase: str, lhs, rhs, residual, activation, **static: Any) -> Any:
    """The problem of the kernel of `phase`, or why there is none; backward, that of dz with the window turned."""
    if phase == "forward":
        return _problem(lhs, rhs, residual, activation=activation, **static)
    geometry = {name: value for name, value in static.items() if name != "dtype"}
    dz = jax.eval_shape(
        lambda a, b: lax.conv_general_dilated(a, b, **geometry),
        *(jax.ShapeDtypeStruct(x.shape, lhs.dtype) for x in (lhs, rhs)),
    )
    return _problem(dz, rhs, None, summed=True, **_turned(lhs, rhs, geometry))


def _turned(lhs, rhs, geometry: dict[str, Any]) -> dict[str, Any]:
    """Those of the dense convolution; but the window has its channels as outputs in both."""
    turned = convolution.turned(lhs, rhs, geometry)
    numbers = turned["dimension_numbers"]
    rhs_spec = geometry["dimension_numbers"].rhs_spec
    return turned | {"dimension_numbers": type(numbers)(numbers.lhs_spec, rhs_spec, numbers.out_spec)}


def _chosen(phase: str, problem: Problem) -> Tiles:
    return tuned.choose(
        f"tpu.depthwise_conv.{phase}",
        chips.current("tpu"),
        {
            "images": problem.images * problem.joined,
            "height": problem.height,
            "width": problem.width,
            "channels": problem.channels,
            "window": math.prod(problem.size),
        },
        problem.dtype,
        Tiles,
        lambda tiles: tiles.allowed(problem),
        Tiles.default(problem),
    )


def tiles(phase: str, lhs, rhs, bias=None, residual=None, *, activation, **static) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return _chosen(phase, _of(phase, lhs, rhs, residual, activation, **static))


def candidates(phase: str, lhs, rhs, bias=None, residual=None, *, activation, **static) -> Iterator[Tiles]:
    """The default, then more and fewer rows, and fewer channels."""
    problem = _of(phase, lhs, rhs, residual, activation, **static)
    default = Tiles.default(problem)
    rows = dict.fromkeys(max(problem.fewest, pl.cdiv(problem.out[0], share)) for share in (1, 2, 4, 7, 8, 14, 16))
    found = [Tiles(r, c) for c in dict.fromkeys((default.columns, 256, 128)) if c <= default.columns for r in rows]
    yield from (one for one in dict.fromkeys([default, *found]) if one.allowed(problem))


def memory(phase: str, tiles: Tiles, lhs, rhs, bias=None, residual=None, *, activation, **static) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return _of(phase, lhs, rhs, residual, activation, **static).vmem_bytes(tiles)


def _window(rhs, numbers):
    """rhs as [taps, across, channels]."""
    spec = numbers.rhs_spec
    w = rhs.transpose(*spec[2:], spec[1], spec[0]).reshape(*(rhs.shape[axis] for axis in spec[2:]), -1)
    return w if w.ndim == 3 else w[None]


def forward(
    lhs, rhs, bias=None, residual=None, *, activation, dimension_numbers, tiles=None, saving: bool = True, **static
):
    """((y,), residuals): z is saved if there is an activation, unless not `saving`."""
    numbers = dimension_numbers
    problem: Any = _problem(
        lhs, rhs, residual, activation=activation, dimension_numbers=numbers, saving=saving, **static
    )
    y, *saved = _convolve(
        problem,
        tiles or _chosen("forward", problem),
        convolution.image(lhs, numbers.lhs_spec),
        _window(rhs, numbers),
        bias,
        None if residual is None else convolution.image(residual, numbers.out_spec),
        None,
        activation,
    )
    return (convolution.unimage(y, numbers.out_spec),), tuple(convolution.unimage(a, numbers.out_spec) for a in saved)


def value(*operands, **options):
    """(y,), with nothing saved: `forward` for a call that is not differentiated."""
    return forward(*operands, **options, saving=False)[0]


def backward(
    lhs, rhs, bias=None, residual=None, *, outputs, residuals, cotangents, activation, tiles=None, **static
) -> dict[str, jax.Array]:
    """Gradients of the operands that are present: of lhs and rhs by one kernel, the rest by XLA."""
    del outputs
    dy, numbers = cotangents[0], static["dimension_numbers"]
    dz, others = convolution.beside(dy, bias, residual, residuals, activation, numbers)
    problem: Any = _of("backward", lhs, rhs, None, activation, **static)
    dx, dw = _convolve(
        problem,
        tiles or _chosen("backward", problem),
        convolution.image(dz.astype(lhs.dtype), numbers.out_spec),
        jnp.flip(_window(rhs, numbers), (0, 1)),
        None,
        None,
        convolution.image(lhs, numbers.lhs_spec),
        None,
    )
    back = [(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]).index(axis) for axis in range(rhs.ndim)]
    sizes = [rhs.shape[axis] for axis in numbers.rhs_spec[2:]]
    return {
        "lhs": convolution.unimage(dx, numbers.lhs_spec),
        "rhs": dw.reshape(*sizes, 1, -1).transpose(back),
        **others,
    }
