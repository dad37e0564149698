"""Trains a byte-level GPT of jaxops operators on real text, on any mesh of devices, against a bigram model.

    python examples/train_gpt.py --demo                    a few minutes on two CPU cores, as 8 virtual devices
    python examples/train_gpt.py --mesh data=2,tensor=2,pipeline=2 --schedule zero_bubble
    python examples/train_gpt.py --mesh data=4,tensor=2 --zero 2 --micro-batches 2 --compress int8
    python examples/train_gpt.py --text book.txt --out runs/book --steps 2000
    python examples/train_gpt.py --out runs/book --resume  goes on after an interruption, bit for bit on the same mesh

On several machines start it once on each, with --distributed under Slurm or Kubernetes, with --coordinator, --processes
and --process elsewhere. The output directory holds log.jsonl (one line a step), loss.png, sample.txt and the
checkpoints, which go on on any mesh. Exit codes: 0 done, 2 something given is wrong, 3 another process is lost, 130 or
143 interrupted (the state was saved).
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gpt import checkpoints, text
from gpt.model import GPT, Config, sample
from gpt.parallel import AXES, CHUNKS, Parallel, Plain, misfit, sent
from gpt.program import Program, program
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxops
import jaxops.optim
import sharding
import sharding.schedules
from sharding.gradient_reduction import COMPRESSIONS

# Two programs of the same mathematics, rounded differently, agree in their loss to this, relatively.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
VIRTUAL = 8  # devices of a CPU
LOST = 3  # the exit code when another process is lost
DEMO = "data=2,tensor=2,pipeline=2"
CHIPS = ("v5e", "h100")  # what `--demo` asks `jaxops.explain` about, besides the devices that are there


class Stop(Exception):
    """The run cannot go on; the message says why."""


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the arguments `argv`; returns its exit code."""
    try:
        args = parse(argv)
        return run(args)
    except Stop as stop:
        print(f"train_gpt: {stop}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        print(
            f"train_gpt: process {jax.process_index()} of {jax.process_count()} cannot go on; if another one is lost, "
            "its own output says why. Start all again, with --resume",
            file=sys.stderr,
        )
        return LOST
    except SystemExit as stop:  # argparse: 0 after --help, 2 after an error that it has printed
        return int(stop.code or 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_gpt", description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--demo", action="store_true", help=f"the defaults, --mesh {DEMO} and --compare")
    add("--text", metavar="FILE", help="what to learn; without it, CPython's language reference (pydoc_data.topics)")
    add("--out", type=Path, metavar="DIRECTORY", help="where results go; without it, the first free runs/gpt-N")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --out (or of the last runs/gpt-N)")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="AXIS=N,…",
        help="devices along data (the batch), fsdp (the batch, and every array), tensor (heads, features, vocabulary) "
        f"and pipeline (layers); without it all as data, {VIRTUAL} virtual ones on a CPU",
    )
    devices.add_argument("--devices", type=int, metavar="N", help="the same as --mesh data=N")
    add("--schedule", choices=sharding.schedules.SCHEDULES, help="of the pipeline; without it 1f1b")
    add(
        "--micro-batches",
        type=int,
        metavar="N",
        help="of a step; without it 2 for each stage of a pipeline, and 1 where there is none",
    )
    add(
        "--zero",
        type=int,
        choices=range(4),
        default=1,
        help="split over data: 0 nothing, 1 the optimizer's moments, 2 and the sums of gradients, 3 and the parameters "
        "(the same as naming the axis fsdp, along which all is split)",
    )
    add(
        "--compress",
        choices=COMPRESSIONS,
        help="how gradients travel along data, with --zero 1 or 2; what that leaves out is added to the next ones",
    )
    add("--distributed", action="store_true", help="one of several processes, as Slurm, Kubernetes or MPI says")
    add("--coordinator", metavar="HOST:PORT", help="one of several processes: where process 0 listens")
    add("--processes", type=int, metavar="N", help="with --coordinator: how many there are")
    add("--process", type=int, metavar="I", help="with --coordinator: which this is, from 0")
    add("--heartbeat", type=int, default=60, metavar="SECONDS", help="a process silent for so long is lost")
    for name, default, what in (
        ("layers", 4, "transformer blocks"),
        ("width", 128, "features of the stream"),
        ("heads", 8, "query heads"),
        ("kv-heads", 4, "key and value heads"),
        ("hidden", 352, "features inside the gated feed-forward layer, or inside each expert"),
        ("length", 128, "bytes a prediction may look at"),
        ("batch", 16, "windows of that length in a step"),
        ("steps", 200, "optimizer steps"),
        ("warmup", 20, "steps of rising learning rate; then it falls as a cosine"),
        ("checkpoint-every", 50, "steps between checkpoints"),
        ("evaluate-every", 50, "steps between losses on the held-out text"),
        ("sample", 96, "bytes to write at the end"),
    ):
        add(f"--{name}", type=int, default=default, metavar="N", help=what)
    add("--experts", type=int, default=0, metavar="N", help="a mixture of N feed-forward layers, two for each byte")
    add("--learning-rate", type=float, default=4e-3, metavar="X", help="its peak")
    add("--seed", type=int, default=0, metavar="N", help="of parameters, data order and sample")
    add("--dtype", choices=tuple(TOLERANCE), default="bfloat16", help="of the computation; parameters are float32")
    add("--untied", action="store_true", help="an output matrix of its own instead of the embedding's transpose")
    add("--compare", action="store_true", help="also run the same model made of Flax's, JAX's and Optax' own operators")
    args = parser.parse_args(argv)
    args.compare |= args.demo
    if args.demo and not (args.mesh or args.devices):
        args.mesh = mesh_sizes(DEMO)

    for name in (
        "layers",
        "width",
        "heads",
        "kv_heads",
        "hidden",
        "length",
        "batch",
        "steps",
        "checkpoint_every",
        "evaluate_every",
        "heartbeat",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("devices", "micro_batches", "processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.warmup < args.steps:
        parser.error(f"--warmup must be in [0, --steps = {args.steps}), got {args.warmup}")
    if not 0 <= args.sample < args.length:
        parser.error(f"--sample must be in [0, --length = {args.length}), got {args.sample}")
    if args.experts < 0 or args.experts == 1:
        parser.error(f"--experts must be 0 or at least 2, got {args.experts}")
    if args.seed < 0 or args.learning_rate <= 0:
        parser.error(
            f"--seed must be at least 0 and --learning-rate positive, got {args.seed} and {args.learning_rate}"
        )
    if args.width % args.heads or args.width // args.heads % 2:
        parser.error(f"--heads must cut --width {args.width} into heads of an even size, got {args.heads}")
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads must divide --heads {args.heads}, got {args.kv_heads}")
    if args.devices:
        args.mesh = {"data": args.devices}
    plain = (args.coordinator, args.processes, args.process)
    if (args.distributed and plain != (None,) * 3) or (None in plain and plain != (None,) * 3):
        parser.error("--coordinator, --processes and --process go together, and not with --distributed")
    if args.processes and not 0 <= args.process < args.processes:
        parser.error(f"--process must be in [0, --processes = {args.processes}), got {args.process}")
    return args


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of "data=2,tensor=4"."""
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, _, size = entry.partition("=")
        if name not in AXES:
            raise argparse.ArgumentTypeError(f"axes are {', '.join(AXES)}, got {name!r} in {text!r}")
        if name in sizes:
            raise argparse.ArgumentTypeError(f"{name} is there twice in {text!r}")
        if not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{name} must be a number of devices, at least 1, got {entry!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(args: argparse.Namespace) -> Mesh:
    """The devices of all processes as `--mesh` says. Raises `Stop` if they cannot be laid out so."""
    wanted = math.prod(args.mesh.values()) if args.mesh else None
    # Virtual devices of a CPU; --distributed takes those that JAX_NUM_CPU_DEVICES gives to each process.
    if not args.distributed and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the devices are there already: main was called before in this process
            jax.config.update("jax_num_cpu_devices", max(1, (wanted or VIRTUAL) // (args.processes or 1)))
    devices, processes = jax.devices(), jax.process_count()
    sizes = args.mesh or {"data": len(devices)}
    if args.zero == 3:
        sizes = {**sizes, "data": 1, "fsdp": sizes.get("data", 1) * sizes.get("fsdp", 1)}
    if args.compress and (args.zero not in (1, 2) or sizes.get("data", 1) == 1):
        raise Stop(
            f"--compress goes with --zero 1 or 2 and 2 devices or more along data, got --zero {args.zero} and "
            f"{sizes.get('data', 1)}"
        )
    wanted = wanted or len(devices)
    if wanted > len(devices):
        raise Stop(f"--mesh: {wanted} devices are asked for, {len(devices)} are there ({devices[0].platform})")
    if processes > 1 and wanted < len(devices):
        raise Stop(f"--mesh: {wanted} devices are asked for, all {len(devices)} of the {processes} processes must be")
    return sharding.make_mesh(**sizes, devices=devices[:wanted])


def make_table(args: argparse.Namespace, stages: int) -> sharding.Table | None:
    """The schedule of the pipeline, or None without one. Raises `Stop`."""
    if stages == 1:
        if args.schedule:
            raise Stop("--schedule goes with a pipeline axis of 2 devices or more in --mesh")
        return None
    name = args.schedule or "1f1b"
    try:
        return sharding.schedule(name, stages, args.micro_batches or 2 * stages, CHUNKS.get(name, 1))
    except ValueError as error:
        raise Stop(f"--micro-batches: {error}") from None


def out_directory(args: argparse.Namespace) -> Path:
    """Where this run writes: a new directory, or with --resume one that is there. Raises `Stop`."""
    if args.out is None:
        numbered = {int(path.name[4:]): path for path in Path("runs").glob("gpt-*") if path.name[4:].isdigit()}
        if args.resume and not numbered:
            raise Stop("--resume: there is no runs/gpt-N to go on with; name it by --out")
        last = max(numbered, default=0)
        return numbered[last] if args.resume else Path("runs") / f"gpt-{last + 1}"
    if args.resume and not args.out.is_dir():
        raise Stop(f"--resume: there is no directory {args.out}")
    if not args.resume and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise Stop(f"--out: {args.out} is not empty; go on with it by --resume, or name another")
    return args.out


def run(args: argparse.Namespace) -> int:
    """Trains, resumes or finishes; returns the exit code. Raises `Stop`."""
    config = Config(
        args.layers, args.width, args.heads, args.kv_heads, args.hidden, args.length, not args.untied, args.experts
    )
    try:
        corpus = text.load(args.text)
    except OSError as error:
        raise Stop(f"--text: {error}") from None
    held_out = corpus.held_out_batches(args.batch, args.length)
    if len(held_out) == 0:
        raise Stop(
            f"--text: its last tenth must hold {args.batch * args.length + 1} bytes for --batch {args.batch} "
            f"and --length {args.length}, got {len(corpus.held_out)}"
        )
    if args.distributed or args.coordinator:
        together(args)
    mesh = make_mesh(args)
    first = jax.process_index() == 0
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, quiet=not first)
    table = make_table(args, mesh.shape["pipeline"])
    micro_batches = table.micro_batches if table else args.micro_batches or 1
    if why := misfit(config, args.batch, mesh.shape, table, micro_batches):
        raise Stop(why)
    out = out_directory(args)
    ours = program(Parallel(config, jnp.dtype(args.dtype), mesh, table), args)
    sizes = ",".join(f"{axis}={mesh.shape[axis]}" for axis in AXES if mesh.shape[axis] > 1) or "data=1"
    settings = {
        "batch": args.batch, "steps": args.steps, "warmup": args.warmup, "learning_rate": args.learning_rate,
        "seed": args.seed, "dtype": args.dtype, "text": corpus.digest, "evaluate_every": args.evaluate_every,
        "optimizer": "jaxops.optim.adamw", "mesh": sizes, "zero": args.zero, "compress": args.compress,
        "micro_batches": micro_batches,
    }  # fmt: skip
    facts = {"model": dataclasses.asdict(config), "run": settings}
    agree(facts, args)
    state, done = resumed(out, ours, facts, console) if args.resume else (None, 0)
    state = ours.initial() if state is None else state
    log = out / "log.jsonl"
    if first:
        out.mkdir(parents=True, exist_ok=True)
        truncate(log, done)
    multihost_utils.sync_global_devices("the directory is there")
    stop_together(None if out.is_dir() else f"--out: {out} is not there: all hosts must share it")

    parameters = sum(leaf.size for leaf in jax.tree.leaves(ours.layered["parameters"]))
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.print(
        f"{parameters:,} parameters, {len(corpus.train):,} bytes of {corpus.name}, {mesh.devices.size} "
        f"{mesh.devices.flat[0].platform} devices{processes} as {sizes}, {args.dtype}; results in {out}"
    )
    console.print(bill(ours))

    def evaluate(parameters):
        return statistics.fmean(float(ours.loss(parameters, ours.put(windows.__getitem__))) for windows in held_out)

    started = time.perf_counter()
    with (
        Interruptible() as interrupted,
        progress(console, args.steps, done, args.batch * args.length) as show,
        log.open("a") if first else open(os.devnull, "w") as lines,
    ):
        # One step is dispatched ahead, so that the device need not wait for Python; virtual devices on a CPU gain
        # nothing by it.
        ahead = 0 if mesh.devices.flat[0].platform == "cpu" else 1
        waiting: collections.deque[dict[str, Any]] = collections.deque()
        while done < args.steps and not interrupted(done):
            windows = ours.put(functools.partial(corpus.batch, args.seed, done, args.batch, args.length))
            state, loss = ours.step(state, windows)
            done += 1
            whole = done % args.checkpoint_every == 0 or done == args.steps
            line = {"step": done, "loss": loss}
            if done % args.evaluate_every == 0 or done == args.steps:
                line["held_out"] = evaluate(state["parameters"])
            waiting.append(line)
            while len(waiting) > (0 if whole else ahead):
                write(lines, waiting.popleft(), show)
            if whole:
                checkpoints.save(out, done, ours.to_layers(state), facts)
        while waiting:
            write(lines, waiting.popleft(), show)
    if done < args.steps:
        path = checkpoints.save(out, done, ours.to_layers(state), facts)
        console.print(f"interrupted after step {done}: saved {path}; go on with --out {out} --resume")
        return 128 + interrupted.signal

    trained = time.perf_counter() - started
    finish(args, corpus, held_out, ours, state, trained, out, console)
    multihost_utils.sync_global_devices("process 0 has written everything")
    return 0


def together(args: argparse.Namespace) -> None:
    """Makes this process one of several. Raises `Stop` if the others are not found."""
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            initialization_timeout=5 * args.heartbeat,
            heartbeat_timeout_seconds=args.heartbeat,
            shutdown_timeout_seconds=args.heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        raise Stop(f"--{'coordinator' if args.coordinator else 'distributed'}: {error}") from None


def agree(facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Raises `Stop` unless all processes were started for the same run."""
    said = json.dumps(facts | {"resume": args.resume, "out": str(args.out)}, sort_keys=True)
    mine = np.frombuffer(hashlib.sha256(said.encode()).digest()[:4], np.int32)
    other = (multihost_utils.broadcast_one_to_all(mine) != mine).any()
    stop_together("other arguments, or another text, than process 0" if other else None)


def stop_together(why: str | None) -> None:
    """Raises `Stop` in all processes if one of them has a reason."""
    having = np.flatnonzero(multihost_utils.process_allgather(np.int32(why is not None)))
    if having.size:
        raise Stop(f"process {jax.process_index()}: {why or f'process {having[0]} cannot go on, and says why'}")


def bill(ours: Program) -> Table:
    """What a step sends over each axis of the mesh, and how much of a pipeline is idle."""
    mesh, schedule = ours.model.mesh, ours.model.table
    found = sent(ours.step.as_text(), ours.model)
    table = Table("mesh axis", "collectives", "sent by a device", "beside work", title="communication of a step")
    for axis in sorted({one["axis"] for one in found}):
        along = [one for one in found if one["axis"] == axis]
        total = sum(one["bytes"] * one["count"] for one in along)
        beside = sum(one["bytes"] * one["count"] for one in along if one["overlapped"])
        kinds = collections.Counter()
        for one in along:
            kinds[one["kind"]] += one["count"]
        table.add_row(
            axis,
            ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
            f"{total / 1e6:.3f} MB",
            f"{beside / max(total, 1):.0%}",
        )
    notes = []
    if schedule is not None:
        notes.append(
            f"pipeline: {schedule.name}, {schedule.micro_batches} micro-batches on {schedule.stages} stages, "
            f"{schedule.bubble:.0%} of the cells idle"
        )
    if found and mesh.devices.flat[0].platform == "cpu":
        notes.append("a CPU sends nothing beside work")
    table.caption = "; ".join(notes) or None
    return table


def resumed(out: Path, ours: Program, facts: dict[str, Any], console: Console) -> tuple[Any, int]:
    """(state, steps done) of the newest whole checkpoint in `out`, or (None, 0). Raises `Stop` for another model."""
    path = checkpoints.newest_whole(out, lambda message: console.print(f"warning: {message}"))
    if jax.process_count() > 1:  # what process 0 found, in case that a disk shows it to another later
        step = -1 if path is None else checkpoints.contents(path)["step"]
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        path = None if step < 0 else checkpoints.of_step(out, step)
    if path is None:
        console.print(f"no whole checkpoint in {out}: starting from the beginning")
        return None, 0
    contents = checkpoints.contents(path)
    saved = contents["facts"]

    def differences(part: str) -> str:
        names = [name for name in saved[part] | facts[part] if saved[part].get(name) != facts[part].get(name)]
        return ", ".join(f"{name} is {saved[part].get(name)} there and {facts[part].get(name)} here" for name in names)

    if other := differences("model"):
        raise Stop(f"--resume: {path} holds another model: {other}")
    if other := differences("run"):
        console.print(f"warning: the run goes on with other settings than it began with: {other}")
    console.print(f"resuming from {path}, step {contents['step']}")
    return ours.read(path, saved["run"].get("compress") is not None), contents["step"]


def truncate(log: Path, done: int) -> None:
    """Drops the lines of `log` after step `done`, in one move."""
    kept = []
    if log.exists():
        for line in log.read_text().splitlines(keepends=True)[:done]:
            kept.append(line)
    aside = log.with_suffix(".writing")
    aside.write_text("".join(kept))
    os.replace(aside, log)


def write(lines: Any, line: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
    """One line of the log, on disk before the next step is; JSON's floats are exact."""
    line["loss"] = float(line["loss"])
    if not np.isfinite(line["loss"]):
        raise Stop(f"the loss of step {line['step']} is {line['loss']}: try a smaller --learning-rate")
    lines.write(json.dumps(line) + "\n")
    lines.flush()
    show(line)


class Interruptible:
    """Within, the first Ctrl-C or SIGTERM only makes `(step)` true; a second one acts as usual.

    Of several processes any may get SIGTERM, and all stop after the same step; Ctrl-C acts as usual.
    """

    def __init__(self):
        self.signal = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruptible":
        if jax.process_count() > 1:  # JAX waits for SIGTERM itself, and agrees with the other processes on a step
            return self

        def receive(number, frame):
            self.signal = number
            signal.signal(number, self.before[number])

        self.before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal != 0

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress(console: Console, steps: int, done: int, tokens: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what to call with each line of the log: a bar on a terminal, a line now and then elsewhere."""
    began, first = 0.0, done + 1

    def speed(step: int) -> float:
        """Tokens per second since the first step, which compiles, ended."""
        nonlocal began
        if step == first:
            began = time.perf_counter()
        return (step - first) * tokens / (time.perf_counter() - began)

    if console.is_terminal:
        columns = (
            BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("held out {task.fields[held_out]}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"), TimeRemainingColumn(elapsed_when_finished=True),
        )  # fmt: skip
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=steps, completed=done, loss=float("nan"), held_out="–", speed=0.0)

            def show(line):
                fields: dict[str, Any] = {"loss": line["loss"], "speed": speed(line["step"])}
                if "held_out" in line:
                    fields["held_out"] = f"{line['held_out']:.3f}"
                bar.update(task, completed=line["step"], **fields)

            yield show
    else:
        every = max(1, steps // 10)

        def show(line):
            step = line["step"]
            rate = speed(step)
            if step % every == 0 or "held_out" in line or step == first:
                held_out = f"  held out {line['held_out']:.4f}" if "held_out" in line else ""
                left = f"  {rate:,.0f} tokens/s  {(steps - step) * tokens / rate:.0f} s left" if rate else ""
                if not console.quiet:
                    print(f"step {step}/{steps}  loss {line['loss']:.4f}{held_out}{left}", flush=True)

        yield show


def finish(args, corpus, held_out, ours, state, trained, out, console) -> None:
    """What a run leaves behind: the curve, a sample, the tables, the verdict."""
    config, mesh, layered = ours.model.config, ours.model.mesh, ours.to_layers(state)
    everywhere = jax.jit(lambda parameters: parameters, out_shardings=NamedSharding(mesh, P()))
    parameters = jax.tree.map(lambda leaf: leaf.addressable_data(0), everywhere(layered["parameters"]))
    compared = compare(args, corpus, held_out, ours, state, layered) if args.compare else None
    if jax.process_index():
        return
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    plot(lines, out / "loss.png")
    graph = nnx.split(nnx.eval_shape(lambda: GPT(config, jnp.dtype(args.dtype), rngs=nnx.Rngs(0))))[0]
    if args.sample:
        # On one device: a single sequence has nothing to share out.
        prompt = jnp.asarray(corpus.held_out[: config.length - args.sample], jnp.int32)
        draw = jax.jit(lambda parameters, prompt, key: sample(nnx.merge(graph, parameters), prompt, args.sample, key))
        drawn = bytes(np.asarray(draw(parameters, prompt, jax.random.key(args.seed)), np.uint8)).decode(
            errors="replace"
        )
        (out / "sample.txt").write_text(drawn)
        console.rule("sample, after the beginning of the held-out text")
        console.print(drawn, markup=False)

    chips = (None, *CHIPS)
    gradient = jax.value_and_grad(lambda parameters, windows: nnx.merge(graph, parameters).loss(windows))
    windows = jax.ShapeDtypeStruct(ours.windows.shape, ours.windows.dtype)
    explained = [jaxops.explain(gradient, parameters, windows, target=chip) for chip in chips]
    table = Table(
        "operator",
        "phase",
        *("here" if chip is None else f"on one {chip}" for chip in chips),
        title="which implementation runs, and why",
    )
    for calls in zip(*(explanation.lines for explanation in explained), strict=True):
        table.add_row(
            calls[0].operator,
            calls[0].phase,
            *(call.implementation + (call.reason and f" ({call.reason})") for call in calls),
        )
    console.print(table)

    if compared is not None:
        console.print(compared)
    loss, bigram = lines[-1]["held_out"], text.bigram_loss(corpus.train, held_out)
    summary = Table(show_header=False, title="summary")
    for row in (
        ("model", ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(config).items())),
        ("mesh", ", ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES) + f" on {mesh.devices.flat[0].device_kind}"),
        ("time in the training loop", f"{trained:.1f} s"),
        ("held-out loss", f"{loss:.4f} nats per byte"),
        ("bigram model of the same training text", f"{bigram:.4f} nats per byte"),
        ("results", str(out)),
    ):
        summary.add_row(*row)
    console.print(summary)
    console.print(
        f"The model is {'BELOW' if loss < bigram else 'NOT below'} the bigram model: "
        f"{loss:.4f} against {bigram:.4f} nats per byte."
    )


def compare(args, corpus, held_out, ours, state, layered) -> Table:
    """The same parameters and batches through jaxops and through plain operators, step by step in turn."""
    rounds = 6
    plain = program(Plain.like(ours.model), args)
    programs = {"jaxops": ours, "Flax, JAX, Optax": plain}
    in_optax = optax.tree.set(plain.state["optimizer"], **layered["optimizer"]._asdict())
    begin = {"parameters": layered["parameters"], "optimizer": in_optax}
    begin = jax.device_put(begin, jax.tree.map(lambda x: x.sharding, plain.state))
    states = {name: jax.tree.map(jnp.copy, each) for name, each in zip(programs, (state, begin), strict=True)}
    held_out_losses = {
        name: float(one.loss(states[name]["parameters"], one.put(held_out[0].__getitem__)))
        for name, one in programs.items()
    }
    losses, seconds = {name: [] for name in programs}, {name: [] for name in programs}
    for number in range(rounds + 1):
        read = functools.partial(corpus.batch, args.seed, args.steps + number, args.batch, args.length)
        for name, one in programs.items():
            began = time.perf_counter()
            states[name], loss = one.step(states[name], one.put(read))
            losses[name].append(float(loss))
            jax.block_until_ready(states[name])
            seconds[name].append(time.perf_counter() - began)

    table = Table("", *programs, "ratio", title="the same model of jaxops and of plain operators")

    def row(name: str, form: Callable[[float], str], values: dict[str, float], ratio: bool = True) -> None:
        first, second = values.values()
        table.add_row(name, *map(form, values.values()), f"{first / second:.2f}" if ratio and second else "")

    row("held-out loss of one batch", "{:.6f}".format, held_out_losses, ratio=False)
    row(
        f"mean loss of {rounds + 1} further steps",
        "{:.6f}".format,
        {name: statistics.fmean(x) for name, x in losses.items()},
        ratio=False,
    )
    row("step, median", lambda x: f"{1e3 * x:.0f} ms", {name: statistics.median(x[1:]) for name, x in seconds.items()})
    temp = {name: one.step.memory_analysis().temp_size_in_bytes for name, one in programs.items()}
    row("temporary memory of a step, per device", lambda x: f"{x / 1e6:.2f} MB", temp)
    first, second = held_out_losses.values()
    apart, tolerance = abs(first - second) / abs(second), TOLERANCE[args.dtype]
    verdict = "equal" if apart <= tolerance else "NOT equal"
    table.caption = f"losses {verdict}: {apart:.1e} apart, tolerance {tolerance:.0e} ({args.dtype})"
    return table


def plot(log: list[dict[str, Any]], file: Path) -> None:
    """The training loss of every step and the held-out losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([line["step"] for line in log], [line["loss"] for line in log], linewidth=0.8, label="training")
    held_out = [line for line in log if "held_out" in line]
    axes.plot([line["step"] for line in held_out], [line["held_out"] for line in held_out], "o-", label="held out")
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    code = main()
    if code == LOST:  # JAX's own end would wait for the lost process
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
