"""The TPU decoding kernel in the interpreter (memory poisoned with NaN, races detected) against float64."""

import jax
import jax.numpy as jnp
import pytest

from jaxops import interpreter
from pallas_kernels import chips
from pallas_kernels.tpu import decode_attention
from pallas_kernels.tpu.decode_attention import Tiles
from tests.kernels.decoding import build, case, compare

MIXED = {"counts": [1, 21, 0, 3], "lengths": (100, 21, 9, 70)}  # decoding, a prompt, idle, a piece of a prompt
CASES = {
    "one block": case(keys=40, lengths=(40, 3)),
    "blocks, an empty sequence between": case(keys=200, lengths=(200, 0, 130), tiles=Tiles(64, 1)),
    "tokens, window, cap, sinks": case(
        heads=(6, 2), tokens=3, keys=200, lengths=(200, 130), window=70, cap=3.0, sinks=True, tiles=Tiles(48, 2)
    ),
    "float32, one key head": case(heads=(3, 1), keys=96, lengths=(90, 2), dtype="float32", tiles=Tiles(64, 1)),
    "quantised": case(keys=256, lengths=(200, 131), quantised=True, tiles=Tiles(64, 1)),
    "pages, mixed": case(**MIXED, page=16, left_over=3, sinks=True, tiles=Tiles(32, 8)),
    "parts of pages, window": case(**MIXED, page=48, heads=(4, 4), window=30, tiles=Tiles(32, 4)),
    "head size 64, tokens, window, sinks": case(
        heads=(6, 2), dim=64, tokens=3, keys=256, lengths=(256, 131), window=70, sinks=True, tiles=Tiles(128, 2)
    ),
    "head size 96, float32": case(dim=96, keys=384, lengths=(380, 2), dtype="float32", tiles=Tiles(256, 1)),
    "head size 64, quantised": case(dim=64, keys=256, lengths=(200, 131), quantised=True, tiles=Tiles(128, 1)),
    "head size 80, pages": case(**MIXED | {"lengths": (300, 21, 9, 70)}, page=128, dim=80, tiles=Tiles(256, 8)),
    "quantised pages": case(counts=[1, 1], lengths=(200, 70), page=64, quantised=True, tiles=Tiles(128, 1)),
}


def run(operands, options, tiles, chip="v5e"):
    cores = chips.named(chip).cores
    with chips.target(chips.named(chip)), interpreter.tpu(num_cores_or_threads=cores):
        return jax.block_until_ready(decode_attention.forward(**operands, **options, tiles=tiles)[0])


IN_EVERY_RUN = (
    "blocks, an empty sequence between",
    "quantised",
    "head size 64, tokens, window, sinks",
    "head size 80, pages",
    "pages, mixed",
)


@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    operands, options = build(CASES[name])
    assert decode_attention.unsupported(**operands, **options) is None
    compare(operands, options, run(operands, options, CASES[name]["tiles"]))


def test_two_cores_share_the_tiles():
    operands, options = build(case(keys=64, lengths=(64, 3, 20)))
    compare(operands, options, run(operands, options, Tiles(32, 1), "v5p"))


def test_vmap():
    operands, options = build(case(keys=64, lengths=(64, 3)))
    two = jnp.stack([operands["query"], 2 * operands["query"]])
    forward = jax.vmap(lambda query: decode_attention.forward(**operands | {"query": query}, **options)[0])
    with chips.target(chips.named("v5e")), interpreter.tpu():
        got = jax.block_until_ready(forward(two))
    for i in range(2):
        compare(operands | {"query": two[i]}, options, jax.tree.map(lambda x, i=i: x[i], got))


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_a_forgotten_wait_is_found(monkeypatch, mode):
    """Without the waits for keys and values there is a race where copies are done at once, else NaN."""
    operands, options = build(case(keys=64, lengths=(64, 50)))
    real = decode_attention.pltpu.make_async_copy

    def copy(source, target, semaphore):
        made = real(source, target, semaphore)
        if source.ndim == 2 and target.shape == source.shape and source.shape == (64, 128):
            made.wait = lambda: None
        return made

    monkeypatch.setattr(decode_attention.pltpu, "make_async_copy", copy)
    with chips.target(chips.named("v5e")), interpreter.tpu(dma_execution_mode=mode):
        found = None
        try:
            found = jax.block_until_ready(decode_attention.forward(**operands, **options, tiles=Tiles(32, 1))[0])
        except Exception as error:
            assert "RACE DETECTED" in str(error)
        if found is not None:
            with pytest.raises(AssertionError):
                compare(operands, options, found)


def shapes(heads=(32, 8), dim=128, keys=8192, dtype="bfloat16", cache=None):
    make = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    kv = make((8, keys, heads[1], dim), cache or dtype)
    return {"query": make((8, 1, heads[0], dim), dtype), "key": kv, "value": kv, "lengths": make((8,), "int32")}


REFUSED = {
    "float16": (shapes(dtype="float16"), "query must be bfloat16 or float32, got float16"),
    "head size": (shapes(dim=72), "the head size must be a multiple of 16 for bfloat16, at most 512, got 72"),
    "head size and cache": (
        shapes(dim=64, keys=1000),
        "the cache's length must be a multiple of 128 for a head size of 64, got 1000",
    ),
    "odd cache": (shapes(heads=(4, 1), keys=1001), "must be a multiple of 16 for bfloat16, got 1001 · 1"),
    "odd quantised cache": (shapes(heads=(4, 1), keys=1000, cache="int8"), "must be a multiple of 128 for int8"),
    "heads": (shapes(heads=(512, 8)), "at most 256 query heads, got 512"),
    "table": (
        shapes(keys=16)
        | {
            "query": jax.ShapeDtypeStruct((64, 32, 128), "bfloat16"),
            "lengths": jax.ShapeDtypeStruct((64,), "int32"),
            "page_table": jax.ShapeDtypeStruct((64, 4096), "int32"),
            "query_starts": jax.ShapeDtypeStruct((65,), "int32"),
        },
        "the tables must fit 524288 bytes of scalar memory",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    operands, reason = REFUSED[name]
    with chips.target(chips.named("v5e")):
        assert reason in decode_attention.unsupported(**operands, scale=0.1)
