"""The router against numpy, and the layer against a loop over its experts; losses over devices; bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import jaxops.nn
from jaxops.nn import linen
from jaxops.routing import top_k_routing
from tests.compare import error

WIDTH, HIDDEN, EXPERTS = 12, 20, 5


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (7, 4, 4), (40, 5, 2), (129, 64, 6), (0, 3, 2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_against_numpy(tokens, experts, top_k, normalize):
    logits = data(tokens, experts)
    got = top_k_routing(logits, top_k, normalize=normalize)
    exact = np.asarray(logits, np.float64)
    p = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(p, chosen, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_array_equal(got.experts, chosen)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-5)
    np.testing.assert_array_equal(got.group_sizes, np.bincount(chosen.ravel(), minlength=experts))
    # rows come expert by expert, and in each in the order of the tokens
    rows = [
        (token, weights[token, list(chosen[token]).index(e)])
        for e in range(experts)
        for token in range(tokens)
        if e in chosen[token]
    ]
    np.testing.assert_array_equal(got.rows, np.array([token for token, _ in rows], int))
    np.testing.assert_allclose(got.row_weights, [weight for _, weight in rows], rtol=1e-5)
    if tokens:
        share = np.bincount(chosen.ravel(), minlength=experts) / chosen.size
        np.testing.assert_allclose(got.load_balancing_loss, experts * (share * p.mean(0)).sum(), rtol=1e-5)
        np.testing.assert_allclose(got.z_loss, (np.log(np.exp(exact).sum(-1)) ** 2).mean(), rtol=1e-5)
    else:
        assert got.load_balancing_loss == got.z_loss == 0


def test_an_even_router_has_balance_1_and_equal_logits_go_to_the_first():
    got = top_k_routing(jnp.zeros((8, 4)), 2)
    assert (got.experts == jnp.array([0, 1])).all() and got.load_balancing_loss == 1
    even = top_k_routing(5 * jnp.eye(4), 1)
    assert error(even.load_balancing_loss, 1) < 1e-6


def test_the_losses_pull_at_the_logits():
    logits = data(30, 4) + jnp.array([2.0, 0, 0, 0])
    for name in ("load_balancing_loss", "z_loss"):
        loss = lambda logits: getattr(top_k_routing(logits, 1), name)
        lower = logits - 10 * jax.grad(loss)(logits)
        assert loss(lower) < loss(logits), name


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: top_k_routing(jnp.zeros((3, 4)), 5), ValueError, r"top_k must be in \[1, 4\], got 5"),
        (lambda: top_k_routing(jnp.zeros((3, 4)), 0), ValueError, r"top_k must be in \[1, 4\], got 0"),
        (lambda: top_k_routing(jnp.zeros((3, 4)), 2.0), TypeError, "top_k must be a Python int, got float"),
        (lambda: top_k_routing(jnp.zeros(3), 1), ValueError, r"logits must have shape \(t, e\), got \(3,\)"),
        (lambda: top_k_routing(jnp.zeros((3, 4), int), 1), TypeError, "logits must be of a floating dtype, got int32"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def looped(x, router, gate, up, down, top_k, normalize):
    """Every expert for every token, weighted by what the router says, mostly 0."""
    p = jax.nn.softmax(x @ router)
    weights, chosen = jax.lax.top_k(p, top_k)
    if normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    y = 0
    for e in range(router.shape[1]):
        w = jnp.where(chosen == e, weights, 0).sum(-1, keepdims=True)
        y = y + w * ((jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e])
    return y


@pytest.mark.parametrize(("top_k", "normalize"), [pytest.param(2, True, marks=pytest.mark.slow), (3, False)])
def test_the_layer_against_a_loop_over_experts(top_k, normalize):
    moe = jaxops.nn.MoE(WIDTH, HIDDEN, EXPERTS, top_k=top_k, out_features=9, normalize=normalize, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(moe)
    x, g = data(2, 17, WIDTH), data(2, 17, 9, seed=1)

    def ours(x, parameters):
        return jnp.vdot(nnx.merge(graph, parameters)(x), g)

    def theirs(x, parameters):
        arrays = (parameters[name]["kernel"][...] for name in ("router", "gate", "up", "down"))
        return jnp.vdot(looped(x, *arrays, top_k, normalize), g)

    results = [jax.tree.leaves(jax.jit(jax.value_and_grad(f, (0, 1)))(x, parameters)) for f in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.slow
def test_linen_is_nnx_and_bfloat16_stays():
    moe = jaxops.nn.MoE(WIDTH, HIDDEN, EXPERTS, rngs=nnx.Rngs(0))
    x = data(2, 17, WIDTH)
    twin = linen.MoE(HIDDEN, EXPERTS)
    variables = twin.init(jax.random.key(0), x)
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    parameters = nnx.to_pure_dict(nnx.state(moe))
    assert shapes(variables["params"]) == shapes(parameters)
    (y, routing), (expected, _) = (
        twin.apply({"params": parameters}, x, return_routing=True),
        moe(x, return_routing=True),
    )
    np.testing.assert_array_equal(y, expected)
    assert routing.group_sizes.sum() == 2 * 34
    half = jaxops.nn.MoE(WIDTH, HIDDEN, EXPERTS, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert half(x).dtype == jnp.bfloat16 and error(half(x), expected) < 0.05


def test_tokens_over_devices():
    """Every device routes its own tokens; outputs and losses are those of one device."""
    moe = jaxops.nn.MoE(WIDTH, HIDDEN, EXPERTS, axis_names=("d",), rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(moe)
    alone = jaxops.nn.MoE(WIDTH, HIDDEN, EXPERTS, rngs=nnx.Rngs(0))
    mesh, spec, whole = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec("d"), PartitionSpec()

    def local(parameters, x):
        y, routing = nnx.merge(graph, parameters)(x, return_routing=True)
        return y, (routing.load_balancing_loss, routing.z_loss)

    x = data(8, 6, WIDTH)
    split = jax.shard_map(local, mesh=mesh, in_specs=(whole, spec), out_specs=(spec, (whole, whole)))
    y, losses = jax.jit(split)(parameters, x)
    expected, routing = alone(x, return_routing=True)
    assert error(jax.device_get(y), expected) < 1e-5
    np.testing.assert_allclose(losses, (routing.load_balancing_loss, routing.z_loss), rtol=1e-5)
