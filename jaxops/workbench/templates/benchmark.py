"""new_operator against its reference in plain JAX, forward and backward, here.

PYTHONPATH=. python benchmarks/bench_new_operator.py [rows] [features]
"""

import sys

import jax
import jax.numpy as jnp
from jaxops.workbench import timing

import new_package.new_operator as module


def main(rows: int = 8192, features: int = 1024) -> None:
    x, dy = jax.random.normal(jax.random.key(0), (2, rows, features), jnp.bfloat16)
    scale = jnp.ones(features)
    variants = {
        module.NAME: timing.with_gradients(module.new_operator, (0, 1)),
        "plain JAX": timing.with_gradients(lambda x, scale: module.reference(x, scale)[0], (0, 1)),
    }
    measured = timing.compare(variants, (x, scale, dy), tolerance=2e-2)
    timing.report(f"{module.NAME} [{rows}, {features}] bfloat16, forward and backward", measured)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
