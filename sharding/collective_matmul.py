"""Products beside the communication they need: while one shard travels to the next device, another is multiplied.

The devices of an axis form a ring. A shard is cut in two halves of rows, and the halves go round in opposite
directions, so that both directions of every link carry half of the bytes.

    all_gather_matmul      x[I_T, K], w[K, J_T] ↦ y[I, J_T]      rows travel, products are put where they belong
    matmul_reduce_scatter  x[I, K_T], w[K_T, J] ↦ y[I_T, J]      sums travel, each device adds its product

With `fsdp`, the weights are split over a second axis F, w[K_F, J_T] and w[K_T, J_F]: they go round its ring, too,
beside the products of what is there, and so do the sums of dw.

Each is the other's gradient with respect to x: dx = matmul_reduce_scatter(dy, wᵀ), and dx = all_gather_matmul(dy, wᵀ).
In XLA a ring is unrolled: each step is a transfer and a product that do not depend on each other, and the compiler's
scheduler runs them at the same time. In Pallas it is one kernel (`pallas_kernels.tpu.collective_matmul`).

Source: Wang et al., "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models",
ASPLOS 2023.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch, matmul
from jaxops.autodiff import varying_alike
from jaxops.ops import checks
from pallas_kernels import chips
from pallas_kernels.tpu import collective_matmul as kernels
from sharding import collectives
from sharding.derivatives import Rules

_WAYS = (1, -1)  # to the next device and to the one before


def all_gather_matmul(
    x: jax.Array,
    w: jax.Array | Sequence[jax.Array],
    *,
    axis: str,
    fsdp: str | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Implementation = None,
) -> Any:
    """y[..., I, J_T] = x[..., I_T, K] · w[K, J_T], for local shards x[..., I / T, K] inside `jax.shard_map`.

    Forward: all-gather of x. Backward: reduce-scatter of dx = dy · wᵀ; and x, of which only the shard was kept, is
    gathered again for dw = xᵀ · dy.

    Args:
      x: floating [..., rows, k].
      w: floating [k, n], or several such matrices that share the gathered x.
      axis: the mesh axis that the rows are split over.
      fsdp: None, or the mesh axis F that the weights are split over besides, w[K_F, J_T], here [k / F, n]. They are
        gathered beside the products of the device's own rows, and again, beside those of dw, for dx; dw is
        reduce-scattered beside the products of dx, and travels in its dtype.
      precision: as in `jnp.matmul`.
      implementation: None (the best that can run), "pallas" (a kernel with remote DMA, on TPU), "xla" (a ring of
        `jax.lax.ppermute`), or a sequence tried in order. Which chip it is for, the mesh of the `jax.shard_map` tells.
        There is no kernel for weights that are split over `fsdp`.

    Returns:
      y[..., rows · T, n] in the common dtype of x and w, each sum in float32; a tuple of them for several w.

    Raises `TypeError` or `ValueError` if an operand is not as said, `implementation` is unknown or, alone, cannot run,
    `axis` or `fsdp` is none of an enclosing `jax.shard_map`, or F does not divide k.
    """
    name = "all_gather_matmul"
    several = isinstance(w, (tuple, list))
    given: list[Any] = list(w) if several else [w]
    x = _rows(name, x)
    parts = _parts_of_weights(name, fsdp)
    if parts > 1:
        collectives.divisible(name, "x", x, -1, parts, str(fsdp))
    like: Any = jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // parts), x.dtype)
    ws = tuple(checks.weight(name, f"w[{i}]" if several else "w", one, like) for i, one in enumerate(given))
    if not ws:
        raise ValueError(f"{name}: w must hold at least one matrix, got none")
    dispatch.order_of(name, implementation)
    size = collectives.axis_size(name, axis)
    if parts > 1:
        _without_kernels(name, implementation)
        whole = jnp.concatenate(ws, axis=1)
        (y,) = _split_gather(_Ring(axis, precision, None, fsdp), *varying_alike((collectives.copy(x, axis), whole)))
        ends = itertools.accumulate(one.shape[1] for one in ws)
        ys = tuple(y[..., end - one.shape[1] : end] for one, end in zip(ws, ends, strict=True))
    elif size == 1:
        x = collectives.copy(x, axis)
        ys = tuple(matmul(x, one, precision=precision, implementation=implementation) for one in ws)
    else:
        ring = _chosen(name, axis, implementation, precision, [x], ws, x.shape[-2])
        x, *ws = varying_alike((collectives.copy(x, axis), *ws))
        ys = _gather(ring, x, *ws)
    return ys if several else ys[0]


def matmul_reduce_scatter(
    x: jax.Array,
    w: jax.Array,
    *,
    axis: str,
    fsdp: str | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y[..., I_T, J] = Σ_T x[..., I, K_T] · w[K_T, J], for local shards x[..., I, K / T], w[K / T, J].

    Forward: reduce-scatter of the products. Backward: one all-gather of dy, for dx = dy · wᵀ and dw = xᵀ · dy.

    Args:
      x: floating [..., rows, k], T dividing the rows.
      w: floating [k, n].
      axis: the mesh axis that the sum goes over, and the rows of y are split over.
      fsdp: None, or the mesh axis F that the columns of w are split over besides, w[K_T, J_F], here [k, n / F], which
        travel as those of `all_gather_matmul`.
      precision, implementation: as in `all_gather_matmul`.

    Returns:
      y[..., rows / T, n], of the whole n, in the common dtype of x and w. Products and additions are in float32; what
      travels from device to device is rounded to the dtype of y.

    Raises `TypeError` or `ValueError` as `all_gather_matmul` does, and if T does not divide the rows.
    """
    name = "matmul_reduce_scatter"
    x = _rows(name, x)
    w = checks.weight(name, "w", w, x)
    dispatch.order_of(name, implementation)
    size = collectives.axis_size(name, axis)
    collectives.divisible(name, "x", x, -2, size, axis)
    if _parts_of_weights(name, fsdp) > 1:
        _without_kernels(name, implementation)
        return _split_scatter(_Ring(axis, precision, None, fsdp), *varying_alike((collectives.copy(x, axis), w)))[0]
    if size == 1:
        return matmul(collectives.copy(x, axis), w, precision=precision, implementation=implementation)
    ring = _chosen(name, axis, implementation, precision, [x], [w], x.shape[-2] // size)
    return _scatter(ring, *varying_alike((collectives.copy(x, axis), w)))[0]


def _parts_of_weights(name: str, fsdp: str | None) -> int:
    return 1 if fsdp is None else collectives.axis_size(name, fsdp)


def _without_kernels(name: str, implementation: dispatch.Implementation) -> None:
    if dispatch.choose(dispatch.order_of(name, implementation), "not here").implementation is None:
        raise ValueError(f"{name}: implementation 'pallas' was asked for, but the kernels take whole weights")


def _rows(name: str, x: Any) -> jax.Array:
    x = checks.floating(name, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{name}: x must have shape (..., rows, k), got {x.shape}")
    return x


@dataclasses.dataclass(frozen=True)
class _Ring:
    """How a call is served: by the kernels of `chip`, or in XLA without one."""

    axis: str
    precision: Any
    chip: chips.Chip | None
    weights: str | None = None  # the axis that the weights are split over, besides

    @property
    def options(self) -> dict[str, Any]:
        """What every kernel is told."""
        return dict(axis=self.axis, chip=self.chip, precision=self.precision)


def _chosen(name, axis, implementation, precision, xs, ws, rows) -> _Ring:
    """Raises `ValueError` if kernels alone were asked for and cannot run."""
    order = dispatch.order_of(name, implementation)
    chip, reason = collectives.kernel_chip()
    reason = reason or kernels.unsupported(xs, ws, precision)
    if chip is not None and len(order) > 1:
        reason = reason or kernels.no_gain(chip, rows, ws, scattered=name == "matmul_reduce_scatter")
    choice = dispatch.choose(order, reason)
    if choice.implementation is None:
        raise ValueError(f"{name}: implementation 'pallas' was asked for, but {reason}")
    return _Ring(axis, precision, chip if choice.implementation == "pallas" else None)


# ---- the ring in XLA -----------------------------------------------------------------------------------------------


def _halves(rows: int) -> list[tuple[int, int, int]]:
    """(way, first row, rows) of the two halves of a shard; a shard of one row goes one way."""
    cut = (rows + 1) // 2
    return [half for half in ((1, 0, cut), (-1, cut, rows - cut)) if half[2]]


def _send(x: jax.Array, axis: str, way: int) -> jax.Array:
    size = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + way) % size) for i in range(size)])


def _as_they_arrive(x: jax.Array, axis: str, use: Callable[[Any, Any, jax.Array], Any], carry: Any) -> Any:
    """carry = use(carry, first row in the whole, rows of it), for all of x[..., I_T, K], the device's own first."""
    size, me, rows = lax.axis_size(axis), lax.axis_index(axis), x.shape[-2]
    carry = use(carry, me * rows, x)
    parts = {way: lax.slice_in_dim(x, first, first + count, axis=-2) for way, first, count in _halves(rows)}
    for step in range(1, size):
        # Neither half is used before both are there, and what was there before is used: else the compiler sends one
        # after the other, or everything before the first product.
        sent = {way: _send(part, axis, way) for way, part in parts.items()}
        parts, carry = lax.optimization_barrier((sent, carry))
        for way, first, _ in _halves(rows):
            carry = use(carry, (me - way * step) % size * rows + first, parts[way])
    return carry


def _sum_on_the_way(partial: Callable[[Any, int], jax.Array], rows: int, dtype: Any, axis: str) -> jax.Array:
    """Σ_T partial(first, count), the device's own `rows` of it; `partial` gives rows of its part of the sum."""
    size, me = lax.axis_size(axis), lax.axis_index(axis)
    sums: dict[int, jax.Array] = {}
    before: Any = None
    for left in reversed(range(size)):  # how many steps the rows have to go after this one
        for way, first, count in _halves(rows):
            part = partial((me + way * left) % size * rows + first, count)
            if way in sums:
                # A half is added to after the other half was: that one travels meanwhile. Else the compiler takes all
                # steps of one way before those of the other, and each link is half idle.
                arrived, _ = lax.optimization_barrier((_send(sums[way], axis, way), before))
                part = part + arrived.astype(part.dtype)
            sums[way] = before = part.astype(dtype)
    return jnp.concatenate([sums[way] for way, *_ in _halves(rows)], axis=-2)


# ---- the two products, and their gradients -------------------------------------------------------------------------


def _product(a: jax.Array, b: jax.Array, dimensions: tuple, precision: Any) -> jax.Array:
    dtype = jnp.promote_types(a.dtype, b.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, (dimensions, ((), ())), precision=precision, preferred_element_type=wide)


def _times(x, w, precision):
    """x[..., k] · w[k, n]."""
    return _product(x, w, ((x.ndim - 1,), (0,)), precision)


def _times_transposed(y, w, precision):
    """y[..., n] · w[k, n]ᵀ."""
    return _product(y, w, ((y.ndim - 1,), (1,)), precision)


def _transposed_times(x, y, precision):
    """Σ x[..., k]ᵀ · y[..., n], over all rows."""
    rows = tuple(range(x.ndim - 1))
    return _product(x, y, (rows, rows), precision)


def _wide_zeros(w):
    return jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))  # a bfloat16 sum would stall


def _cut(x, first, count):
    return lax.dynamic_slice_in_dim(x, first, count, axis=-2)


def _put(whole, part, first):
    return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), first, axis=whole.ndim - 2)


def _blocks(x):
    """x[blocks, rows, columns] of x[..., rows, columns]."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _serve(ring, kernel, plain, *operands):
    """`kernel(ring, *operands)` on its chip, else `plain(ring, *operands)`; what is differentiated is `plain`."""
    kernel, plain = functools.partial(kernel, ring), functools.partial(plain, ring)
    if ring.chip is None:
        return plain(*operands)
    # Under vmap the calls follow one another: each takes the whole chip, and every device is in the same one.
    served = jax.custom_jvp(jax.custom_batching.sequential_vmap(kernel))
    served.defjvp(lambda primals, tangents: (served(*primals), jax.jvp(plain, primals, tangents)[1]))
    return served(*operands)


def _gathered_by_kernel(ring, x, *ws):
    ys, _ = kernels.gather(_blocks(x), ws, **ring.options)
    return tuple(y.reshape(*x.shape[:-2], *y.shape[1:]) for y in ys)


def _gathered(ring, x, *ws):
    rows = x.shape[-2] * lax.axis_size(ring.axis)
    ys = [jnp.zeros((*x.shape[:-2], rows, w.shape[1]), jnp.promote_types(x.dtype, w.dtype)) for w in ws]

    def put(ys, first, part):
        return [_put(y, _times(part, w, ring.precision), first) for y, w in zip(ys, ws, strict=True)]

    return tuple(_as_they_arrive(x, ring.axis, put, ys))


def _gathered_backward_by_kernel(ring, operands, dys):
    (x, *ws), dys = operands, [_blocks(dy) for dy in dys]
    dx = kernels.scatter(dys, ws, transposed=True, **ring.options)
    return dx.reshape(x.shape), *kernels.accumulate(_blocks(x), dys, **ring.options)


def _gathered_backward(ring, operands, dys):
    (x, *ws), dys = lax.optimization_barrier((operands, dys))  # else the compiler keeps what forward gathered, in part
    pairs = list(zip(dys, ws, strict=True))

    def rows_of_dx(first, count):
        return sum(_times_transposed(_cut(dy, first, count), w, ring.precision) for dy, w in pairs)

    dx = _sum_on_the_way(rows_of_dx, x.shape[-2], x.dtype, ring.axis)

    def add(dws, first, part):
        rows = [_cut(dy, first, part.shape[-2]) for dy in dys]
        return [dw + _transposed_times(part, dy, ring.precision) for dw, dy in zip(dws, rows, strict=True)]

    dws = _as_they_arrive(x, ring.axis, add, [_wide_zeros(w) for w in ws])
    return dx, *(dw.astype(w.dtype) for dw, w in zip(dws, ws, strict=True))


def _scattered_by_kernel(ring, x, w):
    y = kernels.scatter([_blocks(x)], [w], **ring.options)
    return (y.reshape(*x.shape[:-2], *y.shape[1:]),)


def _scattered(ring, x, w):
    rows = x.shape[-2] // lax.axis_size(ring.axis)
    partial = lambda first, count: _times(_cut(x, first, count), w, ring.precision)
    return (_sum_on_the_way(partial, rows, jnp.promote_types(x.dtype, w.dtype), ring.axis),)


def _scattered_backward_by_kernel(ring, operands, dys):
    (x, w), (dy,) = operands, dys
    (dx,), whole = kernels.gather(_blocks(dy), [w], transposed=True, keep=True, **ring.options)
    return dx.reshape(x.shape), _transposed_times(_blocks(x), whole, ring.precision).astype(w.dtype)


def _scattered_backward(ring, operands, dys):
    (x, w), (dy,) = operands, dys

    def put_and_add(carry, first, part):
        dx, dw = carry
        dx = _put(dx, _times_transposed(part, w, ring.precision), first)
        return dx, dw + _transposed_times(_cut(x, first, part.shape[-2]), part, ring.precision)

    dx, dw = _as_they_arrive(dy, ring.axis, put_and_add, (jnp.zeros(x.shape, x.dtype), _wide_zeros(w)))
    return dx, dw.astype(w.dtype)


_gather = Rules(
    lambda ring, *operands: _serve(ring, _gathered_by_kernel, _gathered, *operands),
    _gathered,
    lambda ring, *saved: _serve(ring, _gathered_backward_by_kernel, _gathered_backward, *saved),
)
_scatter = Rules(
    lambda ring, *operands: _serve(ring, _scattered_by_kernel, _scattered, *operands),
    _scattered,
    lambda ring, *saved: _serve(ring, _scattered_backward_by_kernel, _scattered_backward, *saved),
)


# ---- weights split over a second axis ------------------------------------------------------------------------------
#
# The compiler starts a transfer about one operation before its end is asked for. So each is asked for by a barrier,
# after a product that lasts long enough: of both halves that arrive in a step, put together, unless one does.

_LONG = 5100  # numbers with which one has to be multiplied to be hidden: v5p, bfloat16, 459 Tflop/s to 90 GB/s

_Places = list[tuple[Any, int]]  # (first, count) along a dimension of the whole


def _places(axis: str, rows: int, step: int) -> _Places:
    """Of what has arrived after so many steps, or with -step of what has so many steps to go."""
    size, me = lax.axis_size(axis), lax.axis_index(axis)
    if step == 0:
        return [(me * rows, rows)]
    return [((me - way * step) % size * rows + first, count) for way, first, count in _halves(rows)]


def _take(x: jax.Array, places: _Places, dimension: int) -> jax.Array:
    parts = [lax.dynamic_slice_in_dim(x, first, count, axis=dimension % x.ndim) for first, count in places]
    return jnp.concatenate(parts, axis=dimension)


def _put_in(whole: jax.Array, part: jax.Array, places: _Places, dimension: int) -> jax.Array:
    done, d = 0, dimension % part.ndim
    for first, count in places:
        piece = lax.slice_in_dim(part, done, done + count, axis=d).astype(whole.dtype)
        whole, done = lax.dynamic_update_slice_in_dim(whole, piece, first, axis=d), done + count
    return whole


def _cut_halves(x: jax.Array, dimension: int) -> list[jax.Array]:
    d = dimension % x.ndim
    return [lax.slice_in_dim(x, first, first + count, axis=d) for _, first, count in _halves(x.shape[d])]


def _send_halves(parts: Sequence[jax.Array], axis: str) -> list[jax.Array]:
    return [_send(part, axis, way) for way, part in zip(_WAYS, parts, strict=False)]


_Steps = Generator[list[jax.Array], list[jax.Array], jax.Array]  # yields what is sent, is given what arrived


class _Travel:
    """Transfers that follow each other."""

    def __init__(self, steps: _Steps):
        self.steps = steps
        self.sent: list[jax.Array] = []
        self.result: Any = None
        self._go(lambda: next(steps))

    def _go(self, step: Callable[[], list[jax.Array]]) -> None:
        try:
            self.sent = step()
        except StopIteration as end:
            self.sent, self.result = [], end.value

    def behind(self, product: Any) -> tuple[list[jax.Array], Any]:
        """(what the next transfer brings, the product), each there when both are. Without a transfer: nothing."""
        if not self.sent:
            return [], product
        arrived, product = lax.optimization_barrier((self.sent, product))
        self._go(lambda: self.steps.send(arrived))
        return arrived, product

    def end(self) -> jax.Array:
        while self.sent:
            self._go(lambda: self.steps.send(self.sent))
        return self.result


def _gathering(w: jax.Array, axis: str, dimension: int) -> _Steps:
    """The shards of w along a dimension, all of them."""
    size, rows = lax.axis_size(axis), w.shape[dimension]
    shape = list(w.shape)
    shape[dimension] = rows * size
    whole = _put_in(jnp.zeros(shape, w.dtype), w, _places(axis, rows, 0), dimension)
    parts = _cut_halves(w, dimension)
    for step in range(1, size):
        parts = yield _send_halves(parts, axis)
        for place, part in zip(_places(axis, rows, step), parts, strict=True):
            whole = _put_in(whole, part, [place], dimension)
    return whole


def _scattering(parts_of_sum: jax.Array, axis: str, dimension: int, dtype: Any) -> _Steps:
    """The device's shard along a dimension of Σ parts; sums travel as `dtype`."""
    size = lax.axis_size(axis)
    rows = parts_of_sum.shape[dimension] // size
    sums: list[jax.Array] = []
    for left in reversed(range(size)):
        own = _cut_halves(_take(parts_of_sum, _places(axis, rows, -left), dimension), dimension)
        if sums:
            arrived = yield _send_halves(sums, axis)
            own = [part + other.astype(part.dtype) for part, other in zip(own, arrived, strict=True)]
        sums = [part.astype(dtype) for part in own]
    return jnp.concatenate(sums, axis=dimension)


def _arrive(x: jax.Array, axis: str, use: Callable, carry: Any, others: int, beside: _Travel | None = None) -> Any:
    """carry = use(carry, places in the whole, rows) for the rows of all devices; in each step a transfer of `beside`.

    others: with how many numbers each that arrives is multiplied.
    """
    size, rows = lax.axis_size(axis), x.shape[-2]
    parts = [x]
    for step in range(size):
        sent = _send_halves(_cut_halves(x, -2) if step == 0 else parts, axis) if step < size - 1 else []
        places = _places(axis, rows, step)
        if step == 0 or others >= _LONG:
            for place, part in zip(places, parts, strict=True):
                carry = use(carry, [place], part)
        else:
            carry = use(carry, places, jnp.concatenate(parts, axis=-2))
        if beside is not None:
            beside.behind(carry)
        parts, carry = lax.optimization_barrier((sent, carry))
    return carry


def _sum_to(partial: Callable, rows: int, dtype: Any, axis: str, others: int, begun: Any = None, beside: Any = None):
    """Σ_T partial(rows, half of the columns or None for all), the device's rows; in each step a transfer of `beside`.

    others: as in `_arrive`. begun: what `partial` would give first.
    """
    size = lax.axis_size(axis)
    # Of two sums, one travels behind a product of the other: the halves of the rows, or of the columns.
    long = others >= _LONG and rows > 1
    cut = functools.partial(_cut_halves, dimension=-2 if long else -1)
    sums: list[Any] = [None, None] if begun is None else cut(begun)
    before: Any = None
    for left in reversed(range(size - (begun is not None))):
        places = _places(axis, rows, -left)
        if long and left == 0:
            (first, _), cuts = places[0], _halves(rows)
            places = [(first + start, count) for _, start, count in cuts]
        for i in range(len(sums)):
            part = partial([places[i]], None) if long else partial(places, i)
            if sums[i] is not None:
                way = _WAYS[i]
                sent = [_send(sums[i], axis, way)] if long else _send_halves(_cut_halves(sums[i], -2), axis)
                if before is None:  # both sums are sent now, and this product has to hide them
                    sent, part = lax.optimization_barrier((sent, part))
                else:
                    sent, _ = lax.optimization_barrier((sent, before))
                part = part + jnp.concatenate(sent, axis=-2).astype(part.dtype)
            sums[i] = part.astype(dtype)
            before = None if begun is not None and left == size - 2 and i == 0 else sums[i]
        if beside is not None:
            beside.behind(before)
    return jnp.concatenate(sums, axis=-2 if long else -1)


def _split_gathered(ring, x, w):
    """x[I_T, K] · w[K_F, J_T]."""
    size, columns, precision = lax.axis_size(ring.weights), w.shape[1], ring.precision
    dtype = jnp.promote_types(x.dtype, w.dtype)
    travel = _Travel(_gathering(w, ring.weights, 0))
    flat = x.reshape(-1, x.shape[-1])  # else the sum is not in one operation with the product
    own = _times(_take(flat, _places(ring.weights, w.shape[0], 0), -1), w, precision)
    for step in range(1, size):
        parts, own = travel.behind(own)
        features = _take(flat, _places(ring.weights, w.shape[0], step), -1)
        own = own + _times(features, jnp.concatenate(parts, axis=0), precision)
    whole = travel.end()
    own = own.reshape(*x.shape[:-1], columns)
    y = jnp.zeros((*x.shape[:-2], x.shape[-2] * lax.axis_size(ring.axis), columns), dtype)

    def put(y, places, part):
        return _put_in(y, own if part is x else _times(part, whole, precision), places, -2)

    return (_arrive(x, ring.axis, put, y, columns),)


def _split_gathered_backward(ring, operands, dys):
    (x, w), (dy,) = lax.optimization_barrier((operands, dys))
    gather = _Travel(_gathering(w, ring.weights, 0))

    def add(dw, places, part):
        return dw + _transposed_times(part, _take(dy, places, -2), ring.precision)

    zeros = jnp.zeros((x.shape[-1], w.shape[1]), _wide_zeros(w).dtype)
    dw = _arrive(x, ring.axis, add, zeros, w.shape[1], gather)
    whole = gather.end()
    scatter = _Travel(_scattering(dw, ring.weights, 0, w.dtype))
    halves = _cut_halves(whole, 0)

    def rows_of_dx(places, half):
        return _times_transposed(_take(dy, places, -2), whole if half is None else halves[half], ring.precision)

    dx = _sum_to(rows_of_dx, x.shape[-2], x.dtype, ring.axis, w.shape[1], beside=scatter)
    return dx, scatter.end()


def _split_scattered(ring, x, w):
    """Σ_T x[I, K_T] · w[K_T, J_F]."""
    size, precision = lax.axis_size(ring.weights), ring.precision
    dtype = jnp.promote_types(x.dtype, w.dtype)
    devices = lax.axis_size(ring.axis)
    rows = x.shape[-2] // devices
    first = _take(x, _places(ring.axis, rows, 1 - devices), -2)
    travel = _Travel(_gathering(w, ring.weights, 1))
    begun = jnp.zeros((*first.shape[:-1], w.shape[1] * size), dtype)
    begun = _put_in(begun, _times(first, w, precision), _places(ring.weights, w.shape[1], 0), -1)
    for step in range(1, size):
        parts, begun = travel.behind(begun)
        product = _times(first, jnp.concatenate(parts, axis=1), precision)
        begun = _put_in(begun, product, _places(ring.weights, w.shape[1], step), -1)
    whole = travel.end()
    halves = _cut_halves(whole, 1)

    def rows_of_y(places, half):
        return _times(_take(x, places, -2), whole if half is None else halves[half], precision)

    return (_sum_to(rows_of_y, rows, dtype, ring.axis, w.shape[0], begun),)


def _split_scattered_backward(ring, operands, dys):
    (x, w), (dy,) = lax.optimization_barrier((operands, dys))
    gather = _Travel(_gathering(w, ring.weights, 1))
    devices, rows = lax.axis_size(ring.axis), dy.shape[-2]

    def put_and_add(carry, places, part):
        whole, dw = carry
        dw = dw + _transposed_times(_take(x, places, -2), part, ring.precision)
        return _put_in(whole, part, places, -2), dw

    zeros = jnp.zeros((*dy.shape[:-2], rows * devices, dy.shape[-1]), dy.dtype)
    wide = jnp.zeros((w.shape[0], dy.shape[-1]), _wide_zeros(w).dtype)
    whole, dw = _arrive(dy, ring.axis, put_and_add, (zeros, wide), w.shape[0], gather)
    weights = gather.end()
    scatter = _Travel(_scattering(dw, ring.weights, 1, w.dtype))
    blocks = []
    for i in range(devices):
        part = lax.slice_in_dim(whole, i * rows, (i + 1) * rows, axis=-2)
        blocks.append(_times_transposed(part, weights, ring.precision).astype(x.dtype))
        scatter.behind(blocks[-1])
    return jnp.concatenate(blocks, axis=-2), scatter.end()


_split_gather = Rules(_split_gathered, _split_gathered, _split_gathered_backward)
_split_scatter = Rules(_split_scattered, _split_scattered, _split_scattered_backward)
