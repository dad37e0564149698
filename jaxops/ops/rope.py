"""rope: public function."""

import jax
import jax.numpy as jnp

from jaxops import dispatch
from jaxops.ops import checks
from jaxops.reference.rope import RopeScaling as RopeScaling
from jaxops.reference.rope import rope as reference


def rope(
    x: jax.Array,
    positions: jax.Array,
    *,
    base: float = 10000.0,
    scaling: float | RopeScaling | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """[y₁, y₂] = [x₁ cos a - x₂ sin a, x₂ cos a + x₁ sin a],  a_i = position · base^(-2i / H).

    x₁ and x₂ are the halves of the last axis (as in Llama and GPT-NeoX), not its even and odd elements.

    Args:
      x: floating [..., T, N, H], H even; computed in float32 whatever its dtype (float64 for float64).
      positions: integer or floating, broadcastable to [..., T]. Not differentiable where they are integers.
      base: above 0.
      scaling: None; a number that divides every frequency (linear interpolation of positions); or a `RopeScaling`
        (Llama 3).
      implementation: None or "xla"; there is no Pallas kernel.

    Returns:
      y in the shape and dtype of x.

    Raises:
      TypeError: x is not floating, positions are not numbers, or base or scaling is of another type.
      ValueError: H is odd, x has fewer than 3 axes, positions do not broadcast, a number is out of its range, or
        `implementation` is unknown or "pallas".

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
    """
    dispatch.only_xla("rope", implementation)
    x = checks.floating("rope", "x", x)
    if x.ndim < 3 or x.shape[-1] % 2:
        raise ValueError(f"rope: x must have shape [..., T, N, H] with H even, got {x.shape}")
    positions = checks.array("rope", "positions", positions)
    if not (jnp.issubdtype(positions.dtype, jnp.integer) or jnp.issubdtype(positions.dtype, jnp.floating)):
        raise TypeError(f"rope: positions must be integer or floating, got {positions.dtype}")
    checks.broadcastable("rope", "positions", positions, to=x.shape[:-2], of="[..., T] of x")
    base = checks.number("rope", "base", base, positive=True)
    if isinstance(scaling, RopeScaling):
        for field in ("factor", "low_frequency_factor", "high_frequency_factor", "original_length"):
            checks.number("rope", f"scaling.{field}", getattr(scaling, field), positive=True)
        if scaling.high_frequency_factor <= scaling.low_frequency_factor:
            raise ValueError(f"rope: scaling.high_frequency_factor must be above low_frequency_factor, got {scaling}")
    elif scaling is not None:
        scaling = checks.number("rope", "scaling", scaling, positive=True)
    return reference(x, positions, base=base, scaling=scaling)
