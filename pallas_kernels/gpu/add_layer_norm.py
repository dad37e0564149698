"""total = x + residual, y = (total - mean) · rsqrt(var + eps) · (scale + scale_offset) + bias, on Mosaic GPU.

Layer norm of Ba, Kiros and Hinton, arXiv:1607.06450, over the last axis. The kernels are those of `row_norm`.
"""

from collections.abc import Iterator

from jax import Array

from pallas_kernels.gpu import row_norm
from pallas_kernels.gpu.row_norm import PHASES, Load, Tiles

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]


def unsupported(x, residual, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None) -> str | None:
    """Why these kernels do not take x[..., features], residual, scale[features], bias[features]; None if they do."""
    del eps, scale_offset
    return row_norm.unsupported(
        *(Load.of(phase, x, scale, bias, residual=residual, dtype=dtype) for phase in PHASES),
        x=x,
        residual=residual,
        scale=scale,
        bias=bias,
    )


def tiles(phase: str, x, residual, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return row_norm.tiles("add_layer_norm", phase, x, Load.of(phase, x, scale, bias, residual=residual, dtype=dtype))


def candidates(
    phase: str, x, residual, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None
) -> Iterator[Tiles]:
    """Tiles worth trying that registers and shared memory allow, the default first."""
    return row_norm.candidates(Load.of(phase, x, scale, bias, residual=residual, dtype=dtype))


def memory(
    phase: str, tiles: Tiles, x, residual, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None
) -> int:
    """Bytes of shared memory that a block of `phase` is estimated to take."""
    return tiles.smem_bytes(Load.of(phase, x, scale, bias, residual=residual, dtype=dtype))


def forward(
    x, residual, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None, tiles: Tiles | None = None
) -> tuple[tuple[Array, ...], tuple[()]]:
    """((y, total), ()), or ((total, values, scales), ())."""
    static = dict(eps=eps, scale_offset=scale_offset)
    return row_norm.forward(x, scale, bias, residual, **static, tiles=tiles, dtype=dtype, name="add_layer_norm"), ()


def backward(
    x,
    residual,
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
    """Gradients of x, residual (the same), scale and bias from the cotangents of y and of total (None: zero)."""
    if dtype == "int8":  # y is a constant to derivatives
        return {"x": cotangents[0], "residual": cotangents[0]}
    del x, residual, residuals
    static = dict(eps=eps, scale_offset=scale_offset)
    dx, dscale, dbias = row_norm.backward(
        outputs[1], scale, bias, *cotangents, **static, tiles=tiles, name="add_layer_norm"
    )
    return {"x": dx, "residual": dx, "scale": dscale, "bias": dbias}
