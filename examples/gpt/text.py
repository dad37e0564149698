"""Bytes of a text as training data: every batch is a pure function of (seed, step), for runs that are resumed."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

HELD_OUT = 0.1  # the last tenth of the text is never trained on


@dataclasses.dataclass(frozen=True)
class Text:
    """A text split in two: `train[n]` and `held_out[m]`, both uint8."""

    name: str
    train: np.ndarray
    held_out: np.ndarray

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()[:16]

    def batch(self, seed: int, step: int, size: int, length: int, rows: slice = slice(None)) -> np.ndarray:
        """`size` random windows of `length` + 1 bytes of the training part, int32[size, length + 1], or these rows."""
        random = np.random.Generator(np.random.Philox(key=[seed, step]))
        starts = random.integers(0, len(self.train) - length, size)[rows]
        return self.train[starts[:, None] + np.arange(length + 1)].astype(np.int32)

    def held_out_batches(self, size: int, length: int) -> np.ndarray:
        """The held-out part in windows that follow one another, int32[batches, size, length + 1]."""
        count = (len(self.held_out) - 1) // length // size
        starts = np.arange(count * size) * length
        return self.held_out[starts[:, None] + np.arange(length + 1)].astype(np.int32).reshape(count, size, length + 1)


def load(file: str | None) -> Text:
    """The text of `file`, or without one the Python language reference that every CPython carries.

    Raises `FileNotFoundError`, or `OSError` for what cannot be read.
    """
    if file is None:
        from pydoc_data.topics import topics

        name, data = "pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics)).encode()
    else:
        name, data = file, Path(file).read_bytes()
    array = np.frombuffer(data, np.uint8)
    split = len(array) - int(len(array) * HELD_OUT)
    return Text(name, array[:split], array[split:])


def bigram_loss(train: np.ndarray, windows: np.ndarray) -> float:
    """Mean of -log p(b | a) over the pairs of `windows[…, length + 1]`, in nats per byte.

    p(b | a) = (count(ab) + k p(b)) / (count(a) + k),  p(b) = (count(b) + 1) / (n + 256): the counts of `train`,
    smoothed by the single bytes. k is the best of a few, chosen on `windows` themselves: to the advantage of the
    bigram.
    """
    pairs = np.zeros((256, 256))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    single = (np.bincount(train, minlength=256) + 1) / (len(train) + 256)
    first, second = windows[..., :-1].ravel(), windows[..., 1:].ravel()
    losses = []
    for k in (1.0, 3.0, 10.0, 30.0, 100.0):
        p = (pairs + k * single) / (pairs.sum(1, keepdims=True) + k)
        losses.append(float(-np.log(p[first, second]).mean()))
    return min(losses)
