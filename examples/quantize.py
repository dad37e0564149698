"""Quantises trained models to 8 and 4 bits: what they still know afterwards, and how many bytes they take.

    python examples/train_gpt.py --out runs/book          trains a GPT, if there is none yet
    python examples/quantize.py runs/book                 the GPT: bits per byte of the held-out text
    python examples/quantize.py --encoder                 a pre-trained sentence encoder: embeddings and a ranking
    python examples/quantize.py --cnn                     trains the network of train_cnn.py: digits that it still knows
    python examples/quantize.py runs/book --report costs.png    and what each layer costs alone

The GPT and the CNN are calibrated on what they were trained on, the encoder on other passages than it is judged on.
Exit codes: 0 done, 1 a model lost more than it may (1 % of its bits per byte in 8 bits, 3 % in 4; a cosine of 0.995;
half a point of accuracy in 8 bits, a point in 4), 2 something given is wrong or missing.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import generate
import numpy as np
import optax
import sentence_encoder
import train_cnn
from flax import nnx
from gpt import text
from gpt.model import bits_per_byte
from rich.console import Console
from rich.table import Table

from jaxops.nn import QuantizationReport, Scheme, calibrate, quantize_model, sensitivity

CALIBRATION = 16  # batches of the training text or images
BATCH, HELD_OUT = 16, 24  # windows of a batch, batches of the held-out text
INT8 = Scheme("int8", activations="int8")
INT4 = Scheme("int4", group_size=32, rounding="outputs")
NAMES = {"8 bits, weights and activations": INT8, "4 bits, weights": INT4}
ALLOWED = {"int8": 0.01, "int4": 0.03}  # of bits per byte
POINTS = {"int8": 0.005, "int4": 0.01}  # of accuracy
COSINE = 0.995  # of an embedding in 8 bits with the same in float32


class Stop(Exception):
    """It cannot go on; the message says why."""


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the arguments `argv`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="quantize", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "directory", type=Path, nargs="?", help="what train_gpt.py wrote; by default the last runs/gpt-N"
    )
    parser.add_argument("--encoder", action="store_true", help="the sentence encoder instead (extra `models`)")
    parser.add_argument("--cnn", action="store_true", help="a small residual network instead (extra `data`)")
    parser.add_argument("--epochs", type=int, default=12, help="of the CNN's training (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE", help="what the GPT was trained on; by default CPython's reference")
    parser.add_argument("--report", metavar="FILE", help="draw what each layer costs alone, in 4 bits (PNG or SVG)")
    options = parser.parse_args(argv)
    try:
        if options.encoder and options.directory:
            raise Stop("--encoder takes no directory: its weights come from a package")
        if options.cnn and (options.directory or options.encoder or options.epochs < 1):
            raise Stop("--cnn takes no directory and no --encoder, and --epochs must be at least 1")
        return encoder() if options.encoder else cnn(options) if options.cnn else gpt(options)
    except (Stop, generate.Stop, train_cnn.Stop, sentence_encoder.Missing) as stop:
        print(f"quantize: {stop}", file=sys.stderr)
        return 2


# ---- a GPT -----------------------------------------------------------------------------------------------------------


def gpt(options: argparse.Namespace) -> int:
    """Quantises a GPT and prints what that costs."""
    model, path = generate.load(options.directory, "float32")
    if model.config.experts:
        raise Stop(f"{path}: experts are no linear layers; a GPT without them was expected")
    length, data = model.config.length, text.load(options.text)
    windows = [data.batch(1, i, BATCH, length) for i in range(CALIBRATION)]
    held_out = data.held_out_batches(BATCH, length)[:HELD_OUT]
    if not len(held_out):
        raise Stop(f"--text: {data.name} is too short for a batch of held-out windows")
    calibration = calibrate(model, windows, apply=lambda model, batch: model.loss(batch), hessian=True)
    rules = lambda scheme: [("embed", None), ("", scheme)]
    before, table, kept = bits_per_byte(model, held_out), comparison("bits per byte"), True
    table.add_row("float32", "", f"{before:.4f}", "")
    for name, scheme in NAMES.items():
        small, report = quantize_model(model, rules(scheme), calibration)
        after = bits_per_byte(small, held_out)
        kept &= after <= before * (1 + ALLOWED[scheme.weights])
        table.add_row(name, saved(report), f"{after:.4f}", f"{after / before - 1:+.2%}")
    Console().print(table)
    if options.report:
        evaluate = lambda small: bits_per_byte(small, held_out[:4])
        draw(options.report, "bits per byte", sensitivity(model, rules(INT4), evaluate, calibration))
    return 0 if kept else 1


# ---- a CNN -----------------------------------------------------------------------------------------------------------


def cnn(options: argparse.Namespace) -> int:
    """Trains the residual network of train_cnn.py on handwritten digits, quantises it and prints what that costs."""
    images = train_cnn.load_digits()
    model = train_cnn.ResNet(images.x.shape[-1], len(images.classes), rngs=nnx.Rngs(0))
    train_cnn.train(model, images, epochs=options.epochs, batch=64, learning_rate=4e-3)
    model.eval()
    calibration = calibrate(model, np.split(images.x[: BATCH * CALIBRATION], CALIBRATION), hessian=True)
    # The stem has a single channel: its 9 weights share a scale.
    rules = lambda scheme: [("stem", dataclasses.replace(scheme, group_size=None)), ("", scheme)]
    measure = lambda model: train_cnn.accuracy(model, images.held_out_x, images.held_out_labels)
    before, table, kept = measure(model), comparison("accuracy"), True
    table.add_row("float32", "", f"{before:.2%}", "")
    for name, scheme in NAMES.items():
        small, report = quantize_model(model, rules(scheme), calibration)
        after = measure(small)
        kept &= after >= before - POINTS[scheme.weights]
        table.add_row(name, saved(report), f"{after:.2%}", f"{100 * (after - before):+.2f} points")
    Console().print(table)
    if options.report:
        labels = images.held_out_labels

        def loss(small: train_cnn.ResNet) -> float:
            small.eval()
            return float(optax.softmax_cross_entropy_with_integer_labels(small(images.held_out_x), labels).mean())

        draw(options.report, "of cross-entropy", sensitivity(model, rules(INT4), loss, calibration))
    return 0 if kept else 1


# ---- a sentence encoder ----------------------------------------------------------------------------------------------


def encoder() -> int:
    """Quantises a pre-trained sentence encoder and prints how near its embeddings and a ranking remain."""
    model, tokenizer = sentence_encoder.load()
    texts = sentence_encoder.passages()
    calibrating, judged = list(texts.values())[::4], [t for i, t in enumerate(texts.values()) if i % 4]
    batches = list(tokens(tokenizer, calibrating))
    calibration = calibrate(model, batches, apply=lambda model, batch: model(*batch), hessian=True)
    want = sentence_encoder.encode(model, tokenizer, judged)
    table, kept = comparison("least cosine", "mean cosine", "same best passage"), True
    for name, scheme in NAMES.items():
        tables = Scheme(scheme.weights if scheme is INT8 else "int8")
        small, report = quantize_model(model, [("words|positions|types", tables), ("", scheme)], calibration)
        got = sentence_encoder.encode(small, tokenizer, judged)
        cosine = np.sum(got * want, axis=1)
        same = np.mean(best(got) == best(want))
        if scheme is INT8:
            kept = bool(cosine.min() >= COSINE)
        table.add_row(name, saved(report), f"{cosine.min():.4f}", f"{cosine.mean():.4f}", f"{same:.1%}")
    Console().print(table)
    return 0 if kept else 1


def tokens(tokenizer: Any, sentences: list[str]) -> Any:
    """(tokens[batch, T], lengths[batch]) of batches that are all as long."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    longest = -(-max(map(len, ids)) // 32) * 32
    for start in range(0, len(ids) - sentence_encoder.BATCH + 1, sentence_encoder.BATCH):
        batch = ids[start : start + sentence_encoder.BATCH]
        padded = np.array([one + [0] * (longest - len(one)) for one in batch], np.int32)
        yield padded, np.array([len(one) for one in batch], np.int32)


def best(embeddings: np.ndarray) -> np.ndarray:
    """For each text the nearest other one."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(1)


# ---- what is printed -------------------------------------------------------------------------------------------------


def comparison(*columns: str) -> Table:
    table = Table("", "bytes of all variables", *columns, *[""] * (len(columns) == 1))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def draw(path: str, unit: str, report: QuantizationReport) -> None:
    report.plot(path)
    worst = max(report.layers, key=lambda layer: layer.cost or 0)
    print(f"{report}\n\nin 4 bits {worst.path} costs most: {worst.cost:+.4f} {unit} ({path})")


def saved(report: QuantizationReport) -> str:
    return f"{report.bytes_before:,} to {report.bytes_after:,}"


if __name__ == "__main__":
    sys.exit(main())
