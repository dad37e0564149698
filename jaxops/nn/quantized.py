"""Layers whose weights are in few bits: for inference, made from trained ones, and for training with what they will
round.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static
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

    def rows(self, x: jax.Array) -> jax.Array:
        """x[…, *inputs] as […, k]."""
        return x.reshape(*x.shape[: x.ndim - len(self.inputs)], self.flat[0])

    def columns(self, y: jax.Array) -> jax.Array:
        """y[…, n] as […, *outputs]."""
        return y.reshape(*y.shape[:-1], *self.outputs)


class QuantizedLinear(nnx.Module):
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
        if activations not in (None, "int8"):
            raise ValueError(f"QuantizedLinear: activations must be None or 'int8', got {activations!r}")
        if activation_scale is not None and activations is None:
            raise ValueError("QuantizedLinear: activation_scale is for activations='int8', got activations=None")
        optional = lambda x: None if x is None else QuantizedWeight(jnp.asarray(x))
        self.values, self.scales = QuantizedWeight(weights.values), QuantizedWeight(weights.scales)
        self.zeros = optional(weights.zeros)
        self.bias = None if bias is None else nnx.Param(bias)
        self.input_scales, self.activation_scale = optional(input_scales), optional(activation_scale)
        k, n = weights.values.shape
        self.shapes = shapes or Shapes((k,), (n,))
        self.dtype, self.activations, self.implementation = dtype, activations, static(implementation)

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
        if self.input_scales is not None:
            x = (x / self.input_scales[...]).astype(x.dtype)
        optional = {name: None if (v := getattr(self, name)) is None else v[...] for name in ("zeros", "bias")}
        scales: dict[str, Any] = {}
        dtype = x.dtype
        if self.activation_scale is not None:
            step = self.activation_scale[...].astype(jnp.float32)
            x = jnp.clip(jnp.round(x.astype(jnp.float32) / step), -127, 127).astype(jnp.int8)
            scales = {"x_scales": jnp.broadcast_to(step, (*x.shape[:-1], 1))}
        elif self.activations is not None:
            quantized = quantize(x)
            x, scales = quantized.values, {"x_scales": quantized.scales}
        y = quantized_matmul(
            x,
            self.values[...],
            self.scales[...],
            dtype=dtype,
            implementation=self.implementation,
            **optional,
            **scales,
        )
        return self.shapes.columns(y)


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


class FakeQuantizedLinear(nnx.Module):
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
        self.dtype, self.weights = linear.dtype, jnp.dtype(dtype).name
        if self.weights not in INTEGERS:
            raise TypeError(f"FakeQuantizedLinear: dtype must be one of {', '.join(INTEGERS)}, got {self.weights}")
        self.kernel = linear.kernel
        self.bias = linear.bias
        self.scales = nnx.Param(quantize(kernel, dtype, axis=0, group_size=group_size).scales)
        self.input_scale = None if input_scale is None else nnx.Param(jnp.float32(input_scale))

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """`x[…, *inputs]` to `[…, *outputs]`; `out_sharding` must be None."""
        if out_sharding is not None:
            raise ValueError(f"FakeQuantizedLinear: out_sharding must be None, got {out_sharding}")
        kernel = self.kernel[...].reshape(self.shapes.flat)
        x = self.shapes.rows(jnp.asarray(x, self.dtype))
        if self.input_scale is not None:
            step = _learned(self.input_scale[...], x.size, 127)
            x = fake_quantize(x, step.reshape((1,) * x.ndim))
        numbers = kernel.size // max(self.scales[...].size, 1)
        kernel = fake_quantize(kernel, _learned(self.scales[...], numbers, jnp.iinfo(self.weights).max), self.weights)
        y = x @ kernel.astype(x.dtype)
        bias = self.bias[...].reshape(-1).astype(y.dtype) if self.bias is not None else 0
        return self.shapes.columns(y + bias)

    def converted(self, implementation: Implementation = None) -> QuantizedLinear:
        """The layer for inference, with the steps that were learned."""
        kernel, scales = self.kernel[...].reshape(self.shapes.flat), _positive(self.scales[...])
        most = int(jnp.iinfo(self.weights).max)
        rows = jnp.repeat(scales, kernel.shape[0] // scales.shape[0], axis=0)
        values = jnp.clip(jnp.round(kernel.astype(jnp.float32) / rows), -most, most).astype(self.weights)
        return QuantizedLinear(
            Quantized(values, scales),
            flat_bias(self),
            dtype=self.dtype,
            activations=None if self.input_scale is None else "int8",
            activation_scale=None if self.input_scale is None else _positive(self.input_scale[...]),
            shapes=self.shapes,
            implementation=implementation,
        )


def flat_bias(linear: Any) -> jax.Array | None:
    """The bias of a layer as [out], or None."""
    return None if linear.bias is None else linear.bias[...].reshape(-1)


def _learned(scale: jax.Array, numbers: int, largest: int) -> jax.Array:
    """`scale`, positive, with its gradient divided by √(numbers · largest)."""
    share = 1 / math.sqrt(max(numbers, 1) * largest)
    scale = _positive(scale)
    return scale * share + jax.lax.stop_gradient(scale * (1 - share))


def _positive(scale: jax.Array) -> jax.Array:
    """A step that training pushed to 0 or below would divide by 0."""
    return jnp.maximum(scale, jnp.finfo(jnp.float32).tiny * 1e8)
