"""Cross-entropy of a linear layer on the TPU; the logits [tokens, vocab] exist only tile by tile, in VMEM.

    z = x · weight (+ bias),  z = cap · tanh(z / cap),  lse_t = log Σ_v exp z_tv
    loss_t = lse_t - (1-ε) z_ty - (ε/V) Σ_v z_tv + λ lse_t²                   (ε label smoothing, λ z-loss, y the label)
    dz_tv = [(g_t + 2λ g_t lse_t + dlse_t) · exp(z_tv - lse_t) - g_t (1-ε) [v = y] - g_t ε/V] · (1 - (z_tv / cap)²)
    dx = dz · weightᵀ,   dweight = xᵀ · dz,   dbias = Σ_t dz

`logits` says how both passes go and why.
Source: Milakov and Gimelshein 2018 (online softmax); Wijmans et al. 2024 (cut cross-entropy).
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import logits
from pallas_kernels.tpu.logits import FLOOR, Layer
from pallas_kernels.tpu.logits import Tiles as Tiles

f32 = jnp.float32
_NAME = "linear_cross_entropy"


def unsupported(
    x, weight, labels, bias=None, *, label_smoothing: float, z_loss: float, logits_soft_cap: float | None
) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    return logits.unsupported({"x": x, "weight": weight})


def tiles(phase: str, x, weight, labels, bias=None, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return logits.choose(_NAME, phase, [Layer(x, weight)])


def candidates(phase: str, x, weight, labels, bias=None, **options) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM, the default first."""
    return logits.candidates(phase, [Layer(x, weight)])


def memory(phase: str, tiles: Tiles, x, weight, labels, bias=None, **options) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return logits.memory(phase, tiles, [Layer(x, weight)])


def forward(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    label_smoothing: float,
    z_loss: float,
    logits_soft_cap: float | None,
    tiles: Tiles | None = None,
):
    """((loss, lse), ()), [tokens] each, from x[tokens, hidden], weight[hidden, vocab], labels[tokens], bias[vocab]."""
    vocab = weight.shape[1]

    def visit(strip, statistics):
        top, total, picked, *sums = statistics
        (z,) = strip.logits
        if logits_soft_cap is not None:
            z = logits_soft_cap * jnp.tanh(z * (1 / logits_soft_cap))
        if label_smoothing:
            sums = [functools.reduce(jnp.add, strip.groups(z, 0.0), sums[0])]
        groups, label, lane = strip.groups(z, FLOOR), strip.of_token(0), strip.lane
        for g, o in zip(groups, strip.offsets(), strict=True):
            picked = jnp.where(lane == label - o, g, picked)
        top, total, _, _ = logits.add_exponentials(top, total, groups)
        return top, total, picked, *sums

    def finish(statistics):
        top, total, picked, *sums = statistics
        lse, _ = logits.log_sum(top, total)
        loss = lse - (1 - label_smoothing) * jnp.sum(picked, 1, keepdims=True)
        if label_smoothing:
            loss = loss - (label_smoothing / vocab) * jnp.sum(sums[0], 1, keepdims=True)
        if z_loss:
            loss = loss + z_loss * jnp.square(lse)
        return loss, lse

    initial = [FLOOR, 0.0, 0.0, *([0.0] if label_smoothing else [])]
    loss, lse = logits.forward(
        _NAME, [Layer(x, weight, bias)], [(labels, 0)], initial, visit, finish, outputs=2, tiles=tiles
    )
    return (loss, lse), ()


def backward(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    outputs,
    residuals,
    cotangents,
    label_smoothing: float,
    z_loss: float,
    logits_soft_cap: float | None,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of x, weight and bias (if present) from lse[tokens] and the cotangents of loss and lse, or None."""
    vocab = weight.shape[1]
    g, lse = cotangents[0].astype(f32), outputs[1]
    slope = g * (1 + 2 * z_loss * lse)
    if cotangents[1] is not None:
        slope = slope + cotangents[1].astype(f32)

    def visit(strip):
        (z,) = strip.logits
        if logits_soft_cap is not None:
            bent = jnp.tanh(z * (1 / logits_soft_cap))
            z = logits_soft_cap * bent
        label, lse, g, slope = (strip.of_token(i) for i in range(4))
        dz = slope * jnp.exp(z - lse)
        dz = dz - jnp.where(strip.words() == label, (1 - label_smoothing) * g, 0.0)
        if label_smoothing:
            dz = dz - (label_smoothing / vocab) * g
        if logits_soft_cap is not None:
            dz = dz * (1 - jnp.square(bent))
        return dz

    # Tokens past the end: g = 0 and lse = ∞, so that dz is 0 whatever the bias.
    vectors = [(labels, 0), (lse, jnp.inf), (g, 0), (slope, 0)]
    return logits.gradients(_NAME, [Layer(x, weight, bias)], vectors, visit, tiles=tiles)
