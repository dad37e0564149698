"""Divergence of a student from its teacher on Hopper GPUs; logits exist only tile by tile, in registers.

    z = (x · weight (+ bias)) / τ,  p = exp(z - lse);   q the same of the teacher's z'
    loss_t = τ² [Σ_v q_tv (z'_tv - z_tv) - (lse'_t - lse_t)]
    dz_tv = τ g_t (p_tv - q_tv),   dx = dz · weightᵀ,   dweight = xᵀ · dz,   dbias = Σ_t dz

`logits` says how both passes go and why: here each tile is of both layers. Besides both log-sum-exps the forward pass
keeps Σ_v exp(z' - top') (z' - z), rescaled as the teacher's sum is. Blocks that share the vocabulary give these of
their parts; XLA joins them.
Source: Hinton, Vinyals and Dean 2015; Milakov and Gimelshein 2018 (online softmax).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import logits
from pallas_kernels.gpu.attention_scores import LOG2E, LOWEST, down
from pallas_kernels.gpu.logits import Tiles as Tiles

f32 = jnp.float32
_NAME = "linear_distillation"


def _of(phase, x, weight, bias, teacher_bias):
    """What the choice of tiles depends on, as arguments."""
    return dict(phase=phase, layers=2, x=x, weight=weight, biased=bias is not None or teacher_bias is not None)


def unsupported(
    x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, *, temperature: float
) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    factors = dict(x=x, weight=weight, teacher_x=teacher_x, teacher_weight=teacher_weight)
    return logits.unsupported(x.shape[0], weight.shape[1], **factors)


def tiles(phase: str, x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return logits.tiles(_NAME, **_of(phase, x, weight, bias, teacher_bias))


def candidates(
    phase: str, x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, **options
) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return logits.candidates(**_of(phase, x, weight, bias, teacher_bias))


def memory(
    phase: str, tiles: Tiles, x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, **options
) -> int:
    """Bytes of shared memory of a block."""
    return logits.memory(tiles)


def _biased(tile, biases, vector):
    """The logits with the biases that there are, `vector(0)` the first of them."""
    found, which = [], 0
    for z, bias in zip(tile.logits, biases, strict=True):
        found.append(z if bias is None else z + vector(which))
        which += bias is not None
    return found


def forward(
    x: jax.Array,
    weight: jax.Array,
    teacher_x: jax.Array,
    teacher_weight: jax.Array,
    bias: jax.Array | None = None,
    teacher_bias: jax.Array | None = None,
    *,
    temperature: float,
    tiles: Tiles | None = None,
):
    """((loss, lse, teacher's lse), ()), [tokens] each, from x[tokens, hidden], weight[hidden, vocab] and theirs."""
    vocab, factor = weight.shape[1], LOG2E / temperature
    tiles = tiles or logits.tiles(_NAME, **_of("forward", x, weight, bias, teacher_bias))

    def visit(tile, carry):
        top, total, teacher_top, teacher_total, mixed = carry
        z, teacher_z = _biased(tile, (bias, teacher_bias), tile.of_column)
        if vocab % tiles.columns:
            inside = tile.numbers(1) < vocab
            z, teacher_z = (jnp.where(inside, one, LOWEST) for one in (z, teacher_z))
        top, total, _, _ = logits.add_exponentials(top, total, z, factor)
        teacher_top, teacher_total, q, decay = logits.add_exponentials(teacher_top, teacher_total, teacher_z, factor)
        mixed = mixed * down(decay, mixed.shape) + logits.sum_of_columns(q * (teacher_z - z))
        return (top, total, teacher_top, teacher_total, mixed), None

    def carry():
        row, sums = logits.row_of(LOWEST), logits.partial_sums()
        return row, sums, row, sums, sums

    def finish(carry):
        top, total, teacher_top, teacher_total, mixed = carry
        teacher_total = teacher_total.sum(axis=1)
        teacher_lse = logits.log_sum(teacher_top, teacher_total)
        return logits.log_sum(top, total.sum(axis=1)), teacher_lse, mixed.sum(axis=1) / teacher_total

    lses, teacher_lses, means = logits.forward(
        f"{_NAME}_forward",
        [(x, weight, bias), (teacher_x, teacher_weight, teacher_bias)],
        [],
        carry,
        visit,
        finish,
        kept=3,
        tiles=tiles,
    )
    lse, teacher_lse = (jax.nn.logsumexp(parts, axis=0) for parts in (lses, teacher_lses))
    mean = (jnp.exp(teacher_lses - teacher_lse) * means).sum(0) / temperature  # of z' - z, by the teacher
    # A divergence is never negative, though the rounding of its parts can be.
    loss = temperature**2 * jnp.maximum(mean - (teacher_lse - lse), 0)
    return (loss, lse, teacher_lse), ()


def backward(
    x: jax.Array,
    weight: jax.Array,
    teacher_x: jax.Array,
    teacher_weight: jax.Array,
    bias: jax.Array | None = None,
    teacher_bias: jax.Array | None = None,
    *,
    outputs,
    residuals,
    cotangents,
    temperature: float,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of x, weight and bias (if present) from both lse[tokens] and the cotangent of the loss."""
    del residuals
    _, lse, teacher_lse = outputs
    tiles = tiles or logits.tiles(_NAME, **_of("backward", x, weight, bias, teacher_bias))
    # Tokens past the end: g = 0 and lse = ∞, so that dz is 0 whatever the biases.
    of_both = temperature * cotangents[0].astype(f32)
    vectors = [(lse * LOG2E, jnp.inf), (teacher_lse * LOG2E, jnp.inf), (of_both, 0)]

    def visit(tile):
        both = _biased(tile, (bias, teacher_bias), tile.of_row)
        p, q = (jnp.exp2(z * (LOG2E / temperature) - tile.of_column(i)) for i, z in enumerate(both))
        return (p - q) * tile.of_column(2)

    layers = [(x, weight, bias), (teacher_x, teacher_weight, teacher_bias)]
    return logits.gradients(_NAME, layers, lambda start: vectors, visit, tiles=tiles)
