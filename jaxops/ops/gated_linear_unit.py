"""gated_linear_unit: public function and XLA rules."""

import jax
import jax.numpy as jnp

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.ops.activations import silu
from jaxops.ops.matmul import Activation, call_unless_traced, kept, plain_activation, product_gradients, pull_back
from jaxops.ops.row_tiles import map_rows
from jaxops.reference.gated_linear_unit import gated_linear_unit as reference
from pallas_kernels import gpu, tpu


def _forward(x, w_gate, w_up, *, activation, precision):
    dtype = jnp.promote_types(x.dtype, jnp.promote_types(w_gate.dtype, w_up.dtype))
    wide = jnp.promote_types(dtype, jnp.float32)

    def rows(x):
        gate, up = (jnp.dot(x, w, precision=precision, preferred_element_type=wide) for w in (w_gate, w_up))
        return ((activation(gate) * up).astype(dtype), kept(gate, dtype), kept(up, dtype)), ()

    (y, *saved), _ = map_rows(rows, 2 * w_up.shape[1], x)
    return (y,), tuple(saved)


def _backward(x, w_gate, w_up, *, outputs, residuals, cotangents, activation, precision):
    """dgate = dy ∘ up ∘ activation'(gate),  dup = dy ∘ activation(gate), and the gradients of two products."""
    del outputs
    dtype = jnp.promote_types(x.dtype, jnp.promote_types(w_gate.dtype, w_up.dtype))

    def rows(dy, *saved):
        gradients = pull_back(lambda gate, up: activation(gate) * up, saved, dy)
        return tuple(d.astype(dtype) for d in gradients), ()

    (dgate, dup), _ = map_rows(rows, 2 * w_up.shape[1], cotangents[0], *residuals)
    dx, (dw_gate, dw_up) = product_gradients(x, [(w_gate, dgate), (w_up, dup)], precision)
    return {"x": dx, "w_gate": dw_gate, "w_up": dw_up}


_OPERATOR = Operator(
    name="gated_linear_unit",
    differentiable=("x", "w_gate", "w_up"),
    reference=lambda *operands, **named: (reference(*operands, **named),),
    xla=Rules(_forward, _backward),
    tpu=tpu.gated_linear_unit,
    gpu=gpu.gated_linear_unit,
    partition=None,
)


def gated_linear_unit(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    *,
    activation: Activation = silu,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = activation(x · w_gate) ∘ (x · w_up): SwiGLU with silu, GEGLU with gelu, or any other gate.

    Args:
      x: floating [..., k].
      w_gate, w_up: floating [k, n].
      activation: an elementwise function of a float32 array (float64 for float64). May be your own: it becomes part of
        the kernel, and JAX derives its gradient.
      precision: of both products, as in `jnp.matmul`.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y[..., n] in the common dtype of the operands. Sums, activation and product are in float32; y is rounded once.

    Raises:
      TypeError: an array is not floating, or `activation` is not a function.
      ValueError: shapes do not fit, the activation changes the shape, or `implementation` is unknown or, alone, cannot
        run.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    name = "gated_linear_unit"
    x = checks.floating(name, "x", x)
    w_gate = checks.weight(name, "w_gate", w_gate, x)
    w_up = checks.floating(name, "w_up", w_up, shape=w_gate.shape, of="the shape of w_gate")
    activation, known = plain_activation(name, activation)
    operands = dict(x=x, w_gate=w_gate, w_up=w_up)
    return call_unless_traced(_OPERATOR, known, operands, implementation, activation=activation, precision=precision)
