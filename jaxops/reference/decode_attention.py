"""out = softmax(scale · q kᵀ, up to each token's own position) · v over a cache: what decoding means, in plain JAX."""

import jax
import jax.numpy as jnp

from jaxops.reference.attention import weights


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    *,
    scale: float,
    left: int | None,
    logits_soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """out_t = Σ_j p_tj v_j,  p_tj = exp(s_tj) / (exp(sink) + Σ_j exp(s_tj)),  s = cap(scale · q kᵀ),  over the seen j.

    Query t of T stands at the position i = length - T + t and sees i - left ≤ j ≤ i. Shapes: query [B, T, N, H], key
    and value [B, S, K, H], lengths [B], sinks [N], scales [B, K, S]: key_j is then scale_j · (integers of key_j), in
    the query's dtype. What lies in the cache beyond a length counts for nothing, even NaN.

    Returns out [B, T, N, H] in the query's dtype and lse [B, T, N] in float32 (float64 for float64): the logarithm of
    the denominator. A query that sees no key has out 0 and lse +inf (with sinks: lse = sink).
    """
    batch, tokens, heads, size = query.shape
    keys, groups = key.shape[1], key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    lengths = jnp.clip(lengths, 0, keys)
    column = jnp.arange(keys)
    written = (column < lengths[:, None])[:, :, None, None]

    def dequantised(x, scales):
        if scales is not None:
            x = x.astype(wide) * scales.swapaxes(1, 2)[..., None]
        return jnp.where(written, x.astype(query.dtype), 0)

    key, value = dequantised(key, key_scales), dequantised(value, value_scales)
    grouped = query.reshape(batch, tokens, groups, heads // groups if groups else 0, size)
    s = jnp.einsum("btkgh,bskh->btkgs", grouped, key, preferred_element_type=wide)
    s = s.reshape(batch, tokens, heads, keys) * scale
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    position = (lengths[:, None] - tokens + jnp.arange(tokens))[:, :, None, None]
    seen = column <= position
    if left is not None:
        seen = seen & (column >= position - left)

    p, lse = weights(s, seen, None if sinks is None else sinks.astype(wide)[:, None])
    p = p.astype(value.dtype).reshape(*grouped.shape[:4], keys)
    out = jnp.einsum("btkgs,bskh->btkgh", p, value, preferred_element_type=wide)
    return out.reshape(query.shape).astype(query.dtype), lse
