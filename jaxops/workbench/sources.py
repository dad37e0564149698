"""What a function is made of: the source files its imports lead to, read without importing, and their fingerprint."""

import ast
import functools
import hashlib
import importlib.util
import io
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator

from pallas_kernels import chips

_OURS = ("jaxops", "pallas_kernels")
_FOREIGN = ("site-packages", "dist-packages")
_OTHER = {"tpu": "pallas_kernels.gpu", "gpu": "pallas_kernels.tpu"}  # what a program for the key is not made of


def fingerprint(function: str, chip: chips.Chip) -> str:
    """A digest of all that `function` ("rms_norm" or "module:function") is made of when it is compiled for `chip`.

    The files of this library and of the caller's own code (not those of installed packages) that the function's module
    imports, and those that they import. Where a package's `__init__` is a table of contents, only the line of the name
    that is used counts. Comments and blank lines do not count. What a program reads by other ways, a data file say, is
    not seen; only the tuned tiles of this library are.
    """
    parts = [f"{path.name} {digest(path)}\n" for path in files(function, chip)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def files(function: str, chip: chips.Chip) -> list[pathlib.Path]:
    """The files behind `fingerprint`, ordered by the names of their modules."""
    module, colon, name = function.partition(":")
    own = (*_OURS, module.partition(".")[0]) if colon else _OURS
    left = _follow(module, (name,), own) if colon else _follow("jaxops", (function,), own)
    found: set[str] = set()
    while left:
        found |= left
        left = {module for one in left for module in _imported(one, own)} - found
        left = {module for module in left if not module.startswith(("jaxops.workbench", _OTHER[chip.platform]))}
    paths = [path for module in sorted(found) if (path := _file(module, own))]
    tuned = [path.parent / f"{chip.name}.json" for path in paths if path.parent.name == "tuned"]
    return paths + [path for path in tuned if path.exists()]


def digest(path: pathlib.Path) -> str:
    """Of the tokens of a Python file, comments left out; of the bytes of any other."""
    return _digest(path, path.stat().st_mtime_ns)


@functools.cache
def _digest(path: pathlib.Path, _changed: int) -> str:
    content = path.read_bytes()
    if path.suffix == ".py":
        tokens = tokenize.tokenize(io.BytesIO(content).readline)
        content = "\0".join(t.string for t in tokens if t.type not in (tokenize.COMMENT, tokenize.NL)).encode()
    return hashlib.sha256(content).hexdigest()


@functools.cache
def _file(module: str, own: tuple[str, ...]) -> pathlib.Path | None:
    """The source of a module that is ours or the caller's, else None. Nothing is imported."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    origins = spec.submodule_search_locations or [spec.origin or ""]
    for origin in map(pathlib.Path, origins):
        foreign = any(part in _FOREIGN for part in origin.parts) or _is_standard(origin)
        if foreign and top not in own:
            continue
        path = origin.joinpath(*inner)
        for candidate in (path, path / "__init__.py", path.with_name(path.name + ".py")):
            if candidate.suffix == ".py" and candidate.is_file():
                return candidate
    return None


def _is_standard(path: pathlib.Path) -> bool:
    return not path.is_absolute() or path.is_relative_to(sysconfig.get_path("stdlib"))


def _tree(path: pathlib.Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError:  # its import will say so
        return ast.Module([], [])


@functools.cache
def _follow(module: str, names: tuple[str, ...], own: tuple[str, ...]) -> set[str]:
    """The modules that `module.names[0].names[1]…` comes from, through tables of contents."""
    path = _file(module, own)
    if path is None:
        return set()
    if path.name == "__init__.py" and names:
        inner = f"{module}.{names[0]}"
        if _file(inner, own):
            return _follow(inner, names[1:], own)
        for node in (node for node in _tree(path).body if isinstance(node, ast.ImportFrom)):
            for alias in node.names:
                if (alias.asname or alias.name) == names[0]:
                    return _follow(_absolute(node, module, path), (alias.name, *names[1:]), own)
    return {module}


@functools.cache
def _imported(module: str, own: tuple[str, ...]) -> set[str]:
    """The modules that the code of `module` uses."""
    path = _file(module, own)
    if path is None:
        return set()
    tree = _tree(path)
    bound: dict[str, tuple[str, tuple[str, ...]]] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                bound[alias.asname or top] = (alias.name if alias.asname else top, ())
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, module, path)
            for alias in node.names:
                bound[alias.asname or alias.name] = (origin, () if alias.name == "*" else (alias.name,))
    used = dict.fromkeys(bound, False)
    for name, attributes in _uses(tree):
        if name in bound:
            origin, names = bound[name]
            used[name] = True
            found |= _follow(origin, (*names, *attributes), own)
    for name in (name for name, is_used in used.items() if not is_used):  # imported for its effect, or for others
        found |= _follow(*bound[name], own)
    return found


def _uses(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(a, (b, c)) for each a.b.c of a program."""
    inside: set[int] = set()
    for node in ast.walk(tree):  # outer nodes come first
        attributes: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            attributes.append(inner.attr)
            inner = inner.value
            inside.add(id(inner))
        if isinstance(inner, ast.Name) and id(node) not in inside:
            yield inner.id, tuple(reversed(attributes))


def _absolute(node: ast.ImportFrom, module: str, path: pathlib.Path) -> str:
    """The module that `from … import` names, inside `module`."""
    if not node.level:
        return node.module or ""
    up = node.level - (path.name == "__init__.py")
    parents = module.split(".")[: len(module.split(".")) - up]
    return ".".join([*parents, *([node.module] if node.module else [])])
