"""The TPU attention kernels in the interpreter (memory poisoned with NaN, races detected) against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, random
from pallas_kernels.tpu import attention
from pallas_kernels.tpu.attention import Tiles
from pallas_kernels.tpu.attention_tiles import Problem
from tests.compare import no_worse

SMALL = Tiles(queries=128, keys=128, span=1024, sub=128, strip=128)
SPANS = Tiles(queries=128, keys=128, span=256, sub=128, strip=128)
STRIPS = Tiles(queries=512, keys=256, span=1024, sub=256, strip=128, part=128, lag=1)
BOUNDED = Tiles(queries=256, keys=128, span=512, sub=128, strip=128, part=128, bounded=1)


def case(T, S, *, heads=(2, 1), dim=16, value_dim=None, dtype="bfloat16", batch=1, tiles=None, mask=None, bias=None,
         lengths=None, prefix=False, segments=0, sinks=False, causal=False, window=None, cap=None, alibi=False,
         score=None, mask_mod=None, dropout=0.0, large=2):  # fmt: skip
    return locals()


def quadratic(score, batch, head, query, key):
    return score * (0.5 + batch) + 0.05 * score * score - 0.01 * (query - key) * (head + 1)


def slope_of_quadratic(score, batch, head, query, key):
    return 0.5 + batch + 0.1 * score


def beginning_and_near(batch, head, query, key):
    return (key < 20) | (query - key < 100 + 60 * head)


CASES = {
    # sizes, head sizes, types
    "full-one-query": case(1, 129, heads=(4, 2)),
    "full-one-key": case(127, 1, batch=2),
    "full-float32": case(129, 1000, dtype="float32", dim=80),
    "causal-127": case(127, 127, causal=True, heads=(4, 2), dim=64),
    "float16": case(130, 200, dtype="float16", dim=24, bias=(1, 1, 1, 200), cap=4.0),
    "causal-129": case(129, 129, causal=True, dtype="float32"),
    "causal-1000": case(1000, 1000, causal=True, dim=32, heads=(1, 1)),
    "causal-strips": case(1000, 1000, causal=True, tiles=STRIPS, heads=(1, 1), cap=2.0),
    "causal-more-keys": case(129, 1000, causal=True),
    "causal-fewer-keys": case(300, 128, causal=True, tiles=SMALL),
    # features
    "window": case(400, 300, window=(40, 17), tiles=SMALL, heads=(1, 1)),
    "window-left-sinks": case(260, 260, causal=True, window=(130, None), sinks=True, tiles=SMALL),
    "cap-mask-queries": case(130, 140, cap=3.0, mask=(1, 2, 130, 1), dtype="float32"),
    "bias-mask": case(130, 260, bias=(1, 2, 130, 260), mask=(2, 1, 130, 260), batch=2, dtype="float32", tiles=SMALL),
    "bias-mask-keys": case(260, 260, bias=(1, 2, 1, 260), mask=(2, 1, 1, 260), batch=2, causal=True, tiles=SMALL),
    "bias-queries-sinks": case(260, 390, bias=(1, 2, 260, 1), causal=True, sinks=True, lengths=True, batch=2,
                               tiles=SMALL),
    "bias-queries": case(129, 260, bias=(1, 1, 1, 1), tiles=SMALL),
    "bias-keys-spans": case(300, 300, tiles=SPANS, causal=True, bias=(1, 4, 1, 300), heads=(4, 2), dropout=0.1),
    "all": case(260, 390, heads=(8, 2), causal=True, window=(200, 3), bias=(1, 1, 260, 390), mask=(2, 1, 1, 390),
                lengths=True, segments=2, sinks=True, cap=4.0, batch=2, tiles=SMALL),
    "prefix": case(300, 260, prefix=True, causal=True, window=(60, None), batch=2, heads=(1, 1), tiles=SMALL),
    "alibi": case(260, 300, alibi=True, cap=5.0, heads=(2, 2), tiles=SMALL),
    "score-mod-bias": case(130, 140, score=(quadratic, slope_of_quadratic), cap=3.0, bias=(1, 1, 130, 140), batch=2,
                           heads=(2, 2), causal=True),
    "mask-mod": case(390, 390, mask_mod=beginning_and_near, causal=True, heads=(2, 2), tiles=SMALL),
    "value-size-dropout": case(129, 200, dim=24, value_dim=40, dropout=0.1, batch=2, causal=True, dtype="float32"),
    "value-size-spans": case(130, 300, dim=40, value_dim=8, tiles=SPANS, segments=2),
    # the square on the diagonal under a schedule: only causal, cut, or unseen
    "strips-segments": case(500, 500, segments=3, causal=True, tiles=STRIPS, heads=(1, 1)),
    "strips-lengths": case(390, 390, lengths=True, batch=3, causal=True, heads=(1, 1), tiles=BOUNDED),
    "strips-window": case(390, 390, causal=True, window=(255, None), tiles=BOUNDED, heads=(1, 1)),
    # without a running maximum, and where that would not do
    "bounded": case(390, 390, causal=True, tiles=BOUNDED, sinks=True),
    "unbounded": case(390, 390, causal=True, tiles=BOUNDED, large=60),
    "unbounded-segments": case(300, 300, causal=True, tiles=BOUNDED, large=60, segments=2, heads=(1, 1)),
    # the keys cut into spans
    "spans": case(130, 600, tiles=SPANS, sinks=True, lengths=True, batch=2),
    "spans-causal": case(300, 300, tiles=SPANS, causal=True, bias=(1, 1, 300, 300), heads=(1, 1)),
}  # fmt: skip
GRADS = ("query", "key", "value", "bias", "sinks")


def build(c):
    r = np.random.default_rng(0)
    (N, K), B, T, S, H, dtype = c["heads"], c["batch"], c["T"], c["S"], c["dim"], c["dtype"]
    V = c["value_dim"] or H
    normal = lambda *shape: jnp.asarray(r.standard_normal(shape), dtype)
    x = {"query": c["large"] * normal(B, T, N, H), "key": normal(B, S, K, H), "value": normal(B, S, K, V)}
    dout = normal(B, T, N, V)
    if c["bias"]:
        x["bias"] = normal(*c["bias"])
    if c["mask"]:
        x["mask"] = jnp.asarray(r.random(c["mask"]) > 0.3)
    if c["lengths"]:
        x["query_seq_lengths"] = jnp.asarray(r.permutation([T, T // 2 + 1, 1])[:B], jnp.int32)
        x["key_value_seq_lengths"] = jnp.asarray(r.permutation([0, S // 2 + 1, S - 3])[:B], jnp.int32)
    if c["segments"]:
        x["query_segment_ids"] = jnp.asarray(np.sort(r.integers(0, c["segments"], (B, T))), jnp.int32)
        x["key_value_segment_ids"] = jnp.asarray(np.sort(r.integers(0, c["segments"], (B, S))), jnp.int32)
    if c["sinks"]:
        x["sinks"] = normal(N)
    if c["prefix"]:
        x["prefix_lengths"] = jnp.asarray([S - 60, 30, 0][:B], jnp.int32)
    if c["alibi"]:
        x["alibi_slopes"] = jnp.asarray(0.5 ** np.arange(1, N + 1), jnp.float32)
    if c["dropout"]:
        x["dropout_rows"] = random.row_words(jnp.asarray([1, 2], jnp.uint32), B, N, T)
    options = {
        "scale": H**-0.5,
        "is_causal": c["causal"],
        "local_window_size": c["window"],
        "logits_soft_cap": c["cap"],
        "score_mod": c["score"] and c["score"][0],
        "mask_mod": c["mask_mod"],
        "dropout_rate": c["dropout"],
    }
    return x, dout, options


def positions(c):
    """batch, head, query and key, that broadcast to [B, N, T, S]."""
    return np.ogrid[: c["batch"], : c["heads"][0], : c["T"], : c["S"]]


def weights_of_dropout(x, c):
    """What multiplies the weights, [B, N, T, S] or 1."""
    if not c["dropout"]:
        return 1.0
    words = x["dropout_rows"][..., None]
    kept = random.kept(words[:, :, 0], words[:, :, 1], jnp.arange(c["S"]), c["dropout"])
    return np.asarray(kept) / (1 - c["dropout"])


def seen(x, c):
    """Which key each query may attend to, [B, N, T, S]."""
    (N, _), B, T, S = c["heads"], c["batch"], c["T"], c["S"]
    i, j = np.arange(T)[:, None], np.arange(S)
    keep = np.ones((B, N, T, S), bool)
    left, right = c["window"] or (None, None)
    for bound in (
        ([j <= i] if c["causal"] else [])
        + ([] if left is None else [j >= i - left])
        + ([] if right is None else [j <= i + right])
    ):
        keep &= bound
    if c["prefix"]:
        keep |= j < np.asarray(x["prefix_lengths"])[:, None, None, None]
    if c["mask_mod"]:
        keep &= c["mask_mod"](*positions(c))
    if c["mask"]:
        keep &= np.asarray(x["mask"])
    if c["lengths"]:
        keep &= (i < np.asarray(x["query_seq_lengths"])[:, None, None, None]) & (
            j < np.asarray(x["key_value_seq_lengths"])[:, None, None, None]
        )
    if c["segments"]:
        keep &= (np.asarray(x["query_segment_ids"])[:, :, None] == np.asarray(x["key_value_segment_ids"])[:, None])[
            :, None
        ]
    return keep


def oracle(x, dout, options, c):
    """out, lse and all gradients in float64."""
    q, k, v, do = (np.asarray(a, np.float64) for a in (x["query"], x["key"], x["value"], dout))
    (N, K), (B, *_), cap = c["heads"], q.shape, c["cap"]
    keep, kk, vv = seen(x, c), np.repeat(k, N // K, 2), np.repeat(v, N // K, 2)
    s = np.einsum("btnh,bsnh->bnts", q, kk) * options["scale"]
    tanh = np.tanh(s / cap) if cap else np.zeros_like(s)
    s = cap * tanh if cap else s
    s = s + (np.asarray(x["bias"], np.float64) if c["bias"] else 0)
    _, _, i, j = places = positions(c)
    if c["alibi"]:
        s = s - np.asarray(x["alibi_slopes"], np.float64)[:, None, None] * np.abs(i - j)
    slope = 1.0
    if c["score"]:
        s, slope = c["score"][0](s, *places), c["score"][1](s, *places)
    s = np.where(keep, s, -np.inf)
    sink = np.asarray(x["sinks"], np.float64)[None, :, None, None] if c["sinks"] else np.full((1, 1, 1, 1), -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.logaddexp(np.logaddexp.reduce(s, -1, keepdims=True), sink)
        p = np.where(keep, np.exp(s - lse), 0)
    lse = np.where(np.isneginf(lse), np.inf, lse)
    dropped = weights_of_dropout(x, c)
    out = np.einsum("bnts,bsnh->btnh", p * dropped, vv)
    delta = np.einsum("btnh,btnh->bnt", do, out)[..., None]
    ds = p * (np.einsum("btnh,bsnh->bnts", do, vv) * dropped - delta) * slope
    grads = {}
    if c["bias"]:
        grads["bias"] = ds.sum(tuple(a for a in range(4) if c["bias"][a] == 1), keepdims=True)
    if c["sinks"]:
        grads["sinks"] = -(np.exp(sink - lse) * delta).sum((0, 2, 3))
    ds = ds * (1 - tanh**2) * options["scale"]
    group = lambda a: a.reshape(B, -1, K, N // K, a.shape[3]).sum(3)
    grads["query"] = np.einsum("bnts,bsnh->btnh", ds, kk)
    grads["key"] = group(np.einsum("bnts,btnh->bsnh", ds, q))
    grads["value"] = group(np.einsum("bnts,btnh->bsnh", p * dropped, do))
    return out, lse[..., 0], grads


def unfused(x, dout, options, c):
    """(out, lse) and gradients of the plain composition in the operands' own dtype."""
    keep, dropped, (N, K) = seen(x, c), weights_of_dropout(x, c), c["heads"]
    some = jnp.asarray(keep.any(-1, keepdims=True) if not c["sinks"] else True)

    def plain(t):
        k, v = (jnp.repeat(t[n], N // K, 2) for n in ("key", "value"))
        s = jnp.einsum("btnh,bsnh->bnts", t["query"], k, preferred_element_type=jnp.float32) * options["scale"]
        s = c["cap"] * jnp.tanh(s / c["cap"]) if c["cap"] else s
        s = s + t["bias"] if c["bias"] else s
        _, _, i, j = places = positions(c)
        s = s - x["alibi_slopes"][:, None, None] * np.abs(i - j) if c["alibi"] else s
        s = c["score"][0](s, *places).astype(s.dtype) if c["score"] else s
        s = jnp.where(keep, s, -1e30)
        if c["sinks"]:
            s = jnp.concatenate(
                [s, jnp.broadcast_to(t["sinks"][None, :, None, None].astype(s.dtype), (*s.shape[:3], 1))], -1
            )
        p = jnp.where(some, jax.nn.softmax(s, -1), 0)[..., : c["S"]]
        p = (p * dropped).astype(v.dtype)
        return jnp.einsum("bnts,bsnh->btnh", p, v), jax.nn.logsumexp(s, -1)

    def both(t, dout):
        out, pull, lse = jax.vjp(plain, t, has_aux=True)
        return (out, lse), pull(dout)[0]

    return jax.jit(both)({n: x[n] for n in GRADS if n in x}, dout)


def run(x, dout, options, tiles):
    """((out, lse), gradients) of the kernels in the interpreter, which must find no race."""

    def both(x, dout):
        outputs, residuals = attention.forward(**x, **options, tiles=tiles)
        gradients = attention.backward(
            **x, **options, outputs=outputs, residuals=residuals, cotangents=(dout, None), tiles=tiles
        )
        return outputs, gradients

    mapped = jax.vmap(both) if dout.ndim == 5 else both
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        return jax.block_until_ready(jax.jit(mapped)(x, dout))


IN_EVERY_RUN = ("causal-fewer-keys", "mask-mod", "strips-window", "bounded", "spans")


@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_against_float64(name):
    c = CASES[name]
    x, dout, options = build(c)
    assert attention.unsupported(**x, **options) is None
    (out, lse), grads = run(x, dout, options, c["tiles"])
    want, want_lse, want_grads = oracle(x, dout, options, c)
    (plain, plain_lse), plain_grads = unfused(x, dout, options, c)
    assert out.dtype == x["query"].dtype and lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.isposinf(lse), np.isposinf(want_lse))
    finite = np.isfinite(want_lse)
    if finite.any():
        no_worse("lse", lse[finite], plain_lse[finite], want_lse[finite], "float32")
    no_worse("out", out, plain, want, c["dtype"])
    assert set(grads) == {n for n in GRADS if n in x}
    for n, grad in grads.items():
        assert grad.shape == x[n].shape and grad.dtype == x[n].dtype
        no_worse(n, grad, plain_grads[n], want_grads[n], c["dtype"])


@pytest.mark.slow
def test_vmap_is_a_batch(monkeypatch):
    # The interpreter counts the vmapped axis as one more grid dimension than it was told semantics for: tell it none.
    params = pltpu.CompilerParams
    monkeypatch.setattr(pltpu, "CompilerParams", lambda dimension_semantics, **others: params(**others))
    c = case(130, 200, lengths=True, segments=2, mask=(2, 1, 1, 200), sinks=False, batch=2, tiles=SMALL)
    x, dout, options = build(c)
    whole = run(x, dout, options, c["tiles"])
    split = run({n: a[:, None] for n, a in x.items()}, dout[:, None], options, c["tiles"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).reshape(a.shape)), whole, split)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("length", [1, 300, 1100, 4096, 100_000])
def test_default_tiles_divide(chip, length):
    for dtype, dim, causal in (("bfloat16", 64, True), ("bfloat16", 128, False), ("float32", 256, True)):
        q = jax.ShapeDtypeStruct((1, length, 2, dim), dtype)
        problem = Problem.of(query=q, key=q, value=q, scale=1.0, is_causal=causal)
        with chips.target(chips.named(chip)):
            assert attention.unsupported(query=q, key=q, value=q, scale=1.0, is_causal=causal) is None
            for backward in (False, True):
                t = Tiles.default(problem, backward=backward)
                assert t.queries % t.sub == t.queries % t.strip == t.span % t.keys == t.keys % 128 == 0
                assert not problem.diagonal or t.queries % t.keys == 0
                if problem.diagonal and t.span >= length:
                    assert t.span % t.queries == 0


def test_a_missing_guard_is_noticed(monkeypatch):
    """The cases called unbounded need the running maximum: their logits overflow without it."""
    monkeypatch.setattr(attention, "BOUND", math.inf)
    x, dout, options = build(CASES["unbounded"])
    (out, _), _ = run(x, dout, options, BOUNDED)
    assert not np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize(
    "reason, change",
    {
        "one dtype": {"key": ((1, 8, 2, 16), "float32")},
        "head sizes up to": dict.fromkeys(("query", "key", "value"), ((1, 8, 2, 512), "bfloat16")),
        "scale must be positive": {"scale": -1.0},
        "come together": {"query_segment_ids": ((1, 8), "int32")},
        "must come together": {"dropout_rate": 0.5},
        "score_mod uses cumsum": {"score_mod": lambda s, b, n, i, j: jnp.cumsum(s, 0)},
        "score_mod computes in bfloat16": {"score_mod": lambda s, b, n, i, j: s + s.astype(jnp.bfloat16)},
        "beside a score_mod": {"score_mod": lambda s, *_: s, "bias": ((1, 1, 8, 1), "float32")},
        "mask_mod captures an array": {"mask_mod": lambda b, n, i, j: jnp.asarray(np.arange(8))[j] > 3},
    }.items(),
)
def test_refuses_with_a_reason(reason, change):
    arguments = dict.fromkeys(("query", "key", "value"), ((1, 8, 2, 16), "bfloat16")) | {"scale": 1.0} | change
    arguments = {n: jax.ShapeDtypeStruct(*a) if isinstance(a, tuple) else a for n, a in arguments.items()}
    assert reason in attention.unsupported(**arguments)
