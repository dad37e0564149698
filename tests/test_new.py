"""`jaxops new`: what it writes runs, is clean and is proved by `jaxops verify`; what it cannot write it leaves.

Its types are checked before the names are put in: the templates are part of what `make types` reads.
"""

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxops.workbench import new
from jaxops.workbench.command import main

ROOT = pathlib.Path(__file__).parents[1]
OPERATOR = "their_package.scaled_swish:scaled_swish"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where `jaxops new scaled_swish --package their_package` was said."""
    where = tmp_path_factory.mktemp("theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        assert main(["new", "scaled_swish", "--package", "their_package"]) == 0
    return where


def _python(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- what is written -------------------------------------------------------------------------------------------------


def test_four_files_in_a_new_package(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    assert files == {
        "their_package/__init__.py",
        "their_package/scaled_swish.py",
        "tests/test_scaled_swish.py",
        "benchmarks/bench_scaled_swish.py",
    }
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert "new_operator" not in text and "NewOperator" not in text and "new_package" not in text


@pytest.mark.slow
def test_verify_proves_it(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "140")
    # Under every transform; its kernels are interpreted by its own test below, and by the tutorial's `jaxops verify`.
    assert main(["verify", OPERATOR, "x=40x129", "scale=129", "--transforms"]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    for said in ("gradient of scale", "shard_map, Explicit mesh"):
        assert said in printed


@pytest.mark.slow
def test_its_own_test_passes(folder):
    assert "10 passed" in _python(folder, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider")


@pytest.mark.slow
def test_its_own_test_finds_a_tail_that_is_not_masked(folder):
    module = folder / "their_package" / "scaled_swish.py"
    whole = module.read_text()
    broken = whole.replace("jnp.where(row < rows, dy * value, 0.0)", "dy * value")
    assert broken != whole
    module.write_text(broken)
    try:
        command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", "-k", "other_tiles"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    finally:
        module.write_text(whole)
    assert done.returncode == 1 and "scale" in done.stdout, done.stdout


def test_its_benchmark_runs(folder):
    printed = _python(folder, "benchmarks/bench_scaled_swish.py", "64", "128")
    assert "scaled_swish [64, 128]" in printed and "plain JAX" in printed


@pytest.mark.parametrize("name", ["f", "scaled_swish", "a_name_as_long_as_they_may_be_"[:29] + "e"])
def test_it_is_clean_under_any_name(name, tmp_path):
    assert len(name) <= 30
    planned = new.plan(name, str(tmp_path / "their_package"))
    new.write({planned.files[what]: text for what, text in new.rendered(planned).items()})
    ruff = functools.partial(_python, tmp_path, "-m", "ruff")
    ruff("check", "--no-cache", "--isolated", "--select", "E,F,I,B,UP,C4,RET,SIM,PIE,NPY", "--line-length", "120", ".")
    ruff("format", "--no-cache", "--isolated", "--line-length", "120", "--check", ".")


def test_json_says_what_was_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "swish_2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["operator"] == "swish_2:swish_2" and said["folder"] == "."
    assert said["files"] == {
        "operator": "swish_2.py",
        "test": "tests/test_swish_2.py",
        "benchmark": "benchmarks/bench_swish_2.py",
    }
    assert all((tmp_path / path).is_file() for path in said["files"].values())
    assert "class Swish2(nnx.Module)" in (tmp_path / "swish_2.py").read_text()


def test_into_a_package_within_a_package_below_src(tmp_path, monkeypatch, capsys):
    package = tmp_path / "src" / "theirs" / "operators"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("kept = True\n")
    monkeypatch.chdir(tmp_path)
    assert main(["new", "swish", "--package", "src/theirs/operators", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["operator"] == "theirs.operators.swish:swish" and said["folder"] == "src"
    assert said["files"]["test"] == "tests/test_swish.py" and "package" not in said["files"]
    assert "import theirs.operators.swish as module" in (tmp_path / "tests" / "test_swish.py").read_text()
    assert (package / "__init__.py").read_text() == "kept = True\n"


# ---- what is not written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["swish.py", "tests/test_swish.py", "benchmarks/bench_swish.py"])
def test_nothing_is_overwritten_and_nothing_else_written(there, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.write_text("theirs")
    assert main(["new", "swish"]) == 2
    error = capsys.readouterr().err
    assert there in error and error.count("\n") == 1
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path] and path.read_text() == "theirs"


def test_where_one_file_cannot_be_written_none_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").write_text("a file where a folder has to be")
    assert main(["new", "swish", "--package", "theirs"]) == 2
    error = capsys.readouterr().err
    assert "benchmarks" in error and "nothing was written" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["benchmarks"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Swish"], ["lower case", "'Swish'"]),
        (["2swish"], ["lower case", "'2swish'"]),
        (["swish__gated"], ["joined by _", "'swish__gated'"]),
        (["s" * 31], ["at most 30"]),
        (["lambda"], ["Python's own"]),
        (["match"], ["Python's own"]),
        (["sum"], ["Python's own"]),
        (["rms_norm"], ["operator of the library", "'rms_norm'"]),
        (["tester"], ["pytest"]),
        (["scale"], ["the generated code uses", "'scale'"]),
        (["operator"], ["the generated code uses", "'operator'"]),  # its class would be Operator
        (["json"], ["installed module", "--package"]),
        (["swish", "--package", "not/there/theirs"], ["--package", "not/there/theirs"]),
        (["swish", "--package", "."], ["--package", "__init__.py"]),
        (["swish", "--package", "their-package"], ["--package", "'their-package'"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_a_name_that_cannot_be_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", *arguments]) == 2
    streams = capsys.readouterr()
    assert not streams.out and streams.err.startswith("jaxops: ") and streams.err.count("\n") == 1
    for word in words:
        assert word in streams.err
    assert not list(tmp_path.iterdir())


# ---- the example is what is written, with another formula ------------------------------------------------------------


def test_the_example_is_what_was_generated_but_for_the_formula():
    example = (ROOT / "examples" / "own_operator.py").read_text()
    files = {"operator": ROOT / "examples" / "own_operator.py"}
    generated = new.rendered(new.New("examples.own_operator:scaled_squared_relu", ROOT, files))["operator"]
    kinds = ast.FunctionDef | ast.ClassDef | ast.Assign
    given = [node for node in ast.parse(generated).body if isinstance(node, kinds)]
    different = [node.name for node in given if ast.get_source_segment(generated, node) not in example]
    assert len(given) > 15 and different == ["activation"]
