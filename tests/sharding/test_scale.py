"""The training step that `benchmarks.scale` compiles for thousands of chips, run on a few devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import sharding
from benchmarks import scale


def losses(mesh, micro_batches):
    """Of three steps on the same eight sequences, from the same parameters on every mesh."""
    size = scale.Size(32, 3, 4, 2, 48, mesh, micro_batches, vocabulary=64, length=16)
    placed = sharding.make_mesh(**mesh, devices=jax.devices()[: int(np.prod(list(mesh.values())))])
    step, (parameters, state, tokens, _), table = scale.training_step(size, placed)
    random, (of_layer, of_shared) = np.random.default_rng(0), scale.shapes(size)
    draw = lambda shape: 1 + 0 * random.random(shape) if len(shape) == 1 else random.standard_normal(shape) / 6
    layers = {name: np.stack([draw(shape) for _ in range(size.layers)]) for name, shape in of_layer.items()}
    stages = table.stages
    rows = range(4 if stages == 2 else 3)  # a stage of two layers and one of one, which is filled up
    layers = {name: w[np.minimum(rows, 2)].reshape(1, stages, -1, *w.shape[1:]) for name, w in layers.items()}
    made = layers, {name: draw(shape) for name, shape in of_shared.items()}
    put = lambda x, like: jax.device_put(jnp.asarray(x, like.dtype), like.sharding)
    assert jax.tree.map(np.shape, made) == jax.tree.map(lambda x: x.shape, parameters)
    parameters = jax.tree.map(put, made, parameters)
    state = jax.tree.map(lambda x: put(np.zeros(x.shape), x), state)
    text = np.random.default_rng(1).integers(0, 64, (8, 17))
    batch = [jax.device_put(jnp.asarray(x, jnp.int32), tokens.sharding) for x in (text[:, :-1], text[:, 1:])]
    assert batch[0].shape == tokens.shape and isinstance(tokens.sharding, NamedSharding)
    found = []
    for _ in range(3):
        loss, parameters, state = step(parameters, state, *batch)
        found.append(float(loss))
    return found


@pytest.mark.slow
def test_eight_devices_train_as_one_does():
    alone = losses(dict(data=1, fsdp=1, tensor=1, pipeline=1), 8)
    assert alone[2] < alone[1] < alone[0]
    # No fsdp with a pipeline: virtual CPU devices may confuse collectives of a phase that do not wait for each other.
    np.testing.assert_allclose(losses(dict(data=2, fsdp=1, tensor=2, pipeline=2), 4), alone, rtol=1e-2)
    np.testing.assert_allclose(losses(dict(data=2, fsdp=2, tensor=2, pipeline=1), 2), alone, rtol=1e-2)
