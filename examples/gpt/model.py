"""A byte-level GPT: rotary positions, grouped heads, RMSNorm, SwiGLU or a mixture of it. For meshes see parallel.py."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxops
from gpt.experts import EXPERTS_PER_TOKEN, Mixture, PlainMixture
from jaxops.nn import RMSNorm, TransformerBlock

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """What a checkpoint must agree on. experts: 0 for a feed-forward layer that every token takes whole."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    length: int
    tied: bool
    experts: int = 0


class GPT(nnx.Module):
    """tokens[batch, T] → embed → blocks → norm → logits over the next byte.

    plain: the same model, parameter for parameter, of the operators that Flax, JAX and Optax come with.
    """

    def __init__(self, config: Config, dtype: Any, *, plain: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.plain = plain
        self.embed = nnx.Embed(
            VOCABULARY, config.width, dtype=dtype, embedding_init=nnx.initializers.normal(config.width**-0.5), rngs=rngs
        )
        block = plain_block if plain else transformer_block
        self.blocks = nnx.List([block(config, dtype, rngs) for _ in range(config.layers)])
        self.norm = (nnx.RMSNorm if plain else RMSNorm)(config.width, dtype=dtype, rngs=rngs)
        self.head = (
            None if config.tied else nnx.Linear(config.width, VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs)
        )

    def features(self, tokens: jax.Array, **options: Any) -> jax.Array:
        """What the logits are made of, [batch, T, width]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, **options)
        return self.norm(x)

    def features_and_penalty(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """The features, and the losses of the routers."""
        if not self.config.experts:
            return self.features(tokens), 0.0
        x, penalty = self.embed(tokens), jnp.zeros(())
        for block in self.blocks:
            x = x + block.attention(block.attention_norm(x), **({"is_causal": True} if self.plain else {}))
            y, more = block.mlp.routed(block.mlp_norm(x))
            x, penalty = x + y, penalty + more
        return self.norm(x), penalty

    def output_weight(self) -> jax.Array:
        """[width, vocabulary]."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def logits(self, tokens: jax.Array, **options: Any) -> jax.Array:
        """[batch, T, vocabulary], float32."""
        x = self.features(tokens, **options)
        return jnp.matmul(x, self.output_weight().astype(x.dtype), preferred_element_type=jnp.float32)

    def loss(self, windows: jax.Array) -> jax.Array:
        """Mean cross-entropy of each byte of windows[batch, T + 1] after the first, in nats."""
        return self.loss_and_penalty(windows)[0]

    def loss_and_penalty(self, windows: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """The loss, and what is added to it for training: the losses of the routers."""
        tokens, labels = windows[:, :-1], windows[:, 1:]
        x, penalty = self.features_and_penalty(tokens)
        weight = self.output_weight().astype(x.dtype)
        if self.plain:
            logits = jnp.matmul(x, weight, preferred_element_type=jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), penalty
        return jaxops.linear_cross_entropy(x, weight, labels), penalty


def bits_per_byte(model: GPT, batches: np.ndarray) -> float:
    """-log2 p of a byte given those before it, the mean over windows[batches, batch, length + 1]."""
    graph, state = nnx.split(model)
    loss = jax.jit(lambda state, windows: nnx.merge(graph, state).loss(windows))
    return float(np.mean([loss(state, windows) for windows in batches])) / math.log(2)


def mixture(config: Config, dtype: Any, rngs: nnx.Rngs) -> Mixture:
    """The feed-forward layer of a block with experts."""
    top_k = min(EXPERTS_PER_TOKEN, config.experts)
    return Mixture(config.width, config.hidden, config.experts, top_k=top_k, dtype=dtype, rngs=rngs)


def transformer_block(
    config: Config, dtype: Any, rngs: nnx.Rngs, kind: Callable[..., TransformerBlock] = TransformerBlock
) -> nnx.Module:
    """A block of jaxops' layers; `kind` makes it of other ones with the same arguments."""
    block = kind(
        config.heads,
        config.width,
        config.hidden,
        num_kv_heads=config.kv_heads,
        is_causal=True,
        use_rope=True,
        dtype=dtype,
        rngs=rngs,
    )
    if config.experts:
        block.mlp = mixture(config, dtype, rngs)
    return block


def plain_block(config: Config, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """The block of Flax's and JAX's own parts, under the names of `jaxops.nn.TransformerBlock`."""
    linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
    return _PlainBlock(
        attention_norm=nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs),
        attention=nnx.MultiHeadAttention(
            config.heads,
            config.width,
            num_kv_heads=config.kv_heads,
            use_bias=False,
            dtype=dtype,
            decode=False,
            attention_fn=functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE()),
            rngs=rngs,
        ),
        mlp_norm=nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs),
        mlp=PlainMixture(mixture(config, dtype, rngs))
        if config.experts
        else _PlainMLP(
            gate=linear(config.width, config.hidden),
            up=linear(config.width, config.hidden),
            down=linear(config.hidden, config.width),
        ),
    )


class _PlainMLP(nnx.Module):
    def __init__(self, **parts: nnx.Module):
        self.gate, self.up, self.down = parts["gate"], parts["up"], parts["down"]

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class _PlainBlock(nnx.Module):
    def __init__(self, **parts: nnx.Module):
        self.attention_norm, self.attention = parts["attention_norm"], parts["attention"]
        self.mlp_norm, self.mlp = parts["mlp_norm"], parts["mlp"]

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x), is_causal=True)
        return x + self.mlp(self.mlp_norm(x))


def sample(model: GPT, prompt: jax.Array, count: int, key: jax.Array, temperature: float = 0.7) -> jax.Array:
    """`prompt[n]` and `count` bytes drawn after it, by decoding with the key-value cache."""
    for block in model.blocks:
        block.init_cache((1, len(prompt) + count, model.config.width))
    graph, parameters, cache = nnx.split(model, nnx.Param, ...)

    def advance(cache, tokens):
        model = nnx.merge(graph, parameters, cache)
        logits = model.logits(tokens[None], decode=True)[0, -1]
        return nnx.state(model, nnx.Not(nnx.Param)), logits

    def draw(carry, key):
        cache, logits = carry
        token = jax.random.categorical(key, logits / temperature)
        return advance(cache, token[None]), token

    _, drawn = jax.lax.scan(draw, advance(cache, prompt), jax.random.split(key, count))
    return jnp.concatenate([prompt, drawn])
