"""`jaxops verify`: it finds planted mistakes and names them, passes what is right, and its programs fail as it did."""

import contextlib
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxops
from jaxops.autodiff import by_reference
from jaxops.workbench import comparison, peers, specimens, verify
from jaxops.workbench.call import operators
from jaxops.workbench.command import main
from tests.faults import rules

# module of tests.faults, its arguments, what is wrong by name and in words
FAULTS = {
    "an unmasked tail": ("tail", ["x=8x300", "--interpret", "tpu"], "output", ""),
    "a missing wait": ("semaphore", ["x=16x128", "--interpret", "tpu"], "call: double, forward", "race: read at"),
    "a missing wait, by poison": (
        "semaphore",
        ["x=16x128", "--interpret", "tpu", "--no-races"],
        "output",
        "",
    ),
    "a wrong gradient": ("rules", ["x=8x16", "scale=16"], "gradient of scale", ""),
    "a bfloat16 accumulator": ("accumulator", ["x=600x8", "--dtype", "bfloat16"], "output", ""),
    "a swapped layout": ("layout", ["x=6x4x8", "w=8x8"], "output", ""),
}


def asked(capsys, *arguments):
    """(exit code, what `jaxops verify … --json` printed)."""
    code = main(["verify", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def wrong_rows(found):
    return [row for row in found["comparisons"] if not row["holds"]]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault, capsys):
    module, arguments, name, why = FAULTS[fault]
    code, found = asked(capsys, f"tests.faults.{module}:wrong", *arguments)
    assert code == 1 and not found["holds"]
    first = wrong_rows(found)[0]
    assert first["name"] == name and why in first["why"]
    if fault == "a wrong gradient":
        assert len(wrong_rows(found)) == 1
    code, found = asked(capsys, f"tests.faults.{module}:right", *arguments)
    assert code == 0 and found["holds"] and not wrong_rows(found) and not found["program"]


@pytest.mark.parametrize("fault", ["a missing wait", "a bfloat16 accumulator"])
def test_the_program_of_a_fault_fails_in_the_same_way(fault, capsys):
    module, arguments, _, _ = FAULTS[fault]
    _, found = asked(capsys, f"tests.faults.{module}:wrong", *arguments)
    with pytest.raises(Exception, match="RACE DETECTED" if fault == "a missing wait" else "output: error"):
        exec(compile(found["program"], "program.py", "exec"), {})


@pytest.mark.slow
def test_a_failure_by_chance_is_shrunk_and_its_program_fails(capsys, tmp_path):
    code, found = asked(capsys, "tests.faults.remainder:wrong", "x=64x1", "--fuzz", "30")
    assert code == 1 and found["by_chance"] > 1
    assert "x=31x1:float32" in wrong_rows(found)[0]["part"]
    program = tmp_path / "program.py"
    program.write_text(found["program"])
    run = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env={"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"}
    )
    assert run.returncode != 0 and "output: error" in run.stdout and "AssertionError" in run.stderr
    code, found = asked(capsys, "tests.faults.remainder:right", "x=64x1", "--fuzz", "3")
    assert code == 0 and found["by_chance"] >= 2


@pytest.mark.slow
def test_the_users_own_operator_of_the_tutorial(capsys):
    code, found = asked(
        capsys,
        "examples.own_operator:scaled_squared_relu",
        "x=20x129",
        "scale=129",
        "--interpret",
        "tpu",
        "--fuzz",
        "1",
    )
    assert code == 0, wrong_rows(found)
    assert {row["part"] for row in found["comparisons"]} == {
        "here",
        "kernels of v5e, interpreted (copies eager)",
        "kernels of v5e, interpreted (copies on_wait)",
    }


def test_every_operator_of_the_library_has_specimens():
    assert set(specimens.USUAL) == set(specimens._DRAWN) == set(operators())


@pytest.mark.parametrize("name", sorted(specimens.USUAL))
def test_the_operators_of_the_library(name):
    rows = verify.first_order(verify.specimen_of(name, [], []))
    assert rows and all(row.holds for row in rows), list(map(str, rows))


@pytest.mark.parametrize("name", sorted(specimens.USUAL))
def test_calls_by_chance_can_be_made(name):
    found = specimens.drawn(verify.specimen_of(name, [], []), 10, seed=1, most=20)
    assert all(set(one.static()) == set(one.options) for one in found)
    made = 0
    for one in found[-3:]:  # a call may be one that the operator refuses
        with contextlib.suppress(ValueError):
            made += bool(jax.tree.leaves(jax.eval_shape(lambda xs, one=one: one.function()(**xs), one.arrays())))
    assert made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dot_product_attention", "linear_cross_entropy", "rms_norm", "softmax"])
def test_the_library_by_chance(name):
    failure, tried = verify.fuzz(verify.specimen_of(name, [], []), 2, seed=5)
    assert failure is None and tried, failure


def test_a_call_by_chance_is_tried_on_several_sets_of_numbers():
    drawn = verify.specimen_of("tests.faults.rare:wrong", ["x=1"], [], seed=1)  # a number below 1; the next is above
    assert all(row.holds for row in verify.first_order(drawn))
    failure = verify._failure(drawn, None)
    assert failure is not None and failure.specimen.seed > 1
    assert not all(row.holds for row in verify.first_order(failure.specimen))
    right = verify.specimen_of("tests.faults.rare:right", ["x=1"], [], seed=1)
    assert verify._failure(right, None) is None


def test_kernels_for_a_gpu(capsys):
    code, found = asked(capsys, "rms_norm", "x=3x129", "scale=129", "--interpret", "gpu")
    assert code == 0 and {row["part"] for row in found["comparisons"]} == {"here", "kernels of h100, interpreted"}


def test_kernels_without_a_backward():
    words = ["x=3x128:bfloat16", "w=128x128:int8<100", "scales=1x128"]
    rows = verify.interpreted_first_order(verify.specimen_of("quantized_matmul", words, []), verify.Kernels("v5e"))
    assert {row.name for row in rows} >= {"output", "gradient of x"} and all(row.holds for row in rows), rows


def test_attention_of_a_gpu_under_a_target():
    query = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 1, 64)), "bfloat16")
    with jaxops.target("h100", interpret=True):
        kernel = jaxops.dot_product_attention(query, query, query, implementation="pallas")
    assert comparison.error(kernel, jaxops.dot_product_attention(query, query, query)) < 0.02


def test_transforms(capsys):
    code, found = asked(capsys, "tests.faults.rules:right", "x=6x16", "scale=16", "--transforms")
    assert code == 0 and not found["left_out"], found
    names = [row["name"] for row in found["comparisons"] if row["part"] == "float32"]
    assert names == [f"transform {name}" for name in comparison.TRANSFORMS]


def test_what_a_function_cannot_do_is_left_out(monkeypatch):
    chosen = ("jit", "vmap", "shard_map, Auto mesh")
    monkeypatch.setattr(comparison, "TRANSFORMS", {name: comparison.TRANSFORMS[name] for name in chosen})
    rows, left_out = verify.transforms(verify.specimen_of("softmax", ["x=8x5"], ["axis=0"]))
    assert [row.name for row in rows] == ["transform jit", "transform vmap"] and all(row.holds for row in rows)
    assert [name for name, _ in left_out] == ["shard_map, Auto mesh"]


def test_a_wrong_rule_under_a_transform_has_a_program(monkeypatch, capsys):
    specimen = verify.specimen_of("tests.faults.rules:wrong", ["x=8x16", "scale=16"], [])
    monkeypatch.setattr(comparison, "TRANSFORMS", {"vmap of grad": comparison.TRANSFORMS["vmap of grad"]})
    rows, _ = verify.transforms(specimen)
    assert not rows[0].holds and "scale" in rows[0].name
    with pytest.raises(AssertionError):
        exec(verify._program_of_transform(specimen, rows), {})
    assert "transform vmap of grad" in capsys.readouterr().out


def test_a_function_of_labels(capsys, tmp_path, monkeypatch):
    (tmp_path / "losses.py").write_text(
        "import jax\n\n\n@jax.jit\ndef loss(logits, labels):\n"
        "    return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["losses:loss", "logits=17x50", "labels=17:int32<50"]
    assert verify.specimen_of(*words[:1], words[1:], []).arrays()["labels"].max() > 1
    code, found = asked(capsys, *words)
    assert code == 0 and [row["name"] for row in found["comparisons"]] == ["output", "gradient of logits"]


def test_a_reference_does_not_stay_in_compiled_programs():
    x, scale = jnp.ones((2, 3)), jnp.arange(3.0)
    gradient = jax.jit(jax.grad(lambda scale: rules.wrong(x, scale).sum()))
    of_rule = gradient(scale)
    with by_reference():
        of_reference = gradient(scale)
    np.testing.assert_array_equal(of_reference, 2 * of_rule)
    np.testing.assert_array_equal(gradient(scale), of_rule)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1)])
def test_a_gradient_whose_terms_cancel(shape):
    operands = {"x": np.float32(np.random.default_rng(1).standard_normal(shape)), "scale": np.ones(1, np.float32)}
    rows = comparison.against_float64(functools.partial(jaxops.rms_norm, eps=1e-6), operands)
    assert all(row.holds for row in rows), list(map(str, rows))


def test_an_error_above_the_budget_and_a_nan_do_not_hold():
    exact = np.ones(4)
    near, far = exact + 1e-8, exact + 1e-3
    judge = lambda got: comparison.judge("y", np.float32(got), [(np.float32(near), exact)], "float32")
    assert judge(near).holds and not judge(far).holds and not judge(np.full(4, np.nan)).holds
    assert "expected shape (4,)" in judge(np.ones((2, 2))).why


def test_as_a_table(capsys):
    assert main(["verify", "tests.faults.rules:wrong", "x=8x16", "scale=16"]) == 1
    out = capsys.readouterr().out
    assert "gradient of scale" in out and "FAILS" in out and "import tests.faults.rules" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rms_nrom"], ["rms_nrom", "did you mean rms_norm?"]),
        (["no_such_module:f", "x=4"], ["no_such_module", "cannot be imported"]),
        (["rms_norm", "x=4x4", "scale=5"], ["scale", "(5,)"]),
        (["rms_norm", "x=4x4", "skale=4"], ["skale"]),
        (["tests.faults.rules:right"], ["missing a required argument: 'x'"]),
        (["rms_norm", "x=4x4:int32<3", "scale=4"], ["x must be of a floating dtype"]),
        (["softmax", "x=4x4<3"], ["bound", "x=4x4<3"]),
        (["softmax", "x=4x4", "--set", "axis=0", "--interpret", "tpu"], ["axis must be the last of the 2 axes"]),
        (["rms_norm", "--interpret", "tpu", "--target", "h100"], ["--target", "h100"]),
        (["rms_norm", "--interpret", "tpu", "--target", "v5"], ["--target", "did you mean v5"]),
        (["rms_norm", "--target", "v5e"], ["--interpret"]),
        (["rms_norm", "--fuzz", "-1"], ["--fuzz", "-1"]),
        (["rms_norm", "--set", "eps=-1.0"], ["eps", "-1.0"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_a_question_that_makes_no_sense_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(["verify", *arguments]) == 2
    streams = capsys.readouterr()
    assert not streams.out and streams.err.startswith("jaxops: ") and streams.err.count("\n") == 1
    for word in words:
        assert word in streams.err


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [("hypothesis", ["--fuzz", "2"], "verify"), ("torch", ["--against", "torch"], "torch"), ("rich.table", [], "cli")],
)
def test_an_absent_extra_is_named(module, arguments, extra, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.strategies", raising=False)
    assert main(["verify", "softmax", "x=2x3", *arguments]) == 2
    assert f"pip install 'jaxops[{extra}]'" in capsys.readouterr().err


@pytest.mark.skipif(not peers.installed("torch"), reason="the extra `torch` is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        [
            "dot_product_attention",
            *(f"{name}=2x20x2x8" for name in ("query", "key", "value")),
            "--set",
            "is_causal=True",
        ],
        ["linear_cross_entropy", "x=3x11x8", "weight=8x20", "labels=3x11:int32", "--set", "reduction=sum"],
        ["gelu", "x=5x7", "--set", "approximate=False"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_torch_means_the_same_with_the_same_options(arguments, capsys):
    code, found = asked(capsys, *arguments, "--against", "torch")
    assert code == 0
    assert "torch's output" in [row["name"] for row in found["comparisons"]]


def test_what_never_ends_is_ended():
    code = "import time\nfrom jaxops.workbench import verify\nwith verify._limited(0.3):\n    time.sleep(60)\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=55)
    assert run.returncode == 1 and "--seconds" in run.stderr
