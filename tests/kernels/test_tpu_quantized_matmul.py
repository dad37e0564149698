"""The TPU kernel of quantized_matmul, interpreted: races detected, unwritten memory NaN, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.interpreter import tpu as interpreter
from jaxops.reference.quantized_matmul import quantized_matmul as reference
from pallas_kernels import chips
from pallas_kernels.tpu import quantized_matmul
from pallas_kernels.tpu.quantized_matmul import Tiles
from tests.compare import no_worse
from tests.kernels.quantized import build, case, exact

CASES = {
    "one row": case(1, 128, 129),
    "steps and edges": case(70, 384, 260, tiles=Tiles(32, 128, 128), bias=True),
    "groups": case(17, 512, 257, groups=2, tiles=Tiles(32, 128, 256), bias=True),
    "a group over several steps": case(16, 1024, 128, groups=2, w="int4", tiles=Tiles(16, 128, 256)),
    "small groups": case(9, 256, 200, groups=8, w="int4", tiles=Tiles(16, 128, 128)),
    "zeros": case(40, 512, 130, groups=4, w="int4", zeros=True, bias=True, tiles=Tiles(32, 128, 256)),
    "float32": case(33, 256, 129, groups=2, dtype="float32", zeros=True),
    "strips": case(768, 256, 128, groups=2, zeros=True, bias=True, tiles=Tiles(768, 128, 128)),
    "strips, small groups": case(768, 128, 128, groups=4, w="int4", tiles=Tiles(768, 128, 128)),
    "strips of integers": case(768, 256, 128, w="int4", whole=True, tiles=Tiles(768, 128, 128)),
    "float8": case(33, 256, 129, groups=2, w="float8_e4m3fn", bias=True),
    "float8, small groups": case(16, 256, 128, groups=8, w="float8_e5m2", dtype="float32"),
    "float8 both": case(40, 384, 130, w="float8_e4m3fn", whole="float8_e4m3fn", tiles=Tiles(32, 128, 128)),
    "float8 with integers": case(17, 256, 128, groups=2, w="int4", whole="float8_e5m2", bias=True),
    "strips of float8": case(768, 256, 128, w="float8_e5m2", whole="float8_e4m3fn", tiles=Tiles(768, 128, 128)),
    "integers": case(40, 384, 130, whole=True, tiles=Tiles(32, 128, 128)),
    "integers in groups": case(16, 512, 129, groups=4, w="int4", whole=True, bias=True, tiles=Tiles(16, 128, 256)),
}


def run(operands, dtype, tiles):
    with chips.target(chips.named("v5e")), interpreter():
        forward = jax.jit(lambda operands: quantized_matmul.forward(**operands, dtype=dtype, tiles=tiles)[0][0])
        return np.asarray(forward(operands))


IN_EVERY_RUN = ("groups", "small groups", "integers in groups", "strips", "float8 both")


@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    c = CASES[name]
    operands, dtype = build(c), c["dtype"]
    assert quantized_matmul.unsupported(**operands, dtype=dtype) is None
    ours, unfused = run(operands, dtype, c["tiles"]), reference(**operands, dtype=dtype)[0]
    no_worse("y", ours, unfused, exact(operands, dtype), dtype)


def test_integers_are_exact():
    """Scales that are powers of 2 and a result that float32 holds: nothing is rounded."""
    operands = build(CASES["integers"])
    operands |= {"scales": jnp.full((1, 130), 0.5, "float32"), "x_scales": jnp.ones((40, 1), "float32")}
    oracle = np.asarray(operands["x"], np.int64) @ np.asarray(operands["w"], np.int64) / 2
    np.testing.assert_array_equal(run(operands, "float32", Tiles(32, 128, 128)), oracle)


def test_vmap_of_x():
    operands = build(CASES["one row"])
    x = jnp.stack([operands["x"], 2 * operands["x"]])
    with chips.target(chips.named("v5e")), interpreter():
        call = lambda x: quantized_matmul.forward(**operands | {"x": x}, dtype="bfloat16")[0][0]
        both = jax.jit(jax.vmap(call))(x)
        one = jax.jit(call)(x[1])
    np.testing.assert_array_equal(both[1], one)


def shapes(**changed):
    made = {"x": ((16, 256), "bfloat16"), "w": ((256, 128), "int8"), "scales": ((1, 128), "float32")} | changed
    return {name: jax.ShapeDtypeStruct(*one) for name, one in made.items()}


REFUSED = {
    "x must be bfloat16, float32, int8 or float8 on a TPU, got float16": shapes(x=((16, 256), "float16")),
    "an int8 x is multiplied by int8 or int4 w in the TPU kernel, got float8_e4m3fn": shapes(
        x=((16, 256), "int8"), x_scales=((16, 1), "float32"), w=((256, 128), "float8_e4m3fn")
    ),
    "k must be a multiple of 128, got 200": shapes(x=((16, 200), "bfloat16"), w=((200, 128), "int8")),
    "a group must have a multiple of 32 rows, got 16": shapes(scales=((16, 128), "float32")),
    "zeros are served with groups of a multiple of 128 rows, got 64": shapes(
        scales=((4, 128), "float32"), zeros=((4, 128), "float32")
    ),
    "a quantised x is served with groups of a multiple of 128 rows, without zeros": shapes(
        x=((16, 256), "int8"), x_scales=((16, 1), "float32"), scales=((8, 128), "float32")
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    assert quantized_matmul.unsupported(**REFUSED[reason], dtype="bfloat16") == reason


def test_default_tiles_divide_and_fit():
    for chip in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        for m, k, n, groups in [(1, 4096, 11008, 1), (16, 11008, 4096, 86), (4096, 4096, 4096, 1), (300, 384, 7, 3)]:
            call = shapes(x=((m, k), "bfloat16"), w=((k, n), "int8"), scales=((groups, n), "float32"))
            with chips.target(chips.named(chip)):
                assert quantized_matmul.unsupported(**call, dtype="bfloat16") is None
                t = quantized_matmul.tiles("forward", **call, dtype="bfloat16")
                assert k % t.k == 0 and (t.k % (k // groups) == 0 or (k // groups) % t.k == 0)
                assert quantized_matmul.memory("forward", t, **call, dtype="bfloat16") <= chips.named(chip).vmem_bytes
