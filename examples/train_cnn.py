"""Trains a small residual network of jaxops layers on images: handwritten digits, or a folder of your own.

    python examples/train_cnn.py                           scikit-learn's digits, a minute on two CPU cores
    python examples/train_cnn.py --data photos --size 64   photos/cat/*.jpg, photos/dog/*.jpg, …: one for each class

A fifth of the images is held out. Exit codes: 0 done, 2 something given is wrong. `load_digits`, `load_folder`,
`ResNet`, `train` and `accuracy` are there to be imported.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxops
import jaxops.nn
import jaxops.optim

HELD_OUT = 0.2
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


class Stop(Exception):
    """The run cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images [n, height, width, channels] in [0, 1] as float32 and their labels [n], to learn and held out."""

    x: np.ndarray
    labels: np.ndarray
    held_out_x: np.ndarray
    held_out_labels: np.ndarray
    classes: tuple[str, ...]

    @staticmethod
    def split(x: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], seed: int) -> "Images":
        """A fifth of each class is held out, by chance."""
        random = np.random.default_rng(seed)
        held_out = np.zeros(len(x), bool)
        for label in range(len(classes)):
            (members,) = np.nonzero(labels == label)
            held_out[random.permutation(members)[: max(1, round(HELD_OUT * len(members)))]] = True
        return Images(x[~held_out], labels[~held_out], x[held_out], labels[held_out], classes)


def load_digits(seed: int = 0) -> Images:
    """scikit-learn's 1797 handwritten digits, 8 by 8, from the UCI repository. Raises `Stop` without scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError:
        raise Stop(
            "the digits come with scikit-learn: pip install 'jaxops[data]', or name a folder by --data"
        ) from None
    digits = datasets.load_digits()
    x = (digits.images[..., None] / 16).astype(np.float32)
    return Images.split(x, digits.target.astype(np.int32), tuple(map(str, digits.target_names)), seed)


def load_folder(directory: Path, size: int, seed: int = 0) -> Images:
    """The images of a folder with one folder for each class, in colour, `size` by `size`. Raises `Stop`."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise Stop("--data reads images with Pillow: pip install 'jaxops[data]'") from None
    if not directory.is_dir():
        raise Stop(f"--data: {directory} is no folder")
    found: list[np.ndarray] = []
    labels: list[int] = []
    classes = sorted(path.name for path in directory.iterdir() if path.is_dir())
    for label, name in enumerate(classes):
        paths = sorted(path for path in (directory / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if len(paths) < 2:
            raise Stop(
                f"--data: {directory / name} must hold at least 2 images ({' '.join(SUFFIXES)}), got {len(paths)}"
            )
        for path in paths:
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
            except (OSError, UnidentifiedImageError) as error:
                raise Stop(f"--data: {path} cannot be read: {error}") from None
            found.append(pixels.astype(np.float32) / 255)
            labels.append(label)
    if len(classes) < 2:
        raise Stop(f"--data: {directory} must hold a folder for each of at least 2 classes, got {len(classes)}")
    return Images.split(np.stack(found), np.asarray(labels, np.int32), tuple(classes), seed)


class Block(nnx.Module):
    """y = relu(x + norm(conv(relu(norm(conv(x)))))); where the width changes x goes through a convolution of 1 by 1."""

    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs):
        make = lambda features, kernel: jaxops.nn.Conv(features, width, kernel, use_bias=False, rngs=rngs)
        self.conv1, self.norm1 = make(width_in, (3, 3)), jaxops.nn.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2, self.norm2 = make(width, (3, 3)), jaxops.nn.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.shortcut = make(width_in, (1, 1)) if width_in != width else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm2(self.conv2(jaxops.relu(self.norm1(self.conv1(x)))))
        return jaxops.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """Logits [batch, classes] of images [batch, height, width, channels]: a block for each width, halved between.

    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (32, 64, 128), *, rngs: nnx.Rngs):
        self.stem = jaxops.nn.Conv(channels, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = jaxops.nn.BatchNorm(widths[0], momentum=0.9, rngs=rngs)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nnx.List([Block(before, width, rngs=rngs) for before, width in pairs])
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jaxops.relu(self.norm(self.stem(x)))
        for i, block in enumerate(self.blocks):
            x = block(x if i == 0 else jaxops.max_pool(x, (2, 2), (2, 2), padding="SAME"))
        return self.head(jaxops.global_avg_pool(x))


def shifted(x: jax.Array, key: jax.Array, most: int) -> jax.Array:
    """Each image moved by at most so many pixels along both axes, zeros moved in."""
    offsets = jax.random.randint(key, (len(x), 2), 0, 2 * most + 1)
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)))
    cut = lambda image, offset: jax.lax.dynamic_slice(image, (*offset, 0), x.shape[1:])
    return jax.vmap(cut)(padded, offsets)


@nnx.jit
def _step(model: ResNet, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """The loss of one step."""

    def loss(model: ResNet) -> jax.Array:
        logits = model(shifted(x, key, max(1, x.shape[1] // 8)))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.05)
        return optax.softmax_cross_entropy(logits, targets).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def _right(model: ResNet, x: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(jnp.argmax(model(x), -1) == labels)


def accuracy(model: nnx.Module, x: np.ndarray, labels: np.ndarray, batch: int = 256) -> float:
    """The share of images whose label is the likeliest, in evaluation; the model is left in training."""
    model.eval()
    right = sum(int(_right(model, x[i : i + batch], labels[i : i + batch])) for i in range(0, len(x), batch))
    model.train()
    return right / len(x)


def train(
    model: nnx.Module,
    images: Images,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int = 0,
    report: Callable[[int, float, float], None] = lambda epoch, loss, seen: None,
) -> None:
    """Trains the model in place; report(epoch, mean loss, images of a second) after each pass over the images."""
    batch = min(batch, len(images.x))
    steps = len(images.x) // batch
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, epochs * steps // 10), epochs * steps)
    optimizer = nnx.Optimizer(model, jaxops.optim.adamw(rate, weight_decay=1e-2), wrt=nnx.Param)
    random, key = np.random.default_rng(seed), jax.random.key(seed)
    model.train()
    for epoch in range(epochs):
        begin, losses = time.perf_counter(), []
        for i, chosen in enumerate(_batches(random, len(images.x), batch)):
            here = jax.random.fold_in(key, epoch * steps + i)
            losses.append(_step(model, optimizer, images.x[chosen], images.labels[chosen], here))
        loss = float(np.mean(jax.device_get(losses)))
        report(epoch, loss, steps * batch / (time.perf_counter() - begin))


def _batches(random: np.random.Generator, count: int, batch: int) -> Iterator[np.ndarray]:
    order = random.permutation(count)
    yield from (order[i : i + batch] for i in range(0, count - batch + 1, batch))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_cnn", description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data", type=Path, metavar="DIR", help="a folder with one folder of images for each class; without it, digits"
    )
    for name, default, what in (
        ("size", 32, "pixels of each side, to which the images of --data are made"),
        ("epochs", 12, "passes over the images"),
        ("batch", 64, "images in a step"),
        ("seed", 0, "of parameters, order and what is held out"),
    ):
        add(f"--{name}", type=int, default=default, metavar="N", help=what)
    add("--widths", default="32,64,128", metavar="N,…", help="channels of the blocks")
    add("--learning-rate", type=float, default=4e-3, metavar="X", help="its peak")
    args = parser.parse_args(argv)
    for name, least in (("size", 4), ("epochs", 1), ("batch", 2), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.learning_rate <= 0:
        parser.error(f"--learning-rate must be positive, got {args.learning_rate}")
    widths = args.widths.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in widths):
        parser.error(f"--widths must be numbers of channels with commas between, got {args.widths!r}")
    args.widths = tuple(map(int, widths))
    return args


def run(args: argparse.Namespace) -> None:
    """Trains and prints what came out. Raises `Stop`."""
    images = load_digits(args.seed) if args.data is None else load_folder(args.data, args.size, args.seed)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    model = ResNet(images.x.shape[-1], len(images.classes), args.widths, rngs=nnx.Rngs(args.seed))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    console.print(
        f"{len(images.x)} images of {len(images.classes)} classes, {len(images.held_out_x)} held out; "
        f"{count:,} parameters"
    )
    table = Table("epoch", "loss", "held-out accuracy", "images/s", title="training")
    begin = time.perf_counter()

    def report(epoch: int, loss: float, seen: float) -> None:
        if (epoch + 1) % max(1, args.epochs // 8) == 0 or epoch + 1 == args.epochs:
            share = accuracy(model, images.held_out_x, images.held_out_labels)
            table.add_row(str(epoch + 1), f"{loss:.3f}", f"{share:.2%}", f"{seen:,.0f}")

    train(
        model,
        images,
        epochs=args.epochs,
        batch=args.batch,
        learning_rate=args.learning_rate,
        seed=args.seed,
        report=report,
    )
    console.print(table)
    share = accuracy(model, images.held_out_x, images.held_out_labels)
    console.print(f"held-out accuracy {share:.2%} after {time.perf_counter() - begin:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the arguments `argv`; returns its exit code."""
    try:
        run(parse(argv))
    except Stop as stop:
        print(f"train_cnn: {stop}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse: 0 after --help, 2 after an error that it has printed
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
