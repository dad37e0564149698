"""linear_cross_entropy: public function and XLA rules that never hold the logits."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks, vocabulary
from jaxops.reference.linear_cross_entropy import linear_cross_entropy as reference
from pallas_kernels import tpu

REDUCTIONS = ("mean", "sum", "none")


@dataclasses.dataclass(frozen=True)
class _Logits:
    """z = cap(x · weight + bias), a chunk of the vocabulary at a time."""

    x: jax.Array
    weight: jax.Array
    labels: jax.Array
    bias: jax.Array | None
    cap: float | None
    width: int

    @property
    def wide(self):
        return jnp.promote_types(jnp.promote_types(self.x.dtype, self.weight.dtype), jnp.float32)

    @property
    def vocab(self) -> int:
        return self.weight.shape[1]

    def chunk(self, start, width: int):
        """The chunk's weight[hidden, width], z[tokens, width], the slope of cap there, and which z is the label's."""
        weight = lax.dynamic_slice_in_dim(self.weight, start, width, 1)
        z = jnp.dot(self.x, weight, preferred_element_type=self.wide)
        if self.bias is not None:
            z = z + lax.dynamic_slice_in_dim(self.bias, start, width, 0).astype(self.wide)
        slope = None
        if self.cap is not None:
            bent = jnp.tanh(z / self.cap)
            z, slope = self.cap * bent, 1 - bent * bent
        chosen = (self.labels - start)[:, None] == jnp.arange(width, dtype=jnp.int32)
        return weight, z, slope, chosen

    def loop(self, step: Callable, carry):
        """carry = step(start, width, carry) over all chunks."""
        return vocabulary.loop(self.vocab, self.width, step, carry)


def _chunked(elements: int, x, weight, labels, bias, cap) -> _Logits:
    width = vocabulary.chunk_width(elements, x.shape[0], x.shape[1], weight.shape[1])
    return _Logits(x, weight, labels, bias, cap, width)


def _forward(x, weight, labels, bias=None, **static):
    def run(elements, *operands):
        return _forward_chunked(elements, *operands, **static)

    return vocabulary.by_platform(run, x, weight, labels, bias), ()


def _forward_chunked(elements, x, weight, labels, bias, *, label_smoothing, z_loss, logits_soft_cap):
    logits = _chunked(elements, x, weight, labels, bias, logits_soft_cap)
    zero = jnp.zeros(x.shape[0], logits.wide)

    def step(start, width, carry):
        top, total, chosen_z, all_z = carry
        _, z, _, chosen = logits.chunk(start, width)
        new_top = jnp.maximum(top, jnp.max(z, -1))
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(z - new_top[:, None]), -1)
        chosen_z = chosen_z + jnp.sum(jnp.where(chosen, z, 0), -1)
        if label_smoothing:
            all_z = all_z + jnp.sum(z, -1)
        return new_top, total, chosen_z, all_z

    top, total, chosen_z, all_z = logits.loop(step, (jnp.full_like(zero, -jnp.inf), zero, zero, zero))
    lse = top + jnp.log(total)
    loss = lse - (1 - label_smoothing) * chosen_z + z_loss * lse * lse
    if label_smoothing:
        loss = loss - label_smoothing / logits.vocab * all_z
    return loss, lse


def _backward(x, weight, labels, bias=None, *, outputs, residuals, cotangents, **static):
    del residuals

    def run(elements, *operands):
        return _backward_chunked(elements, *operands, **static)

    return vocabulary.by_platform(run, x, weight, labels, bias, outputs[1], *cotangents)


def _backward_chunked(elements, x, weight, labels, bias, lse, g, dlse, *, label_smoothing, z_loss, logits_soft_cap):
    """dz = (p · (g + g · 2 · z_loss · lse + dlse) - g · (1 - ε) · [label] - g · ε / vocab) · slope,
    dx = dz · wᵀ,  dw = xᵀ · dz."""
    logits = _chunked(elements, x, weight, labels, bias, logits_soft_cap)
    of_p, of_label = g * (1 + 2 * z_loss * lse), g * (1 - label_smoothing)
    if dlse is not None:
        of_p = of_p + dlse
    # What the products take: as wide as they would be if the logits had been held.
    narrow = jnp.promote_types(x.dtype, weight.dtype)

    def step(start, width, carry):
        dx, dweight, dbias = carry
        chunk, z, slope, chosen = logits.chunk(start, width)
        dz = jnp.exp(z - lse[:, None]) * of_p[:, None] - jnp.where(chosen, of_label[:, None], 0)
        if label_smoothing:
            dz = dz - (g * (label_smoothing / logits.vocab))[:, None]
        if slope is not None:
            dz = dz * slope
        if bias is not None:
            dbias = lax.dynamic_update_slice_in_dim(dbias, jnp.sum(dz, 0).astype(dbias.dtype), start, 0)
        dz = dz.astype(narrow)
        product = functools.partial(lax.dot_general, preferred_element_type=logits.wide)
        dx = dx + product(dz, chunk.astype(narrow), (((1,), (1,)), ((), ())))
        part = product(x.astype(narrow), dz, (((0,), (0,)), ((), ())))
        return dx, lax.dynamic_update_slice_in_dim(dweight, part.astype(weight.dtype), start, 1), dbias

    empty = (jnp.zeros(x.shape, logits.wide), jnp.zeros_like(weight), None if bias is None else jnp.zeros_like(bias))
    dx, dweight, dbias = logits.loop(step, empty)
    gradients = {"x": dx.astype(x.dtype), "weight": dweight}
    return gradients if bias is None else {**gradients, "bias": dbias}


_OPERATOR = Operator(
    name="linear_cross_entropy",
    differentiable=("x", "weight", "bias"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.linear_cross_entropy,
    gpu="no Mosaic GPU kernel for linear_cross_entropy yet",
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
    check_reduction(name, reduction)

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
    return reduced(loss, weights, reduction)


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


def check_reduction(operator: str, reduction: str) -> None:
    """Raises `ValueError` unless it is one of `REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator}: reduction must be one of {REDUCTIONS}, got {reduction!r}")


def reduced(loss: jax.Array, weights: jax.Array, reduction: str) -> jax.Array:
    """Weighted losses as they are ("none"), their sum, or their mean: Σ loss / Σ weights, 0 where those sum to 0."""
    if reduction == "none":
        return loss
    total, count = jnp.sum(loss), jnp.sum(weights)
    return total if reduction == "sum" else jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count))
