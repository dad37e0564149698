"""sparse_2_4_matmul: public function and XLA rules."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxops import dispatch, sparsity
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.ops.matmul import Activation, after_product, call_unless_traced
from jaxops.reference.sparse_2_4_matmul import sparse_2_4_matmul as reference


def _cost(x, values, *_, **__):
    product = 2 * math.prod(x.shape) * values.shape[1]
    return product, 2 * product


_OPERATOR = Operator(
    name="sparse_2_4_matmul",
    differentiable=("x", "values", "bias", "residual"),
    reference=reference,
    xla=Rules(lambda *operands, **static: (reference(*operands, **static), ()), None),
    tpu="sparse_2_4_matmul has no TPU kernel yet, and a TPU has no unit for 2:4 sparsity",
    gpu="no Mosaic GPU kernel for sparse_2_4_matmul yet",
    partition=None,
    cost=_cost,
)


def sparse_2_4_matmul(
    x: ArrayLike,
    w: "sparsity.Sparse24 | ArrayLike",
    *,
    indices: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = activation(x · w + bias) + residual, of a w[k, n] of which 2 of 4 consecutive rows of a column are stored.

    It saves memory, not time: w takes 9/16 of its bytes in 16-bit types (17/32 in float32) and is expanded where it is
    multiplied. No TPU has a unit for 2:4 sparsity, and that of NVIDIA's GPUs is not used.

    Args:
      x: floating [..., k], k a multiple of 4.
      w: a `jaxops.Sparse24`; or its values, floating [k / 2, n], with `indices`.
      indices: uint8 [⌈k / 8⌉, n], the places of the values, 2 bits each.
      bias: floating [n] or None.
      activation: as in `jaxops.matmul`.
      residual: floating [..., n] or None.
      precision: as in `jnp.matmul`.
      implementation: None (the best that can run), "xla", or a sequence tried in order; there are no kernels yet.

    Returns:
      y[..., n] in the common dtype of x and w; sums, bias, activation and residual in float32, rounded once.

    Raises:
      TypeError: an array is not floating, indices are not uint8, or `activation` is not a function.
      ValueError: shapes do not fit, k is no multiple of 4, indices are missing or superfluous, or `implementation` is
        unknown or, alone, cannot run.

    Source: Mishra et al., arXiv:2104.08378.
    """
    name = "sparse_2_4_matmul"
    x = checks.floating(name, "x", x)
    if isinstance(w, sparsity.Sparse24):
        if indices is not None:
            raise ValueError(f"{name}: indices are part of a Sparse24 w, and must be None")
        packed = w
        w, indices = packed.values, packed.indices
    elif indices is None:
        raise ValueError(f"{name}: indices must be given for a w that is no Sparse24")
    values = checks.floating(name, "w", w)
    k = x.shape[-1]
    if k % 4 or values.ndim != 2 or 2 * values.shape[0] != k:
        raise ValueError(
            f"{name}: w must have values (k / 2, n) for x {x.shape}, k a multiple of 4, got {values.shape}"
        )
    size = values.shape[1]
    indices = checks.array(name, "indices", indices)
    if indices.dtype != jnp.uint8:
        raise TypeError(f"{name}: indices must be uint8, got {indices.dtype}")
    if indices.shape != (-(-k // 8), size):
        raise ValueError(f"{name}: indices must have shape {(-(-k // 8), size)}, 2 bits a value, got {indices.shape}")
    beside, activation, known = after_product(name, (*x.shape[:-1], size), bias, residual, activation)
    operands = dict(x=x, values=values, indices=indices, **beside)
    return call_unless_traced(_OPERATOR, known, operands, implementation, activation=activation, precision=precision)
