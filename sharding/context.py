"""Context parallelism: attention over a sequence that is split over a mesh axis, x[B, S_C, N, H].

Queries stay where they are, keys and values go round the ring of C devices. Each step attends to what is there and puts
it together with what came before, by the log-sum-exp of both:

    out = Σ_c exp(lse_c - lse) · out_c,   lse = log Σ_c exp(lse_c)

Backward goes round once more: with the out and the lse of all keys, a part of the keys has its gradients to itself. The
gradients of keys travel with their keys, and then home.

Source: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv:2310.01889; the
balanced layout: Brandon et al., "Striped Attention", arXiv:2311.09431, with blocks as in Llama 3 (arXiv:2407.21783).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxops import dispatch, dot_product_attention
from jaxops.autodiff import varying_alike
from jaxops.ops import checks
from jaxops.ops.attention import PART
from pallas_kernels.masks import Band
from sharding import collectives
from sharding.derivatives import Rules

_NAME = "context_parallel_attention"


def context_order(length: int, parts: int) -> np.ndarray:
    """int32 [length]: the positions of a sequence in the balanced order, in which `parts` devices share it evenly.

    The sequence is cut in 2 · parts blocks; device c has block c and block 2 · parts - 1 - c, so that causal attention
    gives all devices the same work. `x[:, context_order(S, C)]` is what to split; `y[:, argsort(context_order(S, C))]`
    is in the order of the sequence again.

    Raises `ValueError` if 2 · parts does not divide the length.
    """
    if length % (2 * parts):
        raise ValueError(
            f"context_order: length must be a multiple of {2 * parts}, two blocks for each of {parts} parts, got "
            f"{length}"
        )
    blocks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.stack([blocks[:parts], blocks[: parts - 1 : -1]], axis=1).reshape(-1)


def context_positions(rows: int, *, axis: str = "context", balanced: bool = False) -> jax.Array:
    """int32 [rows]: the positions in the whole sequence of the device's rows, for rotary embeddings.

    Raises `ValueError` if `axis` is none of an enclosing `jax.shard_map`, or with `balanced` if rows is odd.
    """
    size = collectives.axis_size("context_positions", axis)
    me = lax.axis_index(axis)
    if not balanced:
        return me * rows + jnp.arange(rows, dtype=jnp.int32)
    if rows % 2:
        raise ValueError(f"context_positions: rows must be even if balanced, two blocks along {axis!r}, got {rows}")
    block = jnp.arange(rows // 2, dtype=jnp.int32)
    return jnp.concatenate([me * (rows // 2) + block, (2 * size - 1 - me) * (rows // 2) + block])


def context_parallel_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis: str = "context",
    is_causal: bool = False,
    balanced: bool = False,
    scale: float | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """out[B, T_C, N, V] = `jaxops.dot_product_attention`(query[B, T_C, N, H], key[B, S_C, K, H], value[B, S_C, K, V]).

    Forward: keys and values go round C, (C - 1) / C of their bytes from every device to the next. Backward: they go
    round again, and their gradients in float32 with them, and home. A step that a window leaves nothing to see in
    ends the ring.

    Args:
      query, key, value: the device's part of the sequence, as in `jaxops.dot_product_attention`.
      axis: the mesh axis C that the sequence is split over.
      is_causal, local_window_size, logits_soft_cap, sinks: as there, of positions in the whole sequence. `sinks` [N] is
        the same on all devices of `axis`.
      balanced: the sequence is in the order of `context_order`: of causal attention every device has the same work.
        Without it, the first device waits most of the time for the last.
      scale: a Python number above 0; None: 1 / sqrt(H).
      query_segment_ids, key_value_segment_ids: integers [B, T / C] and [B, S / C]; if T = S one serves for both.
      implementation: of the attention to each part of the keys.

    Each part's out is rounded to the dtype of query before the sum, which is float32. Raises `TypeError` or
    `ValueError` as `jaxops.dot_product_attention` does, if `axis` is none of an enclosing `jax.shard_map`, if T and S
    differ in causal or windowed attention, or if `balanced` comes without `is_causal`, with a window, or with an odd
    number of rows.
    """
    size = collectives.axis_size(_NAME, axis)
    given: dict[str, Any] = {
        "local_window_size": local_window_size,
        "logits_soft_cap": logits_soft_cap,
        "query_segment_ids": query_segment_ids,
        "key_value_segment_ids": key_value_segment_ids,
        "sinks": sinks,
    }
    if scale is not None:
        scale = checks.number(_NAME, "scale", scale, positive=True)
    # What is wrong with a part of the keys, the attention to it says.
    whole = functools.partial(
        dot_product_attention, scale=scale, is_causal=is_causal, implementation=implementation, **given
    )
    shape = jax.eval_shape(whole, query, key, value).shape
    windowed = local_window_size is not None
    if (is_causal or windowed) and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"{_NAME}: key must have as many rows as query where positions count, got query {query.shape} and key "
            f"{key.shape}"
        )
    if balanced:
        if not is_causal or windowed:
            raise ValueError(f"{_NAME}: balanced is the order of causal attention without a window, got {is_causal=}, "
                             f"{local_window_size=}")  # fmt: skip
        if query.shape[-3] % 2:
            raise ValueError(
                f"{_NAME}: query has shape {query.shape}, its dimension {query.ndim - 3} must be a multiple of 2 if "
                f"balanced, two blocks for each device along {axis!r}"
            )
    if size == 1:
        return whole(*(collectives.copy(x, axis) for x in (query, key, value)))
    if query_segment_ids is None:
        given["query_segment_ids"] = key_value_segment_ids
    elif key_value_segment_ids is None:
        given["key_value_segment_ids"] = query_segment_ids
    window = local_window_size if isinstance(local_window_size, tuple) else (local_window_size, local_window_size)
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    ring = _Ring(
        axis=axis,
        size=size,
        band=Band.of(is_causal, window),
        balanced=balanced,
        rows=query.shape[-3],
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        logits_soft_cap=cap,
        implementation=implementation if implementation is None or isinstance(implementation, str)
        else tuple(implementation),
        names=tuple(name for name in ("sinks", *_SEGMENTS) if given[name] is not None),
    )  # fmt: skip
    batched = lambda x: x.reshape(-1, *x.shape[-3:])
    more = [given[name] for name in ring.names]
    more = [x if name == "sinks" or x.ndim == 2 else x[None] for name, x in zip(ring.names, more, strict=True)]
    operands = varying_alike([collectives.copy(x, axis) for x in (*map(batched, (query, key, value)), *more)])
    found = _forward(ring, *map(lax.stop_gradient, operands))
    return _RULES(ring, *operands, *found)[0].reshape(shape)


_SEGMENTS = ("query_segment_ids", "key_value_segment_ids")


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """A `mask_mod`: a band that begins elsewhere than at query 0 and key 0."""

    band: Band

    def __call__(self, batch, head, query, key):
        return self.band.allowed(query, key)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """These queries see these keys, each (first, end), in the way that the options of attention say."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    options: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Ring:
    """A call: of every device's shapes, and what does not depend on numbers. `names`: of the operands after value."""

    axis: str
    size: int
    band: Band
    balanced: bool
    rows: int
    scale: float
    logits_soft_cap: float | None
    implementation: dispatch.Implementation
    names: tuple[str, ...]

    def pieces(self, distance: int, keys: int) -> list[_Piece | None]:
        """What there is to do for keys that are `distance` devices before the queries; None is nothing.

        All devices have as many. There are two after the first step: the compiler lets what is sent travel beside one.
        """
        everything = (0, self.rows), (0, keys)
        if distance == 0:
            window = (("is_causal", False), ("local_window_size", (self.band.left, self.band.right)))
            plain = {Band(): (), Band(None, 0): (("is_causal", True),)}
            return [_Piece(*everything, plain.get(self.band, window))]
        cut = (self.rows + 1) // 2
        early, late = (0, cut), (cut, self.rows)
        if self.balanced:
            return [_Piece(late, early), _Piece(early, early) if distance > 0 else _Piece(late, late)]
        return [self.shifted(half, keys, distance * self.rows) for half in (early, late) if half[0] < half[1]]

    def shifted(self, queries: tuple[int, int], keys: int, distance: int) -> _Piece | None:
        """The piece of these queries, `distance` rows after the keys."""
        distance, last = distance + queries[0], queries[1] - queries[0] - 1
        left, right = self.band.left, self.band.right
        left = None if left is None or left - distance >= last else left - distance
        right = None if right is None or right + distance >= keys - 1 else right + distance
        if (left is not None and left <= -keys) or (right is not None and right < -last):
            return None
        band = Band(left, right)
        return _Piece(queries, (0, keys), () if band.open else (("mask_mod", _Shifted(band)),))

    def steps(self, keys: int) -> list[list[tuple[_Piece | None, _Piece | None]]]:
        """For each step t its pieces, each of the devices from t on and of those before, whose ring has wrapped."""
        found = []
        for step in range(self.size):
            mine = self.pieces(step, keys)
            found.append(list(zip(mine, self.pieces(step - self.size, keys) if step else mine, strict=True)))
        while all(pair == (None, None) for pair in found[-1]):
            found.pop()
        return found

    def run(self, step: int, pieces: tuple[_Piece | None, _Piece | None], do: Callable, nothing: Any) -> Any:
        """do(take, put, options) of the one of the pieces that the device's place chooses; else `nothing`.

        take(x, of, axis) is the piece's part of x, `of` being "queries" or "keys"; put(y, x, of, axis, fill) the
        inverse, for a whole of x's size.
        """
        late = lax.axis_index(self.axis) >= step
        first, second = pieces
        if first is None or second is None:  # what a device computes for nothing, another waits for in any case
            piece = first or second
            if piece is None:
                return nothing
            found, seen = self.run(step, (piece, piece), do, nothing), late if first else ~late
            return jax.tree.map(lambda x, y: jnp.where(seen, x, y), found, nothing)
        if first.options != second.options:
            return lax.cond(late, *(lambda p=p: self.run(step, (p, p), do, nothing) for p in pieces))

        def chosen(f: Callable, of: str) -> jax.Array:
            ranges = [getattr(piece, of) for piece in (first, second)]
            return f(*ranges[0]) if ranges[0] == ranges[1] else jnp.where(late, f(*ranges[0]), f(*ranges[1]))

        def take(x, of, axis):
            return chosen(lambda start, end: lax.slice_in_dim(x, start, end, axis=axis), of)

        def put(y, x, of, axis, fill=0):
            around = lambda start, end: [(start, x.shape[axis] - end) if i == axis else (0, 0) for i in range(y.ndim)]
            return chosen(lambda *ends: jnp.pad(y, around(*ends), constant_values=fill), of)

        plain = dict(is_causal=False, local_window_size=None)
        common = dict(scale=self.scale, logits_soft_cap=self.logits_soft_cap, implementation=self.implementation)
        return do(take, put, plain | common | dict(first.options))

    def send(self, x: Any, way: int = 1) -> Any:
        pairs = [(i, (i + way) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), x)


def _split(ring: _Ring, operands: tuple) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
    """(query, what travels, further operands by name)"""
    query, key, value, *more = operands
    named = dict(zip(ring.names, more, strict=True))
    moving = {"key": key, "value": value}
    if _SEGMENTS[1] in named:
        moving[_SEGMENTS[1]] = named.pop(_SEGMENTS[1])
    return query, moving, named


def _operands(take: Callable, query: jax.Array, moving: dict, more: dict, first: bool) -> dict[str, jax.Array]:
    """Of the attention of one piece. A sink counts once, in the first step, in which every query takes part."""
    of = {"query": take(query, "queries", 1)} | {name: take(x, "keys", 1) for name, x in moving.items()}
    if _SEGMENTS[0] in more:
        of[_SEGMENTS[0]] = take(more[_SEGMENTS[0]], "queries", 1)
    return of | ({"sinks": more["sinks"]} if first and "sinks" in more else {})


def _forward(ring: _Ring, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse [B, N, T]), the lse inf where nothing is seen."""
    query, moving, more = _split(ring, operands)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    batch, rows, heads, _ = query.shape
    shape = (batch, rows, heads, moving["value"].shape[3])
    nothing = _like(query, (jnp.zeros(shape, query.dtype), jnp.full((batch, heads, rows), jnp.inf, wide)))
    out, lse = nothing[0].astype(wide), -nothing[1]
    steps = ring.steps(moving["key"].shape[1])
    for step, pieces in enumerate(steps):
        here, last = moving, step + 1 == len(steps)
        arriving = moving if last else ring.send(moving)

        def attend(take, put, options, here=here, first=step == 0):
            part, of_part = PART(_operands(take, query, here, more, first), **options)
            return put(part, query, "queries", 1), put(of_part, nothing[1], "queries", 2, jnp.inf)

        for pair in pieces:
            part, of_part = ring.run(step, pair, attend, nothing)
            out, lse = _together(out, lse, part, jnp.where(of_part == jnp.inf, -jnp.inf, of_part))
        if not last:  # else the compiler sends everything before the first product
            moving, (out, lse) = lax.optimization_barrier((arriving, (out, lse)))
    return out.astype(query.dtype), jnp.where(lse == -jnp.inf, jnp.inf, lse)


def _together(out, lse, part, of_part):
    """Attention to two sets of keys, from that to each."""
    top = jnp.maximum(lse, of_part)
    top = jnp.where(top == -jnp.inf, 0, top)
    mine, others = jnp.exp(lse - top), jnp.exp(of_part - top)
    total = mine + others
    rows = lambda x: jnp.where(total == 0, 0, x / jnp.where(total == 0, 1, total)).swapaxes(1, 2)[..., None]
    return out * rows(mine) + part.astype(out.dtype) * rows(others), top + jnp.log(total)


def _like(x: jax.Array, new: Any) -> Any:
    """New arrays, varying as x does."""
    axes = tuple(jax.typeof(x).mat.varying)
    return jax.tree.map(lambda y: lax.pcast(y, axes, to="varying"), new)


def _ring_backward(ring: _Ring, operands: tuple, dout: jax.Array) -> list[jax.Array]:
    """The gradients of query, key, value and, where given, sinks."""
    # Else the compiler keeps what forward received, in part.
    (*inputs, out, lse), dout = lax.optimization_barrier((operands, dout))
    query, moving, more = _split(ring, tuple(inputs))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    whole = (query, moving["key"], moving["value"])
    nothing = tuple(_like(query, jnp.zeros(x.shape, x.dtype)) for x in whole)
    dquery, *dmoving = (x.astype(wide) for x in nothing)
    dsinks: list[jax.Array] = []
    steps = ring.steps(moving["key"].shape[1])
    for step, pieces in enumerate(steps):
        here, last = moving, step + 1 == len(steps)
        arriving = moving if last else ring.send(moving)

        def differentiate(take, put, options, here=here, first=step == 0):
            outputs, ct = (take(out, "queries", 1), take(lse, "queries", 2)), take(dout, "queries", 1)
            found = PART.gradients(_operands(take, query, here, more, first), outputs, (ct,), **options)
            sides = zip(("query", "key", "value"), whole, ("queries", "keys", "keys"), strict=True)
            return (
                *(put(found[name], x, of, 1) for name, x, of in sides),
                *([found["sinks"]] if first and "sinks" in more else []),
            )

        parts = [ring.run(step, pair, differentiate, nothing) for pair in pieces]
        dq, dk, dv = (functools.reduce(jnp.add, [part[i].astype(wide) for part in parts]) for i in range(3))
        dsinks += [x for part in parts for x in part[3:]]
        # Last: what arrives for it travels beside all parts.
        dquery, dmoving = dquery + dq, [dmoving[0] + dk, dmoving[1] + dv]
        if not last:
            moving, dquery, dmoving = lax.optimization_barrier((arriving, dquery, dmoving))
            dmoving = ring.send(dmoving)
    dmoving = ring.send(dmoving, 1 - len(steps))  # home
    return [*(dx.astype(x.dtype) for dx, x in zip((dquery, *dmoving), whole, strict=True)), *dsinks]


def _plain(ring: _Ring, *operands: jax.Array) -> tuple[jax.Array]:
    """The same of gathered keys, in JAX's own derivatives of every order. It holds a mask of [T / C, S]."""
    query, moving, more = _split(ring, operands[:-2])
    whole: dict[str, Any] = {name: collectives.all_gather(x, ring.axis, 1) for name, x in moving.items()}
    mask = None
    if not ring.band.open:
        mine = context_positions(query.shape[1], axis=ring.axis, balanced=ring.balanced)
        everyone = collectives.all_gather(mine, ring.axis, 0)
        mask = ring.band.allowed(mine[:, None], everyone)[None, None]
    out = dot_product_attention(
        query, whole.pop("key"), whole.pop("value"), mask=mask, scale=ring.scale, logits_soft_cap=ring.logits_soft_cap,
        implementation="xla", **more, **whole,
    )  # fmt: skip
    return (out,)


def _backward(ring: _Ring, operands: tuple, cotangents: tuple) -> tuple[jax.Array | None, ...]:
    moved = 4 if "sinks" in ring.names else 3

    def plainly(*args):
        *operands, dout = args

        def f(*moving):
            return _plain(ring, *moving, *operands[moved:])[0]

        return list(jax.vjp(f, *operands[:moved])[1](dout))

    run = lambda *args: _ring_backward(ring, args[:-1], args[-1])
    found = _differentiated_as(plainly, run)(*operands, cotangents[0])
    return *found, *[None] * (len(operands) - moved)


def _differentiated_as(plain: Callable, f: Callable) -> Callable:
    """f, with the derivatives of `plain`."""
    served = jax.custom_jvp(f)
    served.defjvp(lambda primals, tangents: (served(*primals), jax.jvp(plain, primals, tangents)[1]))
    return served


def _found(ring: _Ring, *operands: jax.Array) -> tuple[jax.Array]:
    """The out that is known already, which the second derivative and further ones have to follow, too."""
    return _differentiated_as(functools.partial(_plain, ring), lambda *operands: (operands[-2],))(*operands)


_RULES = Rules(_found, _plain, _backward)
