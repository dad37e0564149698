"""linear_distillation on Mosaic GPU: interpreted, races detected and unwritten memory NaN, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.interpreter import gpu as interpreter
from pallas_kernels import chips
from pallas_kernels.gpu import linear_distillation as kernel
from pallas_kernels.gpu import logits
from tests.kernels.cross_entropy import check
from tests.kernels.distillation import data, exact, fused, plain

Tiles = logits.Tiles
f32, bf16 = jnp.float32, jnp.bfloat16


CASES = [  # tokens, hidden, teacher's hidden, vocab, has a bias, has the teacher, temperature, tiles
    (70, 64, 128, 128, False, False, 1.0, Tiles(64, 2)),
    pytest.param(130, 100, 70, 300, True, True, 2.0, Tiles(64, 3), marks=pytest.mark.slow),
    pytest.param(70, 192, 64, 640, False, True, 0.5, None, marks=pytest.mark.slow),
    # Of one token the plain form may round well by luck, and τ² would magnify the one rounding of lse it was spared.
    pytest.param(1, 1, 1, 2, True, False, 1.0, None, marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize("tokens, hidden, teacher_hidden, vocab, bias, teacher_bias, temperature, tiles", CASES)
def test_against_float64(monkeypatch, tokens, hidden, teacher_hidden, vocab, bias, teacher_bias, temperature, tiles):
    # Blocks that go through two tiles, and chunks of 128 words: what only large sizes would have.
    monkeypatch.setattr(logits, "_share", lambda rows, count: 2)
    monkeypatch.setattr(logits, "NARROWEST", 128)
    monkeypatch.setattr(logits, "CHUNK_BYTES", 0)
    operands, g = data(tokens, hidden, teacher_hidden, vocab, bias, teacher_bias, bf16)
    with chips.target(chips.named("h100")), interpreter():
        got = jax.tree.map(np.asarray, fused(kernel, operands, g, temperature, tiles))
    dtypes = dict.fromkeys(("loss", "lse", "teacher_lse"), f32) | dict.fromkeys(("x", "weight", "bias"), bf16)
    check(got, exact(operands, g, temperature), plain(operands, g, temperature), dtypes)


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("chip", "changes", "reason"),
    [
        ("a100", {}, "needs wgmma, which only GPUs of compute capability 9.0 have, not 8.0"),
        ("h100", {"teacher_x": shape(8, 64, dtype="float32")}, "teacher_x must be bfloat16, got float32"),
        ("h100", {"weight": shape(128, 256, dtype="float16")}, "weight must be bfloat16, got float16"),
    ],
)
def test_refusals(chip, changes, reason):
    call = dict(x=shape(8, 128), weight=shape(128, 256), teacher_x=shape(8, 64), teacher_weight=shape(64, 256))
    with chips.target(chips.named("h100")):
        assert kernel.unsupported(**call, temperature=1.0) is None
        for phase in ("forward", "backward"):
            for more in ({}, {"bias": shape(256)}):
                chosen = kernel.tiles(phase, **call, **more)
                assert kernel.memory(phase, chosen, **call, **more) <= chips.named("h100").smem_bytes
                assert next(kernel.candidates(phase, **call, **more)) == chosen
    with chips.target(chips.named(chip)):
        assert reason in kernel.unsupported(**(call | changes), temperature=1.0)
