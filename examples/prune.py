"""Makes most weights of a trained model zero, trains it on, and shows what it still knows and how many bytes it takes.

    pip install 'jaxops[cli,data]'
    python examples/prune.py                              blocks of 16 x 16, 80 % of them zero
    python examples/prune.py --sparsity 0.9 --epochs 60
    python examples/prune.py --pattern 2:4
    python examples/train_gpt.py --out runs/book          trains a GPT, if there is none yet
    python examples/prune.py --gpt runs/book              the GPT: bits per byte of the held-out text

Without --gpt it trains a small classifier of the handwritten digits of scikit-learn (1797 of 8 x 8 pixels, every fifth
held out). A model is pruned little by little while it trains on, by the schedule of Zhu and Gupta, and then stored
without the zeros. Exit codes: 0 done, 1 it lost more than it may (one point of accuracy, 5 % of the GPT's bits per
byte), 2 something given is wrong or missing.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import generate
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gpt import text
from gpt.model import bits_per_byte
from rich.console import Console
from rich.table import Table

import jaxops
from jaxops.nn import Pruning, convert, prune_model, update_masks

WIDTH, BATCH = 256, 64
ALLOWED = 0.01  # of accuracy that may be lost
WINDOWS, HELD_OUT, CHUNK = 16, 24, 20  # of a step of the GPT, batches of the held-out text, steps of a compiled loop
ALLOWED_BITS = 0.05  # of bits per byte
BLOCK = (16, 16)


class Stop(Exception):
    """It cannot go on; the message says why."""


class Classifier(nnx.Module):
    """Two hidden layers; the last layer is small and stays dense."""

    def __init__(self, pixels: int, classes: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(pixels, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jaxops.relu(self.first(x))
        return self.last(jaxops.relu(self.second(x)))


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the arguments `argv`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="prune", description=__doc__.partition("\n")[0])
    parser.add_argument("--pattern", choices=("blocks", "2:4", "unstructured"), default="blocks")
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of zeros (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="of training, and as many of tuning (%(default)s)")
    parser.add_argument("--gpt", type=Path, metavar="DIRECTORY", help="prune what train_gpt.py wrote there instead")
    parser.add_argument("--steps", type=int, default=800, help="of tuning the GPT (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE", help="what the GPT was trained on; by default CPython's reference")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        return run(options)
    except (Stop, generate.Stop) as stop:
        print(f"prune: {stop}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    if not 0 < options.sparsity < 1 or options.epochs < 1 or options.steps < 2:
        raise Stop(
            "--sparsity must be between 0 and 1, --epochs at least 1 and --steps at least 2, got "
            f"{options.sparsity}, {options.epochs}, {options.steps}"
        )
    pruning = Pruning(
        None if options.pattern == "2:4" else options.sparsity,
        options.pattern,
        BLOCK if options.pattern == "blocks" else None,
    )
    return gpt(options, pruning) if options.gpt else classifier(options, pruning)


def classifier(options: argparse.Namespace, pruning: Pruning) -> int:
    """Trains a classifier of digits, prunes it and prints what that costs."""
    (x, labels), held_out = digits()
    model = Classifier(x.shape[1], 10, nnx.Rngs(options.seed))
    steps = options.epochs * (len(x) // BATCH)

    def loss(model: Classifier, rows: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x[rows]), labels[rows]).mean()

    def train_on(model: nnx.Module, sparsity: optax.Schedule | None = None) -> None:
        train(model, loss, orders(len(x), options), optax.cosine_decay_schedule(2e-3, steps), sparsity)

    train_on(model)
    schedule = jaxops.pruning_schedule(options.sparsity, 0, steps // 2)
    before, after = compared(
        model,
        [("last", None), ("", pruning)],
        lambda pruned: train_on(pruned, schedule),
        ("accuracy", lambda model: accuracy(model, *held_out), "{:.2%}"),
    )
    return 0 if after >= before - ALLOWED else 1


def gpt(options: argparse.Namespace, pruning: Pruning) -> int:
    """Prunes a GPT and prints what that costs."""
    model, path = generate.load(options.gpt, "float32")
    if model.config.experts:
        raise Stop(f"{path}: experts are no linear layers; a GPT without them was expected")
    length, data = model.config.length, text.load(options.text)
    held_out = data.held_out_batches(WINDOWS, length)[:HELD_OUT]
    if not len(held_out):
        raise Stop(f"--text: {data.name} is too short for a batch of held-out windows")
    window = lambda step: data.batch(options.seed + 1, step, WINDOWS, length)
    starts = range(0, options.steps, CHUNK)
    chunks = (np.stack([window(i) for i in range(start, min(start + CHUNK, options.steps))]) for start in starts)
    schedule = jaxops.pruning_schedule(options.sparsity, 0, options.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0, 4e-3, options.steps // 20, options.steps)
    before, after = compared(
        model,
        [("head", None), ("", pruning)],
        lambda pruned: train(pruned, lambda model, batch: model.loss(batch), chunks, rate, schedule),
        ("bits per byte", lambda model: bits_per_byte(model, held_out), "{:.4f}"),
    )
    return 0 if after <= before * (1 + ALLOWED_BITS) else 1


def compared(
    model: nnx.Module,
    rules: list[tuple[str, Pruning | None]],
    tune: Callable[[Any], None],
    score: tuple[str, Callable[[Any], float], str],
) -> tuple[float, float]:
    """Prunes a model and prints its score (name, function, format) on the way; returns the first and the last."""
    at_once, report = prune_model(model, rules)
    tuned, _ = prune_model(model, rules)
    tune(tuned)
    small = convert(tuned)
    name, measure, form = score
    table, scores = Table("", name, "bytes of all variables"), []
    for label, one, count in (
        ("dense", model, report.bytes_before),
        (f"{rules[-1][1]}, at once", at_once, report.bytes_after),
        ("the same, little by little, trained on", tuned, report.bytes_after),
        ("stored without the zeros", small, stored(small)),
    ):
        scores.append(measure(one))
        table.add_row(label, form.format(scores[-1]), f"{count:,}")
    Console().print(table)
    print(report)
    return scores[0], scores[-1]


def digits() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(pixels[n, 64], labels[n]) to train on, and the same held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Stop("scikit-learn is missing: pip install 'jaxops[data]'") from None
    pixels, labels = load_digits(return_X_y=True)
    pixels = jnp.asarray(pixels / 16, jnp.float32)
    held = np.arange(len(labels)) % 5 == 0
    return (pixels[~held], jnp.asarray(labels[~held])), (pixels[held], jnp.asarray(labels[held]))


def orders(count: int, options: argparse.Namespace) -> Iterable[np.ndarray]:
    """For each epoch which rows its batches have, [steps, BATCH]."""
    random = np.random.default_rng(options.seed)
    for _ in range(options.epochs):
        yield random.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)


def train(
    model: nnx.Module,
    loss: Callable[[Any, jax.Array], jax.Array],
    chunks: Iterable[np.ndarray],
    rate: optax.Schedule,
    sparsity: optax.Schedule | None = None,
) -> None:
    """Trains `model` in place on chunks of batches; with a `sparsity`, its masks are made again before every step."""
    optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.Param)

    @nnx.jit
    def several(model, optimizer, batches, first):
        @nnx.scan(in_axes=(nnx.Carry, 0, 0))
        def step(carry, batch, number):
            model, optimizer = carry
            if sparsity is not None:
                update_masks(model, sparsity(number))
            optimizer.update(model, nnx.grad(loss)(model, batch))
            return carry, None

        step((model, optimizer), batches, first + jnp.arange(len(batches)))

    done = 0
    for batches in chunks:
        several(model, optimizer, jnp.asarray(batches), done)
        done += len(batches)


def accuracy(model: nnx.Module, x: jax.Array, labels: jax.Array) -> float:
    return float(jnp.mean(jnp.argmax(model(x), -1) == labels))


def stored(model: nnx.Module) -> int:
    """Bytes of all variables."""
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


if __name__ == "__main__":
    sys.exit(main())
