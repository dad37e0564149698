"""gated_linear_unit in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def gated_linear_unit(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """y = activation(x · w_gate) ∘ (x · w_up): x[..., k], w_gate and w_up[k, n]; all in float32, then one rounding."""
    dtype = jnp.promote_types(x.dtype, jnp.promote_types(w_gate.dtype, w_up.dtype))
    wide = jnp.promote_types(dtype, jnp.float32)
    gate, up = (jnp.dot(x, w, precision=precision, preferred_element_type=wide) for w in (w_gate, w_up))
    return (activation(gate) * up).astype(dtype)
