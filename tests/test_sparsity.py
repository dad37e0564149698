"""Sparse formats, pruning, and the products with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxops
from jaxops.reference.block_sparse_matmul import block_sparse_matmul as blocks_reference
from jaxops.reference.block_sparse_matmul import columns_of
from jaxops.reference.sparse_2_4_matmul import sparse_2_4_matmul as pairs_reference
from tests.compare import check

RANDOM = np.random.default_rng(0)
MASK = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool)  # a column without any


def plain(x, w, rows, offsets, bias=None, residual=None, *, activation=None):
    options = dict(size=(offsets.shape[0] - 1) * w.shape[2], activation=activation, precision=None)
    return blocks_reference(x, w, rows, columns_of(offsets, w.shape[0]), bias, residual, **options)[0]


def blocks(mask=MASK, block=(3, 8), leading=(8, 2)):
    pattern = jaxops.BlockPattern.of(mask, block)
    k, n = pattern.shape
    normal = RANDOM.standard_normal
    given = dict(rows=pattern.rows, offsets=pattern.offsets, bias=normal(n), residual=normal((*leading, n)))
    return dict(x=normal((*leading, k)), w=normal((len(pattern.rows), *block)), **given)


@pytest.mark.parametrize("activation, dtype", [(None, "bfloat16"), (jax.nn.silu, "float32")])
def test_block_sparse_matmul(activation, dtype):
    named = ("x", "w", "bias", "residual")
    options = dict(transforms=(), activation=activation)
    check(jaxops.block_sparse_matmul, plain, blocks(), differentiable=named, dtype=dtype, **options)


@pytest.mark.slow
def test_block_sparse_matmul_under_every_transform():
    options = dict(sharded={"x": 0, "residual": 0}, activation=jax.nn.silu)
    check(jaxops.block_sparse_matmul, plain, blocks(), differentiable=("x", "w", "bias", "residual"), **options)


@pytest.mark.parametrize("mask", [np.zeros((2, 3), bool), np.ones((2, 3), bool), np.ones((2, 0), bool)])
def test_nothing_and_everything_is_stored(mask):
    operands = blocks(mask, (4, 2), (5,))
    got = jaxops.block_sparse_matmul(**{name: jnp.asarray(x) for name, x in operands.items()})
    dense = np.zeros((8, 2 * mask.shape[1]))
    for i, (row, column) in enumerate(zip(*np.nonzero(mask.T)[::-1], strict=True)):
        dense[4 * row : 4 * row + 4, 2 * column : 2 * column + 2] = operands["w"][i]
    exact = operands["x"] @ dense + operands["bias"] + operands["residual"]
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_a_block_sparse_weight_is_a_pytree_that_trains():
    dense = np.where(np.repeat(np.repeat(MASK, 3, 0), 8, 1), RANDOM.standard_normal((15, 32)), 0).astype("float32")
    w = jaxops.BlockSparse.from_dense(dense, (3, 8))
    np.testing.assert_array_equal(w.to_dense(), dense)
    np.testing.assert_array_equal(w.pattern.mask, MASK)
    assert w.pattern.density == MASK.mean() and len(jax.tree.leaves(w)) == 1
    again = jaxops.BlockSparse.from_dense(dense, pattern=jaxops.BlockPattern.of(MASK, (3, 8)))
    assert again.pattern == w.pattern and hash(again.pattern) == hash(w.pattern)
    x = jnp.asarray(RANDOM.standard_normal((4, 15)), jnp.float32)
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(w, state):
        gradient = jax.grad(lambda w: jnp.square(jaxops.block_sparse_matmul(x, w) - 1).sum())(w)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(w, updates), state

    moved, _ = step(w, optimizer.init(w))
    assert moved.pattern == w.pattern
    assert np.all((np.asarray(moved.to_dense()) != 0) == (dense != 0))
    both = jax.vmap(lambda x: jaxops.block_sparse_matmul(x, w))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(both[1], 2 * x @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k, dtype", [(4, "float32"), (132, "bfloat16")])
def test_2_4_comes_back_exactly(k, dtype):
    w = jaxops.prune(jnp.asarray(RANDOM.standard_normal((k, 7)), dtype), pattern="2:4")
    w = w.at[:4, 0].set(0).at[4 % k, 1].set(0)  # groups of fewer than 2
    packed = jaxops.Sparse24.from_dense(w)
    assert packed.shape == w.shape and packed.values.shape == (k // 2, 7) and packed.indices.shape == (-(-k // 8), 7)
    np.testing.assert_array_equal(packed.to_dense(), w)
    y = jaxops.sparse_2_4_matmul(jnp.ones((3, k), dtype), packed)
    np.testing.assert_array_equal(y, jaxops.matmul(jnp.ones((3, k), dtype), w))


@pytest.mark.parametrize("transforms", [(), pytest.param(None, marks=pytest.mark.slow)], ids=["none", "all"])
def test_sparse_2_4_matmul(transforms):
    def plain(x, w, indices, bias, *, activation):
        return pairs_reference(x, w, indices, bias, activation=activation, precision=None)[0]

    operands = dict(
        x=RANDOM.standard_normal((8, 2, 20)),
        w=RANDOM.standard_normal((10, 5)),
        indices=RANDOM.integers(0, 256, (3, 5)).astype(np.uint8),
        bias=RANDOM.standard_normal(5),
    )
    options = dict(sharded={"x": 0}, transforms=transforms, activation=jax.nn.gelu)
    check(jaxops.sparse_2_4_matmul, plain, operands, differentiable=("x", "w", "bias"), **options)


def test_pruning_keeps_the_largest():
    w = jnp.asarray(RANDOM.standard_normal((16, 24)), jnp.float32)
    kept = np.asarray(jaxops.prune_mask(w, 0.7))
    assert kept.sum() == w.size - round(0.7 * w.size)
    assert np.abs(w)[kept].min() >= np.abs(w)[~kept].max()
    kept = np.asarray(jaxops.prune_mask(w, 0.75, pattern="blocks", block=(4, 8)))
    sums = np.asarray(w**2).reshape(4, 4, 3, 8).sum((1, 3))
    whole = kept.reshape(4, 4, 3, 8).all((1, 3))
    assert whole.sum() == 3 and kept.sum() == 3 * 32 and sums[whole].min() >= sums[~whole].max()
    kept = np.asarray(jaxops.prune_mask(w, pattern="2:4")).reshape(4, 4, 24)
    assert np.all(kept.sum(1) == 2)
    assert np.all(
        np.where(kept, np.abs(w).reshape(4, 4, 24), np.inf).min(1) >= np.sort(np.abs(w).reshape(4, 4, 24), 1)[:, 2]
    )
    np.testing.assert_array_equal(jaxops.prune(w, 0.7) != 0, jaxops.prune_mask(w, 0.7))
    assert jaxops.prune_mask(jnp.zeros(10), 0.5).sum() == 5  # also among equals
    assert jax.jit(jaxops.prune_mask)(w, 0.25).sum() == w.size - w.size // 4  # a traced share


def test_the_schedule_is_that_of_zhu_and_gupta():
    sparsity = jaxops.pruning_schedule(0.9, 100, 300, initial=0.1)
    steps = np.array([0, 100, 150, 200, 300, 1000])
    left = 1 - np.clip((steps - 100) / 200, 0, 1)
    np.testing.assert_allclose([sparsity(s) for s in steps], 0.9 + (0.1 - 0.9) * left**3, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(sparsity)(200), sparsity(200), rtol=1e-6)


def test_the_pattern_is_a_block_mask_of_attention():
    window = jaxops.BlockPattern.of(abs(np.subtract.outer(np.arange(3), np.arange(3))) <= 1, (8, 8))
    seen = np.kron(window.mask, np.ones((8, 8), bool))
    query, key, value = (jnp.asarray(RANDOM.standard_normal((1, 24, 2, 8)), jnp.float32) for _ in range(3))
    logits = np.where(seen, np.einsum("btnh,bsnh->bnts", query, key) / 8**0.5, -np.inf)
    exact = np.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)

    def looked_up(batch, head, query, key):
        return jnp.asarray(window.mask.ravel())[query // 8 * 3 + key // 8]

    for told in (dict(mask=jnp.asarray(seen)[None, None]), dict(mask_mod=looked_up)):
        np.testing.assert_allclose(jaxops.dot_product_attention(query, key, value, **told), exact, atol=1e-5)


X, W, R, O = jnp.ones((2, 6)), jnp.ones((2, 3, 4)), np.array([0, 1]), np.array([0, 1, 2])
V, I = jnp.ones((4, 3)), jnp.ones((1, 3), jnp.uint8)
call, pairs = jaxops.block_sparse_matmul, jaxops.sparse_2_4_matmul
WRONG = [
    (lambda: call(X, W), ValueError, "rows and offsets must be given for a w that is no BlockSparse"),
    (lambda: call(X, W[0], rows=R, offsets=O), ValueError, r"w must be blocks \(s, bk, bn\) with bk dividing 6"),
    (lambda: call(X[:, :5], W, rows=R, offsets=O), ValueError, r"bk dividing 5, got \(2, 3, 4\)"),
    (lambda: call(X, W, rows=R + 1, offsets=O), ValueError, r"rows must be in \[0, 2\), got 2"),
    (lambda: call(X, W, rows=R, offsets=O[::-1]), ValueError, "offsets must rise from 0 to 2, the number of blocks"),
    (lambda: call(X, W, rows=R[:1], offsets=O), ValueError, r"rows must have shape \(2,\) \(one for each block\)"),
    (lambda: call(X, W, rows=R * 1.0, offsets=O), TypeError, "rows must be of an integer dtype, got float32"),
    (lambda: call(X, W, rows=R, offsets=O, bias=jnp.ones(7)), ValueError, r"bias must have shape \(8,\)"),
    (lambda: call(X, W, rows=R, offsets=O, implementation="pallas"), ValueError, "multiples of 128, got 3 × 4"),
    (lambda: call(X[:, :4], jaxops.BlockSparse.from_dense(X, (1, 2))), ValueError, r"w must have shape \(4, n\)"),
    (lambda: jaxops.BlockPattern([0], [0, 1], (6, 4), (4, 4)), ValueError, r"blocks of 4 × 4 must divide .* \(6, 4\)"),
    (lambda: jaxops.BlockPattern([1, 0], [0, 2], (6, 4), (3, 4)), ValueError, "rows must rise in every column"),
    (lambda: jaxops.BlockPattern([2], [0, 1], (6, 4), (3, 4)), ValueError, r"rows must be in \[0, 2\), got 2"),
    (lambda: jaxops.BlockPattern([0.5], [0, 1], (6, 4), (3, 4)), ValueError, "rows must be integers along one axis"),
    (lambda: jaxops.BlockPattern.of(R, (1, 1)), ValueError, "mask must be boolean and have two axes"),
    (lambda: jaxops.BlockSparse.from_dense(X), ValueError, "one of block and pattern must be given"),
    (lambda: jaxops.BlockSparse.from_dense(X, (2, 4)), ValueError, r"blocks of 2 × 4 must divide the matrix \(2, 6\)"),
    (lambda: jax.jit(lambda w: jaxops.BlockSparse.from_dense(w, (1, 2)))(X), TypeError, "w must be known where there"),
    (
        lambda: jaxops.Sparse24.from_dense(jnp.ones((8, 2)).at[0:2].set(0).at[4:6, 0].set(0)),
        ValueError,
        "w must be 2:4 along its rows, got 4 numbers that are not 0 in rows 4 … 7 of column 1",
    ),
    (lambda: jaxops.Sparse24.from_dense(jnp.ones((6, 2))), ValueError, r"k a multiple of 4, got \(6, 2\)"),
    (lambda: pairs(X, V), ValueError, "indices must be given for a w that is no Sparse24"),
    (lambda: pairs(X, V, indices=I), ValueError, r"w must have values \(k / 2, n\) for x \(2, 6\)"),
    (lambda: pairs(jnp.ones((2, 8)), V, indices=I.astype(int)), TypeError, "indices must be uint8, got int32"),
    (lambda: pairs(jnp.ones((2, 8)), V, indices=I.T), ValueError, r"indices must have shape \(1, 3\), 2 bits a value"),
    (lambda: pairs(jnp.ones((2, 8)), V, indices=I, implementation="pallas"), ValueError, "no unit for 2:4 sparsity"),
    (lambda: jaxops.prune(X, 1.5), ValueError, "sparsity must be from 0 to 1, got 1.5"),
    (lambda: jaxops.prune(X, 0.5, pattern="rows"), ValueError, "pattern must be 'unstructured', 'blocks' or '2:4'"),
    (lambda: jaxops.prune(X, 0.5, pattern="blocks"), ValueError, "block must be given for pattern='blocks' alone"),
    (lambda: jaxops.prune(X, 0.5, pattern="2:4"), ValueError, "sparsity must be given, but for pattern='2:4'"),
    (lambda: jaxops.prune(X, pattern="2:4"), ValueError, "a multiple of 4 rows for '2:4', got 2"),
    (lambda: jaxops.prune(R, 0.5), TypeError, "w must be of a floating dtype, got int32"),
    (lambda: jaxops.pruning_schedule(0.5, 3, 3), ValueError, "0 ≤ begin < end must hold, got begin 3 and end 3"),
    (lambda: jaxops.pruning_schedule(0.5, 0, 3, initial=0.6), ValueError, "initial 0.6 and final 0.5"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG)
def test_bad_input(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
