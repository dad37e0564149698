"""Attention of a ragged batch of tokens to caches in pages: each token decodes alone, in plain JAX."""

import jax
import jax.numpy as jnp

from jaxops.reference.decode_attention import decode_attention


def paged_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    sinks: jax.Array | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """out_t = decode_attention(q_t, the pages of t's sequence up to t's position).

    Sequence b has the tokens query_starts[b] ≤ t < query_starts[b + 1], which stand at the positions from
    lengths[b] - (query_starts[b + 1] - query_starts[b]) on, and its keys in the pages page_table[b]. Shapes: query
    [tokens, N, H], key and value [P, page_size, K, H], lengths [B], page_table [B, M], query_starts [B + 1], sinks [N],
    scales [P, K, page_size]. Entries of the table are clipped to [0, P). Tokens of no sequence see nothing.

    Returns out [tokens, N, H] and lse [tokens, N], otherwise as `decode_attention`.
    """
    tokens = query.shape[0]
    pages, size, groups, _ = key.shape
    most = page_table.shape[1]
    if not page_table.shape[0] or not pages:
        most, page_table = 0, jnp.zeros((1, 0), jnp.int32)
        lengths, query_starts = jnp.zeros(1, jnp.int32), jnp.zeros(2, jnp.int32)
    lengths = jnp.clip(lengths, 0, most * size)
    starts = jnp.clip(query_starts, 0, tokens).at[0].set(0)

    @jax.checkpoint
    def one(t):
        number, query = t
        sequence = jnp.minimum(jnp.searchsorted(starts[1:], number, side="right"), len(lengths) - 1)
        mine = jnp.clip(page_table[sequence], 0, max(pages - 1, 0))
        seen = lengths[sequence] - (starts[sequence + 1] - number) + 1
        seen = jnp.where(number < starts[-1], seen, 0)

        def cache(x):
            return x[mine].reshape(1, most * size, groups, x.shape[-1])

        def scales(x):
            return None if x is None else x[mine].swapaxes(0, 1).reshape(1, groups, most * size)

        out, lse = decode_attention(
            query[None, None],
            cache(key),
            cache(value),
            seen[None],
            sinks,
            scales(key_scales),
            scales(value_scales),
            **options,
        )
        return out[0, 0], lse[0, 0]

    return jax.lax.map(one, (jnp.arange(tokens), query))
