"""linear_cross_entropy on Mosaic GPU: interpreted, races detected and unwritten memory NaN, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxops.interpreter import gpu as interpreter
from pallas_kernels import chips
from pallas_kernels.gpu import linear_cross_entropy as kernel
from pallas_kernels.gpu import logits
from tests.kernels.cross_entropy import ALL, PLAIN, STATIC, check, data, oracle, unfused

Tiles = logits.Tiles
f32, bf16 = jnp.float32, jnp.bfloat16


def fused(x, weight, labels, g, bias, static, tiles, dlse=None):
    operands = {"x": x, "weight": weight, "labels": labels} | ({} if bias is None else {"bias": bias})
    static = dict(zip(STATIC, static, strict=True))
    assert kernel.unsupported(**operands, **static) is None
    outputs, residuals = kernel.forward(**operands, **static, tiles=tiles)
    grads = kernel.backward(
        **operands, outputs=outputs, residuals=residuals, cotangents=(g, dlse), **static, tiles=tiles
    )
    return {"loss": outputs[0], "lse": outputs[1]} | grads


@pytest.fixture
def in_small(monkeypatch):
    """Blocks that go through two tiles, and chunks of 128 words: what only large sizes would have."""
    monkeypatch.setattr(logits, "_share", lambda rows, count: 2)
    monkeypatch.setattr(logits, "NARROWEST", 128)
    monkeypatch.setattr(logits, "CHUNK_BYTES", 0)


CASES = [  # tokens, hidden, vocab, dtype of the bias, (smoothing, z-loss, cap), tiles, a cotangent of lse
    (70, 64, 128, None, (0.1, 0.0, None), Tiles(64, 2), False),
    pytest.param(70, 100, 200, f32, ALL, Tiles(64, 2), True, marks=pytest.mark.slow),  # a chunk of one and a half
    pytest.param(1, 1, 1, bf16, ALL, None, False, marks=pytest.mark.slow),
    pytest.param(130, 130, 300, bf16, ALL, Tiles(64, 3), True, marks=pytest.mark.slow),
    pytest.param(200, 64, 640, None, PLAIN, None, False, marks=pytest.mark.slow),
    pytest.param(257, 192, 127, None, (0.1, 0.0, None), Tiles(128, 2), False, marks=pytest.mark.slow),
]


@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize("tokens, hidden, vocab, bias_dtype, static, tiles, with_dlse", CASES)
def test_against_float64(in_small, tokens, hidden, vocab, bias_dtype, static, tiles, with_dlse):
    x, weight, labels, g, bias = data(tokens, hidden, vocab, bf16, bias_dtype)
    args = x, weight, labels.at[1::3].set(-1), g, bias  # a label of another slice of the vocabulary is of no word here
    dlse = jnp.cos(3 * g) if with_dlse else None
    with chips.target(chips.named("h100")), interpreter():
        got = jax.tree.map(np.asarray, fused(*args, static, tiles, dlse))
    more = (dlse,) if with_dlse else ()
    dtypes = {"loss": f32, "lse": f32, "x": bf16, "weight": bf16, "bias": bias_dtype}
    check(got, oracle(*args, *static, *more), unfused(*args, *static, *more), dtypes)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_vmap():
    """Of two problems that share their weight each is as alone."""
    x, weight, labels, g, _ = data(70, 64, 200, bf16, None)
    both = jnp.stack([x, -x])
    run = lambda x: fused(x, weight, labels, g, None, PLAIN, None)
    with chips.target(chips.named("h100")), interpreter():
        got = jax.tree.map(np.asarray, jax.vmap(run)(both))
    for i, x in enumerate(both):
        args = x, weight, labels, g, None
        dtypes = {"loss": f32, "lse": f32, "x": bf16, "weight": bf16}
        check({k: v[i] for k, v in got.items()}, oracle(*args, *PLAIN), unfused(*args, *PLAIN), dtypes)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_planted_fault_is_found(monkeypatch):
    """dz that leaves before it is written."""
    args = data(64, 64, 64, bf16, None)
    with chips.target(chips.named("h100")), interpreter():
        monkeypatch.setattr(plgpu, "commit_smem", lambda *_: None)
        with pytest.raises(Exception, match="RACE DETECTED"):
            jax.block_until_ready(fused(*args, PLAIN, None))
        monkeypatch.undo()


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("chip", "changes", "reason"),
    [
        ("b200", {}, "needs wgmma, which only GPUs of compute capability 9.0 have, not 10.0"),
        ("h100", {"x": shape(8, 128, dtype="float32")}, "x must be bfloat16, got float32"),
        ("h100", {"weight": shape(128, 256, dtype="float16")}, "weight must be bfloat16, got float16"),
        ("h100", {"weight": shape(128, 1 << 23)}, "the grid is limited to 65535 blocks of 128 tokens or words"),
    ],
)
def test_refusals(chip, changes, reason):
    call = {"x": shape(8, 128), "weight": shape(128, 256), "labels": shape(8, dtype="int32")}
    call |= dict(zip(STATIC, ALL, strict=True))
    with chips.target(chips.named("h100")):
        assert kernel.unsupported(**call) is None
    with chips.target(chips.named(chip)):
        assert reason in kernel.unsupported(**(call | changes))


def test_tiles_fit_and_chunks_are_bounded():
    for tokens, hidden, vocab in ((8192, 2048, 65536), (1, 64, 64), (1000, 50304, 320), (1 << 20, 64, 1 << 18)):
        operands = dict(x=shape(tokens, hidden), weight=shape(hidden, vocab), labels=shape(tokens, dtype="int32"))
        width = logits.chunk_width(tokens, vocab)
        assert width % 64 == 0 and 2 * tokens * width <= max(logits.CHUNK_BYTES, 4096 * tokens)
        with chips.target(chips.named("h100")):
            for phase in ("forward", "backward"):
                chosen = kernel.tiles(phase, **operands)
                assert kernel.memory(phase, chosen, **operands) <= chips.named("h100").smem_bytes
                assert next(kernel.candidates(phase, **operands)) == chosen


def test_shares_fill_the_processors():
    with chips.target(chips.named("h100")):
        assert logits._share(8192, 256) == 128  # 64 blocks of rows twice, for 132 processors
        assert logits._share(1, 256) == 2  # 128 blocks
        assert logits._share(132 * 128, 256) == 256
