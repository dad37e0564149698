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

    def loss(self, tokens):
        x = self.norm(self.block(self.embed(tokens[:, :-1])))
        weight = self.embed.embedding[...].astype(x.dtype).T
        if not self.split:
            return jaxops.linear_cross_entropy(x, weight, tokens[:, 1:])
        return sharding.vocab_parallel_cross_entropy(
            x, weight, tokens[:, 1:], sequence=self.options.get("sequence", False), axis_names="data"
        )


@functools.cache
def expected(dtype=None):
    """(loss, gradients) on one device."""
    graph, state = nnx.split(Model(dtype))
    return jax.jit(jax.value_and_grad(lambda state: nnx.merge(graph, state).loss(TOKENS)))(state)


def manual(mesh, dtype=None, **options):
    """(compiled loss and gradients inside one shard_map over the whole mesh, its parameters)"""
    graph, state = nnx.split(Model(dtype, split=True, **options))
    specs = nnx.get_partition_spec(state)

    def loss(state, tokens):
        # Once for all uses (of the embedding there are two), so that gradients are summed over data once.
        state = jax.tree.map(lambda x: sharding.copy(x, "data"), state)
        return nnx.merge(graph, state).loss(tokens)

    local = jax.shard_map(loss, mesh=mesh, in_specs=(specs, P("data")), out_specs=P())
    placed = sharding.shard(state, mesh)
    return compiled(jax.value_and_grad(local), placed, TOKENS), placed


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
    program, placed = manual(mesh, **options)
    same(program(placed, TOKENS), expected())

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
    program, placed = manual(mesh, jnp.bfloat16, sequence=True)
    got, unfused, exact = (jax.tree.leaves(x) for x in (program(placed, TOKENS), expected(jnp.bfloat16), expected()))
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
