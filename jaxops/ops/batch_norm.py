"""batch_norm: public function and XLA rules."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation, order_of
from jaxops.ops import checks
from jaxops.reference import batch_norm as plain
from pallas_kernels import gpu, tpu

_SAVED = ("batch_norm mean", "batch_norm var")


def _forward(x, scale, bias, *, eps):
    return plain.batch_norm(x, scale, bias, eps=eps), ()


def _backward(x, scale, bias, *, outputs, residuals, cotangents, eps):
    """With n = (x - mean) / deviation and h = dy · scale: dx = (h - mean(h) - n · mean(h · n)) / deviation, and what
    the cotangents of mean and var add to the two means. All comes from two sums of every channel."""
    del residuals
    (_, mean, var), (dy, dmean, dvar) = outputs, cotangents
    wide, axes = mean.dtype, tuple(range(x.ndim - 1))
    dy, inverse, count = dy.astype(wide), lax.rsqrt(var + eps), x.size // x.shape[-1]
    centred = x.astype(wide) - mean
    dbias, dscale = jnp.sum(dy, axes), jnp.sum(dy * centred, axes) * inverse
    gain = scale.astype(wide) * inverse
    shift, slope = gain * dbias, gain * dscale * inverse
    shift = shift if dmean is None else shift - dmean
    slope = slope if dvar is None else slope - 2 * dvar
    dx = dy * gain - (shift + centred * slope) / count
    return {"x": dx.astype(x.dtype), "scale": dscale.astype(scale.dtype), "bias": dbias.astype(bias.dtype)}


_OPERATOR = Operator(
    name="batch_norm",
    differentiable=("x", "scale", "bias"),
    reference=plain.batch_norm,
    xla=Rules(_forward, _backward),
    tpu=tpu.batch_norm,
    gpu=gpu.batch_norm,
    partition=lambda spec: (spec, PartitionSpec(*spec[-1:]), PartitionSpec(*spec[-1:])),
    differentiable_outputs=3,
)


@functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(*_SAVED),
    static_argnums=(4, 5),
    prevent_cse=False,
)
def _joined(x, scale, bias, mask, axis_name, eps):
    """(y, mean, var), the statistics of a part of x or of several devices' x. Backward saves nothing of x's size."""
    total = (lambda sums: sums) if axis_name is None else functools.partial(lax.psum, axis_name=axis_name)
    mean, var = map(checkpoint_name, plain.statistics(x, mask, total), _SAVED)
    return plain.normalized(x, mean, var, scale, bias, eps=eps), mean, var


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array | None = None,
    var: jax.Array | None = None,
    mask: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    eps: float = 1e-5,
    implementation: Implementation = None,
) -> Any:
    """y = (x - mean) · rsqrt(var + eps) · scale + bias, the mean and the variance of each channel, over all axes but
    the last.

    In training the statistics are those of x, and are returned, so that a layer can keep a running average of them; in
    evaluation `mean` and `var` are given, and y alone is returned. What `flax.nnx.BatchNorm` and `flax.linen.BatchNorm`
    compute, with the accurate variance.

    Args:
      x: floating [..., channels]; the statistics are in float32 whatever its dtype (float64 for float64).
      scale: floating [channels]; None: 1.
      bias: floating [channels]; None: no bias.
      mean, var: floating [channels], both or none: the statistics to normalise by.
      mask: boolean, broadcasts to the shape of x: the statistics are of its elements where it is True. All of x is
        normalised. A channel with none has mean 0 and variance 0.
      axis_name: mapped axes, inside `jax.shard_map` or `jax.vmap` with a name, over whose devices too the statistics
        are. Under `jax.jit` over a mesh none is needed. The sums of the devices are added, so that with a mask each
        element counts the same on every device.
      eps: added to the variance, at least 0.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order. XLA serves a mask,
        `axis_name` and given statistics.

    Returns:
      (y, mean, var): y[..., channels] in the dtype of x, the others [channels], float32 or wider; all differentiable.
      var is the biased variance, divided by the number of elements. With `mean` and `var` given: y.

    Raises:
      TypeError: an array is not floating, mask not boolean, or eps no Python number.
      ValueError: a shape does not fit, only one of mean and var is given, or they are together with a mask or an axis,
        eps is negative, or `implementation` is unknown or, alone, cannot run.

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167.
    """
    x = checks.floating("batch_norm", "x", x)
    expected: dict[str, Any] = dict(shape=x.shape[-1:], of="the last axis of x")
    eps = checks.number("batch_norm", "eps", eps)
    given = dict(scale=scale, bias=bias, mean=mean, var=var)
    there = {name: checks.floating("batch_norm", name, a, **expected) for name, a in given.items() if a is not None}
    scale = there.get("scale", jnp.ones(x.shape[-1:], x.dtype))
    bias = there.get("bias", jnp.zeros(x.shape[-1:], x.dtype))
    if (mean is None) != (var is None):
        raise ValueError(f"batch_norm: mean and var must be given both or none, got {'mean' if var is None else 'var'}")
    if mask is not None:
        mask = checks.boolean("batch_norm", "mask", mask, to=x.shape, of="the shape of x")
    evaluating, joined = mean is not None, mask is not None or axis_name is not None
    if evaluating and joined:
        raise ValueError("batch_norm: mask and axis_name say what mean and var are of, got them and mean and var")
    if not evaluating and not joined:
        return _OPERATOR(dict(x=x, scale=scale, bias=bias), implementation=implementation, eps=eps)
    if "xla" not in order_of("batch_norm", implementation):
        what = "given statistics" if evaluating else "a mask or axis_name"
        raise ValueError(f"batch_norm: implementation 'pallas' was asked for, but no kernel has {what}")
    if evaluating:
        return plain.normalized(x, there["mean"], there["var"], scale, bias, eps=eps)
    return _joined(x, scale, bias, mask, axis_name, eps)
