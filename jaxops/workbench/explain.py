"""`jaxops explain`: which implementation a call would run on a chip, and why not the others."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jaxops.dispatch import IMPLEMENTATIONS
from jaxops.inspection import Explanation, Line, explain
from jaxops.workbench import output
from jaxops.workbench.call import Problem, add_call_arguments, call, targets
from jaxops.workbench.compiler import Job, compile_jobs
from pallas_kernels import chips

_DESCRIPTION = """\
Which implementation a call would run on a chip, why not the others, and what it takes. Nothing is computed.

  saved MB   what the forward pass keeps for the backward beyond its operands
  GFLOP, MB  matrix products, and bytes to and from device memory, that the call needs at least
  least ms   the roofline: the time that the chip cannot beat, because of its compute or its memory

Below the table: how a kernel is cut and what it plans to take of the chip's own memory (VMEM of a TPU core, shared
memory of a GPU block), or why none runs; and the temporary memory of the whole program where it was compiled.
"""
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
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_call_arguments(command)
    command.add_argument("--target", default="", help=f"chips, with commas between: {', '.join(chips.CHIPS)}, cpu")
    command.add_argument(
        "--compile", action="store_true", help="also compile it for these chips, for its temporary memory"
    )
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
    temps = {name: one.temp_bytes for name, one in zip(names, found, strict=True) if one.temp_bytes is not None}
    if options.compile:
        temps |= _temp_bytes(options, names)
    if options.json:
        output.as_json([_as_json(name, one, temps.get(name)) for name, one in zip(names, found, strict=True)])
    else:
        _print(f"{options.operator} {' '.join(options.operands)}", names, found, temps)
    wrong = [line for one in found for line in one.lines if options.require not in (None, line.implementation)]
    for line in wrong:
        print(f"jaxops: {line} is not {options.require}", file=sys.stderr)
    return 1 if wrong else 0


def _as_json(target: str, explanation: Explanation, temp: int | None) -> dict[str, Any]:
    calls = [dataclasses.asdict(line) for line in explanation.lines]
    return {"target": target, "calls": calls, "temp_bytes": temp}


def _temp_bytes(options: argparse.Namespace, names: Sequence[str]) -> dict[str, int]:
    """The temporary memory of the whole program by target, from the compilers of those chips."""
    words = (options.operator, tuple(options.operands), tuple(options.set), options.dtype, options.gradients)
    chosen = [name for name in names if name != "cpu"]
    with output.progress("compiling", len(chosen), quiet=options.json) as advance:
        results = compile_jobs([Job(name, *words) for name in chosen], advance=advance)
    for name, result in zip(chosen, results, strict=True):
        if result["status"] != "compiled":
            raise Problem(f"{options.operator} does not compile for {name}: {result['reason']}")
    return {name: result["temp_bytes"] for name, result in zip(chosen, results, strict=True)}


def _print(title: str, names: Sequence[str], found: Sequence[Explanation], temps: dict[str, int]) -> None:
    numbers = ("saved MB", "GFLOP", "MB", "least ms by")
    table = output.table(title, ("chip", "operator", "phase", "runs", *numbers), right=numbers)
    remarks = []
    for target, explanation in zip(names, found, strict=True):
        for line in explanation.lines:
            figures = (
                f"{line.saved_bytes / 1e6:.1f}" if line.phase == "forward" else "",
                f"{line.flops / 1e9:.1f}",
                f"{line.bytes / 1e6:.1f}",
                "" if line.bound_seconds is None else f"{1e3 * line.bound_seconds:.3f} {line.bound}",
            )
            phase = line.phase if line.count == 1 else f"{line.phase} ×{line.count}"
            table.add_row(target, line.operator, phase, line.implementation, *figures)
            remarks.append(f"{target} {line.operator} {line.phase}: {_remark(line)}")
        if not explanation.lines:
            table.add_row(target, "no operator of this library is called", *[""] * 6)
        if target in temps:
            remarks.append(f"{target}: the program takes {temps[target] / 1e6:.1f} MB of temporary memory")
    output.show(table)
    print("\n".join(dict.fromkeys(remarks)))


def _remark(line: Line) -> str:
    """How the kernel is cut and what it takes of the chip, or why none runs; and what the operator has to add."""
    memory = "" if line.chip_bytes is None else f" ({line.chip_bytes / 1024:.0f} KiB of the chip's own memory)"
    runs = line.reason or (f"tiles: {line.tiles}{memory}" if line.tiles else f"runs as {line.implementation}")
    return f"{runs}; {line.note}" if line.note else runs
