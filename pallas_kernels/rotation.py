"""The tables of a rotation, cos a and sin a, as kernels read them."""

import math

import jax
import jax.numpy as jnp


def of_rows(table: jax.Array, leading: tuple[int, ...], multiple: int) -> jax.Array:
    """cos or sin as [r, H / 2]: the rows of one sequence where all share their positions and `multiple` divides its
    length, else those of x[leading]."""
    table = by_sequence(table, leading)
    if len(table) == 1 and leading[-1] % multiple:
        table = jnp.broadcast_to(table, (math.prod(leading[:-1]), *table.shape[1:]))
    return table.reshape(-1, table.shape[-1])


def by_sequence(table: jax.Array, leading: tuple[int, ...]) -> jax.Array:
    """cos or sin, broadcastable to [leading, H / 2], as [sequences, T, H / 2], or [1, T, H / 2] where all sequences
    share their positions."""
    half = table.shape[-1]
    if math.prod(table.shape[:-2]) != 1:
        return jnp.broadcast_to(table, (*leading, half)).reshape(-1, leading[-1], half)
    return jnp.broadcast_to(table.reshape(table.shape[-2:]), (leading[-1], half))[None]
