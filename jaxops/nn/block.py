"""One layer of a transformer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxops.dispatch import Implementation
from jaxops.nn.attention import MultiHeadAttention
from jaxops.nn.implementation import without_kernels
from jaxops.nn.mlp import GatedMLP
from jaxops.nn.norms import LayerNorm, RMSNorm
from jaxops.ops.activations import silu


class TransformerBlock(nnx.Module):
    """h = x + attention(norm(x));  y = h + mlp(norm(h)): normalisation before each part, as in Llama.

    The first addition and the norm after it are one operator, `add_rms_norm` or `add_layer_norm`.

    The submodules are `attention_norm`, `attention`, `mlp_norm` and `mlp`.

    Args:
      num_heads, in_features, hidden_features: heads of the attention, width of the stream, width inside the `GatedMLP`.
      num_kv_heads: key and value heads; default `num_heads`.
      activation: of the `GatedMLP`.
      norm: the layer of the two norms, `RMSNorm` or `LayerNorm`, or a function with their arguments.
      epsilon: of the norms.
      use_bias: of the attention's projections.
      dtype, param_dtype, precision, rngs: as in flax.
      implementation: None | "pallas" | "xla" | a sequence of them, for every operator inside that has kernels.
      **attention_arguments: further ones of `MultiHeadAttention` (`is_causal`, `use_rope`, `local_window_size`, …).
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        hidden_features: int,
        *,
        num_kv_heads: int | None = None,
        activation: Callable[[jax.Array], jax.Array] = silu,
        norm: Callable[..., Any] = RMSNorm,
        epsilon: float = 1e-6,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **attention_arguments: Any,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = norm(in_features, epsilon=epsilon, implementation=implementation, **common)
        self.attention = MultiHeadAttention(
            num_heads,
            in_features,
            num_kv_heads=num_kv_heads,
            use_bias=use_bias,
            precision=precision,
            implementation=implementation,
            **common,
            **attention_arguments,
        )
        self.mlp_norm = norm(in_features, epsilon=epsilon, implementation=implementation, **common)
        self.mlp = GatedMLP(
            in_features,
            hidden_features,
            activation=activation,
            precision=precision,
            implementation=without_kernels(implementation),
            **common,
        )

    def __call__(self, x: jax.Array, **attention_arguments: Any) -> jax.Array:
        """`x[batch…, T, in_features]` to the same shape; the keywords are those of a call of `MultiHeadAttention`."""
        attended = self.attention(self.attention_norm(x), **attention_arguments)
        if isinstance(self.mlp_norm, (RMSNorm, LayerNorm)):
            normal, x = self.mlp_norm(attended, residual=x)
        else:
            x = x + attended
            normal = self.mlp_norm(x)
        return x + self.mlp(normal)

    def init_cache(self, input_shape: tuple[int, ...], dtype: Any = jnp.float32) -> None:
        """The attention's cache for decoding `[batch…, length, in_features]`."""
        self.attention.init_cache(input_shape, dtype)
