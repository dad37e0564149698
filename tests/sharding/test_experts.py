"""A mixture whose experts are split: the layer of one device, with its gradients, or without what has no slot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxops.nn
import sharding
import sharding.nn
from jaxops.nn.moe import mixture as mixture_of_one
from tests.compare import error
from tests.sharding.traffic import compiled, sent

WIDTH, HIDDEN, EXPERTS = 12, 20, 8
NAMES = ("router", "gate", "up", "down")
BATCH = P(("data", "expert"))
SPECS = (P(), P("expert"), P("expert"), P("expert"))


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X = data(8, 7, WIDTH)


def layers(top_k, normalize=True, **arguments):
    """(the layer of one device, the split one of the same parameters)"""
    how = dict(top_k=top_k, out_features=9, normalize=normalize)
    plain = jaxops.nn.MoE(WIDTH, HIDDEN, EXPERTS, rngs=nnx.Rngs(0), **how)
    split = sharding.nn.ExpertParallelMoE(WIDTH, HIDDEN, EXPERTS, rngs=nnx.Rngs(0), **how, **arguments)
    return plain, split


def parameters(layer):
    return tuple(getattr(layer, name).kernel[...] for name in NAMES)


def run(top_k, mesh, **how):
    """(y, losses, dropped) of whole arrays"""
    names = ("data", "expert")

    def local(x, *matrices):
        y, routing, dropped = sharding.expert_parallel_mixture(x, *matrices, top_k=top_k, axis_names=names, **how)
        return y, (routing.load_balancing_loss, routing.z_loss), lax.psum(dropped, names)

    return jax.shard_map(local, mesh=mesh, in_specs=(BATCH, *SPECS), out_specs=(BATCH, (P(), P()), P()))


@pytest.mark.parametrize(
    ("top_k", "normalize", "mesh"),
    [
        (2, True, dict(data=2, expert=4)),
        (3, False, dict(expert=8)),
        pytest.param(1, True, dict(data=4, expert=2), marks=pytest.mark.slow),
    ],
)
def test_value_losses_and_gradients(top_k, normalize, mesh):
    plain, _ = layers(top_k, normalize)
    split = run(top_k, sharding.make_mesh(**mesh), normalize=normalize)

    def ours(x, *matrices):
        y, losses, dropped = split(x, *matrices)
        return jnp.sum(jnp.sin(y)) + losses[0] + losses[1], dropped

    def theirs(x, *matrices):
        how = dict(dtype=None, precision=None, implementation=None, activation=jaxops.silu, axis_names=())
        y, routing = mixture_of_one(x, *matrices, top_k=top_k, normalize=normalize, **how)
        return jnp.sum(jnp.sin(y)) + routing.load_balancing_loss + routing.z_loss, 0

    matrices = parameters(plain)
    got, want = (jax.jit(jax.value_and_grad(f, (0, 1, 2, 3, 4), has_aux=True))(X, *matrices) for f in (ours, theirs))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(jax.device_get(a), b) < 1e-5 or (a == b == 0)


def test_what_has_no_slot_is_dropped():
    """Of the choices of each device, those of each other device's experts in their order, as far as there are slots."""
    plain, _ = layers(2)
    matrices = parameters(plain)
    mesh = sharding.make_mesh(data=2, expert=4)
    y, _, dropped = jax.jit(run(2, mesh, capacity=0.5))(X, *matrices)
    router, gate, up, down = (np.asarray(matrix, np.float64) for matrix in matrices)
    expected, lost = np.zeros(y.shape), 0
    for shard, tokens in enumerate(np.split(np.asarray(X, np.float64).reshape(-1, WIDTH), 8)):
        p = np.exp(tokens @ router)
        chosen = np.argsort(-p, axis=1)[:, :2]
        left = [int(np.ceil(0.5 * len(tokens) * 2 / 4))] * 4
        for expert in range(EXPERTS):
            for i in np.flatnonzero((chosen == expert).any(1)):
                if left[expert // 2] == 0:
                    lost += 1
                    continue
                left[expert // 2] -= 1
                gated = tokens[i] @ gate[expert]
                hidden = gated / (1 + np.exp(-gated)) * (tokens[i] @ up[expert])
                expected[shard, i] += p[i, expert] / p[i, chosen[i]].sum() * (hidden @ down[expert])
    assert lost > 0 and dropped == lost and error(jax.device_get(y), expected) < 1e-5


def test_what_is_sent():
    """Rows to their experts and back, and the counts; backward the same two of gradients, and nothing else."""
    plain, _ = layers(2)
    mesh = sharding.make_mesh(data=2, expert=4)
    f = run(2, mesh, capacity=1.0)
    slots = 4 * -(-7 * 2 // 4)
    forward = sent(compiled(lambda *a: f(*a)[0], X, *parameters(plain)), dict(mesh.shape))
    rows = slots * (WIDTH + 9) * 4
    assert forward == {("all-to-all", "expert"): rows + 4 * 2 * 4}
    gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a)[0])), (0, 2, 3, 4))
    both = sent(compiled(gradient, X, *parameters(plain)), dict(mesh.shape))
    assert both["all-to-all", "expert"] == 2 * rows + 4 * 2 * 4
    assert {kind for kind, axis in both if axis == "expert"} == {"all-to-all"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_layer_on_whole_arrays(kind):
    mesh = sharding.make_mesh(data=2, expert=4, axis_types=kind)
    plain, _ = layers(2)
    with jax.set_mesh(mesh):
        _, split = layers(2)
        assert split.gate.kernel[...].sharding.spec == P("expert", None, None)
        assert error(jax.device_get(split(jax.device_put(X, BATCH))), plain(X)) < 1e-5
        with pytest.raises(ValueError, match="return_routing must be False outside a"):
            split(X, return_routing=True)
    y, routing = split(X, return_routing=True)  # without a mesh
    assert error(y, plain(X)) < 1e-6 and routing.group_sizes.sum() == 8 * 7 * 2


def test_the_layer_on_shards():
    mesh = sharding.make_mesh(expert=8)
    plain, split = layers(2)
    graph, state = nnx.split(split)

    def local(state, x):
        y, routing = nnx.merge(graph, state)(x, return_routing=True)
        return y, routing.load_balancing_loss

    specs = nnx.get_partition_spec(state)
    y, balance = jax.shard_map(local, mesh=mesh, in_specs=(specs, P("expert")), out_specs=(P("expert"), P()))(state, X)
    expected, routing = plain(X, return_routing=True)
    assert error(jax.device_get(y), expected) < 1e-5
    assert error(jax.device_get(balance), routing.load_balancing_loss) < 1e-5


M = data(3, WIDTH, HIDDEN)
mixture = functools.partial(sharding.expert_parallel_mixture, top_k=2)
BAD = {
    "axis must be a mesh axis .*got 'heads'": lambda x: mixture(x, M[0], M, M, M, axis="heads"),
    r"router must have shape \(12, 12\) for x .* and the 3 experts of each of the 4 devices along 'expert', got "
    r"\(12, 20\)": lambda x: mixture(x, M[0], M, M, M),
    r"gate must have shape \(experts / 4, features, hidden\), got": lambda x: mixture(x, M[0], M[0], M, M),
    r"down must have the 3 experts of gate": lambda x: mixture(x, M[0, :, :12], M, M, M[:2].swapaxes(1, 2)),
    "capacity must be": lambda x: mixture(x, M[0, :, :12], M, M, M.swapaxes(1, 2), capacity=0.0),
    r"top_k must be in \[1, 12\], got 13": lambda x: mixture(x, M[0, :, :12], M, M, M.swapaxes(1, 2), top_k=13),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    run = jax.shard_map(BAD[message], mesh=sharding.make_mesh(data=2, expert=4), in_specs=P(), out_specs=P())
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(run, X)
