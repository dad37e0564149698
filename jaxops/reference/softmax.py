"""softmax in plain JAX."""

import jax
import jax.numpy as jnp


def softmax(
    x: jax.Array, where: jax.Array | None = None, *, axis: tuple[int, ...], temperature: float
) -> tuple[jax.Array]:
    """y = exp(x / temperature) / Σ exp(x / temperature) over `axis`, both over the elements `where` holds; y = 0
    elsewhere."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / temperature
    if where is None:
        return (jax.nn.softmax(wide, axis).astype(x.dtype),)
    # -inf where nothing is held would make exp(x - top) NaN, and so would its gradient.
    top = jnp.max(wide, axis, keepdims=True, where=where, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    part = jnp.where(where, jnp.exp(jnp.where(where, wide, top) - top), 0)
    total = jnp.sum(part, axis, keepdims=True)
    return ((part / jnp.where(total == 0, 1, total)).astype(x.dtype),)
