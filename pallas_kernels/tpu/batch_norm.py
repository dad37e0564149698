"""batch_norm on the TPU: the kernels of `group_norm` with all positions in one batch and a group for every channel.

    dx = r · (h - mean(h) - x̂ · mean(h · x̂)) + dmean / n + 2 · dvar · (x - mean) / n,   r = rsqrt(var + eps),
    h = dy · scale,   x̂ = (x - mean) · r,   n the number of positions

The cotangents of the statistics change the two means, not the passes over x and dy.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu import group_norm
from pallas_kernels.tpu.group_norm import Load, Tiles
from pallas_kernels.tpu.row_norm import SUBLANES, f32

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]


def _joined(x):
    """The shape of x[1, positions, channels]."""
    return jax.ShapeDtypeStruct((1, x.size // x.shape[-1], x.shape[-1]), x.dtype)


def unsupported(x, scale, bias, *, eps: float) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    return group_norm.refusal(_joined(x), x.shape[-1])


def tiles(phase: str, x, scale, bias, *, eps: float) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return group_norm.best("batch_norm", phase, _joined(x), x.shape[-1])


def candidates(phase: str, x, scale, bias, *, eps: float) -> Iterator[Tiles]:
    """As those of `group_norm`."""
    return group_norm.candidates(phase, _joined(x), scale, bias, num_groups=x.shape[-1], eps=eps)


def memory(phase: str, tiles: Tiles, x, scale, bias, *, eps: float) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    return group_norm.memory(phase, tiles, _joined(x), scale, bias, num_groups=x.shape[-1], eps=eps)


_tiles = tiles  # where an argument has this name


def forward(x, scale, bias, *, eps: float, tiles: Tiles | None = None):
    """((y like x, mean, variance), ()), both float32 [channels]."""
    t, joined = tiles or _tiles("forward", x, scale, bias, eps=eps), _joined(x)
    load = Load.of("forward", joined, x.shape[-1])
    y, mean, var = group_norm.normalized(x.reshape(joined.shape), scale, bias, load, t, eps=eps, name="batch_norm")
    return (y.reshape(x.shape), mean[0, 0], var[0, 0]), ()


def backward(
    x, scale, bias, *, outputs, residuals, cotangents, eps: float, tiles: Tiles | None = None
) -> dict[str, jax.Array]:
    """Gradients of x, scale and bias from the cotangents of y and of its statistics."""
    t, joined = tiles or _tiles("backward", x, scale, bias, eps=eps), _joined(x)
    load = Load.of("backward", joined, x.shape[-1])
    (_, mean, var), (dy, dmean, dvar) = outputs, cotangents
    inverse = lax.rsqrt(var + eps)
    less = jnp.zeros((SUBLANES, load.channels), f32)
    if dmean is not None:
        less = less.at[0].set(dmean / (inverse * load.positions))
    if dvar is not None:
        less = less.at[1].set(2 * dvar / (inverse * inverse * load.positions))
    flat, dy = x.reshape(joined.shape), dy.reshape(joined.shape)
    mean, inverse = mean[None, None], inverse[None, None]
    dx, shift, slope = group_norm.gradients(flat, dy, scale, mean, inverse, less, load, t, name="batch_norm_backward")
    sums = {"scale": slope[0, 0].astype(scale.dtype), "bias": shift[0, 0].astype(bias.dtype)}
    return {"x": dx.reshape(x.shape), **sums}
