"""The command line, as a shell calls it."""

import json
import subprocess
import sys

import pytest

from jaxops.workbench import certificates
from jaxops.workbench.call import operators
from jaxops.workbench.command import main

NORM = ["explain", "rms_norm", "x=64x256", "scale=256"]
CROSS_ENTROPY = ["explain", "linear_cross_entropy", "x=64x256", "weight=256x1024", "labels=64:int32"]


def test_list_says_what_the_certificates_say(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    rows = {(row["operator"], row["dtype"]): row for row in listed["operators"]}
    assert {operator for operator, _ in rows} == set(operators())
    assert rows["rms_norm", "bfloat16"]["v5e"] == rows["rms_norm", "float32"]["h100"] == "kernel"
    assert rows["dot_product_attention", "float32"]["h100"] == rows["gelu", "bfloat16"]["v6e"] == "XLA"
    assert "libtpu" in listed["compilers"]


def test_list_as_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "linear_cross_entropy" in out and "tpu7x" in out and "libtpu" in out


@pytest.mark.parametrize(
    ("forward", "backward", "mark"),
    [
        (["compiled"], ["compiled"], "kernel"),
        (["compiled", "refused"], ["compiled", "compiled"], "kernel, some shapes in XLA"),
        (["compiled", "refused"], ["refused", "refused"], "forward, some shapes in XLA"),
        (["compiled", "compiled"], ["refused", "refused"], "forward"),
        (["refused"], ["refused"], "XLA"),
        (["compiled"], ["failed"], "fails"),
    ],
)
def test_the_summary_of_certificates(forward, backward, mark):
    cells = {
        f"op/{direction}/v5e/float32/{i}": {"status": status}
        for direction, statuses in (("forward", forward), ("backward", backward))
        for i, status in enumerate(statuses)
    }
    assert certificates.summary(cells) == {("op", "float32"): {"v5e": mark}}


def test_explain_says_what_runs_on_every_chip_asked_for(capsys):
    assert main([*NORM, "--target", "v6e,h100,cpu", "--gradients", "--json"]) == 0
    v6e, h100, cpu = json.loads(capsys.readouterr().out)
    assert [one["target"] for one in (v6e, h100, cpu)] == ["v6e", "h100", "cpu"]
    for one, implementation in ((v6e, "pallas"), (h100, "pallas"), (cpu, "xla")):
        assert [(call["phase"], call["implementation"]) for call in one["calls"]] == [
            ("forward", implementation),
            ("backward", implementation),
        ]
    assert v6e["temp_bytes"] is None and cpu["temp_bytes"] >= 0
    assert "bf16[64,256]" in v6e["calls"][0]["operands"]


def test_options_and_dtypes_reach_the_operator(capsys):
    shapes = [f"{name}=2x256x4x64" for name in ("query", "key", "value")]
    arguments = ["explain", "dot_product_attention", *shapes, "--dtype", "float32", "--target", "h100"]
    assert main([*arguments, "--set", "is_causal=True", "--json"]) == 0
    (call,) = json.loads(capsys.readouterr().out)[0]["calls"]
    assert call["implementation"] == "xla" and "float32" in call["reason"]
    assert main([*arguments, "--set", "implementation=triton"]) == 2
    assert "implementation" in capsys.readouterr().err


def test_a_requirement_that_does_not_hold_is_exit_code_1(capsys):
    assert main([*CROSS_ENTROPY, "--target", "v5e", "--require", "pallas"]) == 0
    assert main([*CROSS_ENTROPY, "--target", "v5e,a100", "--require", "pallas"]) == 1
    streams = capsys.readouterr()
    assert "a100" in streams.err and "pallas" in streams.err and "v5e" not in streams.err


def test_a_function_of_the_user(capsys, tmp_path, monkeypatch):
    (tmp_path / "users_block.py").write_text(
        "import jaxops\ndef block(x, scale):\n    return jaxops.rms_norm(x, scale) * 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["explain", "users_block:block", *NORM[2:], "--target", "v5e"]) == 0
    out = capsys.readouterr().out
    assert "rms_norm" in out and "pallas" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "rms_nrom", "x=4"], ["rms_nrom", "did you mean rms_norm?"]),
        ([*NORM, "--target", "v6"], ["--target", "'v6'", "did you mean v6e?"]),
        (["explain", "rms_norm", "x=64by256"], ["x=64by256", "name=sizes"]),
        (["explain", "rms_norm", "x=64x-1", "scale=4"], ["x=64x-1", "name=sizes"]),
        (["explain", "rms_norm", "x=4x4:floaty", "scale=4"], ["dtype of x", "floaty"]),
        ([*NORM, "--set", "eps"], ["eps", "name=value"]),
        (["explain", "rms_norm", "x=4x4", "skale=4"], ["skale", "arguments are"]),
        (["explain", "rms_norm", "x=4x4", "scale=5"], ["scale", "(5,)"]),
        (["explain", "rms_norm", "x=4x4:int32", "scale=4"], ["x", "int32"]),
        (["explain", "no_such_module:f", "x=4"], ["no_such_module", "cannot be imported"]),
        (["explain", "jaxops:rms_nrom", "x=4"], ["rms_nrom", "did you mean rms_norm?"]),
        (["explain", "jaxops:__doc__", "x=4"], ["must be a function", "str"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_question_that_makes_no_sense_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert not streams.out and streams.err.startswith("jaxops: ") and streams.err.count("\n") == 1
    for word in words:
        assert word in streams.err


def test_without_rich_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(NORM) == 2
    assert "pip install 'jaxops[cli]'" in capsys.readouterr().err
    assert main([*NORM, "--json"]) == 0


def test_as_a_program():
    run = subprocess.run([sys.executable, "-m", "jaxops", *NORM], capture_output=True, text=True, check=True)
    assert "rms_norm" in run.stdout and "xla" in run.stdout
    assert (
        "jaxops explain rms_norm"
        in subprocess.run(
            [sys.executable, "-m", "jaxops", "explain", "--help"], capture_output=True, text=True, check=True
        ).stdout
    )
