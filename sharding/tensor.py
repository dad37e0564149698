"""Tensor and sequence parallelism: functions of local shards, used inside `jax.shard_map(check_vma=True)`.

A layer is a pair of products. The first matrix is split by its columns, w[K, N_T], the second by its rows, w[K_T, N]:
between them every device has features or heads of its own, and one sum over T follows the second. Outside the pair the
stream x[..., S, D] is the same on all devices of T, or, in sequence parallelism, split by rows, x[..., S_T, D]:

    stream         into the pair (forward / backward)     out of the pair (forward / backward)
    x[S, D]        copy / all-reduce                       all-reduce / copy
    x[S_T, D]      all-gather / reduce-scatter             reduce-scatter / all-gather

Both send the same number of bytes. In the second, norms, dropout and residual connections work on 1 / T of the rows;
the gradients of what they use, the same on every device, are summed over T by JAX. `sequence=True` is the second row of
the table, `overlap=True` sends its shards beside the products (`sharding.collective_matmul`).

Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053; Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", arXiv:2205.05198.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import gated_linear_unit, matmul
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.ops.activations import silu
from sharding import collectives
from sharding.collective_matmul import all_gather_matmul, matmul_reduce_scatter

Activation = Callable[[jax.Array], jax.Array]


def enter(x: jax.Array, axis: str, *, sequence: bool = False) -> jax.Array:
    """The stream for the first products of a pair, x[..., S, D] on every device.

    Forward: identity, or with `sequence` all-gather of x[..., S_T, D]. Backward: all-reduce, or reduce-scatter.
    Several products that share x enter it once, and then take it with `sequence=False`.
    """
    return collectives.all_gather(x, axis, -2) if sequence else collectives.copy(x, axis)


def leave(part: jax.Array, axis: str, *, sequence: bool = False) -> jax.Array:
    """The sum over `axis` of the last product of a pair, as the stream is.

    Forward: all-reduce to y[..., S, D], or with `sequence` reduce-scatter to y[..., S_T, D]. Backward: identity, or
    all-gather.
    """
    if sequence:
        return collectives.reduce_scatter(part, axis, -2)
    return lax.psum(collectives.copy(part, axis), axis)


def column_parallel(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: Activation | None = None,
    axis: str = "tensor",
    sequence: bool = False,
    overlap: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation = None,
) -> jax.Array:
    """y[..., N_T] = activation(x[..., K] · w[K, N_T] + bias[N_T]).

    Forward: nothing is sent, or with `sequence` an all-gather of x[..., S_T, K]. Backward: all-reduce, or
    reduce-scatter, of dx.

    Args:
      x: floating [..., k], the same on all devices of `axis`; with `sequence` its rows (axis -2) are split over them.
      w, bias: floating [k, n / T] and [n / T].
      activation, precision, implementation: as in `jaxops.matmul`.
      overlap: with `sequence`, send the rows beside the product.

    Returns y[..., n / T]. Raises `TypeError` or `ValueError` as `jaxops.matmul` does, and if `axis` is none of an
    enclosing `jax.shard_map`.
    """
    name = "column_parallel"
    collectives.axis_size(name, axis)
    x = checks.floating(name, "x", x)
    w = checks.weight(name, "w", w, x)
    if bias is not None:
        bias = checks.floating(name, "bias", bias, shape=(w.shape[1],), of="the last axis of w")
    if not (sequence and overlap):
        x = enter(x, axis, sequence=sequence)
        return matmul(x, w, bias=bias, activation=activation, precision=precision, implementation=implementation)
    return _finished(all_gather_matmul(x, w, axis=axis, precision=precision), bias, activation)


def row_parallel(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis: str = "tensor",
    sequence: bool = False,
    overlap: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation = None,
) -> jax.Array:
    """y[..., N] = Σ_T x[..., K_T] · w[K_T, N] + bias[N].

    Forward: all-reduce, or with `sequence` reduce-scatter to y[..., S_T, N]. Backward: nothing is sent, or all-gather.

    Args:
      x: floating [..., k / T], the device's features.
      w: floating [k / T, n].
      bias: floating [n], the same on all devices: added once, after the sum.
      precision, implementation: as in `jaxops.matmul`.
      overlap: with `sequence`, send the sums beside the product.

    Returns y in the common dtype of x and w; each device's part is rounded to it before the sum. Raises `TypeError` or
    `ValueError` as `jaxops.matmul` does, if `axis` is none of an enclosing `jax.shard_map`, or with `sequence` if T does
    not divide the rows.
    """
    name = "row_parallel"
    collectives.axis_size(name, axis)
    x = checks.floating(name, "x", x)
    w = checks.weight(name, "w", w, x)
    if bias is not None:
        bias = checks.floating(name, "bias", bias, shape=(w.shape[1],), of="the last axis of w")
    if sequence and overlap:
        y = matmul_reduce_scatter(x, w, axis=axis, precision=precision)
    else:
        y = leave(matmul(x, w, precision=precision, implementation=implementation), axis, sequence=sequence)
    return _finished(y, bias, None)


def gated_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation = silu,
    axis: str = "tensor",
    sequence: bool = False,
    overlap: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """y[..., D] = Σ_T (activation(x · gate) ∘ (x · up))[..., F_T] · down[F_T, D],  gate and up [D, F_T].

    Forward: all-reduce of y. Backward: all-reduce of dx. With `sequence`, x and y are [..., S_T, D]: forward an
    all-gather and a reduce-scatter, backward the same.

    Args:
      x: floating [..., d]; gate, up: floating [d, f / T]; down: floating [f / T, d].
      activation, implementation: as in `jaxops.gated_linear_unit`.
      overlap: with `sequence`, send beside the products; the gate is then applied to products rounded to their dtype.

    Raises `TypeError` or `ValueError` as `column_parallel` and `row_parallel` do.
    """
    collectives.axis_size("gated_mlp", axis)
    if sequence and overlap:
        gates, ups = all_gather_matmul(x, (gate, up), axis=axis)
        wide = jnp.promote_types(gates.dtype, jnp.float32)
        hidden = (activation(gates.astype(wide)) * ups.astype(wide)).astype(gates.dtype)
    else:
        x = enter(checks.floating("gated_mlp", "x", x), axis, sequence=sequence)
        hidden = gated_linear_unit(x, gate, up, activation=activation, implementation=implementation)
    return row_parallel(hidden, down, axis=axis, sequence=sequence, overlap=overlap, implementation=implementation)


def attention(
    x: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    *,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    biases: Sequence[jax.Array | None] = (None, None, None, None),
    axis: str = "tensor",
    sequence: bool = False,
    overlap: bool = False,
    replicate_kv: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation = None,
) -> jax.Array:
    """y[..., S, D] = Σ_T attend(x · query, x · key, x · value)[..., S, N_T, H] · out[N_T, H, D]: heads split over T.

    Forward: all-reduce of y. Backward: all-reduce of dx. With `sequence`, x and y are [..., S_T, D]: forward an
    all-gather and a reduce-scatter, backward the same. Inside, every device sees the whole sequence.

    Args:
      x: floating [..., s, d].
      query: floating [d, n / T, h], the device's query heads; key, value: floating [d, k / T, h], the key heads that
        these share; out: floating [n / T, h, d].
      attend: a function of query[..., s, n / T, h], key and value[..., s, k / T, h] to [..., s, n / T, h], as
        `functools.partial(jaxops.dot_product_attention, is_causal=True)`. It may rotate or normalise them first.
      biases: of query [n / T, h], of key and value [k / T, h], and of out [d]; None for none.
      overlap: with `sequence`, send beside the products.
      replicate_kv: for fewer key heads than devices: key, value and their biases are whole and the same on every
        device, [d, k, h]. Each device takes the one head that its query heads share; gradients are summed over T.
      precision, implementation: of the products, as in `jaxops.matmul`.

    Raises `ValueError` if the heads do not fit each other, besides what `column_parallel` and `row_parallel` raise.
    """
    name = "attention"
    size = collectives.axis_size(name, axis)
    x = checks.floating(name, "x", x)
    features = x.shape[-1]
    matrices = []
    for what, w in (("query", query), ("key", key), ("value", value)):
        w = checks.floating(name, what, w)
        if w.ndim != 3 or w.shape[0] != features:
            raise ValueError(f"{name}: {what} must have shape ({features}, heads, dim) for x {x.shape}, got {w.shape}")
        matrices.append(w)
    query, key, value = matrices
    if replicate_kv:
        heads = query.shape[1] * size
        if size % key.shape[1] or heads % key.shape[1] or value.shape[1] != key.shape[1]:
            raise ValueError(
                f"{name}: with replicate_kv the {size} devices along {axis!r} and all {heads} query heads must be a "
                f"multiple of the key heads, got key {key.shape} and value {value.shape}"
            )
        head = lax.axis_index(axis) // (size // key.shape[1])
        one = lambda w: None if w is None else lax.dynamic_slice_in_dim(w, head, 1, axis=w.ndim - 2)
        key, value, biases = one(key), one(value), (biases[0], one(biases[1]), one(biases[2]), biases[3])
    elif query.shape[1] % key.shape[1] or value.shape[1] != key.shape[1]:
        raise ValueError(
            f"{name}: each device's key heads must divide its query heads, got query {query.shape}, key {key.shape} and "
            f"value {value.shape} (fewer key heads than devices: replicate_kv)"
        )
    flat = [w.reshape(features, -1) for w in (query, key, value)]
    if sequence and overlap:
        projected = all_gather_matmul(x, flat, axis=axis, precision=precision)
    else:
        x = enter(x, axis, sequence=sequence)
        projected = [matmul(x, w, precision=precision, implementation=implementation) for w in flat]
    heads_of = [
        _finished(y.reshape(*y.shape[:-1], *w.shape[1:]), bias, None)
        for y, w, bias in zip(projected, (query, key, value), biases, strict=False)
    ]
    seen = attend(*heads_of)
    return row_parallel(
        seen.reshape(*seen.shape[:-2], -1),
        out.reshape(-1, out.shape[-1]),
        biases[3],
        axis=axis,
        sequence=sequence,
        overlap=overlap,
        precision=precision,
        implementation=implementation,
    )


def vocab_parallel_embed(
    ids: jax.Array, embedding: jax.Array, *, axis: str = "tensor", sequence: bool = False
) -> jax.Array:
    """y[..., S, D] = Σ_T embedding[V_T, D][ids of the device's slice], zeros for the others.

    Forward: all-reduce of y, or with `sequence` reduce-scatter to y[..., S_T, D]. Backward: nothing, or all-gather.

    Args:
      ids: integer [..., s], the same on all devices of `axis`. An id outside [0, V) gives NaN.
      embedding: floating [v / T, d], the device's slice of the vocabulary; the slices follow each other.

    Raises `TypeError` if the dtypes are not these, `ValueError` if `axis` is none of an enclosing `jax.shard_map`, or
    with `sequence` if T does not divide s.
    """
    name = "vocab_parallel_embed"
    size = collectives.axis_size(name, axis)
    embedding = checks.floating(name, "embedding", embedding)
    ids = checks.array(name, "ids", ids)
    ids = checks.integer(name, "ids", ids, shape=ids.shape, of="its own")
    if embedding.ndim != 2:
        raise ValueError(f"{name}: embedding must have shape (vocab / T, features), got {embedding.shape}")
    slice_size = embedding.shape[0]
    own, mine = _of_slice(ids, slice_size, axis)
    rows = jnp.where(mine[..., None], jnp.take(embedding, own, axis=0, mode="clip"), 0)
    outside = (ids < 0) | (ids >= slice_size * size)
    # The device whose slice would come first says so: a sum takes one NaN from anywhere.
    lost = outside & (lax.axis_index(axis) == 0)
    return leave(jnp.where(lost[..., None], jnp.nan, rows), axis, sequence=sequence)


def _of_slice(ids: jax.Array, size: int, axis: str) -> tuple[jax.Array, jax.Array]:
    """Where ids of the whole vocabulary are in the device's slice of it, and whether they are."""
    own = ids.astype(jnp.int32) - lax.axis_index(axis) * size
    return own, (own >= 0) & (own < size)


def _finished(y: jax.Array, bias: jax.Array | None, activation: Activation | None) -> jax.Array:
    """activation(y + bias) in float32, rounded to the dtype of y."""
    if bias is None and activation is None:
        return y
    z = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    z = z if bias is None else z + bias.astype(z.dtype)
    return (z if activation is None else activation(z)).astype(y.dtype)
