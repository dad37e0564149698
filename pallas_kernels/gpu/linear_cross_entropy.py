"""Cross-entropy of a linear layer on Hopper GPUs; the logits [tokens, vocab] exist only tile by tile, in registers.

    z = x · weight (+ bias),  z = cap · tanh(z / cap),  lse_t = log Σ_v exp z_tv
    loss_t = lse_t - (1-ε) z_ty - (ε/V) Σ_v z_tv + λ lse_t²                   (ε label smoothing, λ z-loss, y the label)
    dz_tv = [(g_t + 2λ g_t lse_t + dlse_t) · exp(z_tv - lse_t) - g_t (1-ε) [v = y] - g_t ε/V] · (1 - (z_tv / cap)²)
    dx = dz · weightᵀ,   dweight = xᵀ · dz,   dbias = Σ_t dz

`logits` says how both passes go and why. Blocks that share the vocabulary give sums of their parts; XLA joins them.
Source: Milakov and Gimelshein 2018 (online softmax); Wijmans et al. 2024 (cut cross-entropy).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import logits
from pallas_kernels.gpu.attention_scores import LOG2E, LOWEST
from pallas_kernels.gpu.elementwise import lowered
from pallas_kernels.gpu.logits import Tiles as Tiles

f32 = jnp.float32
_NAME = "linear_cross_entropy"
_tanh = lowered(jnp.tanh)


def unsupported(
    x, weight, labels, bias=None, *, label_smoothing: float, z_loss: float, logits_soft_cap: float | None
) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    return logits.unsupported(x.shape[0], weight.shape[1], x=x, weight=weight)


def tiles(phase: str, x, weight, labels, bias=None, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return logits.tiles(_NAME, phase, 1, x, weight, biased=bias is not None)


def candidates(phase: str, x, weight, labels, bias=None, **options) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return logits.candidates(phase, 1, x, weight, biased=bias is not None)


def memory(phase: str, tiles: Tiles, x, weight, labels, bias=None, **options) -> int:
    """Bytes of shared memory of a block."""
    return logits.memory(tiles)


def _capped(z, cap: float | None):
    """(cap · tanh(z / cap), tanh(z / cap)), or (z, None) without a cap."""
    if cap is None:
        return z, None
    bent = _tanh(z * (1 / cap))
    return cap * bent, bent


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
    tiles = tiles or logits.tiles(_NAME, "forward", 1, x, weight, biased=bias is not None)

    def visit(tile, carry):
        top, total, picked, *sums = carry
        (z,) = tile.logits
        if bias is not None:
            z = z + tile.of_column(0)
        z, _ = _capped(z, logits_soft_cap)
        word = tile.numbers(1)
        picked = picked + logits.sum_of_columns(jnp.where(word == tile.of_row(0), z, 0.0))
        inside = word < vocab if vocab % tiles.columns else None
        if label_smoothing:
            sums = [sums[0] + logits.sum_of_columns(z if inside is None else jnp.where(inside, z, 0.0))]
        z = z if inside is None else jnp.where(inside, z, LOWEST)
        top, total, _, _ = logits.add_exponentials(top, total, z, LOG2E)
        return (top, total, picked, *sums), None

    def carry():
        return logits.row_of(LOWEST), *[logits.partial_sums()] * (3 if label_smoothing else 2)

    def finish(carry):
        top, *sums = carry
        total, *sums = (s.sum(axis=1) for s in sums)
        return logits.log_sum(top, total), *sums

    found = logits.forward(
        f"{_NAME}_forward",
        [(x, weight, bias)],
        [labels.astype(jnp.int32)],
        carry,
        visit,
        finish,
        kept=3 if label_smoothing else 2,
        tiles=tiles,
    )
    lse, picked = jax.nn.logsumexp(found[0], axis=0), found[1].sum(0)
    loss = lse - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - (label_smoothing / vocab) * found[2].sum(0)
    if z_loss:
        loss = loss + z_loss * jnp.square(lse)
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
    tiles = tiles or logits.tiles(_NAME, "backward", 1, x, weight, biased=bias is not None)
    g, lse = cotangents[0].astype(f32), outputs[1]
    of_p = g * (1 + 2 * z_loss * lse)
    if cotangents[1] is not None:
        of_p = of_p + cotangents[1].astype(f32)

    # Tokens past the end: g = 0 and lse = ∞, so that dz is 0 whatever the bias.
    def by_token(start):
        return [(labels.astype(jnp.int32) - start, -1), (lse * LOG2E, jnp.inf), (of_p, 0), (g, 0)]

    def visit(tile):
        (z,) = tile.logits
        if bias is not None:
            z = z + tile.of_row(0)
        z, bent = _capped(z, logits_soft_cap)
        dz = jnp.exp2(z * LOG2E - tile.of_column(1)) * tile.of_column(2)
        is_label, each = tile.numbers(0) == tile.of_column(0), label_smoothing / vocab
        dz = dz - jnp.where(is_label, 1 - label_smoothing + each, each) * tile.of_column(3)
        return dz if bent is None else dz * (1 - bent * bent)

    return logits.gradients(_NAME, [(x, weight, bias)], by_token, visit, tiles=tiles)
