"""`jaxops new`: an operator of your own, complete and running, in your own package."""

import argparse
import ast
import builtins
import importlib.resources
import importlib.util
import keyword
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxops.workbench import output
from jaxops.workbench.call import Problem, operators

_EXAMPLES = """examples:
  jaxops new scaled_mish
  jaxops new scaled_mish --package my_package
  jaxops new scaled_mish --package src/my_package/operators --json

Without --package the operator is a module in the current folder. A new folder becomes a package. The test and the
benchmark go into tests/ and benchmarks/ beside the outermost package (beside its folder src, where it has one).
No file is ever overwritten: where one is in the way, nothing is written and the exit code is 2.
"""
_CONTENTS = {
    "package": "the package",
    "operator": "formula, rules, kernels, operator, layer",
    "test": "its test",
    "benchmark": "its benchmark",
}
_LONGEST = 30  # with longer names, generated lines would be longer than 120
_PLACEHOLDERS = re.compile(r"new_package\.new_operator|new_operator|NewOperator")


class New(NamedTuple):
    """What `plan` decided: the operator as `module:function`, the folder its module is found from, its files."""

    operator: str
    folder: pathlib.Path
    files: dict[str, pathlib.Path]  # what it is → where it goes


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `new` to the command line."""
    command = commands.add_parser(
        "new",
        help="an operator of your own: formula, rules, kernels, layer, test and benchmark",
        description="Writes a new operator, y = scale · activation(x), that runs as it is: reference, XLA rules, TPU "
        "kernels, Flax layer, test and benchmark. Then you change the formula.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("name", help="of the operator, as scaled_mish")
    command.add_argument("--package", metavar="PATH", help="the folder of the package it belongs to")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the files of a new operator and prints where they are; always 0."""
    planned = plan(options.name, options.package)
    write({planned.files[what]: text for what, text in rendered(planned).items()})
    if options.json:
        files = {what: str(path) for what, path in planned.files.items()}
        output.as_json({"operator": planned.operator, "folder": str(planned.folder), "files": files})
        return 0
    width = max(len(str(path)) for path in planned.files.values())
    for what, path in planned.files.items():
        print(f"{path!s:{width}}  {_CONTENTS[what]}")
    print(f"\nprove it:  jaxops verify {planned.operator} x=300x129 scale=129 --interpret tpu")
    return 0


def plan(name: str, package: str | None = None) -> New:
    """Where the operator `name` goes: into the folder `package`, or the current one.

    Raises `Problem` for a name that cannot be an operator's, and for a folder that cannot be its package.
    """
    module, folder = _module(name, package)
    _check(name, inside_a_package="." in module)
    beside = folder.parent if folder.name == "src" else folder
    files = (
        {} if package is None or pathlib.Path(package).exists() else {"package": pathlib.Path(package, "__init__.py")}
    )
    files |= {
        "operator": pathlib.Path(package or ".", f"{name}.py"),
        "test": beside / "tests" / f"test_{name}.py",
        "benchmark": beside / "benchmarks" / f"bench_{name}.py",
    }
    return New(f"{module}:{name}", folder, files)


def rendered(planned: New) -> dict[str, str]:
    """What each file of `planned` says: the templates, which are Python themselves, with the names replaced."""
    module, _, name = planned.operator.partition(":")
    names = {"new_package.new_operator": module, "new_operator": name, "NewOperator": _class(name)}
    texts = {what: _PLACEHOLDERS.sub(lambda found: names[found[0]], text) for what, text in _templates().items()}
    if "package" in planned.files:
        texts["package"] = f'"""Operators of {planned.files["package"].parent.name}."""\n'
    return {what: texts[what] for what in planned.files}


def write(files: Mapping[pathlib.Path, str]) -> None:
    """Writes all of `files`, with the folders they need, or none. Raises `Problem` if one exists or cannot be made."""
    there = [str(path) for path in files if path.exists()]
    if there:
        raise Problem(f"nothing was written, because there already is {', '.join(there)}")
    made: list[pathlib.Path] = []
    try:
        for path, text in files.items():
            for folder in reversed([folder for folder in path.parents if not folder.exists()]):
                folder.mkdir()
                made.append(folder)
            with path.open("x", encoding="utf-8") as file:
                made.append(path)
                file.write(text)
    except OSError as error:
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()
        raise Problem(f"nothing was written, because {error.filename} cannot be: {error.strerror}") from error


def _module(name: str, package: str | None) -> tuple[str, pathlib.Path]:
    """("package.name", the folder that has to be on Python's path)."""
    if package is None:
        return name, pathlib.Path()
    folder = pathlib.Path(package)
    if folder.exists() and not (folder / "__init__.py").is_file():
        raise Problem(f"--package must be a folder with an __init__.py, or a new folder, got {package}")
    if not folder.parent.is_dir():
        raise Problem(f"--package must be in a folder that exists, got {package}")
    names = [name, folder.resolve().name]
    above = folder.resolve().parent
    while (above / "__init__.py").is_file():
        names.append(above.name)
        above = above.parent
    for part in names[1:]:
        if not part.isidentifier() or keyword.iskeyword(part):
            raise Problem(f"--package must be a folder whose name is a Python name, got {part!r}")
    here = pathlib.Path.cwd()
    return ".".join(reversed(names)), above.relative_to(here) if above.is_relative_to(here) else above


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _templates() -> dict[str, str]:
    folder = importlib.resources.files(__package__) / "templates"
    return {what: (folder / f"{what}.py").read_text("utf-8") for what in ("operator", "test", "benchmark")}


def _names(text: str) -> Iterator[str]:
    """Every name that a Python program uses or gives."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=given):
                yield (given or name).partition(".")[0]


def _check(name: str, *, inside_a_package: bool) -> None:
    """Raises `Problem` unless `name` may be the name of a new operator."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > _LONGEST:
        raise Problem(f"the name must be lower case words joined by _, of at most {_LONGEST} letters, got {name!r}")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or hasattr(builtins, name):
        raise Problem(f"the name must not be one of Python's own, got {name!r}")
    if name in operators():
        raise Problem(f"the name must not be that of an operator of the library, got {name!r}")
    if name.startswith("test"):
        raise Problem(f"the name must not begin with test, which pytest takes for a test, got {name!r}")
    used = {one for text in _templates().values() for one in _names(text)} - {"new_operator", "NewOperator"}
    if {name, _class(name)} & used:
        raise Problem(f"the name must not be one that the generated code uses for something else, got {name!r}")
    if not inside_a_package and importlib.util.find_spec(name) and not pathlib.Path(f"{name}.py").exists():
        raise Problem(f"the name must not be that of an installed module, got {name!r}; or give a --package")
