"""y = (x - mean(x)) · rsqrt(var(x) + eps) · (scale + scale_offset) + bias, over the last axis, on Mosaic GPU.

Layer norm of Ba, Kiros and Hinton, arXiv:1607.06450. The kernels are those of `row_norm`.
"""

from collections.abc import Iterator

from jax import Array

from pallas_kernels.gpu import row_norm
from pallas_kernels.gpu.row_norm import PHASES, Load, Tiles

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]


def unsupported(x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None) -> str | None:
    """Why these kernels do not take x[..., features], scale[features], bias[features]; None if they do."""
    del eps, scale_offset
    return row_norm.unsupported(
        *(Load.of(phase, x, scale, bias, dtype=dtype) for phase in PHASES), dtype=dtype, x=x, scale=scale, bias=bias
    )


def tiles(phase: str, x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return row_norm.tiles("layer_norm", phase, x, Load.of(phase, x, scale, bias, dtype=dtype))


def candidates(
    phase: str, x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None
) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return row_norm.candidates(Load.of(phase, x, scale, bias, dtype=dtype))


def memory(
    phase: str, tiles: Tiles, x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None
) -> int:
    """Bytes of shared memory that a block of `phase` is estimated to take."""
    return tiles.smem_bytes(Load.of(phase, x, scale, bias, dtype=dtype))


def forward(
    x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None, tiles: Tiles | None = None
) -> tuple[tuple[Array], tuple[()]]:
    """((y like x,), ()), or ((values, scales), ())."""
    return row_norm.forward(
        x, scale, bias, eps=eps, scale_offset=scale_offset, tiles=tiles, dtype=dtype, name="layer_norm"
    ), ()


def backward(
    x,
    scale,
    bias,
    *,
    outputs,
    residuals,
    cotangents,
    eps: float,
    scale_offset: float,
    dtype: str | None = None,
    tiles: Tiles | None = None,
) -> dict[str, Array]:
    """Gradients of `x`, `scale` and `bias`; the statistics are computed again from `x`."""
    del outputs, residuals
    dx, dscale, dbias = row_norm.backward(
        x, scale, bias, cotangents[0], eps=eps, scale_offset=scale_offset, tiles=tiles, name="layer_norm"
    )
    return {"x": dx, "scale": dscale, "bias": dbias}
