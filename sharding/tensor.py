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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxops import dropout_rows, gated_linear_unit, matmul
from jaxops.dispatch import Implementation
from jaxops.dropout import rate_of
from jaxops.ops import checks, vocabulary
from jaxops.ops import linear_cross_entropy as losses
from jaxops.ops.activations import silu
from pallas_kernels import random
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
    fsdp: str | None = None,
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
      fsdp: the mesh axis F that the rows of w are split over besides, w[K_F, N_T]: all-gathered, with `sequence` and
        `overlap` beside the product (`sharding.all_gather_matmul`); dw is reduce-scattered.

    Returns y[..., n / T]. Raises `TypeError` or `ValueError` as `jaxops.matmul` does, and if `axis` is none of an
    enclosing `jax.shard_map`.
    """
    name = "column_parallel"
    collectives.axis_size(name, axis)
    x = checks.floating(name, "x", x)
    w = checks.floating(name, "w", w)
    if not (sequence and overlap):
        w = checks.weight(name, "w", _whole(w, fsdp, 0), x)
    if bias is not None:
        bias = checks.floating(name, "bias", bias, shape=w.shape[1:], of="the last axis of w")
    if not (sequence and overlap):
        x = enter(x, axis, sequence=sequence)
        return matmul(x, w, bias=bias, activation=activation, precision=precision, implementation=implementation)
    y = all_gather_matmul(x, w, axis=axis, fsdp=fsdp, precision=precision, implementation=implementation)
    return _finished(y, bias, activation)


def row_parallel(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis: str = "tensor",
    sequence: bool = False,
    overlap: bool = False,
    fsdp: str | None = None,
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
      fsdp: the mesh axis F that the columns of w are split over besides, w[K_T, N_F], as in `column_parallel`.

    Returns y in the common dtype of x and w; each device's part is rounded to it before the sum. Raises `TypeError` or
    `ValueError` as `jaxops.matmul` does, if `axis` is none of an enclosing `jax.shard_map`, or with `sequence` if T
    does not divide the rows.
    """
    name = "row_parallel"
    collectives.axis_size(name, axis)
    x = checks.floating(name, "x", x)
    w = checks.weight(name, "w", w, x)
    if not (sequence and overlap):
        w = _whole(w, fsdp, 1)
    if bias is not None:
        columns = w.shape[1] * (collectives.axis_size(name, fsdp) if fsdp and sequence and overlap else 1)
        bias = checks.floating(name, "bias", bias, shape=(columns,), of="the last axis of the whole w")
    if sequence and overlap:
        y = matmul_reduce_scatter(x, w, axis=axis, fsdp=fsdp, precision=precision, implementation=implementation)
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
    fsdp: str | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """y[..., D] = Σ_T (activation(x · gate) ∘ (x · up))[..., F_T] · down[F_T, D],  gate and up [D, F_T].

    Forward: all-reduce of y. Backward: all-reduce of dx. With `sequence`, x and y are [..., S_T, D]: forward an
    all-gather and a reduce-scatter, backward the same.

    Args:
      x: floating [..., d]; gate, up: floating [d, f / T]; down: floating [f / T, d].
      activation, implementation: as in `jaxops.gated_linear_unit`.
      overlap: with `sequence`, send beside the products; the gate is then applied to products rounded to their dtype.
      fsdp: the mesh axis F that the matrices are split over besides, as in `column_parallel` and `row_parallel`: gate
        and up [D_F, F_T], down [F_T, D_F].

    Raises `TypeError` or `ValueError` as `column_parallel` and `row_parallel` do.
    """
    collectives.axis_size("gated_mlp", axis)
    if sequence and overlap:
        gates, ups = all_gather_matmul(x, (gate, up), axis=axis, fsdp=fsdp, implementation=implementation)
        wide = jnp.promote_types(gates.dtype, jnp.float32)
        hidden = (activation(gates.astype(wide)) * ups.astype(wide)).astype(gates.dtype)
    else:
        x = enter(checks.floating("gated_mlp", "x", x), axis, sequence=sequence)
        gate, up = (_whole(w, fsdp, 0) for w in (gate, up))
        hidden = gated_linear_unit(x, gate, up, activation=activation, implementation=implementation)
    how: dict[str, Any] = dict(axis=axis, sequence=sequence, overlap=overlap, fsdp=fsdp)
    return row_parallel(hidden, down, implementation=implementation, **how)


def heads_parallel_attention(
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
    fsdp: str | None = None,
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
      fsdp: the mesh axis F that the matrices are split over besides, along d: query, key and value [D_F, N_T, H], out
        [N_T, H, D_F]. Else as in `column_parallel` and `row_parallel`.
      replicate_kv: for fewer key heads than devices: key, value and their biases are whole and the same on every
        device, [d, k, h]. Each device takes the one head that its query heads share; gradients are summed over T.
      precision, implementation: of the products, as in `jaxops.matmul`.

    Raises `ValueError` if the heads do not fit each other, besides what `column_parallel` and `row_parallel` raise.
    """
    name = "heads_parallel_attention"
    size = collectives.axis_size(name, axis)
    x = checks.floating(name, "x", x)
    features = x.shape[-1]
    overlap = sequence and overlap
    if fsdp is not None:
        collectives.divisible(name, "x", x, -1, collectives.axis_size(name, fsdp), fsdp)
        if overlap:
            features //= collectives.axis_size(name, fsdp)
        else:
            query, key, value = (_whole(w, fsdp, 0) for w in (query, key, value))
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
        one = lambda w: lax.dynamic_slice_in_dim(w, head, 1, axis=w.ndim - 2)
        key, value = one(key), one(value)
        biases = [b if b is None or i in (0, 3) else one(b) for i, b in enumerate(biases)]
    elif query.shape[1] % key.shape[1] or value.shape[1] != key.shape[1]:
        raise ValueError(
            f"{name}: each device's key heads must divide its query heads, got query {query.shape}, key {key.shape} "
            f"and value {value.shape} (fewer key heads than devices: replicate_kv)"
        )
    flat = [w.reshape(features, -1) for w in (query, key, value)]
    if overlap:
        projected = all_gather_matmul(x, flat, axis=axis, fsdp=fsdp, precision=precision, implementation=implementation)
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
        fsdp=fsdp,
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


def vocab_parallel_cross_entropy(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    axis: str = "tensor",
    sequence: bool = False,
    axis_names: str | Sequence[str] = (),
    bias: jax.Array | None = None,
    token_weights: jax.Array | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_soft_cap: float | None = None,
    reduction: str = "mean",
    implementation: Implementation = None,
) -> jax.Array:
    """`jaxops.linear_cross_entropy(x[..., D], weight[D, V_T], labels)`, the vocabulary split over T, without logits.

    lse = log Σ_T exp(lse_i), where lse_i is that of the device's slice, and the label's logit comes from the one slice
    that has it. Forward: all-reduces of three numbers per token. Backward: all-reduce of dx. With `sequence`, x is
    [..., S_T, D]: an all-gather of x forward, a reduce-scatter of dx backward.

    Args:
      x: floating [..., d], the same on all devices of `axis`, or with `sequence` split by rows (axis -2).
      weight: floating [d, v / T]; bias: floating [v / T] or None. The slices follow each other.
      labels: integer [...], whole in any case, the same on all devices; outside [0, V) as in `linear_cross_entropy`.
      token_weights: floating [...], as the labels, or None.
      axis_names: mesh axes that the tokens are split over, besides `axis`: "mean" and "sum" are over them too.
      ignore_index, label_smoothing, z_loss, logits_soft_cap, reduction, implementation: as in
        `jaxops.linear_cross_entropy`.

    Returns the loss in float32 (float64 for float64), the same on all devices of `axis` and, unless it is "none", of
    `axis_names`. Raises `TypeError` or `ValueError` as `jaxops.linear_cross_entropy` does.
    """
    name = "vocab_parallel_cross_entropy"
    size = collectives.axis_size(name, axis)
    vocabulary.check_reduction(name, reduction)
    x = enter(checks.floating(name, "x", x), axis, sequence=sequence)

    def per_token(x, weight, labels, bias, *, label_smoothing, z_loss, logits_soft_cap):
        own, mine = _of_slice(labels, weight.shape[1], axis)
        # With this smoothing of the slice, scale · (lse_i - loss_i) is its part of (1-ε) · z[label] + ε · mean(z).
        spread = label_smoothing / size
        scale = 1 - label_smoothing + spread
        loss, lse = losses.loss_and_lse(
            x,
            weight,
            jnp.where(mine, own, -1),
            bias,
            label_smoothing=spread / scale,
            z_loss=0.0,
            logits_soft_cap=logits_soft_cap,
            implementation=implementation,
        )
        top = lax.pmax(lax.stop_gradient(lse), axis)
        total, picked = lax.psum(jnp.stack([jnp.exp(lse - top), scale * (lse - loss)]), axis)
        lse = top + jnp.log(total)
        return lse - picked + z_loss * lse * lse

    loss, weights = losses.weighted_losses(
        name,
        per_token,
        x,
        weight,
        labels,
        slices=size,
        bias=bias,
        token_weights=token_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logits_soft_cap=logits_soft_cap,
    )
    names = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    if reduction == "none" or not names:
        return vocabulary.reduced(loss, weights, reduction)
    for one in names:
        collectives.axis_size(name, one)
    total, count = lax.psum(jnp.stack([jnp.sum(loss), jnp.sum(weights)]), names)
    return vocabulary.reduced(total, count, reduction)


def dropout(x: jax.Array, key: jax.Array, rate: float, *, spec: PartitionSpec) -> jax.Array:
    """y = x / (1 - rate) where an element survives, with probability 1 - rate, else 0: on every mesh the same elements.

    The random numbers are counted by an element's position in the whole array (`jaxops.dropout_rows`), not by its place
    on a device. Nothing is sent.

    Args:
      x: floating [batch, rows, features], or less, the device's part.
      key: one key of `jax.random`, the same on all devices.
      rate: a Python number in [0, 1).
      spec: how the whole is split over the axes of the enclosing `jax.shard_map`: `PartitionSpec("data", "tensor")`.

    Raises `TypeError` if x is not floating or `key` is no key, `ValueError` if a number or shape is not as said, or
    `spec` names an axis that is not there.
    """
    name = "dropout"
    x = checks.floating(name, "x", x)
    rate = rate_of(name, rate)
    if x.ndim > 3 or len(spec) > x.ndim:
        raise ValueError(f"{name}: x must have 1 to 3 axes, and spec no more than x, got shape {x.shape} and {spec}")
    start = []
    for size, entry in zip(x.shape, (*spec, *[None] * x.ndim), strict=False):
        position: Any = 0  # of the device along this dimension
        for axis in entry if isinstance(entry, tuple) else () if entry is None else (entry,):
            position = position * collectives.axis_size(name, axis) + lax.axis_index(axis)
        start.append(position * size)
    first_batch, first_row, first_column = [0] * (3 - x.ndim) + start
    batch, rows, columns = [1] * (3 - x.ndim) + list(x.shape)
    words = dropout_rows(key, batch, 1, rows, start=(first_batch, 0, first_row))[:, 0, ..., None]
    kept = random.kept(words[:, 0], words[:, 1], first_column + jnp.arange(columns), rate)
    return jnp.where(kept.reshape(x.shape), x / (1 - rate), 0)


def _whole(w: jax.Array, fsdp: str | None, dimension: int) -> jax.Array:
    return w if fsdp is None else collectives.all_gather(w, fsdp, dimension)


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
