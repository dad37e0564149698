"""What decides which attention weights are dropped: a key of `jax.random`, made into two words for every row."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxops.ops import checks
from pallas_kernels import random


def dropout_rows(
    key: jax.Array,
    batch: int,
    heads: int,
    queries: int,
    *,
    start: tuple[Any, Any, Any] = (0, 0, 0),
    all_heads: int | None = None,
) -> jax.Array:
    """The words that decide what `dropout_key=key` drops, uint32 [batch, heads, 2, queries]: a key for `shard_map`.

    Inside `jax.shard_map` every device sees a part of the queries and would use a key as if it were the whole. Make the
    words of the whole outside, cut them like the queries (batch, heads and queries are axes 0, 1 and 3), and give each
    part as `dropout_key`: then the mesh changes nothing. Or make those of the part: `start` is the position (batch,
    head, query) of its first row in the whole, which has `all_heads` heads (default: those of the part).

    Raises `TypeError` if `key` is not one key of `jax.random`.
    """
    data = _data(key)
    if data is None:
        raise TypeError(f"dropout_rows: key must be one key of jax.random, got {_described(key)}")
    return random.row_words(data, batch, heads, queries, start, all_heads)


def rate_of(operator: str, rate: Any) -> float:
    """`rate` as a Python float in [0, 1)."""
    rate = checks.number(operator, "dropout_rate", rate)
    if rate >= 1:
        raise ValueError(f"{operator}: dropout_rate must be below 1, got {rate}")
    return rate


def rows_of(operator: str, key: Any, rate: float, batch: int, heads: int, queries: int) -> jax.Array:
    """The words of `key`, which may be these words already."""
    if key is None:
        raise ValueError(f"{operator}: dropout_key must be given, as dropout_rate is {rate}, got None")
    data = _data(key)
    if data is not None:
        return random.row_words(data, batch, heads, queries)
    shape = (batch, heads, 2, queries)
    if getattr(key, "dtype", None) != jnp.uint32 or key.shape != shape:
        raise TypeError(
            f"{operator}: dropout_key must be one key of jax.random or jaxops.dropout_rows of shape {shape}, got "
            f"{_described(key)}"
        )
    return jnp.asarray(key)


def _data(key: Any) -> jax.Array | None:
    """The words of a key of `jax.random`, old or new, or None if it is not one key."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return jax.random.key_data(key)
    return jnp.asarray(key) if dtype == jnp.uint32 and shape in ((2,), (4,)) else None


def _described(x: Any) -> str:
    return f"{x.dtype} of shape {x.shape}" if hasattr(x, "dtype") else type(x).__name__
