"""linear_distillation: public function and XLA rules that never hold the logits of the student or the teacher."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks, vocabulary
from jaxops.reference.linear_distillation import linear_distillation as reference
from pallas_kernels import gpu, tpu


def _width(elements: int, student: vocabulary.Layer, teacher: vocabulary.Layer) -> int:
    hidden = max(student.x.shape[1], teacher.x.shape[1])
    return vocabulary.chunk_width(elements, 2 * student.x.shape[0], hidden, student.vocab)


def _forward(x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, *, temperature):
    def run(elements, x, weight, bias, teacher_x, teacher_weight, teacher_bias):
        student = vocabulary.Layer(x, weight, bias)
        teacher = vocabulary.Layer(teacher_x, teacher_weight, teacher_bias)

        def step(start, width, carry):
            (top, total), (teacher_top, teacher_total, mixed) = carry
            z, teacher_z = (layer.logits(start, width) / temperature for layer in (student, teacher))
            new_top = jnp.maximum(top, jnp.max(z, -1))
            total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(z - new_top[:, None]), -1)
            new_teacher_top = jnp.maximum(teacher_top, jnp.max(teacher_z, -1))
            q, decay = jnp.exp(teacher_z - new_teacher_top[:, None]), jnp.exp(teacher_top - new_teacher_top)
            mixed = mixed * decay + jnp.sum(q * (teacher_z - z), -1)
            return (new_top, total), (new_teacher_top, teacher_total * decay + jnp.sum(q, -1), mixed)

        start = lambda dtype: (jnp.full(x.shape[:1], -jnp.inf, dtype), jnp.zeros(x.shape[:1], dtype))
        mixed = jnp.zeros(x.shape[:1], jnp.promote_types(student.wide, teacher.wide))
        carry = start(student.wide), (*start(teacher.wide), mixed)
        width = _width(elements, student, teacher)
        (top, total), (teacher_top, teacher_total, mixed) = vocabulary.over_chunks(student.vocab, width, step, carry)
        lse, teacher_lse = top + jnp.log(total), teacher_top + jnp.log(teacher_total)
        # A divergence is never negative, though the rounding of its parts can be.
        loss = temperature**2 * jnp.maximum(mixed / teacher_total - (teacher_lse - lse), 0)
        return loss, lse, teacher_lse

    return vocabulary.by_platform(run, x, weight, bias, teacher_x, teacher_weight, teacher_bias), ()


def _backward(
    x,
    weight,
    teacher_x,
    teacher_weight,
    bias=None,
    teacher_bias=None,
    *,
    outputs,
    residuals,
    cotangents,
    temperature,
):
    """dz = τ g (p - q),  dx = dz · weightᵀ,  dweight = xᵀ · dz,  dbias = Σ dz."""
    del residuals
    _, lse, teacher_lse = outputs

    def run(elements, x, weight, bias, teacher_x, teacher_weight, teacher_bias, lse, teacher_lse, g):
        student = vocabulary.Layer(x, weight, bias)
        teacher = vocabulary.Layer(teacher_x, teacher_weight, teacher_bias)

        def dz_of(start, z):
            teacher_z = teacher.logits(start, z.shape[1]) / temperature
            dz = jnp.exp(z / temperature - lse[:, None]) - jnp.exp(teacher_z - teacher_lse[:, None])
            return dz * (temperature * g)[:, None]

        return vocabulary.gradients(student, _width(elements, student, teacher), dz_of)

    operands = (x, weight, bias, teacher_x, teacher_weight, teacher_bias, lse, teacher_lse, cotangents[0])
    return vocabulary.by_platform(run, *operands)


_OPERATOR = Operator(
    name="linear_distillation",
    differentiable=("x", "weight", "bias"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.linear_distillation,
    gpu=gpu.linear_distillation,
    partition=lambda spec: (jax.sharding.PartitionSpec(*spec[:1]),) * 3,
)


def linear_distillation(
    x: jax.Array,
    weight: jax.Array,
    teacher_x: jax.Array,
    teacher_weight: jax.Array,
    *,
    bias: jax.Array | None = None,
    teacher_bias: jax.Array | None = None,
    temperature: float = 1.0,
    token_weights: jax.Array | None = None,
    reduction: str = "mean",
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """loss = u · τ² · Σ_v q (log q - log p),  p = softmax((x · weight + bias) / τ),  q = softmax of the teacher's / τ.

    The Kullback-Leibler divergence of a student from its teacher, from the last layers of both: no logits
    [tokens, vocab] are ever in memory. τ = temperature, u = token_weights. The teacher is taken as it is and gets no
    gradient.

    Args:
      x: floating [..., hidden], of the student.
      weight: floating [hidden, vocab].
      teacher_x: floating [..., teacher's hidden], with the leading axes of x.
      teacher_weight: floating [teacher's hidden, vocab].
      bias, teacher_bias: floating [vocab] or None.
      temperature: τ > 0. The factor τ² keeps the size of the gradient.
      token_weights: floating [...], the leading axes of x: how much each token counts, also in the mean. None: all 1.
      reduction: "mean", Σ loss / Σ u (0 if that is 0), "sum", or "none".
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      The loss in float32 (float64 for float64): a scalar, or [...] for reduction "none". So are logits and sums.

    Raises:
      TypeError: an array is not floating, or temperature is not a Python number.
      ValueError: shapes do not fit, temperature is not above 0, or `implementation` or `reduction` is unknown.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    name = "linear_distillation"
    x, teacher_x = checks.floating(name, "x", x), checks.floating(name, "teacher_x", teacher_x)
    *leading, hidden = x.shape
    if list(teacher_x.shape[:-1]) != leading:
        raise ValueError(f"{name}: teacher_x must have the leading axes of x, {tuple(leading)}, got {teacher_x.shape}")
    weight = checks.weight(name, "weight", weight, x)
    teacher_weight = checks.weight(name, "teacher_weight", teacher_weight, teacher_x)
    vocab = weight.shape[1]
    if vocab == 0:
        raise ValueError(f"{name}: weight must have at least one column, got {weight.shape}")
    if teacher_weight.shape[1] != vocab:
        raise ValueError(
            f"{name}: teacher_weight must have as many columns as weight, {vocab}, got {teacher_weight.shape}"
        )
    of = "the last axis of weight"
    if bias is not None:
        bias = checks.floating(name, "bias", bias, shape=(vocab,), of=of)
    if teacher_bias is not None:
        teacher_bias = checks.floating(name, "teacher_bias", teacher_bias, shape=(vocab,), of=of)
    temperature = checks.number(name, "temperature", temperature, positive=True)
    if token_weights is not None:
        token_weights = checks.floating(name, "token_weights", token_weights, shape=leading, of="the leading axes of x")
    vocabulary.check_reduction(name, reduction)

    tokens = math.prod(leading)
    teacher = dict(
        teacher_x=teacher_x.reshape(tokens, teacher_x.shape[-1]),
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
    )
    loss, *_ = _OPERATOR(
        dict(x=x.reshape(tokens, hidden), weight=weight, bias=bias, **jax.tree.map(lax.stop_gradient, teacher)),
        implementation=implementation,
        temperature=temperature,
    )
    loss = loss.reshape(leading)
    weights = jnp.ones_like(loss) if token_weights is None else token_weights.astype(loss.dtype)
    return vocabulary.reduced(loss if token_weights is None else weights * loss, weights, reduction)
