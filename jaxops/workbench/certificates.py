"""What the real compilers made of every operator: the certificates that are shipped with the library, and their page.

A cell is operator × direction × chip × dtype × shape, called as a user would: where the operator has kernels, with
`implementation="pallas"`; the backward through `jax.vjp` with the cotangent as an operand. It is "compiled" if the
compiler made a program of it that holds the kernel, "xla" if the operator has no kernel and the program is XLA's,
"refused" if the kernel says that it does not serve this, and "failed" otherwise.
"""

import dataclasses
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxops.workbench import sources
from jaxops.workbench.cases import CASES, DIRECTIONS, DTYPES, Case
from jaxops.workbench.compiler import CHIPS, Job, versions
from jaxops.workbench.programs import size
from pallas_kernels import chips

Cells = dict[str, dict[str, Any]]

_FORMAT = 1  # of a cell, and of how a case becomes a program; a new number makes every cell stale
_GREEN = ("compiled", "xla")
_FIGURES = (
    *("kernels", "temp_bytes", "argument_bytes", "output_bytes"),
    *("vmem_bytes", "smem_bytes", "registers", "spill_bytes"),
)


def read() -> tuple[dict[str, str], Cells]:
    """(versions of the compilers, "operator/direction/chip/dtype/shape" → certificate)."""
    found = json.loads(importlib.resources.files(__package__).joinpath("certificates.json").read_text())
    return found["versions"], found["cells"]


# ---------------------------------------------------------------------------------------------------------- the matrix


def cells() -> list[tuple[Case, str, str]]:
    """(case, direction, dtype) of one chip."""
    return [(case, direction, dtype) for case in CASES for dtype in DTYPES for direction in DIRECTIONS]


def key_of(chip: str, case: Case, direction: str, dtype: str) -> str:
    """The name of a cell in certificates.json."""
    return "/".join((case.operator, direction, chip, dtype, case.shape))


def job_of(chip: str, case: Case, direction: str, dtype: str) -> Job:
    """What is compiled for a cell."""
    return Job(
        chip,
        case.operator,
        case.operands,
        case.options,
        dtype,
        gradients=direction == "backward",
        implementation="pallas" if case.kernel else None,
    )


def fingerprint(chip: str, case: Case, direction: str, dtype: str) -> str:
    """A digest of what a cell is made from: the case, the sources of the operator for this chip, the compilers."""
    described = chips.named(chip)
    words = [dataclasses.asdict(case), chip, direction, dtype, versions({described.platform})]
    made_from = [_FORMAT, words, sources.fingerprint(case.operator, described)]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def certificate(result: Mapping[str, Any], case: Case, made_from: str) -> dict[str, Any]:
    """The cell of a result of the compiler service."""
    status = result["status"]
    if status == "compiled":
        if not case.kernel and not result["kernels"]:
            status = "xla"
        figures = {name: result[name] for name in _FIGURES if name in result}
        return {"status": status, **figures, "fingerprint": made_from}
    return {
        "status": "refused" if status == "refused" else "failed",
        "reason": result["reason"],
        "fingerprint": made_from,
    }


def reddened(before: Cells, now: Cells) -> list[str]:
    """One line for each cell that was green in `before`, and in `now` is not, or has lost its kernel."""
    lines = []
    for key, old in before.items():
        new = now.get(key)
        if new is None or old["status"] not in _GREEN or new["status"] in (old["status"], "compiled"):
            continue
        reason = new.get("reason", "the program holds no kernel")
        lines.append(f"{key}: {old['status']} before, now {new['status']}: {reason}")
    return lines


# --------------------------------------------------------------------------------------------------------- the summary


def summary(cells: Cells) -> dict[tuple[str, str], dict[str, str]]:
    """(operator, dtype) → chip → what runs there: "kernel", "forward" (the gradient in XLA), either with ", some shapes
    in XLA", "XLA" or "fails"."""
    found: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = {}
    names: dict[str, None] = {}
    for key, cell in cells.items():
        operator, direction, chip, dtype, _ = key.split("/")
        names.setdefault(chip)
        found.setdefault((operator, dtype), {}).setdefault(chip, []).append((direction, cell["status"]))
    rows = sorted(found.items(), key=lambda item: (item[0][0], DTYPES.index(item[0][1])))
    return {row: {chip: _mark(by_chip.get(chip, [])) for chip in names} for row, by_chip in rows}


def _mark(cells: list[tuple[str, str]]) -> str:
    """What the certificates of one operator, dtype and chip say together."""
    if any(status == "failed" for _, status in cells):
        return "fails"
    compiled = {direction: {s == "compiled" for d, s in cells if d == direction} for direction in DIRECTIONS}
    if not any(True in statuses for statuses in compiled.values()):
        return "XLA"
    what = "forward" if compiled["backward"] == {False} else "kernel"
    whole = compiled["forward"] == {True} and (what == "forward" or compiled["backward"] == {True})
    return what if whole else f"{what}, some shapes in XLA"


# ------------------------------------------------------------------------------------------------------------ the page


def render(certificates: Mapping[str, Any]) -> str:
    """docs/certificates.md of docs/certificates.json."""
    found: Cells = certificates["cells"]
    names = [name for name in CHIPS if any(key.split("/")[2] == name for key in found)]
    versions_line = ", ".join(f"{name} {version}" for name, version in certificates["versions"].items())
    reasons: list[str] = []
    rows = [
        [case.operator, case.shape, dtype, direction, *(_sign(cell, reasons) for cell in by_chip)]
        for case, direction, dtype in cells()
        if any(by_chip := [found.get(key_of(name, case, direction, dtype)) for name in names])
    ]
    lines = [
        "# Certificates",
        "",
        'Every operator, with `implementation="pallas"` where it has kernels, compiled ahead of time by the real',
        "compiler of every chip on a machine that has none of them. Nothing was measured on hardware.",
        "Written by `jaxops certify`.",
        "",
        f"Compilers: {versions_line}.",
        "",
        "✓: compiled, and the program holds the kernel. XLA: the operator has no kernel, and XLA compiled it. –: the",
        "kernel refuses, and by default XLA runs instead. ✗: the compiler failed. Numbers in brackets are the reasons",
        "below the table.",
        "",
        *_table(["operator", "shape", "dtype", "direction", *names], rows),
        "",
        *(f"{number}. {text.replace('|', chr(92) + '|')}" for number, text in enumerate(reasons, 1)),
        "",
        "## Memory",
        "",
        "temp: what the program allocates in device memory besides its arguments and results. VMEM: what is set aside",
        "for a kernel. VMEM, shared memory, registers of a thread and spills: the most of any kernel of the program.",
        "",
    ]
    header = ["dtype", "direction", "chip", "kernels", "temp", "arguments", "results"]
    header += ["VMEM or shared memory", "registers", "spills"]
    for case in CASES:
        rows = [
            [dtype, direction, name, str(cell["kernels"]), *_figures(cell)]
            for dtype in DTYPES
            for direction in DIRECTIONS
            for name in names
            if (cell := found.get(key_of(name, case, direction, dtype))) and cell["status"] in _GREEN
        ]
        if rows:
            lines += [f"### {case.operator}, {case.shape}", "", f"`{case}`", "", *_table(header, rows), ""]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]


def _sign(cell: Mapping[str, Any] | None, reasons: list[str]) -> str:
    """Of a cell in the table; a reason that is new is put to the `reasons`."""
    if cell is None:
        return ""
    if cell["status"] in _GREEN:
        return "✓" if cell["status"] == "compiled" else "XLA"
    text = ("refused: " if cell["status"] == "refused" else "**failed**: ") + cell["reason"]
    if text not in reasons:
        reasons.append(text)
    return f"{'–' if cell['status'] == 'refused' else '✗'} [{reasons.index(text) + 1}]"


def _figures(cell: Mapping[str, Any]) -> list[str]:
    sizes = [size(cell[name]) for name in ("temp_bytes", "argument_bytes", "output_bytes")]
    if not cell["kernels"]:
        return [*sizes, "", "", ""]
    if "vmem_bytes" in cell:
        return [*sizes, size(cell["vmem_bytes"]) if cell["vmem_bytes"] else "default", "", ""]
    return [*sizes, size(cell["smem_bytes"]), str(cell["registers"]), size(cell["spill_bytes"])]
