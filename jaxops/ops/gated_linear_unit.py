"""gated_linear_unit: public function."""

import jax

from jaxops import dispatch
from jaxops.ops import checks
from jaxops.ops.activations import silu
from jaxops.ops.matmul import Activation
from jaxops.reference.gated_linear_unit import gated_linear_unit as reference


def gated_linear_unit(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    *,
    activation: Activation = silu,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = activation(x · w_gate) ∘ (x · w_up): SwiGLU with silu, GEGLU with gelu, or any other gate.

    Args:
      x: floating [..., k].
      w_gate, w_up: floating [k, n].
      activation: an elementwise function of a float32 array (float64 for float64).
      implementation: None or "xla"; there is no Pallas kernel.

    Returns:
      y[..., n] in the common dtype of the operands. Sums, activation and product are in float32; y is rounded once.

    Raises:
      TypeError: an array is not floating, or `activation` is not a function.
      ValueError: shapes do not fit, or `implementation` is unknown or "pallas".

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    name = "gated_linear_unit"
    dispatch.only_xla(name, implementation)
    x = checks.floating(name, "x", x)
    w_gate = checks.weight(name, "w_gate", w_gate, x)
    w_up = checks.floating(name, "w_up", w_up, shape=w_gate.shape, of="the shape of w_gate")
    return reference(x, w_gate, w_up, activation=checks.elementwise(name, "activation", activation))
