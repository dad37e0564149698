"""The TPU kernels of block_sparse_matmul, interpreted: races detected, unwritten memory NaN, against float64."""

import jax
import pytest

from jaxops.interpreter import tpu as interpreter
from pallas_kernels import chips
from pallas_kernels.tpu import block_sparse_matmul
from pallas_kernels.tpu.block_sparse_matmul import Tiles
from tests.kernels.sparse import DIAGONAL, EMPTY, RANDOM, case, check, shapes

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


@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    check(block_sparse_matmul, CASES[name], "v5e", interpreter)


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
