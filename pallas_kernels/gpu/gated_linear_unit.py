"""y = activation(gate) ∘ up on Hopper GPUs, gate = x · w_gate and up = x · w_up: both products of `products` read x
once and meet in registers.

A forward pass that is differentiated saves gate and up, in the dtype of y.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from pallas_kernels.gpu import product_gradients, products
from pallas_kernels.gpu.elementwise import derived, lowered
from pallas_kernels.gpu.products import Tiles as Tiles

_NAME = "gated_linear_unit"


def _sizes(x, w_gate) -> products.Sizes:
    return products.Sizes(math.prod(x.shape[:-1]), w_gate.shape[1], w_gate.shape[0], 2)


def unsupported(x, w_gate, w_up, *, activation: Callable, precision: Any) -> str | None:
    """Why the kernel cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    del precision
    return products.unsupported(activation, x, w_gate, w_up)


def tiles(phase: str, x, w_gate, w_up, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return products.tiles(_NAME, phase, _sizes(x, w_gate), x.dtype)


def candidates(phase: str, x, w_gate, w_up, **options) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return products.candidates(_sizes(x, w_gate))


def memory(phase: str, tiles: Tiles, x, w_gate, w_up, **options) -> int:
    """Bytes of shared memory of a block."""
    return (product_gradients if phase == "backward" else products).memory(tiles, _sizes(x, w_gate))


def forward(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    *,
    activation: Callable,
    precision: Any,
    tiles: Tiles | None = None,
    saving: bool = True,
):
    """((y,), residuals): gate and up, unless not `saving`. Products of bfloat16 are exact in every precision."""
    del precision
    active = lowered(activation)

    def finish(zs, bias, residual):
        del bias, residual
        gate, up = zs
        return active(gate) * up, gate, up

    sizes = _sizes(x, w_gate)
    tiles = tiles or products.tiles(_NAME, "forward", sizes, x.dtype)
    flat, kept = x.reshape(sizes.m, sizes.k), 2 * int(saving)
    found = products.forward(_NAME, flat, [w_gate, w_up], None, None, finish, saved=kept, tiles=tiles)
    y, *saved = (a.reshape(*x.shape[:-1], sizes.n) for a in found)
    return (y,), tuple(saved)


def value(*operands, **options):
    """(y,), with nothing saved: `forward` for a call that is not differentiated."""
    return forward(*operands, **options, saving=False)[0]


def backward(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    *,
    outputs,
    residuals,
    cotangents,
    activation: Callable,
    precision: Any,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of the operands from the cotangent of y."""
    del outputs, precision

    def start(dy, gate, up):
        active, dgate = derived(activation, gate, dy * up)
        return dgate, dy * active

    sizes = _sizes(x, w_gate)
    tiles = tiles or products.tiles(_NAME, "backward", sizes, x.dtype)
    dy, *saved = (a.astype(x.dtype).reshape(sizes.m, sizes.n) for a in (cotangents[0], *residuals))
    flat = x.reshape(sizes.m, sizes.k)
    dx, (dw_gate, dw_up), _ = product_gradients.backward(_NAME, flat, [w_gate, w_up], dy, saved, start, tiles=tiles)
    return {"x": dx.reshape(x.shape), "w_gate": dw_gate, "w_up": dw_up}
