"""Attention: the public function, and its XLA rules, which never hold more than a tile of logits per head.

Forward (online softmax, Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022): for each tile of queries, over the tiles of keys,

    m' = max(m, max_j s_ij);  p = exp(s - m');  l' = e^(m - m') l + Σ_j p;  acc' = e^(m - m') acc + p v;   out = acc / l

Backward: p = exp(s - lse);  dv = pᵀ dout;  ds = p ∘ (dout vᵀ - Σ_h dout ∘ out);  dq = scale ds k;  dk = scale dsᵀ q.
"""
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops.autodiff import Operator, Rules
from jaxops.reference.attention import FLOOR
from jaxops.reference.attention import dot_product_attention as reference
from pallas_kernels.masks import Band
from pallas_kernels.padding import from_tiles, pad_to, round_up, to_tiles

# Sides of a tile of logits, and how many logits the tiles of all heads may have together: what stays in a CPU's cache.
_LEAST_SIDE, _MOST_SIDE, _MOST_LOGITS = 128, 512, 1 << 20


def _tile_sizes(queries: int, keys: int, heads: int) -> tuple[int, int]:
    """(rows, columns) of a tile: square where both sizes are long, one tile where one is short; cut evenly, so little is padded."""
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

    A tile of logits is [B, K, columns, G, rows], keys before queries: then no product needs a tile of logits transposed.
    """

    key: jax.Array  # [key tiles, B, K, columns, H]
    value: jax.Array  # the same
    bias: jax.Array | None  # [B or 1, K or 1, G or 1, T or 1, S or 1]
    mask: jax.Array | None  # the same
    key_lengths: jax.Array | None  # [B]
    query_segments: jax.Array | None  # [B, 1, 1, 1, T]
    key_segments: jax.Array | None  # [B, 1, S, 1, 1]
    queries: int  # before padding
    keys: int
    rows: int  # of a tile
    columns: int
    scale: float
    soft_cap: float | None
    band: Band

    @staticmethod
    def of(operands: dict[str, Any], scale, is_causal, local_window_size, logits_soft_cap) -> "_Call":
        query, key, value = (operands[name] for name in ("query", "key", "value"))
        (batch, queries, heads, _), (_, keys, groups, _) = query.shape, key.shape
        rows, columns = _tile_sizes(queries, keys, batch * heads)

        def grouped(name):  # [B, N, T, S] -> [B, K, G, T, S], whatever is 1 stays 1
            x = operands.get(name)
            if x is None:
                return None
            x = x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else (groups, heads // groups)), *x.shape[2:])
            for axis, tile in ((3, rows), (4, columns)):
                if x.shape[axis] > 1:
                    x = pad_to(x, axis, round_up(x.shape[axis], tile))
            return x

        segments = [operands.get("query_segment_ids"), operands.get("key_value_segment_ids")]
        if segments[0] is not None:
            segments = [pad_to(x, 1, round_up(x.shape[1], n)) for x, n in zip(segments, (rows, columns), strict=True)]
            segments = [segments[0][:, None, None, None, :], segments[1][:, None, :, None, None]]
        return _Call(
            key=_key_tiles(key, columns),
            value=_key_tiles(value, columns),
            bias=grouped("bias"),
            mask=grouped("mask"),
            key_lengths=operands.get("key_value_seq_lengths"),
            query_segments=segments[0],
            key_segments=segments[1],
            queries=queries,
            keys=keys,
            rows=rows,
            columns=columns,
            scale=scale,
            soft_cap=logits_soft_cap,
            band=Band.of(is_causal, local_window_size),
        )

    @property
    def groups(self) -> int:
        return self.key.shape[2]

    def query_tiles(self, x: jax.Array, fill=0) -> jax.Array:
        """[B, T, N, H] -> [query tiles, B, K, H, G, rows]."""
        x = x.reshape(*x.shape[:2], self.groups, -1, x.shape[3])
        return to_tiles(x, 1, self.rows, fill).transpose(0, 1, 3, 5, 4, 2)

    def from_query_tiles(self, x: jax.Array) -> jax.Array:
        """The inverse of `query_tiles`."""
        x = from_tiles(x.transpose(0, 1, 5, 2, 4, 3), 1, self.queries)
        return x.reshape(*x.shape[:2], -1, x.shape[4])

    def over_query_tiles(self, f: Callable, carry: Any, tiles: Any) -> tuple[Any, Any]:
        """`carry, out = f(i, carry, tile)` for every query tile i; the outs stacked."""
        count = -(-self.queries // self.rows)
        if count == 1:
            carry, out = f(0, carry, jax.tree.map(lambda x: x[0], tiles))
            return carry, jax.tree.map(lambda x: x[None], out)
        return lax.scan(lambda carry, at: f(at[0], carry, at[1]), carry, (jnp.arange(count), tiles))

    def over_key_tiles(self, i, f: Callable, carry: Any) -> Any:
        """`carry = f(j, carry, masked=…)` for every key tile j that query tile i sees any of; unmasked where it sees all."""
        row, columns, tiles = i * self.rows, self.columns, self.key.shape[0]
        if tiles == 1:
            first, whole = 0, self.band.whole(row, self.rows, self.keys) if isinstance(i, int) else (0, 0)
            seen_whole = isinstance(i, int) and whole[0] <= 0 and whole[1] >= self.keys
            return f(0, carry, masked=self.always_masked or self.key_lengths is not None or not seen_whole)

        first, end = self.band.touched(row, self.rows, self.keys)
        whole, whole_end = self.band.whole(row, self.rows, self.keys)
        if self.key_lengths is not None:
            end = jnp.minimum(end, jnp.max(self.key_lengths))
            whole_end = jnp.minimum(whole_end, jnp.min(self.key_lengths))
        first, end = first // columns, (end + columns - 1) // columns
        whole, whole_end = (whole + columns - 1) // columns, whole_end // columns
        if self.always_masked:
            return _loop(first, end, functools.partial(f, masked=True), carry)
        whole = _at_most(_at_least(whole, first), end)
        whole_end = _at_most(_at_least(whole_end, whole), end)
        for start, stop, masked in ((first, whole, True), (whole, whole_end, False), (whole_end, end, True)):
            carry = _loop(start, stop, functools.partial(f, masked=masked), carry)
        return carry

    @property
    def always_masked(self) -> bool:
        return self.mask is not None or self.query_segments is not None

    def key_tile(self, x: jax.Array, j) -> jax.Array:
        return lax.dynamic_index_in_dim(x, j, keepdims=False)

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

    def logits(self, query: jax.Array, i, j, masked: bool) -> tuple[jax.Array, jax.Array | None]:
        """Tile (i, j) of s, -inf where masked, and its tanh if it is capped."""
        s = _dot("bksh,bkhgt->bksgt", self.key_tile(self.key, j), query) * self.scale
        tanh = None
        if self.soft_cap is not None:
            tanh = jnp.tanh(s / self.soft_cap)
            s = self.soft_cap * tanh
        if self.bias is not None:
            s = s + self.tile_of(self.bias, i, j).astype(s.dtype)
        if masked:
            s = jnp.where(self.seen(i, j), s, -jnp.inf)
        return s, tanh

    def seen(self, i, j) -> jax.Array:
        """Which logits of tile (i, j) take part, broadcastable to the tile."""
        row = i * self.rows + jnp.arange(self.rows)
        column = j * self.columns + jnp.arange(self.columns)[:, None, None]
        seen = (column < self.keys) & self.band.allowed(row, column)
        if self.key_lengths is not None:
            seen = seen & (column < self.key_lengths[:, None, None, None, None])
        if self.mask is not None:
            seen = seen & self.tile_of(self.mask, i, j)
        if self.query_segments is not None:
            rows = lax.dynamic_slice_in_dim(self.query_segments, i * self.rows, self.rows, axis=4)
            columns = lax.dynamic_slice_in_dim(self.key_segments, j * self.columns, self.columns, axis=2)
            seen = seen & (rows == columns)
        return seen


def _key_tiles(x: jax.Array, columns: int) -> jax.Array:
    """[B, S, K, H] -> [key tiles, B, K, columns, H]."""
    return jnp.moveaxis(to_tiles(x, 1, columns), 2, 3)


def _from_key_tiles(x: jax.Array, keys: int) -> jax.Array:
    return from_tiles(jnp.moveaxis(x, 3, 2), 1, keys)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(b.dtype, jnp.float32))


def _at_least(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _at_most(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _loop(start, stop, body, carry):
    if isinstance(start, int) and isinstance(stop, int) and stop - start <= 1:
        return body(start, carry) if start < stop else carry
    return lax.fori_loop(start, stop, body, carry)


def _query_seen(length: int, query_seq_lengths: jax.Array) -> jax.Array:
    return jnp.arange(length) < query_seq_lengths[:, None]  # [B, T]


def _forward(query, key, value, *, scale, is_causal, local_window_size, logits_soft_cap, **optional):
    call = _Call.of(
        dict(query=query, key=key, value=value, **optional), scale, is_causal, local_window_size, logits_soft_cap
    )
    sinks, query_lengths = optional.get("sinks"), optional.get("query_seq_lengths")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    tiles = call.query_tiles(query)
    statistics = (*tiles.shape[1:3], 1, *tiles.shape[4:])
    if sinks is None:
        start = jnp.full(statistics, FLOOR, wide), jnp.zeros(statistics, wide)
    else:
        sink = sinks.astype(wide).reshape(call.groups, 1, -1, 1)
        top = jnp.maximum(sink, FLOOR)
        start = jnp.broadcast_to(top, statistics), jnp.broadcast_to(jnp.exp(sink - top), statistics)

    def attend(i, _, query):
        def step(j, carry, masked):
            top, total, acc = carry
            s, _ = call.logits(query, i, j, masked)
            new_top = jnp.maximum(top, jnp.max(s, axis=2, keepdims=True))
            p, decay = jnp.exp(s - new_top), jnp.exp(top - new_top)
            total = decay * total + jnp.sum(p, axis=2, keepdims=True)
            v = call.key_tile(call.value, j)
            return new_top, total, decay * acc + _dot("bksh,bksgt->bkhgt", v, p.astype(v.dtype))

        top, total, acc = call.over_key_tiles(i, step, (*start, jnp.zeros(query.shape, wide)))
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = jnp.where(empty, jnp.inf, top + jnp.log(total))
        return None, ((acc / total).astype(query.dtype), lse)

    _, (out, lse) = call.over_query_tiles(attend, None, tiles)
    out, lse = call.from_query_tiles(out), call.from_query_tiles(lse)[..., 0].transpose(0, 2, 1)
    if query_lengths is not None:
        seen = _query_seen(call.queries, query_lengths)
        out = jnp.where(seen[:, :, None, None], out, 0)
        unseen = jnp.inf if sinks is None else sinks.astype(wide)[:, None]
        lse = jnp.where(seen[:, None], lse, unseen)
    return (out, lse), ()


def _backward(
    query, key, value, *, outputs, residuals, cotangents, scale, is_causal, local_window_size, logits_soft_cap, **optional
):
    del residuals
    call = _Call.of(
        dict(query=query, key=key, value=value, **optional), scale, is_causal, local_window_size, logits_soft_cap
    )
    bias, sinks, query_lengths = (optional.get(name) for name in ("bias", "sinks", "query_seq_lengths"))
    (out, lse), dout = outputs, cotangents[0]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    lse = lse.transpose(0, 2, 1)  # [B, T, N]
    if query_lengths is not None:
        seen = _query_seen(call.queries, query_lengths)[:, :, None]
        dout, lse = jnp.where(seen[..., None], dout, 0), jnp.where(seen, lse, jnp.inf)
    delta = jnp.sum(dout.astype(wide) * out.astype(wide), axis=-1)

    def attend(i, carry, tiles):
        query, dout, lse, delta = tiles
        query_rows, dout_rows = (x.transpose(0, 1, 3, 4, 2) for x in (query, dout))

        def step(j, carry, masked):
            dquery, (dkey, dvalue, dbias) = carry
            s, tanh = call.logits(query, i, j, masked)
            p = jnp.exp(s - lse)
            dvalue = _add_at(dvalue, j, _dot("bksgt,bkgth->bksh", p.astype(dout.dtype), dout_rows))
            ds = p * (_dot("bksh,bkhgt->bksgt", call.key_tile(call.value, j), dout) - delta)
            if dbias is not None:
                dbias = call.add_tile(dbias, ds, i, j)
            if tanh is not None:
                ds = ds * (1 - tanh * tanh)
            ds = (ds * scale).astype(key.dtype)
            dkey = _add_at(dkey, j, _dot("bksgt,bkgth->bksh", ds, query_rows))
            return dquery + _dot("bksh,bksgt->bkhgt", call.key_tile(call.key, j), ds), (dkey, dvalue, dbias)

        dquery, carry = call.over_key_tiles(i, step, (jnp.zeros(query.shape, wide), carry))
        return carry, dquery.astype(query.dtype)

    tiles = (
        call.query_tiles(query),
        call.query_tiles(dout),
        call.query_tiles(lse[..., None], jnp.inf),
        call.query_tiles(delta[..., None]),
    )
    zeros = jnp.zeros(call.key.shape, wide)
    start = zeros, zeros, None if bias is None else jnp.zeros(call.bias.shape, wide)
    (dkey, dvalue, dbias), dquery = call.over_query_tiles(attend, start, tiles)
    gradients = {
        "query": call.from_query_tiles(dquery),
        "key": _from_key_tiles(dkey, call.keys).astype(key.dtype),
        "value": _from_key_tiles(dvalue, call.keys).astype(value.dtype),
    }
    if bias is not None:
        dbias = dbias.reshape(*bias.shape[:2], *dbias.shape[3:])[:, :, : bias.shape[2], : bias.shape[3]]
        gradients["bias"] = dbias.astype(bias.dtype)
    if sinks is not None:
        gradients["sinks"] = -jnp.sum(jnp.exp(sinks.astype(wide) - lse) * delta, axis=(0, 1)).astype(sinks.dtype)
    return gradients


def _add_at(x: jax.Array, j, update: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(x, j, keepdims=False) + update, j, 0)
