"""Schedules are what their papers say, and the program that runs them computes what one device does."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Var, jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxops
from sharding.pipeline import Layers, pipeline_value, pipeline_value_and_grad
from sharding.schedules import SCHEDULES, columns, schedule
from tests.compare import error

SIZES = [(S, m) for S in (1, 2, 3, 4, 8) for m in (1, 2, 3, 4, 7, 8, 12, 16, 24, 33)]


def tables(overlap=(False, True)):
    for name in SCHEDULES:
        for S, m in SIZES:
            for late in overlap:
                for v in (2, 3) if name == "interleaved_1f1b" else (1,):
                    fits = {"interleaved_1f1b": m % (S * (1 + late)) == 0, "zero_bubble": m >= S}.get(name, True)
                    if fits:
                        yield schedule(name, S, m, v, overlap=late)


def test_idle_cells_are_the_formulas():
    for table in tables(overlap=(False,)):
        S, m, v = table.stages, table.micro_batches, table.chunks
        phases, idle = (3 * m, S - 1) if table.name == "zero_bubble" else (2 * m * v, 2 * (S - 1))
        assert table.idle == S * idle, table
        assert len(table.rows) == phases + idle
        assert table.bubble == pytest.approx((S - 1) / ((3 if table.has_weights else v) * m + S - 1))


def test_every_phase_runs_once_and_after_what_it_reads():
    for table in tables():
        S, v, wait = table.stages, table.chunks, 1 + table.overlap
        kinds = "FBW" if table.has_weights else "FB"
        assert set(table.ticks) == {(p, k, i) for p in kinds for k in range(S * v) for i in range(table.micro_batches)}
        assert sum(cell is not None for row in table.rows for cell in row) == len(table.ticks)
        for (phase, k, i), tick in table.ticks.items():
            if phase == "F" and k:
                assert table.ticks["F", k - 1, i] + wait <= tick
            if phase == "B":
                assert table.ticks["F", k, i] < tick
                assert k == S * v - 1 or table.ticks["B", k + 1, i] + wait <= tick
            if phase == "W":
                assert table.ticks["B", k, i] < tick


def test_activations_in_flight_grow_with_stages_and_not_with_micro_batches():
    S = 4
    for name, chunks, most in (("1f1b", 1, S), ("zero_bubble", 1, S), ("interleaved_1f1b", 2, 2 * (S - 1) + S + 1)):
        for m in (16, 64):
            table = schedule(name, S, m, chunks)
            assert table.in_flight(0) == most
            assert max(table.buffers.counts[kind] for kind in ("saved", "deferred")) == most
            assert schedule(name, S, m, chunks, overlap=True).in_flight(0) <= 2 * most
    assert [schedule("1f1b", S, 16).in_flight(s) for s in range(S)] == [4, 3, 2, 1]
    assert [schedule("gpipe", S, m).in_flight(0) for m in (16, 64)] == [16, 64]


def test_a_slot_holds_what_is_read_from_it():
    """Runs the columns with names in the place of arrays."""
    for table in (table for table in tables() if table.stages * table.micro_batches < 70):
        S, K, c = table.stages, table.stages * table.chunks, columns(table)
        slots = {kind: [[None] * (count + 1) for _ in range(S)] for kind, count in table.buffers.counts.items()}
        sent = [None] * S
        for tick, row in enumerate(table.rows):
            at = lambda name, s: c[name][tick][s]
            now = [None] * S
            for s, cell in enumerate(row):
                assert at("phase", s) == (" FBW".index(cell.phase) if cell else 0)
                if cell is None:
                    continue
                k, i = cell.chunk * S + s, cell.micro_batch
                assert (at("micro_batch", s), at("chunk", s)) == (i, cell.chunk)
                assert (at("first", s), at("last", s)) == (k == 0, k == K - 1)
                read = lambda kind: slots[kind][s][at(kind, s)]
                if cell.phase == "F":
                    assert k == 0 or read("arriving") == ("activation of", k, i)
                    for kind in ("saved", "deferred") if table.has_weights else ("saved",):
                        slots[kind][s][at(kind, s)] = (k, i)
                    now[s] = ("activation of", k + 1, i) if k < K - 1 else ("gradient of", k, i)
                elif cell.phase == "B":
                    assert read("gradients") == ("gradient of", k, i) and read("saved") == (k, i)
                    now[s] = ("gradient of", k - 1, i)
                    if table.has_weights:
                        assert read("deferred") == (k, i)
                        slots["between"][s][at("between", s)] = (k, i)
                else:
                    assert read("deferred") == read("between") == (k, i)
            passing = sent if table.overlap else now
            for s in range(S):
                slots["gradients"][s][at("keep_gradient", s)] = now[s]
                slots["arriving"][s][at("receive_activation", s)] = passing[(s - 1) % S]
                slots["gradients"][s][at("receive_gradient", s)] = passing[(s + 1) % S]
            sent = now


def test_makespan():
    S, m, f, b, w = 4, 8, 1.0, 1.5, 0.5
    for name in ("gpipe", "1f1b"):
        whole = (m + S - 1) * (f + b + w)
        assert schedule(name, S, m).makespan(f, b, w, lockstep=False) == pytest.approx(whole)
        assert schedule(name, S, m, overlap=True).makespan(f, b, w) == pytest.approx(whole)
    # In 1F1B forwards and backwards share ticks, each as long as a backward: 2 (m + S - 1) ticks, of which the first S
    # are forwards only.
    assert schedule("1f1b", S, m).makespan(f, b, w) == S * f + (2 * (m + S - 1) - S) * (b + w)
    assert schedule("interleaved_1f1b", S, m, 2).makespan(lockstep=False) == pytest.approx(3 * m + 3 * (S - 1) / 2)
    assert schedule("zero_bubble", S, m).makespan() == 3 * m + S - 1
    # Every tick waits for a transfer; with overlap only the first and last micro-batch's, one for each hop.
    assert schedule("zero_bubble", S, m).makespan(transfer=0.2) == pytest.approx((3 * m + S - 1) * 1.2)
    late = schedule("gpipe", S, m, overlap=True)
    assert late.makespan(transfer=0.2) == pytest.approx(3 * (m + S - 1) + 2 * (S - 1) * 0.2)
    for table in tables():
        arguments = dict(forward=1, backward=1.2, weights=0.9, transfer=0.3)
        work = 3.1 * table.micro_batches
        assert work - 1e-9 <= table.makespan(**arguments, lockstep=False) <= table.makespan(**arguments) + 1e-9


def test_printed_and_drawn(tmp_path):
    assert str(schedule("zero_bubble", 2, 3)) == (
        "stage 0  F0 F1 .  B0 W0 F2 B1 W1 B2 W2\nstage 1  .  F0 B0 F1 B1 W0 F2 B2 W1 W2"
    )
    assert "F0'" in str(schedule("interleaved_1f1b", 2, 2, 2))
    for name, chunks in (("zero_bubble", 1), ("interleaved_1f1b", 2)):
        schedule(name, 4, 8, chunks).plot(tmp_path / "table.png")
        data = (tmp_path / "table.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 800 and 200 < height < 500


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (("2f2b", 4, 8), ValueError, "name must be one of 'gpipe', .*, got '2f2b'"),
        (("1f1b", 4.0, 8), TypeError, "stages must be an int, got float"),
        (("1f1b", 4, 0), ValueError, "micro_batches must be at least 1, got 0"),
        (("gpipe", 4, 8, 2), ValueError, "chunks must be 1 for 'gpipe', got 2"),
        (("interleaved_1f1b", 4, 8), ValueError, "chunks must be at least 2 .*, got 1"),
        (("interleaved_1f1b", 4, 6, 2), ValueError, "micro_batches must be a multiple of the 4 stages .*, got 6"),
        (("zero_bubble", 4, 3), ValueError, "micro_batches must be at least the 4 stages .*, got 3"),
    ],
)
def test_a_schedule_that_cannot_be(arguments, kind, message):
    with pytest.raises(kind, match=message):
        schedule(*arguments)


# ---- the program ---------------------------------------------------------------------------------------------------

WIDTH, WORDS = 6, 11
STAGES, DATA = P(None, "pipeline"), P("data")  # where parameters of stages and the batch lie


def mlp(p, x):
    return x + jnp.tanh(x @ p["a"]) @ p["b"]


def embed(shared, tokens):
    return shared["table"][tokens]


def tied_loss(shared, y, targets):
    """Mean cross-entropy of logits made with the table of the embedding."""
    logits = (y * shared["scale"]) @ shared["table"].T
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).mean()


def normal(seed, *shape):
    return jnp.asarray(0.3 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mlps(count):
    return dict(a=normal(0, count, WIDTH, 10), b=normal(1, count, 10, WIDTH))


def words(batch, length=5):
    tokens, targets = np.random.default_rng(2).integers(0, WORDS, (2, batch, length))
    return jnp.asarray(tokens), jnp.asarray(targets)


def shared_parameters(width=WIDTH):
    return dict(table=normal(3, WORDS, width), scale=1 + normal(4, width))


def pipelined(layers, mesh, *, loss=tied_loss, embed_fn=embed, specs=STAGES, batch=DATA, stage=None):
    """(stages, shared, inputs, targets) ↦ loss, gradients, over the whole mesh."""
    function = pipeline_value_and_grad(stage or layers, loss, layers.table, embed_fn=embed_fn)
    out = (P(), (specs, P()))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(specs, P(), batch, batch), out_specs=out))


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def on_one_device(layer, parameters, shared, inputs, targets, loss=tied_loss):
    def whole(parameters, shared):
        x = embed(shared, inputs)
        for n in range(jax.tree.leaves(parameters)[0].shape[0]):
            x = layer(jax.tree.map(lambda w: w[n], parameters), x)
        return loss(shared, x, targets)

    return jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(parameters, shared)


def assert_same(layers, function, parameters, shared, inputs, targets, layer):
    loss, (of_stages, of_shared) = function(layers.split(parameters), shared, inputs, targets)
    expected = on_one_device(layer, parameters, shared, inputs, targets)
    got = loss, (layers.join(of_stages), of_shared)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for path, x in jax.tree.leaves_with_path(expected):
        found = dict(jax.tree.leaves_with_path(got))[path]
        assert found.shape == x.shape and found.dtype == x.dtype
        assert error(found, x) < 1e-5, jax.tree_util.keystr(path)


slow = pytest.mark.slow
EQUAL = [
    # name, stages, chunks, micro-batches, devices along data, overlap, layers of each stage, rematerialised
    ("gpipe", 2, 1, 3, 2, False, None, False),
    ("1f1b", 8, 1, 8, 1, False, None, False),
    ("interleaved_1f1b", 2, 2, 4, 2, True, (1, 3, 2, 2), True),
    ("zero_bubble", 4, 1, 6, 2, False, (2, 1, 2, 1), False),
    ("zero_bubble", 2, 1, 5, 1, True, None, True),
    *(
        pytest.param(name, S, chunks, 8, data, overlap, None, False, marks=slow)
        for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zero_bubble", 1))
        for S, data in ((2, 1), (2, 4), (4, 1), (4, 2), (8, 1))
        for overlap in (False, True)
        if not (name == "interleaved_1f1b" and overlap and S == 8)
    ),
    pytest.param("interleaved_1f1b", 2, 3, 4, 1, False, (1, 1, 2, 2, 1, 1), True, marks=slow),
    pytest.param("1f1b", 1, 1, 3, 2, False, None, False, marks=slow),
    pytest.param("1f1b", 4, 1, 2, 2, True, (1, 2, 1, 3), True, marks=slow),
]


@pytest.mark.parametrize("name, stages, chunks, micro_batches, data, overlap, counts, remat", EQUAL)
def test_loss_and_gradients_are_those_of_one_device(name, stages, chunks, micro_batches, data, overlap, counts, remat):
    table = schedule(name, stages, micro_batches, chunks, overlap=overlap)
    layers = Layers(jax.checkpoint(mlp) if remat else mlp, table, counts)
    function = pipelined(layers, mesh_of(data=data, pipeline=stages))
    parameters = mlps(sum(counts) if counts else stages * chunks)
    assert_same(layers, function, parameters, shared_parameters(), *words(2 * micro_batches * data), mlp)


def test_a_table_of_forwards_alone():
    for table in tables():
        S, v, m, late = table.stages, table.chunks, table.micro_batches, 1 + table.overlap
        forwards = table.forwards
        assert set(forwards.ticks) == {("F", k, i) for k in range(S * v) for i in range(m)}
        assert all(k == 0 or forwards.ticks["F", k - 1, i] + late <= at for (_, k, i), at in forwards.ticks.items())
        assert len(forwards.rows) == m * v + late * (S - 1)


@pytest.mark.parametrize(
    "name, chunks, overlap",
    [("zero_bubble", 1, True), pytest.param("interleaved_1f1b", 2, False, marks=slow)],
)
def test_the_loss_alone(name, chunks, overlap):
    layers = Layers(mlp, schedule(name, 2, 4, chunks, overlap=overlap))
    parameters, shared, batch = mlps(2 * chunks), shared_parameters(), words(16)
    function = pipeline_value(layers, tied_loss, layers.table, embed_fn=embed)
    in_specs = (STAGES, P(), DATA, DATA)
    function = jax.jit(jax.shard_map(function, mesh=mesh_of(data=2, pipeline=2), in_specs=in_specs, out_specs=P()))
    loss = function(layers.split(parameters), shared, *batch)
    assert error(loss, on_one_device(mlp, parameters, shared, *batch)[0]) < 1e-5


def transformer_layer(p, x):
    """A layer of a decoder, made of operators."""
    h = jaxops.rms_norm(x, p["norm"])
    query, key, value = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in ("query", "key", "value"))
    attended = jaxops.dot_product_attention(query, key, value, is_causal=True)
    x = x + jnp.einsum("bthk,hkd->btd", attended, p["out"])
    h = jaxops.rms_norm(x, p["mlp_norm"])
    return x + jaxops.gated_linear_unit(h, p["gate"], p["up"]) @ p["down"]


def transformer(count, width=8, heads=2, hidden=12):
    head = (count, width, heads, width // heads)
    shapes = dict(query=head, key=head, value=head, out=(count, heads, width // heads, width))
    shapes |= dict(gate=(count, width, hidden), up=(count, width, hidden), down=(count, hidden, width))
    norms = {name: 1 + normal(seed, count, width) for seed, name in enumerate(("norm", "mlp_norm"), 20)}
    return {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items(), 30)} | norms


@pytest.mark.parametrize(
    "name, overlap, remat",
    [pytest.param("zero_bubble", True, False, marks=slow), pytest.param("1f1b", False, True, marks=slow)],
)
def test_layers_of_a_transformer(name, overlap, remat):
    table = schedule(name, 2, 4, overlap=overlap)
    layers = Layers(jax.checkpoint(transformer_layer) if remat else transformer_layer, table, (1, 2))
    function = pipelined(layers, mesh_of(data=2, pipeline=2))
    assert_same(layers, function, transformer(3), shared_parameters(8), *words(8, 7), transformer_layer)


def test_a_stage_that_is_itself_over_devices():
    """Collectives over a tensor axis inside a stage; parameters that are split over the data axis."""

    def layer(p, x):
        a = lax.all_gather(p["a"], "data", axis=0, tiled=True)
        return x + lax.psum(jnp.tanh(x @ a) @ p["b"], "tensor")

    layers = Layers(layer, schedule("zero_bubble", 2, 3))
    specs = dict(a=P(None, "pipeline", None, "data", "tensor"), b=P(None, "pipeline", None, "tensor"))
    function = pipelined(layers, mesh_of(data=2, pipeline=2, tensor=2), specs=specs)
    assert_same(layers, function, mlps(2), shared_parameters(), *words(12), mlp)


@pytest.mark.slow
def test_activations_that_are_split_along_a_tensor_axis():
    """x[batch, length_T, width]: the embedding is taken apart, the loss put together, by the functions themselves."""

    def part(x):
        size = x.shape[1] // lax.axis_size("tensor")
        return lax.dynamic_slice_in_dim(x, size * lax.axis_index("tensor"), size, 1)

    def layer(p, x):
        hidden = jnp.tanh(lax.all_gather(x, "tensor", axis=1, tiled=True) @ p["a"]) @ p["b"]
        return x + lax.psum_scatter(hidden, "tensor", scatter_dimension=1, tiled=True)

    layers = Layers(layer, schedule("1f1b", 2, 4))
    function = pipelined(
        layers,
        mesh_of(data=2, pipeline=2, tensor=2),
        specs=dict(a=P(None, "pipeline", None, None, "tensor"), b=P(None, "pipeline", None, "tensor")),
        embed_fn=lambda shared, tokens: part(embed(shared, tokens)),
        loss=lambda shared, y, targets: lax.pmean(tied_loss(shared, y, part(targets)), "tensor"),
    )
    assert_same(layers, function, mlps(4), shared_parameters(), *words(16, 6), mlp)


@pytest.mark.slow
def test_several_arrays_go_from_stage_to_stage():
    """An auxiliary loss beside the stream, as routers of experts have."""
    layer = lambda p, x: dict(stream=mlp(p, x["stream"]), extra=x["extra"] + jnp.square(x["stream"] @ p["a"]).mean())
    begin = lambda shared, tokens: dict(stream=embed(shared, tokens), extra=jnp.zeros(()))
    end = lambda shared, y, targets: tied_loss(shared, y["stream"], targets) + y["extra"]
    layers = Layers(layer, schedule("zero_bubble", 2, 4))
    parameters, shared, (tokens, targets) = mlps(4), shared_parameters(), words(8)
    function = pipelined(layers, mesh_of(data=1, pipeline=2), embed_fn=begin, loss=end)
    loss, (of_stages, of_shared) = function(layers.split(parameters), shared, tokens, targets)

    def whole(parameters, shared):
        x = begin(shared, tokens)
        for n in range(4):
            x = layer(jax.tree.map(lambda w: w[n], parameters), x)
        return end(shared, x, targets)

    expected = jax.value_and_grad(whole, argnums=(0, 1))(parameters, shared)
    got = loss, (layers.join(of_stages), of_shared)
    assert max(jax.tree.leaves(jax.tree.map(error, got, expected))) < 1e-5


def test_random_numbers_of_a_stage_and_a_micro_batch():
    """The same mask in F, B and W; it is made again, not stored."""

    def dropped(w, x, stage, micro_batch):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), stage), micro_batch)
        return jnp.tanh(x @ w) * jax.random.bernoulli(key, 0.5, x.shape)

    layers = Layers(mlp, schedule("zero_bubble", 2, 3))
    loss = lambda _, y, targets: jnp.square(y - targets).mean()
    stage = lambda w, x, place: dropped(w[0], x, place.stage, place.micro_batch)
    function = pipelined(layers, mesh_of(data=1, pipeline=2), stage=stage, loss=loss, embed_fn=None)
    weights, (inputs, targets) = normal(0, 2, WIDTH, WIDTH), normal(1, 2, 6, WIDTH)
    got, (gradient, _) = function(layers.split(weights), {}, inputs, targets)

    def whole(weights):
        total = 0.0
        for i in range(3):
            x = inputs[2 * i : 2 * i + 2]
            for stage in range(2):
                x = dropped(weights[stage], x, stage, i)
            total += loss({}, x, targets[2 * i : 2 * i + 2]) / 3
        return total

    expected, of_weights = jax.jit(jax.value_and_grad(whole))(weights)
    assert error(got, expected) < 1e-5 and error(layers.join(gradient), of_weights) < 1e-5


def test_gradients_are_summed_in_float32():
    layers = Layers(lambda w, x: w * x, schedule("1f1b", 2, 300))
    inputs, ones = jnp.ones((300, 1), jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    function = pipelined(layers, mesh_of(pipeline=2), loss=lambda _, y, t: (y * t).mean(), embed_fn=None, batch=P())
    loss, (gradient, _) = function(layers.split(ones), {}, inputs, inputs)
    assert loss == 1 and gradient.dtype == jnp.bfloat16
    assert jnp.all(gradient == 1)  # in bfloat16 256 + 1 is 256


def looped(p, x, _):
    return lax.scan(lambda x, p: (mlp(p, x), None), x, p)[0]


@pytest.mark.parametrize(
    "name, layer, stage, counts",
    [
        ("zero_bubble", mlp, None, [4, 4, 4]),
        ("zero_bubble", jax.checkpoint(mlp), None, [4, 6, 4]),  # the last product of a forward is not needed again
        ("1f1b", mlp, looped, [2, 4]),  # counted in one turn of the loop
    ],
    ids=("cut", "rematerialised", "loop"),
)
def test_no_phase_does_the_work_of_another(name, layer, stage, counts):
    """Two layers of two products: a forward of each, then one for the input's and one for the weight's gradient."""
    layers = Layers(layer, schedule(name, 2, 2))
    loss = lambda _, y, t: (y * t).mean()
    function = pipelined(layers, mesh_of(data=1, pipeline=2), embed_fn=None, loss=loss, stage=stage)
    inputs = jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)
    jaxpr = jax.make_jaxpr(function)(layers.split(mlps(4)), {}, inputs, inputs)

    def products(jaxpr):
        own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
        return own + sum(products(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))

    tick, switch = the_switch(jaxpr.jaxpr)
    assert [products(branch) for branch in tick.eqns[switch].params["branches"]] == [0, *counts]


def the_switch(jaxpr):
    """The jaxpr of a tick, and which of its equations is the switch between phases."""
    for index, eqn in enumerate(jaxpr.eqns):
        if len(eqn.params.get("branches", ())) > 2:
            return jaxpr, index
        for inner in jaxprs_in_params(eqn.params):
            if found := the_switch(inner):
                return found
    return None


@pytest.mark.parametrize("overlap", [False, True])
def test_with_overlap_messages_are_sent_before_the_branch_and_read_after_it(overlap):
    layers = Layers(mlp, schedule("1f1b", 2, 4, overlap=overlap))
    function = pipelined(layers, mesh_of(data=1, pipeline=2))
    jaxpr = jax.make_jaxpr(function)(layers.split(mlps(2)), shared_parameters(), *words(8))
    tick, switch = the_switch(jaxpr.jaxpr)
    sends = [index for index, eqn in enumerate(tick.eqns) if eqn.primitive.name == "ppermute"]
    assert len(sends) == 2
    for index in sends:
        assert (index < switch) == overlap
        assert (tick.eqns[index].invars[0] in tick.invars) == overlap  # what the tick before made
        assert not {*tick.eqns[index].outvars} & {v for v in tick.eqns[switch].invars if isinstance(v, Var)}


def temporary_bytes(name, micro_batches, overlap=False):
    layers = Layers(mlp, schedule(name, 8, micro_batches, overlap=overlap))
    mesh = mesh_of(data=1, pipeline=8)
    placed = lambda spec: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    stages = jax.tree.map(placed(P(None, "pipeline")), jax.eval_shape(layers.split, jax.eval_shape(lambda: mlps(8))))
    tokens = jax.eval_shape(lambda: jnp.zeros((4 * micro_batches, 64), jnp.int32))
    arguments = stages, jax.tree.map(placed(P()), shared_parameters()), *[placed(P("data"))(tokens)] * 2
    return pipelined(layers, mesh).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_micro_batches_in_gpipe_only():
    few, many = 8, 64
    for name in ("1f1b", "zero_bubble"):
        before, after = temporary_bytes(name, few), temporary_bytes(name, many)
        tokens = 2 * 4 * 64 * 4 * (many - few)  # tokens and targets, of which the program may make a copy
        assert after - before < tokens + 40 * 4 * 3 * (many - few), (name, before, after)  # and the table
    stored = 4 * 64 * (2 * WIDTH + 10) * 4  # of one micro-batch: x, the hidden layer, the gradient of y
    assert temporary_bytes("gpipe", many) - temporary_bytes("gpipe", few) >= stored * (many - few)


# ---- bad input -----------------------------------------------------------------------------------------------------


def run(*, mesh=None, layers=None, batch=8, shared=None, specs=STAGES, **changes):
    mesh = mesh or mesh_of(data=1, pipeline=2)
    layers = layers or Layers(mlp, schedule("1f1b", 2, 4))
    stages = layers.split(changes.pop("parameters", mlps(4)))
    function = pipelined(layers, mesh, specs=specs, batch=changes.pop("batches", DATA), **changes)
    jax.eval_shape(function, stages, shared or shared_parameters(), *words(batch))


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        (dict(batch=6), ValueError, "inputs must have a batch .* multiple of the 4 micro-batches, got shape .6, 5."),
        (dict(mesh=mesh_of(data=1, pipeline=4), specs=P()), ValueError, "table must have as many stages .* 4, got 2"),
        (
            dict(mesh=mesh_of(data=1, stage=2), specs=P(None, "stage")),
            ValueError,
            "got 'pipeline', with axes .*'stage'",
        ),
        (dict(specs=P()), ValueError, r"stages\['a'\] must have the local shape \(1, 1, …\).*, got \(1, 2, 2, 6, 10\)"),
        (
            dict(batches=P("pipeline")),
            ValueError,
            "inputs must be the same on every device of 'pipeline', got one that",
        ),
        (dict(shared=dict(table=jnp.ones((WORDS, WIDTH), int), scale=1.0)), TypeError, "must be floating, got int"),
        (dict(stage=lambda w, x, _: x[..., :3]), ValueError, r"stage_fn must return what it takes, .*5, 6.*, got .*3"),
        (dict(loss=lambda _, y, t: y.mean(-1)), ValueError, "loss_fn must return a floating scalar"),
        (dict(loss=lambda _, y, t: (y.mean(), t)), ValueError, "loss_fn must return a floating scalar"),
        (dict(embed_fn=lambda _, t: t), TypeError, "embed_fn returns .* must be floating, got int32"),
        (dict(parameters=mlps(5)), ValueError, "2 stages must divide the layers, got 5"),
        (
            dict(layers=Layers(mlp, schedule("1f1b", 2, 4), (1, 2))),
            ValueError,
            r"counts must be at least 1 for each of 2 stages, 4 in sum, got \(1, 2\)",
        ),
        (
            dict(
                mesh=mesh_of(data=1, pipeline=2, tensor=2),
                loss=lambda shared, y, t: tied_loss(shared, y, t) * lax.axis_index("tensor"),
            ),
            ValueError,
            "loss_fn must return the same on every device .* varies over 'tensor'",
        ),
        (
            dict(
                mesh=mesh_of(data=1, pipeline=2, tensor=2),
                loss=lambda shared, y, t: lax.pmean(
                    jax.jit(lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]))(
                        lax.pcast(y, "tensor", to="varying")
                    ),
                    "tensor",
                ).mean(),
            ),
            ValueError,
            "loss_fn must send by collectives of groups .* got jax.lax.ppermute",
        ),
    ],
)
def test_bad_input_is_named(changes, kind, message):
    with pytest.raises(kind, match=message):
        run(**changes)


def test_outside_of_shard_map_and_without_vma():
    layers = Layers(mlp, schedule("1f1b", 2, 4))
    function = pipeline_value_and_grad(layers, tied_loss, layers.table, embed_fn=embed)
    arguments = layers.split(mlps(4)), shared_parameters(), *words(8)
    with pytest.raises(ValueError, match=r"axis must be a mesh axis .*, got 'pipeline', with no shard_map there"):
        function(*arguments)
    specs = (P(None, "pipeline"), P(), P(), P())
    unchecked = jax.shard_map(function, mesh=mesh_of(pipeline=2), in_specs=specs, out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match=r"check_vma .* must be True, got False"):
        jax.eval_shape(unchecked, *arguments)
