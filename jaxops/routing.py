"""Which experts a token goes to, with what weight, and the losses that keep a router even and its logits small."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxops.ops import checks


class Routing(NamedTuple):
    """What `top_k_routing` says of t tokens that go to k of e experts each.

    experts: int32 [t, k], the likeliest first. weights: float32 [t, k].
    rows: int32 [t · k], the token of every row, rows sorted by expert: `lhs_rows` and `out_rows` of `ragged_dot`.
    row_weights: float32 [t · k], of the same rows: its `out_weights`. group_sizes: int32 [e], rows of each expert.
    load_balancing_loss, z_loss: float32 scalars.
    """

    experts: jax.Array
    weights: jax.Array
    rows: jax.Array
    row_weights: jax.Array
    group_sizes: jax.Array
    load_balancing_loss: jax.Array
    z_loss: jax.Array


def top_k_routing(
    logits: jax.Array, top_k: int, *, normalize: bool = True, axis_names: str | Sequence[str] = ()
) -> Routing:
    """p = softmax(logits);  token i goes to the top_k largest p_i, with them as weights, divided by their sum if told.

        load_balancing_loss = e · Σ_j f_j · mean_i p_ij,   f_j = the share of all choices that are expert j
        z_loss = mean_i logsumexp(logits_i)²

    Equal probabilities: the expert of the lower number. An even router has a load-balancing loss of 1.

    Args:
      logits: floating [t, e]; computed in float32 at least.
      top_k: a Python int in [1, e].
      normalize: whether the weights of a token sum to 1.
      axis_names: mesh axes that the tokens are split over, inside `jax.shard_map`: both losses are over all tokens
        then, everything else over those of the device.

    Raises:
      TypeError: logits are not floating, or `top_k` is not a Python int.
      ValueError: logits do not have two axes, or `top_k` is not in [1, e].

    Sources: Fedus et al., "Switch Transformers", arXiv:2101.03961 (load balancing); Zoph et al., "ST-MoE",
    arXiv:2202.08906 (z-loss).
    """
    name = "top_k_routing"
    logits = checks.floating(name, "logits", logits)
    if logits.ndim != 2:
        raise ValueError(f"{name}: logits must have shape (t, e), got {logits.shape}")
    tokens, experts = logits.shape
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"{name}: top_k must be a Python int, got {type(top_k).__name__}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"{name}: top_k must be in [1, {experts}], got {top_k}")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    p = jnp.exp(logits - lse)
    weights, chosen = lax.top_k(p, top_k)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)

    sums = (jnp.sum(p, axis=0), group_sizes.astype(p.dtype), jnp.sum(jnp.square(lse)), jnp.asarray(tokens, p.dtype))
    if axis_names:
        sums = lax.psum(sums, axis_names)
    probability, choices, squares, count = sums
    count = jnp.maximum(count, 1)
    return Routing(
        experts=chosen.astype(jnp.int32),
        weights=weights,
        rows=order // top_k,
        row_weights=weights.reshape(-1)[order],
        group_sizes=group_sizes,
        load_balancing_loss=experts * jnp.sum(choices / (count * top_k) * (probability / count)),
        z_loss=squares / count,
    )
