"""The README's table of what runs as a kernel where, taken from docs/certificates.json.

python docs/support_table.py    writes it into README.md, between the two marks
"""

import pathlib

from jaxops.workbench import certificates

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support table: begin (python docs/support_table.py) -->", "<!-- support table: end -->"


def render(cells: certificates.Cells) -> str:
    """Operator × dtype, chips across; an operator that is left to XLA on every chip has no row."""
    summary = certificates.summary(cells)
    with_kernels = {operator for (operator, _), by_chip in summary.items() if set(by_chip.values()) != {"XLA"}}
    rows = {(operator, dtype): row for (operator, dtype), row in summary.items() if operator in with_kernels}
    chips = list(next(iter(rows.values())))
    header = ["operator", "dtype", *chips, "cpu"]
    lines = [[f"`{operator}`", dtype, *by_chip.values(), "XLA"] for (operator, dtype), by_chip in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def block(readme: str) -> str:
    """The table that stands in `readme` between the marks."""
    return readme.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{render(certificates.read()[1])}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
