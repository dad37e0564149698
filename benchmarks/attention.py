"""Attention against `jax.nn.dot_product_attention`, forward and with gradients.

python -m benchmarks.attention
"""

import functools

import jax
import jax.numpy as jnp

from jaxops.ops.attention import dot_product_attention
from jaxops.workbench.timing import compare, report, with_gradients

# title, B, T, S, N, K, H, dtype, options, rounds
CASES = [
    ("causal", 1, 4096, 4096, 8, 8, 64, "float32", {"is_causal": True}, 15),
    ("causal, window 512", 1, 4096, 4096, 8, 8, 64, "float32", {"is_causal": True, "local_window_size": (512, 0)}, 5),
    ("causal, grouped heads", 1, 2048, 2048, 8, 2, 64, "bfloat16", {"is_causal": True}, 5),
    ("whole", 2, 1000, 1000, 8, 8, 64, "float32", {}, 10),
    ("short", 2, 128, 128, 8, 8, 64, "float32", {"is_causal": True}, 50),
    ("decoding", 2, 1, 4096, 8, 2, 64, "float32", {}, 50),
]


def main() -> None:
    for title, batch, queries, keys, heads, groups, size, dtype, options, rounds in CASES:
        shapes = [(batch, queries, heads, size), *[(batch, keys, groups, size)] * 2, (batch, queries, heads, size)]
        seeds = jax.random.split(jax.random.key(0), 4)
        *inputs, cotangent = (jax.random.normal(k, s, dtype) for k, s in zip(seeds, shapes, strict=True))
        forward = {
            "jaxops": functools.partial(dot_product_attention, **options),
            "jax.nn": functools.partial(jax.nn.dot_product_attention, **options),
        }
        both = {name: with_gradients(function, argnums=(0, 1, 2)) for name, function in forward.items()}
        tolerance = 1e-4 if jnp.dtype(dtype) == jnp.float32 else 3e-2
        label = f"{title}: q {shapes[0]}, kv {shapes[1]}, {dtype}"
        report(f"{label}, forward", compare(forward, inputs, rounds=rounds, tolerance=tolerance))
        if queries > 1:
            rows = compare(both, (*inputs, cotangent), rounds=rounds, tolerance=tolerance)
            report(f"{label}, forward and backward", rows)


if __name__ == "__main__":
    main()
