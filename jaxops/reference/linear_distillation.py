"""linear_distillation in plain JAX."""

import jax
import jax.numpy as jnp


def linear_distillation(
    x: jax.Array,
    weight: jax.Array,
    teacher_x: jax.Array,
    teacher_weight: jax.Array,
    bias: jax.Array | None = None,
    teacher_bias: jax.Array | None = None,
    *,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """loss = τ² Σ_v q (log q - log p),  p = softmax((x · weight + bias) / τ),  q the same of the teacher.

    x[tokens, hidden], weight[hidden, vocab], bias[vocab]; the teacher's may have another hidden size; τ = temperature.
    Returns the loss and the log-sum-exp of both kinds of logits over τ, the teacher's last; [tokens] each, in float32
    (float64 for float64).
    """

    def logits(x, weight, bias):
        wide = jnp.promote_types(jnp.promote_types(x.dtype, weight.dtype), jnp.float32)
        z = jnp.dot(x, weight, preferred_element_type=wide)
        return (z if bias is None else z + bias.astype(wide)) / temperature

    z, teacher_z = logits(x, weight, bias), logits(teacher_x, teacher_weight, teacher_bias)
    lse, teacher_lse = (jax.nn.logsumexp(z, axis=-1) for z in (z, teacher_z))
    log_p, log_q = z - lse[:, None], teacher_z - teacher_lse[:, None]
    return temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1), lse, teacher_lse
