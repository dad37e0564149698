"""ZeRO 0 to 3 are the optimizer on one device: losses, gradients, parameters; what is sent, kept, skipped, saved."""

import functools
import math
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxops
import sharding
import sharding.nn
from jaxops import interpreter, optim
from jaxops.nn import RMSNorm
from jaxops.workbench.collectives import collectives
from pallas_kernels import chips
from tests.compare import error
from tests.sharding.traffic import compiled, sent

SLOW = pytest.mark.slow
module = sys.modules["sharding.gradient_reduction"]  # the package's attribute of this name is the function

# ---- a small language model ----------------------------------------------------------------------------------------

LENGTH, VOCAB, WIDTH, HIDDEN, HEADS, STEPS = 16, 64, 32, 48, 4, 20
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (5, 16, LENGTH + 1)).astype(np.int32)
SPECS = {
    "embed": P(),
    "attention": {"scale": P(), "qkv": P(None, None, "tensor"), "out": P("tensor")},
    "mlp": {"scale": P(), "gate": P(None, "tensor"), "up": P(None, "tensor"), "down": P("tensor")},
    "head": P(),
}
is_spec = lambda x: isinstance(x, P)


@functools.cache
def parameters():
    random = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(random.standard_normal(shape) * shape[0] ** -0.5, jnp.float32)
    dim = WIDTH // HEADS
    return {
        "embed": array(VOCAB, WIDTH),
        "attention": {"scale": jnp.ones(WIDTH), "qkv": array(WIDTH, 3, HEADS, dim), "out": array(HEADS, dim, WIDTH)},
        "mlp": {
            "scale": jnp.ones(WIDTH),
            "gate": array(WIDTH, HIDDEN),
            "up": array(WIDTH, HIDDEN),
            "down": array(HIDDEN, WIDTH),
        },
        "head": array(WIDTH, VOCAB),
    }


def loss(params, tokens, *, tensor=False, gather=lambda params, name: params, layer=lambda f: f):
    """Mean cross-entropy; `tensor`: heads and hidden features are split; `gather` makes parts of the tree whole."""
    enter, leave = (
        (functools.partial(f, axis="tensor") if tensor else lambda x: x) for f in (sharding.enter, sharding.leave)
    )

    def attention(x, p):
        p = gather(p, "attention")
        h = enter(jaxops.rms_norm(x, p["scale"]))
        query, key, value = (jnp.einsum("btd,dnh->btnh", h, p["qkv"][:, i]) for i in range(3))
        seen = jaxops.dot_product_attention(query, key, value, is_causal=True)
        return x + leave(jnp.einsum("btnh,nhd->btd", seen, p["out"]))

    def mlp(x, p):
        p = gather(p, "mlp")
        h = enter(jaxops.rms_norm(x, p["scale"]))
        return x + leave(jaxops.gated_linear_unit(h, p["gate"], p["up"]) @ p["down"])

    x = gather(params["embed"], "embed")[tokens[:, :-1]]
    x = layer(mlp)(layer(attention)(x, params["attention"]), params["mlp"])
    return jaxops.linear_cross_entropy(x, gather(params["head"], "head"), tokens[:, 1:])


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


ADAMW = optim.adamw(1e-2, max_norm=0.5, weight_decay=0.1, mask=matrices)


@functools.cache
def on_one_device():
    """(parameters, losses of the steps, norms of their gradients)"""

    @jax.jit
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        params, state = ADAMW.apply(params, grads, state)
        return params, state, value, optax.tree.norm(grads)

    params, state, found = parameters(), ADAMW.init(parameters()), []
    for i in range(STEPS):
        params, state, *numbers = step(params, state, TOKENS[i % len(TOKENS)])
        found.append(numbers)
    values, norms = np.array(found).T
    return jax.device_get(params), values, norms


class Training:
    """A program of value_and_grad and apply, compiled for a mesh, and where everything lies."""

    def __init__(self, mesh, optimizer=ADAMW, micro_batches=1, over=None, by_hand=True, layer=False, **options):
        self.mesh, self.reduction = mesh, sharding.gradient_reduction(optimizer, small=64, **options)
        reduction, axis, zero = self.reduction, options.get("axis", "data"), options.get("zero", 1)
        tensor = mesh.shape["tensor"] > 1
        self.specs = reduction.parameter_specs(
            parameters(), SPECS if tensor and by_hand else jax.tree.map(lambda _: P(), SPECS), mesh=mesh, over=over
        )
        self.state_specs = reduction.state_specs(parameters(), self.specs, mesh=mesh)
        how = dict(tensor=tensor and by_hand)
        if zero == 3:
            how["gather"] = lambda params, name: reduction.gather(params, self.specs[name])
        if layer:
            how["layer"] = functools.partial(jax.checkpoint, policy=reduction.policy)

        def step(params, state, tokens):
            value_and_grad = reduction.value_and_grad(functools.partial(loss, **how), micro_batches=micro_batches)
            value, grads = value_and_grad(params, state, tokens)
            return *reduction.apply(params, grads, state), value

        over_axes = {} if by_hand else {"axis_names": {axis}}
        local = functools.partial(jax.shard_map, mesh=mesh, **over_axes)
        place = lambda specs: jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
        self.params = jax.device_put(parameters(), place(self.specs))
        init = local(reduction.init, in_specs=(self.specs,), out_specs=self.state_specs)
        self.state = jax.jit(init)(self.params)
        self.batch = NamedSharding(mesh, P(axis))
        specs = (self.specs, self.state_specs)
        self.program = compiled(
            local(step, in_specs=(*specs, P(axis)), out_specs=(*specs, P())),
            self.params,
            self.state,
            jax.device_put(TOKENS[0], self.batch),
        )

    def run(self, steps=STEPS):
        values = []
        for i in range(steps):
            tokens = jax.device_put(TOKENS[i % len(TOKENS)], self.batch)
            self.params, self.state, value = self.program(self.params, self.state, tokens)
            values.append(float(value))
        return jax.device_get(self.params), np.array(values)


def moved(got, want, tolerance):
    """Against what the training changed. Adam divides a gradient by its size: where it is 0 but for rounding, the
    parameter still moves, so a relative error of the gradients of 1e-7 is one of 1e-5 in what the parameters moved."""
    leaves = (jax.tree.leaves(tree) for tree in (got, want, jax.device_get(parameters())))
    for path, a, b, start in zip(jax.tree.leaves_with_path(want), *leaves, strict=True):
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b - start), jax.tree_util.keystr(path[0])


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CASES = {  # mesh, its kind, options
    "1, data 8": (dict(data=8), EXPLICIT, dict(zero=1, micro_batches=2)),
    "2, data 4 tensor 2": (dict(data=4, tensor=2), AUTO, dict(zero=2, micro_batches=2)),
    "3, fsdp 4 tensor 2": (dict(fsdp=4, tensor=2), EXPLICIT, dict(zero=3, axis="fsdp", layer=True, micro_batches=2)),
    "1, tensor left to XLA": (dict(data=4, tensor=2), AUTO, dict(zero=1, by_hand=False)),
    "0, data 8": (dict(data=8), AUTO, dict(zero=0)),
    "3, data 2 fsdp 2 tensor 2, over fsdp": (
        dict(data=2, fsdp=2, tensor=2),
        AUTO,
        dict(zero=3, axis=("data", "fsdp"), over="fsdp", micro_batches=2),
    ),
    "0, data 4 tensor 2": (dict(data=4, tensor=2), EXPLICIT, dict(zero=0, micro_batches=2)),
    "1, fsdp 4 tensor 2": (dict(fsdp=4, tensor=2), AUTO, dict(zero=1, axis="fsdp")),
    "1, data 2 fsdp 2 tensor 2": (dict(data=2, fsdp=2, tensor=2), AUTO, dict(zero=1, axis=("data", "fsdp"))),
    "2, data 8": (dict(data=8), AUTO, dict(zero=2)),
    "3, data 8": (dict(data=8), AUTO, dict(zero=3, micro_batches=2)),
    "3, data 4 tensor 2": (dict(data=4, tensor=2), AUTO, dict(zero=3)),
    "3, a ring of fsdp 4, tensor 2": (
        dict(fsdp=4, tensor=2),
        AUTO,
        dict(zero=3, axis="fsdp", layer=True, micro_batches=2, implementation="ring"),
    ),
}
FURTHER = tuple(CASES)[3:]


def textbook(training, axis, zero, micro_batches, layer, ring=False):
    """{(kind, axes): bytes of the arrays}, of a step. ring: along one axis, with zero 3."""
    mesh, total = training.mesh, dict(shards=0, bucket=0, layers=0)
    for (path, leaf), spec in zip(
        jax.tree.leaves_with_path(parameters()), jax.tree.leaves(training.specs, is_leaf=is_spec), strict=True
    ):
        bytes_ = leaf.size * 4 // (mesh.shape["tensor"] if "tensor" in jax.tree.leaves(tuple(spec)) else 1)
        total["bucket" if leaf.size <= 64 else "shards"] += bytes_
        total["layers"] += bytes_ if len(path) > 1 and leaf.size > 64 else 0
    names = "+".join((axis,) if isinstance(axis, str) else axis)
    bucket = math.ceil(total["bucket"] / 512) * 512
    if zero == 0:
        return {("all-reduce", names): total["shards"] + total["bucket"]}
    times = micro_batches if zero >= 2 else 1
    scattered = times * (total["shards"] + bucket)
    again = total["layers"] if layer else 0  # by the backward
    gathered = bucket + (total["shards"] if zero < 3 else times * (total["shards"] + again))
    if ring:  # each device sends all parts of an array but one
        sent = (scattered - times * bucket + gathered - bucket) * (1 - 1 / mesh.shape[axis])
        return {("collective-permute", names): sent, ("reduce-scatter", names): times * bucket}
    return {("reduce-scatter", names): scattered, ("all-gather", names): gathered}


@pytest.mark.parametrize("case", [pytest.param(case, marks=SLOW if case in FURTHER else ()) for case in CASES])
def test_twenty_steps_are_those_of_one_device(case):
    sizes, kind, options = CASES[case]
    training = Training(sharding.make_mesh(**sizes, axis_types=kind), **options)
    got, values = training.run()
    want, expected, norms = on_one_device()
    assert (norms > 0.5).all()  # every step is clipped
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    moved(got, want, 1e-4)
    zero, axis = options["zero"], options.get("axis", "data")
    if options.get("by_hand", True) and "over" not in options:
        found = sent(training.program, dict(training.mesh.shape))
        ring = options.get("implementation") == "ring"
        asked = textbook(training, axis, zero, options.get("micro_batches", 1), options.get("layer"), ring)
        for key, count in asked.items():
            assert math.isclose(found[key], count, rel_tol=0.05), (key, found, asked)
    if zero:
        reduced = [one for one in collectives(training.program.as_text(), dict(training.mesh.shape)) if one["axis"]]
        over_batch = [one for one in reduced if set(one["axis"].split("+")) & {"data", "fsdp"}]
        assert max(one["bytes"] for one in over_batch if one["kind"] == "all-reduce") <= 16  # norm, loss


# ---- small trees ---------------------------------------------------------------------------------------------------

# Over 8 devices: two that are divided, one that is padded, a bucket (small = 64) of three, of two weight decays; none.
SHAPES = {"a": (16, 24), "b": (3, 5, 40), "odd": (13, 9), "c": (7,), "d": (), "e": (3, 3), "none": (0, 4)}


def tree(seed, lead=(), dtype=np.float32):
    random = np.random.default_rng(seed)
    return {name: random.standard_normal((*lead, *shape)).astype(dtype) for name, shape in SHAPES.items()}


def by_apply(reduction, params, grads, state):
    return reduction.apply(params, jax.tree.map(lambda g: g[0], grads), state)


def by_update(reduction, params, grads, state):
    updates, state = reduction.update(jax.tree.map(lambda g: g[0], grads), state, params)
    return optax.apply_updates(params, updates), state


def steps_of(optimizer, by=by_apply, **options):
    """A function of gradients [steps, devices, …], to (parameters, state) after these steps from `tree(0)`."""
    reduction, mesh = sharding.gradient_reduction(optimizer, small=64, **options), sharding.make_mesh(data=8)
    specs = reduction.state_specs(tree(0), mesh=mesh)

    def run(params, grads):
        advance = lambda carry, grads: (by(reduction, carry[0], grads, carry[1]), None)
        return lax.scan(advance, (params, reduction.init(params)), grads)[0]

    local = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=(P(), specs)))
    return lambda grads: jax.device_get(local(tree(0), grads))


def trained(optimizer, steps, by=by_apply, **options):
    return steps_of(optimizer, by, **options)(tree(1, (steps, 8)))[0]


def plainly(optimizer, steps, of=np.mean):
    params, grads = tree(0), jax.tree.map(lambda g: of(g, 1), tree(1, (steps, 8)))
    state, apply = optimizer.init(params), jax.jit(optimizer.apply)
    for i in range(steps):
        params, state = apply(params, jax.tree.map(lambda g, i=i: g[i], grads), state)
    return jax.device_get(params)


def same(got, want, tolerance=1e-6):
    for name in want:
        assert np.shape(got[name]) == np.shape(want[name])
        assert not np.size(want[name]) or error(got[name], want[name]) < tolerance, name


OPTIMIZERS = {
    "adamw": optim.adamw(1e-2, weight_decay=0.1, mask=matrices, max_norm=2.0, nu_dtype="float32"),
    "lion": optim.lion(optax.linear_schedule(1e-2, 0.0, 10), weight_decay=0.1),
    "momentum": optim.sgd(1e-2, 0.9, nesterov=True, max_norm=2.0),
    "sgd": optim.sgd(1.0),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name == "momentum" else ()) for name in OPTIMIZERS])
@pytest.mark.parametrize("by", [by_apply, pytest.param(by_update, marks=SLOW)])
def test_every_optimizer_by_both_faces(name, by):
    """ "sgd" of one step at rate 1 are the gradients themselves."""
    steps = 1 if name == "sgd" else 3
    got = trained(OPTIMIZERS[name], steps, by, zero=0 if name == "lion" and by is by_update else 1)
    same(got, plainly(OPTIMIZERS[name], steps), 1e-5)


def test_a_ring_sums_what_a_collective_does():
    """13 rows padded to 16 are parts of two, halves of one; 5 rows of "b" are split along 40 columns."""
    got = trained(OPTIMIZERS["sgd"], 1, implementation="ring")
    same(got, plainly(OPTIMIZERS["sgd"], 1))


def test_parts_of_a_sum_are_not_averaged():
    got = trained(OPTIMIZERS["sgd"], 1, reduce="sum")
    same(got, plainly(OPTIMIZERS["sgd"], 1, of=np.sum))


@pytest.mark.parametrize("whole", [False, True], ids=["its part's mean", "the mean of all"])
def test_the_loss_may_be_the_mean_of_all(whole):
    """Of what `value_and_grad` differentiates; after `jax.lax.pmean` every device has the same. And an aux."""
    reduction, mesh = sharding.gradient_reduction(OPTIMIZERS["sgd"], zero=2, small=64), sharding.make_mesh(data=8)

    def loss(params, x):
        mean = jnp.mean(sum(jnp.sum(jnp.sin(p)) for p in params.values()) * x)
        return (lax.pmean(mean, "data"), {"rows": lax.psum(jnp.sum(x), "data")}) if whole else mean

    def step(params, x):
        state = reduction.init(params)
        value, grads = reduction.value_and_grad(loss, micro_batches=2, has_aux=whole)(params, state, x)
        return value, reduction.apply(params, grads, state)[0]

    x = np.arange(16, dtype=np.float32) - 3
    value, got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(tree(0), x)
    mean = x.mean()
    if whole:
        value, aux = value
        np.testing.assert_allclose(aux["rows"], [x[0::2].sum(), x[1::2].sum()])
    assert error(value, mean * sum(np.sin(p).sum(dtype=np.float64) for p in tree(0).values())) < 1e-5
    same(got, {name: p - mean * np.cos(p) for name, p in tree(0).items()})


class Model(nnx.Module):
    """Split over "tensor" in sequence and features; its loss is the mean over all devices."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = sharding.nn.VocabParallelEmbed(VOCAB, WIDTH, sequence=True, rngs=rngs)
        self.block = sharding.nn.ParallelTransformerBlock(8, WIDTH, HIDDEN, sequence=True, is_causal=True, rngs=rngs)
        self.norm = RMSNorm(WIDTH, rngs=rngs)

    def loss(self, tokens):
        x, weight = self.norm(self.block(self.embed(tokens[:, :-1]))), self.embed.embedding[...].T
        return sharding.vocab_parallel_cross_entropy(x, weight, tokens[:, 1:], sequence=True, axis_names="data")


@SLOW
def test_a_model_of_flax_layers():
    mesh = sharding.make_mesh(data=2, tensor=4)
    graph, state = nnx.split(Model())
    specs, params = nnx.get_partition_spec(state), sharding.shard(state, mesh)
    reduction = sharding.gradient_reduction(OPTIMIZERS["adamw"], small=64)

    def step(params, tokens):
        state = reduction.init(params)
        loss = lambda params, tokens: nnx.merge(graph, params).loss(tokens)
        value, grads = reduction.value_and_grad(loss)(params, state, tokens)
        return value, reduction.apply(params, grads, state)[0]

    def loss(params, tokens):
        return nnx.merge(graph, jax.tree.map(lambda p: sharding.copy(p, "data"), params)).loss(tokens)

    over = functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("data")))
    value, got = jax.jit(over(step, out_specs=(P(), specs)))(params, TOKENS[0])
    expected, grads = jax.jit(jax.value_and_grad(over(loss, out_specs=P())))(params, TOKENS[0])
    optimizer, (start, grads) = OPTIMIZERS["adamw"], jax.device_get((params, grads))
    want, _ = optimizer.apply(start, grads, optimizer.init(start))
    assert error(value, expected) < 1e-6
    for a, b in zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(want), strict=True):
        assert error(a, b) < 1e-5


def test_where_optax_goes():
    chained = optax.chain(optax.scale(2.0), sharding.gradient_reduction(optim.sgd(1.0)))
    mesh = sharding.make_mesh(data=8)

    def step(params, grads):
        return chained.update(jax.tree.map(lambda g: g[0], grads), chained.init(params), params)[0]

    updates = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(tree(0), tree(1, (8,)))
    same(updates, jax.tree.map(lambda g: -2 * g.mean(0), tree(1, (8,))))


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
    shapes=st.lists(st.lists(st.sampled_from([0, 1, 3, 8, 9]), max_size=3).map(tuple), max_size=4),
    devices=st.sampled_from([1, 2, 3, 8]),
    small=st.sampled_from([0, 10, 1000]),
    zero=st.integers(0, 2),
)
def test_the_parts_of_any_tree_make_the_whole(shapes, devices, small, zero):
    how = sharding.gradient_reduction(optim.sgd(1.0, 0.9), zero=zero, small=small).how
    every = [module._Leaf(str(i), shape, jnp.dtype("float32"), frozenset()) for i, shape in enumerate(shapes)]
    leaves = module._Leaves(None, every, [0.0] * len(shapes), {"data": devices})
    groups = module._groups(how, leaves)
    assert sorted(i for group in groups for i in group.members) == list(range(len(shapes)))
    arrays = [np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape) + 100 * i for i, leaf in enumerate(every)]
    for group in groups:
        whole = module._packed(group, [jnp.asarray(arrays[i]) for i in group.members], jnp.float32)
        assert whole.shape == group.whole(every)
        if group.dimension is not None:
            parts = np.split(np.asarray(whole), group.parts, group.dimension)
            assert {part.shape for part in parts} == {group.part(every)}
        if len(group.members) > 1:
            assert sum(every[i].size for i in group.members) <= module._BUCKET
        assert not group.bucket or all(every[i].size <= small or not every[i].shape for i in group.members)
        for i, leaf in zip(group.members, module._unpacked(group, whole, every), strict=True):
            np.testing.assert_array_equal(leaf, arrays[i])


def test_buckets_have_a_largest_size(monkeypatch):
    monkeypatch.setattr(module, "_BUCKET", 10)
    got, state = steps_of(OPTIMIZERS["momentum"])(tree(1, (2, 8)))
    shapes = jax.tree.map(np.shape, state.optimizer.trace)
    assert shapes == {
        "a": (16, 24), "b": (3, 5, 40), "odd": (16, 9), "c": (128,), "d": None, "e": (128,), "none": (0, 4),
    }  # fmt: skip
    same(got, plainly(OPTIMIZERS["momentum"], 2))


# ---- loss scaling --------------------------------------------------------------------------------------------------

SCALE = sharding.LossScale(initial=1024.0, growth_interval=3)


@pytest.mark.parametrize(
    "options", [dict(zero=1), dict(zero=2, compression="int8"), pytest.param(dict(zero=0), marks=SLOW)], ids=str
)
def test_one_device_without_a_finite_gradient_and_no_device_steps(options):
    """Gradients are those of the scaled loss. A step with an inf on device 5 changes nothing but the scale."""
    run = steps_of(OPTIMIZERS["adamw"], loss_scale=SCALE, **options)
    first, second, bad = (jax.tree.map(lambda g: g[None], tree(i + 1, (8,))) for i in range(3))
    bad["c"][0, 5, 3] = np.inf
    joined = lambda *steps: jax.tree.map(lambda *gs: np.concatenate(gs), *steps)
    times = lambda scale, grads: jax.tree.map(lambda g: np.float32(scale) * g, grads)
    got, state = run(joined(times(1024, first), bad, times(512, second)))
    want, wanted = run(joined(times(1024, first), times(1024, second), bad))
    for a, b in zip(jax.tree.leaves((got, state[:2])), jax.tree.leaves((want, wanted[:2])), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [float(x) for x in state.loss_scale] == [512, 1, 1] and [float(x) for x in wanted.loss_scale] == [512, 0, 1]
    assert int(state.optimizer.count) == 2
    if options.get("compression") is None:
        optimizer, exact = OPTIMIZERS["adamw"], tree(0)
        state = optimizer.init(exact)
        for grads in (first, second):
            exact, state = jax.jit(optimizer.apply)(exact, jax.tree.map(lambda g: g.mean((0, 1)), grads), state)
        same(got, exact, 1e-5)


def test_the_loss_scale_finds_its_value():
    state, scales = SCALE.init(), []
    for finite in (True, True, True, True, False, True, True, True):
        state = SCALE.adjust(state, jnp.asarray(finite))
        scales.append(float(state.scale))
    assert scales == [1024, 1024, 2048, 2048, 1024, 1024, 1024, 2048]
    assert int(state.skipped) == 1
    lowest = sharding.LossScale(initial=1.0, smallest=1.0, largest=1.0, growth_interval=1)
    assert all(float(lowest.adjust(lowest.init(), jnp.asarray(finite)).scale) == 1 for finite in (True, False))


def test_float16_learns_with_a_loss_scale_and_not_without():
    """A gradient of 1e-8 is 0 in float16."""
    policy = sharding.Precision(compute=jnp.float16, reduction=jnp.float16)

    def of(scale):
        reduction = sharding.gradient_reduction(optim.sgd(1.0), precision=policy, loss_scale=scale)

        def step(params, x):
            state = reduction.init(params)
            small = lambda params, x: jnp.mean((policy.computed(params) * x)[0] * jnp.float16(1e-2)) * jnp.float16(1e-3)
            value, grads = reduction.value_and_grad(small)(params, state, x)
            return value, reduction.apply(params, grads, state)[0]

        mesh = sharding.make_mesh(data=8)
        local = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        return jax.jit(local)(jnp.zeros(1024, jnp.float32), jnp.ones((8, 1024), jnp.float16))

    exact = -1e-5 / 1024
    assert np.abs(of(None)[1] / exact - 1).max() > 0.05
    value, got = of(sharding.LossScale())
    assert value.dtype == jnp.float32 and np.abs(got / exact - 1).max() < 2e-3


# ---- precision and compression -------------------------------------------------------------------------------------


def test_what_travels_in_sixteen_bits():
    """Parameters are gathered as bfloat16; gradients are summed as bfloat16 or float32."""
    for reduction, share in ((jnp.bfloat16, 0.5), (jnp.float32, 1.0)):
        policy = sharding.Precision(compute=jnp.bfloat16, reduction=reduction)
        reducing = sharding.gradient_reduction(optim.adamw(1e-3), zero=3, small=0, precision=policy)
        mesh = sharding.make_mesh(data=8)
        params = {
            name: np.random.default_rng(i).standard_normal((64, 64), np.float32) / 8 for i, name in enumerate("wv")
        }
        specs = reducing.parameter_specs(params, mesh=mesh)
        assert policy.layers == {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}

        def gradients(params, x, reducing=reducing, specs=specs, policy=policy):
            def loss(params, x):
                w = reducing.gather(params, specs)
                return jnp.mean(jnp.square((jnp.tanh(policy.computed(x) @ w["w"]) @ w["v"]).astype(jnp.float32)))

            return reducing.value_and_grad(loss)(params, reducing.init(params), x)[1].shards

        local = jax.shard_map(gradients, mesh=mesh, in_specs=(specs, P("data")), out_specs=(P("data"),) * 2)
        x = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
        text = jax.jit(local).lower(params, x).as_text()  # XLA on a CPU widens bfloat16
        wide = {kind: text.count(f"stablehlo.{kind}") for kind in ("reduce_scatter", "all_gather")}
        assert wide == {"reduce_scatter": 2, "all_gather": 2}
        scattered = "bf16" if share == 0.5 else "f32"
        assert text.count(f"(tensor<64x64x{scattered}>) -> tensor<8x64x{scattered}>") == 2
        assert text.count("(tensor<8x64xbf16>) -> tensor<64x64xbf16>") == 2
        w = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        exact = jax.grad(lambda p: jnp.mean(jnp.square(jnp.tanh(x @ p["w"]) @ p["v"])))(w)
        for got, name in zip(jax.jit(local)(params, x), ("v", "w"), strict=True):
            assert error(got, exact[name]) < 1e-2


@pytest.mark.parametrize("compression", [pytest.param("bfloat16", marks=SLOW), "int8"])
def test_error_feedback_makes_up_for_what_was_not_sent(compression):
    """The same gradient g every step, sgd at rate 1. What was sent in t steps is t · g - e: the error stays below half
    a step of the code. Without feedback it is t times that of one step."""
    steps, gradient = 40, tree(7, (8,))
    exact = {name: tree(0)[name] - steps * g.astype(np.float64).mean(0) for name, g in gradient.items()}
    every = jax.tree.map(lambda g: np.broadcast_to(g, (steps, *g.shape)), gradient)
    of = lambda feedback: steps_of(optim.sgd(1.0), compression=compression, error_feedback=feedback)(every)
    largest = max(float(np.abs(g).max()) for g in gradient.values() if g.size)
    step_of_code = largest * (2**-7 if compression == "bfloat16" else 1 / 127)
    bound = 0.5 * step_of_code * 1.02 + 1e-4  # e itself enlarges what is coded; float32 adds 40 numbers
    got, state = of(True)
    plain, no_state = of(False)
    for name in ("a", "b", "odd"):
        assert np.abs(got[name] - exact[name]).max() < bound
        assert np.abs(plain[name] - exact[name]).max() > 4 * bound
    assert no_state.error is None and state.error["a"].shape == (8, 16, 24) and state.error["d"] is None
    held = state.error["odd"].astype(np.float64).sum(0)[:13]  # by the devices: what is missing
    assert np.abs(got["odd"] - exact["odd"] - held).max() < 1e-4


def test_what_compression_sends():
    reduction = sharding.gradient_reduction(optim.sgd(1.0), compression="int8", small=0)
    params = {"w": jnp.ones((64, 512)), "v": jnp.ones((512, 384))}
    mesh = sharding.make_mesh(data=8)
    specs = reduction.state_specs(params, mesh=mesh)

    def step(params, grads, state):
        return by_apply(reduction, params, grads, state)

    grads = jax.tree.map(lambda p: jnp.ones((8, *p.shape)), params)
    init = jax.jit(jax.shard_map(reduction.init, mesh=mesh, in_specs=P(), out_specs=specs))
    local = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data"), specs), out_specs=(P(), specs))
    found = sent(compiled(local, params, grads, init(params)), dict(mesh.shape))
    elements = sum(p.size for p in params.values())
    # A scale of four bytes for 256 elements of w, for 192 of v.
    scales = 4 * (params["w"].size // 256 + params["v"].size // 192)
    assert found == {("all-to-all", "data"): elements + scales, ("all-gather", "data"): 4 * elements}


@SLOW
def test_training_with_int8_gradients():
    values = Training(sharding.make_mesh(data=8), compression="int8", zero=2).run()[1]
    expected = on_one_device()[1]
    np.testing.assert_allclose(values, expected, rtol=2e-2)
    assert expected[-1] < 0.7 * expected[0]


# ---- memory, checkpoints -------------------------------------------------------------------------------------------


LEAVES = 12
WHOLE = LEAVES * 128 * 256 * 4


def memory(devices, zero):
    """Bytes on one device of (parameters, state, what the step needs besides)."""
    mesh = sharding.make_mesh(data=devices, devices=jax.devices()[:devices])
    reduction = sharding.gradient_reduction(optim.adamw(1e-3), zero=zero, small=0)
    params = [jax.ShapeDtypeStruct((128, 256), jnp.float32)] * LEAVES
    specs = reduction.parameter_specs(params, mesh=mesh)
    state_specs = reduction.state_specs(params, specs, mesh=mesh)
    state = jax.eval_shape(jax.shard_map(reduction.init, mesh=mesh, in_specs=(specs,), out_specs=state_specs), params)

    def loss(params, x):
        for p, spec in zip(params, specs, strict=True):
            p = reduction.gather(p, spec) if zero == 3 else p
            x = jnp.tanh(x @ p)[:, :128]
        return jnp.mean(x)

    def step(params, state, x):
        grads = reduction.value_and_grad(loss, micro_batches=2)(params, state, x)[1]
        return reduction.apply(params, grads, state)

    local = jax.shard_map(step, mesh=mesh, in_specs=(specs, state_specs, P("data")), out_specs=(specs, state_specs))
    x = jax.ShapeDtypeStruct((2 * devices, 128), jnp.float32)
    placed = lambda tree, specs: jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )
    given = placed(params, specs), placed(state, state_specs), placed(x, P("data"))
    analysis = jax.jit(local, donate_argnums=(0, 1)).lower(*given).compile().memory_analysis()
    shares = [
        sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
        for tree in given
    ]
    assert analysis.argument_size_in_bytes == pytest.approx(sum(shares), rel=0.01)
    return shares[0], shares[1], analysis.temp_size_in_bytes


@pytest.mark.parametrize("devices", [pytest.param(n, marks=SLOW if n < 8 else ()) for n in (1, 2, 4, 8)])
def test_memory_falls_with_the_devices(devices):
    needed = {zero: memory(devices, zero) for zero in (1, 2, 3)}
    for zero, (params, state, _) in needed.items():
        assert params == (WHOLE // devices if zero == 3 else WHOLE)
        assert state == pytest.approx(2 * WHOLE // devices, rel=1e-3)
    # Gradients added over micro-batches: whole, or shards; one or two are whole before they are sent.
    saved = needed[1][2] - needed[2][2]
    assert saved == pytest.approx(WHOLE * (1 - 1 / devices), abs=3 * WHOLE / LEAVES), needed


OTHERS = (dict(data=2, fsdp=2), ("data", "fsdp"), dict(zero=3, over="fsdp")), (dict(data=4), "data", dict(zero=1))


@pytest.mark.parametrize("other", [OTHERS[0], pytest.param(OTHERS[1], marks=SLOW)], ids=str)
def test_a_checkpoint_goes_on_on_another_mesh(other, tmp_path):
    """Saved on 8 devices with zero=2, read on 2 × 2 with zero=3 over one axis of two, or on 4 with zero=1."""
    optimizer, shapes = OPTIMIZERS["adamw"], {"a": (16, 24), "b": (5, 4, 64), "c": (40,), "d": ()}
    random = np.random.default_rng(3)
    arrays = lambda *lead: {k: random.standard_normal((*lead, *s)).astype(np.float32) for k, s in shapes.items()}
    params, gradients = arrays(), [arrays(8) for _ in range(4)]

    def on(mesh, axis, state=None, params=params, over=None, **options):
        """(step, parameters, state or shapes to read it by)"""
        reduction = sharding.gradient_reduction(optimizer, axis=axis, small=64, loss_scale=SCALE, **options)
        specs = reduction.parameter_specs(params, mesh=mesh, over=over)
        state_specs = reduction.state_specs(params, specs, mesh=mesh)
        place = lambda specs: jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        init = jax.jit(jax.shard_map(reduction.init, mesh=mesh, in_specs=(specs,), out_specs=state_specs))
        placed = jax.device_put(params, place(specs))
        state = init(placed)
        target = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            (placed, state),
            place((specs, state_specs)),
        )
        count = 8 // mesh.size

        def step(params, state, grads):
            # The loss whose gradients these are: a device has those of several.
            loss = lambda p, grads: sum(
                jnp.vdot(w, g.sum(0)) / count
                for w, g in zip(
                    jax.tree.leaves(reduction.gather(p, specs) if options["zero"] == 3 else p),
                    jax.tree.leaves(grads),
                    strict=True,
                )
            )
            _, found = reduction.value_and_grad(loss)(params, state, grads)
            return reduction.apply(params, found, state)

        both = (specs, state_specs)
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(*both, P(axis)), out_specs=both)), placed, state, target

    eight = sharding.make_mesh(data=8)
    step, p, s, _ = on(eight, "data", zero=2)
    for g in gradients[:2]:
        p, s = step(p, s, g)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", (p, s))
    for g in gradients[2:]:
        p, s = step(p, s, g)

    sizes, axis, options = other
    step, _, _, target = on(sharding.make_mesh(**sizes, devices=jax.devices()[:4]), axis, **options)
    with ocp.StandardCheckpointer() as checkpointer:
        p2, s2 = checkpointer.restore(tmp_path / "saved", target)
    for g in gradients[2:]:
        p2, s2 = step(p2, s2, g)
    same(jax.device_get(p2), jax.device_get(p), 1e-5)
    assert int(s2.optimizer.count) == 4 and int(s2.loss_scale.good) == 1


# ---- what it refuses -----------------------------------------------------------------------------------------------

PARAMS = {"w": np.ones((16, 8), np.float32), "b": np.ones(8, np.float32)}
make = functools.partial(sharding.gradient_reduction, optim.adamw(1e-3))


def inside(function, params=PARAMS, **options):
    mesh = sharding.make_mesh(data=8)
    return jax.eval_shape(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P("data"), **options), params)


def step_of(reduction, grads=lambda p: p, state=None, params=lambda p: p):
    def step(p):
        p = params(p)
        given = grads(jax.tree.map(lambda x: sharding.copy(x, "data"), p))
        return reduction.apply(p, given, reduction.init(p) if state is None else state(p))

    return lambda: inside(step)


def other_state(reduction, change=lambda p: p):
    return lambda p: reduction.init(change(p))


BAD = {
    "optimizer must be one of jaxops.optim .* got GradientTransformation": lambda: sharding.gradient_reduction(
        optax.adam(1e-3)
    ),
    "axis must be a mesh axis or several different ones, got \\('data', 'data'\\)": lambda: make(axis=("data", "data")),
    "axis must be a mesh axis or several different ones, got 3": lambda: make(axis=3),
    r"params\['b'\] must be bfloat16, the precision's parameter, got float32": lambda: inside(
        make(precision=sharding.Precision(parameter=jnp.bfloat16)).init
    ),
    "zero must be 0, 1, 2 or 3, got 4": lambda: make(zero=4),
    "reduce must be 'mean' or 'sum', got 'max'": lambda: make(reduce="max"),
    "compression must be None or one of .*got 'int4'": lambda: make(compression="int4"),
    "compression must be None unless zero is 1 or 2, got 'int8' with 3": lambda: make(zero=3, compression="int8"),
    r"implementation must be one of \('xla', 'ring', 'pallas'\), got 'triton'": lambda: make(implementation="triton"),
    "small must be at least 0, got -1": lambda: make(small=-1),
    "precision must be a sharding.Precision or None, got str": lambda: make(precision="bfloat16"),
    "Precision: compute must be a floating dtype, got int8": lambda: sharding.Precision(compute=jnp.int8),
    "Precision: output must be a floating dtype, got 'wide'": lambda: sharding.Precision(output="wide"),
    "LossScale: initial must be above 0, got 0": lambda: sharding.LossScale(initial=0.0),
    "LossScale: growth_interval must be a whole number, got 1.5": lambda: sharding.LossScale(growth_interval=1.5),
    r"LossScale: initial must be in \[smallest": lambda: sharding.LossScale(initial=0.5),
    "axis must be a mesh axis of an enclosing jax.shard_map, got 'rows', with axes": lambda: inside(
        make(axis="rows").init
    ),
    "with no shard_map there": lambda: make().init(PARAMS),
    "check_vma=True": lambda: inside(make().init, check_vma=False),
    r"params\['w'\] must be of a floating dtype, got int32": lambda: inside(
        make().init, {"w": np.ones((8, 8), np.int32)}
    ),
    r"grads\['b'\] must be the device's own gradient, .*summed already": step_of(
        make(small=0), lambda p: p | {"b": jnp.ones(8)}
    ),
    r"grads\['w'\] must have the shape \(16, 8\) of its parameter, got \(8, 16\)": step_of(
        make(), lambda p: p | {"w": p["w"].T}
    ),
    r"grads must be a tree like params: only one of them has \['b'\]": step_of(make(), lambda p: {"w": p["w"]}),
    "grads must hold shards of the shapes .* reduced for other": step_of(
        make(small=0), lambda p: module.Gradients((p["w"],), ())
    ),
    "state must be a ReductionState of AdamWState, got AdamWState": step_of(
        make(), state=other_state(optim.adamw(1e-3))
    ),
    "state must be a ReductionState of AdamWState, got LionState": step_of(
        make(), state=other_state(sharding.gradient_reduction(optim.lion(1e-3)))
    ),
    r"state.mu\['b'\] must be of shape \(1,\) for a parameter \(8,\), got of shape \(8,\): .* another zero": step_of(
        make(small=0), state=other_state(make(zero=0))
    ),
    r"state.mu\['w'\] must be of shape \(2, 8\) .* got of shape \(1, 8\): the state was made for other": step_of(
        make(small=0), state=other_state(make(small=0), lambda p: p | {"w": p["w"][:8]})
    ),
    "state.loss_scale must be there": step_of(make(loss_scale=SCALE), state=other_state(make())),
    "state.error must not be there": step_of(make(), state=other_state(make(compression="int8"))),
    r"with zero=3 params\['w'\], of 128 elements, must be split over 'data'": step_of(make(zero=3, small=64)),
    r"with zero=3 params\['w'\], of shape \(9, 15\), must have a dimension that is a multiple of 8": lambda: make(
        zero=3, small=64
    ).parameter_specs({"w": np.ones((9, 15), np.float32)}, mesh=sharding.make_mesh(data=8)),
    "axis must be in the mesh, got 'rows'": lambda: make(axis="rows").state_specs(
        PARAMS, mesh=sharding.make_mesh(data=8)
    ),
    "with no mesh: give one, or call jax.set_mesh": lambda: make().state_specs(PARAMS),
    "specs must be a tree like params": lambda: make().state_specs(
        PARAMS, {"w": P()}, mesh=sharding.make_mesh(data=8)
    ),
    "over must be among the axes .* got 'tensor'": lambda: make(zero=3).parameter_specs(
        PARAMS, mesh=sharding.make_mesh(data=8), over="tensor"
    ),
    "can be gathered only if they come last": lambda: inside(
        lambda p: make().gather(p["w"], P(("data", "tensor")))
    ),
    "loss must return a floating scalar": lambda: inside(
        lambda p: make().value_and_grad(lambda p: p["b"])(p, make().init(p))
    ),
    "micro_batches must be a whole number above 0, got 0": lambda: inside(
        lambda p: make().value_and_grad(lambda p: p["b"][0], micro_batches=0)(p, make().init(p))
    ),
    r"batch\[0\] must have a first dimension that micro_batches = 3 divide, got shape \(8,\)": lambda: inside(
        lambda p: make().value_and_grad(lambda p, x: p["b"][0], micro_batches=3)(p, make().init(p), p["b"])
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_update_needs_the_parameters():
    reduction = make()
    with pytest.raises(ValueError, match="params must be given"):
        inside(lambda p: reduction.update(lax.pcast(p, "data", to="varying"), reduction.init(p)))


@SLOW
def test_one_kernel_does_what_three_collectives_and_an_update_do():
    """Interpreted, on a mesh that says it is of TPUs: two leaves and a bucket by the kernel, one by XLA."""
    optimizer = optim.adamw(1e-2, weight_decay=0.1, mask=matrices)
    mesh = sharding.make_mesh(data=8)
    as_chip = mesh.abstract_mesh.update(abstract_device=chips.abstract_device(chips.named("v5e")))
    reduction = sharding.gradient_reduction(optimizer, small=64, implementation="pallas")
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))

    def run(params, grads):
        state = reduction.init(params)
        for i in range(1):
            params, state = by_apply(reduction, params, jax.tree.map(lambda g, i=i: g[i], grads), state)
        return params

    local = jax.jit(jax.shard_map(run, mesh=as_chip, in_specs=(P(), P(None, "data")), out_specs=P()))
    with interpreter.tpu():
        program = jax.make_jaxpr(local)(tree(0), tree(1, (1, 8)))
        got = jax.device_get(local(place(tree(0)), place(tree(1, (1, 8)), None, "data")))
    assert str(program).count("reduce_update_gather") >= 3
    same(got, plainly(optimizer, 1), 1e-5)


def test_without_its_chip_xla_does_what_the_kernel_would():
    optimizer = optim.adamw(1e-2, weight_decay=0.1, mask=matrices)
    same(trained(optimizer, 2, implementation="pallas"), plainly(optimizer, 2), 1e-5)


@pytest.mark.parametrize(
    "what, options",
    [("zero", dict(zero=3)), ("compression", dict(compression="int8")), ("loss_scale", dict(loss_scale=SCALE))],
)
def test_what_the_kernel_cannot_serve(what, options):
    with pytest.raises(ValueError, match=f"{what} must be .* with implementation='pallas'"):
        sharding.gradient_reduction(optim.adamw(1e-3), implementation="pallas", **options)
    with pytest.raises(ValueError, match="max_norm must be None with implementation='pallas'"):
        sharding.gradient_reduction(optim.adamw(1e-3, max_norm=1.0), implementation="pallas")


def test_layers_that_gather_their_own_parameters():
    """Weights that `sharding.gated_mlp` sends along fsdp beside its products need no `gather`."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    random = np.random.default_rng(3)
    array = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    params = {"gate": array(16, 24), "up": array(16, 24), "down": array(24, 16)}
    specs = {"gate": P("fsdp", "tensor"), "up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
    x, optimizer = array(4, 6, 16), optim.sgd(0.1)
    reduction = sharding.gradient_reduction(optimizer, axis=("data", "fsdp"), zero=3, small=16)
    assert reduction.parameter_specs(params, specs, mesh=mesh) == specs

    def step(params, x):
        def loss(p, x):
            y = sharding.gated_mlp(x, p["gate"], p["up"], p["down"], sequence=True, overlap=True, fsdp="fsdp")
            return lax.pmean(jnp.mean(jnp.sin(y)), "tensor")

        state = reduction.init(params)
        value, grads = reduction.value_and_grad(loss)(params, state, x)
        return value, reduction.apply(params, grads, state)[0]

    def on_one(params, x):
        mlp = lambda p: jnp.mean(jnp.sin(jaxops.gated_linear_unit(x, p["gate"], p["up"]) @ p["down"]))
        value, grads = jax.value_and_grad(mlp)(params)
        return value, optimizer.apply(params, grads, optimizer.init(params))[0]

    stream = P(("data", "fsdp"), "tensor")
    split = jax.shard_map(step, mesh=mesh, in_specs=(specs, stream), out_specs=(P(), specs))
    for got, want in zip(
        jax.tree.leaves(jax.jit(split)(params, x)), jax.tree.leaves(jax.jit(on_one)(params, x)), strict=True
    ):
        assert error(jax.device_get(got), want) < 1e-5
