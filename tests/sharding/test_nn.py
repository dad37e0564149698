"""A language model split over a mesh: loss and every gradient are those of one device, and it sends what it must."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxops
import sharding
import sharding.nn
from jaxops.nn import RMSNorm, TransformerBlock
from tests.compare import error, no_worse
from tests.sharding.traffic import compiled, sent

BATCH, LENGTH, WIDTH, HIDDEN, HEADS, KV_HEADS, VOCAB = 4, 16, 32, 48, 8, 8, 64
OPTIONS = {"num_kv_heads": KV_HEADS, "is_causal": True, "use_rope": True}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)


class Model(nnx.Module):
    """embed → block → norm → cross-entropy with the embedding's transpose; with `layers`, split over "tensor"."""

    def __init__(self, dtype=None, split=False, **options):
        rngs, self.split, self.options = nnx.Rngs(0), split, options
        if split:
            sequence = {"sequence": options.get("sequence", False)}
            self.embed = sharding.nn.VocabParallelEmbed(VOCAB, WIDTH, dtype=dtype, rngs=rngs, **sequence)
            self.block = sharding.nn.ParallelTransformerBlock(
                HEADS, WIDTH, HIDDEN, dtype=dtype, rngs=rngs, **OPTIONS, **options
            )
        else:
            self.embed = nnx.Embed(VOCAB, WIDTH, dtype=dtype, rngs=rngs)
            self.block = TransformerBlock(HEADS, WIDTH, HIDDEN, dtype=dtype, rngs=rngs, **OPTIONS)
        self.norm = RMSNorm(WIDTH, dtype=dtype, rngs=rngs)

    def loss(self, tokens, labels):
        x = self.norm(self.block(self.embed(tokens)))
        weight = self.embed.embedding[...].astype(x.dtype).T
        if not self.split:
            return jaxops.linear_cross_entropy(x, weight, labels)
        return sharding.vocab_parallel_cross_entropy(
            x, weight, labels, sequence=self.options.get("sequence", False), axis_names=("data", "context")
        )


@functools.cache
def expected(dtype=None):
    """(loss, gradients) on one device."""
    graph, state = nnx.split(Model(dtype))
    return jax.jit(jax.value_and_grad(lambda state: nnx.merge(graph, state).loss(TOKENS[:, :-1], TOKENS[:, 1:])))(state)


def manual(mesh, dtype=None, **options):
    """(compiled loss and gradients inside one shard_map over the whole mesh, its operands)"""
    graph, state = nnx.split(Model(dtype, split=True, **options))
    specs, batch = nnx.get_partition_spec(state), P("data", "context")

    def loss(state, tokens, labels):
        # Once for all uses (of the embedding there are two), so that gradients are summed over data once.
        state = jax.tree.map(lambda x: sharding.copy(sharding.copy(x, "data"), "context"), state)
        return nnx.merge(graph, state).loss(tokens, labels)

    local = jax.shard_map(loss, mesh=mesh, in_specs=(specs, batch, batch), out_specs=P())
    balanced = options.get("balanced", False)
    order = sharding.context_order(LENGTH, mesh.shape["context"]) if balanced else np.arange(LENGTH)
    operands = sharding.shard(state, mesh), TOKENS[:, :-1][:, order], TOKENS[:, 1:][:, order]
    return compiled(jax.value_and_grad(local), *operands), operands


def same(got, want, tolerance=1e-5):
    assert error(got[0], want[0]) < tolerance
    for (path, a), b in zip(jax.tree.leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert error(jax.device_get(a), b) < tolerance, jax.tree_util.keystr(path)


STREAM = BATCH * LENGTH * WIDTH * 4  # bytes
TOKEN = BATCH * LENGTH * 4  # of one float32 for each token


def parameters_split(model, devices):
    """Bytes of a device's parameters that are split over "tensor", and of those that are not."""
    state = nnx.state(model)
    sizes = {True: 0, False: 0}
    for variable, spec in zip(jax.tree.leaves(state), jax.tree.leaves(nnx.get_partition_spec(state)), strict=True):
        sizes[any(spec)] += variable.size * 4 // (devices if any(spec) else 1)
    return sizes[True], sizes[False]


def check_sent(program, mesh, textbook):
    """Within 5 percent of the textbook's bytes; besides, a few scalars."""
    got = sent(program, dict(mesh.shape))
    for key in got.keys() | textbook.keys():
        assert math.isclose(got.get(key, 0), textbook.get(key, 0), rel_tol=0.05, abs_tol=16), (key, got, textbook)


SLOW = pytest.mark.slow
CASES = {  # devices along tensor, options
    "2": (2, {}),
    "4": (4, {}),
    "8": (8, {}),
    "2 sequence": (2, {"sequence": True}),
    "8 sequence": (8, {"sequence": True}),
    "4 overlap": (4, {"sequence": True, "overlap": True}),
}
FURTHER = ("4", "8", "2 sequence")


@pytest.mark.parametrize("case", [pytest.param(case, marks=SLOW if case in FURTHER else ()) for case in CASES])
def test_inside_shard_map(case):
    tensor, options = CASES[case]
    mesh = sharding.make_mesh(data=-1, tensor=tensor)
    program, operands = manual(mesh, **options)
    same(program(*operands), expected())

    data = mesh.shape["data"]
    stream, three_numbers = STREAM // data, 3 * TOKEN // data
    split, whole = parameters_split(Model(split=True), tensor)
    if not options:
        # forward: embedding, attention, mlp; backward: mlp, attention, cross-entropy
        textbook = {("all-reduce", "tensor"): 6 * stream + three_numbers}
    else:
        # forward: a scatter after embedding, attention, mlp, a gather before attention, mlp, cross-entropy; backward
        # the same; and the gradients of the norms
        textbook = {("all-gather", "tensor"): 6 * stream, ("reduce-scatter", "tensor"): 6 * stream}
        textbook["all-reduce", "tensor"] = three_numbers + whole
    if "overlap" in options:
        # The block's eight go round the ring, and the rows once more for the gradients of attention and mlp.
        textbook["all-gather", "tensor"] = textbook["reduce-scatter", "tensor"] = 2 * stream
        textbook["collective-permute", "tensor"] = 10 * stream * (tensor - 1) // tensor
    if data > 1:
        textbook["all-reduce", "data"] = split + whole
    check_sent(program, mesh, textbook)


def test_bfloat16_is_no_worse_than_on_one_device():
    mesh = sharding.make_mesh(tensor=8)
    program, operands = manual(mesh, jnp.bfloat16, sequence=True)
    got, unfused, exact = (jax.tree.leaves(x) for x in (program(*operands), expected(jnp.bfloat16), expected()))
    for number, (a, b, c) in enumerate(zip(got, unfused, exact, strict=True)):
        no_worse(f"leaf {number}", a, b, c, jnp.bfloat16)


class Layers(nnx.Module):
    """embed → block → linear → tanh → linear, of whole arrays."""

    def __init__(self, split=False, **options):
        rngs, sequence = nnx.Rngs(0), {"sequence": True} if options.get("sequence") else {}
        if split:
            self.embed = sharding.nn.VocabParallelEmbed(VOCAB, WIDTH, rngs=rngs, **sequence)
            self.block = sharding.nn.ParallelTransformerBlock(HEADS, WIDTH, HIDDEN, rngs=rngs, **OPTIONS, **options)
            self.up = sharding.nn.ColumnParallelLinear(WIDTH, HIDDEN, rngs=rngs, **options)
            self.down = sharding.nn.RowParallelLinear(HIDDEN, WIDTH, rngs=rngs, **options)
        else:
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.block = TransformerBlock(HEADS, WIDTH, HIDDEN, rngs=rngs, **OPTIONS)
            self.up, self.down = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        for linear in (self.up, self.down):
            linear.bias.set_value(linear.bias[...] + 0.1)

    def __call__(self, tokens):
        return self.down(jnp.tanh(self.up(self.block(self.embed(tokens)))))


def value_and_gradients(graph):
    return jax.value_and_grad(lambda state, tokens: jnp.mean(jnp.sin(nnx.merge(graph, state)(tokens))))


@functools.cache
def expected_of_layers():
    graph, state = nnx.split(Layers())
    return jax.jit(value_and_gradients(graph))(state, TOKENS[:, :-1])


@pytest.mark.parametrize("sequence", [pytest.param(False, marks=SLOW), True], ids=["stream whole", "sequence"])
@pytest.mark.parametrize("kind", [pytest.param(AxisType.Auto, marks=SLOW), AxisType.Explicit], ids=str)
def test_on_whole_arrays_of_a_mesh(kind, sequence):
    mesh = sharding.make_mesh(data=2, tensor=4, axis_types=kind)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(Layers(split=True, **({"sequence": True} if sequence else {})))
        specs = nnx.get_partition_spec(state)
        for variable, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
            assert variable.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), variable.ndim)
        tokens = jax.device_put(TOKENS[:, :-1], P("data"))
        program = compiled(value_and_gradients(graph), state, tokens)
        same(program(state, tokens), expected_of_layers())
    stream = STREAM // 2
    # forward: embedding, attention, mlp, second linear; backward: attention, mlp, first linear
    if sequence:
        textbook = {("all-gather", "tensor"): 7 * stream, ("reduce-scatter", "tensor"): 7 * stream}
    else:
        textbook = {("all-reduce", "tensor"): 7 * stream}
    split, whole = parameters_split(Layers(split=True), 4)
    textbook["all-reduce", "data"] = split + (0 if sequence else whole)
    if sequence:
        textbook["all-reduce", "data+tensor"] = whole
    check_sent(program, mesh, textbook)


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=SLOW), True], ids=["gathered before", "overlap"])
@pytest.mark.parametrize("kind", [pytest.param(AxisType.Auto, marks=SLOW), AxisType.Explicit], ids=str)
def test_parameters_that_are_split_over_fsdp(kind, overlap):
    mesh = sharding.make_mesh(fsdp=2, tensor=4, axis_types=kind)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(Layers(split=True, sequence=True, overlap=overlap, fsdp="fsdp"))
        kernel = state["block"]["attention"]["out"]["kernel"][...]
        assert kernel.sharding.shard_shape(kernel.shape) == (HEADS // 4, WIDTH // HEADS, WIDTH // 2)
        tokens = jax.device_put(TOKENS[:, :-1], P("fsdp"))
        program = compiled(value_and_gradients(graph), state, tokens)
        same(program(state, tokens), expected_of_layers())


def test_parameters_split_over_fsdp_and_an_input_that_is_not():
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=4)):
        layer = sharding.nn.ColumnParallelLinear(24, 8, fsdp="fsdp", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"must be split over 'fsdp', as the parameters are, got shape \(3, 24\)"):
            jax.eval_shape(lambda x: layer(x), jax.ShapeDtypeStruct((3, 24), jnp.float32))
        with pytest.raises(
            ValueError, match=r"kernel has shape \(3, 8\), its dimension 0 must be a multiple of 2.*'fsdp'"
        ):
            sharding.nn.ColumnParallelLinear(3, 8, fsdp="fsdp", rngs=nnx.Rngs(0))


def test_without_the_axis_it_is_the_layer_of_one_device():
    graph, state = nnx.split(Layers(split=True, sequence=True))
    same(jax.jit(value_and_gradients(graph))(state, TOKENS[:, :-1]), expected_of_layers())


def block(**options):
    return sharding.nn.ParallelTransformerBlock(6, 24, 32, rngs=nnx.Rngs(0), **options)


BAD = {
    r"attention/key/kernel has shape \(24, 6, 4\), its dimension 1 must be a multiple of 4.*'tensor'": (
        block,
        (4, 8, 24),
    ),
    r"its input has shape \(4, 6, 24\), its dimension 1 must be a multiple of 4, the devices along 'tensor'": (
        lambda: sharding.nn.ColumnParallelLinear(24, 8, sequence=True, rngs=nnx.Rngs(0)),
        (4, 6, 24),
    ),
    r"its input must have rows to be split over 'tensor', got shape \(24,\)": (
        lambda: sharding.nn.ColumnParallelLinear(24, 8, sequence=True, rngs=nnx.Rngs(0)),
        (24,),
    ),
    "dropout_rate must be 0, got 0.1": (lambda: block(dropout_rate=0.1), (4, 8, 24)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    make, shape = BAD[message]
    with pytest.raises(ValueError, match=message):
        layer = make()
        with jax.set_mesh(sharding.make_mesh(data=2, tensor=4)):
            jax.eval_shape(lambda x: layer(x), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_a_parameter_that_does_not_fit_the_mesh_is_not_made():
    with (
        jax.set_mesh(sharding.make_mesh(tensor=8)),
        pytest.raises(ValueError, match="ColumnParallelLinear: kernel has"),
    ):
        sharding.nn.ColumnParallelLinear(4, 12, rngs=nnx.Rngs(0))


def test_positions_and_replicated_heads():
    """Rotary positions of a batch, and two key heads on four devices."""
    make = dict(num_heads=8, in_features=16, hidden_features=24, num_kv_heads=2, use_rope=True)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, 16)), jnp.float32)
    positions = jnp.arange(8) * 3 + jnp.array([[0], [5]])
    plain = TransformerBlock(**make, rngs=nnx.Rngs(0))(x, input_positions=positions, is_causal=True)
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=4)):
        layer = sharding.nn.ParallelTransformerBlock(**make, sequence=True, replicate_kv=True, rngs=nnx.Rngs(0))
        got = jax.jit(lambda x, p: layer(x, input_positions=p, is_causal=True))(x, positions)
    assert error(jax.device_get(got), plain) < 1e-5


@pytest.mark.parametrize("tensor", [pytest.param(1, marks=SLOW), 2])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=SLOW),
        pytest.param({"sequence": True}, marks=SLOW),
        {"sequence": True, "overlap": True, "balanced": True},
    ],
    ids="-".join,
)
def test_a_split_sequence_inside_shard_map(options, tensor):
    """The ring sends what it must: keys and values, again backward with their gradients, and these home."""
    mesh = sharding.make_mesh(data=2, context=4 // tensor, tensor=tensor)
    program, operands = manual(mesh, context="context", **options)
    same(program(*operands), expected())
    hops = 4 // tensor - 1
    shards = 2 * BATCH * LENGTH * KV_HEADS * (WIDTH // HEADS) * 4 // 8
    got = sent(program, dict(mesh.shape))
    assert got["collective-permute", "context"] == (3 * hops + 1) * shards
    assert {kind for kind, axis in got if axis == "context"} <= {"collective-permute", "all-reduce"}


def sines(y):
    return jnp.mean(jnp.sin(y) * jnp.linspace(-1, 1, y.size).reshape(y.shape))


def block_of(graph, state):
    return lambda x, positions: nnx.merge(graph, state)(x, input_positions=positions)


RING, OVERLAP = {"context": "context"}, {"sequence": True, "overlap": True}
CONTEXTS = {  # axis kinds, mesh besides, options, whether positions are given
    "data, auto": (AxisType.Auto, {"data": 2}, RING | {"balanced": True}, False),
    "data, explicit": (AxisType.Explicit, {"data": 2}, RING | {"sequence": True}, False),
    "fsdp, auto": (AxisType.Auto, {"fsdp": 2}, RING | OVERLAP | {"fsdp": "fsdp"}, False),
    "fsdp, explicit": (AxisType.Explicit, {"fsdp": 2}, RING | {"fsdp": "fsdp", "balanced": True}, True),
    "parameters over context": (AxisType.Auto, {"data": 2}, RING | OVERLAP | {"fsdp": "context"}, True),
    "sequence over data": (AxisType.Auto, {"data": 4}, {"context": "data", "balanced": True}, True),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "fsdp, explicit" else SLOW) for case in CONTEXTS]
)
def test_a_split_sequence_on_whole_arrays(case):
    kind, sizes, options, given = CONTEXTS[case]
    make = dict(num_heads=HEADS, in_features=WIDTH, hidden_features=HIDDEN, **OPTIONS, use_bias=True)
    mesh = sharding.make_mesh(**sizes, context=-1, tensor=2, axis_types=kind)
    batch = P() if options["context"] in sizes else P(tuple(sizes))
    parts = mesh.shape[options["context"]]
    order = sharding.context_order(LENGTH, parts) if options.get("balanced") else np.arange(LENGTH)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32)
    positions = jnp.arange(LENGTH) * 3 + jnp.arange(BATCH)[:, None] if given else None
    graph, state = nnx.split(TransformerBlock(**make, rngs=nnx.Rngs(0)))
    whole = lambda state, x: sines(block_of(graph, state)(x, positions))
    want = jax.jit(jax.value_and_grad(whole, (0, 1)))(state, x)
    with jax.set_mesh(mesh):
        layer = sharding.nn.ParallelTransformerBlock(**make, **options, rngs=nnx.Rngs(0))
        graph_of_shards, placed = nnx.split(layer)

        def split(state, x):
            y = block_of(graph_of_shards, state)(x[:, order], None if positions is None else positions[:, order])
            y = jax.reshard(y, batch) if kind == AxisType.Explicit else y
            return sines(y[:, np.argsort(order)])

        x = jax.device_put(x, batch)
        got = jax.jit(jax.value_and_grad(split, (0, 1)))(placed, x)
    same(got, want)


def test_segments_along_a_split_sequence():
    make = dict(num_heads=4, in_features=16, hidden_features=24, num_kv_heads=2, use_rope=True)
    random = np.random.default_rng(1)
    x = jnp.asarray(random.standard_normal((2, 12, 16)), jnp.float32)
    ids = jnp.asarray(np.sort(random.integers(0, 3, (2, 12)), axis=1), jnp.int32)
    layer = sharding.nn.ParallelTransformerBlock(**make, context="context", local_window_size=(5, 2), rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    mesh, rows = sharding.make_mesh(data=2, context=2, tensor=2), P("data", "context")
    run = jax.shard_map(
        lambda state, x, ids: nnx.merge(graph, state).local(x, query_segment_ids=ids), mesh=mesh,
        in_specs=(nnx.get_partition_spec(state), rows, rows), out_specs=rows,
    )  # fmt: skip
    plain = TransformerBlock(**make, local_window_size=(5, 2), rngs=nnx.Rngs(0))(x, query_segment_ids=ids)
    assert error(jax.device_get(jax.jit(run)(sharding.shard(state, mesh), x, ids)), plain) < 1e-5
    with pytest.raises(ValueError, match="ParallelTransformerBlock: mask must be None with context 'context'"):
        jax.eval_shape(
            jax.shard_map(
                lambda state, x: nnx.merge(graph, state).local(x, mask=jnp.ones((1, 1, 6, 6), bool)), mesh=mesh,
                in_specs=(nnx.get_partition_spec(state), rows), out_specs=rows,
            ), state, x,
        )  # fmt: skip


BAD_CONTEXTS = {
    r"its input has shape \(4, 6, 24\), its dimension 1 must be a multiple of 4, the devices along 'context' · 'tens": (
        {"context": "context", "sequence": True},
        (4, 6, 24),
    ),
    r"its input has shape \(4, 7, 24\), its dimension 1 must be a multiple of 2, the devices along 'context'": (
        {"context": "context"},
        (4, 7, 24),
    ),
    r"its query has shape \(2, 3, 3, 4\), its dimension 1 must be a multiple of 2 if balanced, .* along 'context'": (
        {"context": "context", "balanced": True, "is_causal": True},
        (4, 6, 24),
    ),
    "balanced is the order of causal attention": ({"context": "context", "balanced": True}, (4, 8, 24)),
    "balanced is an order of a split sequence, got no context": ({"balanced": True}, (4, 8, 24)),
    "context 'ring' and axis 'tensor' must be axes of the mesh, which has": ({"context": "ring"}, (4, 8, 24)),
    "context must be another mesh axis than axis, got 'tensor'": ({"context": "tensor"}, (4, 8, 24)),
    "precision must be the default with context, got 'highest'": (
        {"context": "context", "precision": "highest"},
        (4, 8, 24),
    ),
}


@pytest.mark.parametrize("message", BAD_CONTEXTS)
def test_bad_context(message):
    options, shape = BAD_CONTEXTS[message]
    with jax.set_mesh(sharding.make_mesh(data=2, context=2, tensor=2)), pytest.raises(ValueError, match=message):
        layer = block(**options)
        jax.eval_shape(lambda x: layer(x), jax.ShapeDtypeStruct(shape, jnp.float32))


OVER_ONE_AXIS = {
    "tensor": r"ParallelTransformerBlock, context: axis must be a mesh axis of .*'context'",
    "context": "axis must be an axis of the jax.shard_map that context 'context' is of, got 'tensor'",
}


@pytest.mark.parametrize("axis", OVER_ONE_AXIS)
def test_a_shard_map_over_one_of_the_two_axes(axis):
    graph, state = nnx.split(block(context="context"))
    run = jax.shard_map(
        lambda state, x: nnx.merge(graph, state)(x), in_specs=P(), out_specs=P(), axis_names={axis},
        mesh=sharding.make_mesh(data=2, context=2, tensor=2),
    )  # fmt: skip
    with pytest.raises(ValueError, match=OVER_ONE_AXIS[axis]):
        jax.eval_shape(run, state, jax.ShapeDtypeStruct((4, 8, 24), jnp.float32))
