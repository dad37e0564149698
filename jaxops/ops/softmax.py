"""softmax: public function and XLA rules."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from jaxops.reference.softmax import softmax as reference
from pallas_kernels import gpu, tpu


def _forward(x, where=None, *, axis, temperature):
    return reference(x, where, axis=axis, temperature=temperature), ()


def _backward(x, where=None, *, outputs, residuals, cotangents, axis, temperature):
    """dx = y · (dy - Σ y · dy) / temperature. Needs y alone: autodiff would keep exp(x) and its sum as well."""
    del where, residuals
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y, dy = outputs[0].astype(wide), cotangents[0].astype(wide)
    return {"x": (y * (dy - jnp.sum(y * dy, axis, keepdims=True)) / temperature).astype(x.dtype)}


_OPERATOR = Operator(
    name="softmax",
    differentiable=("x",),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.softmax,
    gpu=gpu.softmax,
)


def softmax(
    x: jax.Array,
    axis: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    implementation: Implementation = None,
) -> jax.Array:
    """y = exp(x / temperature) / Σ exp(x / temperature) over `axis`, both over the elements `where` holds; y = 0
    elsewhere.

    A drop-in for `jax.nn.softmax`.

    Args:
      x: floating, at least one axis; the sum is in float32 whatever its dtype (float64 for float64).
      axis: the axis or axes of the sum.
      where: boolean, broadcastable to x, or None. A sum over nothing gives zeros.
      temperature: what x is divided by, above 0.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y in the shape and dtype of x.

    Raises:
      TypeError: x is not floating, `where` is not boolean, `axis` is not of integers, or temperature is not a Python
        number.
      ValueError: an axis is out of range or named twice, `where` does not broadcast, temperature is not above 0, or
        `implementation` is unknown or, alone, cannot run.
    """
    x = checks.floating("softmax", "x", x)
    axes = checks.axes("softmax", "axis", axis, x.ndim)
    if where is not None:
        where = checks.boolean("softmax", "where", where, to=x.shape, of="the shape of x")
    temperature = checks.number("softmax", "temperature", temperature, positive=True)
    (y,) = _OPERATOR(dict(x=x, where=where), implementation=implementation, axis=axes, temperature=temperature)
    return y
