"""The rules of the optimizers, in plain JAX.

    p ← p - learning rate · (direction + weight decay · p)

A rule has

    moments                            how many arrays of the parameter's shape it keeps
    factors(count)                     the numbers that depend on the step alone, three scalars; count starts at 1
    new(g, old)                        the moments after the step, elementwise
    direction(g, old, new, factors)    elementwise, of the moments before and after the step

Everything is float32, or float64 where the parameter is.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Adam:
    """m = b1·m + (1-b1)·g;  v = b2·v + (1-b2)·g²;  direction = m̂ / (√(v̂ + eps_root) + eps)."""

    b1: float
    b2: float
    eps: float
    eps_root: float
    nesterov: bool
    moments: ClassVar[int] = 2

    def factors(self, count):
        """(of m in m̂, of g in m̂, of v in v̂)."""
        first, second = 1 / _lost(self.b1, count), 1 / _lost(self.b2, count)
        if self.nesterov:
            return self.b1 / _lost(self.b1, count + 1), (1 - self.b1) * first, second
        return first, jnp.zeros_like(first), second

    def new(self, g, old):
        m, v = old
        return self.b1 * m + (1 - self.b1) * g, self.b2 * v + (1 - self.b2) * g * g

    def direction(self, g, old, new, factors):
        m, v = new
        of_m, of_g, of_v = factors
        mean = of_m * m + of_g * g if self.nesterov else of_m * m
        return mean / (jnp.sqrt(of_v * v + self.eps_root) + self.eps)


@dataclasses.dataclass(frozen=True)
class Lion:
    """direction = sign(b1·m + (1-b1)·g);  m = b2·m + (1-b2)·g."""

    b1: float
    b2: float
    moments: ClassVar[int] = 1

    def factors(self, count):
        return _ones(count)

    def new(self, g, old):
        return (self.b2 * old[0] + (1 - self.b2) * g,)

    def direction(self, g, old, new, factors):
        return jnp.sign(self.b1 * old[0] + (1 - self.b1) * g)


@dataclasses.dataclass(frozen=True)
class Momentum:
    """t = g + momentum·t;  direction = t, or g + momentum·t if nesterov. With `momentum` None: direction = g."""

    momentum: float | None
    nesterov: bool

    @property
    def moments(self) -> int:
        return 0 if self.momentum is None else 1

    def factors(self, count):
        return _ones(count)

    def new(self, g, old):
        return tuple(g + self.momentum * trace for trace in old)

    def direction(self, g, old, new, factors):
        if self.momentum is None:
            return g
        return g + self.momentum * new[0] if self.nesterov else new[0]


Rule = Adam | Lion | Momentum


def _lost(kept: float, count):
    """1 - keptᶜᵒᵘⁿᵗ. By expm1: subtracting a number near 1 from 1 in float32 leaves five digits."""
    return -jnp.expm1(count * math.log(kept)) if kept else jnp.ones_like(count)


def _ones(count):
    return (jnp.ones_like(count),) * 3
