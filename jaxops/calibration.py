"""What post-training quantisation learns from data: the range of a layer's inputs, how to share the difficulty between
inputs and weights, and how to round weights so that outputs stay. NumPy, on the host; `jaxops.nn.calibrate` feeds it.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxops.quantization import Quantized, integer_range, quantize

OBSERVERS = ("min_max", "moving_average", "percentile", "entropy", "mean_squared_error")
BINS = 2048  # of the histogram of |x|
MOMENTUM = 0.9  # of the moving average over batches
PERCENTILE = 99.99
SAMPLES = 256  # rows that are kept to compare outputs on
DAMPING = 0.01  # of the mean of the Hessian's diagonal
BLOCK = 128  # rows whose errors are passed on together


@dataclasses.dataclass
class Statistics:
    """Of the rows x[k] that a layer was given.

    rows: how many. channels[k]: max |x_j|. moving: the moving average over batches of max |x|. counts[BINS]: the
    histogram of |x| over [0, top]. samples: some of the rows. hessian: Σ x xᵀ [k, k], if asked for.
    """

    channels: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    hessian: np.ndarray | None
    rows: int = 0
    moving: float = 0.0
    top: float = 0.0

    @staticmethod
    def of(features: int, *, hessian: bool = False) -> "Statistics":
        """Of nothing yet."""
        return Statistics(
            channels=np.zeros(features, np.float32),
            counts=np.zeros(BINS, np.int64),
            samples=np.zeros((0, features), np.float32),
            hessian=np.zeros((features, features), np.float64) if hessian else None,
        )

    def add(self, x: np.ndarray) -> None:
        """Counts the rows x[…, k] of a batch in. Raises `ValueError` for NaN and infinities, and counts nothing."""
        x = np.asarray(x, np.float32).reshape(-1, self.channels.size)
        if not np.isfinite(x).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(x))} of {x.size} numbers are NaN or infinite")
        if not x.size:
            return
        size = np.abs(x)
        most = float(size.max())
        self.moving = MOMENTUM * self.moving + (1 - MOMENTUM) * most if self.rows else most
        self.channels = np.maximum(self.channels, size.max(0))
        self._widen(most)
        if self.top:
            self.counts += np.histogram(size, BINS, (0, self.top))[0]
        else:
            self.counts[0] += size.size
        self.rows += len(x)
        self.samples = np.concatenate([self.samples, x[: SAMPLES - len(self.samples)]])
        if self.hessian is not None:
            wide = x.astype(np.float64)
            self.hessian += wide.T @ wide

    def divided(self, factors: np.ndarray) -> "Statistics":
        """Of the rows x / factors. The histogram is of the samples, the rest is of all rows."""
        new = Statistics.of(self.channels.size)
        new.add(self.samples / factors)
        new.rows, new.channels = self.rows, self.channels / factors
        new.moving = self.moving * float(new.channels.max(initial=0)) / max(float(self.channels.max(initial=0)), 1e-30)
        new.hessian = None if self.hessian is None else self.hessian / np.outer(factors, factors)
        return new

    def _widen(self, most: float) -> None:
        """Makes the histogram reach to `most`, by joining neighbouring bins until it does."""
        if not self.top:
            self.top = most
        while self.top < most:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2

    def threshold(self, observer: str, largest: int) -> float:
        """The |x| that becomes `largest`; what is beyond is clipped. 0 where all that was seen is 0.

        min_max            max |x|
        moving_average     of max |x| over the batches
        percentile         99.99 % of all |x| are below
        entropy            least Kullback-Leibler divergence of the histogram from its quantised form (TensorRT's rule)
        mean_squared_error least Σ (x - its quantised form)²
        """
        if observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, got {observer!r}")
        if observer == "min_max" or not self.top:
            return float(self.channels.max(initial=0))
        if observer == "moving_average":
            return self.moving
        width = self.top / BINS
        if observer == "percentile":
            below = np.cumsum(self.counts) / self.counts.sum()
            return min((int(np.searchsorted(below, PERCENTILE / 100)) + 1) * width, float(self.channels.max()))
        if observer == "entropy":
            return _least_divergence(self.counts, largest + 1) * width
        centres = (np.arange(BINS) + 0.5) * width
        candidates = self.top * np.arange(1, 129) / 128
        errors = [
            self.counts @ (centres - np.minimum(np.round(centres / (t / largest)), largest) * (t / largest)) ** 2
            for t in candidates
        ]
        return float(candidates[int(np.argmin(errors))])


def _least_divergence(counts: np.ndarray, levels: int) -> int:
    """How many bins to keep: the first n of them, quantised to `levels`, then tell most of the distribution.

    Source: Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    best, least = BINS, math.inf
    for n in range(max(levels, BINS // 64), BINS + 1, BINS // 256):
        kept = counts[:n].astype(np.float64)
        clipped = kept.copy()
        clipped[-1] += counts[n:].sum()
        level = np.arange(n) * levels // n
        some = kept > 0
        sums = np.bincount(level, kept, levels)
        used = np.bincount(level, some, levels)
        spread = np.where(some, (sums / np.maximum(used, 1))[level], 0)
        if not spread.sum():
            continue
        p, q = clipped / clipped.sum(), spread / spread.sum()
        both = p > 0
        divergence = float(np.sum(p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))))
        if divergence < least:
            best, least = n, divergence
    return best


def balance(channels: np.ndarray, kernel: np.ndarray, strength: float) -> np.ndarray:
    """s_j = max|x_j|^α / max|w_j|^(1 - α) for each input j of kernel[k, n]: x / s and s · w have the same product, and
    ranges that quantise better together. 1 where an input or its weights are always 0.

    Source: Xiao et al., SmoothQuant, arXiv:2211.10438.
    """
    weights = np.abs(kernel).max(1, initial=0)
    some = (channels > 0) & (weights > 0)
    ratio = np.where(some, channels, 1) ** strength / np.where(some, weights, 1) ** (1 - strength)
    return np.clip(ratio, 1e-5, 1e5).astype(np.float32)


def round_for_outputs(
    kernel: np.ndarray, hessian: np.ndarray, dtype: Any, *, group_size: int | None = None, symmetric: bool = True
) -> Quantized:
    """The integers near kernel[k, n] that keep x · kernel: row after row is rounded, and what that errs is made good by
    the rows that are still to come, weighted by the inverse of `hessian` = Σ x xᵀ.

    dtype, group_size, symmetric: as in `jaxops.quantize(kernel, dtype, axis=0, …)`, whose form is returned. Scales of a
    group are chosen when its first row is reached.

    Source: Frantar et al., GPTQ, arXiv:2210.17323.
    """
    k, n = kernel.shape
    low, high = integer_range(dtype, symmetric)
    weights, hessian = kernel.astype(np.float64).copy(), hessian.copy()
    dead = np.diag(hessian) <= 0  # inputs that were always 0: their weights do not matter
    hessian[dead, dead] = 1
    hessian[np.diag_indices(k)] += DAMPING * np.mean(np.diag(hessian))
    # inverse = Uᵀ U: row i of U says how the rows after it make good what row i errs
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    group = group_size or k
    block = math.gcd(group, BLOCK)
    values, scales, zeros = np.empty((k, n)), np.empty((k // group, n)), np.zeros((k // group, n))
    for start in range(0, k, block):
        index = start // group
        if start % group == 0:
            found = quantize(
                jnp.asarray(weights[start : start + group], jnp.float32), dtype, axis=0, symmetric=symmetric
            )
            scales[index] = found.scales[0]
            zeros[index] = 0 if found.zeros is None else found.zeros[0]
        stop = start + block
        errors = np.empty((block, n))
        for i in range(start, stop):
            values[i] = np.clip(np.round(weights[i] / scales[index]) + zeros[index], low, high)
            errors[i - start] = (weights[i] - scales[index] * (values[i] - zeros[index])) / upper[i, i]
            weights[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], errors[i - start])
        weights[stop:] -= upper[start:stop, stop:].T @ errors
    numbers = (jnp.asarray(values).astype(dtype), jnp.asarray(scales, jnp.float32))
    return Quantized(*numbers, None if symmetric else jnp.asarray(zeros, jnp.float32))
