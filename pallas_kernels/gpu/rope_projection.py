"""y = rope(x · w + bias) of every head on Hopper GPUs: the product of `products`, turned in registers.

The halves of a head are columns of one accumulator, and a thread has both numbers of a pair.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import products
from pallas_kernels.gpu.products import ROWS
from pallas_kernels.gpu.products import Tiles as Tiles
from pallas_kernels.rotation import of_rows

_NAME = "rope_projection"
_HEADS = (64, 128)  # head sizes: half of one is the width of a copy's tile at most, and registers hold no more


def _sizes(x, w) -> products.Sizes:
    return products.Sizes(math.prod(x.shape[:-1]), w.shape[1] * w.shape[2], w.shape[0], 1)


def _flat(w):
    return jax.ShapeDtypeStruct((w.shape[0], w.shape[1] * w.shape[2]), w.dtype)


def unsupported(x, w, cos, sin, bias=None, *, precision: Any) -> str | None:
    """Why the kernel cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del cos, sin, bias, precision
    if w.shape[2] not in _HEADS:
        return f"the head size must be 64 or 128, got {w.shape[2]}"
    return products.unsupported(None, x, _flat(w))


def tiles(phase: str, x, w, cos, sin, bias=None, **options) -> Tiles:
    """What `forward` takes when it is given no tiles; operands as for `unsupported`."""
    return next(candidates(phase, x, w, cos, sin, bias))


def candidates(phase: str, x, w, cos, sin, bias=None, **options) -> Iterator[Tiles]:
    """Tiles of whole heads worth trying that registers and shared memory allow, the default first."""
    yield from (one for one in products.candidates(_sizes(x, w)) if one.columns % w.shape[2] == 0)


def memory(phase: str, tiles: Tiles, x, w, cos, sin, bias=None, **options) -> int:
    """Bytes of shared memory of a block."""
    return products.memory(tiles, _sizes(x, w))


def forward(
    x: jax.Array,
    w: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    bias: jax.Array | None = None,
    *,
    precision: Any,
    tiles: Tiles | None = None,
):
    """((y[..., T, N, H],), ()) from x[..., T, D], w[D, N, H], cos and sin broadcastable to [..., T, H / 2]."""
    del precision  # a product of bfloat16 is exact in every precision
    sizes, (_, heads, dim) = _sizes(x, w), w.shape
    tiles = tiles or next(candidates("forward", x, w, cos, sin, bias))

    def finish(zs, bias, residual, cos, sin):
        del residual
        z = zs[0] if bias is None else zs[0] + bias
        first, second = z[:, : dim // 2], z[:, dim // 2 :]
        return (jnp.concatenate([first * cos - second * sin, second * cos + first * sin], 1),)

    tables = [of_rows(table, x.shape[:-1], ROWS) for table in (cos, sin)]
    (y,) = products.forward(
        _NAME,
        x.reshape(sizes.m, sizes.k),
        [w.reshape(sizes.k, sizes.n)],
        None if bias is None else bias.reshape(sizes.n),
        None,
        finish,
        saved=0,
        tiles=tiles,
        piece=dim,
        tables=tables,
    )
    return (y.reshape(*x.shape[:-1], heads, dim),), ()
