"""The mixture of gated feed-forward layers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static
from jaxops.ops.activations import silu
from jaxops.ops.ragged_dot import ragged_dot
from jaxops.routing import Routing, top_k_routing

# A matrix of each expert, as if it stood alone.
KERNEL_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))


def mixture(
    x: jax.Array,
    router: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    top_k: int,
    normalize: bool,
    activation: Callable[[jax.Array], jax.Array],
    axis_names: str | Sequence[str],
    dtype: Any,
    precision: Any,
    implementation: Implementation,
) -> tuple[jax.Array, Routing]:
    """Σ_j w_j · (activation(x · gate_j) ∘ (x · up_j)) · down_j over the top_k experts j of each x[..., in], and who
    went where: what NNX and Linen layers share."""
    dtype = jnp.result_type(x, gate, up, down) if dtype is None else dtype
    tokens = x.reshape(-1, x.shape[-1])
    routing = route(tokens, router, dtype, top_k, normalize=normalize, axis_names=axis_names, precision=precision)
    tokens, gate, up, down = (array.astype(dtype) for array in (tokens, gate, up, down))
    y = gated_experts(
        tokens,
        gate,
        up,
        down,
        routing.group_sizes,
        routing.rows,
        routing.row_weights,
        activation=activation,
        precision=precision,
        implementation=implementation,
    )
    return y.reshape(*x.shape[:-1], y.shape[-1]), routing


def route(tokens: jax.Array, router: jax.Array, dtype: Any, top_k: int, *, precision: Any, **options: Any) -> Routing:
    """`top_k_routing` of tokens · router, of a layer that computes in `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    # The choice of experts is discrete: rounding the logits to 16 bits would change it.
    logits = jnp.matmul(tokens.astype(wide), router.astype(wide), precision=precision)
    return top_k_routing(logits, top_k, **options)


def gated_experts(
    tokens: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    rows: jax.Array,
    row_weights: jax.Array | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array],
    precision: Any,
    implementation: Implementation,
) -> jax.Array:
    """y[rows_i] += w_i · (activation(x_i · gate_j) ∘ (x_i · up_j)) · down_j,  x_i = tokens[rows_i], of group j."""
    wide = jnp.promote_types(tokens.dtype, jnp.float32)

    def product(a: jax.Array, b: jax.Array, **fused: Any) -> jax.Array:
        return ragged_dot(a, b, group_sizes, precision, implementation=implementation, **fused)

    gates, ups = (product(tokens, weight, lhs_rows=rows).astype(wide) for weight in (gate, up))
    hidden = (activation(gates) * ups).astype(tokens.dtype)
    return product(hidden, down, out_rows=rows, out_weights=row_weights, out_size=tokens.shape[0])


class Experts(nnx.Module):
    """A parameter `kernel[experts, in, out]`."""

    def __init__(self, shape: tuple[int, int, int], kernel_init: Callable, param_dtype: Any, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))


class MoE(nnx.Module):
    """y = Σ_j w_j · (activation(x · gate_j) ∘ (x · up_j)) · down_j over the top_k experts j of x · router, w a softmax.

    The parameters are `router.kernel[in, experts]`, `gate.kernel[experts, in, hidden]`,
    `up.kernel[experts, in, hidden]` and `down.kernel[experts, hidden, out]`. No token is dropped, however uneven the
    router.

    Args:
      in_features, hidden_features, out_features: sizes; `out_features` defaults to `in_features`.
      num_experts, top_k: experts, and how many of them each token goes to.
      normalize: whether the weights of a token sum to 1; else they are what a softmax over all experts says.
      activation: any elementwise function; silu gives SwiGLU, gelu gives GeGLU.
      axis_names: mesh axes that the tokens are split over inside `jax.shard_map`, for the losses: see
        `jaxops.top_k_routing`.
      dtype, param_dtype, precision, kernel_init, rngs: as in `nnx.Linear`. The router computes in float32.
      implementation: None | "pallas" | "xla" | a sequence of them.

    Source: https://arxiv.org/abs/1701.06538, https://arxiv.org/abs/2211.15841
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        *,
        top_k: int = 2,
        out_features: int | None = None,
        normalize: bool = True,
        activation: Callable[[jax.Array], jax.Array] = silu,
        axis_names: str | Sequence[str] = (),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., jax.Array] = KERNEL_INIT,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        out_features = in_features if out_features is None else out_features
        self.router = nnx.Linear(in_features, num_experts, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.gate = Experts((num_experts, in_features, hidden_features), kernel_init, param_dtype, rngs)
        self.up = Experts((num_experts, in_features, hidden_features), kernel_init, param_dtype, rngs)
        self.down = Experts((num_experts, hidden_features, out_features), kernel_init, param_dtype, rngs)
        self.top_k = top_k
        self.normalize = normalize
        self.activation = activation
        self.axis_names = axis_names if isinstance(axis_names, str) else tuple(axis_names)
        self.dtype = dtype
        self.precision = precision
        self.implementation = static(implementation)

    def __call__(self, x: jax.Array, *, return_routing: bool = False) -> Any:
        """`x[..., in_features]` to `[..., out_features]`; with `return_routing`, also the `jaxops.Routing` with the
        losses."""
        y, routing = mixture(
            x,
            *(layer.kernel[...] for layer in (self.router, self.gate, self.up, self.down)),
            top_k=self.top_k,
            normalize=self.normalize,
            activation=self.activation,
            axis_names=self.axis_names,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
        )
        return (y, routing) if return_routing else y
