"""The Mosaic GPU decoding kernel in the interpreter (memory poisoned with NaN, races detected) against float64."""

import jax
import pytest

from jaxops.interpreter import gpu as interpreter
from pallas_kernels import chips
from pallas_kernels.gpu import decode_attention
from pallas_kernels.gpu.decode_attention import Tiles
from tests.kernels.decoding import build, case, compare

CASES = {
    "blocks": case(dim=64, keys=200, lengths=(200, 3), tiles=Tiles(64, 2, 1)),
    "splits, an empty sequence": case(
        heads=(6, 2), tokens=3, keys=200, lengths=(200, 0), dim=64, window=70, cap=3.0, sinks=True,
        tiles=Tiles(64, 2, 2),
    ),
    "wide, float16": case(heads=(2, 1), dim=256, tokens=2, keys=104, lengths=(90,), dtype="float16"),
    "quantised": case(dim=64, keys=136, lengths=(130,), quantised=True, tiles=Tiles(64, 1, 1)),
    "pages, mixed": case(
        counts=[1, 33, 0], lengths=(100, 33, 9), page=16, dim=64, heads=(4, 2), left_over=2, sinks=True,
        tiles=Tiles(64, 2, 2)
    ),
    "odd pages, window": case(counts=[1, 2], lengths=(100, 50), page=24, dim=64, window=40, tiles=Tiles(64, 2, 1)),
    "quantised pages": case(counts=[1, 1], lengths=(100, 70), page=32, dim=64, quantised=True, tiles=Tiles(64, 2, 1)),
    "many heads": case(heads=(71, 1), dim=64, keys=72, lengths=(70,), tiles=Tiles(64, 1, 1)),
}  # fmt: skip


IN_EVERY_RUN = ("splits, an empty sequence", "quantised pages")


@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    operands, options = build(CASES[name])
    assert decode_attention.unsupported(**operands, **options) is None
    with interpreter():
        got = jax.block_until_ready(decode_attention.forward(**operands, **options, tiles=CASES[name]["tiles"])[0])
    compare(operands, options, got)


@pytest.mark.timeout(300)
def test_a_forgotten_wait_is_found(monkeypatch):
    """Without the waits for copies the consumer's reads race with them; or a barrier that is arrived at again before
    any read is seen first, by nobody having waited for it."""
    operands, options = build(CASES["blocks"])
    monkeypatch.setattr(decode_attention.plgpu, "barrier_wait", lambda barrier: None)
    with interpreter(), pytest.raises(Exception, match=r"RACE DETECTED|no threads observed phase"):
        jax.block_until_ready(decode_attention.forward(**operands, **options, tiles=CASES["blocks"]["tiles"])[0])


def shapes(heads=(32, 8), dim=128, keys=8192, dtype="bfloat16", cache=None):
    make = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    kv = make((8, keys, heads[1], dim), cache or dtype)
    return {"query": make((8, 1, heads[0], dim), dtype), "key": kv, "value": kv, "lengths": make((8,), "int32")}


REFUSED = {
    "a100": ("a100", shapes(), "compute capability 9.0 have, not 8.0 (a100)"),
    "float32": ("h100", shapes(dtype="float32"), "query must be bfloat16 or float16, got float32"),
    "head size": ("h100", shapes(dim=96), "the head size must be a multiple of 64, at most 256, got 96"),
    "odd cache": ("h100", shapes(keys=1001), "the cache's length must be a multiple of 8 for bfloat16, got 1001"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    chip, operands, reason = REFUSED[name]
    with chips.target(chips.named(chip)):
        assert reason in decode_attention.unsupported(**operands, scale=0.1)


def test_splits_fill_the_chip():
    """Two blocks for every core where there are few sequences; no split where there are many."""
    few, many = shapes(), shapes()
    for name, x in many.items():
        many[name] = jax.ShapeDtypeStruct((64, *x.shape[1:]), x.dtype)
    with chips.target(chips.named("h100")):
        assert decode_attention.tiles("forward", **few, scale=0.1).splits == 4
        assert decode_attention.tiles("forward", **many, scale=0.1).splits == 1
