"""The gated feed-forward layer (SwiGLU, GeGLU, …)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static
from jaxops.ops.activations import silu
from jaxops.ops.gated_linear_unit import gated_linear_unit
from jaxops.ops.matmul import matmul

_KERNEL_INIT = nnx.initializers.lecun_normal()


def gated_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    dtype: Any,
    precision: Any,
    implementation: Implementation,
) -> jax.Array:
    """(activation(x · gate) ∘ (x · up)) · down, in `dtype` or the promoted one: what NNX and Linen layers share."""
    dtype = jnp.result_type(x, gate, up, down) if dtype is None else dtype
    x, gate, up, down = (jnp.asarray(array, dtype) for array in (x, gate, up, down))
    options: dict[str, Any] = {"precision": precision, "implementation": implementation}
    return matmul(gated_linear_unit(x, gate, up, activation=activation, **options), down, **options)


class GatedMLP(nnx.Module):
    """y = (activation(x · W_gate) ∘ (x · W_up)) · W_down.

    The parameters are `gate.kernel[in, hidden]`, `up.kernel[in, hidden]` and `down.kernel[hidden, out]`, each an
    `nnx.Linear` without bias.

    Args:
      in_features, hidden_features, out_features: sizes; `out_features` defaults to `in_features`.
      activation: any elementwise function; silu gives SwiGLU, gelu gives GeGLU.
      dtype, param_dtype, precision, kernel_init, rngs: as in `nnx.Linear`.
      kernel_metadata: of `gate` and `up`; `down_kernel_metadata`: of `down` (default: `kernel_metadata`).
      implementation: None | "pallas" | "xla" | a sequence of them.

    Source: https://arxiv.org/abs/2002.05202
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: Callable[[jax.Array], jax.Array] = silu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., jax.Array] = _KERNEL_INIT,
        kernel_metadata: Mapping[str, Any] | None = None,
        down_kernel_metadata: Mapping[str, Any] | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        def linear(inputs: int, outputs: int, metadata: Mapping[str, Any] | None) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                kernel_metadata=metadata or {},
                rngs=rngs,
            )

        self.gate = linear(in_features, hidden_features, kernel_metadata)
        self.up = linear(in_features, hidden_features, kernel_metadata)
        self.down = linear(
            hidden_features,
            in_features if out_features is None else out_features,
            down_kernel_metadata or kernel_metadata,
        )
        self.activation = activation
        self.dtype = dtype
        self.precision = precision
        self.implementation = static(implementation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., in_features]` to `[..., out_features]`."""
        if not all(isinstance(part, nnx.Linear) for part in (self.gate, self.up, self.down)):
            # layers that were put in their place, as quantised ones: their kernels are no arrays to be fused
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return gated_mlp(
            x,
            self.gate.kernel[...],
            self.up.kernel[...],
            self.down.kernel[...],
            activation=self.activation,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
        )
