"""Pooling in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pairs = tuple[tuple[int, int], ...]


def max_pool(inputs: jax.Array, *, window: tuple[int, ...], strides: tuple[int, ...], padding: Pairs) -> tuple:
    """The maximum of every window of inputs[..., *spatial, channels]; its gradient goes to the first of equals."""
    return (reduced(inputs, -jnp.inf, lax.max, window, strides, padding),)


def reduced(inputs, init, function, window: tuple[int, ...], strides: tuple[int, ...], padding: Pairs) -> jax.Array:
    """Every window of inputs[..., *spatial, channels], filled up with `init`, reduced by `function`."""
    lead = (1,) * (inputs.ndim - len(window) - 1)
    pairs = ((0, 0),) * len(lead) + padding + ((0, 0),)
    init = np.asarray(init, inputs.dtype)  # a constant, by which JAX knows the reduction
    return lax.reduce_window(inputs, init, function, (*lead, *window, 1), (*lead, *strides, 1), pairs)
