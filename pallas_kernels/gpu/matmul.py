"""y = activation(x · w + bias) + residual on Hopper GPUs, the product of `products` finished in registers; and its
gradients, those of `product_gradients`.

    z = x · w + bias,   dz = activation'(z) · dy,   dx = dz · wᵀ,   dw = xᵀ · dz,   dbias = Σ_rows dz,   dresidual = dy

With an activation, a forward pass that is differentiated saves z, in the dtype of y.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from pallas_kernels.gpu import product_gradients, products
from pallas_kernels.gpu.elementwise import derived, lowered
from pallas_kernels.gpu.products import Tiles as Tiles


def _sizes(x, w) -> products.Sizes:
    return products.Sizes(math.prod(x.shape[:-1]), w.shape[1], w.shape[0], 1)


def unsupported(x, w, bias=None, residual=None, *, activation: Callable | None, precision: Any) -> str | None:
    """Why the kernel cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del bias, precision
    return products.unsupported(activation, x, w, residual=residual)


def tiles(phase: str, x, w, bias=None, residual=None, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return products.tiles("matmul", phase, _sizes(x, w), x.dtype)


def candidates(phase: str, x, w, bias=None, residual=None, **options) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return products.candidates(_sizes(x, w))


def memory(phase: str, tiles: Tiles, x, w, bias=None, residual=None, **options) -> int:
    """Bytes of shared memory of a block."""
    return (product_gradients if phase == "backward" else products).memory(tiles, _sizes(x, w))


def forward(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: Callable | None,
    precision: Any,
    tiles: Tiles | None = None,
    saving: bool = True,
):
    """((y,), residuals): z is saved if there is an activation, unless not `saving`. A product of bfloat16 is exact in
    every precision."""
    del precision
    active = lowered(activation) if activation is not None else lambda z: z

    def finish(zs, bias, residual):
        z = zs[0] if bias is None else zs[0] + bias
        y = active(z)
        return (y if residual is None else y + residual), z

    sizes = _sizes(x, w)
    flat = lambda a: None if a is None else a.reshape(sizes.m, a.shape[-1])
    tiles = tiles or products.tiles("matmul", "forward", sizes, x.dtype)
    kept = int(saving and activation is not None)
    found = products.forward("matmul", flat(x), [w], bias, flat(residual), finish, saved=kept, tiles=tiles)
    y, *saved = (a.reshape(*x.shape[:-1], sizes.n) for a in found)
    return (y,), tuple(saved)


def value(*operands, **options):
    """(y,), with nothing saved: `forward` for a call that is not differentiated."""
    return forward(*operands, **options, saving=False)[0]


def backward(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    outputs,
    residuals,
    cotangents,
    activation: Callable | None,
    precision: Any,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of the operands that are present, from the cotangent of y."""
    del outputs, precision
    sizes = _sizes(x, w)
    tiles = tiles or products.tiles("matmul", "backward", sizes, x.dtype)
    start = None if activation is None else lambda dy, z: derived(activation, z, dy)[1:]
    dy, *saved = (a.astype(x.dtype).reshape(sizes.m, sizes.n) for a in (cotangents[0], *residuals))
    flat, with_sums = x.reshape(sizes.m, sizes.k), bias is not None
    dx, (dw,), sums = product_gradients.backward(
        "matmul", flat, [w], dy, saved, start, tiles=tiles, with_sums=with_sums
    )
    gradients = {"x": dx.reshape(x.shape), "w": dw}
    if bias is not None:
        gradients["bias"] = sums[0].astype(bias.dtype)
    if residual is not None:
        gradients["residual"] = cotangents[0].astype(residual.dtype)
    return gradients
