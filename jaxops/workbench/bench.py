"""`jaxops bench`: how fast an operator is, beside what others offer and beside what the device can do."""

import argparse
import contextlib
import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from jaxops.workbench import output
from jaxops.workbench.call import Problem, nearest, operators, option, targets

_EXAMPLES = """examples:
  jaxops bench rms_norm
  jaxops bench dot_product_attention --grad --against jax,flax
  jaxops bench linear_cross_entropy x=2048x512 weight=512x32000 labels=2048:int32 --rounds 5
  jaxops bench my_package.operators:mine x=4096x1024 --against my_package.operators:before
  jaxops bench rms_norm x=Rx2048 scale=2048 --scale R=512,1024,2048,4096 --report out
  jaxops bench dot_product_attention --grad --target v5e,v6e --report out

A size may have a name, which --scale gives several values: a plot shows how the time grows. An operator of the library
may come without operands; the sizes of its usual call have names, too: R rows, D features; B batch, T tokens or
queries, N heads, H head size; V vocabulary; M, K and N of a matrix product [M, K] · [K, N].

With --target nothing is run: the chip's own compiler makes the program here, and the times are MODELLED from its
schedule. The compilers are the extras tpu-compile and gpu-compile.

Exit codes: 0 done, 1 a result was wrong or a variant failed (it was not timed), 2 the question makes no sense.
"""
DEFAULT_PEERS = ("jax", "flax", "optax")


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `bench` to the command line."""
    command = commands.add_parser(
        "bench",
        help="how fast, beside what others offer and beside the peak",
        description="Times an operator and its counterparts in other libraries, in turns, after comparing each with "
        "float64; a wrong result is never timed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("operator", help="an operator of the library, or module:function")
    command.add_argument(
        "operands", nargs="*", metavar="name=sizes[:dtype]", help="as x=8192x4096; default: usual ones"
    )
    command.add_argument("--set", action="append", default=[], metavar="name=value", help="an option of the operator")
    command.add_argument("--dtype", help="of operands without their own (default: bfloat16, on a CPU float32)")
    command.add_argument("--grad", "--gradients", action="store_true", dest="gradients", help="forward and backward")
    command.add_argument(
        "--against",
        metavar="LIBRARIES",
        help="jax, flax, optax, tokamax, torch or a module:function, with commas between (default: those of "
        f"{', '.join(DEFAULT_PEERS)} that are installed and have it; with --target: jax)",
    )
    command.add_argument(
        "--rounds", type=int, default=10, help="how often each variant is timed (default: %(default)s)"
    )
    command.add_argument("--scale", metavar="NAME=SIZES", help="several sizes for a named one, as T=1024,2048,4096")
    command.add_argument("--target", default="", metavar="CHIPS", help="modelled figures for these chips instead")
    command.add_argument("--seconds", type=float, default=300, help="limit of a compilation for --target")
    command.add_argument("--workers", type=int, help="compilations at a time for --target (default: one for each core)")
    command.add_argument("--report", type=pathlib.Path, metavar="DIR", help="write report.html and its plots there")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Times or models what was asked for and prints it; 1 if a result was wrong or did not run."""
    from jaxops.workbench import measurement, report
    from jaxops.workbench.compiler import CHIPS

    chips = targets(options.target, CHIPS)
    against = _against(options.against, options.operator, bool(chips))
    if options.rounds < 1:
        raise Problem(f"--rounds must be at least 1, got {options.rounds}")
    name, sizes = _scale(options.scale)
    questions = _questions(options, name, sizes)
    if options.report:
        report.check(options.report)

    done: list[measurement.Benchmark] = []
    if chips:
        with output.progress(
            "compile", len(questions) * len(chips) * (2 + len(against)), quiet=options.json
        ) as advance:
            for question in questions:
                done += measurement.model(
                    question, chips, against, seconds=options.seconds, workers=options.workers, advance=advance
                )
    else:
        steps = len(questions) * (2 + len(against) + (3 + len(against)) * options.rounds)
        with output.progress("bench", steps, quiet=options.json) as advance:
            for question in questions:
                done.append(measurement.measure(question, against, rounds=options.rounds, advance=advance))
        done = measurement.at_one_peak(done)
    if options.report:
        report.write(options.report, done, versions(), name, sizes)
    if options.json:
        scale = {"name": name, "sizes": sizes} if name else None
        output.as_json({"versions": versions(), "scale": scale, "runs": [one.as_dict() for one in done]})
    else:
        for one in done:
            _print(one)
        if options.report:
            print(f"written: {options.report / 'report.html'}")
    return 1 if any(row.status in ("wrong", "failed") for one in done for row in one.rows) else 0


def versions() -> dict[str, str]:
    """Of Python, JAX, this library and the peers that are installed."""
    found = {"python": platform.python_version()}
    for name in ("jaxops", "jax", "jaxlib", "libtpu", "flax", "optax", "tokamax", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _against(text: str | None, operator: str, modelled: bool) -> tuple[str, ...]:
    """The libraries and functions to compare with. Raises `Problem` for one that is unknown or not installed."""
    from jaxops.workbench import peers

    if text is None:
        likely = ("jax",) if modelled else DEFAULT_PEERS
        return tuple(name for name in likely if operator in peers.PEERS[name] and peers.installed(name))
    names = tuple(dict.fromkeys(name for name in text.split(",") if name))
    for name in names:
        if ":" in name:
            continue
        if name not in peers.INSTALL:
            raise nearest("--against", name, peers.INSTALL)
        peers.require(name)
    return names


def _scale(text: str | None) -> tuple[str, tuple[int, ...]]:
    """("T", (1024, 2048)) of "T=1024,2048"; ("", ()) of None."""
    if text is None:
        return "", ()
    name, equals, values = text.partition("=")
    sizes = [value for value in values.split(",") if value]
    if not (name.isidentifier() and "x" not in name and equals and sizes) or not all(v.isdigit() for v in sizes):
        raise Problem(f"--scale must be name=sizes, the name without an x, as in T=1024,2048,4096, got {text!r}")
    return name, tuple(sorted({int(value) for value in sizes}))


def _questions(options: argparse.Namespace, name: str, sizes: Sequence[int]) -> list[Any]:
    """One question for each of `sizes` of the dimension `name`; without a name, the one question."""
    from jaxops.workbench import devices, measurement

    on_cpu = not options.target and devices.at_hand().platform == "cpu"
    operands, static = tuple(options.operands), tuple(options.set)
    usual: Mapping[str, int] = {}
    if not operands:
        if options.operator not in measurement.USUAL:
            if ":" not in options.operator:
                raise nearest("the operator", options.operator, operators())
            raise Problem(f"{options.operator} needs operands, as x=8192x4096")
        typical = measurement.USUAL[options.operator]
        operands, usual = typical.operands, typical.cpu if on_cpu else typical.accelerator
        static = (*static, *(word for word in typical.options if word.split("=")[0] not in dict(map(option, static))))
    if name and not any(name in word.partition("=")[2].partition(":")[0].split("x") for word in operands):
        raise Problem(f"--scale {name}: no operand has a size of that name ({' '.join(operands)})")
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    return [
        measurement.Question(
            options.operator,
            tuple(measurement.with_sizes(word, {**usual, **changed}) for word in operands),
            static,
            dtype,
            options.gradients,
        )
        for changed in ([{name: size} for size in sizes] if name else [{}])
    ]


def cells(one: Any) -> tuple[list[str], list[list[str]]]:
    """(columns, a row of words for each variant): of one without a time only its name and status."""
    columns = ["variant", "modelled ms"] if one.modelled else ["variant", "median ms", "quartiles", "min … max"]
    columns += ["time", *(["TFLOP/s"] if one.cost.flops else []), "GB/s", "% of peak", "temp MB"]
    if not one.modelled:
        columns.append("error")
    lines = []
    for row in one.rows:
        if row.seconds is None:
            lines.append([row.variant, row.status, *[""] * (len(columns) - 2)])
            continue
        figures = one.figures(row)
        line = [row.variant, milliseconds(row.seconds)]
        if not one.modelled:
            line.append("–".join(milliseconds(seconds) for seconds in row.spread.quartiles))
            line.append(f"{milliseconds(row.spread.minimum)} … {milliseconds(row.spread.maximum)}")
        line.append(f"{figures.times_first:.2f}×")
        line += [f"{figures.tflops:.3g}"] if one.cost.flops else []
        line += [f"{figures.gbytes:.3g}", "" if figures.percent is None else f"{figures.percent:.1f}"]
        line.append("" if row.temp_bytes is None else f"{row.temp_bytes / 1e6:.1f}")
        lines.append(line if one.modelled else [*line, f"{row.error:.1e}"])
    return columns, lines


def least_and_peak(one: Any) -> list[str]:
    """In words: the least that has to be done, and what the device can do."""
    cost, peak = one.cost, one.peak
    computed = f"{cost.flops / 1e9:.4g} GFLOP to compute and " if cost.flops else ""
    least = f"At least {computed}{cost.bytes / 1e6:.4g} MB to move"
    if not cost.exact:
        least += " (loops whose length is not known count once)"
    if one.bound:
        seconds, by = one.bound
        least += (
            f": no less than {milliseconds(seconds)} ms, bound by {'the products' if by == 'compute' else 'memory'}"
        )
    return [f"{least}.", peak_in_words(peak)]


def peak_in_words(peak: Any) -> str:
    """What a device can do at most, and who says so."""
    rate = f"{peak.flops / 1e12:.4g} TFLOP/s and " if peak.flops else ""
    return f"Peak: {rate}{peak.bandwidth / 1e9:.4g} GB/s ({peak.source})."


def _print(one: Any) -> None:
    """One benchmark as a table, and below it what it means."""
    from jaxops.workbench import measurement

    columns, lines = cells(one)
    place = f"{one.where}, modelled" if one.modelled else one.where
    table = output.table(f"{one.question}\n{place}", columns, right=columns[1:])
    for words in lines:
        table.add_row(*words)
    output.show(table)
    for row in one.rows:
        if row.seconds is None:
            print(f"{row.variant}: {row.status}: {row.reason}")
    for line in least_and_peak(one):
        print(line)
    if one.peak_memory_bytes:
        print(f"The device held at most {one.peak_memory_bytes / 1e6:.1f} MB in this process.")
    if one.modelled:
        print(f"MODELLED, not measured. {measurement.BLIND}")
    print()


def milliseconds(seconds: float) -> str:
    """Three digits of it."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
