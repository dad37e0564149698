"""layer_norm on the TPU: y = (x - mean(x)) · rsqrt(var(x) + eps) · (scale + scale_offset) + bias, over the last axis.

x[..., features] is float32 or bfloat16, scale[features] and bias[features] any floating dtype; sums are float32.
See `row_norm`.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import row_norm
from pallas_kernels.tpu.row_norm import Load, Tiles

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]


def unsupported(x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    return row_norm.unsupported(Load.of("backward", x, parameters=2, dtype=dtype), dtype, x=x)


def tiles(phase: str, x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return row_norm.tiles("layer_norm", phase, Load.of(phase, x, parameters=2, dtype=dtype))


def candidates(
    phase: str, x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None
) -> Iterator[Tiles]:
    """Tiles worth trying that the operands and the chip's VMEM allow: the default first, then blocks of 128."""
    return row_norm.candidates(Load.of(phase, x, parameters=2, dtype=dtype))


def memory(
    phase: str, tiles: Tiles, x, scale, bias, *, eps: float, scale_offset: float, dtype: str | None = None
) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return row_norm.memory(tiles, Load.of(phase, x, parameters=2, dtype=dtype))


def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    eps: float,
    scale_offset: float,
    dtype: str | None = None,
    tiles: Tiles | None = None,
):
    """((y[..., features],), ()), or ((values, scales), ())."""
    w = scale.astype(jnp.float32) + scale_offset
    t = tiles or row_norm.tiles("layer_norm", "forward", Load.of("forward", x, parameters=2, dtype=dtype))
    return row_norm.forward(x, w, bias, eps=eps, tiles=t, dtype=dtype, name="layer_norm"), ()


def backward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    outputs,
    residuals,
    cotangents,
    eps: float,
    scale_offset: float,
    dtype: str | None = None,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of x, scale and bias from the cotangent of y."""
    w = scale.astype(jnp.float32) + scale_offset
    t = tiles or row_norm.tiles("layer_norm", "backward", Load.of("backward", x, parameters=2, dtype=dtype))
    dx, dw, db = row_norm.backward(x, w, cotangents[0], eps=eps, center=True, tiles=t, name="layer_norm_backward")
    return {"x": dx, "scale": dw.astype(scale.dtype), "bias": db.astype(bias.dtype)}
