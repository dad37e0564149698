"""sharding.gradient_reduction against an all-reduce and optax.adamw: a whole training step on 8 virtual CPU devices.

The parameters are 8 matrices and their biases; everything is in the timed call, parameters and state donated. Virtual
devices share the cores and the memory of one machine: what is saved is work that all of them did, not traffic.

python -m benchmarks.gradient_reduction
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
from jaxops import optim
from jaxops.workbench import timing

WIDTH, LAYERS, ROWS = 512, 8, 64


def loss(params, x, y):
    for p in params:
        x = jnp.tanh(x @ p["w"] + p["b"])
    return jnp.mean(jnp.square(x - y))


class Training:
    """A step to call again and again: it takes what it returned the time before."""

    def __init__(self, mesh, step, init, specs, batch):
        random = np.random.default_rng(0)
        params = [
            {"w": random.standard_normal((WIDTH, WIDTH), np.float32) * WIDTH**-0.5, "b": np.zeros(WIDTH, np.float32)}
            for _ in range(LAYERS)
        ]
        params = jax.device_put(params, NamedSharding(mesh, P()))
        state = jax.jit(jax.shard_map(init, mesh=mesh, in_specs=P(), out_specs=specs))(params)
        self.batch, self.state = batch, (params, state)
        local = jax.shard_map(step, mesh=mesh, in_specs=(P(), specs, *[P("data")] * 2), out_specs=(P(), specs))
        self.compiled = jax.jit(local, donate_argnums=(0, 1)).lower(params, state, *batch).compile()

    def __call__(self):
        self.state = self.compiled(*self.state, *self.batch)
        return self.state


def reduced(mesh, batch, **options):
    reduction = sharding.gradient_reduction(optim.adamw(1e-3), **options)

    def step(params, state, x, y):
        _, grads = reduction.value_and_grad(loss)(params, state, x, y)
        return reduction.apply(params, grads, state)

    shapes = [
        {"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), np.float32), "b": jax.ShapeDtypeStruct((WIDTH,), np.float32)}
    ] * LAYERS
    return Training(mesh, step, reduction.init, reduction.state_specs(shapes, mesh=mesh), batch)


def plain(mesh, batch):
    optimizer = optax.adamw(1e-3)

    def step(params, state, x, y):
        grads = jax.grad(loss)(jax.tree.map(lambda p: sharding.copy(p, "data"), params), x, y)
        updates, state = optimizer.update(lax.pmean(grads, "data"), state, params)
        return optax.apply_updates(params, updates), state

    return Training(mesh, step, optimizer.init, P(), batch)


def run() -> None:
    mesh = sharding.make_mesh(data=8)
    random = np.random.default_rng(1)
    batch = tuple(
        jax.device_put(random.standard_normal((ROWS, WIDTH), np.float32), NamedSharding(mesh, P("data"))) for _ in "xy"
    )
    trainings = {
        "zero 1": reduced(mesh, batch),
        "zero 1, int8": reduced(mesh, batch, compression="int8"),
        "zero 0": reduced(mesh, batch, zero=0),
        "psum and optax": plain(mesh, batch),
    }
    spreads = timing.take_turns(trainings, rounds=10)
    for name in ("zero 1", "zero 0"):
        pairs = zip(*(jax.tree.leaves(trainings[which].state[0]) for which in (name, "psum and optax")), strict=True)
        for got, expected in pairs:
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    base = spreads["psum and optax"].median
    rows = [
        timing.Row(name, spread, timing.temp_bytes(trainings[name].compiled), base / spread.median)
        for name, spread in spreads.items()
    ]
    count = LAYERS * (WIDTH * WIDTH + WIDTH) / 1e6
    timing.report(f"adamw, {count:.1f} M parameters on 8 virtual devices, a training step", rows)


def main() -> None:
    """In a process of its own, which has 8 devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run(
        [sys.executable, "-c", "from benchmarks.gradient_reduction import run; run()"], env=environment, check=True
    )


if __name__ == "__main__":
    main()
