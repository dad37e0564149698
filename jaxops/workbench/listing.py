"""`jaxops list`: the operators, and what runs as a kernel on which chip."""

import argparse

from jaxops.workbench import certificates, output
from jaxops.workbench.call import operators


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `list` to the command line."""
    command = commands.add_parser(
        "list",
        help="the operators, and what runs as a kernel on which chip",
        description="The operators, and what runs as a kernel on which chip by the library's certificates.",
        epilog="examples:\n  jaxops list\n  jaxops list --json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the operators and what the certificates say of them; always 0."""
    versions, cells = certificates.read()
    certified = certificates.summary(cells)
    names = list(next(iter(certified.values())))
    rows = [
        {"operator": operator, "dtype": dtype, **certified.get((operator, dtype), dict.fromkeys(names, "XLA"))}
        for operator in sorted(operators())
        for dtype in certificates.DTYPES
    ]
    if options.json:
        output.as_json({"compilers": versions, "operators": [{**row, "cpu": "XLA"} for row in rows]})
        return 0
    table = output.table("operators", ("operator", "dtype", *names, "cpu"), whole=("operator", "dtype"))
    for row in rows:
        table.add_row(*row.values(), "XLA")
    output.show(table)
    print(
        "kernel: the chip's own compiler made it (forward: the gradient is XLA's), with "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
    )
    return 0
