"""The random numbers of `pallas_kernels.random`: their statistics, and that no tiling, mesh or vmap changes them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.random import kept, row_words, shifted

BATCH, HEADS, QUERIES, KEYS = 2, 4, 256, 1000


def words_of(seed: int) -> jax.Array:
    return row_words(jax.random.key_data(jax.random.key(seed)), BATCH, HEADS, QUERIES)


def mask_of(words: jax.Array, rate: float, columns=None) -> np.ndarray:
    """[batch, heads, queries, keys]"""
    columns = jnp.arange(KEYS) if columns is None else columns
    return np.asarray(kept(words[:, :, 0, :, None], words[:, :, 1, :, None], columns, rate))


def deviation(products: np.ndarray, axis=None) -> np.ndarray:
    """Means of what has mean 0 and variance 1, in standard deviations of such a mean."""
    count = products.size if axis is None else products.shape[axis]
    return np.abs(products.mean(axis=axis)) * np.sqrt(count)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_elements_look_independent(rate):
    x = (mask_of(words_of(0), rate) - (1 - rate)) / np.sqrt(rate * (1 - rate))
    assert deviation(x) < 4
    flat = x.reshape(-1, KEYS)
    # The largest of n normal deviates is below √(2 ln n) + 1 but for bad luck of a few percent, which is fixed by seed.
    for what, means in {
        "rows": deviation(flat, 1),
        "columns": deviation(flat, 0),
        "neighbouring rows": deviation(flat[1:] * flat[:-1], 1),
        "heads": deviation((x[:, 1:] * x[:, :-1]).reshape(-1, KEYS), 1),
        "batches": deviation((x[1:] * x[:-1]).reshape(-1, KEYS), 1),
    }.items():
        assert means.max() < np.sqrt(2 * np.log(means.size)) + 1, what
    lags = [*range(1, 65), 127, 128, 256, 512]
    along = np.array([deviation(flat[:, lag:] * flat[:, :-lag]) for lag in lags])
    assert along.max() < np.sqrt(2 * np.log(len(lags))) + 1, lags[along.argmax()]
    # How many of 8 neighbours are kept is binomial.
    counts = np.bincount((flat > 0).reshape(-1, 8).sum(1), minlength=9)
    expected = [math.comb(8, k) * (1 - rate) ** k * rate ** (8 - k) * counts.sum() for k in range(9)]
    assert ((counts - expected) ** 2 / np.maximum(expected, 1)).sum() < 30  # χ² of 8 degrees of freedom: 1 in 5000


def test_rates_at_the_ends():
    words = words_of(1)
    assert mask_of(words, 0.0).all()
    assert mask_of(words, 1 - 1e-12).sum() <= 2


def test_another_key_is_another_mask():
    a, b = mask_of(words_of(0), 0.5), mask_of(words_of(1), 0.5)
    assert abs((a == b).mean() - 0.5) < 0.005
    rbg = row_words(jax.random.key_data(jax.random.key(0, impl="rbg")), BATCH, HEADS, QUERIES)
    assert abs((a == mask_of(rbg, 0.5)).mean() - 0.5) < 0.005


def test_tiles_rows_and_types_change_nothing():
    words = words_of(2)
    whole = mask_of(words, 0.3)
    for rows, columns in ((100, 333),):
        for r in range(0, QUERIES, rows):
            for c in range(0, KEYS, columns):
                tile = mask_of(words[..., r : r + rows], 0.3, jnp.arange(c, min(c + columns, KEYS)))
                assert (tile == whole[:, :, r : r + rows, c : c + columns]).all()
    moved = shifted(words, 500)
    assert (mask_of(moved, 0.3, jnp.arange(500)) == whole[..., 500:]).all()
    assert (mask_of(words.astype(jnp.int32), 0.3) == whole).all()
    # A row's words do not depend on how many rows, or batches, there are.
    key = jax.random.key_data(jax.random.key(2))
    assert (row_words(key, 1, HEADS, 17) == words[:1, :, :, :17]).all()


def test_transforms_and_meshes_change_nothing():
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), 8))
    one = jnp.stack([row_words(key, BATCH, HEADS, QUERIES) for key in keys])
    assert (jax.jit(jax.vmap(lambda key: row_words(key, BATCH, HEADS, QUERIES)))(keys) == one).all()
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            key = jax.device_put(keys[0], NamedSharding(mesh, PartitionSpec()))
            assert (jax.jit(lambda key: row_words(key, BATCH, HEADS, QUERIES))(key) == one[0]).all()
