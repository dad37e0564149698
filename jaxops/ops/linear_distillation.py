"""linear_distillation: public function and XLA rules that never hold the logits of the student or the teacher."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks, vocabulary
from jaxops.ops.linear_cross_entropy import check_reduction, reduced
from jaxops.reference.linear_distillation import linear_distillation as reference


@dataclasses.dataclass(frozen=True)
class _Logits:
    """z = (x · weight + bias) / τ, a chunk of the vocabulary at a time."""

    x: jax.Array
    weight: jax.Array
    bias: jax.Array | None
    temperature: float

    @property
    def wide(self):
        return jnp.promote_types(jnp.promote_types(self.x.dtype, self.weight.dtype), jnp.float32)

    def chunk(self, start, width: int) -> tuple[jax.Array, jax.Array]:
        """The chunk's weight[hidden, width] and z[tokens, width]."""
        weight = lax.dynamic_slice_in_dim(self.weight, start, width, 1)
        z = jnp.dot(self.x, weight, preferred_element_type=self.wide)
        if self.bias is not None:
            z = z + lax.dynamic_slice_in_dim(self.bias, start, width, 0).astype(self.wide)
        return weight, z / self.temperature


def _width(elements: int, student: _Logits, teacher: _Logits) -> int:
    hidden = max(student.x.shape[1], teacher.x.shape[1])
    return vocabulary.chunk_width(elements, 2 * student.x.shape[0], hidden, student.weight.shape[1])


def _forward(x, weight, teacher_x, teacher_weight, bias=None, teacher_bias=None, *, temperature):
    def run(elements, x, weight, bias, teacher_x, teacher_weight, teacher_bias):
        student = _Logits(x, weight, bias, temperature)
        teacher = _Logits(teacher_x, teacher_weight, teacher_bias, temperature)

        def step(start, width, carry):
            (top, total), (teacher_top, teacher_total, mixed) = carry
            z, teacher_z = student.chunk(start, width)[1], teacher.chunk(start, width)[1]
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
        (top, total), (teacher_top, teacher_total, mixed) = vocabulary.loop(weight.shape[1], width, step, carry)
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
        student = _Logits(x, weight, bias, temperature)
        teacher = _Logits(teacher_x, teacher_weight, teacher_bias, temperature)
        narrow = jnp.promote_types(x.dtype, weight.dtype)
        product = functools.partial(lax.dot_general, preferred_element_type=lse.dtype)

        def step(start, width, carry):
            dx, dweight, dbias = carry
            (chunk, z), (_, teacher_z) = student.chunk(start, width), teacher.chunk(start, width)
            dz = jnp.exp(z - lse[:, None]) - jnp.exp(teacher_z - teacher_lse[:, None])
            dz = (dz * (temperature * g)[:, None]).astype(lse.dtype)
            if bias is not None:
                dbias = lax.dynamic_update_slice_in_dim(dbias, jnp.sum(dz, 0).astype(dbias.dtype), start, 0)
            dz = dz.astype(narrow)
            dx = dx + product(dz, chunk.astype(narrow), (((1,), (1,)), ((), ())))
            part = product(x.astype(narrow), dz, (((0,), (0,)), ((), ())))
            return dx, lax.dynamic_update_slice_in_dim(dweight, part.astype(weight.dtype), start, 1), dbias

        empty = jnp.zeros(x.shape, lse.dtype), jnp.zeros_like(weight), None if bias is None else jnp.zeros_like(bias)
        width = _width(elements, student, teacher)
        dx, dweight, dbias = vocabulary.loop(weight.shape[1], width, step, empty)
        return {"x": dx.astype(x.dtype), "weight": dweight} | ({} if bias is None else {"bias": dbias})

    operands = (x, weight, bias, teacher_x, teacher_weight, teacher_bias, lse, teacher_lse, cotangents[0])
    return vocabulary.by_platform(run, *operands)


_OPERATOR = Operator(
    name="linear_distillation",
    differentiable=("x", "weight", "bias"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu="no Mosaic TPU kernel for linear_distillation yet",
    gpu="no Mosaic GPU kernel for linear_distillation yet",
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
    check_reduction(name, reduction)

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
    return reduced(loss if token_weights is None else weights * loss, weights, reduction)
