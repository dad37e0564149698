"""matmul: public function. XLA multiplies as well as can be done; what is ours is the float32 around the product."""

from collections.abc import Callable

import jax

from jaxops import dispatch
from jaxops.ops import checks
from jaxops.reference.matmul import matmul as reference

Activation = Callable[[jax.Array], jax.Array]


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = activation(x · w + bias).

    Args:
      x: floating [..., k].
      w: floating [k, n].
      bias: floating [n] or None.
      activation: an elementwise function of a float32 array (float64 for float64) or None.
      precision: as in `jnp.matmul`.
      implementation: None or "xla"; there is no Pallas kernel.

    Returns:
      y[..., n] in the common dtype of x and w. Sums, bias and activation are in float32; y is rounded once, at the end.

    Raises:
      TypeError: an array is not floating, or `activation` is not a function.
      ValueError: shapes do not fit, or `implementation` is unknown or "pallas".
    """
    dispatch.only_xla("matmul", implementation)
    x = checks.floating("matmul", "x", x)
    w = checks.weight("matmul", "w", w, x)
    if bias is not None:
        bias = checks.floating("matmul", "bias", bias, shape=w.shape[1:], of="the last axis of w")
    if activation is not None:
        activation = checks.elementwise("matmul", "activation", activation)
    return reference(x, w, bias, activation=activation, precision=precision)
