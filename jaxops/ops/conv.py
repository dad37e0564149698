"""conv: public function and XLA rules. Beside the convolution it fuses what comes after it, in float32."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks, winograd
from jaxops.ops.matmul import Activation, activated, after_product, before, call_unless_traced, gradients_beside
from jaxops.reference.conv import biased, linear
from jaxops.reference.conv import conv as reference
from pallas_kernels import gpu, tpu

_FULL = 128  # channels that fill a matrix unit: from there on XLA's own convolution is as fast as the kernel
_TILED = 64  # float32 channels, and half as many of 16 bits, from where on a CPU saves by tiles
_NHWC, _HWIO = (0, 3, 1, 2), (3, 2, 0, 1)  # where batch, channels, and places are; outputs, inputs, and places
_TAPS = 64  # a CPU adds up so many taps of a depthwise convolution one by one; more make a long program
_PADDINGS = ("SAME", "SAME_LOWER", "VALID")


def _forward(lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry):
    plain = lambda lhs, rhs: linear(lhs, rhs, None, dtype=dtype, **geometry)
    numbers, z = geometry["dimension_numbers"], jax.eval_shape(plain, lhs, rhs)

    def tiled(lhs, rhs):
        x, w, form = _for_tiles(lhs, rhs, numbers)
        sizes = [z.shape[axis] for axis in numbers.out_spec[2:]]
        y = winograd.convolution(x, w, [low for low, _ in geometry["padding"]], sizes, form)
        return _ordered(y, _NHWC, numbers.out_spec).astype(z.dtype)

    found = dispatch.on_cpu(tiled, plain, lhs, rhs) if _is_tiled(lhs, rhs, z, geometry) else plain(lhs, rhs)
    return activated(biased(found, bias, numbers.out_spec[1]), residual, activation, dtype)


def _backward(lhs, rhs, bias=None, residual=None, *, outputs, residuals, cotangents, activation, dtype, **geometry):
    """dz = activation'(z) · dy, from which JAX has dlhs and drhs: convolutions, too. dbias = Σ dz, dresidual = dy."""
    dy = cotangents[0]
    dz = before(activation, residuals, dy)
    plain = lambda lhs, rhs, dz: _of_operands(lhs, rhs, dz, geometry)
    product = lambda lhs, rhs, dz: _of_factors(lhs, rhs, dz, geometry)
    if _is_tiled(lhs, rhs, dz, geometry):
        tiled = lambda lhs, rhs, dz: _of_tiles(lhs, rhs, dz, geometry)
        dlhs, drhs = dispatch.on_cpu(tiled, plain, lhs, rhs, dz)
    elif _is_product(lhs, rhs, dz, geometry):
        dlhs, drhs = dispatch.on_cpu(product, plain, lhs, rhs, dz)
    else:
        dlhs, drhs = plain(lhs, rhs, dz)
    channels = geometry["dimension_numbers"].out_spec[1]
    return {"lhs": dlhs, "rhs": drhs} | gradients_beside(dy, dz, bias, residual, channels)


def _of_operands(lhs, rhs, dz, geometry) -> tuple[jax.Array, jax.Array]:
    """(dlhs, drhs) of JAX."""
    # What the convolutions take is rounded, as for every product; their sums are float32 inside XLA.
    common = jnp.promote_types(lhs.dtype, rhs.dtype)
    f = lambda lhs, rhs: lax.conv_general_dilated(lhs.astype(common), rhs.astype(common), **geometry)
    return jax.vjp(f, lhs, rhs)[1](dz.astype(common))


def _is_tiled(lhs, rhs, z, geometry) -> bool:
    """Whether a CPU makes it by Winograd's tiles: a window of 3 × 3, and channels and pixels worth the transforms."""
    numbers = geometry["dimension_numbers"]
    ones = [*geometry["window_strides"], *geometry["lhs_dilation"], *geometry["rhs_dilation"]]
    ones += [geometry["feature_group_count"], geometry["batch_group_count"]]
    itemsize = jnp.promote_types(lhs.dtype, rhs.dtype).itemsize
    channels = [rhs.shape[axis] for axis in numbers.rhs_spec[:2]]
    pixels = math.prod(z.shape) // max(1, z.shape[numbers.out_spec[1]])
    return (
        [rhs.shape[axis] for axis in numbers.rhs_spec[2:]] == [winograd.WINDOW] * 2
        and all(one == 1 for one in ones)
        and z.dtype == jnp.float32
        and min(channels) >= _TILED // (4 // itemsize)
        and pixels >= max(channels)
    )


def _for_tiles(lhs, rhs, numbers) -> tuple[jax.Array, jax.Array, winograd.Form]:
    common = jnp.promote_types(lhs.dtype, rhs.dtype)
    x = _ordered(lhs, numbers.lhs_spec, _NHWC).astype(common)
    w = _ordered(rhs, numbers.rhs_spec, _HWIO).astype(common).astype(jnp.float32)
    return x, w, winograd.EXACT if common.itemsize == 4 else winograd.FAST


def _of_tiles(lhs, rhs, dz, geometry) -> tuple[jax.Array, jax.Array]:
    """(dlhs, drhs) of Winograd's tiles."""
    numbers = geometry["dimension_numbers"]
    x, w, form = _for_tiles(lhs, rhs, numbers)
    d = _ordered(dz, numbers.out_spec, _NHWC).astype(x.dtype)
    lows = [low for low, _ in geometry["padding"]]
    turned = jnp.flip(w, (0, 1)).swapaxes(2, 3)
    dx = winograd.convolution(d, turned, [winograd.WINDOW - 1 - low for low in lows], x.shape[1:3], form)
    dw = winograd.window_gradient(x, d, lows, form)
    dlhs, drhs = _ordered(dx, _NHWC, numbers.lhs_spec), _ordered(dw, _HWIO, numbers.rhs_spec)
    return dlhs.astype(lhs.dtype), drhs.astype(rhs.dtype)


def _is_product(lhs, rhs, dz, geometry) -> bool:
    """Whether every pixel of the result is one of lhs times one matrix, whose gradients XLA makes slowly on a CPU."""
    numbers = geometry["dimension_numbers"]
    ones = [*(rhs.shape[axis] for axis in numbers.rhs_spec[2:]), *geometry["window_strides"], *geometry["lhs_dilation"]]
    groups = geometry["feature_group_count"], geometry["batch_group_count"]
    padded = any(pads != (0, 0) for pads in geometry["padding"])
    return groups == (1, 1) and not padded and all(one == 1 for one in ones) and min(lhs.size, rhs.size, dz.size) > 0


def _of_factors(lhs, rhs, dz, geometry) -> tuple[jax.Array, jax.Array]:
    """(dlhs, drhs) of a product."""
    numbers = geometry["dimension_numbers"]
    common = jnp.promote_types(lhs.dtype, rhs.dtype)

    def product(lhs, rhs):
        w = rhs.transpose(*numbers.rhs_spec[2:], *numbers.rhs_spec[:2]).reshape(-1, lhs.shape[numbers.lhs_spec[1]])
        z = lax.dot_general(lhs.astype(common), w.astype(common), (((numbers.lhs_spec[1],), (1,)), ((), ())))
        return _ordered(jnp.moveaxis(z, -1, numbers.lhs_spec[1]), numbers.lhs_spec, numbers.out_spec)

    return jax.vjp(product, lhs, rhs)[1](dz.astype(common))


_OPERATOR = Operator(
    name="conv",
    differentiable=("lhs", "rhs", "bias", "residual"),
    reference=lambda *operands, **named: (reference(*operands, **named),),
    xla=Rules(_forward, _backward),
    tpu=tpu.conv,
    gpu=gpu.conv,
    partition=None,
)


@dataclasses.dataclass(frozen=True)
class _Reads:
    """padded[n, s · p + d · k, c] for every tap k, p < count, of x whose elements are `inner` apart, `low` from the
    start. Lists are by spatial axis; `spec` says the axes of x."""

    spec: tuple[int, ...]
    size: tuple[int, ...]
    low: tuple[int, ...]
    inner: tuple[int, ...]
    dilation: tuple[int, ...]
    strides: tuple[int, ...]
    count: tuple[int, ...]

    def padded(self, x: jax.Array) -> jax.Array:
        config = [(0, 0, 0)] * x.ndim
        for axis, size, low, inner, d, s, count in zip(
            self.spec[2:], self.size, self.low, self.inner, self.dilation, self.strides, self.count, strict=True
        ):
            needed = (count - 1) * s + (size - 1) * d + 1
            config[axis] = (low, needed - low - (x.shape[axis] - 1) * inner - 1, inner - 1)
        return lax.pad(x, jnp.zeros((), x.dtype), config)

    def of(self, padded: jax.Array) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
        for tap in itertools.product(*map(range, self.size)):
            start, limit, strides = [0] * padded.ndim, list(padded.shape), [1] * padded.ndim
            for axis, k, d, s, count in zip(self.spec[2:], tap, self.dilation, self.strides, self.count, strict=True):
                start[axis], limit[axis], strides[axis] = k * d, k * d + (count - 1) * s + 1, s
            yield tap, lax.slice(padded, start, limit, strides)

    def sum(self, x: jax.Array, taps: jax.Array) -> jax.Array:
        """Σ_k read[k] · taps[k, c]: one pass, where a convolution of XLA for the CPU makes one of every channel."""
        others = [axis for axis in range(x.ndim) if axis != self.spec[1]]
        z = jnp.zeros((), x.dtype)
        for tap, read in self.of(self.padded(x)):
            z = z + read * jnp.expand_dims(taps[tap], others)
        return z

    def products(self, x: jax.Array, dz: jax.Array) -> jax.Array:
        """Σ_{n, p} read[k] · dz, as [k, c]. Rows are added up in a loop, element by element, as sums over all that is
        not a channel are slow."""
        padded = self.padded(x)
        axis, s, length = self.spec[0], 1, 1
        if len(self.size) > 1:
            axis, s, length = self.spec[2], self.strides[0], (self.size[0] - 1) * self.dilation[0] + 1
        row = dataclasses.replace(self, count=(1, *self.count[1:])) if len(self.size) > 1 else self

        def add(index, sums):
            d = lax.dynamic_slice_in_dim(dz, index, 1, axis)
            here = lax.dynamic_slice_in_dim(padded, index * s, length, axis)
            return tuple(total + read * d for total, (_, read) in zip(sums, row.of(here), strict=True))

        shape = list(dz.shape)
        shape[axis] = 1
        sums = lax.fori_loop(0, dz.shape[axis], add, (jnp.zeros(shape, dz.dtype),) * math.prod(self.size))
        others = [a for a in range(dz.ndim) if a != self.spec[1]]
        return jnp.stack([jnp.sum(one, others) for one in sums]).reshape(*self.size, -1)


def _ordered(x: jax.Array, spec: Sequence[int], wanted: Sequence[int]) -> jax.Array:
    """x, whose axes are said by `spec`, with them where `wanted` says."""
    order = [0] * x.ndim
    for axis, place in zip(spec, wanted, strict=True):
        order[place] = axis
    return x.transpose(order)


def _reads(lhs, rhs, out_shape, geometry) -> _Reads:
    numbers = geometry["dimension_numbers"]
    return _Reads(
        spec=numbers.lhs_spec,
        size=tuple(rhs.shape[axis] for axis in numbers.rhs_spec[2:]),
        low=tuple(low for low, _ in geometry["padding"]),
        inner=geometry["lhs_dilation"],
        dilation=geometry["rhs_dilation"],
        strides=geometry["window_strides"],
        count=tuple(out_shape[axis] for axis in numbers.out_spec[2:]),
    )


def _spatial_first(rhs: jax.Array, numbers: lax.ConvDimensionNumbers) -> jax.Array:
    """The window of every channel, as [k, c]."""
    w = rhs.transpose(*numbers.rhs_spec[2:], *numbers.rhs_spec[:2])
    return w.reshape(*w.shape[:-2], -1)


def _depthwise_forward(lhs, rhs, bias=None, residual=None, *, activation, dtype, **geometry):
    numbers = geometry["dimension_numbers"]

    def shifted(lhs, rhs):
        common, wide = jnp.promote_types(lhs.dtype, rhs.dtype), z.dtype
        taps = _spatial_first(rhs, numbers).astype(common).astype(wide)
        y = _reads(lhs, rhs, z.shape, geometry).sum(lhs.astype(common).astype(wide), taps)
        return _ordered(y, numbers.lhs_spec, numbers.out_spec)

    plain = lambda lhs, rhs: linear(lhs, rhs, None, dtype=dtype, **geometry)
    z = jax.eval_shape(plain, lhs, rhs)
    found = dispatch.on_cpu(shifted, plain, lhs, rhs) if _writes_out(lhs, rhs, z, numbers) else plain(lhs, rhs)
    return activated(biased(found, bias, numbers.out_spec[1]), residual, activation, dtype)


def _writes_out(lhs, rhs, z, numbers) -> bool:
    """Whether a convolution is made as a sum of so many reads: it must be of something, and the program short."""
    taps = math.prod(rhs.shape[axis] for axis in numbers.rhs_spec[2:])
    return min(lhs.size, rhs.size, z.size) > 0 and taps <= _TAPS


def _depthwise_backward(
    lhs, rhs, bias=None, residual=None, *, outputs, residuals, cotangents, activation, dtype, **geometry
):
    dy, numbers = cotangents[0], geometry["dimension_numbers"]
    dz = before(activation, residuals, dy)

    def shifted(lhs, rhs, dz):
        common, wide = jnp.promote_types(lhs.dtype, rhs.dtype), dz.dtype
        x, d = (a.astype(common).astype(wide) for a in (lhs, dz))
        d = _ordered(d, numbers.out_spec, numbers.lhs_spec)
        reads = _reads(lhs, rhs, dz.shape, geometry)
        taps = _spatial_first(rhs, numbers).astype(common).astype(wide)
        turned = dataclasses.replace(
            reads,
            low=tuple((k - 1) * e - p for k, e, p in zip(reads.size, reads.dilation, reads.low, strict=True)),
            inner=reads.strides,
            strides=reads.inner,
            count=tuple(lhs.shape[axis] for axis in numbers.lhs_spec[2:]),
        )
        dx = turned.sum(d, jnp.flip(taps, range(len(reads.size))))
        dw = reads.products(x, d).reshape(*reads.size, *(rhs.shape[axis] for axis in numbers.rhs_spec[:2]))
        spatial_first = (*numbers.rhs_spec[2:], *numbers.rhs_spec[:2])
        dw = dw.transpose([spatial_first.index(axis) for axis in range(rhs.ndim)])
        return dx.astype(lhs.dtype), dw.astype(rhs.dtype)

    plain = lambda lhs, rhs, dz: _of_operands(lhs, rhs, dz, geometry)
    if _writes_out(lhs, rhs, dz, numbers):
        dlhs, drhs = dispatch.on_cpu(shifted, plain, lhs, rhs, dz)
    else:
        dlhs, drhs = plain(lhs, rhs, dz)
    return {"lhs": dlhs, "rhs": drhs} | gradients_beside(dy, dz, bias, residual, numbers.out_spec[1])


_DEPTHWISE = dataclasses.replace(
    _OPERATOR,
    xla=Rules(_depthwise_forward, _depthwise_backward),
    tpu=tpu.depthwise_conv,
    gpu=gpu.depthwise_conv,
)


def conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y[n, p, o] = activation(Σ_{k, i} lhs[n, s · p + d · k - low, i] · rhs[k, i, o] + bias[o]) + residual[n, p, o].

    A drop-in for `jax.lax.conv_general_dilated`, whose arguments these are up to `out_sharding`. s are the strides, d
    the dilation of rhs, low the padding before; lhs is 0 outside. Axes are in the order of the dimension numbers.

    Args:
      lhs: floating; batch, channels and any number of spatial axes, as NCHW unless `dimension_numbers` say otherwise.
      rhs: floating; output channels, input channels of a group, and as many spatial axes, as OIHW.
      window_strides: an int for each spatial axis.
      padding: "SAME", "SAME_LOWER", "VALID", or (low, high) for each spatial axis; negative ones crop.
      lhs_dilation: 1 more than the zeros between two elements of lhs, for each spatial axis: a transposed convolution.
      rhs_dilation: the same of rhs: a dilated one.
      dimension_numbers: three strings as ("NHWC", "HWIO", "NHWC"), a `jax.lax.ConvDimensionNumbers`, or None: NCHW,
        OIHW, NCHW.
      feature_group_count, batch_group_count: groups of channels, or of the batch, that are convolved by themselves; at
        most one is above 1.
      precision: as in `jax.lax.conv_general_dilated`.
      preferred_element_type: the floating dtype of the result; None: the common one of lhs and rhs.
      out_sharding: as in `jax.lax.conv_general_dilated`; where it is given XLA serves.
      bias: floating [output channels] or None.
      activation: an elementwise function of a float32 array (float64 for float64) or None. May be your own: JAX derives
        its gradient.
      residual: floating, of the shape of the result, or None.
      implementation: None, "pallas", "xla", or a sequence tried in order. None: the kernel for windows with fewer than
        128 input or output channels and for depthwise ones, unless the batch but not the width is a multiple of 8, as
        far as it serves them, else XLA, which is as fast there or faster.

    Returns:
      y, its axes in the order of the last of the dimension numbers. Sums, bias, activation and residual are in float32;
      y is rounded once, at the end. A CPU makes windows of 3 x 3 of many channels by Winograd's tiles: sums of float32
      have up to twice the error of the direct ones, those of 16 bits up to 2e-6 of the result.

    Raises:
      TypeError: an array or `preferred_element_type` is not floating, or `activation` is not a function.
      ValueError: shapes, strides, padding, dilations or groups do not fit each other, the dimension numbers are
        unknown, the activation changes the shape, or `implementation` is unknown or, alone, cannot run.

    Sources: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285; Lavin and
    Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308.
    """
    name = "conv"
    lhs, rhs = (checks.floating(name, which, x) for which, x in (("lhs", lhs), ("rhs", rhs)))
    shape, geometry = geometry_of(
        name,
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
    )
    numbers = geometry["dimension_numbers"]
    common = jnp.promote_types(lhs.dtype, rhs.dtype)
    dtype = common if preferred_element_type is None else jnp.dtype(preferred_element_type)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: preferred_element_type must be a floating dtype, got {dtype}")
    words: dict[str, Any] = dict(of="the output channels of rhs", like="that of the result")
    beside, activation, known = after_product(
        name, shape, bias, residual, activation, channels=numbers.out_spec[1], **words
    )
    operands: dict[str, Any] = dict(lhs=lhs, rhs=rhs, **beside)
    static: dict[str, Any] = dict(activation=activation, dtype=dtype.name, **geometry)
    if out_sharding is not None:
        if "xla" not in dispatch.order_of(name, implementation):
            raise ValueError(f"{name}: implementation 'pallas' was asked for, but XLA alone takes an out_sharding")
        return reference(**operands, **static, out_sharding=out_sharding)
    groups, channels = geometry["feature_group_count"], lhs.shape[numbers.lhs_spec[1]]
    if channels > 1 and groups == channels == rhs.shape[numbers.rhs_spec[0]]:
        if implementation is None and _beside(lhs, numbers):
            implementation = "xla"
        return call_unless_traced(_DEPTHWISE, known, operands, implementation, **static)
    if implementation is None and min(rhs.shape[axis] for axis in numbers.rhs_spec[:2]) >= _FULL:
        implementation = "xla"
    return call_unless_traced(_OPERATOR, known, operands, implementation, **static)


def _beside(lhs: jax.Array, numbers: lax.ConvDimensionNumbers) -> bool:
    """Whether XLA keeps the images of a batch side by side on a TPU: then its depthwise convolution is faster."""
    return lhs.ndim > 2 and lhs.shape[numbers.lhs_spec[-1]] % 8 != 0 and lhs.shape[numbers.lhs_spec[0]] % 8 == 0


def geometry_of(
    operator: str,
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: Any,
    batch_group_count: Any = 1,
    precision: Any = None,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(shape of the result, the arguments of `lax.conv_general_dilated` in their canonical form), all checked."""
    if lhs.ndim < 2 or rhs.ndim != lhs.ndim:
        raise ValueError(
            f"{operator}: lhs and rhs must have the same rank, at least 2, got {lhs.shape} and {rhs.shape}"
        )
    numbers = numbers_of(operator, lhs, rhs, dimension_numbers)
    geometry: dict[str, Any] = dict(
        dimension_numbers=numbers,
        window_strides=per_axis(operator, "window_strides", window_strides, lhs.ndim - 2),
        lhs_dilation=per_axis(operator, "lhs_dilation", lhs_dilation, lhs.ndim - 2),
        rhs_dilation=per_axis(operator, "rhs_dilation", rhs_dilation, lhs.ndim - 2),
        feature_group_count=_positive(operator, "feature_group_count", feature_group_count),
        batch_group_count=_positive(operator, "batch_group_count", batch_group_count),
        precision=precision,
    )
    groups = geometry["feature_group_count"], geometry["batch_group_count"]
    _check_groups(operator, lhs, rhs, numbers, *groups)
    geometry["padding"] = _paddings(operator, lhs, rhs, padding, **geometry)
    return _shape(operator, lhs, rhs, geometry), geometry


def numbers_of(operator: str, lhs: jax.Array, rhs: jax.Array, given: Any) -> lax.ConvDimensionNumbers:
    """The dimension numbers in their canonical form."""
    try:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{operator}: dimension_numbers must be None or three strings, as ('NHWC', 'HWIO', 'NHWC'), "
            f"for lhs {lhs.shape}, got {given!r}: {error}"
        ) from error
    axes = tuple(range(lhs.ndim))
    if any(tuple(sorted(spec)) != axes for spec in numbers):
        raise ValueError(f"{operator}: dimension_numbers must name each axis of lhs {lhs.shape} once, got {given!r}")
    return lax.ConvDimensionNumbers(*(tuple(map(int, spec)) for spec in numbers))


def _positive(operator: str, argument: str, value: Any) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{operator}: {argument} must be an int, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{operator}: {argument} must be at least 1, got {number}")
    return number


def per_axis(operator: str, argument: str, value: Any, rank: int) -> tuple[int, ...]:
    """`value` as `rank` positive ints; None: all 1."""
    if value is None and argument != "window_strides":
        return (1,) * rank
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != rank:
        raise ValueError(f"{operator}: {argument} must be a sequence of {rank} ints, one a spatial axis, got {value!r}")
    return tuple(_positive(operator, argument, one) for one in value)


def _check_groups(
    operator: str, lhs: jax.Array, rhs: jax.Array, numbers: lax.ConvDimensionNumbers, features: int, batches: int
) -> None:
    (batch, channels), (outputs, inputs) = (
        [lhs.shape[axis] for axis in numbers.lhs_spec[:2]],
        [rhs.shape[axis] for axis in numbers.rhs_spec[:2]],
    )
    if features > 1 and batches > 1:
        raise ValueError(
            f"{operator}: at most one of feature_group_count and batch_group_count may be above 1, "
            f"got {features} and {batches}"
        )
    if channels % features or outputs % features:
        raise ValueError(
            f"{operator}: feature_group_count must divide the {channels} channels of lhs and the {outputs} output "
            f"channels of rhs, got {features}"
        )
    if batch % batches or outputs % batches:
        raise ValueError(
            f"{operator}: batch_group_count must divide the batch of {batch} and the {outputs} output channels of rhs, "
            f"got {batches}"
        )
    if inputs * features != channels:
        raise ValueError(
            f"{operator}: rhs must have {channels // features} input channels ({channels} of lhs in {features} "
            f"groups), got {inputs} in shape {rhs.shape}; do dimension_numbers say which axis they are?"
        )


def _paddings(operator, lhs, rhs, padding, *, dimension_numbers, window_strides, lhs_dilation, rhs_dilation, **_):
    """`padding` as (low, high) of each spatial axis."""
    rank = lhs.ndim - 2
    if isinstance(padding, str):
        if padding.upper() not in _PADDINGS:
            raise ValueError(
                f"{operator}: padding must be one of {', '.join(_PADDINGS)} or pairs (low, high), got {padding!r}"
            )
        if any(one > 1 for one in lhs_dilation):
            raise ValueError(f"{operator}: padding must be pairs (low, high) where lhs is dilated, got {padding!r}")
        window = [
            (rhs.shape[axis] - 1) * dilation + 1 if rhs.shape[axis] else 0
            for axis, dilation in zip(dimension_numbers.rhs_spec[2:], rhs_dilation, strict=True)
        ]
        sizes = [lhs.shape[axis] for axis in dimension_numbers.lhs_spec[2:]]
        return tuple((int(low), int(high)) for low, high in lax.padtype_to_pads(sizes, window, window_strides, padding))
    try:
        pairs = tuple((index(low), index(high)) for low, high in padding)
    except (TypeError, ValueError):
        pairs = ()
    if len(pairs) != rank:
        raise ValueError(
            f"{operator}: padding must be one of {', '.join(_PADDINGS)} or {rank} pairs (low, high) of ints, "
            f"got {padding!r}"
        )
    return pairs


def _shape(operator: str, lhs: jax.Array, rhs: jax.Array, geometry: dict[str, Any]) -> tuple[int, ...]:
    """Of the result."""
    numbers = geometry["dimension_numbers"]
    for axis, (low, high), dilation in zip(
        numbers.lhs_spec[2:], geometry["padding"], geometry["lhs_dilation"], strict=True
    ):
        size = (lhs.shape[axis] - 1) * dilation + 1 if lhs.shape[axis] else 0
        if size + low + high < 0:
            raise ValueError(
                f"{operator}: padding must not crop more than axis {axis} of lhs {lhs.shape} has, got {(low, high)}"
            )
    try:
        result = jax.eval_shape(
            lambda a, b: lax.conv_general_dilated(a, b, **geometry),
            *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (lhs, rhs)),
        )
    except (TypeError, ValueError) as error:  # what is left: a precision that is none
        raise ValueError(f"{operator}: {error}") from error
    return result.shape
