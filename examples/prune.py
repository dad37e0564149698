"""Trains a small classifier of handwritten digits, makes most of its weights zero, and shows what it still knows.

    pip install 'jaxops[cli,data]'
    python examples/prune.py                              blocks of 16 x 16, 80 % of them zero
    python examples/prune.py --sparsity 0.9 --epochs 60
    python examples/prune.py --pattern 2:4

The digits are those of scikit-learn (1797 of 8 x 8 pixels, every fifth held out). The model is pruned little by little
while it trains on, by the schedule of Zhu and Gupta, and then stored without the zeros. Exit codes: 0 done, 1 it lost
more than one point of accuracy, 2 something given is wrong or missing.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxops
from jaxops.nn import Pruning, convert, prune_model, update_masks

WIDTH, BATCH = 256, 64
ALLOWED = 0.01  # of accuracy that may be lost
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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        return run(options)
    except Stop as stop:
        print(f"prune: {stop}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    if not 0 < options.sparsity < 1 or options.epochs < 1:
        raise Stop(
            f"--sparsity must be between 0 and 1 and --epochs at least 1, got {options.sparsity}, {options.epochs}"
        )
    (x, labels), held_out = digits()
    model = Classifier(x.shape[1], 10, nnx.Rngs(options.seed))
    train(model, x, labels, options)
    pruning = Pruning(
        None if options.pattern == "2:4" else options.sparsity,
        options.pattern,
        BLOCK if options.pattern == "blocks" else None,
    )
    rules = [("last", None), ("", pruning)]
    at_once, report = prune_model(model, rules)
    tuned, _ = prune_model(model, rules)
    steps = options.epochs * (len(x) // BATCH)
    train(tuned, x, labels, options, jaxops.pruning_schedule(options.sparsity, 0, steps // 2))
    small = convert(tuned)
    before, after = accuracy(model, *held_out), accuracy(small, *held_out)
    table = Table("", "accuracy", "bytes of all variables")
    for name, one, count in (
        ("dense", model, report.bytes_before),
        (f"{pruning}, at once", at_once, report.bytes_after),
        ("the same, little by little, trained on", tuned, report.bytes_after),
        ("stored without the zeros", small, stored(small)),
    ):
        table.add_row(name, f"{accuracy(one, *held_out):.2%}", f"{count:,}")
    Console().print(table)
    print(report)
    return 0 if after >= before - ALLOWED else 1


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


def train(model: nnx.Module, x: jax.Array, labels: jax.Array, options: argparse.Namespace, sparsity=None) -> None:
    """Trains `model` in place; with a schedule of `sparsity`, its masks are made again before every step."""
    steps = len(x) // BATCH
    rate = optax.cosine_decay_schedule(2e-3, options.epochs * steps)
    optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.Param)

    @nnx.jit
    def epoch(model, optimizer, order, first):
        @nnx.scan(in_axes=(nnx.Carry, 0, 0))
        def step(carry, rows, number):
            model, optimizer = carry
            if sparsity is not None:
                update_masks(model, sparsity(number))
            loss = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(x[rows]), labels[rows]).mean()
            optimizer.update(model, nnx.grad(loss)(model))
            return carry, None

        step((model, optimizer), order, first + jnp.arange(steps))

    random = np.random.default_rng(options.seed)
    for number in range(options.epochs):
        order = random.permutation(len(x))[: steps * BATCH].reshape(steps, BATCH)
        epoch(model, optimizer, jnp.asarray(order), number * steps)


def accuracy(model: nnx.Module, x: jax.Array, labels: jax.Array) -> float:
    return float(jnp.mean(jnp.argmax(model(x), -1) == labels))


def stored(model: nnx.Module) -> int:
    """Bytes of all variables."""
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


if __name__ == "__main__":
    sys.exit(main())
