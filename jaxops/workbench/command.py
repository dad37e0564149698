"""The command line. Exit codes: 0 done, 1 what was required does not hold, 2 the question makes no sense."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxops.dispatch import IMPLEMENTATIONS
from jaxops.inspection import Explanation, explain
from jaxops.workbench import certificates
from jaxops.workbench.call import Problem, call, nearest, operators
from pallas_kernels import chips

_EXPLAIN = """examples:
  jaxops explain rms_norm x=8192x4096 scale=4096 --target v6e,h100
  jaxops explain dot_product_attention query=4x4096x8x128 key=4x4096x8x128 value=4x4096x8x128 \\
      --set is_causal=True --gradients --target v5e --json
  jaxops explain linear_cross_entropy x=8192x2048 weight=2048x65536 labels=8192:int32 --target h100 --require pallas
  jaxops explain my_package.operators:my_operator x=1000x1000 --dtype float32
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (None: the program's own) and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except Problem as problem:
        print(f"jaxops: {problem}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jaxops", description="Ask an operator what it does on a chip you do not have.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "list",
        help="the operators, and what runs as a kernel on which chip",
        description="The operators, and what runs as a kernel on which chip by the library's certificates.",
        epilog="examples:\n  jaxops list\n  jaxops list --json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=_list)
    command = commands.add_parser(
        "explain",
        help="which implementation would run on a chip, and why not the others",
        description="Which implementation a call would run on a chip, and why not the others. Nothing is computed.",
        epilog=_EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("operator", help="an operator of the library, or module:function")
    command.add_argument(
        "operands", nargs="+", metavar="name=sizes[:dtype]", help="as x=8192x4096 or labels=8192:int32"
    )
    command.add_argument("--set", action="append", default=[], metavar="name=value", help="an option of the operator")
    command.add_argument("--dtype", default="bfloat16", help="of every operand without its own (default: %(default)s)")
    command.add_argument("--target", default="", help=f"chips, with commas between: {', '.join(chips.CHIPS)}, cpu")
    command.add_argument("--gradients", action="store_true", help="forward and backward, for all floating operands")
    command.add_argument("--require", choices=IMPLEMENTATIONS, help="exit with 1 if any call runs as something else")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=_explain)
    return parser


def _list(options: argparse.Namespace) -> int:
    versions, cells = certificates.read()
    certified = certificates.summary(cells)
    names = list(next(iter(certified.values())))
    rows = [
        {"operator": operator, "dtype": dtype, **certified.get((operator, dtype), dict.fromkeys(names, "XLA"))}
        for operator in sorted(operators())
        for dtype in certificates.DTYPES
    ]
    if options.json:
        print(json.dumps({"compilers": versions, "operators": [{**row, "cpu": "XLA"} for row in rows]}, indent=2))
        return 0
    table = _table("operators", ("operator", "dtype", *names, "cpu"))
    for row in rows:
        table.add_row(*row.values(), "XLA")
    _show(table)
    print("kernel: the chip's own compiler made it, with " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    return 0


def _explain(options: argparse.Namespace) -> int:
    targets = [name for name in options.target.split(",") if name] or ["cpu"]
    for name in targets:
        if name not in (*chips.CHIPS, "cpu"):
            raise nearest("--target", name, (*chips.CHIPS, "cpu"))
    function, operands = call(options.operator, options.operands, options.set, options.dtype, options.gradients)
    try:
        found = [
            explain(function, target=None if name == "cpu" else name, compile=name == "cpu", **operands)
            for name in targets
        ]
    except (TypeError, ValueError) as error:  # the operator's own word on its input
        raise Problem(str(error)) from error
    if options.json:
        print(json.dumps([_as_json(name, one) for name, one in zip(targets, found, strict=True)], indent=2))
    else:
        _print(f"{options.operator} {' '.join(options.operands)}", targets, found)
    wrong = [line for one in found for line in one.lines if options.require not in (None, line.implementation)]
    for line in wrong:
        print(f"jaxops: {line} is not {options.require}", file=sys.stderr)
    return 1 if wrong else 0


def _as_json(target: str, explanation: Explanation) -> dict[str, Any]:
    calls = [dataclasses.asdict(line) for line in explanation.lines]
    return {"target": target, "calls": calls, "temp_bytes": explanation.temp_bytes}


def _print(title: str, targets: Sequence[str], found: Sequence[Explanation]) -> None:
    table = _table(title, ("chip", "operator", "phase", "runs", "why", "saved MB", "temp MB"))
    for target, explanation in zip(targets, found, strict=True):
        temp = "" if explanation.temp_bytes is None else f"{explanation.temp_bytes / 1e6:.1f}"
        for line in explanation.lines:
            phase = line.phase if line.count == 1 else f"{line.phase} ×{line.count}"
            saved = f"{line.saved_bytes / 1e6:.1f}" if line.phase == "forward" else ""
            table.add_row(target, line.operator, phase, line.implementation, line.reason, saved, temp)
            temp = ""  # of the whole program, once
        if not explanation.lines:
            table.add_row(target, "", "", "", "no operator of this library is called", "", temp)
    _show(table)


def _table(title: str, columns: Sequence[str]) -> Any:
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError as error:
        raise Problem("tables need rich: pip install 'jaxops[cli]', or ask for --json") from error
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE)
    for name in columns:
        table.add_column(name, justify="right" if name.endswith("MB") else "left")
    return table


def _show(table: Any) -> None:
    import rich.console

    rich.console.Console().print(table)
