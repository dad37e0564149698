"""The TPU kernels of block_sparse_matmul, interpreted: races detected, unwritten memory NaN, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxops
from jaxops.interpreter import tpu as interpreter
from jaxops.reference.block_sparse_matmul import block_sparse_matmul as reference
from pallas_kernels import chips
from pallas_kernels.tpu import block_sparse_matmul
from pallas_kernels.tpu.block_sparse_matmul import Tiles
from tests.compare import no_worse


def case(m, mask, *, block=(128, 128), dtype="bfloat16", activation=None, bias=False, residual=False, tiles=None):
    return locals()


DIAGONAL = np.eye(3, 2, dtype=bool)
EMPTY = np.array([[1, 0, 0], [1, 0, 1]], bool)  # a column without a block
RANDOM = np.random.default_rng(3).random((4, 5)) < 0.7
CASES = {
    "one row": case(1, DIAGONAL),
    "an empty column": case(40, EMPTY, bias=True, tiles=Tiles(16, 8)),
    "all that comes after": case(37, EMPTY, activation=jax.nn.silu, bias=True, residual=True, tiles=Tiles(32, 8)),
    "chunks and edges": case(150, RANDOM, tiles=Tiles(128, 4)),
    "one chunk": case(300, RANDOM, bias=True, tiles=Tiles(256, 32)),
    "large blocks": case(20, EMPTY, block=(256, 128), dtype="float32", bias=True, tiles=Tiles(16, 2)),
    "wide blocks": case(33, DIAGONAL, block=(128, 256), residual=True, tiles=Tiles(16, 2)),
}
IN_EVERY_RUN = ("all that comes after",)


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


@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    c = CASES[name]
    operands, options, dy = build(c)
    assert block_sparse_matmul.unsupported(**operands, **options) is None

    def ours(operands, dy):
        outputs, residuals = block_sparse_matmul.forward(**operands, **options, tiles=c["tiles"])
        saved = dict(outputs=outputs, residuals=residuals, cotangents=(dy,))
        gradients = block_sparse_matmul.backward(**operands, **saved, **options, tiles=c["tiles"])
        return {"y": outputs[0], **gradients}

    with chips.target(chips.named("v5e")), interpreter():
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


REFUSED = {
    "x must be float32 or bfloat16 on a TPU, got float16": shapes(x=((16, 256), "float16")),
    "w must have the dtype of x, bfloat16, got float32": shapes(w=((2, 128, 128), "float32")),
    "the sides of a block must be multiples of 128, got 128 × 64": shapes(w=((2, 128, 64), "bfloat16")),
    "the pattern must fit the scalar memory, 32768 blocks, got 40000": shapes(w=((40000, 128, 128), "bfloat16")),
    "16 rows of 4194304 and 256 columns must fit the 64 MiB of VMEM": shapes(
        x=((16, 1 << 22), "bfloat16"), w=((2, 512, 128), "bfloat16")
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    told = block_sparse_matmul.unsupported(**REFUSED[reason], size=256, activation=None, precision=None)
    assert told is not None and reason in told


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("m, k, n, count", [(8, 256, 256, 1), (4096, 4096, 4096, 512), (8192, 8192, 28672, 5000)])
def test_default_tiles_fit(chip, m, k, n, count):
    operands = shapes(x=((m, k), "bfloat16"), w=((count, 128, 128), "bfloat16"))
    with chips.target(chips.named(chip)):
        for phase in ("forward", "backward"):
            given = dict(**operands, size=n, activation=None, precision=None)
            for tiles in block_sparse_matmul.candidates(phase, **given):
                assert block_sparse_matmul.memory(phase, tiles, **given) <= chips.current("tpu").vmem_bytes
            default = block_sparse_matmul.tiles(phase, **given)
            assert default == next(iter(block_sparse_matmul.candidates(phase, **given)))
