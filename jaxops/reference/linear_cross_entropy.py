"""linear_cross_entropy in plain JAX."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    label_smoothing: float,
    z_loss: float,
    logits_soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """loss = lse - (1 - ε) · z[label] - ε · mean(z) + z_loss · lse²,  lse = logsumexp(z),  z = cap(x · weight + bias).

    x[tokens, hidden], weight[hidden, vocab], labels[tokens] in [0, vocab) or -1 for none (then z[label] is 0),
    bias[vocab]; ε = label_smoothing and cap(z) = logits_soft_cap · tanh(z / logits_soft_cap). Returns loss[tokens] and
    lse[tokens] in float32 (float64 for float64).
    """
    wide = jnp.promote_types(jnp.promote_types(x.dtype, weight.dtype), jnp.float32)
    z = jnp.dot(x, weight, preferred_element_type=wide)
    if bias is not None:
        z = z + bias.astype(wide)
    if logits_soft_cap is not None:
        z = logits_soft_cap * jnp.tanh(z / logits_soft_cap)
    lse = jax.nn.logsumexp(z, axis=-1)
    chosen = jnp.take_along_axis(z, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    chosen = jnp.where(labels >= 0, chosen, 0)
    loss = lse - (1 - label_smoothing) * chosen + z_loss * lse * lse
    if label_smoothing:
        loss = loss - label_smoothing * jnp.mean(z, axis=-1)
    return loss, lse
