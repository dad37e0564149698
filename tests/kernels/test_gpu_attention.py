"""The Mosaic GPU attention kernels in the interpreter (memory poisoned with NaN, races detected) against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxops.interpreter import gpu as interpreter
from pallas_kernels import chips, random
from pallas_kernels.gpu import attention, attention_scores
from pallas_kernels.gpu.attention import Tiles
from tests.compare import no_worse

SMALL = Tiles(keys=64, keys_dq=64, queries_dkv=64)  # many steps: every slot and barrier phase is used again
TINY = Tiles(keys=32, keys_dq=32, queries_dkv=32)
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")


def case(T, S, *, heads=(2, 1), dim=64, dtype="bfloat16", batch=1, tiles=SMALL, causal=False, window=None, cap=None,
         mask=None, bias=None, bias_dtype="float32", lengths=None, segments=0, sinks=False, shift=0.0, value_dim=None,
         prefix=None, alibi=False, score_mod=None, mask_mod=None, dropout=0.0, chip="h100"):  # fmt: skip
    return locals()


def capped(score, batch, head, query, key):
    return 3 * jnp.tanh(score / 3) + jnp.where(query > key, 0.01 * (head + 1), -0.5) * (batch + 1)


def chunks(batch, head, query, key):
    return (query // 50 == key // 50) | ((head == 1) & (key < 30))


CASES = {
    # sizes, head sizes, types
    "one": case(1, 1, tiles=None, dtype="float16", dim=16),
    "full": case(127, 128, heads=(2, 1), dim=96),
    "causal": case(200, 200, causal=True),
    "causal-more-queries": case(129, 70, causal=True, dim=128, tiles=None, heads=(1, 1), dtype="float16"),
    "wide": case(70, 130, causal=True, dim=256, tiles=None, heads=(1, 1)),
    # features
    "window": case(130, 260, window=(70, 20), heads=(1, 1)),
    "window-causal": case(1000, 129, window=(100, None), causal=True, tiles=None, heads=(1, 1)),
    "lengths": case(130, 129, lengths=((130, 70, 0), (0, 129, 60)), batch=3, heads=(1, 1)),
    "segments": case(70, 129, segments=3, causal=True, batch=2, heads=(1, 1)),
    "cap": case(70, 130, cap=3.0, sinks=True, mask=(1, 2, 1, 130), bias=(1, 1, 70, 1), bias_dtype="bfloat16"),
    "mask": case(70, 140, mask=(1, 2, 70, 140), heads=(2, 2)),
    "bias": case(70, 70, bias=(1, 2, 70, 70), causal=True, batch=2),
    "low-scores": case(70, 70, heads=(1, 1), shift=-400.0),  # exp(0 - lse) overflows where a tile is filled up
    "mask-mod": case(130, 200, mask_mod=chunks, causal=True, heads=(2, 1)),
    "prefix": case(130, 140, prefix=(0, 100), batch=2, causal=True, alibi=True, heads=(2, 2)),
    "score-mod-dropout": case(70, 130, score_mod=capped, dropout=0.3, value_dim=128, bias=(1, 1, 1, 130)),
    "constant-bias": case(70, 330, bias=(1, 2, 1, 1), mask=(1, 1, 1, 1), sinks=True, value_dim=16),
    "all": case(140, 129, bias=(1, 1, 140, 129), mask=(2, 1, 1, 129), lengths=((140, 90), (129, 100)), segments=2,
                sinks=True, cap=4.0, window=(90, 30), batch=2, heads=(1, 1), dim=32),
    # other chips
    "a100": case(130, 140, causal=True, tiles=None, dim=96, chip="a100"),
    "a100-all": case(70, 129, bias=(1, 1, 70, 129), mask=(2, 1, 1, 129), lengths=((70, 60), (129, 100)), segments=2,
                     sinks=True, score_mod=capped, mask_mod=chunks, dropout=0.2, alibi=True, prefix=(0, 20),
                     window=(90, 30), batch=2, heads=(2, 1), value_dim=128, tiles=TINY, chip="a100"),
    "b200": case(300, 260, causal=True, chip="b200", heads=(2, 1)),
    "b200-all": case(140, 129, bias=(1, 1, 140, 129), mask=(2, 1, 1, 129), lengths=((140, 90), (129, 100)), segments=2,
                     sinks=True, score_mod=capped, mask_mod=chunks, dropout=0.2, alibi=True, prefix=(0, 20),
                     window=(90, 30), batch=2, heads=(2, 1), value_dim=128, chip="b200"),
    "b200-wide": case(70, 130, causal=True, dim=256, tiles=None, heads=(1, 1), chip="b200"),
}  # fmt: skip


def build(c):
    """(operands, dout, options)"""
    rng = np.random.default_rng(c["T"] * 1000 + c["S"])
    (N, K), B, T, S, H, dtype = c["heads"], c["batch"], c["T"], c["S"], c["dim"], c["dtype"]
    normal = lambda *shape: rng.standard_normal(shape)
    V = c["value_dim"] or H
    operands = {"query": normal(B, T, N, H), "key": normal(B, S, K, H), "value": normal(B, S, K, V)}
    if c["shift"]:  # one column of query · key is the same for all: it shifts every score
        operands["query"][..., 0], operands["key"][..., 0] = c["shift"], H**0.5
    operands = {name: jnp.asarray(x, dtype) for name, x in operands.items()}
    if c["bias"]:
        operands["bias"] = jnp.asarray(normal(*c["bias"]), c["bias_dtype"])
    if c["mask"]:
        operands["mask"] = jnp.asarray(rng.random(c["mask"]) > 0.3)
        if c["mask"][2] > 1:  # rows that see nothing
            operands["mask"] = operands["mask"].at[:, :, :2].set(False)
    if c["lengths"]:
        operands |= {
            f"{name}_seq_lengths": jnp.asarray(x, jnp.int32)
            for name, x in zip(("query", "key_value"), c["lengths"], strict=True)
        }
    if c["segments"]:
        ids = lambda size: jnp.asarray(np.sort(rng.integers(0, c["segments"], (B, size))), jnp.int32)
        operands |= {"query_segment_ids": ids(T).at[:, -3:].set(-1), "key_value_segment_ids": ids(S)}  # -1 sees nothing
    if c["sinks"]:
        operands["sinks"] = jnp.asarray(normal(N), jnp.float32)
    if c["prefix"]:
        operands["prefix_lengths"] = jnp.asarray(c["prefix"], jnp.int32)
    if c["alibi"]:
        operands["alibi_slopes"] = 0.5 ** jnp.arange(3, 3 + N, dtype=jnp.float32)
    if c["dropout"]:
        operands["dropout_rows"] = random.row_words(jax.random.key_data(jax.random.key(1)), B, N, T)
    options = {
        "scale": H**-0.5,
        "is_causal": c["causal"],
        "local_window_size": c["window"],
        "logits_soft_cap": c["cap"],
        "score_mod": c["score_mod"],
        "mask_mod": c["mask_mod"],
        "dropout_rate": c["dropout"],
    }
    return operands, jnp.asarray(normal(B, T, N, V), dtype), options


def plain(operands, scale, is_causal, local_window_size, logits_soft_cap, score_mod, mask_mod, dropout_rate):
    """(out, lse) by the formula, scores in float32 or more: the XLA form, or for float64 operands the oracle."""
    query, key, value = operands["query"], operands["key"], operands["value"]
    (_, T, N, _), S = query.shape, key.shape[1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    key, value = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (key, value))
    s = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=wide) * scale
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    s = s + operands.get("bias", jnp.zeros((), wide)).astype(wide)
    i, j = jnp.arange(T, dtype=jnp.int32)[:, None], jnp.arange(S, dtype=jnp.int32)[None]
    b, n = (
        jnp.arange(size, dtype=jnp.int32).reshape(shape)
        for size, shape in ((len(query), (-1, 1, 1, 1)), (N, (-1, 1, 1)))
    )
    if "alibi_slopes" in operands:
        s = s - operands["alibi_slopes"].astype(wide)[:, None, None] * jnp.abs(i - j)
    s = s if score_mod is None else score_mod(s, b, n, i, j)
    left, right = local_window_size or (None, None)
    seen = (j <= i) | (not is_causal)
    seen &= (j >= i - (T + S if left is None else left)) & (j <= i + (T + S if right is None else right))
    if "prefix_lengths" in operands:
        seen = seen | (j < operands["prefix_lengths"][:, None, None, None])
    seen = seen & operands.get("mask", True) & (True if mask_mod is None else mask_mod(b, n, i, j))
    if "query_seq_lengths" in operands:
        seen = seen & (i < operands["query_seq_lengths"][:, None, None, None])
        seen = seen & (j < operands["key_value_seq_lengths"][:, None, None, None])
    if "query_segment_ids" in operands:
        seen = seen & (
            operands["query_segment_ids"][:, None, :, None] == operands["key_value_segment_ids"][:, None, None, :]
        )
    seen = jnp.broadcast_to(seen, s.shape)
    sinks = operands["sinks"].astype(wide)[:, None, None] if "sinks" in operands else -jnp.inf
    top = jnp.maximum(jnp.max(jnp.where(seen, s, -jnp.inf), axis=-1, keepdims=True), sinks)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    e = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0.0) - top), 0.0)
    total = e.sum(-1, keepdims=True) + jnp.exp(sinks - top)
    p = e / jnp.where(total > 0, total, 1.0)
    if dropout_rate:
        words = operands["dropout_rows"][..., None]
        p = jnp.where(random.kept(words[:, :, 0], words[:, :, 1], j, dropout_rate), p / (1 - dropout_rate), 0)
    out = jnp.einsum("bnts,bsnh->btnh", p.astype(value.dtype), value, preferred_element_type=wide).astype(query.dtype)
    return out, jnp.where(total > 0, top + jnp.log(total), jnp.inf)[..., 0]


def plain_gradients(operands, dout, options):
    """{"out", "lse", and each gradient by name}"""

    @jax.jit
    def run(primals, others, dout):
        (out, lse), pull = jax.vjp(lambda x: plain(others | x, **options), primals)
        return {"out": out, "lse": lse} | pull((dout, jnp.zeros_like(lse)))[0]

    primals = {name: x for name, x in operands.items() if name in DIFFERENTIABLE}
    return run(primals, {name: x for name, x in operands.items() if name not in DIFFERENTIABLE}, dout)


def oracle(operands, dout, options):
    with jax.enable_x64(True):
        exact = lambda x: jnp.asarray(np.asarray(x, np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jax.tree.map(
            np.asarray, plain_gradients({n: exact(x) for n, x in operands.items()}, exact(dout), options)
        )


def fused(operands, dout, options, tiles):
    outputs, residuals = attention.forward(**operands, **options, tiles=tiles)
    gradients = attention.backward(
        **operands,
        **options,
        tiles=tiles,
        outputs=outputs,
        residuals=residuals,
        cotangents=(dout, jnp.zeros_like(outputs[1])),
    )
    return dict(zip(("out", "lse"), outputs, strict=True)) | gradients


def compare(operands, dout, options, got):
    """Every result is as near to the oracle as twice what the unfused form is."""
    want, unfused = oracle(operands, dout, options), plain_gradients(operands, dout, options)
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert (got[name].shape, got[name].dtype) == (unfused[name].shape, unfused[name].dtype), name
        mine, yardstick = (np.asarray(x[name], np.float64) for x in (got, unfused))
        known = np.isfinite(exact)  # lse is +inf for a row that sees nothing
        np.testing.assert_array_equal(mine[~known], exact[~known], err_msg=name)
        mine, yardstick, exact = mine[known], yardstick[known], exact[known]
        no_worse(name, mine, yardstick, exact, operands["query"].dtype)


IN_EVERY_RUN = ("a100",)


@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    operands, dout, options = build(CASES[name])
    with chips.target(chips.named(CASES[name]["chip"])), interpreter():
        assert attention.unsupported(**operands, **options) is None
        got = jax.block_until_ready(fused(operands, dout, options, CASES[name]["tiles"]))
    compare(operands, dout, options, got)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_vmap():
    """Of a batch of queries over shared keys every member is as alone."""
    operands, dout, options = build(case(70, 70, heads=(1, 1), causal=True))
    two = jnp.stack([operands["query"], 2 * operands["query"]])
    both = lambda query: fused(operands | {"query": query}, dout, options, SMALL)
    with interpreter():
        got = jax.block_until_ready(jax.vmap(both)(two))
    for i in range(2):
        compare(operands | {"query": two[i]}, dout, options, jax.tree.map(lambda x: x[i], got))


FAULTS = {  # what is left out of the forward kernel, and what the interpreter says then
    "h100": ("commit_smem", "RACE DETECTED"),
    "b200": ("commit_tmem", "RACE DETECTED"),
    "a100": ("wait_gmem_to_smem", None),  # nothing: what is read has not arrived, and is NaN
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("chip", FAULTS)
def test_a_planted_fault_is_found(chip, monkeypatch):
    # Several tiles and heads: of one alone, the threads of an interpreted B200 may happen to come in the right order.
    operands, _, options = build(case(70, 300, heads=(2, 2)))
    name, report = FAULTS[chip]
    with chips.target(chips.named(chip)), interpreter():
        monkeypatch.setattr(plgpu, name, lambda *_: None)
        run = lambda: jax.block_until_ready(attention.forward(**operands, **options)[0][0])
        if report is None:
            assert np.isnan(np.asarray(run(), np.float32)).any()
        else:
            with pytest.raises(Exception, match=report):
                run()
        monkeypatch.undo()


def shapes(dim=64, dtype="bfloat16", queries=1000, keys=1000, heads=(4, 2)):
    make = lambda size, heads: jax.ShapeDtypeStruct((2, size, heads, dim), dtype)
    return {"query": make(queries, heads[0]), "key": make(keys, heads[1]), "value": make(keys, heads[1])}


REFUSED = {
    "score-mod": ("h100", shapes(), {"score_mod": lambda x, b, h, i, j: jnp.sin(x)}, "score_mod uses sin"),
    "float32": ("h100", shapes(dtype="float32"), {}, "must share bfloat16 or float16, got float32, float32, float32"),
    "wide": ("h100", shapes(dim=320), {}, "at most 256, got 320"),
    "scale": ("h100", shapes(), {"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    "cap": ("h100", shapes(), {"logits_soft_cap": -1.0}, "logits_soft_cap must be positive, got -1.0"),
    "bias": ("h100", shapes(), {"bias": jax.ShapeDtypeStruct((1, 1, 1, 1000), "float64")}, "float32, got float64"),
    "shared bias": (
        "h100",
        shapes(),
        {"bias": jax.ShapeDtypeStruct((1, 2, 64, 1), "bfloat16"), "score_mod": lambda x, *_: x},
        "a bias that all keys share, (1, 2, 64, 1), beside a score_mod has its gradient in XLA only",
    ),
    "grid": ("h100", shapes(queries=64 * 65536), {}, "limited to 65535 batches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    chip, operands, options, reason = REFUSED[name]
    with chips.target(chips.named(chip)):
        assert reason in attention.unsupported(**operands, **dict({"scale": 0.125, "is_causal": True}, **options))


MODIFIERS = {
    "tanh": lambda s: jnp.tanh(s),
    "power": lambda s: s**5 - 1 / (2 + jnp.abs(s)) ** 3,
    "softplus": lambda s: jax.nn.softplus(3 * s),
    "log1p": lambda s: jnp.log1p(jnp.exp(-(s * s)) * 1e-6) * 1e6,
    "relu": lambda s: jax.nn.relu(s),
    "gelu": lambda s: jax.nn.gelu(s),
    "finite": lambda s: jnp.where(jnp.isfinite(s) & ~(s > 1), s, 1),
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier_in_what_mosaic_compiles_has_its_value_and_derivative(name):
    mod = lambda score, batch, head, query, key: MODIFIERS[name](score)
    assert attention_scores.not_lowered(mod, None) is None
    score = jnp.asarray(np.append(np.random.default_rng(0).standard_normal(997) * 3, [0.0, -0.0, 1e-30]), jnp.float32)
    value, slope = attention_scores._score_and_slope(mod)(score, *[jnp.zeros((), jnp.int32)] * 4)
    with jax.enable_x64(True):
        exact = jax.jvp(MODIFIERS[name], (jnp.float64(score),), (jnp.ones(1000, jnp.float64),))
    plain = jax.jvp(MODIFIERS[name], (score,), (jnp.ones_like(score),))
    for ours, theirs, true in zip((value, slope), plain, exact, strict=True):
        no_worse("modifier", ours, theirs, true, "float32")


def test_a_modifier_that_mosaic_does_not_compile_is_refused():
    assert "sin" in attention_scores.not_lowered(lambda s, *_: jnp.sin(s), None)
    assert "bfloat16" in attention_scores.not_lowered(lambda s, *_: s.astype(jnp.bfloat16).astype(jnp.float32), None)
