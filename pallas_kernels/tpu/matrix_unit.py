"""What kernels of matrix products share: the products themselves, their precision, how much of them is written out.

float32 operands are multiplied at JAX's default matmul precision, as XLA would, or in full where asked.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import chips

LANES = 128
WORK = 1 << 15  # passes of the matrix unit written out in one turn of a loop: more only makes the program longer
NN = (((1,), (0,)), ((), ()))  # a · b
NT = (((1,), (1,)), ((), ()))  # a · bᵀ
TN = (((0,), (0,)), ((), ()))  # aᵀ · b


def dot(a: jax.Array, b: jax.Array, dims: Any, precision: Any) -> jax.Array:
    """A product summed in float32. Those of bfloat16 are exact whatever the precision; Mosaic wants none named."""
    if 1 in b.shape:  # Mosaic makes of it products of vectors, and those of bfloat16 wrongly
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(
        a,
        b,
        dims,
        precision=lax.Precision.HIGHEST if full(a.dtype, precision) else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def unsupported(dtype: Any, precision: Any) -> str | None:
    """Why operands of `dtype` cannot be multiplied in `precision` (None: JAX's default one), or None."""
    if dtype == jnp.float32 and in_full(precision) is None:
        return f"float32 is multiplied in precision default or highest on a TPU, not {_asked(precision)}"
    return None


def full(dtype: Any, precision: Any) -> bool:
    """Whether operands of `dtype` are float32 multiplied in full: as several products of parts in bfloat16."""
    return dtype == jnp.float32 and bool(in_full(precision))


def in_full(precision: Any) -> bool | None:
    """Whether a precision asks for float32 products in full, or None if the kernels have no such products."""
    precision = _asked(precision)
    if precision in (None, "default", "fastest", "bfloat16", lax.Precision.DEFAULT):
        return False
    return True if precision in ("highest", "float32", lax.Precision.HIGHEST) else None


def _asked(precision: Any) -> Any:
    return jax.config.jax_default_matmul_precision if precision is None else precision


def turn(size: int, work: int, *, most: int | None = None, passes: int = WORK) -> int:
    """How much of `size` one turn of a loop takes: at most `most`, a divisor that is a multiple of 128, for `work`
    multiply-adds each and `passes` of the matrix unit; all of a size that is no multiple of 128."""
    if size % LANES:
        return size
    bound = passes * chips.current("tpu").mxu ** 2
    units = range(LANES, (size if most is None else most) + 1, LANES)
    return max(u for u in units if size % u == 0 and (u == LANES or u * work <= bound))
