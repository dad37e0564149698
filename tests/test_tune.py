"""The tuned tiles: what a kernel looks up, how it is written, and how `jaxops tune` finds it."""

import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxops
from examples import own_operator
from jaxops.workbench import compiler, devices, tune
from jaxops.workbench.call import Problem
from jaxops.workbench.command import main
from pallas_kernels import chips, gpu, tpu, tuned

V5E, H100 = chips.named("v5e"), chips.named("h100")
KERNEL = "tpu.rms_norm.forward"
NORM = {"rows": 8192, "features": 4096}
ROWS, FEATURES = 2048, 512  # of a norm that is quick to trace
TILES = {"rows": 64, "group": 32, "columns": 128}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user cache of this test's own; nothing has been read and nobody warned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "_warned", set())
    tuned._read.cache_clear()
    return tmp_path


def kept(*entries, chip="v5e", **changes):
    """Writes entries (shape, tiles) for KERNEL into the user cache."""
    found = {}
    for shape, tiles in entries:
        question = tuned.Question.of(KERNEL, chips.named(chip), shape, "bfloat16")
        found[question.key] = tuned.entry(question, tiles, "tpu") | changes
    tuned.write(tuned.user_file(chip), chip, found)
    return tuned.user_file(chip)


def looked_up(shape, kernel=KERNEL, chip=V5E, dtype="bfloat16"):
    return tuned.lookup(kernel, chip, shape, dtype)


# ---- lookup ----------------------------------------------------------------------------------------------------------


def test_the_nearest_shape_answers():
    kept((NORM, TILES), ({"rows": 8192, "features": 1024}, TILES | {"group": 16}))
    assert looked_up(NORM) == TILES
    assert looked_up({"rows": 9000, "features": 4100}) == TILES  # the same class
    assert looked_up({"rows": 2048, "features": 4096}) == TILES
    assert looked_up({"rows": 2048, "features": 1500})["group"] == 16
    assert looked_up({"rows": 1024, "features": 4096}) is None  # three doublings away
    assert looked_up({"rows": 8192}) is None  # another thing
    assert looked_up(NORM, dtype="float32") is None
    assert looked_up(NORM, kernel="tpu.rms_norm.backward") is None
    assert looked_up(NORM, chip=chips.named("v6e")) is None


def test_kinds_do_not_mix():
    kept(({"kind": "causal", "keys": 1024}, TILES))
    assert looked_up({"kind": "causal", "keys": 2048}) == TILES
    assert looked_up({"kind": "open", "keys": 1024}) is None


def test_what_is_forced_comes_first_then_the_user_then_the_library(monkeypatch, tmp_path):
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tuned, "shipped_file", lambda chip: shipped)
    question = tuned.Question.of(KERNEL, V5E, NORM, "bfloat16")
    tuned.write(shipped, "v5e", {question.key: tuned.entry(question, TILES | {"rows": 32}, "tpu")})
    assert looked_up(NORM)["rows"] == 32
    kept((NORM, TILES))
    assert looked_up(NORM) == TILES
    with tuned.forced({KERNEL: {"rows": 96}, "tpu.other.forward": {"rows": 1}}):
        assert looked_up(NORM) == {"rows": 96}
    assert looked_up(NORM) == TILES


def test_tiles_that_the_problem_does_not_allow_give_way():
    kept((NORM, TILES | {"columns": 100}))
    default = tpu.row_norm.Tiles(1, 2, 3)
    args = (KERNEL, V5E, NORM, "bfloat16", tpu.row_norm.Tiles)
    assert tuned.choose(*args, lambda tiles: tiles.columns % 128 == 0, default) == default
    assert tuned.choose(*args, lambda tiles: True, default).columns == 100
    with tuned.forced({KERNEL: TILES}), pytest.raises(ValueError, match="cannot be cut"):
        tuned.choose(*args, lambda tiles: False, default)
    with tuned.forced({KERNEL: {"rows": 1}}), pytest.raises(ValueError, match="other fields"):
        tuned.choose(*args, lambda tiles: True, default)


def test_a_file_is_read_once_and_again_when_it_changes(monkeypatch):
    path = kept((NORM, TILES))
    reads = []
    read = pathlib.Path.read_text
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: reads.append(self) or read(self))
    for _ in range(3):
        assert looked_up(NORM) == TILES
    assert reads.count(path) == 1
    kept((NORM, TILES | {"rows": 96}))
    assert looked_up(NORM)["rows"] == 96


SOME = tuned.Question(KERNEL, "v5e", (), "float32")
WRONG = {
    "no JSON": ("{", "cannot be read"),
    "not a table": ("[1, 2]", "cannot be read"),
    "of another chip": ('{"chip": "v6e", "entries": {}}', "'v6e'"),
    "entries of another kind": ('{"chip": "v5e", "entries": {"a": 3, "b": {"kernel": 1}}}', "2 of 2 entries"),
    "negative tiles": (
        json.dumps({"chip": "v5e", "entries": {"a": tuned.entry(SOME, {"rows": -1}, "tpu")}}),
        "1 of 1 entries",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_wrong_is_one_warning_and_no_answer(what):
    text, word = WRONG[what]
    path = tuned.user_file("v5e")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=word) as caught:
        assert looked_up(NORM) is None
    path.write_text(text + "  ")  # read again: still the same file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert looked_up(NORM) is None
    assert len(caught) == 1 and str(path) in str(caught[0].message)


@pytest.mark.parametrize("field, version", [("jax", "0.11.4"), ("compiler", "0.0.1")])
def test_a_stale_entry_is_one_warning_and_no_answer(field, version, monkeypatch):
    monkeypatch.setattr(tuned, "compiler_version", lambda platform: "0.0.50")
    kept((NORM, TILES), ({"rows": 64, "features": 64}, TILES), **{field: version})
    with pytest.warns(UserWarning, match=f"2 of 2 entries.*{version}") as caught:
        assert looked_up(NORM) is None and looked_up({"rows": 64, "features": 64}) is None
    assert len(caught) == 1


def test_good_entries_of_a_file_with_a_bad_one_still_hold(monkeypatch):
    monkeypatch.setattr(tuned, "compiler_version", lambda platform: "0.0.50")
    kept((NORM, TILES))
    kept(({"rows": 64, "features": 64}, TILES), compiler="0.0.1")
    with pytest.warns(UserWarning, match="1 of 2 entries"):
        assert looked_up(NORM) == TILES


def test_a_compiler_that_is_not_here_contradicts_nothing(monkeypatch):
    kept((NORM, TILES), compiler="0.0.1")
    monkeypatch.setattr(tuned, "compiler_version", lambda platform: None)
    assert looked_up(NORM) == TILES


def test_other_fields_than_those_of_the_kernel_are_one_warning(monkeypatch):
    kept((NORM, {"lines": 3}))
    default = tpu.row_norm.Tiles(1, 2, 3)
    with pytest.warns(UserWarning, match="other fields") as caught:
        for _ in range(2):
            args = (KERNEL, V5E, NORM, "bfloat16", tpu.row_norm.Tiles, lambda tiles: True, default)
            assert tuned.choose(*args) == default
    assert len(caught) == 1


def test_a_missing_or_unreadable_cache_folder_is_no_answer(monkeypatch, tmp_path):
    assert looked_up(NORM) is None
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # nothing can be below it
    assert looked_up(NORM) is None
    with pytest.raises(OSError):
        kept((NORM, TILES))


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x", "h100"])
def test_what_is_shipped_is_well_formed(chip):
    found = tuned._usable(tuned.shipped_file(chip), chips.named(chip), False)
    written = json.loads(tuned.shipped_file(chip).read_text())["entries"]
    assert len(found) == len(written)
    for entry in found:
        platform, name, phase = entry["kernel"].split(".")
        assert platform == chips.named(chip).platform and phase in tune.PHASES
        fields = {field.name for field in dataclasses.fields(getattr({"tpu": tpu, "gpu": gpu}[platform], name).Tiles)}
        assert (set(entry["tiles"]) == fields and entry["gain"] >= tune.GAIN) or (
            not entry["tiles"] and entry["gain"] == 1
        )
        assert entry["compiler"] is not None


WRITER = """
import sys
from pallas_kernels import chips, tuned
for i in range(20):
    question = tuned.Question.of(f"tpu.{sys.argv[1]}{i}.forward", chips.named("v5e"), {"rows": 1}, "bfloat16")
    tuned.write(tuned.user_file("v5e"), "v5e", {question.key: tuned.entry(question, {"rows": i}, "tpu")})
"""


def test_processes_that_write_at_once_lose_nothing():
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    entries = json.loads(tuned.user_file("v5e").read_text())["entries"]
    assert {entry["kernel"] for entry in entries.values()} == {
        f"tpu.{name}{i}.forward" for name in "ab" for i in range(20)
    }


def test_writing_replaces_a_corrupt_file():
    path = tuned.user_file("v5e")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    kept((NORM, TILES))
    assert looked_up(NORM) == TILES


# ---- the kernels ask -------------------------------------------------------------------------------------------------

SHAPE = jax.ShapeDtypeStruct


def attention(length, dim, dtype="bfloat16", **options):
    query, key = SHAPE((2, length, 8, dim), dtype), SHAPE((2, length, 4, dim), dtype)
    return {"query": query, "key": key, "value": key, "scale": 1.0, "is_causal": True, **options}


def norm(rows, features, dtype="bfloat16", bias=False):
    vector = SHAPE((features,), dtype)
    operands = {"x": SHAPE((rows, features), dtype), "scale": vector, "eps": 1e-6, "scale_offset": 0.0}
    return operands | ({"bias": vector} if bias else {})


def cross_entropy(tokens, hidden, vocab, dtype="bfloat16"):
    options = {"label_smoothing": 0.0, "z_loss": 0.0, "logits_soft_cap": None}
    operands = {"x": SHAPE((tokens, hidden), dtype), "weight": SHAPE((hidden, vocab), dtype)}
    return operands | {"labels": SHAPE((tokens,), "int32")} | options


CALLS = [
    *[("attention", attention(*size)) for size in ((4096, 128), (16384, 64), (1000, 256), (1, 64), (300, 80))],
    ("attention", attention(4096, 128, is_causal=False)),
    ("attention", attention(4096, 128, local_window_size=(512, 0))),
    ("attention", attention(2048, 64, mask=SHAPE((2, 1, 2048, 2048), "bool"))),
    ("attention", attention(100_000, 256, "float32")),
    *[("rms_norm", norm(*size)) for size in ((8192, 4096), (111, 1000), (1, 1), (5, 100_000))],
    ("layer_norm", norm(8192, 1024, "float32", bias=True)),
    ("add_rms_norm", norm(111, 1000) | {"residual": SHAPE((111, 1000), "float32")}),
    ("add_layer_norm", norm(8192, 4096, bias=True) | {"residual": SHAPE((8192, 4096), "bfloat16")}),
    ("linear_cross_entropy", cross_entropy(8192, 2048, 65536)),
    ("linear_cross_entropy", cross_entropy(100, 512, 50257, "float32")),
]


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x", "h100"])
@pytest.mark.parametrize("name, call", CALLS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CALLS)])
def test_candidates_divide_and_fit_and_the_default_comes_first(name, call, chip, monkeypatch):
    monkeypatch.setattr(tuned, "shipped_file", lambda chip: pathlib.Path("/nowhere"))
    module = getattr(tpu if chips.named(chip).platform == "tpu" else gpu, name, None)
    with chips.target(chips.named(chip)) as facts:
        if module is None or module.unsupported(**call):
            return
        room = facts.vmem_bytes or facts.smem_bytes
        for phase in tune.PHASES:
            found = list(module.candidates(phase, **call))
            assert found[0] == module.tiles(phase, **call)
            assert len(found) == len(set(found)) <= 64
            with tuned.asked() as questions:
                module.tiles(phase, **call)
            (question,) = questions
            for tiles in found:
                assert 0 < module.memory(phase, tiles, **call) <= room
                with tuned.forced({question.kernel: dataclasses.asdict(tiles)}):  # raises where it is not allowed
                    assert module.tiles(phase, **call) == tiles


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_tiles_that_do_not_divide_are_not_taken(chip):
    call = attention(4096, 128)
    module, fields = (tpu, {"queries": 384}) if chip == "v5e" else (gpu, {"keys": 96})
    with chips.target(chips.named(chip)):
        default = module.attention.tiles("forward", **call)
        with tuned.asked() as questions:
            module.attention.tiles("forward", **call)
        (question,) = questions
        tiles = dataclasses.asdict(default) | fields
        tuned.write(tuned.user_file(chip), chip, {question.key: tuned.entry(question, tiles, "tpu")})
        assert tuned.lookup(question.kernel, chips.named(chip), dict(question.shape), "bfloat16") == tiles
        assert module.attention.tiles("forward", **call) == default


@pytest.mark.parametrize(
    "length, tiles", [(4096, (1024, 512, 4096)), (8192, (1024, 512, 8192)), (1100, (768, 384, 1536))]
)
def test_the_span_follows_the_problem_and_nothing_is_padded_more_than_by_default(length, tiles):
    with chips.target(V5E):
        with tuned.asked() as questions:
            default = tpu.attention.tiles("forward", **attention(4096, 128))
        (question,) = questions
        entry = tuned.entry(question, dataclasses.asdict(default) | {"queries": 1024, "keys": 512}, "tpu")
        tuned.write(tuned.user_file("v5e"), "v5e", {question.key: entry})
        found = tpu.attention.tiles("forward", **attention(length, 128))
    assert (found.queries, found.keys, found.span) == tiles


def test_what_was_tuned_is_what_is_traced():
    """Also after the same call has been traced with other tiles: they are part of the key of JAX's caches."""
    x, scale = jnp.ones((ROWS, FEATURES), jnp.bfloat16), jnp.ones(FEATURES, jnp.bfloat16)

    def blocks():
        with chips.target(V5E):
            lowered = jax.jit(lambda x: tpu.rms_norm.forward(x, scale, eps=1e-6, scale_offset=0.0)).trace(x).jaxpr
        (call,) = [equation for equation in lowered.jaxpr.eqns if equation.primitive.name == "pallas_call"]
        return call.params["grid_mapping"].grid[0]

    default = blocks()
    with tuned.forced({KERNEL: TILES}):
        assert blocks() == ROWS // 64 != default
    with tuned.forced({KERNEL: TILES | {"rows": 32}}):
        assert blocks() == ROWS // 32
    assert blocks() == default
    kept(({"rows": ROWS, "features": FEATURES}, TILES))
    assert blocks() == ROWS // 64


def test_tuned_tiles_compute_the_same():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((100, 256)), jnp.float32)
    with jaxops.target("v5e", interpret=True):
        plain = jaxops.rms_norm(x, jnp.ones(256), implementation="pallas")
        with tuned.forced({KERNEL: {"rows": 48, "group": 16, "columns": 128}}):
            forced = jaxops.rms_norm(x, jnp.ones(256), implementation="pallas")
    np.testing.assert_allclose(forced, plain, rtol=1e-6)


# ---- the tuner -------------------------------------------------------------------------------------------------------

CALL = ["rms_norm", f"x={ROWS}x{FEATURES}", f"scale={FEATURES}"]
COMMAND = ["tune", *CALL, "--target", "v5e", "--phase", "forward", "--json"]


def fake(monkeypatch, result_of):
    """Puts `result_of(tiles, job)` in the place of the compilers; returns the jobs they were given."""
    jobs = []

    def compile_jobs(given, **options):
        jobs.extend(given)
        for job in given:
            options["advance"](job.function)
        return [result_of(next(iter(job.tiles.values())), job) for job in given]

    monkeypatch.setattr(compiler, "compile_jobs", compile_jobs)
    return jobs


def modelled(seconds):
    return {"status": "compiled", "kernels": 1, "schedule": {"kernels": [], "seconds": seconds}}


def best_of(seconds):
    """A compiler for which 64 rows a turn take `seconds`, the others 1 ms, and those of 16 fail."""

    def result(tiles, job):
        if tiles["group"] == 16:
            return {"status": "failed", "reason": "a kernel exceeds VMEM"}
        return modelled(seconds if tiles["group"] == 64 else 1e-3)

    return result


def test_the_best_that_compiles_is_kept_and_looked_up(monkeypatch, capsys):
    fake(monkeypatch, best_of(0.5e-3))
    assert main(COMMAND) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["kernel"] == KERNEL and found["ranked_by"] == "seconds" and found["written"]
    assert found["best"]["group"] == 64
    by_status = {trial["status"] for trial in found["trials"]}
    assert by_status == {"modelled", "failed"}
    (best,) = [trial for trial in found["trials"] if trial["tiles"] == found["best"]][:1]
    assert best["times_better_than"]["default"] == pytest.approx(2)
    assert best["times_better_than"]["baseline"] is None  # it did not compile
    with chips.target(V5E):
        x = SHAPE((ROWS, FEATURES), "bfloat16")
        tiles = tpu.rms_norm.tiles("forward", x, x, eps=1e-6, scale_offset=0.0)
    assert dataclasses.asdict(tiles) == found["best"]


def test_a_short_search_does_not_lose_what_was_tuned_before(monkeypatch, capsys):
    fake(monkeypatch, best_of(0.5e-3))
    assert main(COMMAND) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*COMMAND, "--limit", "1"]) == 0
    (again,) = json.loads(capsys.readouterr().out)
    assert again["best"] == first[0]["best"] and len(again["trials"]) == 2


def test_the_default_stays_unless_the_gain_is_clear(monkeypatch, capsys):
    fake(monkeypatch, best_of(0.99e-3))
    assert main(COMMAND) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["best"] == found["trials"][0]["tiles"]
    (kept,) = json.loads(tuned.user_file("v5e").read_text())["entries"].values()
    assert kept["tiles"] == {} and kept["gain"] == 1 and kept["tried"] == len(found["trials"])


def test_where_the_default_won_it_serves_what_is_near():
    kept((NORM, {}), (NORM | {"rows": 1024}, TILES))
    default = tpu.row_norm.Tiles(1, 2, 3)
    choose = lambda rows: tuned.choose(
        KERNEL, V5E, NORM | {"rows": rows}, "bfloat16", tpu.row_norm.Tiles, lambda _: True, default
    )
    assert choose(16384) == default and choose(512) == tpu.row_norm.Tiles(**TILES)


def test_nothing_is_written_where_nothing_compiles(monkeypatch, capsys):
    fake(monkeypatch, lambda tiles, job: {"status": "hung", "reason": "it had not ended"})
    assert main(COMMAND) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["best"] is None and not found["written"] and not tuned.user_file("v5e").exists()


def test_a_table_says_what_is_modelled_and_why_tiles_are_out(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    fake(monkeypatch, best_of(0.5e-3))
    assert main(COMMAND[:-1] + ["--write", "none"]) == 0
    out = capsys.readouterr().out
    for word in ("(default)", "(best)", "(baseline)", "exceeds VMEM", "modelled by the schedule", "0.500", "2.00"):
        assert word in out
    assert not tuned.user_file("v5e").exists()


def test_both_phases_and_the_limit(monkeypatch):
    jobs = fake(monkeypatch, lambda tiles, job: modelled(1e-3))
    found = tune.tune(CALL[0], CALL[1:], target="v5e", limit=3)
    assert [one.question.kernel for one in found] == [KERNEL, "tpu.rms_norm.backward"]
    assert [len(one.trials) for one in found] == [3, 3]
    assert [job.gradients for job in jobs] == [False] * 3 + [True] * 3
    assert all(
        job.schedule and set(job.tiles) == {one.question.kernel} for one, job in zip(found, jobs[::3], strict=True)
    )
    assert all(0 < one.bound < 1e-3 for one in found)


def test_gpus_are_ranked_by_instructions_and_spills_are_out(monkeypatch, capsys):
    def result(tiles, job):
        loops = [{"total": 4.0 * (512 - tiles["keys"]), "tensor_clocks": 64}]
        spills = 8 if tiles["keys"] == 256 and tiles["stages"] > 2 else 0
        schedule = {"kernels": [{"loops": loops}, {"loops": []}], "seconds": None}
        return {"status": "compiled", "spill_bytes": spills, "schedule": schedule}

    fake(monkeypatch, result)
    words = [f"{name}=1x1024x4x64" for name in ("query", "key", "value")]
    (found,) = tune.tune("dot_product_attention", words, target="h100", phases=("forward",))
    assert found.label == "instructions per tensor-core clock"
    assert {trial.status for trial in found.trials} == {"scored", "spills"}
    assert found.best and found.best.status == "scored"
    assert found.best.score == min(trial.score for trial in found.trials if trial.score)


def test_on_the_chip_the_measured_best_is_taken(monkeypatch):
    """The chip is this CPU under another name: the program runs, in XLA, and only the clock is played."""
    fake(monkeypatch, best_of(0.5e-3))
    monkeypatch.setattr(devices, "chip", lambda: V5E)
    monkeypatch.setattr(tune, "FINALISTS", 2)
    slowest = []

    def take_turns(calls, rounds):
        from jaxops.workbench.timing import Spread

        for call in calls.values():
            jax.block_until_ready(call())
        slowest.extend(calls)
        return {name: Spread((1e-3 * (len(calls) - i),)) for i, name in enumerate(calls)}

    monkeypatch.setattr("jaxops.workbench.timing.take_turns", take_turns)
    (found,) = tune.tune(CALL[0], CALL[1:], target="v5e", phases=("forward",))
    measured = [trial for trial in found.trials if trial.status == "measured"]
    assert 2 <= len(measured) == len(slowest) <= tune.FINALISTS + 1 and found.trials[0] in measured
    assert found.best and found.best.measured == min(trial.measured for trial in measured)
    assert all(trial.score is None for trial in found.trials if trial not in measured)


USERS = ("examples.own_operator:scaled_squared_relu", ["x=256x128", "scale=128"])


def test_an_operator_of_the_user(monkeypatch):
    fake(monkeypatch, lambda tiles, job: modelled(1e-3 / tiles["rows"]))
    found = tune.tune(*USERS, target="v5e")
    assert [one.question.kernel for one in found] == [f"tpu.scaled_squared_relu.{phase}" for phase in tune.PHASES]
    for one in found:
        assert one.best and one.best.tiles["rows"] == max(trial.tiles["rows"] for trial in one.trials)


def test_an_operator_of_the_user_that_says_nothing_of_tiles(monkeypatch):
    jobs = fake(monkeypatch, lambda tiles, job: modelled(1e-3))
    kernels = own_operator.OPERATOR.tpu
    bare = types.SimpleNamespace(unsupported=kernels.unsupported, forward=kernels.forward, backward=kernels.backward)
    monkeypatch.setattr(own_operator, "OPERATOR", dataclasses.replace(own_operator.OPERATOR, tpu=bare))
    with pytest.raises(Problem, match="has a choice of tiles"):
        tune.tune(*USERS, target="v5e")
    assert not jobs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rms_nrom", "x=4", "--target", "v5e"], ["rms_nrom", "did you mean rms_norm?"]),
        ([*CALL, "--target", "v6"], ["--target", "'v6'", "did you mean"]),
        ([*CALL, "--target", ""], ["--target"]),
        ([*CALL, "--target", "v5e", "--limit", "0"], ["--limit", "got 0"]),
        (["rms_norm", "x=4x4", "skale=4", "--target", "v5e"], ["skale"]),
        (["rms_norm", "x=4x4", "scale=5", "--target", "v5e"], ["scale", "(5,)"]),
        (["gelu", "x=64x128", "--target", "v5e"], ["gelu", "choice of tiles"]),
        ([*CALL, "--target", "a100"], ["a100", "choice of tiles"]),
    ],
    ids=lambda value: " ".join(value)[-40:],
)
def test_a_question_that_makes_no_sense_is_one_line_and_exit_code_2(arguments, words, monkeypatch, capsys):
    jobs = fake(monkeypatch, lambda tiles, job: modelled(1e-3))
    assert main(["tune", *arguments]) == 2
    streams = capsys.readouterr()
    assert not jobs and not streams.out and streams.err.startswith("jaxops: ") and streams.err.count("\n") == 1
    for word in words:
        assert word in streams.err


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_compiled(monkeypatch, capsys, tmp_path):
    jobs = fake(monkeypatch, lambda tiles, job: modelled(1e-3))
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert main(COMMAND) == 2
    assert not jobs and "--write user" in capsys.readouterr().err
    assert main([*COMMAND, "--write", "none"]) == 0


def test_without_the_compilers_the_extra_is_named(monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    compiler._version.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", absent)
    try:
        assert main(COMMAND) == 2
    finally:
        compiler._version.cache_clear()
    assert "pip install 'jaxops[tpu-compile]'" in capsys.readouterr().err
