"""The documentation is true: its Python runs and prints what it says, its commands exist, its tables agree."""

import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import jaxops
import jaxops.nn
import jaxops.nn.linen
import sharding
import sharding.nn
from jaxops.workbench.command import main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMPILERS = "<!-- needs the compilers -->"  # two lines above a block: it runs where `make certify` installed them
WITH_COMPILERS = ROOT / ".venv-compilers" / "bin" / "jaxops"
FIGURE = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
PAGE_OF = {  # the others have their own
    **dict.fromkeys(("gelu", "silu", "relu", "squared_relu"), "activations"),
    "conv_transpose": "conv",
    **dict.fromkeys(("add_rms_norm", "add_layer_norm"), "add_norms"),
    **dict.fromkeys(("max_pool", "avg_pool", "adaptive_avg_pool", "global_max_pool", "global_avg_pool"), "pooling"),
}


def _name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(path: pathlib.Path) -> list[tuple[str, str, int]]:
    """(language, text, line) of every fenced block."""
    text = path.read_text()
    return [(match[1], match[2], text[: match.start()].count("\n") + 1) for match in FENCE.finditer(text)]


def _public(module) -> dict:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and value.__module__.startswith(module.__name__)
    }


LONG = (
    "sparsity.md",
    "nn.md",
    "pipeline.md",
    "sharding.md",
    "gradient_reduction.md",
    "tutorial.md",
    "workbench.md",
    "quantization.md",
)


def _marked(pages: list[pathlib.Path]) -> list:
    """Those that take long, and those of single operators, are slow cases."""
    slow = lambda page: page.parent.name == "operators" or page.name in LONG
    return [pytest.param(page, marks=pytest.mark.slow) if slow(page) else page for page in pages]


RUN = _marked([page for page in PAGES if any(block[0] == "python" for block in _blocks(page))])


@pytest.mark.parametrize("path", RUN, ids=_name)
def test_python_runs_and_prints_what_follows_it(path):
    namespace = {"__name__": "__main__"}
    blocks = _blocks(path)
    for index, (language, text, line) in enumerate(blocks):
        if language != "python":
            continue
        printed = io.StringIO()
        code = compile("\n" * line + text, _name(path), "exec")  # so that a traceback names the page and its line
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        following = blocks[index + 1] if index + 1 < len(blocks) else ("", "", 0)
        if following[0] == "text" and following[2] == line + text.count("\n") + 3:
            assert printed.getvalue().strip() == following[1].strip(), f"{_name(path)}:{following[2]}"


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_python_imports_the_submodules_it_uses(path):
    code = "\n".join(text for language, text, _ in _blocks(path) if language == "python")
    for module in set(re.findall(r"jaxops\.nn(?:\.linen)?(?=\.)", code)):
        assert f"import {module}\n" in code, f"{_name(path)} uses {module}"


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_commands_exist(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for language, text, line in _blocks(path):
        for command in text.splitlines() if language == "console" else ():
            words = command.partition("#")[0].split()
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{_name(path)}:{line}: no target {words[1]} in the Makefile"
            elif words[:2] == ["python", "-m"] and words[2] != "pytest":
                assert importlib.util.find_spec(words[2]), f"{_name(path)}:{line}: no module {words[2]}"
            elif words[:1] == ["python"]:
                assert (ROOT / words[1]).exists(), f"{_name(path)}:{line}: no file {words[1]}"


def _commands(path: pathlib.Path) -> list[tuple[str, list[list[str]], tuple[str, str], int]]:
    """(mark, the arguments of each command, the block that follows, line) of every block of `jaxops` commands.

    The mark is COMPILERS, the language "sh" of what takes long or prints figures only, which is not run, or "".
    """
    found, lines, blocks = [], path.read_text().splitlines(), _blocks(path)
    for (language, text, line), (answers, answer, where) in itertools.pairwise([*blocks, ("", "", 0)]):
        if language in ("console", "sh") and text.startswith("jaxops "):
            mark = language if language == "sh" else lines[line - 3] if lines[line - 3] == COMPILERS else ""
            commands = [shlex.split(command)[1:] for command in text.replace("\\\n", " ").splitlines()]
            follows = where == line + text.count("\n") + 3
            found.append((mark, commands, (answers, answer) if follows else ("", ""), line))
    return found


def _compare(printed: str, answer: tuple[str, str], where: str) -> None:
    """A block `text` is what was printed, a block `output` is it but for the figures; nothing else is compared."""
    language, expected = answer
    rows = [[row.rstrip() for row in text.strip().splitlines()] for text in (printed, expected)]
    if language == "output":
        rows = [[re.sub(r"[\s─]+", " ", FIGURE.sub("#", row)) for row in text] for text in rows]
    if language in ("text", "output"):
        assert rows[0] == rows[1], where


def _pages(*marks: str) -> list[pathlib.Path]:
    return [path for path in PAGES if any(mark in marks for mark, *_ in _commands(path))]


@pytest.mark.parametrize("path", _pages("", "sh", COMPILERS), ids=_name)
def test_the_words_of_a_command_are_known(path, capsys):
    for _, commands, _, line in _commands(path):
        for command, *words in commands:
            with pytest.raises(SystemExit):
                main([command, "--help"])
            described = capsys.readouterr().out
            unknown = [word for word in words if word.startswith("--") and word not in described]
            assert not unknown, f"{_name(path)}:{line}"


@pytest.mark.parametrize("path", _marked(_pages("")), ids=_name)
def test_the_command_runs_and_prints_what_follows_it(path, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for _, commands, answer, line in (block for block in _commands(path) if block[0] == ""):
        for command in commands:
            assert main(command) == 0, f"{_name(path)}:{line}: {capsys.readouterr()}"
        _compare(capsys.readouterr().out, answer, f"{_name(path)}:{line}")


@pytest.mark.parametrize("path", _pages(COMPILERS), ids=_name)
def test_the_command_that_needs_the_compilers(path, capsys, tmp_path):
    """Runs and prints what follows it, or says what to install."""
    environment = os.environ | {"COLUMNS": "110", "XDG_CACHE_HOME": str(tmp_path)}
    for _, commands, answer, line in (block for block in _commands(path) if block[0] == COMPILERS):
        printed = ""
        for command in commands:
            code, streams = main(command), capsys.readouterr()
            assert code == 0 or (code == 2 and "pip install 'jaxops[" in streams.err), (
                f"{_name(path)}:{line}: {streams}"
            )
            printed += streams.out
            if code == 2 and WITH_COMPILERS.exists():
                command = [str(WITH_COMPILERS), *command]
                printed += subprocess.check_output(
                    command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
                )
        if printed:
            _compare(printed, answer, f"{_name(path)}:{line}")


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_lead_somewhere(path):
    prose = FENCE.sub("", path.read_text())
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        assert target.startswith("https://") or (path.parent / target).exists(), f"{_name(path)} links to {target}"


@pytest.mark.parametrize(
    "module", [jaxops, jaxops.nn, jaxops.nn.linen, sharding, sharding.nn], ids=lambda m: m.__name__
)
def test_every_public_name_is_on_a_page(module):
    text = "\n".join(path.read_text() for path in PAGES if "docs" in path.parts)
    missing = [name for name in _public(module) if f"`{name}`" not in text and f"{module.__name__}.{name}" not in text]
    assert not missing, f"no page of docs/ names {missing} of {module.__name__}"


OPERATORS = sorted(name for name, value in _public(jaxops).items() if value.__module__.startswith("jaxops.ops."))


@pytest.mark.parametrize("name", [name for name in OPERATORS if inspect.isfunction(getattr(jaxops, name))])
def test_the_page_of_an_operator_names_its_arguments(name):
    page = (ROOT / "docs" / "operators" / f"{PAGE_OF.get(name, name)}.md").read_text()
    for parameter in inspect.signature(getattr(jaxops, name)).parameters.values():
        assert f"`{parameter.name}`" in page, f"the page of {name} does not name {parameter.name}"
    assert f"jaxops.{name}" in page


def test_the_tutorial_quotes_the_example():
    source = (ROOT / "examples" / "own_operator.py").read_text()
    for language, text, line in _blocks(ROOT / "docs" / "tutorial.md"):
        if language == "python" and re.search(r"^(def|class|import) ", text, re.M):
            assert text in source, f"docs/tutorial.md:{line} is not in examples/own_operator.py"


def test_the_example_runs():
    command, environment = [sys.executable, "examples/own_operator.py"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("error") == 6


def test_the_readme_says_what_the_certificates_say():
    spec = importlib.util.spec_from_file_location("support_table", ROOT / "docs" / "support_table.py")
    support_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support_table)
    cells = json.loads((ROOT / "docs" / "certificates.json").read_text())["cells"]
    shown = support_table.block((ROOT / "README.md").read_text())
    assert shown == support_table.render(cells), "python docs/support_table.py writes the table anew"


def test_the_site_builds_and_asks_no_other_host(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(https?://[^\s\">]+)", page.read_text())
        fetched += re.findall(r"<link[^>]*rel=\"?stylesheet\"?[^>]*href=\"?(https?://[^\s\">]+)", page.read_text())
        assert not fetched, f"{page.name} loads {fetched}"
