"""group_norm: public function and XLA rules."""

from operator import index
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.reference.group_norm import group_norm as reference
from pallas_kernels import gpu, tpu


def _forward(x, scale, bias, *, num_groups, eps):
    """Saves the mean and the inverse deviation of every group, [batch, num_groups]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, count = x.astype(wide), _count(x, num_groups)
    mean = _over_group(_over_middle(x_wide), num_groups) / count
    # Two passes: mean(x²) - mean(x)² cancels where |mean| is large.
    centred = x_wide - _spread(mean, x)
    inverse = lax.rsqrt(_over_group(_over_middle(centred * centred), num_groups) / count + eps)
    y = centred * _spread(inverse, x) * scale.astype(wide) + bias.astype(wide)
    return (y.astype(x.dtype),), (mean, inverse)


def _backward(x, scale, bias, *, outputs, residuals, cotangents, num_groups, eps):
    """With n = (x - mean) / deviation and g = dy · scale: dx = (g - mean(g) - n · mean(g · n)) / deviation.

    All means and both parameters' gradients come from two sums over the middle axes.
    """
    del outputs, eps
    (mean, inverse), wide = residuals, jnp.promote_types(x.dtype, jnp.float32)
    dy, gain, count = cotangents[0].astype(wide), scale.astype(wide), _count(x, num_groups)
    centred = x.astype(wide) - _spread(mean, x)
    shift, slope = _over_middle(dy), _over_middle(dy * centred)
    dscale = jnp.sum(slope * _channels(inverse, x), 0)
    dbias = jnp.sum(shift, 0)
    shift = _over_group(shift * gain, num_groups) / count
    slope = inverse * inverse * _over_group(slope * gain, num_groups) / count
    dx = _spread(inverse, x) * (dy * gain - _spread(shift, x) - centred * _spread(slope, x))
    return {"x": dx.astype(x.dtype), "scale": dscale.astype(scale.dtype), "bias": dbias.astype(bias.dtype)}


def _count(x, num_groups):
    """How many elements a group has."""
    return x.size // (x.shape[0] * num_groups)


def _over_middle(x):
    """The sums over all axes but the first and the last, [batch, channels]."""
    return jnp.sum(x, range(1, x.ndim - 1))


def _over_group(sums, num_groups):
    """The sums over the channels of each group, [batch, num_groups]."""
    return jnp.sum(sums.reshape(len(sums), num_groups, -1), -1)


def _channels(statistic, x):
    """A number of every group for each of its channels, [batch, channels]."""
    batch, num_groups = statistic.shape
    return jnp.broadcast_to(statistic[..., None], (batch, num_groups, x.shape[-1] // num_groups)).reshape(batch, -1)


def _spread(statistic, x):
    """A number of every group for each of its channels, broadcast against x."""
    return lax.expand_dims(_channels(statistic, x), range(1, x.ndim - 1))


_OPERATOR = Operator(
    name="group_norm",
    differentiable=("x", "scale", "bias"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.group_norm,
    gpu=gpu.group_norm,
)


def group_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    num_groups: int,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> jax.Array:
    """y = (x - mean) · rsqrt(var + eps) · scale + bias, the mean and the variance over all axes but the first and
    the last, and over the channels of a group.

    What `flax.nnx.GroupNorm` and `flax.linen.GroupNorm` compute. One group is layer norm over all axes but the first,
    a group for every channel is instance norm.

    Args:
      x: floating [batch, ..., channels]; the statistics are in float32 whatever its dtype (float64 for float64).
      scale: floating [channels]; None: 1.
      bias: floating [channels]; None: no bias.
      num_groups: a divisor of `channels`; consecutive channels are a group.
      eps: added to the variance, at least 0.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y[batch, ..., channels] in the dtype of x.

    Raises:
      TypeError: x, scale or bias is not floating, num_groups is no integer, or eps no Python number.
      ValueError: x has one axis, a shape does not fit, num_groups does not divide the channels, eps is negative, or
        `implementation` is unknown or, alone, cannot run.

    Source: Wu and He, "Group Normalization", arXiv:1803.08494.
    """
    x = checks.floating("group_norm", "x", x)
    if x.ndim < 2:
        raise ValueError(f"group_norm: x must have a batch axis and channels, got shape {x.shape}")
    channels = x.shape[-1]
    try:
        num_groups = index(num_groups)
    except TypeError:
        raise TypeError(f"group_norm: num_groups must be an int, got {type(num_groups).__name__}") from None
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm: num_groups must be a divisor of the {channels} channels of x, got {num_groups}")
    expected: dict[str, Any] = dict(shape=(channels,), of="the last axis of x")
    eps = checks.number("group_norm", "eps", eps)
    scale = jnp.ones(channels, x.dtype) if scale is None else checks.floating("group_norm", "scale", scale, **expected)
    bias = jnp.zeros(channels, x.dtype) if bias is None else checks.floating("group_norm", "bias", bias, **expected)
    operands = dict(x=x, scale=scale, bias=bias)
    (y,) = _OPERATOR(operands, implementation=implementation, num_groups=num_groups, eps=eps)
    return y


def instance_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> jax.Array:
    """y = (x - mean) · rsqrt(var + eps) · scale + bias, the mean and the variance of each channel in each entry of the
    batch: over all axes but the first and the last.

    What `flax.nnx.InstanceNorm` and `flax.linen.InstanceNorm` compute: `group_norm` with a group for every channel,
    whose arguments, result and errors it has.

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", arXiv:1607.08022.
    """
    x = checks.floating("instance_norm", "x", x)
    if x.ndim < 2:
        raise ValueError(f"instance_norm: x must have a batch axis and channels, got shape {x.shape}")
    if x.shape[-1] == 0:
        return x
    return group_norm(x, scale, bias, num_groups=x.shape[-1], eps=eps, implementation=implementation)
