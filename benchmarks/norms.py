"""layer_norm and rms_norm against Flax's modules, forward and backward.

JAX_PLATFORMS=cpu python -m benchmarks.norms [rows] [features]
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxops.ops.layer_norm import layer_norm
from jaxops.ops.rms_norm import rms_norm
from jaxops.workbench import timing


def flax_layer_norm(x, scale, bias):
    return nn.LayerNorm(dtype=x.dtype).apply({"params": {"scale": scale, "bias": bias}}, x)


def flax_rms_norm(x, scale, bias):
    del bias
    return nn.RMSNorm(dtype=x.dtype).apply({"params": {"scale": scale}}, x)


def our_rms_norm(x, scale, bias):
    del bias
    return rms_norm(x, scale)


def backward_only(function, argnums):
    both = timing.with_gradients(function, argnums)
    return lambda *args: both(*args)[1]  # what the gradients do not need of the forward is not computed


def main(rows: int = 8192, features: int = 2048) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, dy = (jax.random.normal(key, (rows, features), dtype) for key in keys[:2])
        scale, bias = (jax.random.normal(key, (features,)) for key in keys[2:])
        for name, ours, theirs, argnums in (
            ("layer_norm", layer_norm, flax_layer_norm, (0, 1, 2)),
            ("rms_norm", our_rms_norm, flax_rms_norm, (0, 1)),
        ):
            tolerance = 1e-3 if dtype == jnp.float32 else 2e-2
            shape = f"{name} [{rows}, {features}] {jnp.dtype(dtype).name}"
            forward = {"jaxops": ours, "flax": theirs}
            timing.report(f"{shape}, forward", timing.compare(forward, (x, scale, bias), tolerance=tolerance))
            backward = {name: backward_only(f, argnums) for name, f in forward.items()}
            timing.report(f"{shape}, backward", timing.compare(backward, (x, scale, bias, dy), tolerance=tolerance))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
