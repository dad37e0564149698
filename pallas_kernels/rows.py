"""The last axes of an array as one row, and a mask of its elements."""

import math

import jax
import jax.numpy as jnp


def refusal(x, axis: tuple[int, ...]) -> str | None:
    """Why the axes are no row, or None."""
    if axis != tuple(range(x.ndim - len(axis), x.ndim)):
        return f"axis must be the last of the {x.ndim} axes, or several of the last, got {axis}"
    return None


def mask(where: jax.Array, shape: tuple[int, ...], features: int) -> jax.Array:
    """`where`, which broadcasts to `shape`, as [period, features]: row i of the array has the mask of row i % period.

    Leading axes over which `where` is broadcast cost nothing; over others it is repeated.
    """
    where = where.reshape((1,) * (len(shape) - where.ndim) + where.shape)
    lead = next((axis for axis, size in enumerate(where.shape) if size > 1), len(shape))
    rows, axis = math.prod(shape) // features, 0
    while rows > 1 and axis < lead:  # every axis before that of the first row which differs
        rows, axis = rows // shape[axis], axis + 1
    return jnp.broadcast_to(where, (*where.shape[:axis], *shape[axis:])).reshape(rows, features)
