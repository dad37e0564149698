"""y = x · rsqrt(mean(x²) + eps) · (scale + scale_offset), over the last axis, on Mosaic GPU.

RMS norm of Zhang and Sennrich, arXiv:1910.07467. The kernels are those of `row_norm`.
"""

from jax import Array

from pallas_kernels.gpu import row_norm
from pallas_kernels.gpu.row_norm import Tiles

__all__ = ["Tiles", "backward", "forward", "unsupported"]


def unsupported(x, scale, *, eps: float, scale_offset: float) -> str | None:
    """Why these kernels do not take x[..., features], scale[features]; None if they do."""
    del eps, scale_offset
    return row_norm.unsupported(x, {"scale": scale})


def forward(x, scale, *, eps: float, scale_offset: float, tiles: Tiles | None = None) -> tuple[tuple[Array], tuple[()]]:
    """((y like x,), ())."""
    return (row_norm.forward(x, scale, None, eps=eps, scale_offset=scale_offset, tiles=tiles),), ()


def backward(
    x, scale, *, outputs, residuals, cotangents, eps: float, scale_offset: float, tiles: Tiles | None = None
) -> dict[str, Array]:
    """Gradients of `x` and `scale`; the inverse root is computed again from `x`."""
    del outputs, residuals
    dx, dscale, _ = row_norm.backward(x, scale, None, cotangents[0], eps=eps, scale_offset=scale_offset, tiles=tiles)
    return {"x": dx, "scale": dscale}
