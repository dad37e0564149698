"""The block schedule of `pallas_kernels.masks` against every pair of queries and keys, and user-written modifiers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import modifiers
from pallas_kernels.masks import Band, Blocks

B, N = 2, 3


def dilated(batch, head, query, key):
    return (query - key) % 3 == 0


def by_head(batch, head, query, key):
    return jnp.where(head == 1, key <= query, key > query)


def by_batch(batch, head, query, key):
    return key // 8 <= query // 8 + batch


def of_keys(batch, head, query, key):
    return key < 9


def seen_pairs(shape, band, mask_mod=None, mask=None, prefix_lengths=None, **others):
    """bool [B, N, T, S], pair by pair."""
    b, n, i, j = np.indices(shape)
    seen = np.broadcast_to(band.allowed(i, j), shape)
    if prefix_lengths is not None:
        seen = seen | (j < np.asarray(prefix_lengths)[b])
    if mask_mod is not None:
        seen = seen & np.asarray(mask_mod(b, n, i, j))
    if mask is not None:
        seen = seen & mask
    if "key_value_seq_lengths" in others:
        seen = seen & (j < np.asarray(others["key_value_seq_lengths"])[b])
    if "query_segment_ids" in others:
        q, k = np.asarray(others["query_segment_ids"]), np.asarray(others["key_value_segment_ids"])
        seen = seen & (q[b, i] == k[b, j])
    return seen


def segments(queries, keys, seed=0):
    random = np.random.default_rng(seed)
    ids = {"query_segment_ids": queries, "key_value_segment_ids": keys}
    return {
        name: jnp.asarray(np.sort(random.integers(0, 4, (B, length)), 1), jnp.int32) for name, length in ids.items()
    }


def random_mask(*shape):
    # Coarse, so that there are empty, partial and whole blocks.
    return jnp.asarray(np.random.default_rng(0).random(shape).repeat(8, -2).repeat(8, -1) < 0.4)


# (T, S), band, whether the schedule is exact, what else hides keys
CASES = {
    "open": ((40, 40), Band(), True, {}),
    "causal": ((37, 50), Band(None, 0), True, {}),
    "window": ((50, 37), Band(9, 4), True, {}),
    "a window left of everything": ((50, 20), Band(3, -1), True, {}),
    "mask_mod": ((40, 41), Band(), True, {"mask_mod": dilated}),
    "mask_mod of heads in a band": ((40, 41), Band(20, 0), True, {"mask_mod": by_head}),
    "mask_mod of batches": ((33, 41), Band(), True, {"mask_mod": by_batch}),
    "mask_mod of keys": ((33, 41), Band(), True, {"mask_mod": of_keys}),
    "lengths": ((33, 41), Band(None, 0), True, {"key_value_seq_lengths": jnp.array([41, 13])}),
    "length 0": ((33, 41), Band(), True, {"key_value_seq_lengths": jnp.array([0, 1])}),
    "prefix": ((33, 41), Band(None, 0), False, {"prefix_lengths": jnp.array([17, 0])}),
    "prefix and mask_mod": ((33, 41), Band(6, 0), False, {"prefix_lengths": jnp.array([17, 3]), "mask_mod": by_head}),
    "segments": ((40, 44), Band(), False, segments(40, 44)),
    "segments, causal": ((40, 40), Band(None, 0), False, segments(40, 40, 1)),
    "mask": ((40, 48), Band(), True, {"mask": random_mask(B, N, 5, 6)}),
    "mask of keys": ((40, 48), Band(), True, {"mask": random_mask(B, 1, 1, 6)[:, :, :1]}),
    "mask and lengths": (
        (40, 48),
        Band(None, 0),
        False,
        {"mask": random_mask(1, N, 5, 6), "key_value_seq_lengths": jnp.array([48, 20])},
    ),
}


def padded(seen, rows, columns, fill):
    """[B, N, row blocks, rows, column blocks, columns]"""
    missing = [(0, 0), (0, 0), (0, -seen.shape[2] % rows), (0, -seen.shape[3] % columns)]
    seen = np.pad(seen, missing, constant_values=fill)
    return seen.reshape(*seen.shape[:2], seen.shape[2] // rows, rows, -1, columns)


@pytest.mark.parametrize("tile", [(8, 8), (16, 8), (7, 24)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_blocks(name, tile):
    (queries, keys), band, exact, options = CASES[name]
    shape, (rows, columns) = (B, N, queries, keys), tile
    blocks = Blocks.of(shape, rows, columns, band, **options)
    seen = seen_pairs(shape, band, **options)
    touched = padded(seen, rows, columns, False).any((3, 5))
    # Rows beyond the last query do not count; a block that reaches beyond the last key is not whole.
    rows_ignored = np.pad(seen, [(0, 0), (0, 0), (0, -queries % rows), (0, 0)], constant_values=True)
    whole = padded(rows_ignored, rows, columns, False).all((3, 5))
    got_touched, got_whole = (np.broadcast_to(np.asarray(x), touched.shape) for x in (blocks.touched, blocks.whole))
    assert not (touched & ~got_touched).any(), "a block that holds a pair is skipped"
    assert not (got_whole & ~whole).any(), "a block that hides a pair is not masked"
    if exact:
        assert (got_touched == touched).all() and (got_whole == whole).all()
    assert isinstance(blocks.touched, np.ndarray) == all(not isinstance(x, jax.Array) for x in options.values())


@pytest.mark.parametrize("name", ["causal", "mask_mod of heads in a band", "segments", "mask and lengths"])
def test_schedule(name):
    (queries, keys), band, _, options = CASES[name]
    blocks = Blocks.of((B, N, queries, keys), 8, 8, band, **options)
    for one in (blocks, blocks.transposed(), blocks.merged()):
        touched, whole = np.asarray(one.touched), np.asarray(one.whole)
        count, order = map(np.asarray, one.schedule())
        assert count.dtype == order.dtype == np.int32 and count.shape == (*touched.shape[:3], 2)
        for place in np.ndindex(touched.shape[:3]):
            full, cut = (list(np.flatnonzero(x)) for x in (whole[place], touched[place] & ~whole[place]))
            last = [*full, *cut][-1:] or [0]
            assert list(count[place]) == [len(full), len(cut)]
            assert list(order[place]) == [*full, *cut, *last * (touched.shape[3] - len(full) - len(cut))]


def test_query_lengths_skip_rows_beyond():
    touched = Blocks.of((B, 1, 40, 40), 8, 8, query_seq_lengths=jnp.array([17, 0])).touched
    assert (np.asarray(touched).any(3)[:, 0] == [[True, True, True, False, False], [False] * 5]).all()


def everywhere(call):
    """`call()` within every kind of trace."""
    yield "jit", jax.jit(lambda x: (call(), x)[1])
    yield "grad", jax.grad(lambda x: (call(), x)[1])
    yield "vmap", lambda x: jax.vmap(lambda x: (call(), x)[1])(x[None])
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    one = functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    yield "shard_map", jax.jit(one(lambda x: (call(), x)[1]))
    yield "scan", lambda x: jax.lax.scan(lambda c, _: (call(), c)[::-1], x, None, length=2)


def test_a_mask_mod_is_evaluated_at_once_whatever_is_traced():
    for n, (name, run) in enumerate(everywhere(lambda: found.append(Blocks.of(shape, 8, 8, mask_mod=by_head)))):
        found, shape = [], (B, N, 40, 48 + n)  # another shape each time: nothing comes from a cache
        run(jnp.float32(1))
        assert isinstance(found[0].touched, np.ndarray), name
        assert (found[0].touched[0, 1] == Blocks.of((1, 1, 40, 48 + n), 8, 8, Band(None, 0)).touched[0, 0]).all(), name


def test_what_a_modifier_takes_from_around_it():
    table, numbers = jnp.arange(N), np.arange(N)
    scored = functools.partial(modifiers.traced, scored=True)
    assert not modifiers.captured(scored(lambda s, b, h, q, k: s * np.float32(2.5) + 3))
    assert modifiers.captured(scored(lambda s, b, h, q, k: s + table[h]))
    assert modifiers.captured(scored(lambda s, b, h, q, k: s + jnp.asarray(numbers)[h]))
    assert modifiers.captured(scored(jax.jit(lambda s, b, h, q, k: s + table[h])))

    def of_a_tracer(x):
        assert any(isinstance(y, jax.core.Tracer) for y in modifiers.captured(scored(lambda s, b, h, q, k: s * x)))
        return x

    jax.jit(of_a_tracer)(jnp.float32(1))
    jax.grad(of_a_tracer)(jnp.float32(1))
    assert modifiers.no_kernel(lambda s, *_: s, dilated) is None
    assert "mask_mod captures an array of shape (3,)" in modifiers.no_kernel(None, lambda b, h, q, k: q < table[h])


def test_what_mixes_elements_is_told():
    scored = functools.partial(modifiers.traced, scored=True)
    assert modifiers.mixing(scored(lambda s, b, h, q, k: jnp.tanh(s) + jnp.where(q > k, 1.0, jnp.abs(k - q)))) is None
    for mixed in (lambda s, *_: s - s.max(), lambda s, *_: jnp.cumsum(s, 1), lambda s, *_: jax.nn.softmax(s)):
        assert modifiers.mixing(scored(mixed))


def test_slopes_of_scores():
    score = jnp.linspace(-2, 2, 6).reshape(2, 3)
    positions = (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32), jnp.arange(2)[:, None], jnp.arange(3)[None])
    value, slope = modifiers.score_and_slope(lambda s, b, h, q, k: jnp.sin(s) * (1 + q + h) - k, score, *positions)
    weight = 2 + np.arange(2)[:, None]
    assert np.allclose(value, np.sin(score) * weight - np.arange(3), atol=1e-6)
    assert np.allclose(slope, np.cos(score) * weight, atol=1e-6)
