"""y = activation(gate) ∘ up on the TPU, gate = x · w_gate and up = x · w_up, and its gradients; see `products`.

    dgate = dy ∘ up ∘ activation'(gate),   dup = dy ∘ activation(gate)
    dx = dgate · w_gateᵀ + dup · w_upᵀ,    dw_gate = xᵀ · dgate,    dw_up = xᵀ · dup

Forward reads x once for both products and writes y, and where it is differentiated gate and up, in the dtype of y. What
is the least to move for m × n gates: with them saved, 3 numbers written and 3 read for dx and again for the weights;
without, they would be multiplied again, two products more to the six, and dgate and dup written and read twice, or dx
kept as float32 in HBM. dgate and dup themselves exist only in VMEM.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from pallas_kernels import activations
from pallas_kernels.tpu import elementwise, matrix_unit, products
from pallas_kernels.tpu.products import Tiles as Tiles

_NAME = "gated_linear_unit"


def _sizes(x, w_gate, precision, saving: bool = True) -> products.Sizes:
    return products.Sizes(
        m=math.prod(x.shape[:-1]),
        n=w_gate.shape[1],
        k=w_gate.shape[0],
        itemsize=x.dtype.itemsize,
        weights=2,
        read=0,
        saved=2 * int(saving),
        full=matrix_unit.full(x.dtype, precision),
    )


def unsupported(x, w_gate, w_up, *, activation: Callable, precision: Any) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    return products.unsupported(x, precision, w_gate, w_up) or activations.unsupported(activation, elementwise.refusal)


def tiles(phase: str, x, w_gate, w_up, *, activation, precision) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return products.tiles(_NAME, phase, _sizes(x, w_gate, precision), x.dtype)


def candidates(phase: str, x, w_gate, w_up, *, activation, precision) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM, the default first."""
    return products.candidates(phase, _sizes(x, w_gate, precision))


def memory(phase: str, tiles: Tiles, x, w_gate, w_up, *, activation, precision) -> int:
    """Bytes of VMEM that the kernels of `phase` are estimated to take."""
    return products.memory(phase, tiles, _sizes(x, w_gate, precision))


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
    """((y,), residuals): gate and up, unless not `saving`."""

    def finish(zs, bias, residual):
        del bias, residual
        gate, up = zs
        y = activation(gate) * up
        return (y, gate, up) if saving else (y,)

    sizes = _sizes(x, w_gate, precision, saving)
    tiles = tiles or products.tiles(_NAME, "forward", sizes, x.dtype)
    flat = x.reshape(sizes.m, sizes.k)
    found = products.forward(_NAME, flat, [w_gate, w_up], None, None, finish, sizes, tiles, precision)
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
    del outputs

    def start(dy, gate, up):
        active, dgate = activations.along(activation, gate, dy * up)
        return dgate, dy * active

    sizes = _sizes(x, w_gate, precision)
    tiles = tiles or products.tiles(_NAME, "backward", sizes, x.dtype)
    dy, *saved = (a.astype(x.dtype).reshape(sizes.m, sizes.n) for a in (cotangents[0], *residuals))
    flat = x.reshape(sizes.m, sizes.k)
    dx, (dw_gate, dw_up), _ = products.backward(_NAME, flat, [w_gate, w_up], dy, saved, start, sizes, tiles, precision)
    return {"x": dx.reshape(x.shape), "w_gate": dw_gate, "w_up": dw_up}
