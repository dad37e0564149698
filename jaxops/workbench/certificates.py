"""What the real compilers made of every kernel: the certificates that are shipped with the library."""

import importlib.resources
import json
from typing import Any

DTYPES = ("bfloat16", "float32")
Cells = dict[str, dict[str, Any]]


def read() -> tuple[dict[str, str], Cells]:
    """(versions of the compilers, "operator/direction/chip/dtype/shape" → certificate)."""
    found = json.loads(importlib.resources.files(__package__).joinpath("certificates.json").read_text())
    return found["versions"], found["cells"]


def summary(cells: Cells) -> dict[tuple[str, str], dict[str, str]]:
    """(operator, dtype) → chip → what runs there: "kernel", "kernel, some shapes in XLA", "XLA" or "fails"."""
    found: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = {}
    chips: dict[str, None] = {}
    for key, cell in cells.items():
        operator, direction, chip, dtype, _ = key.split("/")
        chips.setdefault(chip)
        found.setdefault((operator, dtype), {}).setdefault(chip, []).append((direction, cell["status"]))
    rows = sorted(found.items(), key=lambda item: (item[0][0], DTYPES.index(item[0][1])))
    return {row: {chip: _mark(by_chip.get(chip, [])) for chip in chips} for row, by_chip in rows}


def _mark(cells: list[tuple[str, str]]) -> str:
    """What the certificates of one operator, dtype and chip say together."""
    if any(status == "failed" for _, status in cells):
        return "fails"
    compiled = {
        direction: {s == "compiled" for d, s in cells if d == direction} for direction in ("forward", "backward")
    }
    if compiled == {"forward": {True}, "backward": {True}}:
        return "kernel"
    if not any(True in statuses for statuses in compiled.values()):
        return "XLA"
    return "kernel, some shapes in XLA"
