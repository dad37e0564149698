"""gelu, silu, relu, squared_relu. Only exact gelu has a rule of its own: what XLA makes of the others is as good."""

import math

import jax
import jax.numpy as jnp

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.reference import activations as reference


def _forward(x):
    return reference.gelu_exact(x), ()


def _backward(x, *, outputs, residuals, cotangents):
    """dx = dy · (Φ(x) + x · φ(x)), φ the normal density. From x alone: autodiff would keep arrays of the size of x."""
    del outputs, residuals
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide = x.astype(wide)
    # erf is the cheaper function and, not being the forward's, is not shared with it through memory. What it cancels in
    # the left tail is a rounding of 1, and there x · φ(x) is what counts.
    distribution = 0.5 + 0.5 * jax.lax.erf(x_wide * 0.5**0.5)
    density = jnp.exp(-0.5 * x_wide * x_wide) * (1 / math.sqrt(2 * math.pi))
    # x · φ(x) at ±inf is 0, not inf · 0.
    slope = distribution + jnp.where(density == 0, 0, x_wide * density)
    return {"x": (cotangents[0].astype(wide) * slope).astype(x.dtype)}


_GELU = Operator(
    name="gelu",
    differentiable=("x",),
    reference=reference.gelu_exact,
    xla=Rules(_forward, _backward),
    tpu="gelu has no Pallas kernel yet",
    gpu="gelu has no Pallas kernel yet",
)


def _checked(name, x, implementation):
    dispatch.only_xla(name, implementation)
    x = checks.array(name, "x", x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: x must be of a floating dtype, got {x.dtype}")
    return x


def gelu(x: jax.Array, approximate: bool = True, *, implementation: dispatch.Implementation = None) -> jax.Array:
    """y = x · Φ(x), or approximately x/2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), elementwise.

    A drop-in for `jax.nn.gelu`. Φ is the distribution function of the normal distribution.

    Args:
      x: floating, of any shape; computed in float32 whatever its dtype (float64 for float64).
      approximate: the tanh form, as `jax.nn.gelu` has it by default.
      implementation: None or "xla"; there is no Pallas kernel.

    Returns:
      y in the shape and dtype of x.

    Raises:
      TypeError: x is not floating or `approximate` is not a Python bool.
      ValueError: `implementation` is unknown or "pallas".

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
    """
    x = _checked("gelu", x, implementation)
    if not isinstance(approximate, bool):
        raise TypeError(f"gelu: approximate must be a Python bool, got {type(approximate).__name__}")
    if approximate:
        return reference.gelu_tanh(x)
    (y,) = _GELU(dict(x=x), implementation=implementation)
    return y


def silu(x: jax.Array, *, implementation: dispatch.Implementation = None) -> jax.Array:
    """y = x · sigmoid(x), elementwise. Also known as swish.

    x: floating, of any shape; computed in float32 whatever its dtype (float64 for float64).
    Returns y in the shape and dtype of x.
    Raises `TypeError` if x is not floating, `ValueError` if `implementation` is unknown or "pallas": there is none.

    Source: Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units", arXiv:1702.03118.
    """
    return reference.silu(_checked("silu", x, implementation))


def relu(x: jax.Array, *, implementation: dispatch.Implementation = None) -> jax.Array:
    """y = max(x, 0), elementwise; the derivative at 0 is 0.

    x: floating, of any shape. Returns y in its shape and dtype.
    Raises `TypeError` if x is not floating, `ValueError` if `implementation` is unknown or "pallas": there is none.
    """
    return reference.relu(_checked("relu", x, implementation))


def squared_relu(x: jax.Array, *, implementation: dispatch.Implementation = None) -> jax.Array:
    """y = max(x, 0)², elementwise.

    x: floating, of any shape; computed in float32 whatever its dtype (float64 for float64).
    Returns y in the shape and dtype of x.
    Raises `TypeError` if x is not floating, `ValueError` if `implementation` is unknown or "pallas": there is none.

    Source: So et al., "Primer: Searching for Efficient Transformers", arXiv:2109.08668.
    """
    return reference.squared_relu(_checked("squared_relu", x, implementation))
