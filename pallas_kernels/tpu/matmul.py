"""y = activation(x · w + bias) + residual on the TPU, and its gradients; the products are those of `products`.

    z = x · w + bias,   dz = activation'(z) · dy,   dx = dz · wᵀ,   dw = xᵀ · dz,   dbias = Σ_rows dz,   dresidual = dy

With an activation, a forward pass that is differentiated saves z, in the dtype of y: a product costs more than to read
it back.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import activations
from pallas_kernels.tpu import elementwise, matrix_unit, products
from pallas_kernels.tpu.products import Tiles as Tiles

f32 = jnp.float32


def _sizes(x, w, residual, activation, precision, saving: bool = True) -> products.Sizes:
    return products.Sizes(
        m=math.prod(x.shape[:-1]),
        n=w.shape[1],
        k=w.shape[0],
        itemsize=x.dtype.itemsize,
        weights=1,
        read=int(residual is not None),
        saved=int(saving and activation is not None),
        full=matrix_unit.full(x.dtype, precision),
    )


def unsupported(x, w, bias=None, residual=None, *, activation: Callable | None, precision: Any) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    if residual is not None and residual.dtype not in (f32, jnp.bfloat16):
        return f"residual must be float32 or bfloat16 on a TPU, got {residual.dtype}"
    return products.unsupported(x, precision, w) or activations.unsupported(activation, elementwise.refusal)


def tiles(phase: str, x, w, bias=None, residual=None, *, activation, precision) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return products.tiles("matmul", phase, _sizes(x, w, residual, activation, precision), x.dtype)


def candidates(phase: str, x, w, bias=None, residual=None, *, activation, precision) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM, the default first."""
    return products.candidates(phase, _sizes(x, w, residual, activation, precision))


def memory(phase: str, tiles: Tiles, x, w, bias=None, residual=None, *, activation, precision) -> int:
    """Bytes of VMEM that the kernels of `phase` are estimated to take."""
    return products.memory(phase, tiles, _sizes(x, w, residual, activation, precision))


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
    """((y,), residuals): z is saved if there is an activation, unless not `saving`."""
    keep = saving and activation is not None

    def finish(zs, bias, residual):
        (z,) = zs
        if bias is not None:
            z = z + bias
        y = z if activation is None else activation(z)
        if residual is not None:
            y = y + residual
        return (y, z) if keep else (y,)

    sizes = _sizes(x, w, residual, activation, precision, saving)
    tiles = tiles or products.tiles("matmul", "forward", sizes, x.dtype)
    rows = lambda a: None if a is None else a.reshape(sizes.m, a.shape[-1])
    found = products.forward("matmul", rows(x), [w], bias, rows(residual), finish, sizes, tiles, precision)
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
    del outputs
    sizes = _sizes(x, w, None, activation, precision)
    tiles = tiles or products.tiles("matmul", "backward", sizes, x.dtype)
    dy = cotangents[0].astype(x.dtype)
    start = None if activation is None else lambda dy, z: activations.along(activation, z, dy)[1:]
    rows = lambda a: a.reshape(sizes.m, a.shape[-1])
    saved = [rows(a) for a in residuals]
    dx, (dw,), sums = products.backward(
        "matmul", rows(x), [w], rows(dy), saved, start, sizes, tiles, precision, with_sums=bias is not None
    )
    gradients = {"x": dx.reshape(x.shape), "w": dw}
    if bias is not None:
        gradients["bias"] = sums[0].astype(bias.dtype)
    if residual is not None:
        gradients["residual"] = cotangents[0].astype(residual.dtype)
    return gradients
