"""rope in plain JAX."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequencies for contexts beyond the `original_length` trained on, as in Llama 3.

    With turns = frequency · original_length / 2π, the number of rotations within the original length:
    turns > high_frequency_factor keeps the frequency, turns < low_frequency_factor divides it by `factor`, and between
    the two it is interpolated linearly in `turns`.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


def frequencies(dim: int, base: float, scaling: float | RopeScaling | None) -> np.ndarray:
    """base^(-2i / dim) for i < dim / 2, scaled; float64."""
    plain = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return plain
    if not isinstance(scaling, RopeScaling):
        return plain / scaling
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = plain * scaling.original_length / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def turns(
    positions: jax.Array, dim: int, *, base: float, scaling: float | RopeScaling | None, dtype
) -> tuple[jax.Array, jax.Array]:
    """(cos a, sin a), a_i = position · frequency_i, [..., T, dim / 2] in float32 or more, for positions[..., T]."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angle = positions[..., None].astype(wide) * jnp.asarray(frequencies(dim, base, scaling), wide)
    return jnp.cos(angle), jnp.sin(angle)


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """[x₁ cos - x₂ sin, x₂ cos + x₁ sin] in float32 or more, x[..., T, N, H], cos and sin broadcastable to
    [..., T, H / 2]."""
    dim, cos, sin = x.shape[-1], cos[..., None, :], sin[..., None, :]
    first, second = (half.astype(cos.dtype) for half in (x[..., : dim // 2], x[..., dim // 2 :]))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def rope(x: jax.Array, positions: jax.Array, *, base: float, scaling: float | RopeScaling | None) -> jax.Array:
    """[y₁, y₂] = [x₁ cos a - x₂ sin a, x₂ cos a + x₁ sin a],  a_i = position · frequency_i.

    x[..., T, N, H], x₁ and x₂ the halves of its last axis; positions broadcastable to [..., T].
    """
    return turned(x, *turns(positions, x.shape[-1], base=base, scaling=scaling, dtype=x.dtype)).astype(x.dtype)


def rope_projection(
    x: jax.Array, w: jax.Array, cos: jax.Array, sin: jax.Array, bias: jax.Array | None = None, *, precision: Any
) -> jax.Array:
    """y = rope(x · w + bias) of every head, x[..., T, D], w[D, N, H], bias[N, H]; rounded once."""
    dtype = jnp.promote_types(x.dtype, w.dtype)
    z = jnp.tensordot(x, w, 1, precision=precision, preferred_element_type=jnp.promote_types(dtype, jnp.float32))
    if bias is not None:
        z = z + bias.astype(z.dtype)
    return turned(z, cos, sin).astype(dtype)
