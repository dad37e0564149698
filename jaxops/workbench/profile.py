"""`jaxops profile`: where a function spends its time: its operators with time, bytes and distance to the roofline.

The function is compiled, warmed up and run under `jax.profiler`. The time of an instruction is its own, without that of
what it calls. Its bytes are its operands and results, its flops those of the products in it, read from the compiled
program; so an instruction whose arrays lie in a cache may exceed 100 % of the peak. On a CPU instructions may run at
the same time: their times then add up to more than the step's.
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxops.cost import Peak
from jaxops.workbench import hlo, output
from jaxops.workbench.call import Problem, call

_EXAMPLES = """examples:
  jaxops profile my_package.training:step x=64x1024 --steps 10
  jaxops profile my_package.training:main                        # takes no operands: called as it is
  jaxops profile dot_product_attention query=1x1024x8x64 key=1x1024x8x64 value=1x1024x8x64 --gradients
  jaxops profile my_package.training:step x=64x1024 --keep trace   # then: tensorboard --logdir trace, or Perfetto

Operands are random. A function without operands is called as it is, under its own jit, and should return its arrays;
of its instructions the bytes are known only where the profiler says them.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `profile` to the command line."""
    command = commands.add_parser(
        "profile",
        help="where a function spends its time, instruction by instruction",
        description="Records a trace of a function on the device at hand and prints where its time goes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("function", help="module:function, or an operator of the library")
    command.add_argument("operands", nargs="*", metavar="name=sizes[:dtype]", help="as x=8192x4096")
    command.add_argument("--set", action="append", default=[], metavar="name=value", help="an option of the function")
    command.add_argument("--dtype", default="float32", help="of operands without their own (default: %(default)s)")
    command.add_argument("--gradients", action="store_true", help="forward and backward, for all floating operands")
    command.add_argument("--steps", type=int, default=5, help="how often it runs in the trace (default: %(default)s)")
    command.add_argument("--top", type=int, default=15, help="how many instructions to show (default: %(default)s)")
    command.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="keep the trace there")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction: `calls`, `seconds`, `bytes` and `flops` a step; None where it is not known."""

    name: str
    source: str
    calls: float
    seconds: float
    bytes: float | None
    flops: float | None


@dataclasses.dataclass(frozen=True)
class Profile:
    """`step_seconds` is the time of a step by the clock; the lines are sorted, the longest first."""

    step_seconds: float
    lines: tuple[Line, ...]

    @property
    def seconds(self) -> float:
        """Of all instructions of a step together."""
        return sum(line.seconds for line in self.lines)


def run(options: argparse.Namespace) -> int:
    """Records a trace of the function and prints where its time goes."""
    from jaxops.workbench import bench, devices, measurement, timing

    if options.steps < 1 or options.top < 1:
        raise Problem(f"--steps and --top must be at least 1, got {options.steps} and {options.top}")
    function, shapes = call(options.function, options.operands, options.set, options.dtype, options.gradients)
    if options.keep:
        try:
            options.keep.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=options.keep):
                pass
        except OSError as error:
            raise Problem(f"--keep must be a folder to write to, got {options.keep}: {error.strerror}") from error
    with tempfile.TemporaryDirectory(prefix="jaxops-") as scratch:
        try:
            operands = measurement.random_operands(shapes)
            found = profile(function, operands, steps=options.steps, folder=options.keep or pathlib.Path(scratch))
        except (TypeError, ValueError) as error:  # the function's own word on its input
            raise Problem(f"{options.function}: {error}") from error
    peak = measurement.published_here(options.dtype)
    if peak is None:
        peak = timing.peak_of(timing.take_turns(timing.peak_calls(options.dtype), 5))
    shown = found.lines[: options.top]
    rows = [
        {**dataclasses.asdict(line), "share": line.seconds / found.seconds, "percent": percent(line, peak)}
        for line in shown
    ]
    if options.json:
        output.as_json(
            {
                "function": options.function,
                "where": devices.description(),
                "versions": bench.versions(),
                "steps": options.steps,
                "step_seconds": found.step_seconds,
                "instruction_seconds": found.seconds,
                "instructions": len(found.lines),
                "peak": dataclasses.asdict(peak),
                "top": rows,
                "trace": str(options.keep) if options.keep else None,
            }
        )
        return 0
    title = f"{' '.join((options.function, *options.operands))}\n{devices.description()}"
    columns = ("instruction", "from", "calls", "ms", "share %", "MB", "GFLOP", "% of peak")
    table = output.table(title, columns, right=columns[2:])
    for line, row in zip(shown, rows, strict=True):
        table.add_row(
            line.name,
            _tail(line.source),
            f"{line.calls:g}",
            bench.milliseconds(line.seconds),
            f"{100 * row['share']:.1f}",
            "" if line.bytes is None else f"{line.bytes / 1e6:.3g}",
            f"{line.flops / 1e9:.3g}" if line.flops else "",
            "" if row["percent"] is None else f"{row['percent']:.1f}",
        )
    output.show(table)
    share = 100 * sum(row["share"] for row in rows)
    print(
        f"A step takes {bench.milliseconds(found.step_seconds)} ms; its {len(found.lines)} instructions take "
        f"{bench.milliseconds(found.seconds)} ms together, those above {share:.0f} % of that."
    )
    print(bench.peak_in_words(peak))
    if options.keep:
        print(f"trace: {options.keep}")
    return 0


def profile(function: Callable[..., Any], operands: Mapping[str, Any], *, steps: int, folder: pathlib.Path) -> Profile:
    """Where `function(**operands)` spends its time: compiled, warmed up, then run `steps` times under the profiler.

    Without operands the function is called as it is. folder: where the trace is written.

    Raises `Problem` if no instruction of a compiled program is in the trace.
    """
    known: dict[str, hlo.Instruction] = {}
    run: Callable[[], Any] = function
    if operands:
        arrays = jax.device_put(dict(operands))
        compiled = jax.jit(function).lower(**arrays).compile()
        known, run = hlo.instructions(compiled.as_text() or ""), functools.partial(compiled, **arrays)
    for _ in range(2):
        jax.block_until_ready(run())
    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0  # every Python call would be an event, and cost its time
    with jax.profiler.trace(str(folder), profiler_options=settings):
        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(run())
        seconds = (time.perf_counter() - start) / steps
    events = collections.defaultdict(list)
    for event in _events(folder):
        events[event.name].append(event)
    lines = []
    for name, every in events.items():
        found = known.get(name)
        if found is not None and found.opcode in hlo.CONTROL:
            continue
        moved, computed = (found.bytes, found.flops) if found else (None, None)
        lines.append(
            Line(
                name,
                found.source if found else "",
                len(every) / steps,
                sum(event.seconds for event in every) / steps,
                _a_step([moved if event.bytes is None else event.bytes for event in every], steps),
                _a_step([computed if event.flops is None else event.flops for event in every], steps),
            )
        )
    if not lines:
        raise Problem("the trace holds no instruction of a compiled program: does the function run anything in JAX?")
    return Profile(seconds, tuple(sorted(lines, key=lambda line: -line.seconds)))


def percent(line: Line, peak: Peak) -> float | None:
    """Of the roofline: the time in which the device, at its peak, could do this, over the time it took."""
    if line.bytes is None or not line.seconds or (line.flops and peak.flops is None):
        return None
    least = max(line.bytes / peak.bandwidth, (line.flops or 0) / (peak.flops or 1))
    return 100 * least / line.seconds


def _a_step(numbers: Sequence[float | None], steps: int) -> float | None:
    """Their sum over the steps, None if one is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) / steps if len(known) == len(numbers) else None


def _tail(source: str) -> str:
    """The last two names of "jit(f)/while/body/dot_general"."""
    return "/".join(source.split("/")[-2:])


@dataclasses.dataclass(frozen=True)
class _Event:
    name: str
    seconds: float  # without that of the events inside of it
    bytes: float | None
    flops: float | None


def _events(folder: pathlib.Path) -> Iterator[_Event]:
    """Every run of an instruction in the newest trace below `folder`.

    On a TPU they are the events of the line "XLA Ops" of a device, elsewhere those that name their `hlo_op`.
    """
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return
    for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
        for line in plane.lines:
            on_tpu = plane.name.startswith("/device:TPU")
            if on_tpu and line.name != "XLA Ops":
                continue
            found = []
            for event in line.events:
                stats = dict(event.stats)
                name = str(stats.get("hlo_op", "")) or (event.name if on_tpu else "")
                if name:
                    found.append((event.start_ns, -event.duration_ns, name.split(" = ")[0].lstrip("%"), stats))
            yield from _own_time(sorted(found, key=lambda event: event[:2]))


def _own_time(events: list[tuple[float, float, str, dict[str, Any]]]) -> Iterator[_Event]:
    """Events (start, minus duration, name, statistics) of one line, sorted: each with the time of no event inside."""
    inside = [0.0] * len(events)  # nanoseconds of the events directly inside
    open_: list[int] = []
    for i, (start, minus, _, _) in enumerate(events):
        while open_ and start >= events[open_[-1]][0] - events[open_[-1]][1]:
            open_.pop()
        if open_:
            inside[open_[-1]] -= minus
        open_.append(i)
    for (_, minus, name, stats), nanoseconds in zip(events, inside, strict=True):
        own = max(0.0, -minus - nanoseconds) * 1e-9
        yield _Event(name, own, _number(stats.get("bytes_accessed")), _number(stats.get("flops")))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
