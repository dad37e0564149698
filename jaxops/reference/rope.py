"""rope in plain JAX."""

import dataclasses
import math

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


def rope(x: jax.Array, positions: jax.Array, *, base: float, scaling: float | RopeScaling | None) -> jax.Array:
    """[y₁, y₂] = [x₁ cos a - x₂ sin a, x₂ cos a + x₁ sin a],  a_i = position · frequency_i.

    x[..., T, N, H], x₁ and x₂ the halves of its last axis; positions broadcastable to [..., T].
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dim = x.shape[-1]
    angle = positions[..., None, None].astype(wide) * jnp.asarray(frequencies(dim, base, scaling), wide)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., : dim // 2].astype(wide), x[..., dim // 2 :].astype(wide)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
