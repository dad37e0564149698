"""linear_cross_entropy against log_softmax of the product, forward and backward.

JAX_PLATFORMS=cpu python -m benchmarks.linear_cross_entropy [tokens] [hidden] [vocab] [rounds]
"""

import sys

import jax
import jax.numpy as jnp

from jaxops.ops.linear_cross_entropy import linear_cross_entropy
from jaxops.workbench import timing


def main(tokens: int = 4096, hidden: int = 256, vocab: int = 128_000, rounds: int = 3) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, hidden))
    weight = jax.random.normal(keys[1], (hidden, vocab)) / hidden**0.5
    labels = jax.random.randint(keys[2], (tokens,), 0, vocab)

    def plain(x, weight):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ weight), labels[:, None], -1))

    def ours(x, weight):
        return linear_cross_entropy(x, weight, labels)

    variants = {name: jax.value_and_grad(f, (0, 1)) for name, f in {"jaxops": ours, "log_softmax": plain}.items()}
    rows = timing.compare(variants, (x, weight), rounds=rounds)
    timing.report(f"linear_cross_entropy, tokens {tokens}, hidden {hidden}, vocab {vocab}, float32, fwd+bwd", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
