"""A byte-level GPT: rotary positions, grouped heads, RMSNorm, SwiGLU or a mixture of it, over a (data, tensor) mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

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
    mesh: what a batch of `loss` is split over, for the mixtures of experts; None: one device.
    """

    def __init__(self, config: Config, dtype: Any, *, plain: bool = False, mesh: Mesh | None = None, rngs: nnx.Rngs):
        self.config = config
        self.plain = plain
        self.mesh = mesh
        self.embed = nnx.Embed(
            VOCABULARY, config.width, dtype=dtype, embedding_init=nnx.initializers.normal(config.width**-0.5), rngs=rngs
        )
        block = _plain_block if plain else _block
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
            where = () if self.plain else (self.mesh, partition_spec)
            y, more = block.mlp.routed(block.mlp_norm(x), *where)
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


def _mixture(config: Config, dtype: Any, rngs: nnx.Rngs) -> Mixture:
    top_k = min(EXPERTS_PER_TOKEN, config.experts)
    return Mixture(config.width, config.hidden, config.experts, top_k=top_k, dtype=dtype, rngs=rngs)


def _block(config: Config, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    block = TransformerBlock(
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
        block.mlp = _mixture(config, dtype, rngs)
    return block


def _plain_block(config: Config, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
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
        mlp=PlainMixture(_mixture(config, dtype, rngs))
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


# Where the parameters lie, by the end of their path (Megatron-LM, https://arxiv.org/abs/1909.08053): the first matrix
# of a pair is cut by its outputs, the second by its inputs, so that a block needs one sum over "tensor" per pair. The
# rest is everywhere: a table of 256 bytes is too small to cut.
_CUT = {
    ("query", "kernel"): P(None, "tensor", None),  # [width, heads, dim]
    ("key", "kernel"): P(None, "tensor", None),
    ("value", "kernel"): P(None, "tensor", None),
    ("out", "kernel"): P("tensor", None, None),  # [heads, dim, width]
    ("gate", "kernel"): P(None, "tensor"),  # [width, hidden], after the experts if there are any
    ("up", "kernel"): P(None, "tensor"),
    ("down", "kernel"): P("tensor", None),  # [hidden, width]
}


def partition_spec(path: tuple[Any, ...], ndim: int) -> P:
    """Of a parameter of so many axes, or of an optimizer's copy of it."""
    names = tuple(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)
    names = tuple(name for name in names if name != "value")
    cut = _CUT.get(names[-2:], P())
    return P(*[None] * (ndim - len(cut)), *cut)


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
