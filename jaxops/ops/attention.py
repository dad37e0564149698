"""Attention: the public function, and its XLA rules, which never hold more than a tile of logits per head.

Forward, for each tile of queries, over the tiles of keys (online softmax, arXiv:1805.02867; FlashAttention,
arXiv:2205.14135):

    m' = max(m, max_j s_ij);  p = exp(s - m');  l' = e^(m - m') l + Σ_j p;  acc' = e^(m - m') acc + p v;  out = acc / l

Backward: p = exp(s - lse);  dv = (z ∘ p)ᵀ dout;  ds = p ∘ (z ∘ dout vᵀ - Σ_h dout ∘ out) ∘ ∂s/∂(scale q kᵀ);
dq = scale ds k;  dk = scale dsᵀ q.  z is what dropout multiplies p with: 0, or 1 / (1 - rate).
"""

import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxops import dropout
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.reference.attention import FLOOR, query_tile
from jaxops.reference.attention import dot_product_attention as reference
from pallas_kernels import gpu, modifiers, random, tpu
from pallas_kernels.masks import Band, Blocks
from pallas_kernels.padding import from_tiles, pad_to, round_up, to_tiles

_NAME = "dot_product_attention"
# Sides of a tile of logits, and how many logits the tiles of all heads may have together: what stays in a CPU's cache.
_LEAST_SIDE, _MOST_SIDE, _MOST_LOGITS = 128, 512, 1 << 20
_FEW_QUERIES = 8  # that share a key: up to here copying the keys for a matrix product costs more than it saves


def _tile_sizes(queries: int, keys: int, heads: int) -> tuple[int, int]:
    """(rows, columns) of a tile: square where both sizes are long, longer on one side where the other is short."""
    side = _MOST_SIDE
    while side > _LEAST_SIDE and heads * side * side > _MOST_LOGITS:
        side //= 2

    def even(size, limit):  # 1000 = 2 · 500, not 512 + 488 and padding
        count = -(-size // limit)
        return size if count == 1 else round_up(-(-size // count), 8)

    rows = even(queries, max(side, side * side // keys))
    return rows, even(keys, max(side, side * side // rows))


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call, tiled: T and S below are padded to whole tiles, N is split into K and G = N // K.

    A tile of logits is [B, K, columns, G, rows], keys before queries: no product needs a tile of logits transposed.
    Products are row times column (the last axis of the left side contracts with the first of the right).
    """

    bias: jax.Array | None  # [B or 1, K or 1, G or 1, T or 1, S or 1]
    mask: jax.Array | None  # the same
    key_lengths: jax.Array | None  # [B]
    query_segments: jax.Array | None  # [B, 1, 1, 1, T]
    key_segments: jax.Array | None  # [B, 1, S, 1, 1]
    prefix: jax.Array | None  # [B, 1, 1, 1, 1]
    slopes: jax.Array | None  # [K, 1, G, 1]
    words: jax.Array | None  # of dropout, [2, B, K, 1, G, T]
    batch: int
    heads: int  # N
    groups: int  # K
    queries: int  # before padding
    keys: int
    rows: int  # of a tile
    columns: int
    scale: float
    soft_cap: float | None
    band: Band
    score_mod: Callable | None
    mask_mod: Callable | None
    dropout_rate: float
    schedule: tuple | None  # count [row tiles, 2] and order [row tiles, column tiles], as `Blocks.schedule` gives them

    @staticmethod
    def of(
        operands: dict[str, Any],
        scale,
        is_causal,
        local_window_size,
        logits_soft_cap,
        score_mod=None,
        mask_mod=None,
        dropout_rate=0.0,
    ) -> "_Call":
        query, key = operands["query"], operands["key"]
        (batch, queries, heads, _), (_, keys, groups, _) = query.shape, key.shape
        rows, columns = _tile_sizes(queries, keys, batch * heads)
        band = Band.of(is_causal, local_window_size)

        def grouped(name):  # [B, N, T, S] -> [B, K, G, T, S], whatever is 1 stays 1
            x = operands.get(name)
            if x is None:
                return None
            x = x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else (groups, heads // groups)), *x.shape[2:])
            for axis, tile in ((3, rows), (4, columns)):
                if x.shape[axis] > 1:
                    x = pad_to(x, axis, round_up(x.shape[axis], tile))
            return x

        def segments(name, tile):
            x = operands.get(name)
            return None if x is None else pad_to(x, 1, round_up(x.shape[1], tile))[:, None, None, None, :]

        key_segments = segments("key_value_segment_ids", columns)
        prefix, slopes, words = (operands.get(name) for name in ("prefix_lengths", "alibi_slopes", "dropout_rows"))
        if words is not None:
            words = pad_to(words, 3, round_up(queries, rows)).transpose(2, 0, 1, 3)
            words = words.reshape(2, batch, groups, 1, heads // groups, -1)
        schedule = None
        # What only a band or lengths hide is found by arithmetic.
        hiding = ("mask", "query_segment_ids", "key_value_segment_ids", "prefix_lengths")
        if keys > columns and (mask_mod is not None or any(operands.get(name) is not None for name in hiding)):
            lengths = ("query_seq_lengths", "key_value_seq_lengths")
            looked_at = {name: operands.get(name) for name in (*hiding, *lengths)}
            blocks = Blocks.of((batch, heads, queries, keys), rows, columns, band, mask_mod=mask_mod, **looked_at)
            schedule = tuple(x[0, 0] for x in blocks.merged().schedule())
        return _Call(
            bias=grouped("bias"),
            mask=grouped("mask"),
            key_lengths=operands.get("key_value_seq_lengths"),
            query_segments=segments("query_segment_ids", rows),
            key_segments=None if key_segments is None else key_segments.transpose(0, 1, 4, 2, 3),
            prefix=None if prefix is None else prefix[:, None, None, None, None],
            slopes=None if slopes is None else slopes.reshape(groups, 1, -1, 1),
            words=words,
            batch=batch,
            heads=heads,
            groups=groups,
            queries=queries,
            keys=keys,
            rows=rows,
            columns=columns,
            scale=scale,
            soft_cap=logits_soft_cap,
            band=band,
            score_mod=score_mod,
            mask_mod=mask_mod,
            dropout_rate=dropout_rate,
            schedule=schedule,
        )

    def by_rows(self, x: jax.Array, fill=0) -> jax.Array:
        """[B, T, N, H], T as it came -> [B, T, K, G, H], T whole tiles."""
        x = x.reshape(*x.shape[:2], self.groups, -1, x.shape[3])
        return pad_to(x, 1, round_up(self.queries, self.rows), fill)

    def query_tile(self, x: jax.Array, i) -> jax.Array:
        """Tile i of such an array, as [B, K, H, G, rows]."""
        return lax.dynamic_slice_in_dim(x, i * self.rows, self.rows, 1).transpose(0, 2, 4, 3, 1)

    def by_columns(self, x: jax.Array) -> jax.Array:
        """[B, S, K, H], S as it came -> S whole tiles."""
        return pad_to(x, 1, round_up(self.keys, self.columns))

    def key_tile(self, x: jax.Array, j) -> jax.Array:
        """Tile j of such an array, as [B, K, columns, H]."""
        return lax.dynamic_slice_in_dim(x, j * self.columns, self.columns, 1).transpose(0, 2, 1, 3)

    def put_query_tile(self, x: jax.Array, tile: jax.Array, i) -> jax.Array:
        """`x`, an array of `empty_rows`, with tile i replaced by `tile` [B, K, H, G, rows]."""
        return lax.dynamic_update_slice_in_dim(x, tile.transpose(0, 4, 1, 3, 2).astype(x.dtype), i * self.rows, 1)

    def empty_rows(self, size: int, dtype) -> jax.Array:
        """[B, T, K, G, size], T whole tiles; every tile has yet to be put."""
        shape = (self.batch, round_up(self.queries, self.rows), self.groups, self.heads // self.groups, size)
        return lax.empty(shape, dtype)

    def from_rows(self, x: jax.Array) -> jax.Array:
        """[B, T, K, G, H], T whole tiles -> [B, T, N, H], T as it came."""
        return x[:, : self.queries].reshape(x.shape[0], self.queries, -1, x.shape[4])

    def over_query_tiles(self, f: Callable, carry: Any) -> Any:
        """`carry = f(i, carry)` for every query tile i."""
        return _loop(0, -(-self.queries // self.rows), f, carry)

    def over_key_tiles(self, i, f: Callable, carry: Any) -> Any:
        """`carry = f(j, carry, masked=…)` for every key tile j that query tile i sees any of, unmasked if all of it."""
        row, columns = i * self.rows, self.columns
        if self.schedule is not None:
            count, order = self.schedule
            known = isinstance(count, np.ndarray)
            places = jnp.asarray(order)[i]
            whole, end = jnp.asarray(count)[i, 0], jnp.asarray(count)[i].sum()
            for kind, start, stop in ((0, 0, whole), (1, whole, end)):
                if not known or count[:, kind].any():  # else no tile of any query is of this kind
                    step = lambda k, carry, masked=bool(kind): f(places[k], carry, masked=masked)
                    carry = _loop(start, stop, step, carry)
            return carry
        first, end = self.band.touched(row, self.rows, self.keys)
        whole, whole_end = self.band.whole(row, self.rows, self.keys)
        if self.keys <= columns:  # one step, known before any number is
            all_seen = isinstance(i, int) and whole == 0 and whole_end == self.keys and self.key_lengths is None
            return f(0, carry, masked=self.masked or not all_seen)
        if self.key_lengths is not None:
            end = jnp.minimum(end, jnp.max(self.key_lengths))
            whole_end = jnp.minimum(whole_end, jnp.min(self.key_lengths))
        first, end = first // columns, (end + columns - 1) // columns
        if self.band.left is None:
            whole = first
        else:
            whole = _least(_greatest((whole + columns - 1) // columns, first), end)
        whole_end = _least(_greatest(whole_end // columns, whole), end)
        for start, stop, masked in ((first, whole, True), (whole, whole_end, False), (whole_end, end, True)):
            if start is not stop:
                carry = _loop(start, stop, functools.partial(f, masked=masked), carry)
        return carry

    @property
    def masked(self) -> bool:
        """Whether more than the band and lengths says which keys are seen."""
        return any(x is not None for x in (self.mask, self.query_segments, self.prefix, self.mask_mod))

    def corner(self, x: jax.Array, i, j) -> tuple:
        """Where tile (i, j) starts in an array [B or 1, K or 1, G or 1, T or 1, S or 1]."""
        return (0, 0, 0, 0 if x.shape[3] == 1 else i * self.rows, 0 if x.shape[4] == 1 else j * self.columns)

    def tile_of(self, x: jax.Array, i, j) -> jax.Array:
        """Tile (i, j) of such an array, as [B or 1, K or 1, columns or 1, G or 1, rows or 1]."""
        sizes = (*x.shape[:3], min(x.shape[3], self.rows), min(x.shape[4], self.columns))
        return lax.dynamic_slice(x, self.corner(x, i, j), sizes).transpose(0, 1, 4, 2, 3)

    def add_tile(self, x: jax.Array, tile: jax.Array, i, j) -> jax.Array:
        """`x` with `tile`, of logits, added to its tile (i, j): the transpose of `tile_of`."""
        tile = tile.transpose(0, 1, 3, 4, 2)
        tile = jnp.sum(tile, axis=[axis for axis, size in enumerate(x.shape) if size == 1], keepdims=True)
        if tile.shape == x.shape:
            return x + tile
        corner = self.corner(x, i, j)
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, corner, tile.shape) + tile, corner)

    @property
    def few(self) -> bool:
        """Whether one tile is the whole call and a key meets few queries: then keys are best read where they lie."""
        whole = self.keys <= self.columns and self.queries <= self.rows
        return whole and self.queries * self.heads // self.groups <= _FEW_QUERIES

    def scores(self, key: jax.Array, query: jax.Array) -> jax.Array:
        """The product of a tile of keys, as it lies in memory if the queries are few, with a tile of queries."""
        if not self.few:
            return _dot("bksh,bkhgt->bksgt", key, query)
        key, query = _widened(key)[:, :, :, None, None], _widened(query).transpose(0, 1, 3, 4, 2)
        return jnp.sum(key * query[:, None], axis=-1).transpose(0, 2, 1, 3, 4)

    def mixed(self, value: jax.Array, p: jax.Array) -> jax.Array:
        """The product of a tile of values, given as the keys are, with the weights of a tile: [B, K, H, G, rows]."""
        if not self.few:
            return _dot("bkhs,bksgt->bkhgt", value, p)
        value, p = _widened(value)[:, :, :, None, None], _widened(p).transpose(0, 2, 1, 3, 4)
        return jnp.sum(value * p[..., None], axis=1).transpose(0, 1, 4, 2, 3)

    def logits(self, s: jax.Array, i, j, masked: bool) -> tuple[jax.Array, float, tuple]:
        """(s, scale, slopes): the logits of tile (i, j), of which `s` are the products, are s · scale, -inf where
        masked; their derivatives by what the bias is added to, and of that by the scaled product, each None if it is 1.

        The scale is left to whoever reads s, in the same pass as the rest, where nothing is added to the product.
        """
        scale, slope, cap_slope = self.scale, None, None
        if self.soft_cap is not None:
            tanh = jnp.tanh(s * (scale / self.soft_cap))
            s, scale, cap_slope = self.soft_cap * tanh, 1.0, 1 - tanh * tanh
        if self.bias is not None:
            s, scale = s * scale + self.tile_of(self.bias, i, j).astype(s.dtype), 1.0
        batch, head, row, column = self.positions(i, j)
        if self.slopes is not None:
            s, scale = s * scale - self.slopes.astype(s.dtype) * jnp.abs(row - column).astype(s.dtype), 1.0
        if self.score_mod is not None:
            s, slope = modifiers.score_and_slope(self.score_mod, s * scale, batch, head, *self.inside(row, column))
            scale = 1.0
        if masked:
            seen = self.seen(i, j)
            s = jnp.where(seen, s, -jnp.inf)
            if slope is not None:  # it may be anything where nothing is seen
                slope = jnp.where(seen, slope, 0)
        return s, scale, (slope, cap_slope)

    def positions(self, i, j) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The indices of batch, head, query and key in tile (i, j), broadcastable to it; also beyond the last."""
        head = jnp.arange(self.heads, dtype=jnp.int32).reshape(self.groups, 1, -1, 1)
        row = i * self.rows + jnp.arange(self.rows, dtype=jnp.int32)
        column = j * self.columns + jnp.arange(self.columns, dtype=jnp.int32)
        batch = jnp.arange(self.batch, dtype=jnp.int32)
        return (
            batch[:, None, None, None, None],
            head[None],
            row.reshape(1, 1, 1, 1, -1).astype(jnp.int32),
            column[None, None, :, None, None].astype(jnp.int32),
        )

    def inside(self, row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Positions for a modifier, which need not expect any beyond the last."""
        return jnp.minimum(row, self.queries - 1), jnp.minimum(column, self.keys - 1)

    def seen(self, i, j) -> jax.Array:
        """Which logits of tile (i, j) take part, broadcastable to the tile."""
        batch, head, row, column = self.positions(i, j)
        seen = self.band.allowed(row, column)
        if self.prefix is not None:
            seen = seen | (column < self.prefix)
        seen = seen & (column < self.keys)
        if self.mask_mod is not None:
            seen = seen & self.mask_mod(batch, head, *self.inside(row, column))
        if self.key_lengths is not None:
            seen = seen & (column < self.key_lengths[:, None, None, None, None])
        if self.mask is not None:
            seen = seen & self.tile_of(self.mask, i, j)
        if self.query_segments is not None and self.key_segments is not None:
            rows = lax.dynamic_slice_in_dim(self.query_segments, i * self.rows, self.rows, axis=4)
            columns = lax.dynamic_slice_in_dim(self.key_segments, j * self.columns, self.columns, axis=2)
            seen = seen & (rows == columns)
        return seen

    def kept(self, x: jax.Array, i, j) -> jax.Array:
        """A tile of what belongs to (i, j), 0 where dropout drops it; not yet divided by the chance of being kept."""
        if self.words is None:
            return x
        words = lax.dynamic_slice_in_dim(self.words, i * self.rows, self.rows, axis=5)
        return jnp.where(random.kept(words[0], words[1], self.positions(i, j)[3], self.dropout_rate), x, 0)


def _in_memory(x: jax.Array) -> jax.Array:
    """`x`, in memory in the order of its axes: XLA on CPU would copy a transposed array as it is, then transpose it."""
    return x * lax.optimization_barrier(jnp.ones((), x.dtype))


def _at(x: jax.Array, j) -> jax.Array:
    return lax.dynamic_index_in_dim(x, j, keepdims=False, allow_negative_indices=False)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(b.dtype, jnp.float32))


def _greatest(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _least(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _loop(start, stop, body, carry):
    if isinstance(start, int) and isinstance(stop, int) and stop - start <= 1:
        return body(start, carry) if start < stop else carry
    return lax.fori_loop(start, stop, body, carry)


def _query_seen(length: int, query_seq_lengths: jax.Array) -> jax.Array:
    return jnp.arange(length) < query_seq_lengths[:, None]  # [B, T]


def _forward(
    *, scale, is_causal, local_window_size, logits_soft_cap, score_mod=None, mask_mod=None, dropout_rate=0.0, **operands
):
    call = _Call.of(operands, scale, is_causal, local_window_size, logits_soft_cap, score_mod, mask_mod, dropout_rate)
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    sinks, query_lengths = operands.get("sinks"), operands.get("query_seq_lengths")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    queries = call.by_rows(query)
    if call.few:
        keys, values = key[None], value[None]
    else:
        keys = _in_memory(to_tiles(call.by_columns(key), 1, call.columns).swapaxes(2, 3))  # [tiles, B, K, columns, H]
        values = _in_memory(to_tiles(call.by_columns(value), 1, call.columns).transpose(0, 1, 3, 4, 2))
    statistics = (query.shape[0], call.groups, 1, queries.shape[3], call.rows)
    if sinks is None:
        start = jnp.full(statistics, FLOOR, wide), jnp.zeros(statistics, wide)
    else:
        sink = sinks.astype(wide).reshape(call.groups, 1, -1, 1)
        top = jnp.maximum(sink, FLOOR)
        start = jnp.broadcast_to(top, statistics), jnp.broadcast_to(jnp.exp(sink - top), statistics)

    def attend(i, carry):
        out, all_lse = carry
        query = call.query_tile(queries, i)

        def step(j, carry, masked):
            top, total, acc = carry
            s, scale, _ = call.logits(call.scores(_at(keys, j), query), i, j, masked)
            new_top = jnp.maximum(top, jnp.max(s, axis=2, keepdims=True) * scale)
            p, decay = jnp.exp(s * scale - new_top), jnp.exp(top - new_top)
            total = decay * total + jnp.sum(p, axis=2, keepdims=True)
            part = call.mixed(_at(values, j), call.kept(p, i, j).astype(value.dtype))
            return new_top, total, decay * acc + part

        zeros = jnp.zeros((*query.shape[:2], value.shape[3], *query.shape[3:]), wide)
        top, total, acc = call.over_key_tiles(i, step, (*start, zeros))
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = jnp.where(empty, jnp.inf, top + jnp.log(total))
        acc = acc / (total * (1 - dropout_rate))
        return call.put_query_tile(out, acc, i), call.put_query_tile(all_lse, lse, i)

    start_rows = call.empty_rows(value.shape[3], query.dtype), call.empty_rows(1, wide)
    out, lse = call.over_query_tiles(attend, start_rows)
    out, lse = call.from_rows(out), call.from_rows(lse)[..., 0].transpose(0, 2, 1)
    if query_lengths is not None:
        seen = _query_seen(call.queries, query_lengths)
        out = jnp.where(seen[:, :, None, None], out, 0)
        unseen = jnp.inf if sinks is None else sinks.astype(wide)[:, None]
        lse = jnp.where(seen[:, None], lse, unseen)
    return (out, lse), ()


def _backward(
    *,
    outputs,
    residuals,
    cotangents,
    scale,
    is_causal,
    local_window_size,
    logits_soft_cap,
    score_mod=None,
    mask_mod=None,
    dropout_rate=0.0,
    part=False,
    **operands,
):
    """part: the keys are some of those that `outputs` are of."""
    del residuals
    call = _Call.of(operands, scale, is_causal, local_window_size, logits_soft_cap, score_mod, mask_mod, dropout_rate)
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    bias, sinks, query_lengths = (operands.get(name) for name in ("bias", "sinks", "query_seq_lengths"))
    (out, lse), dout = outputs, cotangents[0]
    keys, values = call.by_columns(key), call.by_columns(value)
    wide, weight = jnp.promote_types(query.dtype, jnp.float32), 1 / (1 - dropout_rate)
    lse = lse.transpose(0, 2, 1)  # [B, T, N]
    if query_lengths is not None:
        seen = _query_seen(call.queries, query_lengths)[:, :, None]
        dout, lse = jnp.where(seen[..., None], dout, 0), jnp.where(seen, lse, jnp.inf)
    delta = jnp.sum(dout.astype(wide) * out.astype(wide), axis=-1)

    whole = call.keys <= call.columns and not part  # a row is in one tile
    # The terms of such a gradient cancel, but for what sinks take: the rounding of out, by way of delta, would be seen.
    same_for_keys = call.bias is not None and call.bias.shape[4] == 1 < call.keys and not whole
    by_rows = [call.by_rows(x) for x in (query, dout, delta[..., None])] + [call.by_rows(lse[..., None], jnp.inf)]

    def attend(i, carry):
        all_dquery, carry = carry
        query, dout, delta, lse = (call.query_tile(x, i) for x in by_rows)
        query_rows, dout_rows = (x.transpose(0, 1, 3, 4, 2) for x in (query, dout))

        def step(j, carry, masked):
            dquery, sums, (dkey, dvalue, dbias) = carry
            key, value = call.key_tile(keys, j), call.key_tile(values, j)
            s, factor, (slope, cap_slope) = call.logits(_dot("bksh,bkhgt->bksgt", key, query), i, j, masked)
            p = jnp.exp(s * factor - lse)
            if whole:  # the rounding of lse, by which p would not sum to 1, need not be seen
                total = jnp.sum(p, axis=2, keepdims=True)
                if sinks is not None:
                    total = total + jnp.exp(sinks.astype(wide).reshape(call.groups, 1, -1, 1) - lse)
                p = p / jnp.where(total == 0, 1, total)
            dvalue = _add_at(dvalue, j, _dot("bksgt,bkgth->bksh", call.kept(p, i, j).astype(dout.dtype), dout_rows))
            dp = call.kept(_dot("bksh,bkhgt->bksgt", value, dout), i, j) * weight
            # A row of one large weight has dp ≈ delta: nor need the rounding of out be seen.
            ds = p * (dp - (jnp.sum(p * dp, axis=2, keepdims=True) if whole else delta))
            if same_for_keys:  # of p and ds, and of both times the slope
                of_row = (p, ds, p, ds) if slope is None else (p, ds, p * slope, ds * slope)
                sums = [x + jnp.sum(term, axis=2, keepdims=True) for x, term in zip(sums, of_row, strict=True)]
            if slope is not None:
                ds = ds * slope
            if dbias is not None and not same_for_keys:
                dbias = call.add_tile(dbias, ds, i, j)
            if cap_slope is not None:
                ds = ds * cap_slope
            ds = (ds * scale).astype(key.dtype)
            dkey = _add_at(dkey, j, _dot("bksgt,bkgth->bksh", ds, query_rows))
            return dquery + _dot("bkhs,bksgt->bkhgt", key.mT, ds), sums, (dkey, dvalue, dbias)

        sums = [jnp.zeros(delta.shape, wide)] * 4 if same_for_keys else []
        dquery, sums, carry = call.over_key_tiles(i, step, (jnp.zeros(query.shape, wide), sums, carry))
        if same_for_keys:  # Σ p dp, the exact delta, is Σ ds + Σ p · delta
            weights, error, slopes, total = sums
            dkey, dvalue, dbias = carry
            error = error + (weights - 1) * delta
            carry = dkey, dvalue, call.add_tile(dbias, total - slopes * error, i, 0)
        return call.put_query_tile(all_dquery, dquery, i), carry

    tiled = (-(-call.keys // call.columns), call.batch, call.groups, call.columns)
    empty = call.empty_rows(query.shape[3], query.dtype)
    dkey, dvalue = (jnp.zeros((*tiled, x.shape[3]), wide) for x in (key, value))
    dbias = None if call.bias is None else jnp.zeros(call.bias.shape, wide)
    dquery, (dkey, dvalue, dbias) = call.over_query_tiles(attend, (empty, (dkey, dvalue, dbias)))
    gradients = {
        "query": call.from_rows(dquery),
        "key": from_tiles(dkey.swapaxes(2, 3), 1, call.keys).astype(key.dtype),
        "value": (from_tiles(dvalue.swapaxes(2, 3), 1, call.keys) * weight).astype(value.dtype),
    }
    if bias is not None:
        dbias = dbias.reshape(*bias.shape[:2], *dbias.shape[3:])[:, :, : bias.shape[2], : bias.shape[3]]
        gradients["bias"] = dbias.astype(bias.dtype)
    if sinks is not None:
        gradients["sinks"] = -jnp.sum(jnp.exp(sinks.astype(wide) - lse) * delta, axis=(0, 1)).astype(sinks.dtype)
    return gradients


def _add_at(x: jax.Array, j, update: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, _at(x, j) + update, j, 0, allow_negative_indices=False)


def _cost(query, key, value, *, is_causal, local_window_size, mask_mod=None, prefix_lengths=None, **_):
    """Two products forward, five backward, over the pairs that the band and `mask_mod` leave; the rest is not known."""
    batch, queries, heads, size = query.shape
    keys, band = key.shape[1], Band.of(is_causal, local_window_size)
    if mask_mod is None:
        pairs = batch * heads * band.pairs(queries, keys)
    else:
        within = band if prefix_lengths is None else Band()
        count = modifiers.count_seen(mask_mod, within, (batch, heads, queries, keys), _MOST_SIDE, _MOST_SIDE)
        pairs = batch * heads // math.prod(count.shape[:2]) * int(count.sum(dtype=np.int64))
    return 2 * pairs * (size + value.shape[3]), 2 * pairs * (3 * size + 2 * value.shape[3])


def _note(phase, tile, query, key, value, *, is_causal, local_window_size, mask_mod=None, **others):
    """How many tiles the schedule leaves, where there is one; what the gradient of a bias and higher orders hold."""
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    if phase == "tangent":
        rows = min(queries, query_tile(keys))
        return f"by its definition, {rows} queries at a time: {4e-6 * batch * heads * rows * keys:.1f} MB of logits"
    looked_at = [
        name
        for name in ("mask", "query_segment_ids", "prefix_lengths", "query_seq_lengths", "key_value_seq_lengths")
        if others.get(name) is not None
    ]
    texts = []
    if mask_mod is not None or looked_at:
        rows, columns = tile or _tile_sizes(queries, keys, batch * heads)
        band, shape = Band.of(is_causal, local_window_size), (batch, heads, queries, keys)
        blocks = Blocks.of(shape, rows, columns, band, mask_mod=mask_mod)
        visited, masked = int(blocks.touched.sum()), int((blocks.touched & ~blocks.whole).sum())
        unknown = f"without {', '.join(looked_at)}, " if looked_at else ""
        total = blocks.touched.size
        texts.append(f"{unknown}visits {visited} of {total} tiles of {rows} × {columns} and masks {masked}")
    if phase == "backward" and tile is not None and others.get("bias") is not None:
        size = f"{4e-6 * batch * heads * queries * keys:.1f} MB"
        texts.append(f"the gradient of bias is made for every batch, head, query and key, {size}, then summed")
    return "; ".join(texts) or None


_OPERATOR = Operator(
    name=_NAME,
    differentiable=("query", "key", "value", "bias", "sinks"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.attention,
    gpu=gpu.attention,
    partition=lambda query: (query, PartitionSpec(query[0], query[2], query[1])),  # out [B, T, N, H], lse [B, N, T]
    cost=_cost,
    note=_note,
)

# Of some of the keys: (out, lse) of these, the lse inf where a query sees none of them, and gradients (by
# `PART.gradients`) from the out and the lse of all keys. The kernels do not tell the two apart.
PART = dataclasses.replace(_OPERATOR, xla=Rules(_forward, functools.partial(_backward, part=True)))


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    prefix_lengths: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: ArrayLike | None = None,
) -> Any:
    """out_i = Σ_j z_ij p_ij v_j,  p_ij = exp(s_ij) / (exp(sink) + Σ_j exp(s_ij)) where query i sees key j,

    s_ij = score_mod(cap(scale · q_i · k_j) + bias_ij - alibi_slope · |i - j|);  z_ij = 1 / (1 - dropout_rate), or 0
    where dropped.

    A drop-in for `jax.nn.dot_product_attention` that never holds the T × S logits: memory is O(T + S). One difference:
    a query that sees no key gives zeros. B batch, T queries, S keys, N heads, K key/value heads (dividing N), H and V
    head sizes.

    Args:
      query: [B, T, N, H] or [T, N, H]; float32, bfloat16 or float16.
      key, value: [B, S, K, H] and [B, S, K, V], or without B; of the query's dtype. Query head n uses key/value head
        n // (N / K).
      bias: floating, up to 4-D, broadcastable to [B, N, T, S]; added to the logits. Its gradient has its own shape.
      mask: boolean, broadcastable likewise; True = attend.
      scale: of the logits; None: 1 / sqrt(H).
      is_causal: query i sees the keys j ≤ i, counted from the start of both, whatever T and S.
      query_seq_lengths: integers [B]; queries beyond give zeros and pass no gradient.
      key_value_seq_lengths: integers [B]; keys beyond are not seen.
      local_window_size: (left, right): query i sees i - left ≤ j ≤ i + right, None leaves a side open; n is (n, n).
      implementation: None chooses; "pallas" or "xla" is strict; a sequence is tried in order.
      return_residual: also return the log-sum-exp of each row of logits.
      logits_soft_cap: c > 0 applies cap(s) = c · tanh(s / c) before the bias; None: cap(s) = s.
      query_segment_ids, key_value_segment_ids: integers [B, T] and [B, S]; only equal ids see each other. If T = S one
        serves for both.
      sinks: floating [N]; one more logit per head, without a value (as if a key of value zero were always seen).
      prefix_lengths: integers [B]; the keys before are seen whatever causality and the window say (a prefix LM).
      alibi_slopes: floating [N], constant to derivatives; see the formula.
      score_mod: (score, batch, head, query, key) -> score, applied last; elementwise, in float32, the positions int32
        arrays that broadcast with score. Differentiated by JAX. It must be finite where the key is seen.
      mask_mod: (batch, head, query, key) -> bool, True = attend; elementwise. It is known before any number is seen:
        what it hides is skipped. Both may use numbers and constant arrays from around them (arrays: in XLA only), no
        traced ones, and each new function object is traced and compiled anew: define it once.
      dropout_rate: a Python number in [0, 1), the chance that z_ij is 0.
      dropout_key: with a rate above 0, a key of `jax.random`, or `jaxops.dropout_rows` of one. The same key drops the
        same pairs on every chip, under every transform and sharding.

    Returns:
      out [B, T, N, V] or [T, N, V] of the query's dtype; with `return_residual`, (out, lse): lse is [B, T, N] or
      [T, N] in the key's dtype, constant to derivatives, and JAX's large negative number where nothing is seen.

    Raises:
      ValueError: shapes, lengths, windows, the cap or the rate do not fit, a mask or bias could be meant in two ways, a
        modifier is not elementwise or captures a traced array, dropout has no key, or `implementation` is unknown or
        refuses.
      TypeError: a dtype is not one of those above, also of what a modifier returns.

    A bias hides a key if it is -inf or below -1e30. A query all of whose keys have a bias of about -1e9 still sees
    them, but float32 has no digits left for its gradient: hide such keys by `mask`.

    FlashAttention-2 (Dao, arXiv:2307.08691); grouped heads (Ainslie et al., arXiv:2305.13245); soft cap as in Gemma 2
    (arXiv:2408.00118); sinks as learned in gpt-oss (arXiv:2508.10925) after StreamingLLM (arXiv:2309.17453); prefix LM
    as in T5 (arXiv:1910.10683); ALiBi (Press et al., arXiv:2108.12409); modifiers after FlexAttention
    (arXiv:2412.05496); dropout of the weights as in the Transformer (arXiv:1706.03762).
    """
    query, shape = _heads("query", query), jnp.shape(query)
    key, value = _heads("key", key, query), _heads("value", value, query)
    (batch, queries, heads, size), (_, keys, groups, _) = query.shape, key.shape
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{_NAME}: value must have the shape of key but for the last axis, {key.shape}, got {value.shape}"
        )
    if heads % groups if groups else heads:
        hint = _SWAPPED if keys and queries % keys == 0 else ""
        raise ValueError(f"{_NAME}: query must have a multiple of the {groups} heads of key, got {heads}{hint}")
    for name, option in (("is_causal", is_causal), ("return_residual", return_residual)):
        if not isinstance(option, bool | np.bool_):
            raise TypeError(f"{_NAME}: {name} must be a bool, got {type(option).__name__}")
    if logits_soft_cap is not None:
        logits_soft_cap = checks.number(_NAME, "logits_soft_cap", logits_soft_cap, positive=True)
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        if queries != keys:
            raise ValueError(
                f"{_NAME}: query_segment_ids and key_value_segment_ids must come together because T = {queries} and "
                f"S = {keys} differ, got {'query' if key_value_segment_ids is None else 'key_value'}_segment_ids alone"
            )
        shared = query_segment_ids if key_value_segment_ids is None else key_value_segment_ids
        query_segment_ids = key_value_segment_ids = shared
    if sinks is not None:
        sinks = checks.floating(_NAME, "sinks", sinks, shape=(heads,), of="one per query head")
    if alibi_slopes is not None:
        alibi_slopes = checks.floating(_NAME, "alibi_slopes", alibi_slopes, shape=(heads,), of="one per query head")
        alibi_slopes = alibi_slopes.astype(jnp.promote_types(query.dtype, jnp.float32))
    query, scale = _fold_scale(query, scale, size)
    logits = (batch, heads, queries, keys), (batch, queries, heads, groups)
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "bias": _over_logits("bias", bias, *logits, batched=len(shape) == 4),
        "mask": _over_logits("mask", mask, *logits, batched=len(shape) == 4),
        "query_seq_lengths": _integers("query_seq_lengths", query_seq_lengths, (batch,), "[B]"),
        "key_value_seq_lengths": _integers("key_value_seq_lengths", key_value_seq_lengths, (batch,), "[B]"),
        "query_segment_ids": _integers("query_segment_ids", query_segment_ids, (batch, queries), "[B, T]"),
        "key_value_segment_ids": _integers("key_value_segment_ids", key_value_segment_ids, (batch, keys), "[B, S]"),
        "sinks": sinks,
        "prefix_lengths": _integers("prefix_lengths", prefix_lengths, (batch,), "[B]"),
        "alibi_slopes": alibi_slopes,
    }
    # An option that is off is left out.
    more: dict[str, Any] = {}
    for name, modifier in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if modifier is not None:
            more[name] = _modifier(name, modifier)
    if rate := dropout.rate_of(_NAME, dropout_rate):
        more["dropout_rate"] = rate
        operands["dropout_rows"] = dropout.rows_of(_NAME, dropout_key, rate, batch, heads, queries)
    out, lse = _OPERATOR(
        operands,
        implementation=implementation,
        scale=scale,
        is_causal=bool(is_causal),
        local_window_size=_window(local_window_size),
        logits_soft_cap=logits_soft_cap,
        **more,
    )
    out = out.reshape(*shape[:-1], value.shape[3])
    if not return_residual:
        return out
    lse = jnp.where(lse == jnp.inf, -0.7 * float(jnp.finfo(jnp.float32).max), lse)
    lse = lse.transpose(0, 2, 1).reshape(shape[:-1]).astype(key.dtype)
    return out, lax.stop_gradient(lse)


_SWAPPED = "; BTNH is expected, this looks like BNTH: swap axes 1 and 2 of query, key and value"


def _heads(name: str, x: ArrayLike, query: jax.Array | None = None) -> jax.Array:
    """`x` as [batch, length, heads, size], with the dtype and batch of `query`, and its head size if it is the key."""
    x = checks.floating(_NAME, name, x)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise TypeError(f"{_NAME}: {name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{_NAME}: {name} must have shape [batch, length, heads, size] without or with batch, got {x.shape}"
        )
    x = x if x.ndim == 4 else x[None]
    if query is not None:
        if x.dtype != query.dtype:
            raise TypeError(f"{_NAME}: {name} must have the dtype of query, {query.dtype}, got {x.dtype}")
        for axis, what in ((0, "batch"), (3, "head size"))[: 2 if name == "key" else 1]:
            if x.shape[axis] != query.shape[axis]:
                raise ValueError(f"{_NAME}: {name} must have the {what} of query {query.shape}, got {x.shape}")
    return x


def _over_logits(name: str, x: ArrayLike | None, full: tuple, swapped: tuple, *, batched: bool) -> jax.Array | None:
    """`x` as a 4-D array that broadcasts to `full`; `swapped` is what the logits would be if BNTH had been given.

    Two axes that could as well be [B, S] are refused, because broadcasting would take [T, S]. Three are [N, T, S], as
    in `jax.nn.dot_product_attention`.
    """
    if x is None:
        return None
    x = checks.array(_NAME, name, x)
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(f"{_NAME}: mask must be boolean, got {x.dtype}; an additive mask goes into bias")
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        hint = "; a boolean mask goes into mask" if x.dtype == jnp.bool_ else ""
        raise TypeError(f"{_NAME}: bias must be of a floating dtype, got {x.dtype}{hint}")
    fits_swapped = x.ndim == 4 and all(have in (1, want) for have, want in zip(x.shape, swapped, strict=True))
    checks.broadcastable(_NAME, name, x, to=full, of="[B, N, T, S]" + (_SWAPPED if fits_swapped else ""))
    if batched and x.ndim == 2 and x.shape[0] == full[0] > 1:
        raise ValueError(
            f"{_NAME}: {name} of shape {x.shape} could be [T, S] or [B, S], as the batch is {full[0]}, too: "
            "give it four axes, [B or 1, N or 1, T or 1, S or 1]"
        )
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _modifier(name: str, function: Any) -> Callable:
    """`function`, a `score_mod` or `mask_mod` that keeps the rules."""
    scored = name == "score_mod"
    expected = f"({'score, ' if scored else ''}batch, head, query, key) -> {'score' if scored else 'bool'}"
    if not callable(function):
        raise TypeError(f"{_NAME}: {name} must be a function {expected}, got {type(function).__name__}")
    try:
        hash(function)
        inspect.signature(function).bind(*range(5 if scored else 4))
    except TypeError as error:
        raise TypeError(f"{_NAME}: {name} must be a hashable function {expected}: {error}") from error
    except ValueError:  # a function without a signature
        pass
    program = modifiers.traced(function, scored=scored)
    returned, want = program.out_avals, jnp.dtype(jnp.float32 if scored else jnp.bool_)
    if len(returned) != 1 or returned[0].dtype != want:
        got = ", ".join(str(x.dtype) for x in returned) or "nothing"
        raise TypeError(f"{_NAME}: {name} must return one array of {want}, got {got}")
    shape = returned[0].shape
    if shape != modifiers.TILE if scored else not _fits(shape, modifiers.TILE):
        raise ValueError(
            f"{_NAME}: {name} must keep the shape of {'score' if scored else 'its positions'}, {modifiers.TILE} in a "
            f"trial, got {shape}"
        )
    if mixing := modifiers.mixing(program):
        raise ValueError(f"{_NAME}: {name} must be elementwise, but it calls {mixing}")
    if any(isinstance(x, jax.core.Tracer) for x in modifiers.captured(program)):
        way = "bias, which has a gradient" if scored else "mask"
        raise ValueError(f"{_NAME}: {name} must not use a traced array from around it: give what it makes as {way}")
    return function


def _fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    return len(shape) <= len(full) and all(n in (1, m) for n, m in zip(shape[::-1], full[::-1], strict=False))


def _integers(name: str, x: ArrayLike | None, shape: tuple[int, ...], of: str) -> jax.Array | None:
    if x is None:
        return None
    x = checks.array(_NAME, name, x)
    if shape[0] == 1 and (1, *x.shape) == shape:  # [T], as the query may be [T, N, H]
        x = x[None]
    return checks.integer(_NAME, name, x, shape=shape, of=of).astype(jnp.int32)


def _fold_scale(query: jax.Array, scale: Any, size: int) -> tuple[jax.Array, float]:
    """(query, scale) with the same product, the scale a Python number > 0: the maximum may be taken before it."""
    if scale is None:
        return query, 1 / math.sqrt(size) if size else 1.0
    if isinstance(scale, jax.Array) and scale.ndim == 0 and jnp.issubdtype(scale.dtype, jnp.floating):
        if isinstance(scale, jax.core.Tracer):
            wide = jnp.promote_types(query.dtype, jnp.float32)
            return (query.astype(wide) * scale).astype(query.dtype), 1.0
        scale = float(scale)
    scale = checks.finite(_NAME, "scale", scale)
    if scale == 0:
        return query * 0, 1.0
    return (-query, -scale) if scale < 0 else (query, scale)


def _window(size: Any) -> tuple[int | None, int | None] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    try:
        sides = tuple(None if side is None else operator.index(side) for side in sides)
    except TypeError:
        sides = ()
    if len(sides) != 2:
        raise TypeError(f"{_NAME}: local_window_size must be an int or (left, right) of ints or None, got {size!r}")
    if any(side is not None and side < 0 for side in sides):
        raise ValueError(f"{_NAME}: local_window_size must not be negative, got {size!r}")
    return sides
