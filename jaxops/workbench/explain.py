"""`jaxops explain`: which implementation a call would run on a chip, and why not the others."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jaxops.dispatch import IMPLEMENTATIONS
from jaxops.inspection import Explanation, explain
from jaxops.workbench import output
from jaxops.workbench.call import Problem, add_call_arguments, call, targets
from pallas_kernels import chips

_EXAMPLES = """examples:
  jaxops explain rms_norm x=8192x4096 scale=4096 --target v6e,h100
  jaxops explain dot_product_attention query=4x4096x8x128 key=4x4096x8x128 value=4x4096x8x128 \\
      --set is_causal=True --gradients --target v5e --json
  jaxops explain linear_cross_entropy x=8192x2048 weight=2048x65536 labels=8192:int32 --target h100 --require pallas
  jaxops explain my_package.operators:my_operator x=1000x1000 --dtype float32
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `explain` to the command line."""
    command = commands.add_parser(
        "explain",
        help="which implementation would run on a chip, and why not the others",
        description="Which implementation a call would run on a chip, and why not the others. Nothing is computed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_call_arguments(command)
    command.add_argument("--target", default="", help=f"chips, with commas between: {', '.join(chips.CHIPS)}, cpu")
    command.add_argument("--require", choices=IMPLEMENTATIONS, help="exit with 1 if any call runs as something else")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    names = targets(options.target, (*chips.CHIPS, "cpu")) or ["cpu"]
    function, operands = call(options.operator, options.operands, options.set, options.dtype, options.gradients)
    try:
        found = [
            explain(function, target=None if name == "cpu" else name, compile=name == "cpu", **operands)
            for name in names
        ]
    except (TypeError, ValueError) as error:  # the operator's own word on its input
        raise Problem(str(error)) from error
    if options.json:
        output.as_json([_as_json(name, one) for name, one in zip(names, found, strict=True)])
    else:
        _print(f"{options.operator} {' '.join(options.operands)}", names, found)
    wrong = [line for one in found for line in one.lines if options.require not in (None, line.implementation)]
    for line in wrong:
        print(f"jaxops: {line} is not {options.require}", file=sys.stderr)
    return 1 if wrong else 0


def _as_json(target: str, explanation: Explanation) -> dict[str, Any]:
    calls = [dataclasses.asdict(line) for line in explanation.lines]
    return {"target": target, "calls": calls, "temp_bytes": explanation.temp_bytes}


def _print(title: str, names: Sequence[str], found: Sequence[Explanation]) -> None:
    columns = ("chip", "operator", "phase", "runs", "why", "saved MB", "temp MB")
    table = output.table(title, columns, right=("saved MB", "temp MB"))
    for target, explanation in zip(names, found, strict=True):
        temp = "" if explanation.temp_bytes is None else f"{explanation.temp_bytes / 1e6:.1f}"
        for line in explanation.lines:
            phase = line.phase if line.count == 1 else f"{line.phase} ×{line.count}"
            saved = f"{line.saved_bytes / 1e6:.1f}" if line.phase == "forward" else ""
            table.add_row(target, line.operator, phase, line.implementation, line.reason, saved, temp)
            temp = ""  # of the whole program, once
        if not explanation.lines:
            table.add_row(target, "", "", "", "no operator of this library is called", "", temp)
    output.show(table)
