"""The losses of a linear layer onto a vocabulary, without its logits: a chunk at a time that a processor holds well."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch
from jaxops.ops.row_tiles import outer_products

# Logits of all tokens against one chunk of the vocabulary, held at a time: 16 MiB in float32 is about a processor's
# last cache. An accelerator has the memory for more, and adding to dx for every small chunk would cost it more than the
# products.
_CPU_ELEMENTS = 1 << 22
_ACCELERATOR_ELEMENTS = 1 << 25
# Narrower chunks leave the products bound by the traffic of x and dx.
_NARROWEST = 512
REDUCTIONS = ("mean", "sum", "none")


@dataclasses.dataclass(frozen=True)
class Layer:
    """z = x · weight + bias: x[tokens, hidden], weight[hidden, vocab], bias[vocab] or None."""

    x: jax.Array
    weight: jax.Array
    bias: jax.Array | None

    @property
    def wide(self):
        """The dtype of logits and sums."""
        return jnp.promote_types(jnp.promote_types(self.x.dtype, self.weight.dtype), jnp.float32)

    @property
    def vocab(self) -> int:
        return self.weight.shape[1]

    def logits(self, start, width: int) -> jax.Array:
        """z[tokens, width] of the chunk at `start`."""
        return self.chunk(start, width)[1]

    def chunk(self, start, width: int) -> tuple[jax.Array, jax.Array]:
        """The chunk's weight[hidden, width] and z[tokens, width]."""
        weight = lax.dynamic_slice_in_dim(self.weight, start, width, 1)
        z = jnp.dot(self.x, weight, preferred_element_type=self.wide)
        if self.bias is not None:
            z = z + lax.dynamic_slice_in_dim(self.bias, start, width, 0).astype(self.wide)
        return weight, z


def by_platform(run: Callable, *operands: Any) -> Any:
    """`run(elements, *operands)` with the number of logits to hold at a time."""
    cpu, otherwise = (functools.partial(run, elements) for elements in (_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS))
    return dispatch.on_cpu(cpu, otherwise, *operands)


def chunk_width(elements: int, tokens: int, hidden: int, vocab: int) -> int:
    """The columns of a chunk. With few tokens it is the chunk of the weight and its gradient that take the memory."""
    return min(vocab, max(_NARROWEST, elements // max(tokens, 2 * hidden)))


def over_chunks(vocab: int, width: int, step: Callable, carry: Any) -> Any:
    """carry = step(start, width, carry) over all chunks: whole ones in a loop, then what remains."""
    whole, rest = divmod(vocab, width)
    carry = lax.fori_loop(0, whole, lambda i, carry: step(i * width, width, carry), carry)
    return step(whole * width, rest, carry) if rest else carry


def gradients(layer: Layer, width: int, dz_of: Callable) -> dict[str, jax.Array]:
    """x: dz · weightᵀ, weight: xᵀ · dz, bias: Σ_tokens dz, summed over chunks of `width`.

    dz_of(start, z) is the gradient of the loss with respect to the logits z[tokens, width] of the chunk at `start`.
    """
    x, weight, bias = layer.x, layer.weight, layer.bias
    # What the products take: as wide as they would be if the logits had been held.
    narrow = jnp.promote_types(x.dtype, weight.dtype)
    product = functools.partial(lax.dot_general, preferred_element_type=layer.wide)

    def step(start, width, carry):
        dx, dweight, dbias = carry
        chunk, z = layer.chunk(start, width)
        dz = dz_of(start, z).astype(layer.wide)
        if bias is not None:
            dbias = lax.dynamic_update_slice_in_dim(dbias, jnp.sum(dz, 0).astype(dbias.dtype), start, 0)
        scale = _scale(dz, narrow)
        dz = (dz * scale).astype(narrow)
        dx = dx + product(dz, chunk.astype(narrow), (((1,), (1,)), ((), ()))) / scale
        part = outer_products(x.astype(narrow), dz) / scale
        return dx, lax.dynamic_update_slice_in_dim(dweight, part.astype(weight.dtype), start, 1), dbias

    empty = jnp.zeros(x.shape, layer.wide), jnp.zeros_like(weight), None if bias is None else jnp.zeros_like(bias)
    dx, dweight, dbias = over_chunks(layer.vocab, width, step, empty)
    return {"x": dx.astype(x.dtype), "weight": dweight} | ({} if bias is None else {"bias": dbias})


def _scale(dz: jax.Array, dtype: Any) -> Any:
    """A power of 2 that keeps the larger numbers of dz normal in float16: those of a mean are near its least."""
    if dtype != jnp.float16:
        return 1
    most = jnp.max(jnp.abs(dz))
    power = jnp.minimum(10 - jnp.ceil(jnp.log2(most)), 100)
    return jnp.where((most > 0) & jnp.isfinite(most), jnp.exp2(power), 1)


def check_reduction(operator: str, reduction: str) -> None:
    """Raises `ValueError` unless it is one of `REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator}: reduction must be one of {REDUCTIONS}, got {reduction!r}")


def reduced(loss: jax.Array, weights: jax.Array, reduction: str) -> jax.Array:
    """Weighted losses as they are ("none"), their sum, or their mean: Σ loss / Σ weights, 0 where those sum to 0."""
    if reduction == "none":
        return loss
    total, count = jnp.sum(loss), jnp.sum(weights)
    return total if reduction == "sum" else jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count))
