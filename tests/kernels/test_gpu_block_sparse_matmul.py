"""The Mosaic GPU kernels of block_sparse_matmul, interpreted: races found, unwritten memory NaN, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxops.interpreter import gpu as interpreter
from pallas_kernels import chips
from pallas_kernels.gpu import block_sparse_matmul
from pallas_kernels.gpu.block_sparse_matmul import Tiles
from tests.kernels.sparse import DIAGONAL, EMPTY, RANDOM, build, case, check, shapes

CASES = {
    "one row": case(1, DIAGONAL, block=(64, 64)),
    "an empty column": case(40, EMPTY, bias=True, tiles=Tiles(128, 2)),
    "all that comes after": case(
        132, EMPTY, block=(64, 128), activation=jax.nn.silu, bias=True, residual=True, tiles=Tiles(256, 2)
    ),
    "many blocks": case(70, RANDOM, block=(64, 64), residual=True),
    "tall blocks": case(20, EMPTY, block=(192, 64), activation=jnp.tanh, tiles=Tiles(128, 3)),
    "wide blocks": case(33, DIAGONAL, block=(128, 256), bias=True, tiles=Tiles(256, 2)),
}
IN_EVERY_RUN = ("all that comes after", "one row")


@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    check(block_sparse_matmul, CASES[name], "h100", interpreter)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_vmap_of_x():
    operands, options, _ = build(case(8, DIAGONAL, block=(64, 64)))
    two = jnp.stack([operands["x"], 2 * operands["x"]])
    with chips.target(chips.named("h100")), interpreter():
        got = jax.vmap(lambda x: block_sparse_matmul.value(**operands | {"x": x}, **options)[0])(two)
        got = np.asarray(jax.block_until_ready(got), np.float32)
    np.testing.assert_array_equal(got[1], 2 * got[0])


FAULTS = {
    "a result leaves before it is written": ("commit_smem", lambda: None),
    "a forgotten wait for the copies": ("barrier_wait", lambda barrier: None),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, monkeypatch):
    attribute, fault = FAULTS[name]
    operands, options, _ = build(case(8, DIAGONAL, block=(128, 64)))
    with chips.target(chips.named("h100")), interpreter():
        monkeypatch.setattr(plgpu, attribute, fault)
        with pytest.raises(Exception, match="RACE DETECTED"):
            jax.block_until_ready(block_sparse_matmul.value(**operands, **options))
        monkeypatch.undo()


REFUSED = {
    "x must be bfloat16, got float32": shapes(x=((16, 256), "float32")),
    "w must be bfloat16, got float16": shapes(w=((2, 128, 128), "float16")),
    "residual must be bfloat16, got float32": shapes(residual=((16, 256), "float32")),
    "the sides of a block must be multiples of 64, the width of what TMA copies, got 128 × 32": shapes(
        w=((2, 128, 32), "bfloat16")
    ),
    "the grid is limited to 65535 blocks, got 16 rows, 256 × 256 and 70000 stored blocks": shapes(
        w=((70000, 128, 128), "bfloat16")
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    with chips.target(chips.named("h100")):
        assert block_sparse_matmul.unsupported(**REFUSED[reason], size=256, activation=None, precision=None) == reason


def test_refuses_what_another_gpu_or_activation_wants():
    call = dict(**shapes(), size=256, precision=None)
    with chips.target(chips.named("a100")):
        assert "needs wgmma" in block_sparse_matmul.unsupported(**call, activation=None)
    with chips.target(chips.named("h100")):
        assert "uses sin, which the kernel cannot compile" in block_sparse_matmul.unsupported(
            **call, activation=jnp.sin
        )


@pytest.mark.parametrize("block", [(64, 64), (128, 128), (192, 320), (512, 256)])
def test_tiles_fit(block):
    call = shapes(x=((4096, 15360), "bfloat16"), w=((500, *block), "bfloat16"))
    call |= dict(size=15360, activation=None, precision=None)
    with chips.target(chips.named("h100")):
        for phase in ("forward", "backward"):
            found = list(block_sparse_matmul.candidates(phase, **call))
            assert found[0] == block_sparse_matmul.tiles(phase, **call)
            assert all(
                block_sparse_matmul.memory(phase, t, **call) <= chips.current("gpu").smem_bytes
                and block[1] % t.columns(block[1]) == 0
                for t in found
            )
