"""batch_norm on Mosaic GPU: the kernels of `group_norm` with all positions in one batch and a group for every channel.

dx = r · (h - mean(h) - x̂ · mean(h · x̂)) + dmean / n + 2 · dvar · (x - mean) / n,   r = rsqrt(var + eps),
h = dy · scale,   x̂ = (x - mean) · r,   n the number of positions
"""

from collections.abc import Iterator

import jax

from pallas_kernels.gpu import group_norm
from pallas_kernels.gpu.group_norm import Load, Tiles, flat
from pallas_kernels.padding import pad_to

__all__ = ["Tiles", "backward", "candidates", "forward", "memory", "tiles", "unsupported"]


def _joined(x):
    """The shape of x[1, positions, channels]."""
    return jax.ShapeDtypeStruct((1, x.size // x.shape[-1], x.shape[-1]), x.dtype)


def unsupported(x, scale, bias, *, eps: float) -> str | None:
    """Why these kernels do not take x[..., channels], scale[channels], bias[channels]; None if they do."""
    return group_norm.refusal(_joined(x), scale, bias, x.shape[-1])


def tiles(phase: str, x, scale, bias, *, eps: float) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return group_norm.best("batch_norm", phase, _joined(x), x.shape[-1])


def candidates(phase: str, x, scale, bias, *, eps: float) -> Iterator[Tiles]:
    """As those of `group_norm`."""
    return group_norm.candidates(phase, _joined(x), scale, bias, num_groups=x.shape[-1], eps=eps)


def memory(phase: str, tiles: Tiles, x, scale, bias, *, eps: float) -> int:
    """Bytes of shared memory that a block of `phase` is estimated to take."""
    return group_norm.memory(phase, tiles, _joined(x), scale, bias, num_groups=x.shape[-1], eps=eps)


_tiles = tiles  # where an argument has this name


def forward(x, scale, bias, *, eps: float, tiles: Tiles | None = None):
    """((y like x, mean, variance), ()), both float32 [channels]."""
    t, channels = tiles or _tiles("forward", x, scale, bias, eps=eps), x.shape[-1]
    load = Load.of("forward", _joined(x), channels)
    scale, bias = (pad_to(a, 0, load.channels) for a in (scale, bias))
    y, *statistics = group_norm.normalized(
        flat(x, load), scale, bias, load, t, eps=eps, name="batch_norm", inverse=False
    )
    return (y[..., :channels].reshape(x.shape), *(s[0, :channels] for s in statistics)), ()


def backward(
    x, scale, bias, *, outputs, residuals, cotangents, eps: float, tiles: Tiles | None = None
) -> dict[str, jax.Array]:
    """Gradients of x, scale and bias from the cotangents of y and of its statistics."""
    t, channels = tiles or _tiles("backward", x, scale, bias, eps=eps), x.shape[-1]
    load = Load.of("backward", _joined(x), channels)
    (_, mean, var), (dy, *moved) = outputs, cotangents
    lines = [None if a is None else pad_to(a, 0, load.channels)[None] for a in (mean, var, *moved)]
    dx, dscale, dbias = group_norm.gradients(
        flat(x, load), flat(dy, load), pad_to(scale, 0, load.channels), lines[0], lines[1], load, t,
        bias_dtype=bias.dtype, name="batch_norm", eps=eps, dmean=lines[2], dvar=lines[3],
    )  # fmt: skip
    return {"x": dx[..., :channels].reshape(x.shape), "scale": dscale[:channels], "bias": dbias[:channels]}
