"""Calls of block_sparse_matmul that its kernels are tried with."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxops
from jaxops.reference.block_sparse_matmul import block_sparse_matmul as reference
from pallas_kernels import chips
from tests.compare import no_worse


def case(m, mask, *, block=(128, 128), dtype="bfloat16", activation=None, bias=False, residual=False, tiles=None):
    return locals()


DIAGONAL = np.eye(3, 2, dtype=bool)
EMPTY = np.array([[1, 0, 0], [1, 0, 1]], bool)  # a column without a block
RANDOM = np.random.default_rng(3).random((4, 5)) < 0.7


def build(c):
    random = np.random.default_rng(0)
    pattern = jaxops.BlockPattern.of(c["mask"], c["block"])
    k, n = pattern.shape
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), c["dtype"])
    operands = {
        "x": normal(c["m"], k),
        "w": normal(len(pattern.rows), *c["block"]),
        "rows": jnp.asarray(pattern.rows),
        "columns": jnp.repeat(jnp.arange(len(pattern.offsets) - 1), np.diff(pattern.offsets)).astype(jnp.int32),
    }
    if c["bias"]:
        operands["bias"] = normal(n)
    if c["residual"]:
        operands["residual"] = normal(c["m"], n)
    return operands, {"size": n, "activation": c["activation"], "precision": None}, normal(c["m"], n)


def plain(operands, dy, options, wide=False):
    """y and the gradients of the reference."""
    moving = {name: x for name, x in operands.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    if wide:
        moving, dy = ({n: jnp.asarray(np.asarray(x, np.float64)) for n, x in moving.items()}, np.asarray(dy, "float64"))
    fixed = {name: x for name, x in operands.items() if name not in moving}
    y, pull_back = jax.vjp(lambda moving: reference(**moving, **fixed, **options)[0], moving)
    return {"y": y, **pull_back(jnp.asarray(dy))[0]}


def check(kernel, c, chip, interpreter):
    """y and all gradients of `kernel`, interpreted, are as near to float64 as XLA's."""
    operands, options, dy = build(c)

    def ours(operands, dy):
        outputs, residuals = kernel.forward(**operands, **options, tiles=c["tiles"])
        saved = dict(outputs=outputs, residuals=residuals, cotangents=(dy,))
        return {"y": outputs[0], **kernel.backward(**operands, **saved, **options, tiles=c["tiles"])}

    with chips.target(chips.named(chip)), interpreter():
        assert kernel.unsupported(**operands, **options) is None
        got = jax.tree.map(np.asarray, jax.jit(ours)(operands, dy))
    unfused = plain(operands, dy, options)
    with jax.enable_x64(True):
        exact = plain(operands, dy, options, wide=True)
    for what, value in got.items():
        no_worse(what, value, unfused[what], exact[what], c["dtype"])


def shapes(**changed):
    made = {"x": ((16, 256), "bfloat16"), "w": ((2, 128, 128), "bfloat16"), "rows": ((2,), "int32")}
    made |= {"columns": ((2,), "int32")} | changed
    return {name: jax.ShapeDtypeStruct(*one) for name, one in made.items()}
