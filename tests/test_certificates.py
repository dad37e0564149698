"""The certificates in docs/ and `jaxops certify`, which writes them. Nothing is compiled here: `make certify` does."""

import copy
import json
import pathlib

import pytest

from jaxops.workbench import cases, certificates, certify, compiler, sources
from jaxops.workbench.call import call, operators
from jaxops.workbench.command import main

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
COMMITTED = DOCS / "certificates.json"


def test_every_chip_and_operator_has_a_certificate_and_none_failed():
    found = json.loads(COMMITTED.read_text())["cells"]
    wanted = {certificates.key_of(chip, *cell) for chip in compiler.CHIPS for cell in certificates.cells()}
    assert found.keys() == wanted
    assert [key for key, cell in found.items() if cell["status"] == "failed"] == []


def test_the_page_is_written_from_the_json():
    assert (DOCS / "certificates.md").read_text() == certificates.render(json.loads(COMMITTED.read_text()))


def test_every_operator_has_a_usual_and_an_awkward_case_that_it_takes():
    told = [(case.operator, case.shape) for case in cases.CASES]
    assert len(told) == len(set(told)) and {operator for operator, _ in told} == set(operators())
    assert {(operator, shape) for operator in operators() for shape in ("main", "awkward")} <= set(told)
    for case in cases.CASES:
        call(case.operator, case.operands, case.options, "bfloat16", False)
    assert str(cases.usual("linear_cross_entropy")) == "x[8192, 2048], weight[2048, 65536], labels[8192]"


def test_a_result_becomes_a_cell():
    kernel, xla = cases.usual("rms_norm"), cases.usual("gelu")
    result = {"status": "compiled", "kernels": 1, "temp_bytes": 2, "vmem_bytes": 3, "compile_seconds": 4.0, "runs": []}
    figures = {"kernels": 1, "temp_bytes": 2, "vmem_bytes": 3, "fingerprint": "f"}
    assert certificates.certificate(result, kernel, "f") == {"status": "compiled", **figures}
    by_xla = certificates.certificate(result | {"kernels": 0}, xla, "f")
    assert by_xla == {"status": "xla", **figures, "kernels": 0}
    for status, told in (("refused", "refused"), ("failed", "failed"), ("hung", "failed"), ("aborted", "failed")):
        cell = certificates.certificate({"status": status, "reason": "because"}, kernel, "f")
        assert cell == {"status": told, "reason": "because", "fingerprint": "f"}


def test_a_cell_that_turned_red_is_named():
    before = {
        "a": {"status": "compiled"},
        "b": {"status": "xla"},
        "c": {"status": "refused", "reason": "old"},
        "d": {"status": "failed", "reason": "old"},
    }
    assert certificates.reddened(before, before) == []
    assert certificates.reddened(before, {key: {"status": "compiled"} for key in before}) == []
    red = {key: {"status": "refused", "reason": "planted"} for key in before}
    assert certificates.reddened(before, red) == [
        "a: compiled before, now refused: planted",
        "b: xla before, now refused: planted",
    ]
    lost = copy.deepcopy(before) | {"a": {"status": "xla"}}
    assert certificates.reddened(before, lost) == ["a: compiled before, now xla: the program holds no kernel"]


def test_a_cell_is_out_of_date_when_what_it_is_made_from_changes(monkeypatch):
    cell = ("v5e", cases.usual("rms_norm"), "forward", "bfloat16")
    before = certificates.fingerprint(*cell)
    assert certificates.fingerprint(*cell) == before
    assert certificates.fingerprint("v6e", *cell[1:]) != before
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "versions", lambda platforms: {"libtpu": "9"})
        assert certificates.fingerprint(*cell) != before
    changed = next(
        path for path in sources.files("rms_norm", certificates.chips.named("v5e")) if path.parent.name == "tpu"
    )
    digest = sources.digest
    monkeypatch.setattr(sources, "digest", lambda path: "changed" if path == changed else digest(path))
    assert certificates.fingerprint(*cell) != before
    gelu = ("v5e", cases.usual("gelu"), "forward", "bfloat16")
    with_change = certificates.fingerprint(*gelu)
    monkeypatch.undo()
    assert certificates.fingerprint(*gelu) == with_change


def _compiled(jobs):
    """What the compilers might make of jobs."""
    for job in jobs:
        kernels = int(job.implementation == "pallas")
        figures = dict.fromkeys(("temp_bytes", "argument_bytes", "output_bytes", "vmem_bytes", "smem_bytes"), 0)
        yield {"status": "compiled", "kernels": kernels, **figures, "registers": 0, "spill_bytes": 0}


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A docs folder without certificates, and a compiler service that keeps what it was asked for."""

    def compile_jobs(jobs, **options):
        checkout.jobs, checkout.options = list(jobs), options
        return [
            checkout.red if job in checkout.reds else result for job, result in zip(jobs, _compiled(jobs), strict=True)
        ]

    monkeypatch.setattr(certify, "compile_jobs", compile_jobs)
    monkeypatch.setattr(certify, "missing", lambda platforms: None)
    monkeypatch.setattr(certify, "docs_folder", lambda: tmp_path)
    checkout.reds, checkout.red, checkout.docs = [], {"status": "hung", "reason": "no end"}, tmp_path
    return checkout


def test_only_what_changed_is_compiled(checkout, monkeypatch, capsys):
    assert main(["certify"]) == 0
    assert len(checkout.jobs) == len(compiler.CHIPS) * len(certificates.cells())
    assert checkout.options["user_tiles"] is False
    written = (checkout.docs / "certificates.json").read_text()
    assert (checkout.docs / "certificates.md").read_text() == certificates.render(json.loads(written))
    assert main(["certify"]) == 0 and checkout.jobs == []
    assert (checkout.docs / "certificates.json").read_text() == written
    assert main(["certify", "--chips", "v5e", "--all"]) == 0 and checkout.options["cache"] is False
    assert {job.chip for job in checkout.jobs} == {"v5e"} and len(checkout.jobs) == len(certificates.cells())
    assert (checkout.docs / "certificates.json").read_text() == written

    fingerprint = certificates.fingerprint
    changed = lambda *cell: fingerprint(*cell) + ("." if cell[1].operator == "rms_norm" else "")
    monkeypatch.setattr(certificates, "fingerprint", changed)
    capsys.readouterr()
    assert main(["certify", "--json"]) == 0
    assert {job.function for job in checkout.jobs} == {"rms_norm"} and len(checkout.jobs) == 8 * len(compiler.CHIPS)
    told = json.loads(capsys.readouterr().out)
    assert told["compiled_now"] == len(checkout.jobs) and not told["failed"] and not told["reddened"]
    assert told["statuses"].keys() == {"compiled", "xla"}


def test_a_check_writes_nothing_and_ends_with_1_where_a_cell_turned_red(checkout, capsys):
    assert main(["certify"]) == 0
    written = (checkout.docs / "certificates.json").read_text()
    checkout.reds = [certificates.job_of("v6e", cases.usual("rms_norm"), "backward", "float32")]
    assert main(["certify", "--check"]) == 0  # nothing has changed: nothing is compiled
    capsys.readouterr()
    assert main(["certify", "--check", "--all"]) == 1
    key = "rms_norm/backward/v6e/float32/main"
    assert f"{key}: compiled before, now failed: no end" in capsys.readouterr().out
    assert (checkout.docs / "certificates.json").read_text() == written
    assert main(["certify", "--all"]) == 0
    assert json.loads((checkout.docs / "certificates.json").read_text())["cells"][key]["status"] == "failed"


def test_what_left_the_matrix_leaves_the_certificates(checkout):
    old = {"versions": {}, "cells": {"gone/forward/v5e/float32/main": {"status": "compiled"}}}
    (checkout.docs / "certificates.json").write_text(json.dumps(old))
    assert main(["certify", "--chips", "v5e"]) == 0
    found = json.loads((checkout.docs / "certificates.json").read_text())["cells"]
    assert "gone/forward/v5e/float32/main" not in found and len(found) == len(certificates.cells())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chips", "v5"], ["--chips", "'v5'", "did you mean"]),
        (["--jobs", "0"], ["--jobs", "at least 1"]),
        (["--seconds", "-1"], ["--seconds", "above 0"]),
    ],
)
def test_a_question_that_makes_no_sense_is_one_line_and_exit_code_2(arguments, words, checkout, capsys):
    assert main(["certify", *arguments]) == 2
    streams = capsys.readouterr()
    assert not streams.out and streams.err.startswith("jaxops: ") and streams.err.count("\n") == 1
    for word in words:
        assert word in streams.err


def test_certificates_that_cannot_be_read_or_written_are_told(checkout, capsys, monkeypatch):
    (checkout.docs / "certificates.json").write_text("{")
    assert main(["certify"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (checkout.docs / "certificates.json").unlink()
    monkeypatch.setattr(certify, "docs_folder", lambda: checkout.docs / "absent")
    assert main(["certify"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_certify_needs_a_checkout_and_the_compilers(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(compiler.COMPILERS, "tpu", ("tpu-compile", ("no-such-compiler",)))
    assert main(["certify", "--chips", "v5e"]) == 2
    assert "(no-such-compiler): pip install 'jaxops[tpu-compile]'" in capsys.readouterr().err
    monkeypatch.setattr(certify.jaxops, "__file__", str(tmp_path / "jaxops" / "__init__.py"))
    assert main(["certify"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_figures_are_read_from_what_the_compilers_print():
    from jaxops.workbench import programs

    printed = (
        "Resources(smem_scratch_bytes=1000, barrier_counts=Counter({Barrier(num_barriers=16, x=False): 1}))\n"
        "Resources(smem_scratch_bytes=200, barrier_counts=Counter({Barrier(num_barriers=8, x=False): 2}))\n"
        "ptxas info    : Compiling entry function 'a_mosaic_gpu_kernel' for 'sm_90a'\n"
        "    8 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
    )
    assert programs.gpu_resources(printed, 1) == {"smem_bytes": 328, "registers": 168, "spill_bytes": 24}
    call = (
        'custom_call_target="tpu_custom_call", "scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"%d"}]'
    )
    assert programs.vmem_bytes(f"{call % 4096}\n{call % 512}") == 4096
    assert programs.plain_words("Error at /a/b/c.py\n\n  0x7fff\n--------\n") == "Error at <path> <address>"
