"""total = x + residual, y = total · rsqrt(mean(total²) + eps) · (scale + scale_offset), on Mosaic GPU.

RMS norm of Zhang and Sennrich, arXiv:1910.07467, over the last axis. The kernels are those of `row_norm`.
"""

from collections.abc import Iterator

from jax import Array

from pallas_kernels.gpu import row_norm
from pallas_kernels.gpu.row_norm import PHASES, Load, Tiles

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]


def unsupported(x, residual, scale, *, eps: float, scale_offset: float, dtype: str | None = None) -> str | None:
    """Why these kernels do not take x[..., features], residual, scale[features]; None if they do."""
    del eps, scale_offset
    return row_norm.unsupported(
        *(Load.of(phase, x, scale, residual=residual, dtype=dtype) for phase in PHASES),
        x=x,
        residual=residual,
        scale=scale,
    )


def tiles(phase: str, x, residual, scale, *, eps: float, scale_offset: float, dtype: str | None = None) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return row_norm.tiles("add_rms_norm", phase, x, Load.of(phase, x, scale, residual=residual, dtype=dtype))


def candidates(
    phase: str, x, residual, scale, *, eps: float, scale_offset: float, dtype: str | None = None
) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return row_norm.candidates(Load.of(phase, x, scale, residual=residual, dtype=dtype))


def memory(
    phase: str, tiles: Tiles, x, residual, scale, *, eps: float, scale_offset: float, dtype: str | None = None
) -> int:
    """Bytes of shared memory that a block of `phase` is estimated to take."""
    return tiles.smem_bytes(Load.of(phase, x, scale, residual=residual, dtype=dtype))


def forward(
    x, residual, scale, *, eps: float, scale_offset: float, dtype: str | None = None, tiles: Tiles | None = None
) -> tuple[tuple[Array, ...], tuple[()]]:
    """((y, total), ()), or ((total, values, scales), ())."""
    static = dict(eps=eps, scale_offset=scale_offset)
    return row_norm.forward(x, scale, None, residual, **static, tiles=tiles, dtype=dtype, name="add_rms_norm"), ()


def backward(
    x,
    residual,
    scale,
    *,
    outputs,
    residuals,
    cotangents,
    eps: float,
    scale_offset: float,
    dtype: str | None = None,
    tiles: Tiles | None = None,
) -> dict[str, Array]:
    """Gradients of x, residual (the same) and scale from the cotangents of y and of total (None: zero)."""
    if dtype == "int8":  # y is a constant to derivatives
        return {"x": cotangents[0], "residual": cotangents[0]}
    del x, residual, residuals
    static = dict(eps=eps, scale_offset=scale_offset)
    dx, dscale, _ = row_norm.backward(outputs[1], scale, None, *cotangents, **static, tiles=tiles, name="add_rms_norm")
    return {"x": dx, "residual": dx, "scale": dscale}
