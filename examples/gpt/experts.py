"""The mixture-of-experts layer of the GPT: of jaxops, cut over the mesh, and the same of plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxops.nn

EXPERTS_PER_TOKEN = 2
BALANCE, Z = 1e-2, 1e-3  # weights of the router's two losses


class Mixture(jaxops.nn.MoE):
    """`jaxops.nn.MoE`, whose `routed` also gives the router's losses and runs on a mesh."""

    def routed(self, x: jax.Array, mesh: Mesh | None, specs: Any) -> tuple[jax.Array, jax.Array]:
        """(y, penalty) of x[batch, T, width]. Every device of "data" routes its own tokens; those of "tensor" hold a
        part of the features inside every expert. `specs(path, ndim)` is where a parameter lies."""
        graph, parameters = nnx.split(self)

        def local(parameters, x):
            layer = nnx.merge(graph, parameters)
            layer.axis_names = () if mesh is None else ("data",)
            y, routing = layer(x, return_routing=True)
            if mesh is not None:
                y = jax.lax.psum(y, "tensor")
            return y, BALANCE * routing.load_balancing_loss + Z * routing.z_loss

        if mesh is None:
            return local(parameters, x)
        cut = jax.tree.map_with_path(lambda path, leaf: specs(path, leaf.ndim), parameters)
        split = jax.shard_map(local, mesh=mesh, in_specs=(cut, P("data")), out_specs=(P("data"), P()))
        return split(parameters, x)


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
