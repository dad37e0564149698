"""The documentation is true: its Python runs and prints what it says, its commands exist, its tables agree."""

import contextlib
import importlib.util
import inspect
import io
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
from jaxops.workbench.command import main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PAGE_OF = dict.fromkeys(("gelu", "silu", "relu", "squared_relu"), "activations")  # the others have their own


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


@pytest.mark.parametrize("path", [p for p in PAGES if any(b[0] == "python" for b in _blocks(p))], ids=_name)
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
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for language, text, line in _blocks(path):
        for command in text.splitlines() if language == "console" else ():
            words = command.partition("#")[0].split()
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{_name(path)}:{line}: no target {words[1]} in the Makefile"
            elif words[:2] == ["python", "-m"] and words[2] != "pytest":
                assert importlib.util.find_spec(words[2]), f"{_name(path)}:{line}: no module {words[2]}"
            elif words[:1] == ["python"]:
                assert (ROOT / words[1]).exists(), f"{_name(path)}:{line}: no file {words[1]}"


@pytest.mark.parametrize("path", [p for p in PAGES if "\njaxops " in p.read_text()], ids=_name)
def test_the_command_runs_and_prints_what_follows_it(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    blocks = _blocks(path)
    for (language, text, line), following in zip(blocks, [*blocks[1:], ("", "", 0)], strict=True):
        for command in text.splitlines() if language == "console" and text.startswith("jaxops ") else ():
            assert main(shlex.split(command)[1:]) == 0
            printed = [row.rstrip() for row in capsys.readouterr().out.strip().splitlines()]
            assert printed == following[1].strip().splitlines(), f"{_name(path)}:{line}"


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_lead_somewhere(path):
    prose = FENCE.sub("", path.read_text())
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        assert target.startswith("https://") or (path.parent / target).exists(), f"{_name(path)} links to {target}"


@pytest.mark.parametrize("module", [jaxops, jaxops.nn, jaxops.nn.linen], ids=lambda m: m.__name__)
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
