"""The command line. Exit codes: 0 done, 1 what was required does not hold, 2 the question makes no sense."""

import argparse
import sys
from collections.abc import Sequence

from jaxops.workbench import bench, certify, compile, doctor, explain, listing, new, profile, tune, verify
from jaxops.workbench.call import Problem

# Modules with `register(commands)`, in the order in which --help shows them.
COMMANDS = (listing, explain, verify, compile, certify, bench, tune, profile, doctor, new)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (None: the program's own) and returns its exit code."""
    parser = argparse.ArgumentParser("jaxops", description="Develop, prove and measure operators without the chip.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in COMMANDS:
        module.register(commands)
    options = parser.parse_args(arguments)
    if "" not in sys.path:  # a console script's own folder is there instead: modules are found where the user stands
        sys.path.insert(0, "")
    try:
        return options.run(options)
    except Problem as problem:
        print(f"jaxops: {problem}", file=sys.stderr)
        return 2
