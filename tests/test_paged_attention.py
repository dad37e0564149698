"""paged_attention against its reference in float64, against decode_attention, and on bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.ops.decode_attention import decode_attention
from jaxops.ops.paged_attention import paged_attention
from jaxops.reference.paged_attention import paged_attention as reference
from pallas_kernels.ragged import Cut
from tests.compare import check, error

PLAIN = {"scale": 0.3, "left": None, "logits_soft_cap": None}
DIFFERENTIABLE = ("query", "key", "value", "sinks", "key_scales", "value_scales")


def operands_of(counts, lengths, page_size, *, heads=(4, 2), size=16, left_over=0, sinks=False, quantised=False):
    """Operands of sequences with `counts` new tokens, as the reference has them; pages beyond the lengths are NaN."""
    random = np.random.default_rng(0)
    sequences, most, (N, K) = len(counts), max(1, -(-max(lengths) // page_size)), heads
    pages = sequences * most + 2
    starts = np.concatenate([[0], np.cumsum(counts)])
    table = random.permutation(pages)[: sequences * most].reshape(sequences, most)
    written = np.zeros((pages, page_size), bool)
    for row, length in zip(table, lengths, strict=True):
        written[row] = np.arange(most * page_size).reshape(most, page_size) < length
    made = {"query": random.standard_normal((starts[-1] + left_over, N, size))}
    for name in ("key", "value"):
        if quantised:
            made[name] = random.integers(-4, 5, (pages, page_size, K, size)).astype(np.int8)
            scales = random.uniform(0.2, 0.6, (pages, K, page_size))
            made[f"{name}_scales"] = np.where(written[:, None], scales, np.nan)
        else:
            cache = random.standard_normal((pages, page_size, K, size))
            made[name] = np.where(written[:, :, None, None], cache, np.nan)
    used = np.arange(most) * page_size < np.asarray(lengths)[:, None]
    table = np.where(used, table, [[1 << 20]])  # beyond a length an entry is anything
    made |= {"lengths": np.asarray(lengths), "page_table": table, "query_starts": starts}
    made |= {name: made[name].astype(np.int32) for name in ("lengths", "page_table", "query_starts")}
    if sinks:
        made["sinks"] = random.standard_normal(N) + 2
    return made


def given(operands):
    return [n for n in DIFFERENTIABLE if n in operands and np.issubdtype(operands[n].dtype, np.floating)]


def called(query, key, value, left=None, **options):
    """The public function, called with the names of the reference."""
    return paged_attention(query, key, value, local_window_size=left, **options)


MIXED = ([1, 37, 0, 16, 3], [100, 37, 9, 70, 3])  # counts, lengths: decoding, a prompt, idle, a piece of a prompt
CASES = {
    "decoding": (operands_of([1, 1, 1], [40, 1, 17], 8), "float32", PLAIN),
    "decoding a few": (operands_of([2, 2], [300, 2], 16, heads=(2, 2), left_over=1), "bfloat16", PLAIN),
    "mixed": (operands_of(*MIXED, 16, left_over=5, sinks=True), "float32", dict(PLAIN, logits_soft_cap=2.0)),
    "window": (operands_of(*MIXED, 16, heads=(6, 2)), "bfloat16", dict(PLAIN, left=20)),
    "a page for each": (operands_of([1, 40], [300, 290], 300, heads=(4, 1)), "float16", PLAIN),
    "odd pages": (operands_of([20, 30], [20, 45], 7), "float32", PLAIN),
    "quantised": (operands_of(*MIXED, 16, quantised=True, sinks=True), "float32", dict(PLAIN, left=50)),
    "more tokens than keys": (operands_of([5, 2], [3, 0], 8), "float32", PLAIN),
    "no token": (operands_of([0, 0], [3, 0], 8), "float32", PLAIN),
}


FURTHER = ("decoding", "decoding a few", "a page for each", "window", "odd pages")


@pytest.mark.optimized
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in FURTHER else n for n in CASES])
def test_values_and_gradients(name):
    operands, dtype, static = CASES[name]
    check(called, reference, operands, differentiable=given(operands), dtype=dtype, transforms=(), **static)


@pytest.mark.slow
def test_transforms():
    """Those over devices are left out: tokens of one sequence and its pages belong together, no axis can be split."""
    operands = operands_of([1, 18, 4], [40, 18, 12], 8, size=8)
    operands = {n: np.nan_to_num(x) if np.issubdtype(x.dtype, np.floating) else x for n, x in operands.items()}
    transforms = ("vmap of grad, first operand only", "grad of grad")
    check(called, reference, operands, differentiable=given(operands), transforms=transforms, **PLAIN)


def test_pages_of_one_sequence_are_a_cache():
    random = np.random.default_rng(0)
    cache = jnp.asarray(random.standard_normal((2, 3, 64, 2, 16)), jnp.float32)  # key and value
    query = jnp.asarray(random.standard_normal((3, 2, 4, 16)), jnp.float32)
    lengths = jnp.array([64, 30, 1])
    want, want_lse = decode_attention(query, *cache, lengths, return_residual=True)
    table = random.permutation(24).reshape(3, 8)
    pages = jnp.zeros((2, 24, 8, 2, 16)).at[:, table].set(cache.reshape(2, 3, 8, 8, 2, 16))
    got, lse = paged_attention(query.reshape(6, 4, 16), *pages, table, lengths, jnp.arange(4) * 2, return_residual=True)
    assert error(got, want.reshape(6, 4, 16)) < 1e-6
    assert error(np.maximum(lse, -1e3), np.maximum(want_lse, -1e3).reshape(6, 4)) < 1e-6


@pytest.mark.parametrize("rows", [1, 5])
def test_tiles_hold_every_token_once(rows):
    """Whatever the starts: each tile is of one sequence and has at most `rows` tokens, and `place` finds them."""
    random = np.random.default_rng(rows)
    for sequences, tokens in ((1, 40), (3, 7), (8, 20)):
        for _ in range(3):
            starts = np.append(0, np.sort(random.integers(0, tokens + 1, sequences)))
            cut, start = Cut(tokens, sequences, rows), jnp.asarray(starts).__getitem__
            sequence, first, end = map(np.asarray, cut.tile(jnp.arange(cut.count), start))
            tile, row = map(np.asarray, cut.place(jnp.arange(tokens), start))
            held = [(b, token) for b, low, high in zip(sequence, first, end, strict=True) for token in range(low, high)]
            assert sorted(held) == [(np.searchsorted(starts, t, side="right") - 1, t) for t in range(tokens)]
            assert (end - first <= rows).all()
            np.testing.assert_array_equal(first[tile] + row, np.arange(tokens))
            assert (row >= 0).all() and (np.arange(tokens) < end[tile]).all()


def test_what_is_traced_is_clipped():
    """Nothing outside the pages is read, and the result is that of the clipped numbers."""
    o = {n: jnp.nan_to_num(x) for n, x in operands_of([2, 2], [20, 9], 8).items()}
    o["page_table"] = jnp.array([[0, 3, 2], [1, 5, 4]])
    wrong = o | {"page_table": jnp.array([[-7, 3, 2], [1, 99, 4]]), "lengths": jnp.array([1000, 9])}
    right = o | {"page_table": jnp.array([[0, 3, 2], [1, 7, 4]]), "lengths": jnp.array([24, 9])}
    got, want = (jax.jit(called)(**{n: jnp.asarray(x) for n, x in x.items()}) for x in (wrong, right))
    np.testing.assert_array_equal(got, want)


X = {n: np.asarray(x, np.float32) if x.dtype == np.float64 else x for n, x in operands_of([2, 1], [20, 9], 8).items()}
X = {{"key": "key_pages", "value": "value_pages"}.get(n, n): x for n, x in X.items()}
INTEGERS = np.zeros(X["key_pages"].shape, np.int8)
BAD = [
    ({"query": X["query"][None]}, ValueError, r"query must have shape \[tokens, N, H\]"),
    ({"key_pages": X["key_pages"].astype(np.float16)}, TypeError, "key_pages must have the dtype of query"),
    ({"value_pages": X["value_pages"][:3]}, ValueError, "value_pages must have the shape of key_pages"),
    ({"key_pages": INTEGERS, "value_pages": INTEGERS}, ValueError, "key_scales must be given for an int8 cache"),
    ({"page_table": X["page_table"][0]}, ValueError, r"page_table must be integers \[B, most_pages\]"),
    ({"page_table": X["page_table"].astype(np.float32)}, TypeError, "page_table must be integers"),
    ({"page_table": np.array([[0, 1, 8], [2, 3, 4]])}, ValueError, r"page_table must be in \[0, 8\), .* got 8"),
    ({"page_table": np.array([[0, 1, 2], [-1, 3, 4]])}, ValueError, r"page_table must be in \[0, 8\), .* got -1"),
    ({"lengths": np.array([20, 25])}, ValueError, r"lengths must be in \[0, 24\] .* got 25"),
    ({"lengths": np.array([20, 9, 1])}, ValueError, r"lengths must have shape \(2,\)"),
    ({"query_starts": np.array([0, 2])}, ValueError, r"query_starts must have shape \(3,\)"),
    ({"query_starts": np.array([0, 2, 4])}, ValueError, r"query_starts must be in \[0, 3\]"),
    ({"query_starts": np.array([0, 3, 2])}, ValueError, "query_starts must rise from 0"),
    ({"query_starts": np.array([1, 2, 3])}, ValueError, "query_starts must rise from 0"),
    ({"query_starts": np.array([0.0, 2, 3])}, TypeError, "query_starts must be of an integer dtype"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input(bad, error, message):
    with pytest.raises(error, match=message):
        paged_attention(**{**X, **bad})
