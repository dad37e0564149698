"""softmax on the TPU: y = exp(x / temperature) / Σ exp(x / temperature), over the last axes, where `where` holds.

    dx = y · (dy - Σ y · dy) / temperature

x is float32 or bfloat16, the sums are float32. The axes of the sum are one row, and the rows go through `row_norm`'s
loop: forward sweeps a row in VMEM three times (its largest element, the sum, the result), backward twice. Backward
needs y alone, which is 0 where `where` does not hold.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import rows
from pallas_kernels.padding import pad_to
from pallas_kernels.tpu import row_norm
from pallas_kernels.tpu.row_norm import Load, Tiles, f32

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]


def _load(phase: str, x, where, axis) -> Load:
    features = math.prod(x.shape[a] for a in axis)
    masked = phase == "forward" and where is not None
    width = (2 if phase == "forward" else 3) * x.dtype.itemsize + masked
    least = row_norm.INT8_ROWS if masked else row_norm.ROWS
    return Load(x.size // features, features, jnp.dtype(x.dtype), width, least=least)


def unsupported(x, where=None, *, axis: tuple[int, ...], temperature: float) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    reason = rows.refusal(x, axis)
    for phase in ("forward", "backward"):
        reason = reason or row_norm.unsupported(_load(phase, x, where, axis), x=x)
    return reason


def tiles(phase: str, x, where=None, *, axis: tuple[int, ...], temperature: float) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return row_norm.tiles("softmax", phase, _load(phase, x, where, axis))


def candidates(phase: str, x, where=None, *, axis: tuple[int, ...], temperature: float) -> Iterator[Tiles]:
    """Tiles worth trying that the operands and the chip's VMEM allow: the default first, then blocks of 128."""
    return row_norm.candidates(_load(phase, x, where, axis))


def memory(phase: str, tiles: Tiles, x, where=None, *, axis: tuple[int, ...], temperature: float) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return row_norm.memory(tiles, _load(phase, x, where, axis))


def _total(carry, values):
    return carry + jnp.sum(values, -1, keepdims=True)


def _forward_kernel(x_ref, *refs, rows, tiles, temperature):
    """refs: [where], y."""
    *where_ref, y_ref = refs
    features = x_ref.shape[1]

    def group(here, _):
        def read(c, hidden):
            x = x_ref[here, c].astype(f32)
            if not where_ref:
                return x
            (ref,) = where_ref
            seen = ref[0:1, c] if ref.shape[0] == 1 else ref[here, c]
            return jnp.where(seen.astype(jnp.int32) != 0, x, hidden)

        top = row_norm.fold(features, tiles, row_norm.largest, -jnp.inf, lambda c: read(c, -jnp.inf))
        if where_ref:
            top = jnp.where(jnp.abs(top) < jnp.inf, top, 0.0)  # a sum over nothing is 0, not NaN

        def part(c):
            return jnp.exp((read(c, -jnp.inf) - top) * (1 / temperature))

        total = row_norm.fold(features, tiles, _total, 0.0, part)
        inverse = 1 / (jnp.where(total == 0, 1.0, total) if where_ref else total)

        def write(c, _):
            y_ref[here, c] = (part(c) * inverse).astype(y_ref.dtype)
            return 0

        row_norm.over_columns(features, tiles.columns, write, 0)

    row_norm.over_groups(pl.program_id(0), rows, tiles, group)


def _backward_kernel(y_ref, dy_ref, dx_ref, *, rows, tiles, temperature):
    features = y_ref.shape[1]

    def group(here, _):
        def wide(ref, c):
            return ref[here, c].astype(f32)

        mean = row_norm.fold(features, tiles, _total, 0.0, lambda c: wide(y_ref, c) * wide(dy_ref, c))

        def write(c, _):
            dx = wide(y_ref, c) * (wide(dy_ref, c) - mean) * (1 / temperature)
            dx_ref[here, c] = dx.astype(dx_ref.dtype)
            return 0

        row_norm.over_columns(features, tiles.columns, write, 0)

    row_norm.over_groups(pl.program_id(0), rows, tiles, group)


def _each_row(kernel, load, tiles, temperature, sources, mask, name, flops):
    """The array that `kernel` makes row by row of `sources`, all [rows, features]; mask: int8 [period, features]."""
    flat = [row_norm.flat(source, load.least) for source in sources]
    block = pl.BlockSpec((tiles.rows, load.features), lambda i: (i, 0))
    specs = [block] * len(flat)
    if mask is not None:
        period = len(mask)
        if period == 1:
            specs.append(pl.BlockSpec((1, load.features), lambda i: (0, 0)))
        elif period % tiles.rows == 0:
            specs.append(pl.BlockSpec((tiles.rows, load.features), lambda i: (lax.rem(i, period // tiles.rows), 0)))
        else:
            mask = jnp.broadcast_to(mask, (load.rows // period, *mask.shape)).reshape(load.rows, -1)
            mask = pad_to(mask, 0, len(flat[0]))
            specs.append(block)
        flat.append(mask)
    (result,) = row_norm.call(
        functools.partial(kernel, rows=load.rows, tiles=tiles, temperature=temperature),
        ("parallel",),
        load.vmem_bytes(tiles),
        flat,
        (jax.ShapeDtypeStruct(flat[0].shape, sources[0].dtype),),
        flops=flops,
        grid=(pl.cdiv(len(flat[0]), tiles.rows),),
        in_specs=specs,
        out_specs=(block,),
        name=name,
    )
    return result[: load.rows]


def forward(x, where=None, *, axis: tuple[int, ...], temperature: float, tiles: Tiles | None = None):
    """((y like x,), ())."""
    load = _load("forward", x, where, axis)
    t = tiles or row_norm.tiles("softmax", "forward", load)
    mask = None if where is None else rows.mask(where, x.shape, load.features).astype(jnp.int8)
    sources = [x.reshape(-1, load.features)]
    y = _each_row(_forward_kernel, load, t, temperature, sources, mask, "softmax", 8)
    return (y.reshape(x.shape),), ()


def backward(
    x,
    where=None,
    *,
    outputs,
    residuals,
    cotangents,
    axis: tuple[int, ...],
    temperature: float,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """The gradient of x, from y and its cotangent."""
    load = _load("backward", x, where, axis)
    t = tiles or row_norm.tiles("softmax", "backward", load)
    sources = [a.reshape(-1, load.features) for a in (outputs[0], cotangents[0])]
    dx = _each_row(_backward_kernel, load, t, temperature, sources, None, "softmax_backward", 6)
    return {"x": dx.reshape(x.shape)}
