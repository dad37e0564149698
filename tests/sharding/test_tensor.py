"""Tensor and sequence parallel functions: values and every gradient are those of whole arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxops
import sharding
from tests.compare import error

B, S, D, F, N, H, V = 2, 8, 12, 16, 8, 6, 40
RANDOM = np.random.default_rng(0)
T, ROWS = "tensor", P("data", "tensor")


def data(*shape, size=1.0):
    return jnp.asarray(size * RANDOM.standard_normal(shape), jnp.float32)


small = functools.partial(data, size=0.3)  # of parameters: the stream keeps its size


X = data(B, S, D)
causal = functools.partial(jaxops.dot_product_attention, is_causal=True)


def plain_attention(x, query, key, value, out, biases=(0, None, 0, 0)):
    q, k, v = (
        jnp.einsum("bsd,dnh->bsnh", x, w) + (0 if b is None else b)
        for w, b in zip((query, key, value), biases, strict=False)
    )
    return jnp.einsum("bsnh,nhd->bsd", causal(q, k, v), out) + biases[3]


def split_attention(x, query, key, value, out, biases=(None,) * 4, **how):
    return sharding.heads_parallel_attention(x, query, key, value, out, attend=causal, biases=biases, **how)


def plain_mlp(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def plain_pair(x, w1, b1, w2, b2):
    return jax.nn.gelu(x @ w1 + b1) @ w2 + b2


def split_pair(x, w1, b1, w2, b2, **how):
    hidden = sharding.column_parallel(x, w1, b1, activation=jaxops.gelu, **how)
    return sharding.row_parallel(hidden, w2, b2, **how)


COLUMN, ROW, HEADS, OUT = P(None, T), P(T), P(None, T), P(T)
BIASES = (small(N, H), None, small(4, H), small(D))  # one of the keys would have no gradient
# name: split and whole function of (x, *parameters), the parameters and their specs, further options
LAYERS = {
    "two products": (split_pair, plain_pair, (small(D, F), small(F), small(F, D), small(D)),
                     (COLUMN, P(T), ROW, P()), {}),
    "gated mlp": (sharding.gated_mlp, plain_mlp, (small(D, F), small(D, F), small(F, D)), (COLUMN, COLUMN, ROW), {}),
    "grouped heads": (split_attention, plain_attention,
                      (small(D, N, H), small(D, 4, H), small(D, 4, H), small(N, H, D), BIASES),
                      (HEADS, HEADS, HEADS, OUT, (P(T), None, P(T), P())), {}),
    "replicated heads": (split_attention, plain_attention,
                         (small(D, N, H), small(D, 2, H), small(D, 2, H), small(N, H, D)),
                         (HEADS, P(), P(), OUT), {"replicate_kv": True}),
}  # fmt: skip
STREAMS = {"whole": {}, "sequence": {"sequence": True}, "overlap": {"sequence": True, "overlap": True}}


def value_and_gradients(function):
    def loss(x, parameters):
        return jnp.sum(jnp.square(jnp.sin(function(x, *parameters))))

    return jax.value_and_grad(loss, (0, 1))


def same(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(jax.device_get(a), b) < tolerance


FURTHER = {("two products", "overlap"), ("replicated heads", "sequence"), ("replicated heads", "overlap")}


def _marks(layer, stream):
    return pytest.mark.slow if (layer, stream) in FURTHER else ()


@pytest.mark.parametrize(("layer", "stream"), [pytest.param(a, b, marks=_marks(a, b)) for a in LAYERS for b in STREAMS])
def test_layers(layer, stream):
    split, plain, parameters, specs, options = LAYERS[layer]
    mesh = sharding.make_mesh(data=2, tensor=4)
    x_spec = ROWS if stream != "whole" else P("data")
    run = jax.shard_map(
        functools.partial(split, **options, **STREAMS[stream]), mesh=mesh, in_specs=(x_spec, *specs), out_specs=x_spec
    )
    same(jax.jit(value_and_gradients(run))(X, parameters), value_and_gradients(plain)(X, parameters))


SPLIT = {  # of the matrices, the dimension that is D is split over "fsdp" besides
    "two products": (P("fsdp", T), P(T), P(T, "fsdp"), P()),
    "gated mlp": (P("fsdp", T), P("fsdp", T), P(T, "fsdp")),
    "grouped heads": (*[P("fsdp", T)] * 3, P(T, None, "fsdp"), (P(T), None, P(T), P())),
    "replicated heads": (P("fsdp", T), P("fsdp"), P("fsdp"), P(T, None, "fsdp")),
}


@pytest.mark.parametrize(
    ("layer", "stream"),
    [
        pytest.param(a, b, marks=() if (a, b) == ("gated mlp", "overlap") else pytest.mark.slow)
        for a in SPLIT
        for b in STREAMS
    ],
)
def test_layers_of_parameters_that_are_split_over_fsdp(layer, stream):
    split, plain, parameters, _, options = LAYERS[layer]
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    x_spec = P("fsdp", "tensor") if stream != "whole" else P("fsdp")
    run = jax.shard_map(
        functools.partial(split, fsdp="fsdp", **options, **STREAMS[stream]),
        mesh=mesh,
        in_specs=(x_spec, *SPLIT[layer]),
        out_specs=x_spec,
    )
    same(jax.jit(value_and_gradients(run))(X, parameters), value_and_gradients(plain)(X, parameters))


WEIGHT, BIAS, WEIGHTS = data(D, V), data(V), jnp.abs(data(B, S))
LABELS = jnp.asarray(RANDOM.integers(0, V, (B, S)), jnp.int32).at[0, 3].set(-100).at[1, 2].set(V - 1)
OPTIONS = {
    "plain": {},
    "all": dict(ignore_index=-100, label_smoothing=0.1, z_loss=1e-2, logits_soft_cap=5.0, reduction="sum"),
    "ignored, mean": dict(ignore_index=-100),
    "per token": dict(ignore_index=-100, reduction="none"),
}


@pytest.mark.parametrize(
    ("case", "sequence"),
    [("plain", True), ("all", False), ("all", True), ("ignored, mean", False), ("per token", True)],
)
def test_cross_entropy(case, sequence):
    options, labels = OPTIONS[case], LABELS if OPTIONS[case] else jnp.abs(LABELS) % V
    mesh = sharding.make_mesh(data=2, tensor=4)
    everything = case == "all"
    beside = {"bias": BIAS, "token_weights": WEIGHTS} if everything else {}
    specs = {"bias": P(T), "token_weights": P("data")} if everything else {}

    def split(x, weight, labels, beside):
        return sharding.vocab_parallel_cross_entropy(
            x, weight, labels, sequence=sequence, axis_names="data", **beside, **options
        )

    x_spec, y_spec = ROWS if sequence else P("data"), P("data") if case == "per token" else P()
    run = jax.shard_map(split, mesh=mesh, in_specs=(x_spec, COLUMN, P("data"), specs), out_specs=y_spec)
    plain = lambda x, weight, labels, beside: jaxops.linear_cross_entropy(x, weight, labels, **beside, **options)
    results = []
    for function in (run, plain):
        loss = lambda x, weight, beside, f=function: jnp.sum(jnp.sin(f(x, weight, labels, beside) / 16))
        results.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(X, WEIGHT, beside))
    same(*results)


def test_a_label_or_an_id_out_of_range_gives_nan():
    mesh = sharding.make_mesh(tensor=8)
    labels = LABELS.at[0, 0].set(V)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), COLUMN, P()), out_specs=P())
    def both(x, weight, labels):
        loss = sharding.vocab_parallel_cross_entropy(x, weight, labels, reduction="none")
        return loss, sharding.vocab_parallel_embed(labels, weight.T)

    loss, rows = both(X, WEIGHT, labels)
    assert jnp.array_equal(jnp.isnan(loss), (labels < 0) | (labels >= V))
    assert jnp.array_equal(jnp.isnan(rows).all(-1), jnp.isnan(loss)) and jnp.isnan(rows).any(-1).sum() == 2
    same(rows[1], WEIGHT.T[labels[1]])


MESHES = {"data and rows": P("data", "tensor"), "features": P(None, "data", "tensor"), "both": P(("data", "tensor"))}


@pytest.mark.parametrize("name", MESHES)
def test_dropout_is_the_same_on_every_mesh(name):
    mesh, spec, x = sharding.make_mesh(data=2, tensor=4), MESHES[name], data(8, 16, 8)
    key = jax.random.key(3)
    run = lambda x, spec: sharding.dropout(x, key, 0.3, spec=spec)
    whole = jax.jit(functools.partial(run, spec=P()))(x)
    got = jax.jit(jax.shard_map(functools.partial(run, spec=spec), mesh=mesh, in_specs=spec, out_specs=spec))(x)
    assert jnp.array_equal(got, whole)
    kept = whole != 0
    assert abs(kept.mean() - 0.7) < 0.05 and error(whole, jnp.where(kept, x / 0.7, 0)) < 1e-6


def test_attention_drops_the_same_weights_when_its_heads_are_split():
    mesh, key = sharding.make_mesh(data=2, tensor=4), jax.random.key(1)
    q, k, v = data(B, S, N, H), data(B, S, N, H), data(B, S, N, H)

    def split(q, k, v):
        start = (jax.lax.axis_index("data") * q.shape[0], jax.lax.axis_index(T) * q.shape[2], 0)
        rows = jaxops.dropout_rows(key, q.shape[0], q.shape[2], S, start=start, all_heads=N)
        return jaxops.dot_product_attention(q, k, v, dropout_rate=0.4, dropout_key=rows)

    spec = P("data", None, T)
    got = jax.jit(jax.shard_map(split, mesh=mesh, in_specs=spec, out_specs=spec))(q, k, v)
    same(got, jax.jit(functools.partial(jaxops.dot_product_attention, dropout_rate=0.4, dropout_key=key))(q, k, v))


W = data(D, F)
BAD = {
    r"column_parallel: w must have shape \(12, n\)": lambda x: sharding.column_parallel(x, W.T),
    r"column_parallel: bias must have shape \(16,\)": lambda x: sharding.column_parallel(x, W, X[0, 0]),
    "row_parallel: axis must be a mesh axis .*got 'heads'": lambda x: sharding.row_parallel(x, W, axis="heads"),
    r"x has shape \(2, 6, 16\), its dimension 1 must be a multiple of 8": lambda x: sharding.row_parallel(
        x[:, :6], W, sequence=True
    ),
    r"key must have shape \(12, heads, dim\)": lambda x: split_attention(x, data(D, 2, H), W, W, data(2, H, D)),
    "each device's key heads must divide its query heads.*replicate_kv": lambda x: split_attention(
        x, data(D, 2, H), data(D, 3, H), data(D, 3, H), data(2, H, D)
    ),
    "the 8 devices along 'tensor' and all 16 query heads must be a multiple": lambda x: split_attention(
        x, data(D, 2, H), data(D, 3, H), data(D, 3, H), data(2, H, D), replicate_kv=True
    ),
    "vocab_parallel_embed: ids must be of an integer dtype": lambda x: sharding.vocab_parallel_embed(x, W),
    r"vocab_parallel_cross_entropy: labels must have shape \(2, 8\)": lambda x: sharding.vocab_parallel_cross_entropy(
        x, W, LABELS[0]
    ),
    "reduction must be one of": lambda x: sharding.vocab_parallel_cross_entropy(x, W, LABELS, reduction="avg"),
    "dropout: axis must be a mesh axis": lambda x: sharding.dropout(x, jax.random.key(0), 0.1, spec=P("heads")),
    "dropout_rate must be below 1": lambda x: sharding.dropout(x, jax.random.key(0), 1.0, spec=P()),
    "x must have 1 to 3 axes": lambda x: sharding.dropout(x[None], jax.random.key(0), 0.1, spec=P()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    run = jax.shard_map(BAD[message], mesh=sharding.make_mesh(tensor=8), in_specs=P(), out_specs=P())
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(run, X)
