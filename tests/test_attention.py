"""dot_product_attention against its reference in float64, against `jax.nn.dot_product_attention`, and on bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxops
from jaxops.ops.attention import dot_product_attention
from jaxops.reference.attention import dot_product_attention as reference_of_rows
from jaxops.workbench import comparison
from tests.compare import check, error, some_and_all

PLAIN = {"scale": 0.3, "is_causal": False, "local_window_size": None, "logits_soft_cap": None}
CAUSAL = dict(PLAIN, is_causal=True)
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")


def reference(dropout_key=None, **operands):
    return reference_of_rows(dropout_rows=dropout_key, **operands)


def bent(score, batch, head, query, key):
    return jnp.sin(score) * (1 + head) + 0.01 * (query - key) - 0.2 * batch


def blockwise(batch, head, query, key):
    """Whole blocks of 128 that are seen, that are not, and with every third key; other ones for every head."""
    kind = (query // 128 + 2 * (key // 128) + head) % 3
    return (kind == 0) | ((kind == 1) & (key % 3 == 0))


def operands_of(shape, *extras, seed=0):
    """query, key, value for shape = (B, T, S, N, K, H) or (…, H, V), and the named extras, a bias or mask by shape."""
    batch, queries, keys, heads, groups, size, *value_size = shape
    random = np.random.default_rng(seed)
    normal, integers = random.standard_normal, random.integers
    made = {"query": normal((batch, queries, heads, size)), "key": normal((batch, keys, groups, size))}
    made["value"] = normal((batch, keys, groups, *(value_size or [size])))
    for extra in extras:
        name, *detail = extra if isinstance(extra, tuple) else (extra,)
        if name == "bias":
            made[name] = normal(*detail)
        elif name == "mask":
            made[name] = random.random(*detail) < 0.6
        elif name == "sinks":
            made[name] = normal(heads) + np.log(max(keys, 1))  # weighs about as much as all keys do
        elif name == "lengths":
            made["query_seq_lengths"] = integers(0, queries + 1, batch).astype(np.int32)
            made["key_value_seq_lengths"] = integers(0, keys + 1, batch).astype(np.int32)
        elif name == "prefix":
            made["prefix_lengths"] = integers(0, keys + 1, batch).astype(np.int32)
        elif name == "alibi":
            made["alibi_slopes"] = 0.5 ** np.arange(heads)
        elif name == "dropout":
            made["dropout_key"] = np.asarray(jaxops.dropout_rows(jax.random.key(seed), batch, heads, queries))
        else:  # sorted segment ids, as in packed batches, and an id of the keys that no query has
            made["query_segment_ids"] = np.sort(integers(0, 3, (batch, queries))).astype(np.int32)
            made["key_value_segment_ids"] = np.sort(integers(0, 4, (batch, keys))).astype(np.int32)
    return made


def given(operands):
    return tuple(name for name in DIFFERENTIABLE if name in operands)


# (B, T, S, N, K, H), dtype, options, extras. The large ones go through several tiles, with a remainder or none. Sinks
# stand where a gradient would be 0 without them, of which only rounding is left: one key, a bias that all keys share.
CASES = [
    ((1, 1, 1, 1, 1, 16), "float32", PLAIN, ("sinks",)),
    ((2, 1, 1000, 4, 2, 16), "float32", PLAIN, ("lengths",)),
    ((1, 127, 129, 2, 1, 16), "float32", CAUSAL, ()),
    ((1, 129, 127, 2, 2, 64), "float32", CAUSAL, ("sinks",)),
    ((2, 128, 128, 2, 1, 80), "bfloat16", CAUSAL, ()),
    pytest.param((1, 33, 65, 1, 1, 96), "float16", PLAIN, (), marks=pytest.mark.slow),
    ((1, 20, 30, 2, 1, 192), "bfloat16", PLAIN, (("bias", (1, 2, 20, 30)),)),
    pytest.param((1, 30, 20, 1, 1, 256), "float32", PLAIN, (), marks=pytest.mark.slow),
    ((1, 1000, 1, 2, 2, 16), "float32", PLAIN, ("sinks",)),
    pytest.param((1, 1000, 1000, 1, 1, 16), "float32", CAUSAL, (), marks=pytest.mark.slow),
    ((1, 1000, 1000, 2, 1, 16), "bfloat16", CAUSAL, ("sinks",)),
    pytest.param(
        (1, 1000, 600, 1, 1, 16), "float32", dict(PLAIN, local_window_size=(90, 40)), (), marks=pytest.mark.slow
    ),
    ((1, 600, 1000, 1, 1, 16), "float32", dict(CAUSAL, local_window_size=(100, None), logits_soft_cap=2.0), ()),
    pytest.param(
        (1, 600, 700, 2, 1, 16),
        "float32",
        PLAIN,
        (("bias", (1, 2, 600, 700)), ("mask", (1, 1, 600, 700))),
        marks=pytest.mark.slow,
    ),
    ((2, 600, 700, 2, 2, 16), "float32", CAUSAL, (("bias", (2, 1, 1, 700)), "lengths", "sinks")),
    ((2, 600, 600, 1, 1, 16), "float16", CAUSAL, ("segments",)),
    pytest.param(
        (2, 600, 600, 1, 1, 16),
        "float32",
        PLAIN,
        ("segments", "lengths", ("mask", (1, 1, 600, 1))),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        (1, 600, 600, 2, 2, 16),
        "float32",
        dict(PLAIN, logits_soft_cap=1.5),
        (("bias", (1, 2, 600, 1)), "sinks"),
        marks=pytest.mark.slow,
    ),
    (
        (2, 40, 50, 4, 2, 16),
        "float32",
        dict(CAUSAL, local_window_size=(0, 0)),
        ("lengths", ("bias", (1, 4, 1, 1)), "sinks"),
    ),
    ((2, 600, 700, 2, 1, 16, 24), "float32", dict(CAUSAL, dropout_rate=0.3), ("prefix", "dropout", "sinks")),
    ((1, 600, 600, 2, 2, 16), "bfloat16", dict(CAUSAL, local_window_size=(100, 0)), ("prefix", "segments", "alibi")),
    (
        (1, 600, 600, 2, 1, 32, 16),
        "float32",
        dict(PLAIN, logits_soft_cap=2.0, score_mod=bent),
        (("bias", (1, 2, 600, 600)), "alibi"),
    ),
    (
        (2, 600, 520, 2, 1, 16),
        "float32",
        dict(PLAIN, mask_mod=blockwise, score_mod=bent, dropout_rate=0.1),
        ("lengths", "dropout"),
    ),
    (
        (2, 40, 50, 4, 2, 16, 8),
        "float16",
        dict(CAUSAL, mask_mod=blockwise, score_mod=bent, dropout_rate=0.5),
        ("prefix", "alibi", "dropout", "lengths", ("mask", (2, 1, 40, 50)), "sinks"),
    ),
    pytest.param(
        (2, 3, 50, 4, 2, 16),
        "float32",
        dict(PLAIN, score_mod=bent, dropout_rate=0.5),
        ("alibi", "dropout", "sinks"),
        marks=pytest.mark.slow,
    ),
    ((0, 4, 5, 2, 1, 8), "float32", CAUSAL, ()),
    ((2, 4, 0, 2, 1, 8, 9), "float32", dict(PLAIN, score_mod=bent, mask_mod=blockwise), ("alibi", "prefix")),
    ((2, 4, 0, 2, 1, 8), "float32", PLAIN, ()),
    ((2, 4, 5, 2, 1, 0), "float32", PLAIN, ()),
]


def words(value):
    """A parameter in words that are the same in every process: functions by their names."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {getattr(x, '__name__', x)}" for name, x in value.items())


@pytest.mark.optimized
@pytest.mark.parametrize(("shape", "dtype", "static", "extras"), CASES, ids=words)
def test_values_and_gradients(shape, dtype, static, extras):
    operands = operands_of(shape, *extras)
    check(
        dot_product_attention,
        reference,
        operands,
        differentiable=given(operands),
        dtype=dtype,
        transforms=(),
        **static,
    )


@pytest.mark.slow
def test_the_gradient_of_a_bias_that_all_keys_share():
    """In several tiles. Its terms cancel but for what sinks take: the rounding of out was seen, 12 times as large."""
    random = np.random.default_rng(2503)
    array = lambda *shape: jnp.asarray(random.standard_normal(shape), "float16")
    operands = {"query": array(2, 255, 4, 16), "key": array(2, 300, 2, 16), "value": array(2, 300, 2, 48)}
    operands |= {"bias": array(1, 4, 1, 1), "mask": jnp.asarray(random.random((2, 1, 1, 300)) < 0.7)}
    operands |= {"sinks": jnp.asarray(random.standard_normal(4), "float32")}
    operands |= {"prefix_lengths": jnp.asarray(random.integers(0, 301, 2), "int32")}
    grown = lambda score, batch, head, query, key: score * (0.5 + head) + 0.01 * (query - key)
    call = lambda **operands: jaxops.dot_product_attention(
        **operands, is_causal=True, local_window_size=5, score_mod=grown
    )
    wrong = [row for row in comparison.against_float64(call, operands) if not row.holds]
    assert not wrong, wrong[0]


def bent_alike(score, batch, head, query, key):
    """As on one device where the batch is split over several: a modifier counts within its call."""
    return bent(score, 0, head, query, key)


# 32 heads of the batch make the tiles 128 × 128: every transform meets several, and their loops.
TRANSFORMED = {
    "lengths and sinks": (CAUSAL, ("lengths", "sinks")),
    "bias and mask": (dict(PLAIN, logits_soft_cap=2.0), (("bias", (1, 4, 140, 150)), ("mask", (8, 1, 1, 150)))),
    "modifiers": (
        dict(CAUSAL, score_mod=bent_alike, mask_mod=blockwise, dropout_rate=0.25),
        ("prefix", "alibi", "dropout"),
    ),
}


def transformed(name, transforms):
    static, extras = TRANSFORMED[name]
    operands = operands_of((8, 140, 150, 4, 2, 8), *extras)
    sharded = {operand: 0 for operand, x in operands.items() if x.shape[0] == 8}
    options = dict(differentiable=given(operands), sharded=sharded, transforms=transforms)
    check(dot_product_attention, reference, operands, **options, **static)


@some_and_all
def test_transforms(transforms):
    transformed("lengths and sinks", transforms)


@pytest.mark.slow
def test_transforms_of_a_bias():
    transformed("bias and mask", None)


@pytest.mark.slow
def test_transforms_of_modifiers():
    """One of each kind: the others differ in nothing that a modifier would meet."""
    transformed("modifiers", ("linearize", "vmap of grad", "grad of grad", "shard_map, Explicit mesh"))


def test_lengths_under_vmap():
    o = {name: jnp.asarray(x) for name, x in operands_of((8, 140, 150, 4, 2, 8)).items()}
    o = {name: x.astype(jnp.float32) for name, x in o.items()}
    lengths = jnp.array([[150] * 8, [3] * 8, [140] * 8], jnp.int32)

    def one(length):
        return dot_product_attention(**o, key_value_seq_lengths=length)

    assert error(jax.jit(jax.vmap(one))(lengths), jnp.stack([one(length) for length in lengths])) < 1e-6


def test_the_same_key_drops_the_same_pairs_everywhere():
    # An identity as the values shows the weights.
    batch, heads, queries, keys = 8, 4, 40, 150
    random = np.random.default_rng(0)
    query, key = (jnp.asarray(random.standard_normal((batch, n, heads, 8)), jnp.float32) for n in (queries, keys))
    value = jnp.broadcast_to(jnp.eye(keys)[:, None], (batch, keys, heads, keys))
    dropout = {"dropout_rate": 0.3, "dropout_key": jax.random.key(5)}

    @jax.jit
    def weights(query, key, value, dropout_key):
        return dot_product_attention(query, key, value, dropout_rate=0.3, dropout_key=dropout_key)

    whole, some = dot_product_attention(query, key, value), weights(query, key, value, dropout["dropout_key"])
    dropped = np.asarray(some == 0)
    assert abs(dropped.mean() - 0.3) < 0.005
    np.testing.assert_allclose(some, jnp.where(dropped, 0, whole / 0.7), rtol=1e-5, atol=1e-7)
    again = functools.partial(np.testing.assert_allclose, desired=some, rtol=1e-5, atol=1e-7)

    rows = jaxops.dropout_rows(dropout["dropout_key"], batch, heads, queries)
    again(weights(query, key, value, rows))
    again(weights(query, key, value, jax.random.key_data(dropout["dropout_key"])))
    one_by_one = jax.vmap(lambda *xs: weights(*(x[None] for x in xs))[0])
    again(one_by_one(query, key, value, rows))
    keys_of = jax.random.split(jax.random.key(7), 3)
    mapped = jax.vmap(weights, (None, None, None, 0))(query, key, value, keys_of)
    np.testing.assert_allclose(mapped[2], weights(query, key, value, keys_of[2]), rtol=1e-5, atol=1e-7)

    # The backward drops the same: dv = (z ∘ p)ᵀ dout.
    cotangent = jnp.asarray(random.standard_normal(some.shape), jnp.float32)
    for f in (weights, jax.checkpoint(weights)):
        loss = lambda value, f=f: jnp.vdot(f(query, key, value, dropout["dropout_key"]), cotangent)
        want = jnp.einsum("btns,btnv->bsnv", some, cotangent)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(value), want, rtol=1e-4, atol=1e-5)

    spec, spec_of_rows = PartitionSpec("batch", None, "heads"), PartitionSpec("batch", "heads")
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value)]
            if kind == AxisType.Auto:
                by_hand = jax.shard_map(weights, in_specs=(spec, spec, spec, spec_of_rows), out_specs=spec)
                placed_rows = jax.device_put(rows, NamedSharding(mesh, spec_of_rows))
                again(jax.device_get(jax.jit(by_hand)(*placed, placed_rows)))
            again(jax.device_get(weights(*placed, dropout["dropout_key"])))


# What jax.nn.dot_product_attention understands, argument by argument: (B, T, S, N, K, H), options.
THEIRS = {
    "plain": ((2, 50, 70, 4, 4, 16), {}),
    "grouped": ((2, 50, 70, 6, 2, 16), {}),
    "one key head": ((2, 50, 70, 4, 1, 16), {}),
    "scale": ((2, 50, 70, 2, 2, 16), {"scale": 0.05}),
    "negative scale": ((2, 50, 70, 2, 2, 16), {"scale": -0.2}),
    "causal, more keys": ((1, 50, 70, 2, 2, 16), {"is_causal": True}),
    "causal, more queries": ((1, 70, 50, 2, 2, 16), {"is_causal": True}),
    "bias of every query": ((2, 50, 70, 4, 2, 16), {"bias": (2, 4, 50, 70)}),
    "bias of heads": ((2, 50, 70, 4, 2, 16), {"bias": (1, 4, 1, 1)}),
    "bias of keys": ((2, 50, 70, 4, 2, 16), {"bias": (2, 1, 1, 70)}),
    "bias without batch": ((2, 50, 70, 4, 2, 16), {"bias": (4, 50, 70)}),
    "mask of batch": ((2, 50, 70, 4, 2, 16), {"mask": (2, 1, 50, 70)}),
    "mask of heads": ((2, 50, 70, 4, 2, 16), {"mask": (4, 1, 70)}),
    "window": ((1, 50, 50, 2, 2, 16), {"local_window_size": (7, 3)}),
    "window, int, causal": ((1, 50, 50, 2, 2, 16), {"local_window_size": 5, "is_causal": True}),
    "lengths": ((2, 50, 70, 2, 2, 16), {"query_seq_lengths": [50, 31], "key_value_seq_lengths": [1, 44]}),
    "several tiles": ((1, 600, 700, 2, 2, 16), {"is_causal": True, "key_value_seq_lengths": [555]}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", THEIRS)
def test_against_jax(name, dtype):
    shape, options = THEIRS[name]
    random = np.random.default_rng(1)
    operands = {n: jnp.asarray(x, dtype) for n, x in operands_of(shape).items()}
    options = dict(options)
    if "bias" in options:
        operands["bias"] = jnp.asarray(random.standard_normal(options.pop("bias")), dtype)
    if "mask" in options:
        options["mask"] = jnp.asarray(random.random(options["mask"]) < 0.7).at[..., 0].set(True)  # no empty row
    for key in ("query_seq_lengths", "key_value_seq_lengths"):
        if key in options:
            options[key] = jnp.asarray(options[key], jnp.int32)
    weights = jnp.asarray(random.standard_normal(operands["query"].shape), jnp.float32)

    def everything(attention):
        def loss(operands):
            out, lse = attention(**operands, **options, return_residual=True)
            return jnp.sum(out * weights), (out, lse)

        gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(operands)
        return {"out": out, "lse": lse, **gradients}

    got, want = everything(dot_product_attention), everything(jax.nn.dot_product_attention)
    for what, like in want.items():
        assert got[what].shape == like.shape and got[what].dtype == like.dtype, what
        allowed = 2e-5 if dtype == "float32" else 3e-2
        # A bias that is the same for all keys has gradient 0, of which only rounding is left: an absolute slack.
        scale = max(float(jnp.abs(like.astype(jnp.float32)).max()), 1.0)
        assert error(got[what], like) * float(jnp.abs(like.astype(jnp.float32)).max()) <= allowed * scale, what


def test_without_batch():
    o = {name: jnp.asarray(x[0], jnp.float32) for name, x in operands_of((1, 20, 30, 4, 2, 16)).items()}
    got = dot_product_attention(**o, is_causal=True, return_residual=True)
    want = jax.nn.dot_product_attention(**o, is_causal=True, return_residual=True)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and error(a, b) < 1e-6
    ids = np.repeat([0, 1], 10)
    packed = dot_product_attention(o["query"], o["key"][:20], o["value"][:20], query_segment_ids=ids)
    halves = [dot_product_attention(*(o[n][at] for n in o)) for at in (slice(0, 10), slice(10, 20))]
    assert error(packed, jnp.concatenate(halves)) < 1e-6


@pytest.mark.parametrize("hidden", ["mask", "infinite bias", "most negative bias", "length", "window"])
@pytest.mark.parametrize(("queries", "keys"), [(40, 50), (600, 700)])
def test_rows_that_see_nothing(hidden, queries, keys):
    o = {name: jnp.asarray(x, jnp.float32) for name, x in operands_of((1, queries, keys, 1, 1, 16)).items()}
    row = jnp.arange(queries)[:, None]
    lowest = jnp.finfo(jnp.float32).min
    options, dark = {
        "mask": ({"mask": row != 7}, row == 7),
        "infinite bias": ({"bias": jnp.where(row == 7, -jnp.inf, 0.0)}, row == 7),
        "most negative bias": ({"bias": jnp.where(row == 7, lowest, 0.0)}, row == 7),
        "length": ({"key_value_seq_lengths": jnp.array([0])}, row >= 0),
        "window": ({"local_window_size": (keys // 10, 0), "query_seq_lengths": jnp.array([30])}, row >= 30),
    }[hidden]
    dark = dark[:, 0]

    def loss(o):
        out, lse = dot_product_attention(**o, **options, return_residual=True)
        return jnp.sum(jnp.sin(out)), (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(o)
    out, lse = out[0, :, 0], lse[0, :, 0]
    assert not np.asarray(out[dark]).any() and np.all(np.asarray(lse[dark]) < -1e38) and np.isfinite(lse).all()
    assert np.abs(np.asarray(out[~dark])).min(initial=1) > 0
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
    assert not np.asarray(gradients["query"][0, dark]).any()
    second = jax.jit(jax.grad(lambda o: sum(jnp.sum(g**2) for g in jax.grad(lambda o: loss(o)[0])(o).values())))(o)
    assert all(np.isfinite(g).all() for g in second.values())


def test_a_sink_is_a_key_without_a_value():
    o = {name: jnp.asarray(x, jnp.float32) for name, x in operands_of((2, 20, 30, 4, 2, 16)).items()}
    sinks = jnp.array([-1.0, 0.0, 2.0, 40.0])
    key, value = (jnp.pad(o[name], ((0, 0), (0, 1), (0, 0), (0, 0))) for name in ("key", "value"))
    bias = jnp.zeros((1, 4, 1, 31)).at[:, :, :, -1].set(sinks[:, None])
    want = jax.nn.dot_product_attention(o["query"], key, value, bias, return_residual=True)
    got = dot_product_attention(**o, sinks=sinks, return_residual=True)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-6


def test_modifiers_are_what_the_options_say():
    o = {name: jnp.asarray(x, jnp.float32) for name, x in operands_of((2, 600, 700, 2, 1, 16)).items()}
    slopes, prefix, doc = jnp.array([0.5, 0.1]), jnp.array([300, 0]), np.sort(np.arange(700) % 5)
    pairs = {  # a captured array is allowed in XLA
        "alibi": (  # 0 / 0 beyond the last query or key, where no modifier is asked
            {"alibi_slopes": slopes},
            {"score_mod": lambda s, b, h, q, k: s - slopes[h] * abs(q - k) + 0 / (600 - q) + 0 / (700 - k)},
        ),
        "prefix": (
            {"is_causal": True, "prefix_lengths": prefix},
            {"mask_mod": lambda b, h, q, k: (q >= k) | (k < prefix[b])},
        ),
        "segments": (
            {"query_segment_ids": np.stack([doc[:600]] * 2), "key_value_segment_ids": np.stack([doc] * 2)},
            {"mask_mod": lambda b, h, q, k: jnp.asarray(doc)[q] == jnp.asarray(doc)[k]},
        ),
    }
    for name, ways in pairs.items():
        one, other = (
            jax.jit(jax.value_and_grad(lambda o, way=way: jnp.sum(jnp.sin(dot_product_attention(**o, **way)))))(o)
            for way in ways
        )
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert error(a, b) < 1e-5, name


def test_traced_scale_and_array_scale():
    o = {name: jnp.asarray(x, jnp.float32) for name, x in operands_of((1, 20, 30, 2, 2, 16)).items()}
    want = jax.nn.dot_product_attention(**o, scale=0.37)
    assert error(dot_product_attention(**o, scale=jnp.float32(0.37)), want) < 1e-6
    assert error(jax.jit(lambda scale: dot_product_attention(**o, scale=scale))(0.37), want) < 1e-6


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scales_that_turn_the_order_of_the_logits(scale):
    o = {name: jnp.asarray(x, jnp.float32) for name, x in operands_of((1, 150, 300, 2, 1, 16)).items()}

    def gradients(f):
        options = dict(scale=scale, is_causal=True)
        return jax.value_and_grad(lambda *xs: jnp.sum(jnp.sin(f(*xs, **options))), (0, 1, 2))(*o.values())

    for got, want in zip(
        jax.tree.leaves(gradients(dot_product_attention)),
        jax.tree.leaves(gradients(jax.nn.dot_product_attention)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_memory_grows_with_the_length_not_its_square():
    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)

    def both(query, key, value, cotangent):
        out, pull_back = jax.vjp(lambda *o: dot_product_attention(*o, is_causal=True), query, key, value)
        return out, pull_back(cotangent)

    compiled = jax.jit(both).lower(x, x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 64e6


X = np.zeros((2, 6, 4, 8), np.float32)
SHORT = np.zeros((2, 3, 2, 8), np.float32)
LONG = np.zeros((2, 4, 100, 8), np.float32)
BAD = [
    ({"query": X[0, 0]}, ValueError, "query must have shape"),
    ({"query": X.astype(np.int32)}, TypeError, "query must be of a floating dtype"),
    ({"key": X.astype(np.float16)}, TypeError, "key must have the dtype of query, float32, got float16"),
    ({"key": X[:, :, :, :4], "value": X[:, :, :, :4]}, ValueError, "key must have the head size of query"),
    ({"key": X[:1], "value": X[:1]}, ValueError, "key must have the batch of query"),
    ({"value": SHORT}, ValueError, "value must have the shape of key but for the last axis"),
    ({"key": X[:, :, :3], "value": X[:, :, :3]}, ValueError, "multiple of the 3 heads of key, got 4"),
    ({"query": LONG, "key": LONG[:, :2, :70], "value": LONG[:, :2, :70]}, ValueError, "this looks like BNTH"),
    (
        {"query": LONG, "key": LONG, "value": LONG, "mask": np.ones((2, 1, 100, 100), bool)},
        ValueError,
        "this looks like BNTH",
    ),
    ({"mask": np.ones((2, 1, 6, 6), np.float32)}, TypeError, "an additive mask goes into bias"),
    ({"mask": np.ones((2, 1, 6, 5), bool)}, ValueError, r"mask must broadcast to \(2, 4, 6, 6\)"),
    ({"bias": np.ones((2, 1, 6, 6), bool)}, TypeError, "a boolean mask goes into mask"),
    ({"bias": np.ones((2, 1, 6, 6), np.int32)}, TypeError, "bias must be of a floating dtype"),
    ({"bias": np.ones((1, 2, 4, 6, 6), np.float32)}, ValueError, "bias must broadcast to"),
    ({"is_causal": 1}, TypeError, "is_causal must be a bool"),
    ({"scale": "1"}, TypeError, "scale must be"),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be above 0"),
    ({"local_window_size": -1}, ValueError, "local_window_size must not be negative"),
    ({"local_window_size": (1, 2, 3)}, TypeError, "local_window_size must be an int or"),
    ({"local_window_size": 1.5}, TypeError, "local_window_size must be an int or"),
    ({"query_seq_lengths": np.ones(3, np.int32)}, ValueError, "query_seq_lengths must have shape"),
    ({"key_value_seq_lengths": np.ones(2)}, TypeError, "key_value_seq_lengths must be of an integer dtype"),
    ({"query_segment_ids": np.ones((2, 5), np.int32)}, ValueError, "query_segment_ids must have shape"),
    ({"key": SHORT, "value": SHORT, "query_segment_ids": np.ones((2, 6), np.int32)}, ValueError, "must come together"),
    ({"sinks": np.ones(3, np.float32)}, ValueError, "sinks must have shape"),
    ({"prefix_lengths": np.ones(3, np.int32)}, ValueError, "prefix_lengths must have shape"),
    ({"prefix_lengths": np.ones(2)}, TypeError, "prefix_lengths must be of an integer dtype"),
    ({"alibi_slopes": np.ones(2, np.float32)}, ValueError, "alibi_slopes must have shape"),
    ({"dropout_rate": 0.1}, ValueError, "dropout_key must be given, as dropout_rate is 0.1"),
    ({"dropout_rate": 1.0, "dropout_key": jax.random.key(0)}, ValueError, "dropout_rate must be below 1, got 1.0"),
    ({"dropout_rate": -0.1, "dropout_key": jax.random.key(0)}, ValueError, "dropout_rate must be at least 0"),
    ({"dropout_rate": "0.1", "dropout_key": jax.random.key(0)}, TypeError, "dropout_rate must be a Python number"),
    ({"dropout_rate": 0.1, "dropout_key": 0}, TypeError, "dropout_key must be one key of jax.random or .* got int"),
    (
        {"dropout_rate": 0.1, "dropout_key": jax.random.split(jax.random.key(0))},
        TypeError,
        r"dropout_key must be one key of jax.random or .* got key<fry> of shape \(2,\)",
    ),
    ({"score_mod": 3}, TypeError, "score_mod must be a function"),
    ({"score_mod": lambda s: s}, TypeError, r"score_mod must be a hashable function \(score, batch, head"),
    ({"score_mod": lambda s, b, h, q, k: s[:1]}, ValueError, "score_mod must keep the shape of score"),
    ({"score_mod": lambda s, b, h, q, k: s.sum()}, ValueError, "score_mod must keep the shape of score"),
    (
        {"score_mod": lambda s, b, h, q, k: s - s.max()},
        ValueError,
        "score_mod must be elementwise, but it calls reduce",
    ),
    (
        {"score_mod": lambda s, b, h, q, k: s.astype(jnp.bfloat16)},
        TypeError,
        "score_mod must return one array of float",
    ),
    ({"score_mod": lambda s, b, h, q, k: (s, s)}, TypeError, "score_mod must return one array of float32"),
    ({"mask_mod": np.ones((6, 6), bool)}, TypeError, "mask_mod must be a function"),
    ({"mask_mod": lambda b, h, q, k: q - k}, TypeError, "mask_mod must return one array of bool, got int32"),
    ({"mask_mod": lambda b, h, q, k: (q > k)[None, None]}, ValueError, "mask_mod must keep the shape of its positions"),
    ({"mask": np.ones((2, 6), bool), "query": X[:, :2]}, ValueError, r"could be \[T, S\] or \[B, S\]"),
    ({"implementation": "cudnn"}, ValueError, "implementation must be None, one of .*'pallas'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change, kind, message):
    arguments = {"query": X, "key": X, "value": X} | change
    with pytest.raises(kind, match=message):
        dot_product_attention(**arguments)


def test_a_modifier_may_not_capture_what_is_traced():
    for option, way in (("score_mod", "bias"), ("mask_mod", "mask")):

        def traced(slope, option=option):
            mod = {"score_mod": lambda s, *_: s * slope, "mask_mod": lambda b, h, q, k: q > k * slope}[option]
            return dot_product_attention(X, X, X, **{option: mod})

        with pytest.raises(ValueError, match=f"{option} must not use a traced array .* as {way}"):
            jax.jit(traced)(2.0)


def test_a_mask_with_one_meaning_and_the_words_of_rows():
    one = np.ones((2, 6), bool)  # a batch of 1 leaves one meaning
    assert dot_product_attention(X[:1, :2], X[:1], X[:1], mask=one).shape == (1, 2, 4, 8)
    assert jaxops.dropout_rows(jax.random.key(0), 2, 4, 6).shape == (2, 4, 2, 6)
    with pytest.raises(TypeError, match=r"dropout_rows: key must be one key of jax\.random, got int"):
        jaxops.dropout_rows(0, 2, 4, 6)


def test_explain_says_which_tiles_are_visited_and_what_is_held_at_once():
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, 2, 1, 1024), jnp.float32)

    def loss(x, bias=None, **options):
        out = dot_product_attention(x, x, x, bias, is_causal=True, **options)
        return jnp.sum(out.astype(jnp.float32))

    def notes(function, *operands, **where):
        return [line.note for line in jaxops.explain(function, *operands, **where).lines]

    halves = functools.partial(loss, mask_mod=lambda b, h, q, k: q // 512 == k // 512)
    assert notes(halves, x) == ["visits 2 of 4 tiles of 512 × 512 and masks 2"]
    for note in notes(jax.grad(halves), x, target="h100"):  # the kernels have tiles of their own
        visited, total, rows, _, masked = map(int, re.findall(r"\d+", note))
        assert rows == 128 and 64 * visited == 20 * total and 64 * masked == 8 * total
    assert notes(loss, x) == [None]
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    (note,) = notes(lambda x, ids: loss(x, query_segment_ids=ids), x, ids)
    assert note == "without query_segment_ids, visits 3 of 4 tiles of 512 × 512 and masks 2"
    whole = "the gradient of bias is made for every batch, head, query and key, 8.4 MB, then summed"
    assert notes(jax.grad(loss, argnums=(0, 1)), x, bias, target="v5e") == [None, whole]
    assert notes(jax.grad(loss, argnums=(0, 1)), x, bias) == [None, None]
    assert notes(lambda x: jax.jvp(loss, (x,), (x,)), x)[1] == (
        "by its definition, 1024 queries at a time: 8.4 MB of logits"
    )
