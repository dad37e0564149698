"""decode_attention against its reference in float64, against attention without a cache, and on bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxops
from jaxops.ops.decode_attention import decode_attention
from jaxops.reference.attention import dot_product_attention as plain_attention
from jaxops.reference.decode_attention import decode_attention as reference
from tests.compare import check, error

PLAIN = {"scale": 0.3, "left": None, "logits_soft_cap": None}
DIFFERENTIABLE = ("query", "key", "value", "sinks", "key_scales", "value_scales")


def operands_of(shape, *, lengths=None, sinks=False, quantised=False, seed=0):
    """Operands for shape = (B, T, S, N, K, H); what is beyond the lengths is NaN."""
    batch, tokens, keys, heads, groups, size = shape
    random = np.random.default_rng(seed)
    made = {"query": random.standard_normal((batch, tokens, heads, size))}
    lengths = random.integers(0, keys + 1, batch) if lengths is None else np.asarray(lengths)
    beyond = np.arange(keys) >= lengths[:, None]
    for name in ("key", "value"):
        cache = (batch, keys, groups, size)
        if quantised:
            made[name] = random.integers(-4, 5, cache).astype(np.int8)
            scales = random.uniform(0.2, 0.6, (batch, groups, keys))
            made[f"{name}_scales"] = np.where(beyond[:, None], np.nan, scales)
        else:
            made[name] = np.where(beyond[:, :, None, None], np.nan, random.standard_normal(cache))
    made["lengths"] = lengths.astype(np.int32)
    if sinks:
        made["sinks"] = random.standard_normal(heads) + np.log(max(keys, 1))
    return made


def given(operands):
    return [n for n in DIFFERENTIABLE if n in operands and np.issubdtype(operands[n].dtype, np.floating)]


def called(left=None, **options):
    """The public function, called with the options of the reference."""
    return decode_attention(**options, local_window_size=left)


# (B, T, S, N, K, H), dtype, options, what `operands_of` takes. Blocks are of 256 keys: 700 is three, the last cut.
CASES = [
    ((3, 1, 700, 4, 2, 16), "float32", PLAIN, {"lengths": [700, 1, 0]}),
    ((2, 1, 255, 4, 4, 16), "bfloat16", PLAIN, {"sinks": True}),
    ((2, 1, 257, 8, 1, 16), "float16", dict(PLAIN, left=100), {}),
    ((2, 5, 300, 6, 2, 16), "float32", dict(PLAIN, logits_soft_cap=2.0), {"sinks": True, "lengths": [300, 2]}),
    ((2, 20, 700, 2, 2, 16), "bfloat16", dict(PLAIN, left=0), {"lengths": [20, 600]}),
    ((2, 1, 300, 4, 2, 16), "float32", PLAIN, {"quantised": True, "sinks": True}),
    ((2, 3, 300, 12, 2, 16), "bfloat16", dict(PLAIN, left=50), {"quantised": True}),
    ((0, 1, 5, 2, 1, 8), "float32", PLAIN, {}),
    ((2, 1, 0, 2, 1, 8), "float32", PLAIN, {}),
    ((2, 0, 5, 2, 1, 8), "float32", PLAIN, {}),
]


@pytest.mark.optimized
@pytest.mark.parametrize(("shape", "dtype", "static", "extras"), CASES, ids=str)
def test_values_and_gradients(shape, dtype, static, extras):
    operands = operands_of(shape, **extras)
    check(called, reference, operands, differentiable=given(operands), dtype=dtype, transforms=(), **static)


# What the lifting of rules gives every operator is tested with attention; here what the loops and meshes make of it.
# No NaN beyond the lengths: a direction of a derivative is made of every operand, and NaN · 0 is NaN.
TRANSFORMED = {
    False: ("vmap of grad, first operand only", "grad of grad", "shard_map, Explicit mesh", "jit, Explicit mesh"),
    True: ("hessian-vector product", "grad of scan"),
}


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
def test_transforms(quantised):
    operands = operands_of((8, 2, 300, 4, 2, 8), sinks=True, quantised=quantised)
    operands = {n: np.nan_to_num(x) if np.issubdtype(x.dtype, np.floating) else x for n, x in operands.items()}
    options = {"sharded": {name: 0 for name, x in operands.items() if x.shape[0] == 8}, **PLAIN}
    transforms = TRANSFORMED[quantised]
    check(called, reference, operands, differentiable=given(operands), transforms=transforms, **options)


def test_the_last_rows_of_attention_without_a_cache():
    o = {n: jnp.asarray(x, jnp.float32) for n, x in operands_of((2, 40, 40, 4, 2, 16), lengths=[40, 40]).items()}
    lengths = o.pop("lengths")
    full = {"scale": 0.25, "is_causal": True, "local_window_size": (9, None), "logits_soft_cap": 3.0}
    want, want_lse = plain_attention(**o, **full)
    for tokens in (1, 7, 40):
        last = o | {"query": o["query"][:, 40 - tokens :]}
        got, lse = decode_attention(
            **last, lengths=lengths.astype(jnp.int32), local_window_size=(9, None), logits_soft_cap=3.0,
            return_residual=True,
        )  # fmt: skip
        assert error(got, want[:, 40 - tokens :]) < 1e-6
        assert error(lse, want_lse.transpose(0, 2, 1)[:, 40 - tokens :]) < 1e-6


def test_one_token_needs_no_axis():
    o = {n: jnp.asarray(x) for n, x in operands_of((2, 1, 30, 4, 2, 16), lengths=[30, 0]).items()}
    want, want_lse = decode_attention(**o, return_residual=True)
    got, lse = decode_attention(**o | {"query": o["query"][:, 0]}, return_residual=True)
    assert got.shape == (2, 4, 16) and lse.shape == (2, 4) and lse.dtype == jnp.float32
    np.testing.assert_array_equal(got, want[:, 0])
    np.testing.assert_array_equal(lse, want_lse[:, 0])
    assert not np.asarray(got[1]).any() and (np.asarray(lse[1]) < -1e38).all()


def test_traced_lengths_are_clipped():
    o = {n: jnp.asarray(x, jnp.float32) for n, x in operands_of((2, 1, 30, 4, 2, 16), lengths=[30, 30]).items()}
    both = [
        jax.jit(lambda lengths: decode_attention(**o | {"lengths": lengths}))(jnp.array(lengths))
        for lengths in ([30, 0], [1 << 30, -5])
    ]
    np.testing.assert_array_equal(*both)


def test_the_cache_is_not_copied():
    """One step over a long cache holds a block of it at a time, in full precision or as integers."""
    for dtype in (jnp.bfloat16, jnp.int8):
        cache = jax.ShapeDtypeStruct((4, 8192, 4, 64), dtype)
        scales = jax.ShapeDtypeStruct((4, 4, 8192), jnp.float32)
        query, lengths = jax.ShapeDtypeStruct((4, 1, 8, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
        given = {"key_scales": scales, "value_scales": scales} if dtype == jnp.int8 else {}
        step = jax.jit(lambda query, key, value, lengths, given: decode_attention(query, key, value, lengths, **given))
        compiled = step.lower(query, cache, cache, lengths, given).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 8e6  # the cache: 16.8 MB and more, twice


def test_what_runs_where():
    shapes = {"query": (8, 32, 128), "key": (8, 8192, 8, 128), "value": (8, 8192, 8, 128)}
    o = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    o["lengths"] = jax.ShapeDtypeStruct((8,), jnp.int32)
    gradient = jax.grad(lambda query, rest: decode_attention(query, **rest).astype(jnp.float32).sum())
    rest = {name: x for name, x in o.items() if name != "query"}
    for chip in ("v5e", "h100"):
        forward, backward = jaxops.explain(gradient, o["query"], rest, target=chip).lines
        assert (forward.implementation, backward.implementation) == ("pallas", "xla")
        assert "its gradient is computed in XLA" in backward.reason
    (line,) = jaxops.explain(decode_attention, **o, target="b200").lines
    assert line.implementation == "xla" and "compute capability" in line.reason


X = operands_of((2, 3, 20, 4, 2, 8), lengths=[20, 5])
X = {n: np.asarray(x, np.float32) if np.issubdtype(x.dtype, np.floating) else x for n, x in X.items()}
INTEGERS = np.zeros((2, 20, 2, 8), np.int8)
SCALES = np.ones((2, 2, 20), np.float32)
BAD = [
    ({"query": X["query"][0, 0]}, ValueError, r"query must have shape \[B, N, H\] or \[B, T, N, H\]"),
    ({"query": X["query"].astype(np.int32)}, TypeError, "query must be float32, bfloat16 or float16, got int32"),
    ({"key": X["key"].astype(np.float16)}, TypeError, "key must have the dtype of query, float32, or int8"),
    ({"value": INTEGERS}, TypeError, "value must have the dtype of key"),
    ({"key": X["key"][..., :4]}, ValueError, "key must have shape .* with the head size of query, 8"),
    ({"value": X["value"][:, :7]}, ValueError, "value must have the shape of key"),
    ({"key": X["key"][:1], "value": X["value"][:1]}, ValueError, "key must have the batch of query"),
    ({"query": X["query"][:, :, :3]}, ValueError, "query must have a multiple of the 2 heads of key, got 3"),
    ({"lengths": np.array([1.0, 2.0])}, TypeError, "lengths must be of an integer dtype"),
    ({"lengths": np.array([1])}, ValueError, r"lengths must have shape \(2,\)"),
    ({"lengths": np.array([20, 21])}, ValueError, r"lengths must be in \[0, 20\] .* got 21"),
    ({"lengths": np.array([20, -1])}, ValueError, r"lengths must be in \[0, 20\] .* got -1"),
    ({"key": INTEGERS, "value": INTEGERS}, ValueError, "key_scales must be given for an int8 cache"),
    ({"value_scales": SCALES}, ValueError, "value_scales is for an int8 cache, not float32"),
    (
        {"key": INTEGERS, "value": INTEGERS, "key_scales": SCALES, "value_scales": SCALES[:, :, :3]},
        ValueError,
        r"value_scales must have shape \(2, 2, 20\)",
    ),
    ({"sinks": np.zeros(3, np.float32)}, ValueError, "sinks must have shape"),
    ({"scale": float("inf")}, ValueError, "scale must be finite"),
    ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be above 0"),
    ({"local_window_size": -2}, ValueError, "local_window_size must not be negative"),
    ({"local_window_size": 1.5}, TypeError, "local_window_size must be an int"),
    ({"local_window_size": (1, 2, 3)}, ValueError, "local_window_size must be left or"),
    ({"return_residual": 1}, TypeError, "return_residual must be a bool"),
    ({"implementation": "cuda"}, ValueError, "implementation must be"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input(bad, error, message):
    with pytest.raises(error, match=message):
        decode_attention(**{**X, **bad})
