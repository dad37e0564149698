"""linear_distillation on the TPU: interpreted, races detected and unwritten memory NaN, against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.tpu import linear_distillation as kernel
from tests.kernels.cross_entropy import check
from tests.kernels.distillation import data, exact, fused, plain

Tiles = kernel.Tiles
f32, bf16 = jnp.float32, jnp.bfloat16
SMALL = Tiles(128, 128)
CASES = [  # tokens, hidden, teacher's hidden, vocab, biases, temperature, dtype, tiles, chip, copies
    (129, 100, 140, 300, True, True, 2.0, bf16, SMALL, "v5p", "on_wait"),  # three blocks of the vocabulary, two cores
    pytest.param(300, 16, 128, 129, False, False, 1.0, f32, SMALL, "v5e", "eager", marks=pytest.mark.slow),
    pytest.param(1, 1, 1, 2, True, False, 1.0, f32, None, "v5e", "on_wait", marks=pytest.mark.slow),
    pytest.param(1000, 32, 16, 1000, False, True, 0.5, bf16, None, "v5p", "on_wait", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "tokens, hidden, teacher_hidden, vocab, bias, teacher_bias, temperature, dtype, tiles, chip, copies", CASES
)
def test_against_float64(
    tokens, hidden, teacher_hidden, vocab, bias, teacher_bias, temperature, dtype, tiles, chip, copies
):
    operands, g = data(tokens, hidden, teacher_hidden, vocab, bias, teacher_bias, dtype)
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=copies, num_cores_or_threads=2)
    with chips.target(chips.named(chip)), pltpu.force_tpu_interpret_mode(params):
        run = jax.jit(lambda operands, g: fused(kernel, operands, g, temperature, tiles))
        got = jax.tree.map(np.asarray, run(operands, g))
    dtypes = dict.fromkeys(("loss", "lse", "teacher_lse"), f32) | dict.fromkeys(("x", "weight", "bias"), dtype)
    check(got, exact(operands, g, temperature), plain(operands, g, temperature), dtypes)


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"teacher_x": shape(8, 64, dtype="float32")}, "teacher_x must have the dtype of x, bfloat16, got float32"),
        ({"x": shape(8, 128, dtype="float16")}, "x must be float32 or bfloat16 on a TPU, got float16"),
        ({"x": shape(8, 1 << 16), "weight": shape(1 << 16, 256)}, "hidden sizes [65536, 64] in bfloat16 do not"),
    ],
)
def test_refusals(changes, reason):
    call = dict(x=shape(8, 128), weight=shape(128, 256), teacher_x=shape(8, 64), teacher_weight=shape(64, 256))
    with chips.target(chips.named("v5e")):
        assert kernel.unsupported(**call, temperature=1.0) is None
        for phase in ("forward", "backward"):
            chosen = kernel.tiles(phase, **call)
            assert kernel.memory(phase, chosen, **call) <= chips.named("v5e").vmem_bytes
            assert next(kernel.candidates(phase, **call)) == chosen
        assert reason in kernel.unsupported(**(call | changes), temperature=1.0)
