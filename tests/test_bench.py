"""`jaxops bench`: costs, turns, what is timed and what is not, modelled figures, plots and the page."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxops
from jaxops import cost
from jaxops.cost import Cost, Peak
from jaxops.workbench import bench, compiler, measurement, peers, report, timing
from jaxops.workbench.call import operators
from jaxops.workbench.command import main
from jaxops.workbench.measurement import Benchmark, Question, Row
from pallas_kernels.chips import CHIPS
from pallas_kernels.masks import Band


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def with_gradients(function):
    def both(chosen, cotangent):
        output, pull_back = jax.vjp(lambda chosen: function(**chosen), chosen)
        return output, pull_back(cotangent)

    return both


# ---- cost -----------------------------------------------------------------------------------------------------------


def test_the_pairs_of_a_band_are_those_it_allows():
    sides = (None, 0, 1, 5, 20)
    for left in sides:
        for right in sides:
            band = Band(left, right)
            for queries, keys in ((0, 3), (3, 0), (1, 1), (7, 12), (12, 7), (12, 12)):
                allowed = band.allowed(np.arange(queries)[:, None], np.arange(keys))
                count = int(np.sum(np.broadcast_to(allowed, (queries, keys))))
                assert band.pairs(queries, keys) == count, (band, queries, keys)


def test_the_cost_of_attention_is_that_of_the_pairs_it_sees_and_five_products_backward():
    query = shape(4, 4096, 8, 128)

    def attend(query, key, value):
        return jaxops.dot_product_attention(query, key, value, is_causal=True)

    forward = cost.of(attend, query, query, query)
    both = cost.of(with_gradients(attend), dict(query=query, key=query, value=query), query)
    assert forward.flops == 4 * 4 * 8 * 128 * (4096 * 4097 // 2) and forward.exact
    assert both.flops == 3.5 * forward.flops
    mapped = cost.of(jax.vmap(attend), *[shape(3, *query.shape)] * 3)
    assert mapped.flops == 3 * forward.flops


def test_the_cost_of_a_norm_is_what_it_moves():
    x, scale = shape(8192, 4096), shape(4096)
    megabyte = lambda cost: round(cost.bytes / 1e6)
    assert cost.of(jaxops.rms_norm, x, scale).flops == 0
    assert megabyte(cost.of(jaxops.rms_norm, x, scale)) == 134
    # Forward: x and y. Backward: x, dy and dx; the saved y is not read.
    assert megabyte(cost.of(with_gradients(jaxops.rms_norm), dict(x=x, scale=scale), x)) == 134 + 201 + 1
    both = cost.of(with_gradients(jaxops.add_rms_norm), dict(x=x, residual=x, scale=scale), (x, x))
    assert megabyte(both) == 268 + 268 + 1  # one gradient for x and for the residual


def test_the_cost_of_cross_entropy_does_not_count_what_is_computed_again():
    x, weight, labels = shape(64, 32), shape(32, 1000), shape(64, dtype="int32")
    product = 2 * 64 * 32 * 1000
    assert cost.of(jaxops.linear_cross_entropy, x, weight, labels).flops == product
    assert cost.of(jax.grad(jaxops.linear_cross_entropy, (0, 1)), x, weight, labels).flops == 3 * product


@pytest.mark.parametrize(
    ("function", "shapes", "flops", "exact"),
    [
        (lambda a, b: a @ b, [(4, 8), (8, 16)], 2 * 4 * 8 * 16, True),
        (lambda a, b: (a @ b, a * 2)[1], [(4, 8), (8, 16)], 0, True),  # nobody needs the product
        (lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=5)[0], [(8, 8)], 5 * 2 * 8**3, True),
        (lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ a, a), [(8, 8)], 2 * 8**3, False),
        (lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a @ a, a), [(8, 8)], 4 * 8**3, True),
        (lambda a, k: jax.lax.conv(a, k, (1,), "VALID"), [(2, 4, 10), (6, 4, 3)], 2 * (2 * 6 * 8) * (4 * 3), True),
        (lambda a, b: jax.lax.ragged_dot(a, b, jnp.array([3, 5])), [(8, 4), (2, 4, 6)], 2 * 8 * 4 * 6, True),
        (jax.checkpoint(lambda a: jnp.sin(a @ a)), [(8, 8)], 2 * 8**3, True),
    ],
    ids=["product", "unused", "scan", "while", "cond", "convolution", "ragged", "checkpoint"],
)
def test_the_flops_of_a_program(function, shapes, flops, exact):
    found = cost.of(function, *(shape(*sizes, dtype="float32") for sizes in shapes))
    assert (found.flops, found.exact) == (flops, exact)


def test_the_roofline():
    chip = CHIPS["v5e"]
    assert cost.bound(Cost(197 * 10**12, 8), chip, "bfloat16") == (1.0, "compute")
    assert cost.bound(Cost(8, 819 * 10**9), chip, "bfloat16") == (1.0, "memory")
    assert cost.published(chip, "int8").flops == 2 * chip.flops and cost.published(CHIPS["v4"], "int8").flops == 275e12
    assert cost.published(CHIPS["h100"], "float32").flops == CHIPS["h100"].flops / 2
    assert cost.bound(Cost(0, 819 * 10**9), chip, "float64") == (1.0, "memory")
    with pytest.raises(ValueError, match="no peak is known"):
        cost.bound(Cost(1, 1), chip, "float64")


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_variants_take_turns_each_after_itself_in_a_rotating_order():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    spreads = timing.take_turns(variants, 3)
    assert "".join(calls) == "aabbccbbccaaccaabb"
    assert all(len(spread.seconds) == 3 for spread in spreads.values())
    with pytest.raises(ValueError, match="at least one"):
        timing.take_turns(variants, 0)


def test_a_spread():
    spread = timing.Spread((4.0, 1.0, 2.0, 3.0, 10.0))
    assert (spread.median, spread.minimum, spread.maximum, spread.quartiles) == (3, 1, 10, (2, 4))


def test_variants_that_disagree_are_not_timed():
    x = jnp.ones((4, 4))
    with pytest.raises(AssertionError, match="other differs from plain in output 0"):
        timing.compare({"other": lambda x: x * 1.01, "plain": lambda x: x}, (x,), rounds=1)
    rows = timing.compare({"same": lambda x: x + 0, "plain": lambda x: x}, (x,), rounds=2)
    assert [row.name for row in rows] == ["same", "plain"] and rows[1].ratio == 1


# ---- measured -------------------------------------------------------------------------------------------------------

NORM = ["bench", "rms_norm", "x=24x32", "scale=32", "--rounds", "2"]


@pytest.fixture(autouse=True)
def no_peak_is_measured(monkeypatch):
    """A peak of nothing but two additions: what it is does not matter here."""
    monkeypatch.setattr(timing, "_SIDE", 8)
    monkeypatch.setattr(timing, "_LENGTH", 64)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A user's module with an operator that is right, and some that are not."""
    (tmp_path / "their_operators.py").write_text(
        "import jax.numpy as jnp\n"
        "from jaxops.autodiff import Operator, Rules\n"
        "def _reference(x): return (jnp.sin(x),)\n"
        "def _backward(x, *, outputs, residuals, cotangents): return {'x': jnp.cos(x) * cotangents[0]}\n"
        "def _operator(factor):\n"
        "    rules = Rules(lambda x: ((factor * jnp.sin(x),), ()), _backward)\n"
        "    return Operator('sine', ('x',), _reference, rules, 'none', 'none')\n"
        "_RIGHT, _WRONG = _operator(1), _operator(1.001)\n"
        "def right(x): return _RIGHT({'x': x})[0]\n"
        "def wrong(x): return _WRONG({'x': x})[0]\n"
        "def raises(x): raise RuntimeError('no such kernel')\n"
        "def shorter(x): return jnp.sin(x[1:])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_operators"
    sys.modules.pop("their_operators", None)


def test_bench_as_json(capsys):
    assert main([*NORM, "--against", "jax,flax,optax", "--grad", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scale"] is None and found["versions"]["jax"] == jax.__version__
    (one,) = found["runs"]
    assert one["modelled"] is False and one["dtype"] == "float32" and one["gradients"] is True
    assert one["cost"]["flops"] == 0 and one["bound"]["by"] == "memory" and "measured" in one["peak"]["source"]
    rows = {row["variant"]: row for row in one["rows"]}
    assert list(rows) == ["jaxops", "jax", "flax", "optax"]
    for name in ("jaxops", "jax", "flax"):
        row = rows[name]
        assert row["status"] == "timed" and row["rounds"] == 2 and row["error"] < 1e-6
        assert 0 < row["minimum"] <= row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1] <= row["maximum"]
        assert row["gbytes"] == pytest.approx(one["cost"]["bytes"] / row["seconds"] / 1e9)
        assert row["percent"] == pytest.approx(100 * one["bound"]["seconds"] / row["seconds"])
    assert rows["jaxops"]["times_first"] == 1
    assert rows["optax"]["status"] == "absent" and "optax has no rms_norm" in rows["optax"]["reason"]


def test_bench_as_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main([*NORM, "--against", "jax"]) == 0
    out = capsys.readouterr().out
    for words in ("rms_norm x=24x32 scale=32, float32, forward", "median ms", "1.00×", "Peak: ", "bound by memory"):
        assert words in out


def test_a_wrong_result_is_not_timed(capsys, theirs):
    assert main(["bench", f"{theirs}:wrong", "x=8x16", "--rounds", "1", "--against", f"{theirs}:right", "--json"]) == 1
    wrong, right = json.loads(capsys.readouterr().out)["runs"][0]["rows"]
    assert wrong["status"] == "wrong" and wrong["seconds"] is None and "output: error 1.00e-03" in wrong["reason"]
    assert right["status"] == "timed" and right["times_first"] == 1


def test_what_fails_or_gives_something_else_is_a_row(capsys, theirs):
    against = f"{theirs}:raises,{theirs}:shorter,{theirs}:wrong"
    assert main(["bench", f"{theirs}:right", "x=8x16", "--rounds", "1", "--against", against]) == 1
    out = capsys.readouterr().out
    assert "their_operators:raises: failed: RuntimeError: no such kernel" in out
    assert "their_operators:shorter: wrong: output: error inf" in out
    assert "their_operators:wrong: wrong" in out  # beyond what a peer may differ by


def test_every_operator_has_a_usual_call_and_a_peer_in_jax():
    assert set(measurement.USUAL) == set(operators()) == set(peers.PEERS["jax"])


@pytest.mark.slow
def test_the_peers_answer_every_usual_call():
    sizes = dict(R=6, D=16, B=2, T=8, N=4, H=4, M=6, K=8, P=1, V=40, G=3, S=3, C=32)
    for name, usual in measurement.USUAL.items():
        words = tuple(measurement.with_sizes(word, sizes) for word in usual.operands)
        question = Question(name, words, usual.options, "float32", False)
        function, shapes = question.call()
        operands = measurement.random_operands(shapes)
        want = jax.tree.leaves(function(**operands))
        for library in ("jax", "flax", "optax"):
            peer = measurement._counterpart(library, question, shapes)
            if not isinstance(peer, str):
                for got, expected in zip(jax.tree.leaves(peer(**operands)), want, strict=True):
                    np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=f"{library} {name}")


def test_an_option_a_peer_does_not_have_is_said():
    query = shape(1, 8, 2, 4)
    operands = dict(query=query, key=query, value=query)
    assert peers.find("jax", "dot_product_attention", operands) is peers.jax_dot_product_attention
    assert "logits_soft_cap" in peers.find("jax", "dot_product_attention", {**operands, "logits_soft_cap": 3.0})
    assert peers.find("optax", "rope", {}) == "optax has no rope"


def test_the_numbers_of_operands_that_have_a_meaning():
    shapes = {
        "query": shape(3, 10, 2, 4),
        "key": shape(3, 12, 2, 4),
        "weight": shape(8, 50),
        "labels": shape(200, dtype="int32"),
        "positions": shape(2, 7, dtype="int32"),
        "query_seq_lengths": shape(3, dtype="int32"),
        "key_value_seq_lengths": shape(3, dtype="int32"),
        "query_segment_ids": shape(3, 10, dtype="int32"),
        "mask": shape(3, 1, 10, 12, dtype="bool"),
    }
    found = measurement.random_operands(shapes)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (s.shape, s.dtype) for name, s in shapes.items()
    }
    assert found["labels"].min() >= 0 and 40 < found["labels"].max() < 50
    assert (found["positions"] == np.arange(7)).all()
    assert found["query_seq_lengths"].max() <= 10 and found["key_value_seq_lengths"].min() >= 6
    assert (np.diff(found["query_segment_ids"], axis=-1) >= 0).all()
    assert found["mask"].any(-1).all() and not found["mask"].all()
    assert np.std(found["weight"].astype(np.float32)) == pytest.approx(8**-0.5, rel=0.2)


# ---- modelled -------------------------------------------------------------------------------------------------------


def fake_compilers(monkeypatch, results):
    """`compile_jobs` that answers with `results` in turn and keeps the jobs."""
    jobs = []

    def compile_jobs(asked, **settings):
        jobs.extend(asked)
        return [results[i % len(results)] for i in range(len(asked))]

    monkeypatch.setattr(compiler, "compile_jobs", compile_jobs)
    return jobs


def compiled(seconds):
    return {"status": "compiled", "temp_bytes": 1000, "schedule": {"kernels": [], "seconds": seconds}}


def test_modelled_figures_say_so(capsys, monkeypatch):
    jobs = fake_compilers(monkeypatch, [compiled(2e-4), compiled(4e-4), compiled(8e-4)])
    asked = ["bench", "rms_norm", "--target", "v5e", "--grad"]
    assert main([*asked, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["runs"]
    assert one["modelled"] is True and one["where"] == "v5e" and one["peak"]["source"] == "v5e, published"
    assert [(row["variant"], row["status"], row["times_first"]) for row in one["rows"]] == [
        ("jaxops", "modelled", 1),
        ("jaxops, XLA", "modelled", 2),
        ("jax", "modelled", 4),
    ]
    assert one["rows"][0]["rounds"] is None and one["rows"][0]["error"] is None
    # Forward 134 MB, backward 201 MB, at 819 GB/s.
    assert one["rows"][0]["percent"] == pytest.approx(100 * (335.6e6 / 819e9) / 2e-4, rel=1e-3)
    assert [(job.function, job.implementation) for job in jobs] == [
        ("rms_norm", None),
        ("rms_norm", "xla"),
        ("jaxops.workbench.peers:jax_rms_norm", None),
    ]
    assert all(job.schedule and job.gradients and job.dtype == "bfloat16" for job in jobs)
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "v5e, modelled" in out and "MODELLED, not measured." in out and "median" not in out


def test_what_has_no_modelled_time(capsys, monkeypatch):
    kernel = dict(name="k", registers=63, spill_store_bytes=0, smem_bytes=9, occupancy=0.25)
    on_gpu = {**compiled(None), "schedule": {"kernels": [kernel], "seconds": None}}
    refused = {"status": "failed", "reason": "it exceeds VMEM"}
    unread = {**compiled(None), "schedule": {"error": "an empty dump"}}
    fake_compilers(monkeypatch, [on_gpu, refused, unread])
    assert main(["bench", "rms_norm", "--target", "h100"]) == 1
    out = capsys.readouterr().out
    assert "jaxops: absent: compiled; a GPU program has no modelled time. k: 63 registers" in out
    assert "jaxops, XLA: failed: it exceeds VMEM" in out
    assert "jax: absent: compiled, but its schedule cannot be read: an empty dump" in out


# ---- plots and the page ---------------------------------------------------------------------------------------------


def a_benchmark(rows=64, *, flops=0, modelled=False, where="a <device>"):
    spread = timing.Spread((rows * 1e-6,) if modelled else (rows * 1e-6, rows * 2e-6))
    status = "modelled" if modelled else "timed"
    return Benchmark(
        Question("rms_norm", (f"x={rows}x32", "scale=32"), (), "float32", True),
        where,
        modelled,
        Cost(flops, rows * 256),
        Peak(1e12, 1e10, "a source"),
        (
            Row("jaxops", status, spread=spread, temp_bytes=10, error=1e-7),
            Row("jax", status, spread=spread, temp_bytes=20, error=1e-7),
            Row("flax", "wrong", "output: error 1 & more"),
        ),
    )


def test_the_page_stands_alone(tmp_path):
    ones = [a_benchmark(rows) for rows in (64, 128)]
    page = report.write(tmp_path / "out", ones, {"jax": "0.12"}, "R", (64, 128))
    text = page.read_text()
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "roofline.png", "scaling.png"]
    for path in page.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert text.count("data:image/png;base64,") == 4  # two plots, for light and dark
    outside = re.findall(r"""(?:src|href|srcset)="(?!data:)|https?://|@import|url\(""", text)
    assert not outside
    assert "a &lt;device&gt;" in text and "output: error 1 &amp; more" in text and "measured" in text
    assert "x=64x32" in text and "x=128x32" in text and "prefers-color-scheme: dark" in text


def test_the_page_of_a_model_says_so(tmp_path):
    ones = [a_benchmark(where=chip, flops=10**6, modelled=True) for chip in ("v5e", "v6e")]
    text = report.write(tmp_path, ones, {}).read_text()
    assert "No hardware measured them" in text and measurement.BLIND.replace("'", "&#x27;") in text
    assert not (tmp_path / "scaling.png").exists()


def test_the_plots_say_what_they_show():
    ones = [a_benchmark(rows, flops=rows * 10**4) for rows in (64, 128, 256)]
    axes = report.roofline(ones).axes[0]
    assert "roofline (measured)" in axes.get_title("left") and axes.get_ylabel() == "TFLOP/s, measured"
    assert len(axes.lines) == 1 + 3 * 2  # the roof and every variant's points
    assert "1 TFLOP/s" in [text.get_text() for text in axes.texts]
    bars = report.roofline([dataclasses.replace(one, cost=Cost(0, one.cost.bytes)) for one in ones]).axes[0]
    assert len(bars.patches) == 6 and "GB/s" in bars.get_xlabel()
    grown = report.scaling(ones, "R", (64, 128, 256)).axes[0]
    assert [list(line.get_xdata()) for line in grown.lines] == [[64, 128, 256]] * 2
    assert list(grown.lines[0].get_ydata()) == pytest.approx([0.096, 0.192, 0.384])


def test_scale_gives_a_run_for_every_size(capsys, tmp_path):
    asked = ["bench", "rms_norm", "x=Rx32", "scale=32", "--scale", "R=16,8", "--rounds", "1", "--against", "jax"]
    assert main([*asked, "--report", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scale"] == {"name": "R", "sizes": [8, 16]}
    assert [one["operands"][0] for one in found["runs"]] == ["x=8x32", "x=16x32"]
    assert found["runs"][0]["peak"] == found["runs"][1]["peak"]
    assert (tmp_path / "out" / "scaling.png").exists()


# ---- bad questions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rms_nrom"], ["the operator", "did you mean rms_norm?"]),
        (["jaxops:rms_norm"], ["needs operands"]),
        (["rms_norm", "x=4x4", "scale=5"], ["scale", "(5,)"]),
        (["rms_norm", "x=Rx4", "scale=4"], ["x=Rx4", "name=sizes"]),
        (["rms_norm", "--scale", "Q=1,2"], ["--scale Q", "no operand has a size of that name"]),
        (["rms_norm", "--scale", "R=1,big"], ["--scale must be name=sizes", "R=1,big"]),
        (["rms_norm", "--rounds", "0"], ["--rounds must be at least 1"]),
        (["rms_norm", "--against", "jaxx"], ["--against", "did you mean jax?"]),
        (["rms_norm", "--against", "no_such_module:f"], ["no_such_module", "cannot be imported"]),
        (["rms_norm", "--target", "v6"], ["--target", "did you mean v6e?"]),
        (["rms_norm", "--report", "/proc/no/such"], ["--report", "/proc/no/such"]),
        (["no_such_module:f", "x=4"], ["no_such_module", "cannot be imported"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_question_that_makes_no_sense_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    streams = capsys.readouterr()
    assert not streams.out and streams.err.startswith("jaxops: ") and streams.err.count("\n") == 1
    for word in words:
        assert word in streams.err


@pytest.mark.skipif(not peers.installed("torch"), reason="the extra `torch` is not installed")
def test_torch_is_compared_and_timed(capsys):
    assert main([*NORM, "--against", "torch", "--grad", "--json"]) == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["runs"][0]["rows"]}
    assert rows["torch"]["status"] == "timed" and rows["torch"]["error"] < 1e-5


@pytest.mark.parametrize("library", ["torch", "tokamax"])
def test_a_library_that_is_not_installed_is_named(library, capsys, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda name: name != library)
    assert main([*NORM, "--against", library]) == 2
    assert f"{library} is not installed: pip install {peers.INSTALL[library]}" in capsys.readouterr().err


def test_a_report_without_matplotlib_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*NORM, "--report", str(tmp_path)]) == 2
    assert "pip install 'jaxops[cli]'" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0 and "jaxops bench rms_norm" in capsys.readouterr().out


def test_milliseconds_has_three_digits():
    assert [bench.milliseconds(s) for s in (1.23456, 0.123456, 0.0123456, 1.23456e-6)] == [
        "1235",
        "123",
        "12.3",
        "0.00123",
    ]
