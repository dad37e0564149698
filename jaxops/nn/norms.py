"""Normalisation layers: flax's parameters, names and arguments, one fused operator each."""

from typing import Any

import jax
from flax import nnx

from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static, strict
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

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x[..., num_features]`; the result has its shape, and `dtype` or the promoted dtype."""
        if _only_flax(self, x, mask):
            return super().__call__(x, mask)
        x, scale = self.promote_dtype((x, _value(self.scale)), dtype=self.dtype)
        return rms_norm(x, scale, eps=self.epsilon, scale_offset=self.scale_offset, implementation=self.implementation)


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

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x[..., num_features]`; the result has its shape, and `dtype` or the promoted dtype."""
        if _only_flax(self, x, mask):
            return super().__call__(x, mask=mask)
        x, scale, bias = self.promote_dtype((x, _value(self.scale), _value(self.bias)), dtype=self.dtype)
        return layer_norm(
            x, scale, bias, eps=self.epsilon, scale_offset=self.scale_offset, implementation=self.implementation
        )


def _value(parameter: nnx.Param | None) -> jax.Array | None:
    return None if parameter is None else parameter[...]


def _only_flax(norm: RMSNorm | LayerNorm, x: jax.Array, mask: jax.Array | None) -> bool:
    """Whether only flax's code can serve this call. Raises `ValueError` if it cannot either."""
    last = (-1, x.ndim - 1)
    over_last_axis = _axes(norm.reduction_axes) in [(a,) for a in last] and _axes(norm.feature_axes) in [
        (a,) for a in last
    ]
    if mask is None and over_last_axis and norm.axis_name is None:
        return False
    name = type(norm).__name__
    if norm.scale_offset != 0.0:
        raise ValueError(
            f"{name}: scale_offset must be 0 with a mask, other axes or axis_name, got {norm.scale_offset}"
        )
    if strict(norm.implementation):
        raise ValueError(
            f"{name}: implementation 'pallas' was asked for, but no kernel has a mask, other axes or axis_name"
        )
    return True


def _axes(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
