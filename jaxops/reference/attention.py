"""out = softmax(scale · q kᵀ + bias, where masks allow) · v: what attention means, in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import random
from pallas_kernels.masks import Band
from pallas_kernels.padding import from_tiles, to_tiles

# A row's maximum never falls below this, so that exp(-inf - maximum) is 0 and not NaN. A logit that is far below it
# (the most negative float32, -inf) is as good as masked.
FLOOR = -1e30
# More logits than this per head are not held at once: longer queries go by tiles, recomputed when differentiated.
_LOGITS = 1 << 20


def query_tile(keys: int) -> int:
    """How many queries the definition takes at once."""
    return max(1, _LOGITS // max(keys, 1))


def weights(s: jax.Array, seen: jax.Array, sink: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(p, lse):  p_j = exp(s_j) / (exp(sink) + Σ_j exp(s_j)) over the seen j of the last axis;  lse = log of the sum.

    s [..., S]; seen, bool, and sink [..., 1] broadcast with it. Where nothing is seen p is 0 and lse +inf or the sink.
    """
    top = jnp.max(s, axis=-1, keepdims=True, where=seen, initial=FLOOR)
    top = jax.lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s, top) - top), 0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return p / total, jnp.where(empty, jnp.inf, top + jnp.log(total))[..., 0]


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    dropout_rows: jax.Array | None = None,
    *,
    scale: float,
    is_causal: bool,
    local_window_size: tuple[int | None, int | None] | None,
    logits_soft_cap: float | None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    dropout_rate: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """out_i = Σ_j z_ij p_ij v_j,  p_ij = exp(s_ij) / (exp(sink) + Σ_j exp(s_ij)) where i sees j,

    s = score_mod(cap(scale · q kᵀ) + bias - alibi_slopes · |i - j|),  z_ij = 1 / (1 - dropout_rate) where kept, else 0,
    cap(s) = logits_soft_cap · tanh(s / logits_soft_cap). A key is seen if the band (causality, the window) or its
    index, below the prefix length, allows it, and the mask, `mask_mod`, lengths and segment ids do.

    Shapes: query [B, T, N, H], key [B, S, K, H] and value [B, S, K, V] with K dividing N, bias and mask broadcastable
    to [B, N, T, S], lengths [B], segment ids [B, T] and [B, S], sinks and slopes [N], dropout_rows [B, N, 2, T] by
    `random.row_words`. The modifiers are as in `pallas_kernels.modifiers`.

    Returns out [B, T, N, V] in the query's dtype and lse [B, N, T] in float32 (float64 for float64): the logarithm of
    the denominator. A row that sees no key has out 0 and lse +inf (with sinks: lse = sink).
    """
    batch, length, heads, _ = query.shape
    keys, groups = key.shape[1], key.shape[2]
    per_group = heads // groups if groups else 0
    accumulator = jnp.promote_types(query.dtype, jnp.float32)
    band = Band.of(is_causal, local_window_size)
    column = jnp.arange(keys)

    def attend(row, query, bias, mask, segments, words):
        """The queries `row` (their positions): out [B, rows, N, V], lse [B, N, rows]."""
        rows = query.shape[1]
        grouped = query.reshape(batch, rows, groups, per_group, query.shape[-1])
        s = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=accumulator)
        s = s.reshape(batch, heads, rows, keys) * scale
        if logits_soft_cap is not None:
            s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
        if bias is not None:
            s = s + bias.astype(accumulator)
        if alibi_slopes is not None:
            distance = jnp.abs(row[:, None] - column).astype(accumulator)
            s = s - jax.lax.stop_gradient(alibi_slopes.astype(accumulator))[:, None, None] * distance
        # Queries past the last fill up a tile: no modifier has to expect them.
        positions = tuple(
            x.astype(jnp.int32)
            for x in (
                jnp.arange(batch)[:, None, None, None],
                jnp.arange(heads)[:, None, None],
                jnp.minimum(row, length - 1)[:, None],
                column[None],
            )
        )
        if score_mod is not None:
            s = score_mod(s, *positions)
        seen = jnp.broadcast_to(band.allowed(row[:, None], column), (1, 1, rows, keys))
        if prefix_lengths is not None:
            seen = seen | (column < prefix_lengths[:, None, None, None])
        if mask_mod is not None:
            seen = seen & mask_mod(*positions)
        if mask is not None:
            seen = seen & mask
        if query_seq_lengths is not None:
            seen = seen & (row[:, None] < query_seq_lengths[:, None, None, None])
        if key_value_seq_lengths is not None:
            seen = seen & (column < key_value_seq_lengths[:, None, None, None])
        if segments is not None and key_value_segment_ids is not None:
            seen = seen & (segments[:, None, :, None] == key_value_segment_ids[:, None, None, :])

        p, lse = weights(s, seen, None if sinks is None else sinks.astype(accumulator)[:, None, None])
        if words is not None:
            kept = random.kept(words[:, :, 0, :, None], words[:, :, 1, :, None], column, dropout_rate)
            p = jnp.where(kept, p / (1 - dropout_rate), 0)
        p = p.astype(value.dtype).reshape(batch, groups, per_group, rows, keys)
        out = jnp.einsum("bkgts,bskh->btkgh", p, value, preferred_element_type=accumulator)
        return out.reshape(batch, rows, heads, value.shape[3]).astype(query.dtype), lse

    tile = query_tile(keys)
    if length <= tile:
        return attend(jnp.arange(length), query, bias, mask, query_segment_ids, dropout_rows)

    def split(x, axis):
        return None if x is None or x.shape[axis] == 1 else to_tiles(x, axis, tile)

    def attend_tile(tiles):
        row, query, *varying = tiles
        # What is the same for every query was not split.
        whole = (bias, mask, query_segment_ids, dropout_rows)
        return attend(row, query, *(x if tile is None else tile for x, tile in zip(whole, varying, strict=True)))

    varying = (split(bias, 2), split(mask, 2), split(query_segment_ids, 1), split(dropout_rows, 3))
    tiles = (to_tiles(jnp.arange(length), 0, tile), split(query, 1), *varying)
    out, lse = jax.lax.map(jax.checkpoint(attend_tile), tiles)
    return from_tiles(out, 1, length), from_tiles(lse, 2, length)
