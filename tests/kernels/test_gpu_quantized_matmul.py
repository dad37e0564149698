"""The Mosaic GPU kernels of quantized_matmul, interpreted: races detected, unwritten memory NaN, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxops.interpreter import gpu as interpreter
from jaxops.reference.quantized_matmul import quantized_matmul as reference
from pallas_kernels import chips
from pallas_kernels.gpu import quantized_matmul
from pallas_kernels.gpu.quantized_matmul import Tiles
from tests.compare import no_worse
from tests.kernels.quantized import build, case, exact

CASES = {
    "one row": case(1, 256, 64),
    "edges": case(130, 256, 192, tiles=Tiles(128, 128, 64, 2), bias=True),
    "split": case(16, 512, 128, w="int4", tiles=Tiles(64, 64, 64, 2, 2), bias=True),
    "narrow": case(9, 256, 64, tiles=Tiles(64, 32, 128, 2)),
    "groups": case(20, 256, 192, groups=4, w="int4", zeros=True, bias=True, tiles=Tiles(64, 128, 64, 2)),
    "groups of many rows": case(130, 256, 64, groups=2, zeros=True, tiles=Tiles(128, 64, 64, 2)),
    "groups, split": case(16, 512, 64, groups=4, tiles=Tiles(64, 64, 128, 2, 2), bias=True),
    "float8": case(33, 128, 64, groups=2, w="float8_e4m3fn", bias=True),
    "float8 both": case(40, 192, 64, w="float8_e5m2", whole="float8_e4m3fn"),
    "integers": case(40, 2048, 64, whole=True, tiles=Tiles(64, 64, 256, 2), bias=True),
    "integers, split": case(8, 512, 64, w="int4", whole=True, tiles=Tiles(64, 64, 128, 2, 2)),
    "integers in groups": case(16, 256, 64, groups=2, w="int4", whole=True, zeros=True),
    "many integers": case(514, 256, 192, whole=True, bias=True, tiles=Tiles(128, 256, 128, 2)),
    "many integers of four bits": case(513, 128, 64, w="int4", whole=True, dtype="float32"),
}
IN_EVERY_RUN = ("groups", "split", "narrow")


def run(operands, dtype, tiles):
    with chips.target(chips.named("h100")), interpreter():
        assert quantized_matmul.unsupported(**operands, dtype=dtype) is None
        return np.asarray(jax.block_until_ready(quantized_matmul.forward(**operands, dtype=dtype, tiles=tiles)[0][0]))


@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    c = CASES[name]
    operands, dtype = build(c), c["dtype"]
    ours, unfused = run(operands, dtype, c["tiles"]), reference(**operands, dtype=dtype)[0]
    no_worse("y", ours, unfused, exact(operands, dtype), dtype)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", ["integers", *(pytest.param(n, marks=pytest.mark.slow) for n in ("many integers", "integers, split"))]
)
def test_integers_are_exact(name):
    """Scales that are powers of 2 and a result that float32 holds: nothing is rounded. The sums pass 24 bits."""
    c = CASES[name]
    operands = {key: x for key, x in build(c).items() if key != "bias"}
    x, w = operands["x"], operands["w"]
    x, w = x.at[:4].set(127), w.at[:, :8].set(127 if w.dtype == jnp.int8 else 7)
    ones = {"scales": jnp.full((1, w.shape[1]), 0.5, "float32"), "x_scales": jnp.ones((len(x), 1), "float32")}
    oracle = np.asarray(x, np.int64) @ np.asarray(w, np.int64)
    assert name != "integers" or oracle.max() > 1 << 24
    np.testing.assert_array_equal(run({"x": x, "w": w} | ones, "float32", c["tiles"]), oracle.astype(np.float32) / 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_vmap_of_x():
    operands = build(case(8, 64, 64))
    x = jnp.stack([operands["x"], 2 * operands["x"]])
    with chips.target(chips.named("h100")), interpreter():
        call = lambda x: quantized_matmul.forward(**operands | {"x": x}, dtype="bfloat16")[0][0]
        both = np.asarray(jax.block_until_ready(jax.vmap(call)(x)), np.float32)
    np.testing.assert_array_equal(both[1], 2 * both[0])
    np.testing.assert_array_equal(both[0], run(operands, "bfloat16", None).astype(np.float32))


@pytest.mark.timeout(300)
def test_each_weight_is_read_once(monkeypatch):
    """What the copies of a call read, as the interpreter runs them."""
    read, original = [], gpu_callbacks.AsyncCopyGmemToSmemTask.__init__

    def recorded(task, *arguments, **named):
        original(task, *arguments, **named)
        read.append(task.src_access.shape)

    monkeypatch.setattr(gpu_callbacks.AsyncCopyGmemToSmemTask, "__init__", recorded)
    tiles = Tiles(64, 64, 128, 2, 2)
    run(build(case(16, 512, 128, groups=4, w="int4")), "bfloat16", tiles)
    assert read.count((tiles.depth, tiles.columns)) * tiles.depth * tiles.columns == 512 * 128
    rest = [shape for shape in read if shape != (tiles.depth, tiles.columns)]
    assert rest == [(16, tiles.depth)] * 8  # x, for each of the two blocks of columns


FAULTS = {
    "weights are multiplied before they are written": ("commit_smem", lambda: None),
    "a forgotten wait for the copies": ("barrier_wait", lambda barrier: None),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, monkeypatch):
    attribute, fault = FAULTS[name]
    operands = build(case(8, 512, 64))
    with chips.target(chips.named("h100")), interpreter():
        monkeypatch.setattr(plgpu, attribute, fault)
        with pytest.raises(Exception, match="RACE DETECTED"):
            jax.block_until_ready(quantized_matmul.forward(**operands, dtype="bfloat16"))
        monkeypatch.undo()


def shapes(**changed):
    made = {"x": ((16, 256), "bfloat16"), "w": ((256, 128), "int8"), "scales": ((1, 128), "float32")} | changed
    return {name: jax.ShapeDtypeStruct(*one) for name, one in made.items()}


REFUSED = {
    "x must be bfloat16, int8 or float8 on a GPU, got float32": shapes(x=((16, 256), "float32")),
    "w must be int8, int4, float8_e4m3fn or float8_e5m2, got uint8": shapes(w=((256, 128), "uint8")),
    "n must be a multiple of 64, the width of the tiles that TMA copies, got 100": shapes(
        w=((256, 100), "int8"), scales=((1, 100), "float32")
    ),
    "k, and the rows of a group, must be multiples of 64, got 256 in 8 groups": shapes(scales=((8, 128), "float32")),
    "the grid is limited to 65535 blocks of 64 rows and of 32 columns, got 4194304 rows and 128 columns": shapes(
        x=((1 << 22, 256), "bfloat16")
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    with chips.target(chips.named("h100")):
        assert quantized_matmul.unsupported(**REFUSED[reason], dtype="bfloat16") == reason


def test_another_gpu_has_no_wgmma():
    with chips.target(chips.named("a100")):
        assert "needs wgmma" in quantized_matmul.unsupported(**shapes(), dtype="bfloat16")


def test_tiles_fit():
    """All of them, and few rows read each weight once: sums of blocks that share columns are few beside the weights."""
    bits = {"int8": 8, "int4": 4, "float8_e4m3fn": 8}
    for m, n, k in ((1, 64, 64), (1, 4096, 4096), (16, 4096, 4096), (16, 11008, 4096), (4096, 4096, 4096)):
        for w, groups, zeros, x in (
            *(("int8", 1, False, "bfloat16"), ("int4", k // 64, True, "bfloat16"), ("int4", 1, False, "bfloat16")),
            *(("float8_e4m3fn", 1, False, "bfloat16"), ("int8", 1, False, "int8"), ("int8", 1, True, "int8")),
        ):
            call = shapes(x=((m, k), x), w=((k, n), w), scales=((groups, n), "float32"))
            if zeros:
                call["zeros"] = call["scales"]
            with chips.target(chips.named("h100")):
                assert quantized_matmul.unsupported(**call, dtype="bfloat16") is None
                t = quantized_matmul.tiles("forward", **call, dtype="bfloat16")
                found = list(quantized_matmul.candidates("forward", **call, dtype="bfloat16"))
                used = [quantized_matmul.memory("forward", t, **call, dtype="bfloat16") for t in found]
            assert found[0] == t and max(used) <= chips.named("h100").smem_bytes
            if m <= 16:
                assert t.rows >= m  # one row of blocks
                assert t.splits == 1 or 8 * t.splits * max(m, 8) * n <= 0.1 * k * n * bits[w] / 8
