"""Calls of quantized_matmul that its kernels are tried with."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.reference.quantized_matmul import quantized_matmul as reference


def case(m, k, n, *, groups=1, w="int8", dtype="bfloat16", zeros=False, whole=False, bias=False, tiles=None):
    return locals()


def build(c):
    random = np.random.default_rng(0)
    m, k, n, g = (c[name] for name in ("m", "k", "n", "groups"))
    most = 7 if c["w"] == "int4" else 127
    whole = "int8" if c["whole"] is True else c["whole"]
    x = random.integers(-127, 128, (m, k)) if whole else random.standard_normal((m, k))
    operands = {
        "x": jnp.asarray(x, whole or c["dtype"]),
        "w": jnp.asarray(random.integers(-most, most + 1, (k, n)), c["w"]),
        "scales": jnp.asarray(random.uniform(0.5, 1.5, (g, n)) / most, "float32"),
    }
    if c["zeros"]:
        operands["zeros"] = jnp.asarray(random.integers(-4, 5, (g, n)), "float32")
    if c["whole"]:
        operands["x_scales"] = jnp.asarray(random.uniform(0.5, 1.5, (m, 1)) / 127, "float32")
    if c["bias"]:
        operands["bias"] = jnp.asarray(random.standard_normal(n), c["dtype"])
    return operands


def exact(operands, dtype):
    with jax.enable_x64(True):
        wide = {
            n: jnp.asarray(np.asarray(x, np.float64))
            if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
            else x
            for n, x in operands.items()
        }
        return np.asarray(reference(**wide, dtype="float64")[0])
