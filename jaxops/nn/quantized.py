"""Layers whose weights are in few bits: for inference, made from trained ones, and for training with what they will
round.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxops.dispatch import Implementation
from jaxops.nn.conv import convolve, masked
from jaxops.nn.implementation import static
from jaxops.ops.quantized_conv import quantized_conv
from jaxops.ops.quantized_matmul import quantized_matmul
from jaxops.quantization import INTEGERS, Quantized, dequantize, fake_quantize, quantize

Linear = nnx.Linear | nnx.LinearGeneral


class QuantizedWeight(nnx.Variable):
    """Values, scales or zero points of quantised weights: not trained, and no `nnx.Param`."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a linear layer contracts, and what of it comes out: kernel[*inputs, *outputs]."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @staticmethod
    def of(name: str, linear: Linear) -> "Shapes":
        """Raises `TypeError` if `linear` is no such layer, `ValueError` if it contracts other than its last axes."""
        if isinstance(linear, nnx.Linear):
            return Shapes((linear.in_features,), (linear.out_features,))
        if not isinstance(linear, nnx.LinearGeneral):
            kind = type(linear).__name__
            raise TypeError(f"{name}: linear must be an nnx.Linear or nnx.LinearGeneral, got {kind}")
        axes = tuple(linear.axis)
        if linear.batch_axis or axes != tuple(range(-len(axes), 0)):
            raise ValueError(
                f"{name}: linear must contract the last axes of its input, without batch axes, got axis {axes} and "
                f"batch_axis {dict(linear.batch_axis)}"
            )
        return Shapes(tuple(linear.in_features), tuple(linear.out_features))

    @property
    def flat(self) -> tuple[int, int]:
        return math.prod(self.inputs), math.prod(self.outputs)

    @property
    def positions(self) -> int:
        """As of a convolution: each has all inputs."""
        return 1

    @property
    def observed(self) -> int:
        """How many numbers are in one of the `rows`."""
        return self.flat[0]

    def rows(self, x: jax.Array) -> jax.Array:
        """x[…, *inputs] as […, k]."""
        return x.reshape(*x.shape[: x.ndim - len(self.inputs)], self.flat[0])

    def columns(self, y: jax.Array) -> jax.Array:
        """y[…, n] as […, *outputs]."""
        return y.reshape(*y.shape[:-1], *self.outputs)


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution layer moves its kernel[*window, in / groups, out] over channels-last inputs."""

    kernel: tuple[int, ...]
    strides: Any = 1
    padding: Any = "SAME"
    input_dilation: Any = 1
    kernel_dilation: Any = 1
    feature_group_count: int = 1

    @staticmethod
    def of(name: str, conv: nnx.Conv) -> "Window":
        """Raises `TypeError` if `conv` is no `nnx.Conv`."""
        if not isinstance(conv, nnx.Conv):
            raise TypeError(f"{name}: conv must be an nnx.Conv, got {type(conv).__name__}")
        names = ("strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count")
        return Window(tuple(conv.kernel.shape), *(_hashable(getattr(conv, name)) for name in names))

    @property
    def flat(self) -> tuple[int, int]:
        return math.prod(self.kernel[:-1]), self.kernel[-1]

    @property
    def positions(self) -> int:
        """Of the window: each has the channels of a group."""
        return math.prod(self.kernel[:-2])

    @property
    def observed(self) -> int:
        """How many numbers are in one of the `rows`."""
        return self.flat[0] if self.feature_group_count == 1 else self.kernel[-2] * self.feature_group_count

    @property
    def inputs(self) -> tuple[int, ...]:
        """The axes of one input, from the last: the channels and those that the window moves over."""
        return tuple(range(1 - len(self.kernel), 0))

    def rows(self, x: jax.Array) -> jax.Array:
        """What columns of the flat kernel are multiplied by, […, *spatial, k]; with groups, the channels of a pixel."""
        if self.feature_group_count > 1:
            return x

        def windows(x, kernel, strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers, **_):
            found = jax.lax.conv_general_dilated_patches(
                x, kernel.shape[:-2], strides, padding, lhs_dilation, rhs_dilation, dimension_numbers
            )
            by_channel = found.reshape(*found.shape[:-1], -1, self.positions)
            return by_channel.swapaxes(-1, -2).reshape(found.shape)

        return self(x, jnp.empty(self.kernel, x.dtype), function=windows)

    def spread(self, flat: Quantized) -> Quantized:
        """Quantised weights [k, out] as those of the kernel. Raises `ValueError` for groups across its positions."""
        groups, channels = flat.scales.shape[0], self.kernel[-2]
        if groups > 1 and groups % self.positions:
            raise ValueError(
                f"group_size must divide the {channels} input channels of a window, got {self.flat[0] // groups}"
            )
        parts = (*self.kernel[:-2], groups // self.positions) if groups > 1 else (1,) * (len(self.kernel) - 1)
        numbers = (*parts, self.kernel[-1])
        zeros = None if flat.zeros is None else flat.zeros.reshape(numbers)
        return Quantized(flat.values.reshape(self.kernel), flat.scales.reshape(numbers), zeros)

    def quantized(self, kernel: jax.Array, dtype: Any, **options: Any) -> Quantized:
        """The kernel in few bits; options: those of `jaxops.quantize`."""
        return self.spread(quantize(kernel.reshape(self.flat), dtype, axis=0, **options))

    def rounded(self, kernel: jax.Array, scales: jax.Array, dtype: str) -> Quantized:
        """The kernel by steps that were learned, of the shape that `quantized` gives them."""
        return self.spread(rounded(kernel.reshape(self.flat), scales.reshape(-1, self.flat[1]), dtype))

    def __call__(self, x: jax.Array, kernel: jax.Array, bias: Any = None, residual: Any = None, **options: Any):
        """The convolution, by `convolve`."""
        geometry = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return convolve(x, kernel, bias, residual, **geometry, **options)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


class _Quantized(nnx.Module):
    """Weights in few bits, a bias, and how inputs are quantised: what layers for inference keep."""

    def __init__(
        self,
        weights: Quantized,
        bias: jax.Array | None,
        *,
        dtype: Any,
        activations: str | None,
        activation_scale: jax.Array | None,
        input_scales: jax.Array | None,
        implementation: Implementation,
    ):
        name = type(self).__name__
        if activations not in (None, "int8"):
            raise ValueError(f"{name}: activations must be None or 'int8', got {activations!r}")
        if activation_scale is not None and activations is None:
            raise ValueError(f"{name}: activation_scale is for activations='int8', got activations=None")
        optional = lambda x: None if x is None else QuantizedWeight(jnp.asarray(x))
        self.values, self.scales = QuantizedWeight(weights.values), QuantizedWeight(weights.scales)
        self.zeros = optional(weights.zeros)
        self.bias = None if bias is None else nnx.Param(bias)
        self.input_scales, self.activation_scale = optional(input_scales), optional(activation_scale)
        self.dtype, self.activations, self.implementation = dtype, activations, static(implementation)

    def _prepared(self, x: jax.Array, axes: int | Sequence[int]) -> tuple[jax.Array, jax.Array | None]:
        """x as the product takes it, and its scales: one, one for all that shares `axes`, or None."""
        if self.input_scales is not None:
            x = (x / self.input_scales[...]).astype(x.dtype)
        if self.activation_scale is not None:
            step = self.activation_scale[...].astype(jnp.float32)
            return jnp.clip(jnp.round(x.astype(jnp.float32) / step), -127, 127).astype(jnp.int8), step
        if self.activations is None:
            return x, None
        quantized = quantize(x, axis=axes)
        return quantized.values, quantized.scales

    def _optional(self) -> dict[str, jax.Array | None]:
        return {name: None if (v := getattr(self, name)) is None else v[...] for name in ("zeros", "bias")}


class QuantizedLinear(_Quantized):
    """y = (x / input_scales) · (scales · (values - zeros)) + bias.

    The variables are `values[in, out]`, `scales[groups, out]`, and those of `zeros[groups, out]`, `bias[out]`,
    `input_scales[in]` and `activation_scale[]` that there are, else None. `of` makes one from a layer with a kernel.

    Args:
      weights: as `jaxops.quantize(kernel, axis=0, …)` returns them.
      bias: floating [out] or None.
      dtype: of the product and of y; None: that of x.
      activations: None multiplies x as it is (W8A16, W4A16); "int8" quantises it first (W8A8).
      activation_scale: one for all x, from calibration; None: each row of x has its own.
      input_scales: floating [in], by which x is divided first; None: it is not.
      shapes: for several input or output axes, as those of an `nnx.LinearGeneral`.
      implementation: None | "pallas" | "xla" | a sequence of them.

    Raises:
      ValueError: `activations` is neither None nor "int8", or there is an `activation_scale` without it.
    """

    def __init__(
        self,
        weights: Quantized,
        bias: jax.Array | None = None,
        *,
        dtype: Any = None,
        activations: str | None = None,
        activation_scale: jax.Array | None = None,
        input_scales: jax.Array | None = None,
        shapes: Shapes | None = None,
        implementation: Implementation = None,
    ):
        super().__init__(
            weights,
            bias,
            dtype=dtype,
            activations=activations,
            activation_scale=activation_scale,
            input_scales=input_scales,
            implementation=implementation,
        )
        k, n = weights.values.shape
        self.shapes = shapes or Shapes((k,), (n,))

    @classmethod
    def of(
        cls,
        linear: Linear,
        dtype: Any = jnp.int8,
        *,
        group_size: int | None = None,
        symmetric: bool = True,
        activations: str | None = None,
        implementation: Implementation = None,
    ) -> Self:
        """The layer with values, scales, zeros = quantize(linear.kernel, dtype, axis=0, …), and the bias of `linear`.

        Args:
          linear: an `nnx.Linear`, whose kernel is [in, out], or an `nnx.LinearGeneral` over its input's last axes.
          dtype, group_size, symmetric: as in `jaxops.quantize`. activations, implementation: as in the constructor.

        Raises:
          TypeError: `linear` is no such layer, or `jaxops.quantize` refuses a dtype.
          ValueError: `group_size` does not divide the rows of the kernel, or `activations` is unknown.
        """
        shapes = Shapes.of("QuantizedLinear.of", linear)
        kernel = linear.kernel[...].reshape(shapes.flat)
        weights = quantize(kernel, dtype, axis=0, group_size=group_size, symmetric=symmetric)
        return cls(
            weights,
            flat_bias(linear),
            dtype=linear.dtype,
            activations=activations,
            shapes=shapes,
            implementation=implementation,
        )

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """`x[…, *inputs]` to `[…, *outputs]`; `out_sharding` must be None."""
        if out_sharding is not None:
            raise ValueError(f"QuantizedLinear: out_sharding must be None, got {out_sharding}")
        x = self.shapes.rows(jnp.asarray(x, self.dtype))
        rows, scales = self._prepared(x, -1)
        y = quantized_matmul(
            rows,
            self.values[...],
            self.scales[...],
            x_scales=None if scales is None else jnp.broadcast_to(scales, (*x.shape[:-1], 1)),
            dtype=x.dtype,
            implementation=self.implementation,
            **self._optional(),
        )
        return self.shapes.columns(y)


class QuantizedConv(_Quantized):
    """y = activation((x / input_scales) ∗ (scales · (values - zeros)) + bias) + residual, channels last.

    The variables are `values[*window, in / groups, out]`, `scales` with an axis of 1 or a divisor for each of those,
    and those of `zeros` (as scales), `bias[out]`, `input_scales[in]` and `activation_scale[]` that there are, else
    None. `of` makes one from a trained layer.

    Args:
      weights: as `jaxops.quantize(kernel, axis=(0, 1, 2), …)` returns them.
      bias: floating [out] or None.
      window: strides, padding, dilations and groups; None: a stride of 1 and "SAME".
      dtype: of the product and of y; None: that of x.
      activation: an elementwise function of a float32 array or None, as in `jaxops.nn.Conv`.
      activations: None convolves x as it is (W8A16, W4A16); "int8" quantises it first (W8A8).
      activation_scale: one for all x, from calibration; None: each image has its own.
      input_scales: floating [in], by which x is divided first; None: it is not.
      implementation: None | "pallas" | "xla" | a sequence of them.

    Raises:
      ValueError: `activations` is neither None nor "int8", or there is an `activation_scale` without it.
    """

    def __init__(
        self,
        weights: Quantized,
        bias: jax.Array | None = None,
        *,
        window: Window | None = None,
        dtype: Any = None,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        activations: str | None = None,
        activation_scale: jax.Array | None = None,
        input_scales: jax.Array | None = None,
        implementation: Implementation = None,
    ):
        super().__init__(
            weights,
            bias,
            dtype=dtype,
            activations=activations,
            activation_scale=activation_scale,
            input_scales=input_scales,
            implementation=implementation,
        )
        self.window = window or Window(tuple(weights.values.shape))
        self.activation = activation

    @classmethod
    def of(
        cls,
        conv: nnx.Conv,
        dtype: Any = jnp.int8,
        *,
        group_size: int | None = None,
        symmetric: bool = True,
        activations: str | None = None,
        implementation: Implementation = None,
    ) -> Self:
        """The layer with the quantised kernel, the bias and the activation of `conv`.

        Args:
          conv: an `nnx.Conv` or a `jaxops.nn.Conv`.
          dtype, symmetric: as in `jaxops.quantize`, a scale for each output channel. group_size: how many input
            channels, at each place of the window, share a scale instead, a divisor of them.
          activations, implementation: as in the constructor.

        Raises:
          TypeError: `conv` is no such layer, or `jaxops.quantize` refuses a dtype.
          ValueError: `group_size` does not divide the channels, or `activations` is unknown.
        """
        window = Window.of("QuantizedConv.of", conv)
        weights = window.quantized(kernel_of(conv), dtype, group_size=group_size, symmetric=symmetric)
        return cls(
            weights,
            flat_bias(conv),
            window=window,
            dtype=conv.dtype,
            activation=getattr(conv, "activation", None),
            activations=activations,
            implementation=implementation,
        )

    def __call__(self, x: jax.Array, out_sharding: Any = None, *, residual: jax.Array | None = None) -> jax.Array:
        """`x[…, *spatial, in]` to `[…, *spatial, out]`; `residual`, of the shape of the result, is added at the end;
        `out_sharding` must be None."""
        if out_sharding is not None:
            raise ValueError(f"QuantizedConv: out_sharding must be None, got {out_sharding}")
        x = jnp.asarray(x, self.dtype)
        images, scales = self._prepared(x, self.window.inputs)
        if scales is not None:
            scales = scales.reshape(-1, *[1] * len(self.window.inputs))

        def product(lhs, rhs, *window, **named):
            return quantized_conv(lhs, rhs, self.scales[...], *window, lhs_scales=scales, **named)

        optional = self._optional()
        return self.window(
            images,
            self.values[...],
            optional["bias"],
            residual,
            function=product,
            zeros=optional["zeros"],
            activation=self.activation,
            dtype=x.dtype,
            implementation=self.implementation,
        )


class QuantizedEmbed(nnx.Module):
    """y_i = scales[i] · values[i]: a table of vectors, each with its own scale.

    The variables are `values[rows, features]` and `scales[rows, 1]`. `of` makes one from an `nnx.Embed`.

    Args:
      weights: as `jaxops.quantize(table)` returns them, symmetric.
      dtype: of y.
    """

    def __init__(self, weights: Quantized, *, dtype: Any = jnp.float32):
        self.values, self.scales = QuantizedWeight(weights.values), QuantizedWeight(weights.scales)
        self.num_embeddings, self.features = weights.values.shape
        self.dtype = dtype

    @classmethod
    def of(cls, embed: nnx.Embed, dtype: Any = jnp.int8) -> Self:
        """With the table of `embed`. Raises `TypeError` if it is no `nnx.Embed`, or for a dtype `quantize` refuses."""
        if not isinstance(embed, nnx.Embed):
            raise TypeError(f"QuantizedEmbed.of: embed must be an nnx.Embed, got {type(embed).__name__}")
        return cls(quantize(embed.embedding[...], dtype), dtype=embed.dtype or embed.embedding.dtype)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The vectors of integer `inputs[…]`, [… , features]; as in `nnx.Embed`, those out of range give NaN."""
        rows = lambda table, **fill: jnp.take(table, inputs, axis=0, **fill)
        values = rows(self.values[...], mode="fill", fill_value=0)
        return (values.astype(jnp.float32) * rows(self.scales[...], mode="fill", fill_value=jnp.nan)).astype(self.dtype)

    def attend(self, query: jax.Array) -> jax.Array:
        """query[…, features] · tableᵀ, as in `nnx.Embed`."""
        table = dequantize(Quantized(self.values[...], self.scales[...]), self.dtype)
        return jnp.asarray(query, self.dtype) @ table.T


class _FakeQuantized(nnx.Module):
    """A kernel, a bias, and the steps by which the kernel and inputs are rounded: what layers to train on keep."""

    def __init__(self, layer: Any, dtype: Any, weights: Quantized, input_scale: float | None):
        self.dtype, self.weights = layer.dtype, jnp.dtype(dtype).name
        if self.weights not in INTEGERS:
            raise TypeError(f"{type(self).__name__}: dtype must be one of {', '.join(INTEGERS)}, got {self.weights}")
        self.kernel, self.bias = layer.kernel, layer.bias
        self.scales = nnx.Param(weights.scales)
        self.input_scale = None if input_scale is None else nnx.Param(jnp.float32(input_scale))

    def _steps(self) -> tuple[jax.Array, jax.Array | None, str]:
        """Of `fake_quantized`, all but the numbers."""
        return self.scales[...], None if self.input_scale is None else self.input_scale[...], self.weights

    def _for_inference(self) -> dict[str, Any]:
        """What the layer for inference takes of it."""
        step = None if self.input_scale is None else positive(self.input_scale[...])
        return dict(dtype=self.dtype, activations=None if step is None else "int8", activation_scale=step)


class FakeQuantizedLinear(_FakeQuantized):
    """y = q(x; input_scale) · q(kernel; scales) + bias, q being `jaxops.fake_quantize`: what rounding will do, trained.

    The parameters are `kernel[*inputs, *outputs]` and `bias` of the layer it is made from, `scales[groups, out]` and
    `input_scale[]`: steps that are learned as well. Their gradients are divided by √(numbers · largest), as in LSQ.

    Args:
      linear: an `nnx.Linear`, or an `nnx.LinearGeneral` over its input's last axes.
      dtype: int8 or int4, of the weights. group_size: rows that share a scale, as in `jaxops.quantize`.
      input_scale: the first step of the inputs, in 8 bits; None: they are not quantised.

    Raises:
      TypeError: `linear` is no such layer, or dtype neither int8 nor int4.
      ValueError: `group_size` does not divide the rows.

    Source: Esser et al., LSQ, arXiv:1902.08153.
    """

    def __init__(
        self,
        linear: Linear,
        dtype: Any = jnp.int8,
        *,
        group_size: int | None = None,
        input_scale: float | None = None,
    ):
        self.shapes = Shapes.of("FakeQuantizedLinear", linear)
        kernel = linear.kernel[...].reshape(self.shapes.flat)
        super().__init__(linear, dtype, quantize(kernel, dtype, axis=0, group_size=group_size), input_scale)

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """`x[…, *inputs]` to `[…, *outputs]`; `out_sharding` must be None."""
        if out_sharding is not None:
            raise ValueError(f"FakeQuantizedLinear: out_sharding must be None, got {out_sharding}")
        rows, kernel = self.shapes.rows(jnp.asarray(x, self.dtype)), self.kernel[...].reshape(self.shapes.flat)
        return self.shapes.columns(fake_quantized_product(rows, kernel, flat_bias(self), *self._steps()))

    def converted(self, implementation: Implementation = None) -> QuantizedLinear:
        """The layer for inference, with the steps that were learned."""
        weights = rounded(self.kernel[...].reshape(self.shapes.flat), self.scales[...], self.weights)
        options = self._for_inference() | dict(implementation=implementation)
        return QuantizedLinear(weights, flat_bias(self), shapes=self.shapes, **options)


class FakeQuantizedConv(_FakeQuantized):
    """y = activation(q(x; input_scale) ∗ q(kernel; scales) + bias) + residual, channels last, q being
    `jaxops.fake_quantize`: what rounding will do, trained.

    The parameters are `kernel[*window, in / groups, out]` and `bias[out]` of the layer it is made from, `scales` as
    those of `QuantizedConv`, and `input_scale[]`: steps that are learned as in `FakeQuantizedLinear`.

    Args:
      conv: an `nnx.Conv` or a `jaxops.nn.Conv`; what its mask hides stays zero.
      dtype: int8 or int4, of the weights.
      group_size: how many input channels, at each place of the window, share a scale, a divisor of them; None: all
        numbers of an output channel share one.
      input_scale: the first step of the inputs, in 8 bits; None: they are not quantised.

    Raises:
      TypeError: `conv` is no such layer, or dtype neither int8 nor int4.
      ValueError: `group_size` does not divide the channels.

    Source: Esser et al., LSQ, arXiv:1902.08153.
    """

    def __init__(
        self,
        conv: nnx.Conv,
        dtype: Any = jnp.int8,
        *,
        group_size: int | None = None,
        input_scale: float | None = None,
    ):
        self.window = Window.of("FakeQuantizedConv", conv)
        weights = self.window.quantized(kernel_of(conv), dtype, group_size=group_size)
        super().__init__(conv, dtype, weights, input_scale)
        self.mask, self.activation = conv.mask, getattr(conv, "activation", None)
        self.implementation = getattr(conv, "implementation", None)

    def __call__(self, x: jax.Array, out_sharding: Any = None, *, residual: jax.Array | None = None) -> jax.Array:
        """`x[…, *spatial, in]` to `[…, *spatial, out]`; `residual`, of the shape of the result, is added at the end;
        `out_sharding` must be None."""
        if out_sharding is not None:
            raise ValueError(f"FakeQuantizedConv: out_sharding must be None, got {out_sharding}")
        images, kernel = fake_quantized(jnp.asarray(x, self.dtype), kernel_of(self), *self._steps())
        options: dict[str, Any] = dict(activation=self.activation, implementation=self.implementation)
        return self.window(images, kernel, flat_bias(self), residual, **options)

    def converted(self, implementation: Implementation = None) -> QuantizedConv:
        """The layer for inference, with the steps that were learned."""
        weights = self.window.rounded(kernel_of(self), self.scales[...], self.weights)
        options = self._for_inference() | dict(activation=self.activation, implementation=implementation)
        return QuantizedConv(weights, flat_bias(self), window=self.window, **options)


def fake_quantized(
    x: jax.Array, kernel: jax.Array, scales: jax.Array, input_scale: jax.Array | None, weights: str
) -> tuple[jax.Array, jax.Array]:
    """q(x; input_scale) and q(kernel; scales), both in the dtype of x."""
    if input_scale is not None:
        x = fake_quantize(x, _learned(input_scale, x.size, 127).reshape((1,) * x.ndim))
    numbers = kernel.size // max(scales.size, 1)
    kernel = fake_quantize(kernel, _learned(scales, numbers, jnp.iinfo(weights).max), weights)
    return x, kernel.astype(x.dtype)


def fake_quantized_product(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    scales: jax.Array,
    input_scale: jax.Array | None,
    weights: str,
) -> jax.Array:
    """q(x; input_scale) · q(kernel; scales) + bias, of rows x[…, k]: what NNX and Linen layers share."""
    x, kernel = fake_quantized(x, kernel, scales, input_scale, weights)
    y = x @ kernel
    return y if bias is None else y + bias.astype(y.dtype)


def rounded(kernel: jax.Array, scales: jax.Array, dtype: str) -> Quantized:
    """kernel[k, n] by steps that were learned."""
    most, scales = int(jnp.iinfo(dtype).max), positive(scales)
    rows = jnp.repeat(scales, kernel.shape[0] // scales.shape[0], axis=0)
    values = jnp.clip(jnp.round(kernel.astype(jnp.float32) / rows), -most, most).astype(dtype)
    return Quantized(values, scales)


def kernel_of(layer: Any) -> jax.Array:
    """The kernel of a layer, zero where a mask says so."""
    return masked(layer.kernel[...], getattr(layer, "mask", None))


def flat_bias(linear: Any) -> jax.Array | None:
    """The bias of a layer as [out], or None."""
    return None if linear.bias is None else linear.bias[...].reshape(-1)


def _learned(scale: jax.Array, numbers: int, largest: int) -> jax.Array:
    """`scale`, positive, with its gradient divided by √(numbers · largest)."""
    share = 1 / math.sqrt(max(numbers, 1) * largest)
    scale = positive(scale)
    constant = jax.lax.stop_gradient(scale)
    return constant + share * (scale - constant)  # exactly `scale`, so that ties are rounded as after `convert`


def positive(scale: jax.Array) -> jax.Array:
    """A step that training pushed to 0 or below would divide by 0."""
    return jnp.maximum(scale, jnp.finfo(jnp.float32).tiny * 1e8)
