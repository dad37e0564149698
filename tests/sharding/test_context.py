"""Attention over a split sequence: values, gradients and other derivatives are those of whole arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxops
import sharding
from tests.compare import error
from tests.sharding.traffic import compiled, sent

B, N, K, H, V = 2, 4, 2, 8, 6
RANDOM = np.random.default_rng(0)
ROWS = P("data", "context")
HALF, TENTH = 0.5, 10


def data(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def segments(length):
    return jnp.asarray(np.sort(RANDOM.integers(0, 3, (B, length)), axis=1), jnp.int32)


# name: length, options, and whether sinks and segments come too
CASES = {
    "causal": (24, dict(is_causal=True), ()),
    "balanced": (24, dict(is_causal=True, balanced=True), ()),
    "balanced, everything": (40, dict(is_causal=True, balanced=True, scale=0.3, logits_soft_cap=3.0),
                             ("sinks", "query_segment_ids")),
    "open": (20, {}, ("key_value_segment_ids",)),
    "window": (36, dict(is_causal=True, local_window_size=(11, 0)), ("sinks",)),
    "window to both sides": (28, dict(local_window_size=(3, 8)), ()),
    "a row each": (4, dict(is_causal=True), ()),
}  # fmt: skip
FEW = ("balanced, everything", "window to both sides")


def both(name, mesh=None, sizes=(N, K, H, V)):
    """(function of shards, the same of whole arrays, operands)"""
    length, options, names = CASES[name]
    mesh = sharding.make_mesh(data=2, context=4) if mesh is None else mesh
    n, k, h, v = sizes
    operands = dict(query=data(B, length, n, h), key=data(B, length, k, h), value=data(B, length, k, v))
    ids = segments(length)
    more = {name: data(n) if name == "sinks" else ids for name in names}
    specs = {name: P() if name == "sinks" else ROWS for name in operands | more}
    balanced = options.get("balanced", False)

    def split(operands, more):
        def local(operands):
            return sharding.context_parallel_attention(**operands, **options)

        everything = operands | more
        order = sharding.context_order(length, mesh.shape["context"]) if balanced else np.arange(length)
        placed = {name: x if name == "sinks" else x[:, order] for name, x in everything.items()}
        y = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=ROWS)(placed)
        return y[:, np.argsort(order)]

    def whole(operands, more):
        plain = {name: value for name, value in options.items() if name != "balanced"}
        return jaxops.dot_product_attention(**operands, **more, **plain)

    floating = {name: x for name, x in (operands | more).items() if x.dtype == jnp.float32}
    ids = {name: x for name, x in more.items() if name not in floating}
    f, g = (lambda operands, run=run: run(operands, ids) for run in (split, whole))
    return f, g, floating


def same(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(jax.device_get(a), b) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name):
    split, whole, operands = both(name)
    loss = lambda f: lambda operands: jnp.sum(jnp.sin(f(operands)))
    got, want = (jax.jit(jax.value_and_grad(loss(f)))(operands) for f in (split, whole))
    same(got, want)
    same(jax.jit(split)(operands), whole(operands))


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_other_derivatives(name):
    split, whole, operands = both(name)
    along = jax.tree.map(lambda x: data(*x.shape), operands)
    results = []
    for f in (split, whole):
        loss = lambda operands, f=f: jnp.sum(jnp.sin(f(operands)))
        curved = lambda operands, loss=loss: jax.jvp(jax.grad(loss), (operands,), (along,))[1]
        again = lambda operands, loss=loss: jax.grad(
            lambda x: sum(
                jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (jax.grad(loss)(x), along)), strict=True)
            )
        )(operands)
        mapped = jax.vmap(f)(jax.tree.map(lambda x, y: jnp.stack([x, y]), operands, along))
        moved = jax.jvp(f, (operands,), (along,))[1]
        results.append((moved, jax.jit(curved)(operands), jax.jit(again)(operands), mapped,
                        jax.jit(jax.grad(jax.checkpoint(loss)))(operands)))  # fmt: skip
    same(*results, tolerance=3e-5)


def test_bfloat16_is_as_near_as_on_one_device():
    split, whole, operands = both("balanced")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), operands)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), narrow)
    loss = lambda f: lambda operands: jnp.sum(jnp.sin(f(operands).astype(jnp.float32)))
    got, plain = (jax.jit(jax.grad(loss(f)))(narrow) for f in (split, whole))
    with jax.enable_x64(True):
        want = jax.grad(lambda operands: jnp.sum(jnp.sin(whole(operands))))(jax.tree.map(jnp.asarray, exact))
    for name in want:
        assert error(jax.device_get(got[name]), want[name]) <= 2 * error(plain[name], want[name])


# What one device sends, in bytes: keys and values for all but the last step; backward again, with gradients in float32,
# and these home.
@pytest.mark.parametrize(("name", "hops"), [("balanced", 3), ("open", 3), ("window", 2)])
def test_what_is_sent(name, hops):
    CASES["sent"] = (CASES[name][0], CASES[name][1], ())
    split, _, operands = both("sent")
    axes = dict(sharding.make_mesh(data=2, context=4).shape)
    shards = sum(operands[x].nbytes for x in ("key", "value")) // 8
    forward = sent(compiled(split, operands), axes)
    gradient = sent(compiled(jax.grad(lambda operands: jnp.sum(jnp.sin(split(operands)))), operands), axes)
    key = ("collective-permute", "context")
    assert forward[key] == hops * shards and gradient[key] == (3 * hops + 1) * shards
    assert key[0] not in {kind for kind, axis in {*forward, *gradient} - {key}}


def test_with_heads_split_too():
    """x[B_data, S_{context, tensor}, D] through a whole attention layer with rotary positions."""
    mesh = sharding.make_mesh(data=2, context=2, tensor=2)
    d, length = 12, 16
    x, (query, out), (key, value) = data(B, length, d), data(2, d, N, H), data(2, d, K, H)
    heads, order = P(None, "tensor"), sharding.context_order(length, 2)
    attend = functools.partial(sharding.context_parallel_attention, is_causal=True, balanced=True)

    def rotated(attend, positions):
        return lambda q, k, v: attend(*(jaxops.rope(y, jnp.broadcast_to(positions, y.shape[:-2])) for y in (q, k)), v)

    def local(x, *matrices):
        positions = sharding.context_positions(2 * x.shape[1], balanced=True)
        return sharding.heads_parallel_attention(x, *matrices, attend=rotated(attend, positions), sequence=True)

    def split(x, query, key, value, out):
        rows = P("data", ("context", "tensor"))
        specs = (rows, heads, heads, heads, P("tensor"))
        y = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows)(x[:, order], query, key, value, out)
        return y[:, np.argsort(order)]

    def whole(x, query, key, value, out):
        causal = functools.partial(jaxops.dot_product_attention, is_causal=True)
        heads = (jnp.einsum("bsd,dnh->bsnh", x, w) for w in (query, key, value))
        return jnp.einsum("bsnh,nhd->bsd", rotated(causal, jnp.arange(length))(*heads), out)

    operands = tuple(0.3 * w for w in (x, query, key, value, out.transpose(1, 2, 0)))
    loss = lambda f: lambda *operands: jnp.sum(jnp.sin(f(*operands)))
    same(*(jax.jit(jax.value_and_grad(loss(f), (0, 1, 2, 3, 4)))(*operands) for f in (split, whole)))


def test_the_balanced_order():
    mesh = sharding.make_mesh(data=2, context=4)
    for balanced in (False, True):
        run = functools.partial(sharding.context_positions, 6, balanced=balanced)
        got = jax.shard_map(run, mesh=mesh, in_specs=(), out_specs=P("context"))()
        np.testing.assert_array_equal(got, sharding.context_order(24, 4) if balanced else np.arange(24))


X = data(B, 6, N, H)
attention = functools.partial(sharding.context_parallel_attention, axis="context")
BAD = {
    "axis must be a mesh axis of an enclosing jax.shard_map, got 'heads'": lambda x: attention(x, x, x, axis="heads"),
    "value must have the shape of key": lambda x: attention(x, x, x[:, 1:]),
    "query must have a multiple of the 3 heads of key": lambda x: attention(x, x[:, :, :3], x[:, :, :3]),
    "scale must be": lambda x: attention(x, x, x, scale=-1.0),
    r"key must have as many rows as query where positions count, got query \(2, 6, 4, 8\)": lambda x: attention(
        x, x[:, 1:], x[:, 1:], is_causal=True
    ),
    "balanced is the order of causal attention without a window, got is_causal=False": lambda x: attention(
        x, x, x, balanced=True
    ),
    r"query has shape \(2, 5, 4, 8\), its dimension 1 must be a multiple of 2 if balanced, .*'context'": lambda x: (
        attention(x[:, 1:], x[:, 1:], x[:, 1:], is_causal=True, balanced=True)
    ),
    "rows must be even if balanced, two blocks along 'context', got 5": lambda x: sharding.context_positions(
        5, balanced=True
    ),
    "length must be a multiple of 8, two blocks for each of 4 parts, got 12": lambda x: sharding.context_order(12, 4),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    run = jax.shard_map(BAD[message], mesh=sharding.make_mesh(data=2, context=4), in_specs=P(), out_specs=P())
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(run, X)
