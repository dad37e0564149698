"""`jaxops certify`: every operator, compiled for every chip by the real compilers, as far as anything changed."""

import argparse
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jaxops
from jaxops.workbench import certificates, output
from jaxops.workbench.call import Problem, nearest
from jaxops.workbench.compiler import CHIPS, compile_jobs, missing, versions, write_atomically
from pallas_kernels import chips

_EXAMPLES = """examples:
  jaxops certify                   compile what changed, write docs/certificates.json and docs/certificates.md
  jaxops certify --check           write nothing; exit code 1 if something that compiled no longer does
  jaxops certify --chips v5e,h100  of these chips alone
  jaxops certify --all             compile everything, also what did not change

A certificate is out of date when a source file of its operator, its case or a compiler has changed since.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `certify` to the command line."""
    command = commands.add_parser(
        "certify",
        help="compile every operator for every chip, and write or check the certificates",
        description="Compiles every operator for every chip with the real compilers, as far as anything changed since "
        "the certificates were written, and writes docs/certificates.json and .md of this checkout.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a green cell turned red")
    command.add_argument("--chips", default=",".join(CHIPS), help="with commas between (default: %(default)s)")
    command.add_argument("--all", action="store_true", help="compile everything, also what did not change")
    command.add_argument("--jobs", type=int, help="compilers at a time (default: one for each core)")
    command.add_argument("--seconds", type=float, default=300, help="time limit of one cell (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compiles the cells that changed and writes them, or compares: then 1 if a green cell turned red."""
    docs = docs_folder()
    names = list(dict.fromkeys(name for name in options.chips.split(",") if name))
    for name in names:
        if name not in CHIPS:
            raise nearest("--chips", name, CHIPS)
    if options.jobs is not None and options.jobs < 1:
        raise Problem(f"--jobs must be at least 1, got {options.jobs}")
    if options.seconds <= 0:
        raise Problem(f"--seconds must be above 0, got {options.seconds:g}")
    if sentence := missing({chips.named(name).platform for name in names}):
        raise Problem(sentence)
    before = committed(docs)
    stale = outdated({} if options.all else before["cells"], names)
    with output.progress("certify", len(stale), quiet=options.json) as advance:
        made = certify(stale, seconds=options.seconds, workers=options.jobs, advance=advance, cache=not options.all)
    now = merged(before, made, names)
    lost = certificates.reddened(before["cells"], now["cells"])
    if not options.check:
        try:
            write_atomically(docs / "certificates.json", json.dumps(now, indent=1) + "\n")
            write_atomically(docs / "certificates.md", certificates.render(now))
        except OSError as error:
            raise Problem(f"the certificates cannot be written: {error}") from error
    counts = Counter(cell["status"] for cell in now["cells"].values())
    failed = {key: cell["reason"] for key, cell in now["cells"].items() if cell["status"] == "failed"}
    if options.json:
        output.as_json({"compiled_now": len(stale), "statuses": counts, "failed": failed, "reddened": lost})
    else:
        print(f"{len(stale)} of {len(certificates.cells()) * len(names)} cells compiled, the others did not change")
        print(", ".join(f"{counts[status]} {status}" for status in ("compiled", "xla", "refused", "failed")))
        for key, reason in failed.items():
            print(f"  {key}: {reason}")
        print("\n".join(lost) or "nothing that compiled before fails now")
    return 1 if lost and options.check else 0


def docs_folder() -> pathlib.Path:
    """docs/ of the checkout that this library is run from. Raises `Problem` where it is not run from one."""
    root = pathlib.Path(jaxops.__file__).resolve().parents[1]
    if not ((root / "docs").is_dir() and (root / "pyproject.toml").is_file()):
        raise Problem(f"certify writes the docs of a checkout of jaxops, and {root} is none; `jaxops list` shows them")
    return root / "docs"


def committed(docs: pathlib.Path) -> dict[str, Any]:
    """docs/certificates.json; empty where there is none. Raises `Problem` where it cannot be read."""
    path = docs / "certificates.json"
    if not path.exists():
        return {"versions": {}, "cells": {}}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Problem(f"{path} cannot be read: {error}; delete it to make it anew") from error


Wanted = tuple[tuple, str]  # (chip, case, direction, dtype), and the fingerprint of what its certificate is made from


def outdated(cells: certificates.Cells, names: Sequence[str]) -> list[Wanted]:
    """The cells of these chips that are not in `cells` as they would be made now."""
    wanted = [(name, *cell) for name in names for cell in certificates.cells()]
    marked = [(cell, certificates.fingerprint(*cell)) for cell in wanted]
    return [
        (cell, made_from)
        for cell, made_from in marked
        if cells.get(certificates.key_of(*cell), {}).get("fingerprint") != made_from
    ]


def certify(
    wanted: Sequence[Wanted],
    *,
    seconds: float = 300,
    workers: int | None = None,
    advance: Callable[[str], None] = lambda done: None,
    cache: bool = True,
) -> certificates.Cells:
    """The certificates of `wanted`, compiled now, by key. The tiles that this user tuned play no part."""
    jobs = [certificates.job_of(*cell) for cell, _ in wanted]
    results = compile_jobs(jobs, seconds=seconds, workers=workers, advance=advance, cache=cache, user_tiles=False)
    return {
        certificates.key_of(*cell): certificates.certificate(result, cell[1], made_from)
        for (cell, made_from), result in zip(wanted, results, strict=True)
    }


def merged(before: dict[str, Any], made: certificates.Cells, names: Sequence[str]) -> dict[str, Any]:
    """The certificates `before` with what was `made` now, in the order of the matrix; what left the matrix is gone."""
    cells = {**before["cells"], **made}
    order = [certificates.key_of(name, *cell) for name in CHIPS for cell in certificates.cells()]
    used = versions({chips.named(name).platform for name in names})
    return {
        "versions": dict(sorted({**before["versions"], **used}.items())),
        "cells": {key: cells[key] for key in order if key in cells},
    }
