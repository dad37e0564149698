"""The README's table of what runs as a kernel where, taken from docs/certificates.json.

python docs/support_table.py    writes it into README.md, between the two marks
"""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- support table: begin (python docs/support_table.py) -->", "<!-- support table: end -->"


def render(cells: dict[str, dict]) -> str:
    """Operator × dtype, chips across. `cells` maps "operator/direction/chip/dtype/shape" to a certificate."""
    found: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = {}
    chips: list[str] = []
    for key, cell in cells.items():
        operator, direction, chip, dtype, _ = key.split("/")
        chips += [] if chip in chips else [chip]
        found.setdefault((operator, dtype), {}).setdefault(chip, []).append((direction, cell["status"]))
    header = ["operator", "dtype", *chips, "cpu"]
    rows = [
        [f"`{operator}`", dtype, *(_mark(by_chip.get(chip, [])) for chip in chips), "XLA"]
        for (operator, dtype), by_chip in sorted(
            found.items(), key=lambda item: (item[0][0], _DTYPES.index(item[0][1]))
        )
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


_DTYPES = ("bfloat16", "float32")


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


def block(readme: str) -> str:
    """The table that stands in `readme` between the marks."""
    return readme.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    certificates = json.loads((ROOT / "docs" / "certificates.json").read_text())
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{render(certificates['cells'])}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
