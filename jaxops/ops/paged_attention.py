"""Attention of a ragged batch of tokens to caches in pages: the public function. Its rules are `decode_attention`'s."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxops.ops import checks
from jaxops.ops.decode_attention import caches, new_tokens, operator_of, options, residual, sinks_of, within
from jaxops.reference.paged_attention import paged_attention as reference
from pallas_kernels import gpu, tpu

_NAME = "paged_attention"
_OPERATOR, _QUANTISED = (
    operator_of(
        _NAME,
        reference,
        tpu.decode_attention,
        gpu.decode_attention,
        lambda query: (query, PartitionSpec(*query[:2])),  # out [tokens, N, H], lse [tokens, N]
        quantised=quantised,
    )
    for quantised in (False, True)
)


def paged_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    lengths: ArrayLike,
    query_starts: ArrayLike,
    *,
    scale: float | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    key_scales: ArrayLike | None = None,
    value_scales: ArrayLike | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> Any:
    """out_t = Σ_j p_tj v_j,  p_tj = exp(s_tj) / (exp(sink) + Σ_j exp(s_tj)),  s = cap(scale · q kᵀ),  over j ≤ t.

    One call for sequences in any state: prompts that are being read (many tokens), sequences that are being continued
    (one token, or a few), idle ones (none). Key j of sequence b is key_pages[page_table[b, j // page_size], j %
    page_size], and is there already for the new tokens, which are the last of the sequence. B sequences, P pages, N
    query heads, K key and value heads (dividing N), H head size.

    Args:
      query: [tokens, N, H], the new tokens of all sequences one after another; float32, bfloat16 or float16.
      key_pages, value_pages: [P, page_size, K, H], of the query's dtype, or int8 with scales: a page is one piece of
        memory with all heads, which a TPU's copy takes whole and a GPU's cuts by heads.
      page_table: integers [B, most_pages] in [0, P). Entries beyond a sequence's length may be anything.
      lengths: integers [B], the keys of each sequence with those of its new tokens, in [0, most_pages · page_size].
      query_starts: integers [B + 1], rising from 0: sequence b has the tokens query_starts[b] … query_starts[b+1] - 1.
        Tokens from query_starts[B] on are of no sequence and give zeros.
      key_scales, value_scales: floating [P, K, page_size], one per key and head, for int8 pages.
      scale, local_window_size, logits_soft_cap, sinks, implementation, return_residual: as in `decode_attention`.

    Returns:
      out, of the query's shape and dtype; with `return_residual`, (out, lse): lse is [tokens, N] in float32, constant
      to derivatives, and the large negative number of `dot_product_attention` where nothing is seen. A token that sees
      nothing gives zeros.

    Raises:
      ValueError: shapes or options do not fit; concrete tables, lengths or starts are out of range; scales are missing
        or superfluous; `implementation` is unknown or refuses.
      TypeError: a dtype is not one of those above.

    Of traced values no error can come: entries of the table, lengths and starts are clipped to their ranges, so that
    nothing outside the pages is read, and the tokens concerned get the attention to whatever the clipped entries name.

    Gradients of query, pages and sinks, and of the scales of int8 pages, are computed in XLA.

    PagedAttention (Kwon et al., arXiv:2309.06180); ragged batches as in Ragged Paged Attention (JAX).
    """
    query = new_tokens(_NAME, checks.array(_NAME, "query", query), 3, "[tokens, N, H]")
    names = ("key_pages", "value_pages")
    key, value, scaled = caches(
        _NAME, names, key_pages, value_pages, query, key_scales, value_scales, "[P, page_size, K, H]"
    )
    table = checks.array(_NAME, "page_table", page_table)
    if table.ndim != 2 or not jnp.issubdtype(table.dtype, jnp.integer):
        raise (ValueError if jnp.issubdtype(table.dtype, jnp.integer) else TypeError)(
            f"{_NAME}: page_table must be integers [B, most_pages], got {table.dtype} {table.shape}"
        )
    (sequences, most), (pages, page_size) = table.shape, key.shape[:2]
    lengths = checks.integer(_NAME, "lengths", lengths, shape=(sequences,), of="[B]")
    starts = checks.integer(_NAME, "query_starts", query_starts, shape=(sequences + 1,), of="[B + 1]")
    within(_NAME, "lengths", lengths, 0, most * page_size, "most_pages · page_size")
    within(_NAME, "query_starts", starts, 0, query.shape[0], "the number of tokens")
    if not isinstance(starts, jax.core.Tracer):
        known = np.asarray(starts)
        if known[0] != 0 or (np.diff(known) < 0).any():
            raise ValueError(f"{_NAME}: query_starts must rise from 0, got {known.tolist()}")
    if not isinstance(table, jax.core.Tracer) and not isinstance(lengths, jax.core.Tracer):
        used = np.arange(most) * page_size < np.asarray(lengths)[:, None]
        wrong = np.asarray(table)[used & ((np.asarray(table) < 0) | (np.asarray(table) >= pages))]
        if wrong.size:
            raise ValueError(f"{_NAME}: page_table must be in [0, {pages}), the pages there are, got {wrong[0]}")
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "lengths": lengths.astype(jnp.int32),
        "page_table": table.astype(jnp.int32),
        "query_starts": starts.astype(jnp.int32),
        "sinks": sinks_of(_NAME, sinks, query),
        **scaled,
    }
    out, lse = (_QUANTISED if scaled else _OPERATOR)(
        operands,
        implementation=implementation,
        **options(_NAME, query, scale, local_window_size, logits_soft_cap, return_residual),
    )
    return (out, residual(lse)) if return_residual else out
