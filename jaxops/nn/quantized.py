"""Layers whose weights are in few bits: for inference, made from trained ones."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static
from jaxops.ops.quantized_matmul import quantized_matmul
from jaxops.quantization import Quantized, quantize


class QuantizedWeight(nnx.Variable):
    """Values, scales or zero points of quantised weights: not trained, and no `nnx.Param`."""


class QuantizedLinear(nnx.Module):
    """y = x · (scales · (values - zeros)) + bias.

    The variables are `values[in, out]`, `scales[groups, out]`, `zeros[groups, out]` or None, and `bias[out]` or None.
    `of` makes one from a layer with a kernel.

    Args:
      weights: as `jaxops.quantize(kernel, axis=0, …)` returns them.
      bias: floating [out] or None.
      dtype: of the product and of y; None: that of x.
      activations: None multiplies x as it is (W8A16, W4A16); "int8" quantises each row of x first, for products of
        integers (W8A8).
      implementation: None | "pallas" | "xla" | a sequence of them.

    Raises:
      ValueError: `activations` is neither None nor "int8".
    """

    def __init__(
        self,
        weights: Quantized,
        bias: jax.Array | None = None,
        *,
        dtype: Any = None,
        activations: str | None = None,
        implementation: Implementation = None,
    ):
        if activations not in (None, "int8"):
            raise ValueError(f"QuantizedLinear: activations must be None or 'int8', got {activations!r}")
        self.values = QuantizedWeight(weights.values)
        self.scales = QuantizedWeight(weights.scales)
        self.zeros = None if weights.zeros is None else QuantizedWeight(weights.zeros)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype, self.activations, self.implementation = dtype, activations, static(implementation)

    @classmethod
    def of(
        cls,
        linear: nnx.Linear,
        dtype: Any = jnp.int8,
        *,
        group_size: int | None = None,
        symmetric: bool = True,
        activations: str | None = None,
        implementation: Implementation = None,
    ) -> Self:
        """The layer with values, scales, zeros = quantize(linear.kernel, dtype, axis=0, …), and the bias of `linear`.

        Args:
          linear: an `nnx.Linear`, whose kernel is [in, out].
          dtype, group_size, symmetric: as in `jaxops.quantize`. activations, implementation: as in the constructor.

        Raises:
          TypeError: `linear` is no `nnx.Linear`, or `jaxops.quantize` refuses a dtype.
          ValueError: `group_size` does not divide the rows of the kernel, or `activations` is unknown.
        """
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"QuantizedLinear.of: linear must be an nnx.Linear, got {type(linear).__name__}")
        weights = quantize(linear.kernel[...], dtype, axis=0, group_size=group_size, symmetric=symmetric)
        bias = None if linear.bias is None else linear.bias[...]
        return cls(weights, bias, dtype=linear.dtype, activations=activations, implementation=implementation)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        optional = {name: None if (v := getattr(self, name)) is None else v[...] for name in ("zeros", "bias")}
        scales: dict[str, Any] = {}
        dtype = x.dtype
        if self.activations is not None:
            quantized = quantize(x)
            x, scales = quantized.values, {"x_scales": quantized.scales}
        return quantized_matmul(
            x,
            self.values[...],
            self.scales[...],
            dtype=dtype,
            implementation=self.implementation,
            **optional,
            **scales,
        )
