"""jaxops.optim.adamw against optax: a whole training update of 50 million parameters, in many leaves and in few.

Everything is in the timed call: the arrays handed over, the state, `optax.apply_updates`; parameters and state are
donated on both sides. A compilation of 2000 leaves takes about half a minute for each.

JAX_PLATFORMS=cpu python -m benchmarks.optim [leaves ...]
"""

import sys

import jax
import numpy as np
import optax

from jaxops import optim
from jaxops.workbench import timing

PARAMETERS = 50_000_000
COLUMNS = 250


class Training:
    """A step to call again and again: it takes what it returned the time before."""

    def __init__(self, optimizer, step, params, grads):
        self.grads, self.state = grads, (params, optimizer.init(params))
        donated = jax.jit(step, donate_argnums=(0, 2))
        self.compiled = donated.lower(params, grads, self.state[1]).compile()

    def __call__(self):
        self.state = self.compiled(self.state[0], self.grads, self.state[1])
        return self.state


def random_tree(leaves: int, seed: int) -> list[jax.Array]:
    random = np.random.default_rng(seed)
    shape = (PARAMETERS // leaves // COLUMNS, COLUMNS)
    return [jax.device_put(random.standard_normal(shape, np.float32)) for _ in range(leaves)]


def main(*counts: int) -> None:
    ours, theirs = optim.adamw(1e-3), optax.adamw(1e-3)

    def adding(params, grads, state):
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for leaves in counts or (2000, 8):
        grads = random_tree(leaves, 1)
        trainings = {
            "jaxops": Training(ours, ours.apply, random_tree(leaves, 0), grads),
            "optax": Training(theirs, adding, random_tree(leaves, 0), grads),
        }
        spreads = timing.take_turns(trainings, rounds=10)
        for got, expected in zip(trainings["jaxops"].state[0], trainings["optax"].state[0], strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
        temp = {name: timing.temp_bytes(training.compiled) for name, training in trainings.items()}
        base = spreads["optax"].median
        rows = [timing.Row(name, s, temp[name], base / s.median) for name, s in spreads.items()]
        timing.report(f"adamw, {PARAMETERS // 10**6} M parameters in {leaves} leaves, float32", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
