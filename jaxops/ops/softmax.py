"""softmax: public function and XLA rules."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.reference.softmax import softmax as reference


def _forward(x, where=None, *, axis):
    return reference(x, where, axis=axis), ()


def _backward(x, where=None, *, outputs, residuals, cotangents, axis):
    """dx = y · (dy - Σ y · dy). Needs y alone: autodiff would keep exp(x) and its sum as well."""
    del where, residuals
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y, dy = outputs[0].astype(wide), cotangents[0].astype(wide)
    return {"x": (y * (dy - jnp.sum(y * dy, axis, keepdims=True))).astype(x.dtype)}


_OPERATOR = Operator(
    name="softmax",
    differentiable=("x",),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu="softmax has no Pallas kernel yet",
    gpu="softmax has no Pallas kernel yet",
)


def softmax(
    x: jax.Array,
    axis: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """y = exp(x) / Σ exp(x) over `axis`, both over the elements `where` holds; y = 0 elsewhere.

    A drop-in for `jax.nn.softmax`.

    Args:
      x: floating, at least one axis; the sum is in float32 whatever its dtype (float64 for float64).
      axis: the axis or axes of the sum.
      where: boolean, broadcastable to x, or None. A sum over nothing gives zeros.
      implementation: None or "xla"; there is no Pallas kernel.

    Returns:
      y in the shape and dtype of x.

    Raises:
      TypeError: x is not floating, `where` is not boolean, or `axis` is not of integers.
      ValueError: an axis is out of range or named twice, `where` does not broadcast, or `implementation` is unknown or
        "pallas".
    """
    x = checks.floating("softmax", "x", x)
    axes = checks.axes("softmax", "axis", axis, x.ndim)
    if where is not None:
        where = checks.boolean("softmax", "where", where, to=x.shape, of="the shape of x")
    (y,) = _OPERATOR(dict(x=x, where=where), implementation=implementation, axis=axes)
    return y
