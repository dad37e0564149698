"""y = rope(x · w + bias) of every head on the TPU, and its gradients: products turned as they are made.

    z = x · w + bias,  y = z ∘ cos + swap(z) ∘ sin    dz = dy ∘ cos - swap(dy) ∘ sin,  dx = dz · wᵀ,  dw = xᵀ · dz

swap exchanges the halves of every head, by rotating lanes; cos and sin are as wide as a head, the first half of sin
negated, and a strip holds whole heads. Nothing is saved but x and w, and dz is only in VMEM.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rotation import of_rows
from pallas_kernels.tpu import matrix_unit, products
from pallas_kernels.tpu.matrix_unit import LANES
from pallas_kernels.tpu.products import Tiles as Tiles

_NAME = "rope_projection"


def _sizes(x, w, precision) -> products.Sizes:
    return products.Sizes(
        m=math.prod(x.shape[:-1]),
        n=w.shape[1] * w.shape[2],
        k=w.shape[0],
        itemsize=x.dtype.itemsize,
        weights=1,
        read=0,
        saved=0,
        full=matrix_unit.full(x.dtype, precision),
        tables=2 * max(w.shape[2], LANES),
    )


def unsupported(x, w, cos, sin, bias=None, *, precision: Any) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del cos, sin, bias
    _, heads, dim = w.shape
    if products.STRIP % dim:
        return f"the head size must divide {products.STRIP}, the columns that are turned together, got {dim}"
    if heads * dim % max(dim, LANES):
        return f"all heads together must be a multiple of {LANES} columns, got {heads} of {dim}"
    return products.unsupported(x, precision, w)


def tiles(phase: str, x, w, cos, sin, bias=None, *, precision) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return next(candidates(phase, x, w, cos, sin, bias, precision=precision))


def candidates(phase: str, x, w, cos, sin, bias=None, *, precision) -> Iterator[Tiles]:
    """Tiles of whole heads worth trying that fit the chip's VMEM, the default first."""
    yield from (t for t in products.candidates(phase, _sizes(x, w, precision)) if t.n % w.shape[2] == 0)


def memory(phase: str, tiles: Tiles, x, w, cos, sin, bias=None, *, precision) -> int:
    """Bytes of VMEM that the kernels of `phase` are estimated to take."""
    return products.memory(phase, tiles, _sizes(x, w, precision))


def _tables(x, cos, sin, tile: int) -> list[jax.Array]:
    """cos and sin, [r, columns] in float32, for the numbers of whole heads in their places."""
    cos, sin = (of_rows(table, x.shape[:-1], tile).astype(jnp.float32) for table in (cos, sin))
    heads = max(LANES // (2 * cos.shape[1]), 1)
    return [jnp.tile(jnp.concatenate(halves, 1), (1, heads)) for halves in ((cos, cos), (-sin, sin))]


def _turned(z, cos, sin, dim: int):
    """z ∘ cos + swap(z) ∘ sin of a tile of whole heads."""
    width = cos.shape[1]

    def swap(part):
        if dim > LANES:
            return jnp.concatenate([part[:, dim // 2 :], part[:, : dim // 2]], 1)
        before = pltpu.roll(part, dim // 2, 1)
        if dim == LANES:
            return before
        first = lax.broadcasted_iota(jnp.int32, part.shape, 1) % dim < dim // 2
        return jnp.where(first, pltpu.roll(part, LANES - dim // 2, 1), before)

    parts = [z[:, start : start + width] for start in range(0, z.shape[1], width)]
    return jnp.concatenate([part * cos + swap(part) * sin for part in parts], 1)


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
    sizes, (_, heads, dim) = _sizes(x, w, precision), w.shape
    tiles = tiles or next(candidates("forward", x, w, cos, sin, precision=precision))

    def finish(zs, bias, residual, cos, sin):
        del residual
        return (_turned(zs[0] if bias is None else zs[0] + bias, cos, sin, dim),)

    (y,) = products.forward(
        _NAME,
        x.reshape(sizes.m, sizes.k),
        [w.reshape(sizes.k, sizes.n)],
        None if bias is None else bias.reshape(sizes.n),
        None,
        finish,
        sizes,
        tiles,
        precision,
        tables=_tables(x, cos, sin, sizes.cut(tiles).m),
    )
    return (y.reshape(*x.shape[:-1], heads, dim),), ()


def backward(
    x: jax.Array,
    w: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    bias: jax.Array | None = None,
    *,
    outputs,
    residuals,
    cotangents,
    precision: Any,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of x, w and bias (if present) from the cotangent of y."""
    del outputs, residuals
    sizes, dim = _sizes(x, w, precision), w.shape[2]
    tiles = tiles or next(candidates("backward", x, w, cos, sin, precision=precision))

    def start(dy, cos, sin):
        return (_turned(dy, cos, -sin, dim),)

    dx, (dw,), sums = products.backward(
        _NAME,
        x.reshape(sizes.m, sizes.k),
        [w.reshape(sizes.k, sizes.n)],
        cotangents[0].astype(x.dtype).reshape(sizes.m, sizes.n),
        [],
        start,
        sizes,
        tiles,
        precision,
        with_sums=bias is not None,
        tables=_tables(x, cos, sin, sizes.cut(tiles).m),
    )
    gradients = {"x": dx.reshape(x.shape), "w": dw.reshape(w.shape)}
    return gradients if bias is None else gradients | {"bias": sums[0].reshape(bias.shape).astype(bias.dtype)}
