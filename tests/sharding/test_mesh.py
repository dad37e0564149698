"""Meshes, and where parameters lie on them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
from jaxops.nn import GatedMLP

RULES = [("(gate|up)/kernel", P(None, "tensor")), ("down/kernel", P("tensor")), (".*", P())]


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1}, (1, 8, 1, 1, 1, 1)),
        ({"tensor": 4, "data": -1}, (1, 2, 1, 1, 1, 4)),
        ({"pipeline": 2, "context": 2, "tensor": 2}, (2, 1, 1, 1, 2, 2)),
        ({"fsdp": 2, "expert": 4, "tensor": -1}, (1, 1, 2, 4, 1, 1)),
    ],
    ids=str,
)
def test_axes_and_their_order(sizes, shape):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == ("pipeline", "data", "fsdp", "expert", "context", "tensor")
    assert mesh.devices.shape == shape and set(mesh.axis_types) == {AxisType.Auto}


def test_neighbours_along_tensor_are_neighbours():
    mesh = sharding.make_mesh(data=2, tensor=4, axis_types=AxisType.Explicit)
    assert [[device.id for device in row] for row in mesh.devices.reshape(2, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert set(mesh.axis_types) == {AxisType.Explicit}
    some = sharding.make_mesh(tensor=-1, devices=jax.devices()[2:5])
    assert [device.id for device in some.devices.flat] == [2, 3, 4]


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"tensor": 3}, ValueError, "number of devices, 8, got tensor 3 = 3"),
        ({"data": 4, "tensor": 4}, ValueError, "number of devices, 8, got data 4 · tensor 4 = 16"),
        ({"data": 3, "tensor": -1}, ValueError, "8, got data 3 · tensor -1, of which those that are given make 3"),
        ({"data": -1, "tensor": -1}, ValueError, "one axis at most may be -1, got data and tensor"),
        ({"tensor": 0}, ValueError, "tensor must be above 0, or -1"),
        ({"tensor": 8.0}, TypeError, "tensor must be an int, got float"),
        ({"devices": []}, ValueError, "devices must hold at least one"),
        ({}, ValueError, "8, got 1 = 1"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit(sizes, error, message):
    with pytest.raises(error, match=message):
        sharding.make_mesh(**sizes)


def test_rules_place_a_model():
    mesh = sharding.make_mesh(data=2, tensor=4)
    state = nnx.state(GatedMLP(8, 12, rngs=nnx.Rngs(0)))
    placed = sharding.shard(state, mesh, RULES)
    for name, spec in (("gate", P(None, "tensor")), ("up", P(None, "tensor")), ("down", P("tensor"))):
        assert placed[name]["kernel"][...].sharding == NamedSharding(mesh, spec)
        assert jnp.array_equal(placed[name]["kernel"][...], state[name]["kernel"][...])
    plain = {"blocks": [{"up": {"kernel": jnp.ones((8, 12))}, "scale": jnp.ones(8)}]}
    specs = sharding.partition_specs(plain, RULES, mesh)
    assert specs == {"blocks": [{"up": {"kernel": P(None, "tensor")}, "scale": P()}]}
    shapes = jax.eval_shape(lambda: plain)
    assert sharding.partition_specs(shapes, [("^blocks/0/up/kernel$", P("data")), ("scale", P())]) == {
        "blocks": [{"up": {"kernel": P("data")}, "scale": P()}]
    }


def test_metadata_places_a_model():
    mesh = sharding.make_mesh(data=2, tensor=4)

    class Model(nnx.Module):
        def __init__(self):
            init = nnx.with_partitioning(nnx.initializers.ones, (None, "tensor"), mesh=mesh)
            self.kernel = nnx.Param(init(jax.random.key(0), (8, 12)))
            self.scale = nnx.Param(jnp.ones(8))

    placed = sharding.shard(nnx.state(Model()), mesh)
    assert placed["kernel"][...].sharding.spec == P(None, "tensor") and placed["scale"][...].sharding.spec == P()


KERNEL = {"mlp": {"kernel": jnp.ones((6, 12))}}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("bias", P())], r"no rule finds 'mlp/kernel', of shape \(6, 12\)"),
        (
            [("kernel", P("tensor"))],
            r"mlp/kernel has shape \(6, 12\), its dimension 0 must be a multiple of 4.*'tensor'",
        ),
        ([("kernel", P(None, ("data", "tensor")))], r"dimension 1 must be a multiple of 8, .*'data' · 'tensor'"),
        ([("kernel", P("heads"))], "mlp/kernel is split over 'heads', but the mesh has axes"),
        ([("kernel", P(None, None, "tensor"))], "must not be longer"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:30],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(ValueError, match=message):
        sharding.shard(KERNEL, sharding.make_mesh(data=2, tensor=4), rules)
