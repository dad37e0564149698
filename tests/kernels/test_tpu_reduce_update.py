"""Reduce, update, gather in one TPU kernel: interpreted on virtual devices, races detected, unwritten memory NaN, one
device late, against float64; and that each wait is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.dispatch import runtime_tokens
from jax.sharding import PartitionSpec as P

from jaxops import optim
from jaxops.interpreter import tpu as interpreter
from pallas_kernels import chips
from pallas_kernels.tpu import reduce_update as kernels
from tests.compare import error
from tests.kernels.test_tpu_collective_matmul import late, mesh_of

SMALL = kernels.Tiles(16, 128)
OPTIMIZERS = {
    "adamw": optim.adamw(1e-2, weight_decay=0.1),
    "lion": optim.lion(1e-2, weight_decay=0.1),
    "momentum": optim.sgd(1e-2, 0.9),
}


def run(name, axes, shape, mode, dtype="float32", sent="float32", tiles=None, slow=None, without=None):
    """((parameters of every device, moments), the same in float64) after a step on a mesh of `axes`, of which those
    that begin with x form the ring."""
    ring = tuple(axis for axis in axes if axis.startswith("x"))
    size, devices = int(np.prod([axes[axis] for axis in ring])), int(np.prod(list(axes.values())))
    random = np.random.default_rng(0)
    recipe = OPTIMIZERS[name].recipe
    g = jnp.asarray(random.standard_normal((size, shape[0] * size, *shape[1:])), sent)
    p = jnp.asarray(random.standard_normal(g.shape[1:]), dtype)
    moments = [jnp.asarray(random.uniform(0.1, 1, p.shape), d or dtype) for d in recipe.dtypes]
    _, scalars = recipe.scalars(jnp.asarray(2), 1 / size, jnp.float32)
    mesh, as_chip = mesh_of("v5e", **axes)

    def update(p, g, moments, scalars):
        change, new = recipe.changed(p, g, moments, scalars, 0.1)
        return (p.astype(change.dtype) + change).astype(p.dtype), new

    def local(g, p, moments, scalars):
        g = g[0] if slow is None else late(g[0], "x", slow)
        options = dict(axes=ring, chip=chips.named("v5e"), tiles=tiles, without=without)
        p, moments = kernels.forward(g, p, moments, scalars, update, **options)
        return jax.lax.pcast(p, tuple(axes), to="varying")[None], moments

    specs = (P(ring), P(), P(ring), P())
    mapped = jax.shard_map(local, mesh=as_chip, in_specs=specs, out_specs=(P(tuple(axes)), P(ring)))
    placed = jax.tree.map(
        lambda spec, x: jax.tree.map(lambda y: jax.device_put(y, jax.NamedSharding(mesh, spec)), x),
        specs,
        (g, p, moments, scalars),
        is_leaf=lambda x: isinstance(x, P),
    )
    with interpreter(dma_execution_mode=mode):
        everywhere, new = jax.tree.map(np.asarray, jax.jit(mapped)(*placed))
    assert len(everywhere) == devices
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        old = [wide(x) for x in moments]
        exact_p, exact = update(wide(p), wide(g).sum(0), old, wide(scalars))
    return (everywhere, new), (np.asarray(exact_p), [np.asarray(x) for x in exact])


CASES = [  # optimizer, mesh, a device's part, DMAs, dtypes of parameters and of sums, tiles, late device
    ("adamw", dict(x=4), (9, 130), "eager", "float32", "float32", SMALL, 1),
    ("momentum", dict(x1=2, y=2, x2=2), (300,), "on_wait", "float32", "float32", SMALL, None),
    pytest.param("lion", dict(x=4), (40, 128), "on_wait", "bfloat16", "bfloat16", SMALL, 2, marks=pytest.mark.slow),
    pytest.param("adamw", dict(x=8), (20, 130), "on_wait", "float32", "bfloat16", SMALL, None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("optimizer, axes, shape, mode, dtype, sent, tiles, slow", CASES)
def test_equal_to_a_sum_an_update_and_copies(optimizer, axes, shape, mode, dtype, sent, tiles, slow):
    (everywhere, moments), (exact, exact_moments) = run(optimizer, axes, shape, mode, dtype, sent, tiles, slow)
    tolerance = 1e-6 if dtype == sent == "float32" else 2e-2
    for p in everywhere:
        np.testing.assert_array_equal(p, everywhere[0])
    assert error(everywhere[0], exact) < tolerance
    for got, want in zip(moments, exact_moments, strict=True):
        assert error(got, want) < (tolerance if got.dtype == np.float32 else 2e-2)


# The permit for a slot is not among them: on one core, where both halves take turns, what the other half waits for is
# enough. Nor is the wait for what was sent to have left, whose lack is found in some runs only. One device late shows
# the barrier.
FAULTS = [
    ("arrival", 4, "on_wait", None),
    pytest.param("barrier", 4, "eager", 1, marks=pytest.mark.slow),
    pytest.param("gathered", 4, "on_wait", None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("without, size, mode, slow", FAULTS)
def test_a_wait_that_is_left_out_is_found(without, size, mode, slow):
    try:
        (everywhere, _), (exact, _) = run(
            "adamw", dict(x=size), (40, 128), mode, tiles=SMALL, slow=slow, without=without
        )
    except Exception as problem:
        runtime_tokens.clear()  # else JAX raises the same once more at its exit
        # What a device writes to one that has not entered is nowhere.
        assert "race" in str(problem).lower() or without == "barrier", problem
    else:
        assert not error(everywhere, np.broadcast_to(exact, everywhere.shape)) < 1e-3


def test_refusals():
    shape = lambda *sizes, dtype="float32": jax.ShapeDtypeStruct(sizes, dtype)
    x = shape(16, 64)
    assert kernels.unsupported(x, x, [x, x]) is None
    assert "must be float32 or bfloat16, got float16" in kernels.unsupported(x, x, [shape(16, 64, dtype="float16")])
    assert "nothing" in kernels.unsupported(shape(0, 64), shape(0, 64), [])
