"""Convolutions with a window of 3 × 3 in fewer multiplications, for a CPU: Winograd's F(m × m, 3 × 3).

    y = Aᵀ [Σ_i (G g_i Gᵀ) ∘ (Bᵀ d_i B)] A          of tiles d of (m + 2)² pixels, which overlap by 2; i the channels

A product of polynomials by its values at m + 1 numbers and its highest coefficient: Aᵀ and G evaluate, Bᵀ comes from
interpolation. Between them stand (m + 2)² products of [tiles, inputs] and [inputs, outputs] instead of 9 m². The
gradient of the image is such a convolution with the window turned around, and

    dg = Gᵀ [Σ over tiles of (Bᵀ d B)ᵀ · (A dy Aᵀ)] G

F(2 × 2), at 0, 1 and -1, has less than twice the error of the direct sum, for float32. F(4 × 4), at 0, ±3/4 and ±3/2,
has up to ten times that, 2e-6 of the result: nothing beside the rounding of operands of 16 bits, for which it is.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308. On the choice of numbers:
Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution", arXiv:1803.10986.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WINDOW = 3
_BYTES = 2**22  # values around the products that are in a cache at a time; of a gradient, sums of many, twice that
_TILES = 128  # but at least so many tiles, which share a reading of the windows


@dataclasses.dataclass(frozen=True)
class Form:
    """F(m × m, 3 × 3) at `points`, which are m + 1 numbers."""

    points: tuple[float, ...]

    @property
    def m(self) -> int:
        return len(self.points) - 1

    @functools.cached_property
    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Aᵀ [m, m + 2], G [m + 2, 3], Bᵀ [m + 2, m + 2]."""
        size = len(self.points) + 1

        def powers(count: int) -> np.ndarray:  # of every point; of infinity the highest is 1
            return np.vstack([np.vander(self.points, count, increasing=True), np.eye(count)[-1:]])

        # Rows of Bᵀ times Π (p - q) over the other points have small integers; those of G are divided by it.
        scale = np.array([np.prod([p - q for q in self.points if q != p]) for p in self.points] + [1.0])
        b = np.linalg.inv(powers(size)).T * scale[:, None]
        a, g = powers(self.m).T, powers(WINDOW) / scale[:, None]
        return a, g, np.where(abs(b) < 1e-12, 0, b)


EXACT = Form((0.0, 1.0, -1.0))
FAST = Form((0.0, 0.75, -0.75, 1.5, -1.5))


def convolution(x: jax.Array, w: jax.Array, low: Sequence[int], size: Sequence[int], form: Form) -> jax.Array:
    """y[n, p, o] = Σ_{k, c} x[n, p + k - low, c] · w[k, c, o], p < size; x [N, H, W, C], w [3, 3, C, O], in float32."""
    a, g, b = form.matrices
    tiling = _Tiling.of(x.shape[0], size, form.m, sum(w.shape[2:]), _BYTES)
    images = tiling.padded(x, low, WINDOW - 1)
    u = _mixed(g, _mixed(g, w, 0), 1)
    u = u.reshape(-1, *w.shape[2:])

    def step(index: jax.Array) -> jax.Array:
        v = tiling.values(tiling.part(images, index, WINDOW - 1), b)
        z = lax.dot_general(v, u, (((2,), (1,)), ((0,), (0,))))
        return tiling.pixels(z, a)

    y = lax.map(step, jnp.arange(tiling.steps))
    y = y.reshape(tiling.blocks * tiling.images, -1, *y.shape[3:])
    return y[: x.shape[0], : size[0], : size[1]]


def window_gradient(x: jax.Array, dy: jax.Array, low: Sequence[int], form: Form) -> jax.Array:
    """dw[k, c, o] = Σ_{n, p} x[n, p + k - low, c] · dy[n, p, o], [3, 3, C, O] in float32."""
    a, g, b = form.matrices
    tiling = _Tiling.of(x.shape[0], dy.shape[1:3], form.m, x.shape[-1] + dy.shape[-1], 2 * _BYTES)
    images, cotangents = tiling.padded(x, low, WINDOW - 1), tiling.padded(dy, (0, 0), 0)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        v = tiling.values(tiling.part(images, index, WINDOW - 1), b)
        d = tiling.values(tiling.part(cotangents, index, 0), a.T)
        return total + lax.dot_general(v, d, (((1,), (1,)), ((0,), (0,))))

    side, channels = len(b), (x.shape[-1], dy.shape[-1])
    du = lax.fori_loop(0, tiling.steps, add, jnp.zeros((side**2, *channels), jnp.float32))
    return _mixed(g.T, _mixed(g.T, du.reshape(side, side, *channels), 0), 1)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Steps of [images, rows, columns] tiles of m × m pixels; several images only with all of their rows."""

    m: int
    images: int
    blocks: int  # of so many images
    rows: int
    strips: int  # of so many rows
    columns: int

    @staticmethod
    def of(images: int, size: Sequence[int], m: int, channels: int, bytes_of_step: int) -> "_Tiling":
        rows, columns = (-(-pixels // m) for pixels in size)
        tiles = max(_TILES, bytes_of_step // (4 * channels * (m + WINDOW - 1) ** 2))
        blocks = -(-images // max(1, tiles // (rows * columns)))
        strips = -(-rows // max(1, tiles // columns))
        return _Tiling(m, -(-images // blocks), blocks, -(-rows // strips), strips, columns)

    @property
    def steps(self) -> int:
        return self.blocks * self.strips

    def padded(self, x: jax.Array, low: Sequence[int], beyond: int) -> jax.Array:
        """x with zeros around it, and as much as all steps read; `beyond`: pixels past a tile."""
        whole = (self.images * self.blocks, *(n * self.m + beyond for n in (self.rows * self.strips, self.columns)))
        config = [(0, n - have, 0) for n, have in zip(whole, x.shape, strict=False)] + [(0, 0, 0)]
        for axis, before in enumerate(low, 1):
            config[axis] = (before, config[axis][1] - before, 0)
        return lax.pad(x, jnp.zeros((), x.dtype), config)

    def part(self, padded: jax.Array, index: jax.Array, beyond: int) -> jax.Array:
        """What a step reads."""
        start = (index // self.strips * self.images, index % self.strips * self.rows * self.m, 0, 0)
        return lax.dynamic_slice(padded, start, (self.images, self.rows * self.m + beyond, *padded.shape[2:]))

    def values(self, x: jax.Array, matrix: np.ndarray) -> jax.Array:
        """matrix · tile · matrixᵀ of every tile of x, [values, tiles, C]."""

        def along(x: jax.Array, axis: int, count: int, place: int) -> jax.Array:
            reads = [lax.slice_in_dim(x, i, i + (count - 1) * self.m + 1, self.m, axis) for i in range(len(matrix.T))]
            return jnp.stack(_sums(matrix, reads), place)

        v = along(along(x.astype(jnp.float32), 1, self.rows, 0), 3, self.columns, 1)
        return v.reshape(len(matrix) ** 2, -1, x.shape[-1])

    def pixels(self, z: jax.Array, matrix: np.ndarray) -> jax.Array:
        """matrix · z · matrixᵀ of every tile, as pixels [images, H, W, O]."""
        side = matrix.shape[1]
        z = z.reshape(side, side, self.images, self.rows, self.columns, -1)
        y = _mixed(matrix, _mixed(matrix, z, 0), 1)
        return y.transpose(2, 3, 0, 4, 1, 5).reshape(self.images, self.rows * self.m, self.columns * self.m, -1)


def _mixed(matrix: np.ndarray, x: jax.Array, axis: int) -> jax.Array:
    """Σ_j matrix[i, j] · x[…, j, …], in the place of that axis."""
    return jnp.stack(_sums(matrix, [lax.index_in_dim(x, j, axis, keepdims=False) for j in range(len(matrix.T))]), axis)


def _sums(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    terms = ([float(c) * part for c, part in zip(row, parts, strict=True) if c] for row in matrix)
    return [functools.reduce(jnp.add, of_row) for of_row in terms]
