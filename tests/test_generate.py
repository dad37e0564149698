"""The serving program: batched requests over a paged cache are, byte for byte, the model without a cache."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import generate
import train_gpt
from flax import nnx
from gpt.model import GPT, Config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that is trained far enough for its bytes to differ from place to place, on two devices."""
    folder = tmp_path_factory.mktemp("trained")
    book = folder / "book.txt"
    book.write_bytes(b"".join(b"%d times %d is %d. " % (a, b, a * b) for a in range(30) for b in range(30)))
    sizes = "--layers 1 --width 32 --heads 4 --kv-heads 2 --hidden 48 --length 48 --batch 8 --steps 30 --warmup 4"
    rest = "--sample 0 --evaluate-every 30 --checkpoint-every 30 --dtype float32 --learning-rate 0.02 --devices 2"
    out = folder / "run"
    assert train_gpt.main([*sizes.split(), *rest.split(), "--text", str(book), "--out", str(out)]) == 0
    return out, book


def served(trained, capsys, *more):
    """(exit code, what was printed)."""
    out, book = trained
    code = generate.main([str(out), "--text", str(book), *more])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


# Few pages: requests wait for those of others. A chunk below a prompt's size: prompts are read in pieces.
@pytest.mark.parametrize("more", ["--slots 3 --chunk 7 --page-size 4 --pages 20", "--slots 1 --count 1 --requests 2"])
def test_greedy_is_the_model_without_a_cache(trained, capsys, more):
    code, printed = served(trained, capsys, "--check", "--count", "12", "--requests", "5", *more.split())
    assert code == 0, printed
    assert "Equal to the model without a cache, byte for byte" in printed
    assert "tokens/s" in printed and "paged_attention" in printed


@pytest.mark.slow
def test_the_check_can_fail(trained, capsys, monkeypatch):
    right = generate.jaxops.paged_attention
    # Every sequence sees half of its keys.
    monkeypatch.setattr(
        generate.jaxops,
        "paged_attention",
        lambda q, k, v, table, lengths, starts: right(q, k, v, table, lengths // 2, starts),
    )
    code, printed = served(trained, capsys, "--check", "--count", "20", "--requests", "8")
    assert code == 1 and "NOT equal" in printed


@pytest.mark.slow
def test_drawn_bytes_do_not_depend_on_the_batch(trained):
    out, book = trained
    args = ["--temperature", "0.9", "--top-p", "0.8", "--requests", "4", "--count", "8", "--text", str(book)]

    options = generate.parse([str(out), *args])
    model, _ = generate.load(options.directory, options.dtype)
    prompts = generate.passages(options, 40)

    def written(server):
        requests = [generate.Request(number, prompt, 8) for number, prompt in enumerate(prompts)]
        server.serve(requests)
        return [request.written for request in requests]

    server = generate.Server(model, options, 47)
    first = written(server)
    assert first == written(generate.Server(model, generate.parse([str(out), *args, "--slots", "2"]), 47))
    server.key = jax.random.key(1)
    assert first != written(server)


def test_top_p_and_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]).repeat(4000, 0))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = lambda **options: np.bincount(generate.drawn(logits, keys, **options), minlength=4) / 4000
    np.testing.assert_allclose(drawn(temperature=1.0, top_p=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(drawn(temperature=1.0, top_p=0.79), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(temperature=1.0, top_p=0.1), [1, 0, 0, 0])
    sharp = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(drawn(temperature=0.5, top_p=1.0), sharp / sharp.sum(), atol=0.03)
    np.testing.assert_allclose(drawn(temperature=0.0, top_p=1.0), [1, 0, 0, 0])


def test_a_step_of_the_server_is_the_model():
    """Logits, not only the likeliest byte: a prompt in pieces beside another that is being written."""
    config = Config(2, 32, 4, 2, 48, 32, True)
    model = GPT(config, jnp.float32, rngs=nnx.Rngs(0))
    options = generate.parse(["nowhere", "--slots", "2", "--chunk", "8", "--page-size", "4"])
    server = generate.Server(model, options, 20)
    text = np.random.default_rng(0).integers(0, 256, (2, 20)).astype(np.int32)
    requests = [
        generate.Request(0, text[0], 1, pages=[9, 2, 5, 7, 0]),
        generate.Request(1, text[1], 1, pages=[1, 3, 4, 6, 8]),
    ]
    want = model.logits(jnp.asarray(text))
    for sizes in ([5, 1], [3, 6], [1, 0], [6, 2]):
        turns = [text[b, r.read : r.read + n].tolist() for b, (r, n) in enumerate(zip(requests, sizes, strict=True))]
        batch = server.batch(requests, turns, 10)
        logits, server.pages = generate.advance(model, server.pages, batch)
        for b, (request, n) in enumerate(zip(requests, sizes, strict=True)):
            request.read += n
            if n:
                np.testing.assert_allclose(logits[b], want[b, request.read - 1], atol=2e-5)


BAD = [
    (["--temperature", "-1"], "--temperature must be at least 0"),
    (["--top-p", "0"], "--top-p in (0, 1]"),
    (["--check", "--temperature", "1"], "--check needs --temperature 0"),
    (["--count", "48"], "--count must be below the 48 bytes"),
    (["--prompt", "x" * 40], "with --count 48 it may have 0 bytes"),
    (["--prompt", ""], "--prompt must not be empty"),
    (["--count", "8", "--pages", "1"], "--pages: the longest request needs"),
    (["--slots", "0"], "--slots must be at least 1"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=lambda x: " ".join(x)[:20] if isinstance(x, list) else "")
def test_bad_input(trained, capsys, more, message):
    code, printed = served(trained, capsys, *more)
    assert code == 2 and message in printed


def test_no_checkpoint(tmp_path, capsys):
    assert generate.main([str(tmp_path / "none")]) == 2
    assert "train one by python examples/train_gpt.py --out" in capsys.readouterr().err
