"""The convolution layer, with what comes after it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import canonicalize_padding

from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static
from jaxops.ops.conv import conv
from jaxops.ops.conv_transpose import conv_transpose

_SURROUNDED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}  # name of a padding → mode of `jnp.pad`


def _per_axis(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    return (value or 1,) * rank if value is None or isinstance(value, int) else tuple(value)


def _channels_last(rank: int) -> tuple[str, str, str]:
    """The dimension numbers of so many spatial axes."""
    spatial = "".join(chr(ord("a") + axis) for axis in range(rank))
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


def _batches(layer: str, x: jax.Array, rank: int, channels: int) -> tuple[int, ...]:
    """The batch axes of x. Raises `ValueError` unless spatial axes and channels follow."""
    if x.ndim < rank + 1 or x.shape[-1] != channels:
        raise ValueError(f"{layer}: an input must end in {rank} spatial axes and {channels} channels, got {x.shape}")
    return x.shape[: x.ndim - rank - 1]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    strides: int | Sequence[int] | None,
    padding: Any,
    input_dilation: int | Sequence[int] | None,
    kernel_dilation: int | Sequence[int] | None,
    function: Callable[..., jax.Array] = conv,
    **options: Any,
) -> jax.Array:
    """A convolution of channels-last x with kernel[..., in, out]: what NNX and Linen layers share.

    Sizes and paddings as in `nnx.Conv`, any number of batch axes; options: those of `function`, which takes the
    arguments of `jaxops.conv`.
    """
    rank = kernel.ndim - 2
    batch = _batches("Conv", x, rank, kernel.shape[-2] * options["feature_group_count"])
    dilation = _per_axis(kernel_dilation, rank)
    x = x.reshape(-1, *x.shape[len(batch) :])
    if residual is not None:
        residual = residual.reshape(-1, *residual.shape[len(batch) :])
    padding = canonicalize_padding(padding, rank)
    windows = [(size - 1) * d for size, d in zip(kernel.shape, dilation, strict=False)]
    if isinstance(padding, str) and padding in _SURROUNDED:
        around = [(window // 2, (window + 1) // 2) for window in windows]
        x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode=_SURROUNDED[padding])
        padding = "VALID"
    elif padding == "CAUSAL":
        if rank != 1:
            raise ValueError(f"Conv: padding 'CAUSAL' must have one spatial axis, got {rank}")
        padding = [(windows[0], 0)]
    y = function(
        x,
        kernel,
        _per_axis(strides, rank),
        padding,
        lhs_dilation=_per_axis(input_dilation, rank),
        rhs_dilation=dilation,
        dimension_numbers=_channels_last(rank),
        bias=bias,
        residual=residual,
        **options,
    )
    return y.reshape(*batch, *y.shape[1:])


def masked(kernel: jax.Array, mask: jax.Array | None) -> jax.Array:
    """kernel · mask. Raises `ValueError` if they are of different shapes."""
    if mask is None:
        return kernel
    if mask.shape != kernel.shape:
        raise ValueError(f"Conv: mask must have the shape of the kernel, {kernel.shape}, got {mask.shape}")
    return kernel * mask


class Conv(nnx.Conv):
    """y = activation(x ∗ kernel + bias) + residual, channels last.

    A drop-in for `nnx.Conv`: every argument of it but `conv_general_dilated` is accepted, the parameters are the same
    `kernel[*kernel_size, in_features / groups, out_features]` and `bias[out_features]`, and the dtypes are promoted in
    the same way.

    Args:
      in_features, out_features: channels.
      kernel_size: sizes of the window; an int is one axis.
      strides: between windows, one for all axes or one each.
      activation: an elementwise function of a float32 array or None, part of the operator.
      implementation: None | "pallas" | "xla" | a sequence of them.
      **flax_arguments: those of `nnx.Conv`.

    Raises `TypeError` for another convolution, `ValueError` for an input that does not fit. Source:
    https://arxiv.org/abs/1603.07285
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        if "conv_general_dilated" in flax_arguments:
            raise TypeError("Conv: conv_general_dilated must be left out: it is jaxops.conv; others are nnx.Conv's")
        super().__init__(in_features, out_features, kernel_size, strides, rngs=rngs, **flax_arguments)
        self.activation = activation
        self.implementation = static(implementation)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None, *, residual: jax.Array | None = None) -> jax.Array:
        """`inputs[..., *spatial, in_features]`, with any number of batch axes, to `[..., *spatial, out_features]`.

        residual: of the shape of the result, added at the end.
        """
        kernel = masked(self.kernel[...], self.mask)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        return convolve(
            inputs,
            kernel,
            bias,
            residual,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=out_sharding,
            activation=self.activation,
            implementation=self.implementation,
        )


def convolve_transposed(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    strides: int | Sequence[int] | None,
    padding: Any,
    kernel_dilation: int | Sequence[int] | None,
    transpose_kernel: bool,
    **options: Any,
) -> jax.Array:
    """A transposed convolution of channels-last x: what NNX and Linen layers share.

    As `convolve`; kernel[..., in, out], with `transpose_kernel` [..., out, in].
    """
    rank = kernel.ndim - 2
    batch = _batches("ConvTranspose", x, rank, kernel.shape[-1 if transpose_kernel else -2])
    padding = canonicalize_padding(padding, rank)
    if padding == "CAUSAL" or (isinstance(padding, str) and padding in _SURROUNDED):
        raise ValueError(f"ConvTranspose: padding must be 'SAME', 'VALID' or pairs (low, high), got {padding!r}")
    flat = lambda a: a.reshape(-1, *a.shape[len(batch) :])
    y = conv_transpose(
        flat(x),
        kernel,
        _per_axis(strides, rank),
        padding,
        _per_axis(kernel_dilation, rank),
        _channels_last(rank),
        transpose_kernel,
        bias=bias,
        residual=None if residual is None else flat(residual),
        **options,
    )
    return y.reshape(*batch, *y.shape[1:])


class ConvTranspose(nnx.ConvTranspose):
    """y = activation(z + bias) + residual, z as of `jaxops.conv_transpose`, channels last.

    A drop-in for `nnx.ConvTranspose`, with the same parameters and promotion of dtypes.

    Args:
      in_features, out_features: channels.
      kernel_size: sizes of the window; an int is one axis.
      strides: how many times as long an axis becomes, one for all or one each.
      activation: an elementwise function of a float32 array or None, part of the operator.
      implementation: None | "pallas" | "xla" | a sequence of them.
      **flax_arguments: those of `nnx.ConvTranspose`; padding must be "SAME", "VALID" or sizes.

    Raises `ValueError` for an input or a mask that does not fit, or another padding. Source:
    https://arxiv.org/abs/1603.07285
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        super().__init__(in_features, out_features, kernel_size, strides, rngs=rngs, **flax_arguments)
        self.activation = activation
        self.implementation = static(implementation)

    def __call__(self, inputs: jax.Array, *, residual: jax.Array | None = None) -> jax.Array:
        """`inputs[..., *spatial, in_features]`, with any number of batch axes, to `[..., *spatial, out_features]`.

        residual: of the shape of the result, added at the end.
        """
        kernel = masked(self.kernel[...], self.mask)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        return convolve_transposed(
            inputs,
            kernel,
            bias,
            residual,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            activation=self.activation,
            implementation=self.implementation,
        )
