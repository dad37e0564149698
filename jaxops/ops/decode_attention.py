"""Attention of a few new tokens to a cache: the public function, and the XLA rules that paged attention shares.

Forward, over the blocks of keys up to the longest length (online softmax, arXiv:1805.02867): a block is read where it
lies and dequantised by itself, so that no second copy of the cache exists. Backward: that of the reference, in XLA.
"""

import math
import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.reference.attention import FLOOR
from jaxops.reference.decode_attention import decode_attention as reference
from pallas_kernels import gpu, tpu
from pallas_kernels.ragged import Cut

_NAME = "decode_attention"
_BLOCK = 256  # keys: their tiles stay in a CPU's cache, and little is read beyond a length
_FEW_ROWS = 8  # that share a key: up to here copying the keys for a matrix product costs more than it saves
_MOST_ROWS = 16  # tokens of a tile, in a ragged batch


def xla_forward(
    query,
    key,
    value,
    lengths,
    page_table=None,
    query_starts=None,
    sinks=None,
    key_scales=None,
    value_scales=None,
    *,
    scale,
    left,
    logits_soft_cap,
):
    """((out, lse), ()) of a contiguous cache, query [B, T, N, H], or with a `page_table` of a ragged batch."""
    pages, page_size, groups, size = key.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    if page_table is None:
        batch, tokens, heads, _ = query.shape
        tiles, sequence, first, end = query, jnp.arange(batch), jnp.zeros(batch, jnp.int32), tokens
        lengths = jnp.clip(lengths, 0, page_size)
        position = lengths - tokens
        block = min(page_size, _BLOCK)
    else:
        (tokens, heads, _), sequences = query.shape, len(lengths)
        start = jnp.clip(query_starts, 0, tokens).at[0].set(0)
        cut = Cut(tokens, sequences, _MOST_ROWS if tokens > 2 * sequences else 1)
        sequence, first, end = cut.tile(jnp.arange(cut.count), start.__getitem__)
        tiles = query[jnp.minimum(first[:, None] + jnp.arange(cut.rows), tokens - 1)]
        most, table = page_table.shape[1], jnp.clip(page_table, 0, pages - 1)
        lengths = jnp.pad(jnp.clip(lengths, 0, most * page_size), (0, 1))[sequence]  # of no sequence: no keys
        position = lengths - (start[jnp.minimum(sequence + 1, sequences)] - first)
        mine = jnp.minimum(sequence, sequences - 1)
        per_block = min(most, max(1, _BLOCK // page_size))
        block = per_block * page_size

    def cut_out(x, axis, j):
        """(block j of a cache or its scales for every tile, the key it starts with)."""
        if page_table is None:
            begin = jnp.minimum(j * block, page_size - block)
            return lax.dynamic_slice_in_dim(x, begin, block, axis)
        chosen = table[mine[:, None], jnp.minimum(j * per_block + jnp.arange(per_block), most - 1)]
        return lax.collapse(jnp.moveaxis(x[chosen], 1, axis), axis, axis + 2)

    rows = tiles.shape[1]
    tiles = tiles.reshape(*tiles.shape[:2], groups, heads // groups, size)
    few = rows * heads // groups <= _FEW_ROWS
    row = (position[:, None] + jnp.arange(rows))[:, :, None, None]  # the position of every row
    row = jnp.where((first[:, None] + jnp.arange(rows) < jnp.reshape(end, (-1, 1)))[:, :, None, None], row, -1)

    def step(j, carry):
        top, total, acc = carry
        column = jnp.arange(block)
        if page_table is None:
            column = column + jnp.minimum(j * block, page_size - block)
        else:
            column = column + j * block
        fresh = (column >= j * block) & (column < lengths[:, None])  # the last block may begin in the one before
        k = cut_out(key, 1, j)
        v = jnp.where(fresh[:, :, None, None], cut_out(value, 1, j), 0)
        if few:
            s = jnp.sum(k.astype(wide)[:, :, :, None, None] * tiles.astype(wide).transpose(0, 2, 3, 1, 4)[:, None], -1)
            s = s.transpose(0, 4, 2, 3, 1)  # [tile, row, K, G, key]
        else:
            s = jnp.einsum("ibkh,irkgh->irkgb", k.astype(query.dtype), tiles, preferred_element_type=wide)
        if key_scales is not None:
            s = s * cut_out(key_scales, 2, j).astype(wide)[:, None, :, None]
        s = s * scale
        if logits_soft_cap is not None:
            s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
        seen = fresh[:, None, None, None] & (column <= row[..., None])
        if left is not None:
            seen = seen & (column >= row[..., None] - left)
        s = jnp.where(seen, s, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
        p, decay = jnp.exp(s - new_top), jnp.exp(top - new_top)
        total = decay * total + jnp.sum(p, -1, keepdims=True)
        if value_scales is not None:
            scales = cut_out(value_scales, 2, j).astype(wide)
            p = p * jnp.where(fresh[:, None], scales, 0)[:, None, :, None]
        p = p.astype(query.dtype)
        if few:
            weights = p.astype(wide).transpose(0, 4, 2, 3, 1)[..., None]  # [tile, key, K, G, row, 1]
            part = jnp.sum(v.astype(wide)[:, :, :, None, None] * weights, 1).transpose(0, 3, 1, 2, 4)
        else:
            part = jnp.einsum("ibkh,irkgb->irkgh", v.astype(query.dtype), p, preferred_element_type=wide)
        return new_top, total, decay * acc + part

    statistics = (*tiles.shape[:4], 1)
    top, total = jnp.full(statistics, FLOOR, wide), jnp.zeros(statistics, wide)
    if sinks is not None:
        sink = sinks.astype(wide).reshape(groups, -1, 1)
        top = jnp.broadcast_to(jnp.maximum(sink, FLOOR), statistics)
        total = jnp.broadcast_to(jnp.exp(sink - jnp.maximum(sink, FLOOR)), statistics)
    stop = (jnp.max(lengths) + block - 1) // block
    start_block = 0
    if left is not None:
        start_block = jnp.maximum(jnp.min(jnp.where(lengths > 0, position, page_size * pages)) - left, 0) // block
    carry = top, total, jnp.zeros(tiles.shape, wide)
    top, total, acc = lax.fori_loop(jnp.minimum(start_block, stop), stop, step, carry)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = (acc / total).astype(query.dtype).reshape(*tiles.shape[:2], heads, size)
    lse = jnp.where(empty, jnp.inf, top + jnp.log(total)).reshape(*tiles.shape[:2], heads)
    if page_table is not None:
        place = cut.place(jnp.arange(tokens), start.__getitem__)
        out, lse = out[place], lse[place]
    return (out, lse), ()


def operator_of(
    name: str, reference: Callable, tpu: ModuleType, gpu: ModuleType, partition: Callable, *, quantised: bool
) -> Operator:
    """The operator `name`; of a quantised cache the gradient goes to the scales, for its integers have none."""
    cached = ("key_scales", "value_scales") if quantised else ("key", "value")

    def cost(query, key, page_table=None, **_):
        """As if every sequence had the whole cache: lengths are not known."""
        keys = key.shape[1] * (1 if page_table is None else page_table.shape[1])
        product = 2 * math.prod(query.shape) * keys
        return 2 * product, 5 * product

    return Operator(
        name=name,
        differentiable=("query", *cached, "sinks"),
        reference=reference,
        xla=Rules(xla_forward, None),
        tpu=tpu,
        gpu=gpu,
        partition=partition,
        cost=cost,
    )


_OPERATOR, _QUANTISED = (
    operator_of(
        _NAME,
        reference,
        tpu.decode_attention,
        gpu.decode_attention,
        lambda query: (query, PartitionSpec(*query[:3])),  # out [B, T, N, H], lse [B, T, N]
        quantised=quantised,
    )
    for quantised in (False, True)
)


def decode_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    lengths: ArrayLike,
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

    The attention of the newest tokens to a cache of keys and values that holds theirs already. Query t of T stands at
    the position length - T + t and sees the keys up to there. B batch, T new tokens, S the cache's length, N query
    heads, K key and value heads (dividing N), H head size. The cache is read once, where it lies, up to each length.

    Args:
      query: [B, T, N, H], or [B, N, H] for one token; float32, bfloat16 or float16.
      key, value: [B, S, K, H], of the query's dtype, or int8 with scales. What lies beyond a length is never used.
      lengths: integers [B], valid keys with those of the new tokens, in [0, S]. Queries before position 0 (a length
        below T) see nothing.
      scale: of the logits, a Python number; None: 1 / sqrt(H).
      local_window_size: (left, right) or left: a query at i sees i - left ≤ j ≤ i; None leaves it open. Nothing is on
        the right of the newest token.
      logits_soft_cap: c > 0 applies cap(s) = c · tanh(s / c); None: cap(s) = s.
      sinks: floating [N]; one more logit per head, without a value.
      key_scales, value_scales: floating [B, K, S], one per key and head, for an int8 cache: key_j = scale_j · int8_j.
      implementation: None chooses; "pallas" or "xla" is strict; a sequence is tried in order.
      return_residual: also return the log-sum-exp of each row of logits.

    Returns:
      out, of the query's shape and dtype; with `return_residual`, (out, lse): lse is [B, T, N] or [B, N] in float32,
      constant to derivatives, and the large negative number of `dot_product_attention` where nothing is seen. A query
      that sees nothing gives zeros.

    Raises:
      ValueError: shapes or options do not fit; concrete lengths are outside [0, S] (traced ones are clipped to it);
        scales are missing or superfluous; `implementation` is unknown or refuses.
      TypeError: a dtype is not one of those above.

    Gradients of query, key, value and sinks, and of the scales of an int8 cache, are computed in XLA.

    Split over the keys as in Flash-Decoding (Dao et al., 2023); grouped heads (Ainslie et al., arXiv:2305.13245).
    """
    query = checks.array(_NAME, "query", query)
    single = query.ndim == 3
    query = new_tokens(_NAME, query[:, None] if single else query, 4, "[B, N, H] or [B, T, N, H]")
    key, value, scaled = caches(_NAME, ("key", "value"), key, value, query, key_scales, value_scales, "[B, S, K, H]")
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"{_NAME}: key must have the batch of query {query.shape}, got {key.shape}")
    lengths = checks.integer(_NAME, "lengths", lengths, shape=query.shape[:1], of="[B]")
    within(_NAME, "lengths", lengths, 0, key.shape[1], "the cache's length S")
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "lengths": lengths.astype(jnp.int32),
        "sinks": sinks_of(_NAME, sinks, query),
        **scaled,
    }
    out, lse = (_QUANTISED if scaled else _OPERATOR)(
        operands,
        implementation=implementation,
        **options(_NAME, query, scale, local_window_size, logits_soft_cap, return_residual),
    )
    if single:
        out, lse = out[:, 0], lse[:, 0]
    return (out, residual(lse)) if return_residual else out


# ---- what both operators ask of their arguments --------------------------------------------------------------------


def new_tokens(name: str, query: jax.Array, rank: int, shape: str) -> jax.Array:
    """`query` if it is floating and has `rank` axes, else `TypeError` or `ValueError`; `shape` is what is expected."""
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise TypeError(f"{name}: query must be float32, bfloat16 or float16, got {query.dtype}")
    if query.ndim != rank:
        raise ValueError(f"{name}: query must have shape {shape}, got {query.shape}")
    return query


def caches(name, names, key, value, query, key_scales, value_scales, shape) -> tuple[jax.Array, jax.Array, dict]:
    """(key, value, their scales by name as operands)."""
    key, value = (checks.array(name, n, x) for n, x in zip(names, (key, value), strict=True))
    quantised = key.dtype == jnp.int8
    if not quantised and key.dtype != query.dtype:
        raise TypeError(f"{name}: {names[0]} must have the dtype of query, {query.dtype}, or int8, got {key.dtype}")
    if value.dtype != key.dtype:
        raise TypeError(f"{name}: {names[1]} must have the dtype of {names[0]}, {key.dtype}, got {value.dtype}")
    if key.ndim != 4 or key.shape[3] != query.shape[-1]:
        raise ValueError(
            f"{name}: {names[0]} must have shape {shape} with the head size of query, {query.shape[-1]}, "
            f"got {key.shape}"
        )
    if value.shape != key.shape:
        raise ValueError(f"{name}: {names[1]} must have the shape of {names[0]}, {key.shape}, got {value.shape}")
    heads, groups = query.shape[-2], key.shape[2]
    if heads % groups if groups else heads:
        raise ValueError(f"{name}: query must have a multiple of the {groups} heads of {names[0]}, got {heads}")
    scales = {}
    expected = (key.shape[0], key.shape[2], key.shape[1])
    for n, x in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (x is None) == quantised:
            wanted = "must be given for an int8 cache" if quantised else f"is for an int8 cache, not {key.dtype}"
            raise ValueError(f"{name}: {n} {wanted}, got {'None' if x is None else 'an array'}")
        if x is not None:
            scales[n] = checks.floating(name, n, x, shape=expected, of=f"the axes 0, 2, 1 of {names[0]}")
    return key, value, scales


def within(name: str, argument: str, x: jax.Array, low: int, high: int, what: str) -> None:
    """Raises `ValueError` if `x` is known while tracing and has an entry outside [low, high]."""
    if isinstance(x, jax.core.Tracer) or not x.size:
        return
    known = np.asarray(x)
    wrong = known[(known < low) | (known > high)]
    if wrong.size:
        raise ValueError(f"{name}: {argument} must be in [{low}, {high}] ({what}), got {wrong.flat[0]}")


def sinks_of(name: str, sinks: ArrayLike | None, query: jax.Array) -> jax.Array | None:
    """The sinks as floating [N], if there are any; raises `TypeError` or `ValueError` for others."""
    if sinks is None:
        return None
    return checks.floating(name, "sinks", sinks, shape=query.shape[-2:-1], of="one per query head")


def options(name, query, scale, local_window_size, logits_soft_cap, return_residual) -> dict[str, Any]:
    """The static options of the operators."""
    if not isinstance(return_residual, bool | np.bool_):
        raise TypeError(f"{name}: return_residual must be a bool, got {type(return_residual).__name__}")
    if logits_soft_cap is not None:
        logits_soft_cap = checks.number(name, "logits_soft_cap", logits_soft_cap, positive=True)
    size = query.shape[-1]
    scale = 1 / math.sqrt(max(size, 1)) if scale is None else checks.finite(name, "scale", scale)
    left = local_window_size
    if isinstance(left, tuple | list):
        if len(left) != 2 or (left[1] is not None and operator.index(left[1]) < 0):
            raise ValueError(f"{name}: local_window_size must be left or (left, right), not negative, got {left!r}")
        left = left[0]
    if left is not None:
        try:
            left = operator.index(left)
        except TypeError:
            raise TypeError(
                f"{name}: local_window_size must be an int or (left, right) of ints or None, got {local_window_size!r}"
            ) from None
        if left < 0:
            raise ValueError(f"{name}: local_window_size must not be negative, got {local_window_size!r}")
    return {"scale": scale, "left": left, "logits_soft_cap": logits_soft_cap}


def residual(lse: jax.Array) -> jax.Array:
    """The log-sum-exp as users see it: constant, and a large negative number, as JAX's, where nothing is seen."""
    return lax.stop_gradient(jnp.where(lse == jnp.inf, -0.7 * float(jnp.finfo(jnp.float32).max), lse))
