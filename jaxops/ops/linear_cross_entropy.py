"""linear_cross_entropy: public function and XLA rules that never hold the logits."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks, vocabulary
from jaxops.reference.linear_cross_entropy import linear_cross_entropy as reference
from pallas_kernels import gpu, tpu


def _width(elements: int, layer: vocabulary.Layer) -> int:
    tokens, hidden = layer.x.shape
    return vocabulary.chunk_width(elements, tokens, hidden, layer.vocab)


def _capped(z, cap: float | None):
    """cap · tanh(z / cap) and its slope; z itself and None without a cap."""
    if cap is None:
        return z, None
    bent = jnp.tanh(z / cap)
    return cap * bent, 1 - bent * bent


def _chosen(labels, start, width: int):
    """Which logits of a chunk, [tokens, width], are the labels'."""
    return (labels - start)[:, None] == jnp.arange(width, dtype=jnp.int32)


def _forward(x, weight, labels, bias=None, **static):
    def run(elements, *operands):
        return _forward_chunked(elements, *operands, **static)

    return vocabulary.by_platform(run, x, weight, labels, bias), ()


def _forward_chunked(elements, x, weight, labels, bias, *, label_smoothing, z_loss, logits_soft_cap):
    layer = vocabulary.Layer(x, weight, bias)
    zero = jnp.zeros(x.shape[0], layer.wide)

    def step(start, width, carry):
        top, total, chosen_z, all_z = carry
        z, _ = _capped(layer.logits(start, width), logits_soft_cap)
        new_top = jnp.maximum(top, jnp.max(z, -1))
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(z - new_top[:, None]), -1)
        chosen_z = chosen_z + jnp.sum(jnp.where(_chosen(labels, start, width), z, 0), -1)
        if label_smoothing:
            all_z = all_z + jnp.sum(z, -1)
        return new_top, total, chosen_z, all_z

    carry = jnp.full_like(zero, -jnp.inf), zero, zero, zero
    top, total, chosen_z, all_z = vocabulary.over_chunks(layer.vocab, _width(elements, layer), step, carry)
    lse = top + jnp.log(total)
    loss = lse - (1 - label_smoothing) * chosen_z + z_loss * lse * lse
    if label_smoothing:
        loss = loss - label_smoothing / layer.vocab * all_z
    return loss, lse


def _backward(x, weight, labels, bias=None, *, outputs, residuals, cotangents, **static):
    del residuals

    def run(elements, *operands):
        return _backward_chunked(elements, *operands, **static)

    return vocabulary.by_platform(run, x, weight, labels, bias, outputs[1], *cotangents)


def _backward_chunked(elements, x, weight, labels, bias, lse, g, dlse, *, label_smoothing, z_loss, logits_soft_cap):
    """dz = (p · (g + g · 2 · z_loss · lse + dlse) - g · (1 - ε) · [label] - g · ε / vocab) · slope,
    dx = dz · wᵀ,  dw = xᵀ · dz."""
    layer = vocabulary.Layer(x, weight, bias)
    of_p, of_label = g * (1 + 2 * z_loss * lse), g * (1 - label_smoothing)
    if dlse is not None:
        of_p = of_p + dlse

    def dz_of(start, z):
        z, slope = _capped(z, logits_soft_cap)
        chosen = _chosen(labels, start, z.shape[1])
        dz = jnp.exp(z - lse[:, None]) * of_p[:, None] - jnp.where(chosen, of_label[:, None], 0)
        if label_smoothing:
            dz = dz - (g * (label_smoothing / layer.vocab))[:, None]
        return dz if slope is None else dz * slope

    return vocabulary.gradients(layer, _width(elements, layer), dz_of)


_OPERATOR = Operator(
    name="linear_cross_entropy",
    differentiable=("x", "weight", "bias"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.linear_cross_entropy,
    gpu=gpu.linear_cross_entropy,
    partition=lambda spec: (jax.sharding.PartitionSpec(*spec[:1]),) * 2,
    differentiable_outputs=2,
)


def linear_cross_entropy(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    token_weights: jax.Array | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_soft_cap: float | None = None,
    reduction: str = "mean",
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """loss = u · (lse - (1 - ε) · z[label] - ε · mean(z) + z_loss · lse²),  z = cap(x · weight + bias).

    The last linear layer and its cross-entropy in one, without the logits [tokens, vocab] ever in memory.
    lse = logsumexp(z), ε = label_smoothing, u = token_weights, cap(z) = logits_soft_cap · tanh(z / logits_soft_cap).

    Args:
      x: floating [..., hidden].
      weight: floating [hidden, vocab].
      labels: integer [...], the leading axes of x. A label outside [0, vocab) that is not `ignore_index` makes its loss
        NaN: while tracing it cannot be refused.
      bias: floating [vocab] or None.
      token_weights: floating [...], the leading axes of x: how much each token counts, also in the mean. None: all 1.
      ignore_index: tokens with this label have loss 0 and no gradient, and do not count in the mean. May be negative.
      label_smoothing: ε in [0, 1).
      z_loss: at least 0; keeps lse near 0.
      logits_soft_cap: above 0, or None.
      reduction: "mean" over the tokens that are not ignored, Σ loss / Σ u (0 if there are none), "sum", or "none".
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      The loss in float32 (float64 for float64): a scalar, or [...] for reduction "none". So are logits and sums.

    Raises:
      TypeError: an array is not of the kind above, or an option is not a Python number.
      ValueError: shapes do not fit, an option is out of range, or `implementation` is unknown or, alone, cannot run.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
    """
    name = "linear_cross_entropy"
    vocabulary.check_reduction(name, reduction)

    def per_token(*operands: Any, **static: Any) -> jax.Array:
        return loss_and_lse(*operands, **static, implementation=implementation)[0]

    loss, weights = weighted_losses(
        name,
        per_token,
        x,
        weight,
        labels,
        bias=bias,
        token_weights=token_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logits_soft_cap=logits_soft_cap,
    )
    return vocabulary.reduced(loss, weights, reduction)


def loss_and_lse(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None,
    *,
    implementation: dispatch.Implementation,
    **static: Any,
) -> tuple[jax.Array, jax.Array]:
    """(loss[tokens], lse[tokens]) of the reference, fused; both are differentiable."""
    operands = dict(x=x, weight=weight, labels=labels, bias=bias)
    loss, lse = _OPERATOR(operands, implementation=implementation, **static)
    return loss, lse


def weighted_losses(
    name: str,
    per_token: Callable[..., jax.Array],
    x: Any,
    weight: Any,
    labels: Any,
    *,
    slices: int = 1,
    bias: Any,
    token_weights: Any,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    logits_soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """(u · loss, u), both [...], for the arguments of `linear_cross_entropy`, which are checked here.

    per_token(x[tokens, hidden], weight, labels[tokens], bias, label_smoothing=, z_loss=, logits_soft_cap=) gives the
    losses. slices: `weight` and `bias` are one of so many slices of the vocabulary, labels are of the whole.
    """
    x = checks.floating(name, "x", x)
    *leading, hidden = x.shape
    weight = checks.weight(name, "weight", weight, x)
    vocab = slices * weight.shape[1]
    if vocab == 0:
        raise ValueError(f"{name}: weight must have at least one column, got {weight.shape}")
    labels = checks.integer(name, "labels", labels, shape=leading, of="the leading axes of x")
    if bias is not None:
        bias = checks.floating(name, "bias", bias, shape=weight.shape[1:], of="the last axis of weight")
    if token_weights is not None:
        token_weights = checks.floating(name, "token_weights", token_weights, shape=leading, of="the leading axes of x")
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise TypeError(f"{name}: ignore_index must be None or a Python int, got {type(ignore_index).__name__}")
    label_smoothing = checks.number(name, "label_smoothing", label_smoothing)
    if label_smoothing >= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1), got {label_smoothing}")
    z_loss = checks.number(name, "z_loss", z_loss)
    if logits_soft_cap is not None:
        logits_soft_cap = checks.number(name, "logits_soft_cap", logits_soft_cap, positive=True)

    tokens = math.prod(leading)
    index = labels.astype(jnp.int32)
    valid = (index >= 0) & (index < vocab) & (index.astype(labels.dtype) == labels)
    counted = jnp.ones_like(valid) if ignore_index is None else index != ignore_index
    loss = per_token(
        x.reshape(tokens, hidden),
        weight,
        jnp.where(valid & counted, index, 0).reshape(tokens),
        bias,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logits_soft_cap=logits_soft_cap,
    )
    loss = jnp.where(counted, jnp.where(valid, loss.reshape(leading), jnp.nan), 0)
    weights = counted.astype(loss.dtype)
    if token_weights is not None:
        weights = jnp.where(counted, token_weights.astype(loss.dtype), 0)
        loss = jnp.where(counted, weights * loss, 0)
    return loss, weights
