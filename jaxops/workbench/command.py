"""The command line. Exit codes: 0 done, 1 what was required does not hold, 2 the question makes no sense."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxops.dispatch import IMPLEMENTATIONS
from jaxops.inspection import Explanation, explain
from jaxops.workbench.call import Problem, call, nearest
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
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError as error:
        raise Problem("tables need rich: pip install 'jaxops[cli]', or ask for --json") from error
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE)
    for name in ("chip", "operator", "phase", "runs", "why", "saved MB", "temp MB"):
        table.add_column(name, justify="right" if name.endswith("MB") else "left")
    for target, explanation in zip(targets, found, strict=True):
        temp = "" if explanation.temp_bytes is None else f"{explanation.temp_bytes / 1e6:.1f}"
        for line in explanation.lines:
            phase = line.phase if line.count == 1 else f"{line.phase} ×{line.count}"
            saved = f"{line.saved_bytes / 1e6:.1f}" if line.phase == "forward" else ""
            table.add_row(target, line.operator, phase, line.implementation, line.reason, saved, temp)
            temp = ""  # of the whole program, once
        if not explanation.lines:
            table.add_row(target, "", "", "", "no operator of this library is called", "", temp)
    rich.console.Console().print(table)
