"""ragged_dot against `jax.lax.ragged_dot`, forward, and forward and backward.

JAX_PLATFORMS=cpu python -m benchmarks.ragged_dot [rows] [inner] [columns] [rounds]
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.ops.ragged_dot import ragged_dot
from jaxops.workbench import timing


def balanced(lhs, rhs, **options):
    """`ragged_dot` of groups of the same size, which are known while tracing: for its schedule."""
    sizes = np.full(rhs.shape[0], lhs.shape[0] // rhs.shape[0], np.int32)
    return ragged_dot(lhs, rhs, jnp.asarray(sizes), **options)


def main(rows: int = 2048, inner: int = 512, columns: int = 1024, rounds: int = 5) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    lhs, dy = jax.random.normal(keys[0], (rows, inner)), jax.random.normal(keys[1], (rows, columns))
    for experts in (8, 64):
        rhs = jax.random.normal(keys[2], (experts, inner, columns)) / inner**0.5
        sizes = jnp.asarray(np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts)), jnp.int32)
        both = {"jaxops": ragged_dot, "jax.lax": jax.lax.ragged_dot}
        title = f"ragged_dot [{rows}, {inner}] × [{experts}, {inner}, {columns}] float32"
        forward = {name: functools.partial(f, group_sizes=sizes) for name, f in both.items()}
        timing.report(f"{title}, forward", timing.compare(forward, (lhs, rhs), rounds=rounds))
        backward = {name: timing.with_gradients(f, (0, 1)) for name, f in forward.items()}
        timing.report(f"{title}, fwd+bwd", timing.compare(backward, (lhs, rhs, dy), rounds=rounds))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
