"""softmax, activations, rope, gated_linear_unit and matmul against what `jax.nn` and jnp give, forward and backward.

JAX_PLATFORMS=cpu python -m benchmarks.elementwise [rows] [columns]
"""

import functools
import sys

import jax
import jax.numpy as jnp

from jaxops.ops.activations import gelu, silu
from jaxops.ops.gated_linear_unit import gated_linear_unit
from jaxops.ops.matmul import matmul
from jaxops.ops.rope import rope
from jaxops.ops.softmax import softmax
from jaxops.workbench import timing


def plain_rope(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None, None] / 10000.0 ** (jnp.arange(half) / half)
    first, second, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def main(rows: int = 4096, columns: int = 4096) -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    x, dy = (jax.random.normal(key, (rows, columns)) for key in keys[:2])
    exact = functools.partial(jax.nn.gelu, approximate=False)
    for name, ours, theirs in (
        ("exact gelu", functools.partial(gelu, approximate=False), exact),
        ("tanh gelu", gelu, jax.nn.gelu),
        ("silu", silu, jax.nn.silu),
        ("softmax", softmax, jax.nn.softmax),
    ):
        variants = {"jaxops": timing.with_gradients(ours), "jax.nn": timing.with_gradients(theirs)}
        timing.report(f"{name} [{rows}, {columns}] float32, fwd+bwd", timing.compare(variants, (x, dy)))

    heads = x.reshape(rows, columns // 128, 128)
    positions = jnp.arange(rows)
    variants = {
        "jaxops": timing.with_gradients(lambda x: rope(x, positions)),
        "jnp": timing.with_gradients(lambda x: plain_rope(x, positions)),
    }
    rows_of_rope = timing.compare(variants, (heads, dy.reshape(heads.shape)))
    timing.report(f"rope {list(heads.shape)} float32, fwd+bwd", rows_of_rope)

    for dtype, tolerance in ((jnp.float32, 1e-3), (jnp.bfloat16, 2e-2)):
        a = jax.random.normal(keys[2], (rows // 8, 512), dtype)
        gate, up = ((jax.random.normal(key, (512, columns // 4)) / 512**0.5).astype(dtype) for key in keys[3:5])
        title = f"[{rows // 8}, 512] × [512, {columns // 4}] {jnp.dtype(dtype).name}, forward"
        variants = {"jaxops": matmul, "jnp": jnp.matmul}
        timing.report(f"matmul {title}", timing.compare(variants, (a, gate), tolerance=tolerance))
        bias, residual = gate[0], a @ up
        variants = {
            "jaxops": lambda x, w, bias, residual: matmul(x, w, bias=bias, activation=jax.nn.gelu, residual=residual),
            "jnp": lambda x, w, bias, residual: jax.nn.gelu(x @ w + bias) + residual,
        }
        rows_of_matmul = timing.compare(variants, (a, gate, bias, residual), tolerance=tolerance)
        timing.report(f"matmul with bias, gelu and residual {title}", rows_of_matmul)
        variants = {
            "jaxops": gated_linear_unit,
            "jax.nn": lambda x, gate, up: jax.nn.silu(x @ gate) * (x @ up),
        }
        timing.report(f"gated_linear_unit {title}", timing.compare(variants, (a, gate, up), tolerance=tolerance))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
