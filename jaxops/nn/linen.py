"""The layers of `jaxops.nn` as Linen modules: the same mathematics, parameter names and shapes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jaxops.dispatch import Implementation
from jaxops.nn import quantized
from jaxops.nn.attention import AttentionOptions, attend, sources
from jaxops.nn.conv import convolve, convolve_transposed, masked
from jaxops.nn.implementation import without_kernels
from jaxops.nn.mlp import gated_mlp
from jaxops.nn.moe import KERNEL_INIT, mixture
from jaxops.nn.norms import batch_norm_or_running, norm_or_add
from jaxops.ops.activations import silu
from jaxops.ops.add_layer_norm import add_layer_norm
from jaxops.ops.add_rms_norm import add_rms_norm
from jaxops.ops.group_norm import group_norm, instance_norm
from jaxops.ops.layer_norm import layer_norm
from jaxops.ops.rms_norm import rms_norm
from jaxops.ops.rope import RopeScaling
from jaxops.quantization import INTEGERS, Quantized, quantize

Initializer = Callable[..., jax.Array]


class RMSNorm(linen.Module):
    """y = x · rsqrt(mean(x²) + epsilon) · (scale + scale_offset), over the last axis.

    Fields as in `flax.linen.RMSNorm`. Called with a `residual` it gives (the normalised sum, x + residual).
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = linen.initializers.ones
    scale_offset: float = 0.0
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None) -> Any:
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype) if self.use_scale else None
        return norm_or_add(
            (rms_norm, add_rms_norm),
            x,
            residual,
            (scale,),
            functools.partial(linen.dtypes.promote_dtype, dtype=self.dtype),
            eps=self.epsilon,
            scale_offset=self.scale_offset,
            implementation=self.implementation,
        )


def _affine(norm: Any, x: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    """The parameters scale and bias of the channels of x, as far as the layer has them."""
    scale = norm.param("scale", norm.scale_init, x.shape[-1:], norm.param_dtype) if norm.use_scale else None
    bias = norm.param("bias", norm.bias_init, x.shape[-1:], norm.param_dtype) if norm.use_bias else None
    return scale, bias


class LayerNorm(linen.Module):
    """y = (x - mean(x)) · rsqrt(var(x) + epsilon) · (scale + scale_offset) + bias, over the last axis.

    Fields as in `flax.linen.LayerNorm`. Called with a `residual` it gives (the normalised sum, x + residual).
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = linen.initializers.zeros
    scale_init: Initializer = linen.initializers.ones
    scale_offset: float = 0.0
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None) -> Any:
        scale, bias = _affine(self, x)
        return norm_or_add(
            (layer_norm, add_layer_norm),
            x,
            residual,
            (scale, bias),
            functools.partial(linen.dtypes.promote_dtype, dtype=self.dtype),
            eps=self.epsilon,
            scale_offset=self.scale_offset,
            implementation=self.implementation,
        )


class GroupNorm(linen.Module):
    """y = (x - mean) · rsqrt(var + epsilon) · scale + bias, the mean and the variance over all axes but the first and
    the last, and over the channels of a group.

    Fields as in `flax.linen.GroupNorm`.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = linen.initializers.zeros
    scale_init: Initializer = linen.initializers.ones
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        match self.num_groups, self.group_size:
            case int(num_groups), None:
                pass
            case None, int(size) if size > 0 and channels % size == 0:
                num_groups = channels // size
            case given:
                raise ValueError(
                    "GroupNorm: num_groups or group_size must be a divisor of the "
                    f"{channels} channels of x, and the other None, got {given[0]} and {given[1]}"
                )
        scale, bias = _affine(self, x)
        x, scale, bias = linen.dtypes.promote_dtype(x, scale, bias, dtype=self.dtype)
        return group_norm(x, scale, bias, num_groups=num_groups, eps=self.epsilon, implementation=self.implementation)


class InstanceNorm(linen.Module):
    """y = (x - mean) · rsqrt(var + epsilon) · scale + bias, the mean and the variance of each channel in each entry of
    the batch: over all axes but the first and the last.

    Fields as in `flax.linen.InstanceNorm`.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = linen.initializers.zeros
    scale_init: Initializer = linen.initializers.ones
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = _affine(self, x)
        x, scale, bias = linen.dtypes.promote_dtype(x, scale, bias, dtype=self.dtype)
        return instance_norm(x, scale, bias, eps=self.epsilon, implementation=self.implementation)


class BatchNorm(linen.Module):
    """y = (x - mean) · rsqrt(var + epsilon) · scale + bias, the mean and the variance of each channel, over all axes
    but the last: of x in training, the running averages of the collection "batch_stats" in evaluation.

    Fields as in `flax.linen.BatchNorm`. The call of `init` leaves the running averages as they begin.
    """

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = linen.initializers.zeros
    scale_init: Initializer = linen.initializers.ones
    axis_name: Any = None
    implementation: Implementation = None

    @linen.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        evaluating = linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale, bias = _affine(self, x)
        x, scale, bias = linen.dtypes.promote_dtype(x, scale, bias, dtype=self.dtype)
        y, statistics = batch_norm_or_running(
            x,
            (mean.value, var.value),
            (scale, bias),
            evaluating,
            self.momentum,
            mask=mask,
            axis_name=None if self.is_initializing() else self.axis_name,
            eps=self.epsilon,
            implementation=self.implementation,
        )
        if not evaluating and not self.is_initializing():
            mean.value, var.value = statistics
        return y


class Conv(linen.Module):
    """y = activation(x ∗ kernel + bias) + residual, channels last.

    Fields as in `flax.linen.Conv`, and `activation`. Called with a `residual` of the shape of the result it is added at
    the end.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: jax.Array | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = linen.linear.default_kernel_init
    bias_init: Initializer = linen.initializers.zeros
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None) -> jax.Array:
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        shape = (*size, x.shape[-1] // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        kernel = masked(kernel, self.mask)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = linen.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return convolve(
            x,
            kernel,
            bias,
            residual,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            activation=self.activation,
            implementation=self.implementation,
        )


class ConvTranspose(linen.Module):
    """y = activation(z + bias) + residual, z as of `jaxops.conv_transpose`, channels last.

    Fields as in `flax.linen.ConvTranspose`, and `activation`. Called with a `residual` of the shape of the result it is
    added at the end. Padding must be "SAME", "VALID" or sizes.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = None
    padding: Any = "SAME"
    kernel_dilation: int | Sequence[int] | None = None
    use_bias: bool = True
    mask: jax.Array | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = linen.linear.default_kernel_init
    bias_init: Initializer = linen.initializers.zeros
    transpose_kernel: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None) -> jax.Array:
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        channels = (self.features, x.shape[-1]) if self.transpose_kernel else (x.shape[-1], self.features)
        kernel = masked(self.param("kernel", self.kernel_init, (*size, *channels), self.param_dtype), self.mask)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = linen.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return convolve_transposed(
            x,
            kernel,
            bias,
            residual,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            activation=self.activation,
            implementation=self.implementation,
        )


def _variables(weights: Quantized, bias: jax.Array | None, **steps: jax.Array) -> dict[str, Any]:
    """Those of a quantised layer."""
    kept = {name: x for name, x in (weights._asdict() | steps).items() if x is not None}
    return {"quantized": kept} | ({} if bias is None else {"params": {"bias": bias}})


def _learned(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The step of the inputs that was trained, if there is one."""
    return {"activation_scale": quantized.positive(params["input_scale"])} if "input_scale" in params else {}


def _window(layer: Any, kernel: tuple[int, ...]) -> quantized.Window:
    names = ("strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count")
    return quantized.Window(kernel, *(getattr(layer, name) for name in names))


def _few_bits(layer: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Of what the NNX layer is made: the collection "quantized", for which `init` draws a kernel, and the bias."""
    if not layer.has_variable("quantized", "values"):
        kernel = layer.kernel_init(layer.make_rng("params"), shape, layer.param_dtype)
        for name, x in layer.of({"kernel": kernel})["quantized"].items():
            layer.variable("quantized", name, lambda x=x: x)
    kept = lambda name: layer.get_variable("quantized", name)
    bias = layer.param("bias", layer.bias_init, shape[-1:], layer.param_dtype) if layer.use_bias else None
    return dict(
        weights=Quantized(kept("values"), kept("scales"), kept("zeros")),
        bias=bias,
        dtype=layer.dtype,
        activations=layer.activations,
        activation_scale=kept("activation_scale"),
        input_scales=kept("input_scales"),
        implementation=layer.implementation,
    )


class QuantizedLinear(linen.Module):
    """y = (x / input_scales) · (scales · (values - zeros)) + bias.

    Fields as in `flax.linen.Dense`; `weights`, `group_size` and `symmetric` as in `jaxops.quantize(kernel, weights,
    axis=0, …)`, and `activations`, None or "int8". The collection "quantized" holds the variables of
    `jaxops.nn.QuantizedLinear`; `init` makes them of a kernel drawn by chance, `of` of a trained one.
    """

    features: int
    weights: Any = "int8"
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = linen.linear.default_kernel_init
    bias_init: Initializer = linen.initializers.zeros
    implementation: Implementation = None

    @linen.nowrap
    def of(self, params: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The variables, of the trained parameters of a `linen.Dense`, or of a `FakeQuantizedLinear`, whose steps they
        keep."""
        kernel, bias = params["kernel"], params.get("bias")
        if "scales" in params:
            return _variables(quantized.rounded(kernel, params["scales"], self.weights), bias, **_learned(params))
        options: dict[str, Any] = dict(group_size=self.group_size, symmetric=self.symmetric)
        return _variables(quantize(kernel, self.weights, axis=0, **options), bias)

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return quantized.QuantizedLinear(**_few_bits(self, (x.shape[-1], self.features)))(x)


class QuantizedConv(linen.Module):
    """y = activation((x / input_scales) ∗ (scales · (values - zeros)) + bias) + residual, channels last.

    Fields as in `Conv`, and as in `QuantizedLinear`; a group is of input channels at each place of the window. The
    collection "quantized" holds the variables of `jaxops.nn.QuantizedConv`; `init` makes them of a kernel drawn by
    chance, `of` of a trained one.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    weights: Any = "int8"
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = linen.linear.default_kernel_init
    bias_init: Initializer = linen.initializers.zeros
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: Implementation = None

    @linen.nowrap
    def of(self, params: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The variables, of the trained parameters of a `linen.Conv`, or of a `FakeQuantizedConv`, whose steps they
        keep."""
        kernel, bias = params["kernel"], params.get("bias")
        window = _window(self, kernel.shape)
        if "scales" in params:
            return _variables(window.rounded(kernel, params["scales"], self.weights), bias, **_learned(params))
        options: dict[str, Any] = dict(group_size=self.group_size, symmetric=self.symmetric)
        return _variables(window.quantized(kernel, self.weights, **options), bias)

    @linen.compact
    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None) -> jax.Array:
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        shape = (*size, x.shape[-1] // self.feature_group_count, self.features)
        made = _few_bits(self, shape)
        layer = quantized.QuantizedConv(**made, window=_window(self, shape), activation=self.activation)
        return layer(x, residual=residual)


class QuantizedEmbed(linen.Module):
    """y_i = scales[i] · values[i]: a table of vectors, each with its own scale.

    Fields as in `flax.linen.Embed`, and `weights` as in `jaxops.quantize`. The collection "quantized" holds `values`
    and `scales`; `init` makes them of a table drawn by chance, `of` of a trained one.
    """

    num_embeddings: int
    features: int
    weights: Any = "int8"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Initializer = linen.linear.default_embed_init

    def setup(self) -> None:
        shape = (self.num_embeddings, self.features)
        if not self.has_variable("quantized", "values"):
            table = self.embedding_init(self.make_rng("params"), shape, self.param_dtype)
            made = self.of({"embedding": table})["quantized"]
        kept = lambda name: self.variable("quantized", name, lambda: made[name]).value
        weights = Quantized(kept("values"), kept("scales"))
        self.table = quantized.QuantizedEmbed(weights, dtype=self.dtype or self.param_dtype)

    @linen.nowrap
    def of(self, params: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The variables, of the trained parameter of a `linen.Embed`."""
        return _variables(quantize(params["embedding"], self.weights), None)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.table(inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """query[…, features] · tableᵀ."""
        return self.table.attend(query)


class FakeQuantizedLinear(linen.Module):
    """y = q(x; input_scale) · q(kernel; scales) + bias, q being `jaxops.fake_quantize`: what rounding will do, trained.

    Fields as in `flax.linen.Dense`; `weights` ("int8" or "int4"), `group_size`, and `input_scale`, the first step of
    the inputs, or None: they are not quantised. Its parameters are those of `jaxops.nn.FakeQuantizedLinear`;
    `QuantizedLinear(…).of(params)` makes the variables for inference of them.
    """

    features: int
    weights: Any = "int8"
    group_size: int | None = None
    input_scale: float | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = linen.linear.default_kernel_init
    bias_init: Initializer = linen.initializers.zeros

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        steps = functools.partial(quantize, dtype=_integers(self), axis=0, group_size=self.group_size)
        kernel, bias, *learned = _trained(self, (x.shape[-1], self.features), steps)
        return quantized.fake_quantized_product(jnp.asarray(x, self.dtype), kernel, bias, *learned)


class FakeQuantizedConv(linen.Module):
    """y = activation(q(x; input_scale) ∗ q(kernel; scales) + bias) + residual, channels last, q being
    `jaxops.fake_quantize`: what rounding will do, trained.

    Fields as in `Conv`, without a mask, and as in `FakeQuantizedLinear`; a group is of input channels at each place of
    the window. Its parameters are those of `jaxops.nn.FakeQuantizedConv`; `QuantizedConv(…).of(params)` makes the
    variables for inference of them.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    weights: Any = "int8"
    group_size: int | None = None
    input_scale: float | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = linen.linear.default_kernel_init
    bias_init: Initializer = linen.initializers.zeros
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None) -> jax.Array:
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        shape = (*size, x.shape[-1] // self.feature_group_count, self.features)
        window = _window(self, shape)
        steps = functools.partial(window.quantized, dtype=_integers(self), group_size=self.group_size)
        kernel, bias, *learned = _trained(self, shape, steps)
        images, kernel = quantized.fake_quantized(jnp.asarray(x, self.dtype), kernel, *learned)
        options: dict[str, Any] = dict(activation=self.activation, implementation=self.implementation)
        return window(images, kernel, bias, residual, **options)


def _integers(layer: Any) -> str:
    weights = jnp.dtype(layer.weights).name
    if weights not in INTEGERS:
        raise TypeError(f"{type(layer).__name__}: weights must be one of {', '.join(INTEGERS)}, got {weights}")
    return weights


def _trained(layer: Any, shape: tuple[int, ...], steps: Callable[[jax.Array], Quantized]) -> tuple[Any, ...]:
    """The parameters of a layer that is trained with what it will round, kernel, bias, scales, input_scale; and the
    name of the integers. `steps` quantises a kernel, for the first scales."""
    kernel = layer.param("kernel", layer.kernel_init, shape, layer.param_dtype)
    bias = layer.param("bias", layer.bias_init, shape[-1:], layer.param_dtype) if layer.use_bias else None
    scales, step = layer.param("scales", lambda _: steps(kernel).scales), None
    if layer.input_scale is not None:
        step = layer.param("input_scale", lambda _: jnp.float32(layer.input_scale))
    return kernel, bias, scales, step, _integers(layer)


class MultiHeadAttention(linen.Module):
    """out = W_out · attention(W_query · x, W_key · x, W_value · x), per head.

    Fields as in `flax.linen.MultiHeadDotProductAttention` and `jaxops.nn.MultiHeadAttention`, whose parameters it has.
    With `decode`, the cache (collection "cache") takes its size from the inputs of `init`; then each call brings the
    next token or tokens.
    """

    num_heads: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: Any = None
    kernel_init: Initializer = linen.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = linen.initializers.zeros
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    decode: bool = False
    normalize_qk: bool = False
    is_causal: bool = False
    use_rope: bool = False
    rope_base: float = 10000.0
    rope_scaling: float | RopeScaling | None = None
    local_window_size: int | tuple[int | None, int | None] | None = None
    logits_soft_cap: float | None = None
    scale: float | None = None
    implementation: Implementation = None

    @linen.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
        input_positions: jax.Array | None = None,
        **attention_arguments: Any,
    ) -> jax.Array:
        """Attends from `inputs_q[batch…, T, features]` to `inputs_k`, `inputs_v` (default: itself), as in NNX."""
        inputs_k, inputs_v = sources(inputs_q, inputs_k, inputs_v)
        features = inputs_q.shape[-1]
        qkv_features = features if self.qkv_features is None else self.qkv_features
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if qkv_features % self.num_heads or self.num_heads % kv_heads:
            raise ValueError(
                f"num_heads: expected a divisor of {qkv_features} features and a multiple of {kv_heads} key heads, "
                f"got {self.num_heads}"
            )
        dense: dict[str, Any] = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }

        def project(name: str, x: jax.Array, heads: int) -> jax.Array:
            return linen.DenseGeneral(
                (heads, qkv_features // self.num_heads),
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
                **dense,
            )(x)

        query = project("query", inputs_q, self.num_heads)
        key, value = project("key", inputs_k, kv_heads), project("value", inputs_v, kv_heads)
        if self.normalize_qk:
            norm: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
            query, key = LayerNorm(name="query_ln", **norm)(query), LayerNorm(name="key_ln", **norm)(key)

        dropout: dict[str, Any] = {}
        if self.dropout_rate > 0.0 and not linen.merge_param("deterministic", self.deterministic, deterministic):
            dropout = {
                "dropout_rng": self.make_rng("dropout") if dropout_rng is None else dropout_rng,
                "dropout_rate": self.dropout_rate,
                "broadcast_dropout": self.broadcast_dropout,
                "deterministic": False,
            }
        cached: tuple[Any, ...] = ()
        if self.decode:
            filling = self.has_variable("cache", "cached_key")
            cached = (
                self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype),
                self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype),
                self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32)),
            )
            cached = cached if filling else ()  # the call of `init` only sets the cache's size
        options = AttentionOptions(
            is_causal=self.is_causal,
            rope_base=self.rope_base if self.use_rope else None,
            rope_scaling=self.rope_scaling,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            scale=self.scale,
            implementation=self.implementation,
        )
        x, cache = attend(
            query,
            key,
            value,
            options,
            positions=input_positions,
            cache=tuple(variable.value for variable in cached) or None,
            mask=mask,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            **dropout,
            **attention_arguments,
        )
        for variable, new in zip(cached, cache or (), strict=True):
            variable.value = new
        return linen.DenseGeneral(
            features if self.out_features is None else self.out_features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
            **dense,
        )(x)


class _Kernel(linen.Module):
    """A parameter `kernel` under a name of its own, as a Dense layer has it."""

    shape: tuple[int, ...]
    kernel_init: Initializer
    param_dtype: Any

    @linen.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)


class GatedMLP(linen.Module):
    """y = (activation(x · W_gate) ∘ (x · W_up)) · W_down. Fields as in `jaxops.nn.GatedMLP`."""

    hidden_features: int
    out_features: int | None = None
    activation: Callable[[jax.Array], jax.Array] = silu
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = linen.initializers.lecun_normal()
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, out = x.shape[-1], x.shape[-1] if self.out_features is None else self.out_features
        shapes: dict[str, Any] = {
            "gate": (features, self.hidden_features),
            "up": (features, self.hidden_features),
            "down": (self.hidden_features, out),
        }
        kernels = {
            name: _Kernel(shape, self.kernel_init, self.param_dtype, name=name)() for name, shape in shapes.items()
        }
        return gated_mlp(
            x,
            **kernels,
            activation=self.activation,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
        )


class MoE(linen.Module):
    """y = Σ_j w_j · (activation(x · gate_j) ∘ (x · up_j)) · down_j over the top_k experts j. Fields as in
    `jaxops.nn.MoE`, whose parameters it has."""

    hidden_features: int
    num_experts: int
    top_k: int = 2
    out_features: int | None = None
    normalize: bool = True
    activation: Callable[[jax.Array], jax.Array] = silu
    axis_names: str | Sequence[str] = ()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = KERNEL_INIT
    implementation: Implementation = None

    @linen.compact
    def __call__(self, x: jax.Array, *, return_routing: bool = False) -> Any:
        features, out = x.shape[-1], x.shape[-1] if self.out_features is None else self.out_features
        shapes: dict[str, tuple[int, ...]] = {
            "gate": (self.num_experts, features, self.hidden_features),
            "up": (self.num_experts, features, self.hidden_features),
            "down": (self.num_experts, self.hidden_features, out),
        }
        kernels = {
            name: _Kernel(shape, self.kernel_init, self.param_dtype, name=name)() for name, shape in shapes.items()
        }
        router = _Kernel(
            (features, self.num_experts), linen.initializers.lecun_normal(), self.param_dtype, name="router"
        )
        y, routing = mixture(
            x,
            router(),
            **kernels,
            top_k=self.top_k,
            normalize=self.normalize,
            activation=self.activation,
            axis_names=self.axis_names,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
        )
        return (y, routing) if return_routing else y


class TransformerBlock(linen.Module):
    """h = x + attention(norm(x));  y = h + mlp(norm(h)).

    Fields as in `jaxops.nn.TransformerBlock`; `attention_options` are further fields of `MultiHeadAttention`.
    """

    num_heads: int
    hidden_features: int
    num_kv_heads: int | None = None
    activation: Callable[[jax.Array], jax.Array] = silu
    norm: Callable[..., Any] = RMSNorm
    epsilon: float = 1e-6
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: Implementation = None
    attention_options: Any = None

    @linen.compact
    def __call__(self, x: jax.Array, **attention_arguments: Any) -> jax.Array:
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str) -> Any:
            return self.norm(epsilon=self.epsilon, implementation=self.implementation, name=name, **common)

        attention = MultiHeadAttention(
            self.num_heads,
            num_kv_heads=self.num_kv_heads,
            use_bias=self.use_bias,
            precision=self.precision,
            implementation=self.implementation,
            name="attention",
            **common,
            **(self.attention_options or {}),
        )
        mlp = GatedMLP(
            self.hidden_features,
            activation=self.activation,
            precision=self.precision,
            implementation=without_kernels(self.implementation),
            name="mlp",
            **common,
        )
        attended, mlp_norm = attention(norm("attention_norm")(x), **attention_arguments), norm("mlp_norm")
        if isinstance(mlp_norm, (RMSNorm, LayerNorm)):
            normal, x = mlp_norm(attended, residual=x)
        else:
            x = x + attended
            normal = mlp_norm(x)
        return x + mlp(normal)
