"""Divergence of a student from its teacher on the TPU; the logits of both exist only tile by tile, in VMEM.

    z = (x · weight (+ bias)) / τ,  p = exp(z - lse);   q the same of the teacher's z'
    loss_t = τ² [Σ_v q_tv (z'_tv - z_tv) - (lse'_t - lse_t)]
    dz_tv = τ g_t (p_tv - q_tv),   dx = dz · weightᵀ,   dweight = xᵀ · dz,   dbias = Σ_t dz

`logits` says how both passes go and why: here each strip is of both layers. Besides both log-sum-exps the forward pass
keeps Σ_v exp(z' - top') (z' - z), rescaled as the teacher's sum is.
Source: Hinton, Vinyals and Dean 2015; Milakov and Gimelshein 2018 (online softmax).
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import logits
from pallas_kernels.tpu.logits import FLOOR, Layer
from pallas_kernels.tpu.logits import Tiles as Tiles

f32 = jnp.float32
_NAME = "linear_distillation"


def unsupported(
    x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, *, temperature: float
) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    return logits.unsupported(dict(x=x, weight=weight, teacher_x=teacher_x, teacher_weight=teacher_weight))


def tiles(phase: str, x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return logits.choose(_NAME, phase, [Layer(x, weight), Layer(teacher_x, teacher_weight)])


def candidates(
    phase: str, x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, **options
) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM, the default first."""
    return logits.candidates(phase, [Layer(x, weight), Layer(teacher_x, teacher_weight)])


def memory(
    phase: str, tiles: Tiles, x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, **options
) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return logits.memory(phase, tiles, [Layer(x, weight), Layer(teacher_x, teacher_weight)])


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

    def visit(strip, statistics):
        top, total, teacher_top, teacher_total, mixed = statistics
        z, teacher_z = (strip.groups(one * (1 / temperature), FLOOR) for one in strip.logits)
        top, total, _, _ = logits.add_exponentials(top, total, z)
        teacher_top, teacher_total, qs, decay = logits.add_exponentials(teacher_top, teacher_total, teacher_z)
        parts = [q * (theirs - ours) for q, theirs, ours in zip(qs, teacher_z, z, strict=True)]
        return top, total, teacher_top, teacher_total, mixed * decay + functools.reduce(jnp.add, parts)

    def finish(statistics):
        top, total, teacher_top, teacher_total, mixed = statistics
        lse, _ = logits.log_sum(top, total)
        teacher_lse, factor = logits.log_sum(teacher_top, teacher_total)
        sum_of_lanes = lambda lanes: jnp.sum(lanes * factor, 1, keepdims=True)
        mean = sum_of_lanes(mixed) / sum_of_lanes(teacher_total)  # of z' - z, by the teacher
        # A divergence is never negative, though the rounding of its parts can be.
        return temperature**2 * jnp.maximum(mean - (teacher_lse - lse), 0), lse, teacher_lse

    layers, initial = (
        [Layer(x, weight, bias), Layer(teacher_x, teacher_weight, teacher_bias)],
        [FLOOR, 0.0, FLOOR, 0.0, 0.0],
    )
    return tuple(logits.forward(_NAME, layers, [], initial, visit, finish, outputs=3, tiles=tiles)), ()


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
    _, lse, teacher_lse = outputs

    def visit(strip):
        p, q = (jnp.exp(z * (1 / temperature) - strip.of_token(i)) for i, z in enumerate(strip.logits))
        return (p - q) * strip.of_token(2)

    # Tokens past the end: g = 0 and lse = ∞, so that dz is 0 whatever the biases.
    vectors = [(lse, jnp.inf), (teacher_lse, jnp.inf), (temperature * cotangents[0].astype(f32), 0)]
    layers = [Layer(x, weight, bias), Layer(teacher_x, teacher_weight, teacher_bias)]
    return logits.gradients(_NAME, layers, vectors, visit, tiles=tiles)
