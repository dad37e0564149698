"""The mixture-of-experts layer of the GPT: of jaxops, and the same of plain JAX."""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxops.nn

EXPERTS_PER_TOKEN = 2
BALANCE, Z = 1e-2, 1e-3  # weights of the router's two losses


class Mixture(jaxops.nn.MoE):
    """`jaxops.nn.MoE`, whose `routed` also gives the router's losses."""

    def routed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(y, penalty) of x[batch, T, width]; the penalty is over the tokens along `axis_names` too."""
        y, routing = self(x, return_routing=True)
        return y, BALANCE * routing.load_balancing_loss + Z * routing.z_loss


class PlainMixture(nnx.Module):
    """The same, parameter for parameter, of `jax.lax.ragged_dot` and what JAX has for the rest."""

    def __init__(self, like: Mixture):
        self.router, self.gate, self.up, self.down = like.router, like.gate, like.up, like.down
        self.dtype = like.dtype

    def routed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(y, penalty) of x[batch, T, width]."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = tokens.astype(jnp.float32) @ self.router.kernel[...]
        p = jax.nn.softmax(logits)
        weights, chosen = jax.lax.top_k(p, EXPERTS_PER_TOKEN)
        weights = (weights / weights.sum(-1, keepdims=True)).reshape(-1)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=p.shape[1])
        gate, up, down = (layer.kernel[...].astype(self.dtype) for layer in (self.gate, self.up, self.down))
        rows = tokens.astype(self.dtype)[order // EXPERTS_PER_TOKEN]
        hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
        y = jax.lax.ragged_dot(hidden, down, sizes) * weights[order][:, None]
        y = jax.ops.segment_sum(y, order // EXPERTS_PER_TOKEN, tokens.shape[0]).astype(self.dtype)
        balance = p.shape[1] * jnp.sum(sizes / chosen.size * p.mean(0))
        z = jnp.mean(jax.nn.logsumexp(logits, -1) ** 2)
        return y.reshape(x.shape), BALANCE * balance + Z * z
