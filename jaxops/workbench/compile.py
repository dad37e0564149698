"""`jaxops compile`: what the real compilers of chips that are not here make of a call."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxops.workbench import cases, output, specimens
from jaxops.workbench.call import Problem, call, operators, targets
from jaxops.workbench.compiler import CHIPS, Job, compile_jobs
from jaxops.workbench.programs import refusal, size
from jaxops.workbench.specimens import Specimen
from jaxops.workbench.verify import specimen_of
from pallas_kernels import chips

_EXAMPLES = """examples:
  jaxops compile rms_norm --target v5e,h100
  jaxops compile dot_product_attention query=1x8192x8x128 key=1x8192x8x128 value=1x8192x8x128 --set is_causal=True \\
      --gradients --target v6e --schedule
  jaxops compile rms_norm x=8192x4096 scale=4096 --set implementation=pallas       (the kernel, or its refusal)
  jaxops compile dot_product_attention --fuzz 100 --gradients --target v5e,h100        (calls by chance)
  jaxops compile my_package.model:loss x=131072x4096@data,None w1=4096x8192@data,tensor w2=8192x4096@tensor,data \\
      --gradients --mesh v5p:8x16x16 --axes data=256,tensor=8

--mesh v5p:8x16x16 compiles for every device of that slice (GPUs of one machine: h100:1x1x8). The function is called
under jax.set_mesh with that mesh, whose axes --axes names (by default one, "data", over all devices). An operand is
sharded as the words after its "@" say, one for each dimension: an axis, two as data+tensor, or None. An operand without
"@" is on every device. A kernel is local code: call it in jax.shard_map, or XLA serves in its place.

exit code: 0 every chip has a program, 1 one has not, 2 the question makes no sense
"""

_BLIND = (
    "modelled, not measured: the schedule is the compiler's, waits for memory come from a latency and a bandwidth;\n"
    "clocks, caches, contention and, on GPUs, trip counts are not seen"
)


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `compile` to the command line."""
    command = commands.add_parser(
        "compile",
        help="what the real compilers make of a call, for chips that are not here",
        description="Compiles a call with the real compilers of the chips, none of which has to be here: whether it "
        "compiles, what runs (a kernel, or XLA and why), the memory it takes, and what it communicates.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("operator", help="an operator of the library, or module:function")
    command.add_argument(
        "operands",
        nargs="*",
        metavar="name=sizes[:dtype][@axes]",
        help="as x=8192x4096, labels=8192:int32 or x=8192x4096@data,None; by default the operator's usual ones",
    )
    command.add_argument("--set", action="append", default=[], metavar="name=value", help="an option of the operator")
    command.add_argument("--dtype", default="bfloat16", help="of every operand without its own (default: %(default)s)")
    command.add_argument(
        "--gradients", action="store_true", help="the gradients of all floating operands instead of the outputs"
    )
    command.add_argument("--target", default="", help=f"chips, with commas between (default: {','.join(CHIPS)})")
    command.add_argument("--mesh", metavar="chip:slice", help="compile for a whole slice, as v5p:8x16x16")
    command.add_argument("--axes", default="", metavar="name=size,…", help="of the mesh, as data=256,tensor=8")
    command.add_argument("--schedule", action="store_true", help="also read the schedule: modelled cycles and bounds")
    command.add_argument("--fuzz", type=int, default=0, metavar="N", help="N calls by chance instead of one")
    command.add_argument("--seed", type=int, default=0, help="of what is drawn by chance (default: %(default)s)")
    command.add_argument("--seconds", type=float, default=300, help="time limit of one chip (default: %(default)s)")
    command.add_argument("--workers", type=int, help="compilers at a time (default: one for each core)")
    command.add_argument("--no-cache", action="store_true", help="neither read nor write the cache")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compiles for every chip and prints what the compilers say; 1 if one did not compile it."""
    jobs = jobs_of(options)
    with output.progress("compile", len(jobs), quiet=options.json) as advance:
        results = compile_jobs(
            jobs, seconds=options.seconds, workers=options.workers, advance=advance, cache=not options.no_cache
        )
    for result in results:
        if result.get("bad_question"):
            raise Problem(result["reason"])
    if options.json:
        asked = [{"chip": job.chip, "operands": job.operands, "options": job.options} for job in jobs]
        output.as_json([{**ask, **result} for ask, result in zip(asked, results, strict=True)])
    else:
        (_print_drawn if options.fuzz else _print)(jobs, results)
    return 0 if all(result["status"] == "compiled" for result in results) else 1


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """What the words of the command line ask for. Raises `Problem` where they make no sense."""
    names = targets(options.target, CHIPS)
    if options.mesh:
        chip, colon, slice_shape = options.mesh.partition(":")
        if not (colon and slice_shape):
            raise Problem(f"--mesh must be chip:slice, as in v5p:8x16x16, got {options.mesh!r}")
        targets(chip, CHIPS)
        if names not in ([], [chip]):
            raise Problem(f"--mesh {options.mesh} compiles for {chip}, got --target {options.target}")
        names = [chip]
    elif options.axes:
        raise Problem("--axes names the axes of a mesh: say which one, as in --mesh v5p:8x16x16")
    if options.seconds <= 0:
        raise Problem(f"--seconds must be above 0, got {options.seconds:g}")
    if options.workers is not None and options.workers < 1:
        raise Problem(f"--workers must be at least 1, got {options.workers}")
    if options.fuzz:
        return _drawn_jobs(options, names or list(CHIPS))
    operands, settings = tuple(options.operands), tuple(options.set)
    if not operands:
        case = cases.usual(options.operator)
        operands, settings = case.operands, case.options + settings
    names = names or list(CHIPS)
    if not options.mesh:
        _check(options.operator, operands, settings, options.dtype, names[0])
    job = Job("", options.operator, operands, settings, options.dtype, options.gradients)
    return [
        Job(**{**vars(job), "chip": name, "mesh": options.mesh, "axes": options.axes, "schedule": options.schedule})
        for name in names
    ]


def _drawn_jobs(options: argparse.Namespace, names: Sequence[str]) -> list[Job]:
    if options.fuzz < 0:
        raise Problem(f"--fuzz must be at least 0, got {options.fuzz}")
    if options.mesh or options.schedule:
        raise Problem(f"--fuzz draws calls of one device, without {'--mesh' if options.mesh else '--schedule'}")
    if options.operator in operators():
        if given := [*options.operands, *(f"--set {text}" for text in options.set)]:
            raise Problem(
                f"--fuzz draws the operands and options of {options.operator} itself: leave out {' '.join(given)}"
            )
        specimen = Specimen(options.operator, {})
    else:
        specimen = specimen_of(options.operator, options.operands, options.set, options.dtype)
    calls = specimens.drawn(specimen, options.fuzz, options.seed, most=1024)
    return [Job(name, specimen.name, *call.words(), gradients=options.gradients) for name in names for call in calls]


def _check(function: str, operands: Sequence[str], settings: Sequence[str], dtype: str, chip: str) -> None:
    """Raises `Problem` where the operator does not take these operands, before any compiler starts."""
    if sharded := [word for word in operands if "@" in word]:
        raise Problem(f"an operand can be sharded, as in {sharded[0]!r}, only with --mesh")
    called, structs = call(function, operands, settings, dtype, False)
    if ":" in function:  # of any other function the worker says what is wrong
        return
    try:
        with chips.target(chips.named(chip)):
            jax.eval_shape(lambda structs: called(**structs), structs)
    except (TypeError, ValueError) as error:
        if refusal(str(error)) is None:
            raise Problem(str(error)) from error


def what_runs(result: Mapping[str, Any]) -> str:
    """ "kernel", "XLA", "kernel and XLA" of a program; else its status."""
    if result["status"] != "compiled":
        return str(result["status"])
    served = {run["implementation"] for run in result["runs"]}
    if served == {"pallas", "xla"}:
        return "kernel and XLA"
    return "kernel" if result["kernels"] else "XLA"


def reasons(jobs: Sequence[Job], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each reason that a kernel does not run or nothing was compiled, with the chips it is said of."""
    said: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}  # → chips, phases
    for job, result in zip(jobs, results, strict=True):
        if result["status"] != "compiled":
            said.setdefault((result["status"], result["reason"]), ({}, {}))[0][job.chip] = None
            continue
        for run in result["runs"]:
            if run["implementation"] == "xla" and run["reason"]:
                names, phases = said.setdefault((f"XLA serves {run['operator']}", run["reason"]), ({}, {}))
                names[job.chip] = phases[run["phase"]] = None
    return [
        f"{', '.join(names)}: {what}{f' ({", ".join(phases)})' if phases else ''}: {reason}"
        for (what, reason), (names, phases) in said.items()
    ]


def _print(jobs: Sequence[Job], results: Sequence[Mapping[str, Any]]) -> None:
    job = jobs[0]
    words = [job.function, *job.operands, *job.options, job.dtype, *(["gradients"] if job.gradients else [])]
    numbers = ("kernels", "temp", "arguments", "results", "VMEM/SMEM", "registers", "spills", "compiled in")
    table = output.table(" ".join(words), ("chip", "runs", *numbers), right=numbers)
    for one, result in zip(jobs, results, strict=True):
        table.add_row(one.mesh or one.chip, what_runs(result), *_numbers(result))
    output.show(table)
    for line in reasons(jobs, results):
        print(line)
    for one, result in zip(jobs, results, strict=True):
        if one.mesh and result["status"] == "compiled":
            _print_collectives(one, result)
        if "schedule" in result:
            _print_schedule(one.chip, result["schedule"])


def _print_drawn(jobs: Sequence[Job], results: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(job.chip for job in jobs))
    found = {name: [r for job, r in zip(jobs, results, strict=True) if job.chip == name] for name in names}
    kinds = list(dict.fromkeys(["kernel", "kernel and XLA", "XLA", *map(what_runs, results)]))
    job = jobs[0]
    title = f"{job.function}{', gradients' if job.gradients else ''}: {len(jobs) // len(names)} calls by chance"
    table = output.table(title, ("chip", *kinds, "with spills"), right=(*kinds, "with spills"))
    for name, ones in found.items():
        ran = [what_runs(one) for one in ones]
        spilled = sum(one.get("spill_bytes", 0) > 0 for one in ones)
        table.add_row(name, *(str(ran.count(kind)) for kind in kinds), str(spilled))
    output.show(table)
    for line in reasons(jobs, results):
        print(line)
    for job, result in zip(jobs, results, strict=True):
        if result["status"] != "compiled":
            words = [job.function, *job.operands, *(f"--set {shlex.quote(text)}" for text in job.options)]
            words += ["--gradients"] if job.gradients else []
            print(f"{result['status']}: jaxops compile {' '.join(words)} --target {job.chip}")


def _numbers(result: Mapping[str, Any]) -> list[str]:
    if result["status"] != "compiled":
        return [""] * 8
    memory = [size(result[name]) for name in ("temp_bytes", "argument_bytes", "output_bytes")]
    if "vmem_bytes" in result:
        default = "default" if result["kernels"] else ""
        chip = [size(result["vmem_bytes"]) if result["vmem_bytes"] else default, "", ""]
    elif result["kernels"]:
        chip = [size(result["smem_bytes"]), str(result["registers"]), size(result["spill_bytes"])]
    else:
        chip = ["", "", ""]
    return [str(result["kernels"]), *memory, *chip, f"{result['compile_seconds']:.1f} s"]


def _print_collectives(job: Job, result: Mapping[str, Any]) -> None:
    if not result["collectives"]:
        print(f"{job.mesh}: the program communicates nothing")
        return
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for one in result["collectives"]:
        groups.setdefault((one["kind"], one["axis"], one["overlapped"], one["bytes"], one["count"]), []).append(one)
    numbers = ("in the program", "bytes each", "runs of each")
    table = output.table("collectives, on one device", ("collective", "mesh axis", *numbers, "schedule"), right=numbers)
    for (kind, axis, overlapped, count, runs), found in groups.items():
        schedule = "overlapped with work" if overlapped else "exposed"
        table.add_row(
            kind, axis or "?", str(len(found)), size(count), "in a loop" if runs is None else str(runs), schedule
        )
    output.show(table)


def _print_schedule(chip: str, schedule: Mapping[str, Any]) -> None:
    if "error" in schedule:
        print(f"{chip}: no schedule could be read: {schedule['error']}")
        return
    rows = [(_tpu_row if "mxu_cycles" in one else _gpu_row)(one) for one in schedule["kernels"]]
    if rows:
        table = output.table(f"{chip}: schedule, modelled", tuple(rows[0]), right=tuple(rows[0])[1:-1])
        for row in rows:
            table.add_row(*row.values())
        output.show(table)
    if schedule["seconds"] is not None:
        print(f"{chip}: the program takes {schedule['seconds'] * 1e3:.4f} ms, modelled")
    print(_BLIND)


def _tpu_row(kernel: Mapping[str, Any]) -> dict[str, str]:
    return {
        "kernel": kernel["name"],
        "calls": str(kernel["calls"]),
        "modelled ms": f"{kernel['seconds'] * 1e3:.4f}",
        "matrix unit": f"{kernel['mxu_cycles'] / max(kernel['cycles'] + kernel['stall_cycles'], 1):.0%}",
        "read": size(kernel["read_bytes"]),
        "written": size(kernel["written_bytes"]),
        "VMEM": size(kernel["vmem_bytes"]),
        "spills": str(kernel["spill_slots"]),
        "bound": kernel["bound"],
    }


def _gpu_row(kernel: Mapping[str, Any]) -> dict[str, str]:
    return {
        "kernel": kernel["name"],
        "registers": str(kernel["registers"]),
        "spills": size(kernel["spill_store_bytes"] + kernel["spill_load_bytes"]),
        "SMEM": size(kernel["smem_bytes"]),
        "occupancy": f"{kernel['occupancy']:.0%}",
        "limited by": kernel["limiter"],
        "hottest loop bound by": kernel["loops"][0]["bound"] if kernel["loops"] else "no loop",
    }
