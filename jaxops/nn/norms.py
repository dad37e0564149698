"""Normalisation layers: flax's parameters, names and arguments, one fused operator each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static, strict, without_kernels
from jaxops.ops.add_layer_norm import add_layer_norm
from jaxops.ops.add_rms_norm import add_rms_norm
from jaxops.ops.batch_norm import batch_norm
from jaxops.ops.group_norm import group_norm, instance_norm
from jaxops.ops.layer_norm import layer_norm
from jaxops.ops.rms_norm import rms_norm


class RMSNorm(nnx.RMSNorm):
    """y = x · rsqrt(mean(x²) + epsilon) · (scale + scale_offset), over the last axis.

    A drop-in for `nnx.RMSNorm`: every argument of it is accepted (`dtype`, `param_dtype`, `use_scale`, `scale_init`,
    …), the parameter is the same `scale[num_features]`, and the dtypes are promoted in the same way. A mask, other
    axes or a mean over a mapped axis (`mask`, `reduction_axes`, `feature_axes`, `axis_name`) are served by flax's own
    code.

    Args:
      num_features: size of the last axis.
      scale_offset: added to `scale`; 1.0 for Gemma's "1 + scale" (initialise `scale` with zeros then).
      implementation: None | "pallas" | "xla" | a sequence of them.
      **flax_arguments: those of `nnx.RMSNorm`.

    Raises `ValueError` when flax's code would be needed but cannot serve `scale_offset` or a strict `implementation`.
    Source: https://arxiv.org/abs/1910.07467
    """

    def __init__(
        self,
        num_features: int,
        *,
        scale_offset: float = 0.0,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        super().__init__(num_features, rngs=rngs, **flax_arguments)
        self.scale_offset = scale_offset
        self.implementation = static(implementation)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, residual: jax.Array | None = None) -> Any:
        """Normalises `x[..., num_features]`; the result has its shape, and `dtype` or the promoted dtype.

        With a `residual` of the shape of x: (the normalised sum, x + residual), in one pass where both have one dtype.
        """
        if _only_flax(self, mask, _over_last_axis(self, x)):
            return _flax(super().__call__, x, mask, residual)
        return norm_or_add(
            (rms_norm, add_rms_norm),
            x,
            residual,
            (_value(self.scale),),
            lambda *arrays: self.promote_dtype(arrays, dtype=self.dtype),
            eps=self.epsilon,
            scale_offset=self.scale_offset,
            implementation=self.implementation,
        )


class LayerNorm(nnx.LayerNorm):
    """y = (x - mean(x)) · rsqrt(var(x) + epsilon) · (scale + scale_offset) + bias, over the last axis.

    A drop-in for `nnx.LayerNorm`: every argument of it is accepted, the parameters are the same `scale[num_features]`
    and `bias[num_features]`, and the dtypes are promoted in the same way. The variance is always the accurate one
    (`use_fast_variance` is accepted and not needed). A mask, other axes or a mean over a mapped axis are served by
    flax's own code.

    Args:
      num_features: size of the last axis.
      scale_offset: added to `scale`.
      implementation: None | "pallas" | "xla" | a sequence of them.
      **flax_arguments: those of `nnx.LayerNorm`.

    Raises `ValueError` when flax's code would be needed but cannot serve `scale_offset` or a strict `implementation`.
    Source: https://arxiv.org/abs/1607.06450
    """

    def __init__(
        self,
        num_features: int,
        *,
        scale_offset: float = 0.0,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        super().__init__(num_features, rngs=rngs, **flax_arguments)
        self.scale_offset = scale_offset
        self.implementation = static(implementation)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None, residual: jax.Array | None = None) -> Any:
        """Normalises `x[..., num_features]`; the result has its shape, and `dtype` or the promoted dtype.

        With a `residual` of the shape of x: (the normalised sum, x + residual), in one pass where both have one dtype.
        """
        if _only_flax(self, mask, _over_last_axis(self, x)):
            return _flax(super().__call__, x, mask, residual)
        return norm_or_add(
            (layer_norm, add_layer_norm),
            x,
            residual,
            (_value(self.scale), _value(self.bias)),
            lambda *arrays: self.promote_dtype(arrays, dtype=self.dtype),
            eps=self.epsilon,
            scale_offset=self.scale_offset,
            implementation=self.implementation,
        )


class GroupNorm(nnx.GroupNorm):
    """y = (x - mean) · rsqrt(var + epsilon) · scale + bias, the mean and the variance over all axes but the first and
    the last, and over the channels of a group.

    A drop-in for `nnx.GroupNorm`: every argument of it is accepted, the parameters are the same `scale[num_features]`
    and `bias[num_features]`, and the dtypes are promoted in the same way. The variance is always the accurate one
    (`use_fast_variance` is accepted and not needed). A mask, other axes or a mean over a mapped axis are served by
    flax's own code.

    Args:
      num_features: channels, the size of the last axis.
      num_groups, group_size: how many groups, or the channels of one; the other is None.
      implementation: None | "pallas" | "xla" | a sequence of them.
      **flax_arguments: those of `nnx.GroupNorm`.

    Raises `ValueError` for a strict `implementation` of kernels. Source: https://arxiv.org/abs/1803.08494
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        super().__init__(num_features, num_groups, group_size, rngs=rngs, **flax_arguments)
        self.implementation = static(implementation)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x[batch, ..., num_features]`; the result has its shape, and `dtype` or the promoted dtype."""
        if _only_flax(self, mask, self.reduction_axes is None):
            return super().__call__(x, mask=mask)
        x, scale, bias = self.promote_dtype((x, _value(self.scale), _value(self.bias)), dtype=self.dtype)
        return group_norm(
            x, scale, bias, num_groups=self.num_groups, eps=self.epsilon, implementation=self.implementation
        )


class InstanceNorm(nnx.InstanceNorm):
    """y = (x - mean) · rsqrt(var + epsilon) · scale + bias, the mean and the variance of each channel in each entry of
    the batch: over all axes but the first and the last.

    A drop-in for `nnx.InstanceNorm`: every argument of it is accepted, the parameters are the same
    `scale[num_features]` and `bias[num_features]`, and the dtypes are promoted in the same way. The variance is always
    the accurate one. A mask, other axes or a mean over a mapped axis are served by flax's own code.

    Args:
      num_features: channels, the size of the last axis.
      implementation: None | "pallas" | "xla" | a sequence of them.
      **flax_arguments: those of `nnx.InstanceNorm`.

    Raises `ValueError` for a strict `implementation` of kernels. Source: https://arxiv.org/abs/1607.08022
    """

    def __init__(
        self, num_features: int, *, implementation: Implementation = None, rngs: nnx.Rngs, **flax_arguments: Any
    ):
        super().__init__(num_features, rngs=rngs, **flax_arguments)
        self.implementation = static(implementation)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x[batch, ..., num_features]`; the result has its shape, and `dtype` or the promoted dtype."""
        if _only_flax(self, mask, _axes(self.feature_axes) in [(-1,), (x.ndim - 1,)]):
            return super().__call__(x, mask=mask)
        x, scale, bias = self.promote_dtype((x, _value(self.scale), _value(self.bias)), dtype=self.dtype)
        return instance_norm(x, scale, bias, eps=self.epsilon, implementation=self.implementation)


class BatchNorm(nnx.BatchNorm):
    """y = (x - mean) · rsqrt(var + epsilon) · scale + bias, the mean and the variance of each channel, over all axes
    but the last: of x in training, the running averages in evaluation.

    A drop-in for `nnx.BatchNorm`: every argument of it is accepted (`use_running_average`, `momentum`, `axis_name`, …),
    the parameters are the same `scale` and `bias` and the statistics the same `mean` and `var`, of [num_features], and
    the dtypes are promoted in the same way. The variance is always the accurate one, and the running averages are used
    unrounded. Another axis or `axis_index_groups` are served by flax's own code.

    Args:
      num_features: channels, the size of the last axis.
      implementation: None | "pallas" | "xla" | a sequence of them; evaluation is always XLA's.
      **flax_arguments: those of `nnx.BatchNorm`.

    Raises `ValueError` for a strict `implementation` of kernels with a mask, `axis_name`, `axis_index_groups` or
    another axis. Source: https://arxiv.org/abs/1502.03167
    """

    def __init__(
        self, num_features: int, *, implementation: Implementation = None, rngs: nnx.Rngs, **flax_arguments: Any
    ):
        super().__init__(num_features, rngs=rngs, **flax_arguments)
        self.implementation = static(implementation)

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Normalises `x[..., num_features]`; the result has its shape, and `dtype` or the promoted dtype.

        In training the running averages move: new = momentum · old + (1 - momentum) · that of x.
        """
        if self.axis not in (-1, x.ndim - 1) or self.axis_index_groups is not None:
            if strict(self.implementation):
                raise ValueError(
                    "BatchNorm: implementation 'pallas' was asked for, but no kernel has another axis or groups of axes"
                )
            return super().__call__(x, use_running_average, mask=mask)
        evaluating = self.use_running_average if use_running_average is None else use_running_average
        if evaluating is None:
            raise ValueError("BatchNorm: use_running_average must be given to the constructor or to the call")
        running = self.mean[...], self.var[...]
        x, _, _, scale, bias = self.promote_dtype(
            (x, *running, _value(self.scale), _value(self.bias)), dtype=self.dtype
        )
        y, statistics = batch_norm_or_running(
            x,
            running,
            (scale, bias),
            evaluating,
            self.momentum,
            mask=mask,
            axis_name=self.axis_name,
            eps=self.epsilon,
            implementation=self.implementation,
        )
        if not evaluating:
            self.mean[...], self.var[...] = statistics
        return y


def batch_norm_or_running(
    x: jax.Array,
    running: tuple[jax.Array, jax.Array],
    parameters: tuple[jax.Array | None, jax.Array | None],
    evaluating: bool,
    momentum: float,
    *,
    mask: jax.Array | None = None,
    axis_name: Any = None,
    eps: float,
    implementation: Implementation,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(y, the running mean and variance after it): what NNX and Linen layers share. Constants to every derivative."""
    if evaluating:
        mean, var = running
        options: dict[str, Any] = dict(eps=eps, implementation=without_kernels(implementation))
        return batch_norm(x, *parameters, mean=mean, var=var, **options), running
    y, *statistics = batch_norm(x, *parameters, mask=mask, axis_name=axis_name, eps=eps, implementation=implementation)
    mean, var = (
        (momentum * old + (1 - momentum) * jax.lax.stop_gradient(new)).astype(old.dtype)
        for old, new in zip(running, statistics, strict=True)
    )
    return y, (mean, var)


def norm_or_add(
    operators: tuple[Callable[..., Any], Callable[..., Any]],
    x: jax.Array,
    residual: jax.Array | None,
    parameters: tuple[jax.Array | None, ...],
    promote: Callable[..., Any],
    **options: Any,
) -> Any:
    """norm(x), or with a residual (norm(x + residual), x + residual): what NNX and Linen layers share.

    operators: the norm alone, and with the addition. promote: gives x and the parameters the dtype of the result; where
    that is not the dtype of the sum, the addition is a pass of its own.
    """
    norm, add_norm = operators
    if residual is None:
        return norm(*promote(x, *parameters), **options)
    dtype = jnp.result_type(x, residual)
    like, *promoted = promote(x.astype(dtype), *parameters)
    if like.dtype == dtype:
        return add_norm(x, residual, *promoted, **options)
    total = x + residual
    return norm(*promote(total, *parameters), **options), total


def _flax(norm: Callable[..., jax.Array], x: jax.Array, mask: jax.Array | None, residual: jax.Array | None) -> Any:
    """As `norm_or_add`, of flax's own code."""
    if residual is None:
        return norm(x, mask=mask)
    total = x + residual
    return norm(total, mask=mask), total


def _value(parameter: nnx.Param | None) -> jax.Array | None:
    return None if parameter is None else parameter[...]


def _over_last_axis(norm: RMSNorm | LayerNorm, x: jax.Array) -> bool:
    last = [(-1,), (x.ndim - 1,)]
    return _axes(norm.reduction_axes) in last and _axes(norm.feature_axes) in last


def _only_flax(norm: RMSNorm | LayerNorm | GroupNorm | InstanceNorm, mask: jax.Array | None, usual_axes: bool) -> bool:
    """Whether only flax's code can serve this call. Raises `ValueError` if it cannot either."""
    if mask is None and usual_axes and norm.axis_name is None:
        return False
    name, scale_offset = type(norm).__name__, getattr(norm, "scale_offset", 0.0)
    if scale_offset != 0.0:
        raise ValueError(f"{name}: scale_offset must be 0 with a mask, other axes or axis_name, got {scale_offset}")
    if strict(norm.implementation):
        raise ValueError(
            f"{name}: implementation 'pallas' was asked for, but no kernel has a mask, other axes or axis_name"
        )
    return True


def _axes(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
