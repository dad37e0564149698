"""Mixed precision: one policy of dtypes, and a loss scale that finds its value by itself.

Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, arXiv:1710.03740.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxops.ops import checks


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which dtype what is in: parameters, computation, sums of gradients over devices, and what comes out.

    `layers` are the arguments of Flax's and jaxops' layers: `jaxops.nn.RMSNorm(64, rngs=rngs, **policy.layers)`.
    `sharding.gradient_reduction(…, precision=policy)` sends gradients as `reduction`, gathers parameters that are kept
    as shards as `compute`, and gives the loss as `output`.

    Args:
      parameter: of what the optimizer updates. 16 bits lose updates that are small beside the parameter.
      compute: of activations and products.
      reduction: of gradients while they are summed over devices. 16 bits halve what is sent.
      output: of the loss.

    Raises `TypeError` if one is not a floating dtype.
    """

    parameter: Any = jnp.float32
    compute: Any = jnp.float32
    reduction: Any = jnp.float32
    output: Any = jnp.float32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            try:
                dtype = jnp.dtype(given)
            except TypeError:
                raise TypeError(f"Precision: {field.name} must be a floating dtype, got {given!r}") from None
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"Precision: {field.name} must be a floating dtype, got {dtype}")
            object.__setattr__(self, field.name, dtype)

    @property
    def layers(self) -> dict[str, Any]:
        """{"dtype": compute, "param_dtype": parameter}."""
        return {"dtype": self.compute, "param_dtype": self.parameter}

    def computed(self, tree: Any) -> Any:
        """The tree with its floating arrays as `compute`."""
        is_floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jax.tree.map(lambda x: jnp.asarray(x, self.compute) if is_floating(x) else x, tree)


class LossScaleState(NamedTuple):
    """What the loss is multiplied by, the steps since that changed, and how many steps were skipped in all."""

    scale: jax.Array
    good: jax.Array
    skipped: jax.Array


@dataclasses.dataclass(frozen=True)
class LossScale:
    """scale ← scale · 2 after `growth_interval` steps with finite gradients, scale / 2 after one without.

    A step whose gradients are not finite changes nothing else. The gradients of scale · loss stay above the smallest
    number of float16, 6e-8, and are divided by scale afterwards. bfloat16 has the exponents of float32 and needs none.

    Args:
      initial: the first scale.
      growth_interval: good steps until it doubles.
      smallest, largest: between which it stays.

    Powers of 2 change no mantissa. Raises `TypeError` if one is no Python number, `ValueError` if one is not above 0,
    `growth_interval` is no whole number, or `initial` is not between the smallest and the largest.
    """

    initial: float = 2.0**15
    growth_interval: int = 2000
    smallest: float = 1.0
    largest: float = 2.0**24

    def __post_init__(self):
        for field in dataclasses.fields(self):
            checks.number("LossScale", field.name, getattr(self, field.name), positive=True)
        if self.growth_interval != int(self.growth_interval):
            raise ValueError(f"LossScale: growth_interval must be a whole number, got {self.growth_interval}")
        if not self.smallest <= self.initial <= self.largest:
            raise ValueError(
                f"LossScale: initial must be in [smallest = {self.smallest:g}, largest = {self.largest:g}], got "
                f"{self.initial:g}"
            )

    def init(self) -> LossScaleState:
        """The first state."""
        return LossScaleState(jnp.float32(self.initial), jnp.int32(0), jnp.int32(0))

    def adjust(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """The state after a step whose gradients were `finite`, a boolean scalar, or were not."""
        good = jnp.where(finite, state.good + 1, 0)
        grows = good >= self.growth_interval
        larger = jnp.where(grows, jnp.minimum(2 * state.scale, self.largest), state.scale)
        scale = jnp.where(finite, larger, jnp.maximum(0.5 * state.scale, self.smallest))
        return LossScaleState(scale, jnp.where(grows, 0, good), state.skipped + ~finite)
