"""y = activation(x ∗ w + bias) + residual on Hopper GPUs, over up to three axes, and its gradients.

    z[n, p] = Σ_k x[n, s·p + d·k - low] · w[k] + bias,   dz = activation'(z) · dy
    dx = dz ∗ (w turned around, in and out exchanged),   dw and dbias in XLA,   dresidual = dy

The product of `products`: its rows are the windows p of all images, its contracted axis is taps and channels. The
copies of TMA gather what a tap meets in some windows (im2col): they read zeros outside the image, so that neither an
array of windows nor a padded input is made in HBM. With a stride, an axis becomes two, and the last one channels: the
s phases of s·p, of which a tap reads one.
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
from pallas_kernels.convolution import beside, turned
from pallas_kernels.gpu import products
from pallas_kernels.gpu.elementwise import lowered, refusal
from pallas_kernels.gpu.products import CONSUMERS, DEPTH, PIECE, ROWS
from pallas_kernels.gpu.products import Tiles as Tiles
from pallas_kernels.padding import pad_to, round_up

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported", "value"]
EIGHT = 8  # channels of 16 bytes: what strides of arrays are made of for TMA


@dataclasses.dataclass(frozen=True)
class Axis:
    """A spatial axis: `count` windows of `taps` over `size` elements."""

    size: int
    count: int
    taps: int
    stride: int
    dilation: int
    low: int

    @property
    def blocks(self) -> int:
        """Elements of a phase."""
        return pl.cdiv(self.size, self.stride)

    @property
    def before(self) -> int:
        """Elements of a phase that a window begins before the first."""
        return max(0, pl.cdiv(self.low, self.stride))

    @property
    def first(self) -> int:
        """The element of a phase that the first window begins at, if it is not before the image."""
        return max(0, -pl.cdiv(self.low, self.stride))

    @property
    def shift(self) -> int:
        """The phase that windows begin with."""
        return -self.low % self.stride

    @property
    def reach(self) -> int:
        """Elements from the first of its phases to the last tap of a window."""
        return self.shift + (self.taps - 1) * self.dilation

    @property
    def blocks_read(self) -> int:
        """Elements of a phase that all windows meet."""
        return self.count + self.reach // self.stride

    def place(self, tap: Any) -> tuple[Any, Any]:
        """(where in a window a tap is, of which phase)."""
        at = tap * self.dilation + self.shift
        if isinstance(at, int):
            return at // self.stride + self.first, at % self.stride
        return lax.div(at, jnp.int32(self.stride)) + self.first, lax.rem(at, jnp.int32(self.stride))

    @property
    def after(self) -> int:
        """Elements of a phase past the last that windows begin at: negative, unless they are beyond the image."""
        return self.count - self.before - self.blocks

    @property
    def window(self) -> int:
        """Its extent for the copies, in elements of a phase; no shorter than lets `padding` add."""
        return max(self.place(self.taps - 1)[0] + 1, 1 - self.after)

    @property
    def padding(self) -> tuple[int, int]:
        return self.before, self.after + self.window - 1


@dataclasses.dataclass(frozen=True)
class Windows:
    """x[images, *axes, channels], as the copies see it."""

    images: int
    axes: tuple[Axis, ...]
    channels: int  # a multiple of 64 where the last axis has a stride, else of 8

    @property
    def rows(self) -> int:
        return self.images * math.prod(axis.count for axis in self.axes)

    @property
    def deep(self) -> int:
        """Channels of a tap in the contracted axis."""
        return round_up(self.channels, DEPTH)

    @property
    def view(self) -> dict[str, Any]:
        """The options of `plgpu.im2col_ref`."""
        shape: list[int] = []
        padding: list[tuple[int, int]] = []
        for axis in self.axes:
            shape.append(axis.window)
            padding.append(axis.padding)
            if axis.stride > 1 and axis is not self.axes[-1]:
                shape.append(axis.stride)
                padding.append((0, 0))
        return {"window_shape": tuple(shape), "padding": tuple(padding)}

    def unsupported(self) -> str | None:
        """Why TMA cannot copy them, or None."""
        shape, padding = self.view["window_shape"], self.view["padding"]
        if len(shape) > 3:
            return (
                f"at most three axes can be copied, where one with a stride counts twice but the last, got {len(shape)}"
            )
        most = 1 << (16 // len(shape))
        for extent, (low, high) in zip(shape, padding, strict=True):
            if extent > most or max(low, extent - 1 - high) > most // 2 or high - extent + 1 >= most // 2:
                return (
                    f"a window with its padding must be within {most} elements and begin at most {most // 2} outside "
                    f"the image, got {extent} elements and padding {low, high}"
                )
        return None

    def of(self, x: jax.Array) -> jax.Array:
        """x[images, *spatial, channels] as the copies see it: a view, unless sizes are no multiples."""
        for number, axis in enumerate(self.axes, 1):
            x = pad_to(x, number, axis.blocks * axis.stride)
        x = pad_to(x, x.ndim - 1, self.channels)
        *inner, last = self.axes
        split = [size for axis in inner for size in ((axis.blocks, axis.stride) if axis.stride > 1 else (axis.size,))]
        return x.reshape(x.shape[0], *split, last.blocks, last.stride * self.channels)

    def tile(self, ref, rows, step):
        """What the channels of a step are in some rows, the windows."""
        parts = self.deep // DEPTH
        tap, channel = lax.div(step, jnp.int32(parts)), lax.rem(step, jnp.int32(parts)) * DEPTH
        offsets: list[Any] = []
        for axis in reversed(self.axes):
            at, phase = axis.place(lax.rem(tap, jnp.int32(axis.taps)))
            tap = lax.div(tap, jnp.int32(axis.taps))
            if axis is self.axes[-1]:
                channel = channel + phase * self.channels
            elif axis.stride > 1:
                offsets.insert(0, phase)
            offsets.insert(0, at)
        return plgpu.im2col_ref(ref, **self.view).at[(rows, *offsets, pl.ds(channel, DEPTH))]


def windows_of(lhs, rhs, *, dimension_numbers, window_strides, padding, rhs_dilation, **_) -> Windows:
    """What a convolution reads."""
    images, channels, *sizes = (lhs.shape[axis] for axis in dimension_numbers.lhs_spec)
    taps = [rhs.shape[axis] for axis in dimension_numbers.rhs_spec[2:]]
    axes = []
    for size, count, stride, dilation, (low, high) in zip(
        sizes, taps, window_strides, rhs_dilation, padding, strict=True
    ):
        reach = size + low + high - (count - 1) * dilation - 1
        axes.append(Axis(size, reach // stride + 1 if reach >= 0 else 0, count, stride, dilation, low))
    return Windows(images, tuple(axes), round_up(channels, DEPTH if window_strides[-1] > 1 else EIGHT))


def _problem(
    lhs,
    rhs,
    residual=None,
    *,
    dtype,
    lhs_dilation,
    feature_group_count,
    batch_group_count,
    precision,
    **geometry,
) -> tuple[Windows, products.Sizes] | str:
    """What the kernel is made for, or why there is none."""
    del precision  # products of bfloat16 are exact in every precision
    if reason := products.no_wgmma():
        return reason
    for what, array in (("lhs", lhs), ("rhs", rhs), ("residual", residual)):
        if array is not None and array.dtype != jnp.bfloat16:
            return f"{what} must be bfloat16, got {array.dtype}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"the result must be bfloat16, got {dtype}"
    if (feature_group_count, batch_group_count) != (1, 1):
        return f"groups have no kernel, got {feature_group_count} of features and {batch_group_count} of the batch"
    if any(one != 1 for one in lhs_dilation):
        return f"lhs_dilation must be 1, got {lhs_dilation}"
    if not 1 <= len(lhs_dilation) <= 3:
        return f"conv must have one, two or three spatial axes on a GPU, got {len(lhs_dilation)}"
    windows = windows_of(lhs, rhs, **geometry)
    if min(axis.count for axis in windows.axes) < 1:
        return f"there must be a result, got one of the sizes {tuple(axis.count for axis in windows.axes)}"
    if reason := windows.unsupported():
        return reason
    n = rhs.shape[geometry["dimension_numbers"].rhs_spec[0]]
    if max(pl.cdiv(windows.rows, CONSUMERS * ROWS), pl.cdiv(n, PIECE)) > 65535:
        return f"the grid is limited to 65535 blocks of 128 rows and of 64 columns, got {windows.rows} and {n}"
    taps = math.prod(axis.taps for axis in windows.axes)
    return windows, products.Sizes(windows.rows, round_up(n, EIGHT), taps * windows.deep, 1)


def unsupported(lhs, rhs, bias=None, residual=None, *, activation: Callable | None, **static: Any) -> str | None:
    """Why the kernel cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del bias
    found = _problem(lhs, rhs, residual, **static)
    return found if isinstance(found, str) else activations.unsupported(activation, refusal, products.computed)


def _default(sizes: products.Sizes) -> Tiles:
    """The columns that take least time: blocks that a multiprocessor has one after the other, of so many columns."""
    cores, blocks = chips.current("gpu").cores, pl.cdiv(sizes.m, CONSUMERS * ROWS)
    time = lambda columns: pl.cdiv(blocks * pl.cdiv(sizes.n, columns), cores) * columns
    widest = Tiles.default(sizes).columns
    columns = min((c for c in (256, 192, 128, 64) if c <= widest), key=lambda c: (time(c), -c))
    return Tiles(columns, next(s for s in (4, 3, 2) if Tiles(columns, s).allowed(sizes)))


def _chosen(phase: str, sizes: products.Sizes) -> Tiles:
    return tuned.choose(
        f"gpu.conv.{phase}",
        chips.current("gpu"),
        {"m": sizes.m, "n": sizes.n, "k": sizes.k},
        "bfloat16",
        Tiles,
        lambda tiles: tiles.allowed(sizes),
        _default(sizes),
    )


def _sizes(phase: str, lhs, rhs, residual, dtype, geometry) -> products.Sizes:
    """Those of the kernel of `phase`; backward of that of the gradient of lhs, if there is a kernel for it."""
    found: Any = _problem(lhs, rhs, residual, dtype=dtype, **geometry)
    if phase == "backward" and not isinstance(around := _around(lhs, rhs, geometry), str):
        found = around
    return found[1]


def _around(lhs, rhs, geometry) -> Any:
    """The problem of the gradient of lhs, or why there is no kernel for it."""
    if any(stride != 1 for stride in geometry["window_strides"]):
        return "with strides it is a convolution of a dilated dz"
    dz = jax.eval_shape(
        lambda a, b: lax.conv_general_dilated(a, b, **geometry),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (lhs, rhs)),
    )
    around = turned(lhs, rhs, geometry)
    del around["activation"]
    return _problem(dz, rhs, **around)


def tiles(phase: str, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return _chosen(phase, _sizes(phase, lhs, rhs, residual, dtype, geometry))


def candidates(phase: str, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    sizes = _sizes(phase, lhs, rhs, residual, dtype, geometry)
    yield from dict.fromkeys(itertools.chain([_default(sizes)], products.candidates(sizes)))


def memory(phase: str, tiles: Tiles, lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry) -> int:
    """Bytes of shared memory of a block."""
    return products.memory(tiles, _sizes(phase, lhs, rhs, residual, dtype, geometry))


def last(a, spec: tuple[int, ...]):
    """a, whose axes are said by `spec`, with its channels last."""
    return a.transpose(spec[0], *spec[2:], spec[1])


def back(a, spec: tuple[int, ...]):
    """The inverse of `last`."""
    order = (spec[0], *spec[2:], spec[1])
    return a.transpose([order.index(axis) for axis in range(len(spec))])


def forward(
    lhs: jax.Array,
    rhs: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: Callable | None,
    tiles: Tiles | None = None,
    saving: bool = True,
    phase: str = "forward",
    **static: Any,
):
    """((y,), residuals): z is saved if there is an activation, unless not `saving`."""
    problem: Any = _problem(lhs, rhs, residual, **static)
    windows, sizes = problem
    numbers = static["dimension_numbers"]
    n = rhs.shape[numbers.rhs_spec[0]]
    w = rhs.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    w = pad_to(pad_to(w, w.ndim - 2, windows.deep), w.ndim - 1, sizes.n).reshape(sizes.k, sizes.n)
    active = lowered(activation) if activation is not None else lambda z: z

    def finish(zs, bias, residual):
        z = zs[0] if bias is None else zs[0] + bias
        y = active(z)
        return (y if residual is None else y + residual), z

    if residual is not None:
        residual = pad_to(last(residual, numbers.out_spec).reshape(windows.rows, n), 1, sizes.n)
    found = products.forward(
        "conv",
        windows.of(last(lhs, numbers.lhs_spec)),
        [w],
        bias,
        residual,
        finish,
        saved=int(saving and activation is not None),
        tiles=tiles or _chosen(phase, sizes),
        windows=windows,
    )
    shape = (windows.images, *(axis.count for axis in windows.axes), n)
    y, *saved = (back(a[:, :n].reshape(shape), numbers.out_spec) for a in found)
    return (y,), tuple(saved)


def value(*operands, **options):
    """(y,), with nothing saved: `forward` for a call that is not differentiated."""
    return forward(*operands, **options, saving=False)[0]


def backward(
    lhs, rhs, bias=None, residual=None, *, outputs, residuals, cotangents, activation, dtype, tiles=None, **geometry
) -> dict[str, jax.Array]:
    """Gradients of the operands that are present: of lhs by the kernel where it can, of rhs by XLA's convolution."""
    del outputs
    numbers = geometry["dimension_numbers"]
    dz, others = beside(cotangents[0], bias, residual, residuals, activation, numbers)
    d = dz.astype(lhs.dtype)
    convolve = lambda lhs, rhs: lax.conv_general_dilated(lhs, rhs, **geometry)
    if isinstance(_around(lhs, rhs, geometry), str):
        (dlhs,) = jax.vjp(lambda lhs: convolve(lhs, rhs), lhs)[1](d)
    else:
        flipped = lax.rev(rhs, numbers.rhs_spec[2:])
        ((dlhs,), _) = forward(d, flipped, **turned(lhs, rhs, geometry), tiles=tiles, phase="backward")
    (drhs,) = jax.vjp(lambda rhs: convolve(lhs, rhs), rhs)[1](d)
    return {"lhs": dlhs, "rhs": drhs, **others}
