"""Trains a byte-level GPT of jaxops operators on real text, on the devices there are, against a bigram model.

    python examples/train_gpt.py --demo                    a few minutes on two CPU cores, as 8 virtual devices
    python examples/train_gpt.py --data 4 --tensor 2       4 copies of the model, each cut in 2
    python examples/train_gpt.py --text book.txt --out runs/book --steps 2000
    python examples/train_gpt.py --out runs/book --resume  goes on after an interruption, bit for bit

The output directory holds log.jsonl (one line a step), loss.png, sample.txt and the checkpoints. Exit codes: 0 done, 2
something given is wrong, 130 interrupted (the state was saved).
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gpt import checkpoints, text
from gpt.model import GPT, Config, partition_spec, sample
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxops
import jaxops.optim

# Two programs of the same mathematics, rounded differently, agree in their loss to this, relatively.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
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
    except SystemExit as stop:  # argparse: 0 after --help, 2 after an error that it has printed
        return int(stop.code or 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_gpt", description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="the defaults, and --compare")
    add("--text", metavar="FILE", help="what to learn; without it, CPython's language reference (pydoc_data.topics)")
    add("--out", type=Path, metavar="DIRECTORY", help="where results go; without it, the first free runs/gpt-N")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --out (or of the last runs/gpt-N)")
    add("--devices", type=int, metavar="N", help="how many devices; without it all, or 8 virtual ones on a CPU")
    add("--data", type=int, metavar="N", help="devices along the batch; without it, devices / tensor")
    add("--tensor", type=int, default=1, metavar="N", help="devices along heads and hidden features")
    for name, default, what in (
        ("layers", 3, "transformer blocks"),
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
        "tensor",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("devices", "data"):
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
    if args.kv_heads % args.tensor or args.hidden % args.tensor:
        parser.error(f"--tensor must divide --kv-heads {args.kv_heads} and --hidden {args.hidden}, got {args.tensor}")
    return args


def make_mesh(args: argparse.Namespace) -> Mesh:
    """The devices as (data, tensor). Raises `Stop` if they cannot be laid out so."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the devices are there already: main was called before in this process
            jax.config.update("jax_num_cpu_devices", args.devices or 8)
    devices = jax.devices()
    if jax.process_count() > 1:
        raise Stop(f"one process is expected, this is a job of {jax.process_count()}")
    wanted = args.devices or (args.data * args.tensor if args.data else len(devices))
    if wanted > len(devices):
        raise Stop(f"--devices: {wanted} are asked for, {len(devices)} are there ({devices[0].platform})")
    data = args.data or wanted // args.tensor
    if data * args.tensor != wanted:
        raise Stop(f"--data {data} times --tensor {args.tensor} is not the number of devices, {wanted}")
    if args.batch % data:
        raise Stop(f"--batch must be a multiple of the {data} devices along the batch, got {args.batch}")
    return Mesh(np.array(devices[:wanted]).reshape(data, args.tensor), ("data", "tensor"))


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


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and what is done with it, compiled for a mesh."""

    state: Any  # shapes, dtypes and shardings of {"parameters", "optimizer"}
    initial: Callable[[], Any]
    step: Callable[[Any, Any], tuple[Any, jax.Array]]  # (state, windows) -> state, loss
    loss: Callable[[Any, Any], jax.Array]  # (parameters, windows) -> loss
    put: Callable[[np.ndarray], jax.Array]  # windows onto the mesh
    windows: jax.ShapeDtypeStruct
    model: nnx.GraphDef


def program(config: Config, args: argparse.Namespace, mesh: Mesh, *, plain: bool = False) -> Program:
    """The GPT of `config`, trained by AdamW with warm-up, cosine decay and clipped gradients."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.warmup, args.steps, 0.1 * args.learning_rate
    )
    options = dict(b2=0.95, weight_decay=0.1, mask=functools.partial(jax.tree.map, lambda x: x.ndim > 1))
    optimizer: optax.GradientTransformation
    if plain:
        optimizer = chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, **options))

        def advance(parameters, gradient, state):
            updates, state = chain.update(gradient, state, parameters)
            return optax.apply_updates(parameters, updates), state

    else:  # small=0: the state is laid out on the mesh by the paths of the parameters
        optimizer = jaxops.optim.adamw(schedule, max_norm=1.0, small=0, **options)
        advance = optimizer.apply

    def model():
        return GPT(config, jnp.dtype(args.dtype), plain=plain, mesh=mesh, rngs=nnx.Rngs(args.seed))

    graph, _ = nnx.split(nnx.eval_shape(model))

    def initial():
        parameters = nnx.state(model())
        return {"parameters": parameters, "optimizer": optimizer.init(parameters)}

    def loss(parameters, windows):
        return nnx.merge(graph, parameters).loss(windows)

    def trained(parameters, windows):
        value, penalty = nnx.merge(graph, parameters).loss_and_penalty(windows)
        return value + penalty, value

    def step(state, windows):
        (_, value), gradient = jax.value_and_grad(trained, has_aux=True)(state["parameters"], windows)
        parameters, optimizer_state = advance(state["parameters"], gradient, state["optimizer"])
        return {"parameters": parameters, "optimizer": optimizer_state}, value

    def place(path, leaf):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition_spec(path, leaf.ndim))
        )

    state = jax.tree.map_with_path(place, jax.eval_shape(initial))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    batched, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    return Program(
        state=state,
        initial=jax.jit(initial, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere)),
        loss=jax.jit(loss, out_shardings=everywhere),
        put=lambda windows: jax.device_put(windows, batched),
        windows=jax.ShapeDtypeStruct((args.batch, config.length + 1), jnp.int32, sharding=batched),
        model=graph,
    )


def run(args: argparse.Namespace) -> int:
    """Trains, resumes or finishes; returns the exit code. Raises `Stop`."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
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
    mesh = make_mesh(args)
    out = out_directory(args)
    ours = program(config, args, mesh)
    settings = {
        "batch": args.batch, "steps": args.steps, "warmup": args.warmup, "learning_rate": args.learning_rate,
        "seed": args.seed, "dtype": args.dtype, "text": corpus.digest, "evaluate_every": args.evaluate_every,
        "optimizer": "jaxops.optim.adamw",
    }  # fmt: skip
    facts = {"model": dataclasses.asdict(config), "run": settings}
    state, done = resumed(out, ours, facts, console) if args.resume else (None, 0)
    state = ours.initial() if state is None else state
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    truncate(log, done)

    parameters = sum(leaf.size for leaf in jax.tree.leaves(state["parameters"]))
    console.print(
        f"{parameters:,} parameters, {len(corpus.train):,} bytes of {corpus.name}, {mesh.devices.size} "
        f"{mesh.devices.flat[0].platform} devices as data {mesh.shape['data']} × tensor {mesh.shape['tensor']}, "
        f"{args.dtype}; results in {out}"
    )

    def evaluate(parameters):
        return statistics.fmean(float(ours.loss(parameters, ours.put(windows))) for windows in held_out)

    started = time.perf_counter()
    with (
        interruptible() as interrupted,
        progress(console, args.steps, done, args.batch * args.length) as show,
        log.open("a") as lines,
    ):
        # One step is dispatched ahead, so that the device need not wait for Python; virtual devices on a CPU gain
        # nothing by it.
        ahead = 0 if mesh.devices.flat[0].platform == "cpu" else 1
        waiting: collections.deque[dict[str, Any]] = collections.deque()
        while done < args.steps and not interrupted:
            windows = ours.put(corpus.batch(args.seed, done, args.batch, args.length))
            state, loss = ours.step(state, windows)
            done += 1
            whole = done % args.checkpoint_every == 0 or done == args.steps
            line = {"step": done, "loss": loss}
            if done % args.evaluate_every == 0 or done == args.steps:
                line["held_out"] = evaluate(state["parameters"])
            waiting.append(line)
            while len(waiting) > (0 if whole or interrupted else ahead):
                write(lines, waiting.popleft(), show)
            if whole:
                checkpoints.save(out, done, state, facts)
    if interrupted:
        path = checkpoints.save(out, done, state, facts)
        console.print(f"interrupted after step {done}: saved {path}; go on with --out {out} --resume")
        return 128 + interrupted[0]

    trained = time.perf_counter() - started
    finish(args, config, corpus, held_out, mesh, ours, state, trained, out, console)
    return 0


def resumed(out: Path, ours: Program, facts: dict[str, Any], console: Console) -> tuple[Any, int]:
    """(state, steps done) of the newest whole checkpoint in `out`, or (None, 0). Raises `Stop` for another model."""
    path = checkpoints.newest_whole(out, lambda message: console.print(f"warning: {message}"))
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
    return checkpoints.restore(path, ours.state), contents["step"]


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


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within, the first Ctrl-C or SIGTERM only fills the list that this yields; a second one acts as usual."""
    received: list[int] = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
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
                print(f"step {step}/{steps}  loss {line['loss']:.4f}{held_out}{left}", flush=True)

        yield show


def finish(args, config, corpus, held_out, mesh, ours, state, trained, out, console) -> None:
    """What a run leaves behind: the curve, a sample, the tables, the verdict."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    plot(lines, out / "loss.png")
    if args.sample:
        # On one device: a single sequence has nothing to share out.
        parameters = jax.device_put(jax.device_get(state["parameters"]), jax.devices()[0])
        prompt = jnp.asarray(corpus.held_out[: config.length - args.sample], jnp.int32)
        draw = jax.jit(
            lambda parameters, prompt, key: sample(nnx.merge(ours.model, parameters), prompt, args.sample, key)
        )
        drawn = bytes(np.asarray(draw(parameters, prompt, jax.random.key(args.seed)), np.uint8)).decode(
            errors="replace"
        )
        (out / "sample.txt").write_text(drawn)
        console.rule("sample, after the beginning of the held-out text")
        console.print(drawn, markup=False)

    chips = (None, *CHIPS)
    gradient = jax.value_and_grad(lambda parameters, windows: nnx.merge(ours.model, parameters).loss(windows))
    explained = [jaxops.explain(gradient, state["parameters"], ours.windows, target=chip) for chip in chips]
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

    if args.compare:
        console.print(compare(args, config, corpus, held_out, mesh, ours, state))
    loss, bigram = lines[-1]["held_out"], text.bigram_loss(corpus.train, held_out)
    summary = Table(show_header=False, title="summary")
    for row in (
        ("model", ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(config).items())),
        ("mesh", f"data {mesh.shape['data']} × tensor {mesh.shape['tensor']} on {mesh.devices.flat[0].device_kind}"),
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


def compare(args, config, corpus, held_out, mesh, ours, state) -> Table:
    """The same parameters and batches through jaxops and through plain operators, step by step in turn."""
    rounds = 6
    plain = program(config, args, mesh, plain=True)
    programs = {"jaxops": ours, "Flax, JAX, Optax": plain}
    held_out_losses = {
        name: float(one.loss(state["parameters"], ours.put(held_out[0]))) for name, one in programs.items()
    }
    compiled = {name: one.step.lower(one.state, one.windows).compile() for name, one in programs.items()}
    in_optax = optax.tree.set(plain.state["optimizer"], **state["optimizer"]._asdict())
    begin = (state, state | {"optimizer": in_optax})
    states = {name: jax.tree.map(jnp.copy, each) for name, each in zip(programs, begin, strict=True)}
    losses, seconds = {name: [] for name in programs}, {name: [] for name in programs}
    for number in range(rounds + 1):
        windows = ours.put(corpus.batch(args.seed, args.steps + number, args.batch, args.length))
        for name, step in compiled.items():
            began = time.perf_counter()
            states[name], loss = step(states[name], windows)
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
    temp = {name: one.memory_analysis().temp_size_in_bytes for name, one in compiled.items()}
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
    sys.exit(main())
