"""softmax on Mosaic GPU: y = exp(x / temperature) / Σ exp(x / temperature), over the last axes, where `where` holds.

    dx = y · (dy - Σ y · dy) / temperature

The axes of the sum are one row, and the rows stream through shared memory as in `row_norm`. Backward needs y alone,
which is 0 where `where` does not hold.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import rows
from pallas_kernels.gpu import row_norm
from pallas_kernels.gpu.row_norm import PHASES, Load, Tiles

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]


def _load(phase: str, x, where, axis) -> Load:
    features, size = math.prod(x.shape[a] for a in axis), x.dtype.itemsize
    if phase == "backward":
        return Load(features, 2 * size, size, 0, 0)
    masked = where is not None
    return Load(features, size + masked, size, 0, 0, least=16 if masked else 8)


def unsupported(x, where=None, *, axis: tuple[int, ...], temperature: float) -> str | None:
    """Why these kernels do not take x and `where`; None if they do."""
    del temperature
    return rows.refusal(x, axis) or row_norm.unsupported(*(_load(phase, x, where, axis) for phase in PHASES), x=x)


def tiles(phase: str, x, where=None, *, axis: tuple[int, ...], temperature: float) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return row_norm.tiles("softmax", phase, x, _load(phase, x, where, axis))


def candidates(phase: str, x, where=None, *, axis: tuple[int, ...], temperature: float) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return row_norm.candidates(_load(phase, x, where, axis))


def memory(phase: str, tiles: Tiles, x, where=None, *, axis: tuple[int, ...], temperature: float) -> int:
    """Bytes of shared memory that a block of `phase` is estimated to take."""
    return tiles.smem_bytes(_load(phase, x, where, axis))


def _each_row(result, load: Load, tiles: Tiles, sources, name: str):
    """[rows, features] of result(piece, i, slots) for the i-th row of a piece, whose slots hold the row of each of the
    `sources` [rows, features]; one of fewer rows begins again."""
    row, like = load.row(tiles.split), sources[0]
    arrays = [row_norm.to_rows(row, source) for source in sources]

    def body(*refs):
        source_refs, (y_ref, arrived, (leaving,), ready, exchange, met) = refs[: len(arrays)], refs[len(arrays) :]
        piece = row_norm.Piece(row, tiles, len(like), exchange, met)
        group, used = piece.group, piece.used

        def step(i, slot, _):
            y, out = result(piece, i, [smem.at[group, slot] for smem in arrived]), lax.rem(i, tiles.stores)
            plgpu.wait_smem_to_gmem(tiles.stores - 1, wait_read_only=True)  # the slot's last store has left
            leaving[group, out] = y.astype(y_ref.dtype)
            plgpu.commit_smem()  # orders the reads of what arrived and the write of y before the copies that follow
            plgpu.copy_smem_to_gmem(leaving.at[group, out, used], y_ref.at[piece.first + i, piece.index])
            return ()

        def source(ref, count):
            repeats = count < len(like)
            return lambda i: ref.at[lax.rem(piece.first + i, count) if repeats else piece.first + i, piece.index]

        froms = [source(ref, len(array)) for ref, array in zip(source_refs, arrays, strict=True)]
        _, tos = row_norm.copies(piece, source_refs, arrived)
        row_norm.stream(froms, tos, lambda slot: ready.at[group, slot], piece.count, tiles.stages, step, ())
        plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct(arrays[0].shape, like.dtype)
    scratch, blocks = row_norm.scratch(row, tiles, arrays, [out]), row_norm.share(len(like), tiles)[1]
    y = row_norm.call(body, name, out, scratch, blocks, tiles)(*arrays)
    return row_norm.from_rows(row, y, like.shape)


def forward(x, where=None, *, axis: tuple[int, ...], temperature: float, tiles: Tiles | None = None):
    """((y like x,), ())."""
    load = _load("forward", x, where, axis)
    t = tiles or row_norm.tiles("softmax", "forward", x, load)
    sources = [x.reshape(-1, load.features)]
    if where is not None:
        sources.append(rows.mask(where, x.shape, load.features).astype(jnp.int8))

    def result(piece, i, slots):
        def read():
            value = piece.load(slots[0], -jnp.inf)
            if where is None:
                return value
            return jnp.where(plgpu.load(slots[1], layout=piece.row.layout) != 0, value, -jnp.inf)

        (top,) = piece.combined(i, 0, jnp.max(read()), by=jnp.maximum)
        if where is not None:
            top = jnp.where(jnp.abs(top) < jnp.inf, top, 0.0)  # a sum over nothing is 0, not NaN
        part = jnp.exp((read() - top) * (1 / temperature))
        (total,) = piece.combined(i, 1, jnp.sum(part))
        return part * (1 / (total if where is None else jnp.where(total == 0, 1.0, total)))

    return (_each_row(result, load, t, sources, "softmax_forward").reshape(x.shape),), ()


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
    del residuals
    load = _load("backward", x, where, axis)
    t = tiles or row_norm.tiles("softmax", "backward", x, load)

    def result(piece, i, slots):
        (mean,) = piece.combined(i, 0, jnp.sum(piece.load(slots[0]) * piece.load(slots[1])))
        return piece.load(slots[0]) * (piece.load(slots[1]) - mean) * (1 / temperature)

    sources = [a.reshape(-1, load.features) for a in (outputs[0], cotangents[0])]
    return {"x": _each_row(result, load, t, sources, "softmax_backward").reshape(x.shape)}
