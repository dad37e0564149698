"""`jaxops tune`: the tiles that are best for a call on a chip, found without the chip, and kept for the next lookup.

Every kernel module says which tiles are worth trying (`candidates`). All are compiled by the chip's own compiler; what
does not compile, or spills on a GPU, is out. The others are ranked

    on TPUs     by the modelled seconds of the program, forward or gradients (see `jaxops.schedule.tpu`);
    on GPUs     by instructions of a warp for each clock of its tensor core, summed over the hottest loops of the
                kernels: a GPU program has no modelled time. Kernels without matrix products have no such figure, and
                keep the default;
    by measurement, if the chip is the device at hand: the best of the model, in turns, the results compared first.

The default stays where nothing is more than 2 % better: less than that the model cannot tell. It cannot see bank
conflicts, short copies, throttling, or other programs on the chip.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from jaxops import autodiff, cost, dispatch
from jaxops.inspection import operator_calls
from jaxops.workbench import call as words
from jaxops.workbench import compiler, devices, output
from jaxops.workbench.call import Problem
from pallas_kernels import chips, tuned

GAIN = 1.02  # how many times better than the default the best has to be
FINALISTS = 6  # tiles that are measured, where the chip is at hand
PHASES = ("forward", "backward")
WRITE = ("user", "shipped", "none")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of some tiles.

    status: "modelled", "measured", "scored" (on GPUs), "compiled" (but no figure ranks it), or why it is out: "failed",
      "refused", "hung", "aborted", "spills", "wrong".
    score: what it is ranked by, less is better: seconds, or on GPUs instructions for a tensor-core clock. None: it is
      not ranked.
    modelled: seconds of the program, by the schedule; measured: its median seconds on the device at hand.
    memory: bytes of VMEM or shared memory, by the kernel module's estimate.
    """

    tiles: dict[str, int]
    memory: int | None
    status: str
    reason: str = ""
    score: float | None = None
    modelled: float | None = None
    measured: float | None = None


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The trials of one kernel: the default first, then the baseline (the library's: blocks of 128), then the others.

    bound: the seconds the chip cannot beat, for the same program; best: the winner, None if the default did not even
    compile and nothing else did. label: what `score` is.
    """

    question: tuned.Question
    phase: str
    label: str
    bound: float
    trials: tuple[Trial, ...]
    best: Trial | None

    def ratio(self, trial: Trial, other: Trial) -> float | None:
        """How many times better `trial` is than `other`."""
        if not trial.score or not other.score:
            return None
        return other.score / trial.score


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel that a call would run, and its tiles."""

    question: tuned.Question
    phase: str
    candidates: tuple[Any, ...]
    memory: Callable[[Any], int] | None


def _silent(total: int) -> AbstractContextManager[Callable[[str], None]]:
    del total
    return contextlib.nullcontext(lambda _: None)


def tune(
    operator: str,
    operands: Sequence[str],
    options: Sequence[str] = (),
    *,
    target: str,
    dtype: str = "bfloat16",
    phases: Sequence[str] = PHASES,
    limit: int | None = None,
    seconds: float = 300,
    workers: int | None = None,
    progress: Callable[[int], AbstractContextManager[Callable[[str], None]]] = _silent,
) -> list[Tuning]:
    """The trials of every kernel that the call runs on the chip `target`, and its gradients do.

    operator, operands, options, dtype: the call in words, as for `jaxops explain`. limit: the most tiles of a kernel.
    seconds: for one compilation. workers: compilers at a time. progress(jobs) gives what is called after each of them.
    Nothing is written.

    Raises `Problem` for words that make no sense, and where no kernel of the call has a choice of tiles.
    """
    if limit is not None and limit < 1:
        raise Problem(f"--limit must be at least 1, got {limit}")
    chip = chips.named(target)
    function, shapes = words.call(operator, operands, options, dtype, False)
    programs = {"forward": lambda arrays: function(**arrays), "backward": _gradients(function)}
    try:
        with chips.target(chip):
            kernels = [one for phase in phases for one in _kernels(programs[phase], shapes, phase, chip, limit)]
        bounds = {phase: cost.bound(_cost(programs[phase], shapes), chip, dtype)[0] for phase in phases}
    except (TypeError, ValueError) as error:  # the operator's own word on its input
        raise Problem(str(error)) from error
    if not kernels:
        raise Problem(f"{operator}: no kernel that runs this on {target} has a choice of tiles")
    jobs = [
        compiler.Job(
            chip=target,
            function=operator,
            operands=tuple(operands),
            options=tuple(options),
            dtype=dtype,
            gradients=kernel.phase == "backward",
            tiles={kernel.question.kernel: dataclasses.asdict(tiles)},
            schedule=True,
        )
        for kernel in kernels
        for tiles in kernel.candidates
    ]
    with progress(len(jobs)) as advance:
        results = iter(compiler.compile_jobs(jobs, seconds=seconds, workers=workers, advance=advance))
    found = []
    for kernel in kernels:
        trials = [_trial(tiles, kernel, next(results), chip) for tiles in kernel.candidates]
        if devices.chip() == chip:
            trials = _measured(trials, kernel, programs[kernel.phase], shapes)
        label = "seconds" if chip.platform == "tpu" else "instructions per tensor-core clock"
        if any(trial.measured for trial in trials):
            label = "seconds"
        found.append(Tuning(kernel.question, kernel.phase, label, bounds[kernel.phase], tuple(trials), _best(trials)))
    return found


def _gradients(function: Callable) -> Callable:
    """The gradients of all floating operands; the cotangents are ones, which costs what any others do."""

    def gradients(arrays: Mapping[str, Any]) -> Any:
        chosen = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        fixed = {name: x for name, x in arrays.items() if name not in chosen}

        def outputs(chosen: Mapping[str, Any]) -> list[Any]:
            leaves = jax.tree.leaves(function(**chosen, **fixed))
            return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]

        values, pull_back = jax.vjp(outputs, chosen)
        return pull_back([jnp.ones_like(x) for x in values])

    return gradients


def _cost(program: Callable, shapes: Mapping[str, Any]) -> cost.Cost:
    """The cost of the program without forward calls of which the backward reads nothing: they are not compiled."""
    total = cost.of(program, dict(shapes))
    calls = [
        (equation.params["call"], [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars])
        for equation in operator_calls(jax.jit(program).trace(dict(shapes)).jaxpr.jaxpr)
    ]
    for called, arrays in calls:
        if called.phase != "backward":
            continue
        with dispatch.alone():
            rule = jax.make_jaxpr(called.run("xla", None))(*arrays).jaxpr
        _, read = partial_eval.dce_jaxpr(rule, [True] * len(rule.outvars))
        count = len(called.names)
        if not any(called.split(read)[1]):
            forward = functools.partial(autodiff.operator_p.bind, call=called.at("forward", outputs=0))
            spared = cost.of(forward, *arrays[:count])
            total = cost.Cost(total.flops - spared.flops, total.bytes - spared.bytes, total.exact)
    return total


def _kernels(
    program: Callable, shapes: Mapping[str, Any], phase: str, chip: chips.Chip, limit: int | None
) -> list[_Kernel]:
    """The kernels of `phase` that have candidates, each once. A call under vmap takes what the call inside takes."""
    found: dict[tuned.Question, _Kernel] = {}
    for equation in operator_calls(jax.jit(program).trace(dict(shapes)).jaxpr.jaxpr):
        called = equation.params["call"]
        module = getattr(called.operator, chip.platform)
        if called.phase != phase or called.axes or isinstance(module, str) or not hasattr(module, "candidates"):
            continue
        avals = [v.aval for v in equation.invars]
        inputs = {
            name: jax.ShapeDtypeStruct(aval.shape, aval.dtype)
            for name, aval in zip(called.names, avals, strict=False)  # what was saved and cotangents come after
        }
        static = dict(called.static)
        reason = called.operator.refusal(chip.platform, inputs, static)
        if dispatch.choose(called.order, reason).implementation != "pallas":
            continue
        with tuned.asked() as questions:
            current = module.tiles(phase, **inputs, **static)
        if not questions:  # tiles that are not looked up cannot be set either
            continue
        candidates = tuple(itertools.islice(module.candidates(phase, **inputs, **static), limit))
        if current not in candidates:  # tuned before: a short search must not lose them
            candidates += (current,)
        memory = None
        if hasattr(module, "memory"):
            memory = functools.partial(module.memory, phase, **inputs, **static)
        found.setdefault(questions[0], _Kernel(questions[0], phase, candidates, memory))
    return list(found.values())


def _trial(tiles: Any, kernel: _Kernel, result: Mapping[str, Any], chip: chips.Chip) -> Trial:
    """What the compiler made of some tiles."""
    trial = Trial(dataclasses.asdict(tiles), kernel.memory(tiles) if kernel.memory else None, result["status"])
    if result.get("bad_question"):
        raise Problem(result["reason"])
    if result["status"] != "compiled":
        return dataclasses.replace(trial, reason=result["reason"])
    if spilled := result.get("spill_bytes"):
        return dataclasses.replace(trial, status="spills", reason=f"{spilled} bytes of registers are spilled")
    schedule = result["schedule"]
    if "error" in schedule:
        return dataclasses.replace(trial, reason=f"its schedule cannot be read: {schedule['error']}")
    modelled = schedule["seconds"]
    score = modelled if chip.platform == "tpu" else _instructions(schedule["kernels"])
    status = "modelled" if modelled else "scored" if score else "compiled"
    return dataclasses.replace(trial, status=status, score=score, modelled=modelled)


def _instructions(kernels: Sequence[Mapping[str, Any]]) -> float | None:
    """Σ over the kernels of instructions / tensor-core clocks of a trip of the hottest loop; None without products."""
    hottest = [kernel["loops"][0] for kernel in kernels if kernel["loops"]]
    ratios = [loop["total"] / loop["tensor_clocks"] for loop in hottest if loop["tensor_clocks"]]
    return sum(ratios) or None


def _best(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the least score; the first, which is the default, where none is more than `GAIN` better."""
    default, ranked = trials[0], [trial for trial in trials if trial.score is not None]
    if not ranked:
        return default if default.status == "compiled" else None
    best = min(ranked, key=lambda trial: trial.score or 0)
    if default.score is not None and default.score <= (best.score or 0) * GAIN:
        return default
    return best


def _measured(trials: Sequence[Trial], kernel: _Kernel, program: Callable, shapes: Mapping[str, Any]) -> list[Trial]:
    """The trials, the best of them and the default timed on the device at hand; only those are ranked then."""
    from jaxops.workbench import timing

    ranked = sorted((trial for trial in trials if trial.status in ("modelled", "scored", "compiled")), key=_by_score)
    finalists = list({id(trial): trial for trial in (trials[0], *ranked[:FINALISTS])}.values())
    arrays = _data(shapes)
    compiled: dict[int, Any] = {}
    reasons: dict[int, str] = {}
    for trial in finalists:
        with tuned.forced({kernel.question.kernel: trial.tiles}):
            try:
                compiled[id(trial)] = jax.jit(lambda arrays: program(arrays)).lower(arrays).compile()
            except Exception as error:  # whatever a compiler raises
                reasons[id(trial)] = str(error)
    expected = next((run(arrays) for run in compiled.values()), None)
    for key in list(compiled):
        if not _alike(compiled[key](arrays), expected):
            del compiled[key]
            reasons[key] = "its result differs from that of the default"
    spreads = timing.take_turns({str(key): functools.partial(run, arrays) for key, run in compiled.items()}, 10)
    found = []
    for trial in trials:
        if id(trial) in compiled:
            seconds = spreads[str(id(trial))].median
            found.append(dataclasses.replace(trial, status="measured", measured=seconds, score=seconds))
        elif id(trial) in reasons:
            found.append(dataclasses.replace(trial, status="wrong", reason=reasons[id(trial)], score=None))
        else:
            found.append(dataclasses.replace(trial, score=None))
    return found


def _by_score(trial: Trial) -> float:
    return float("inf") if trial.score is None else trial.score


def _data(shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Normal numbers; zeros for integers, which are valid as labels, lengths and ids."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, x.shape).astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
        for key, (name, x) in zip(keys, shapes.items(), strict=True)
    }


def _alike(got: Any, expected: Any) -> bool:
    """Whether two results are the same but for rounding: ‖a - b‖ ≤ 0.03 ‖b‖, for every array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    norm = lambda x: float(jnp.linalg.norm(jnp.ravel(x).astype(jnp.float32)))
    return all(norm(a.astype(jnp.float32) - b.astype(jnp.float32)) <= 0.03 * norm(b) + 1e-30 for a, b in pairs)


# ---- keeping what was found ------------------------------------------------------------------------------------------


def keep(found: Sequence[Tuning], target: str, where: str) -> dict[str, dict[str, Any]]:
    """Writes the winners to the "user" cache or the files "shipped" with the library, and returns what was written.

    Where the default won, its entry has no tiles: what is looked up near it is the default of that problem, too. Raises
    `Problem` where the file cannot be written.
    """
    chip, path = chips.named(target), _file(target, where)
    entries = {}
    for one in found:
        default = one.trials[0]
        if one.best is None or (one.best.status == "compiled" and one.best is default):
            continue
        remarks = {
            "judged": one.best.status,
            "gain": round(one.ratio(one.best, default) or 1.0, 4),
            "tried": len(one.trials),
        }
        tiles = {} if one.best is default else one.best.tiles
        entries[one.question.key] = tuned.entry(one.question, tiles, chip.platform, **remarks)
    if entries:
        try:
            tuned.write(path, target, entries)
        except OSError as error:
            raise Problem(f"--write {where}: {path} cannot be written: {error.strerror}") from error
    return entries


def _file(target: str, where: str) -> pathlib.Path:
    return tuned.user_file(target) if where == "user" else tuned.shipped_file(target)


def _refuse_unwritable(target: str, where: str) -> None:
    """Raises `Problem` before anything is compiled if the winners could not be kept."""
    folder = _file(target, where).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Problem(
            f"--write {where}: {folder} cannot be written ({error.strerror}); --write none only shows what is found"
        ) from error


# ---- the command -----------------------------------------------------------------------------------------------------

_EXAMPLES = """examples:
  jaxops tune rms_norm x=8192x4096 scale=4096 --target v6e
  jaxops tune dot_product_attention query=4x4096x8x128 key=4x4096x8x128 value=4x4096x8x128 \\
      --set is_causal=True --target v5e,v6e --phase forward --limit 12 --write none
  jaxops tune my_package.operators:my_operator x=8192x1024 scale=1024 --target v5e --json
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `tune` to the command line."""
    command = commands.add_parser(
        "tune",
        help="the best tiles for a call on a chip, without the chip",
        description="Compiles a call with every sensible choice of tiles, ranks them by the modelled time of the whole "
        "program (on the chip itself: by the measured one), and keeps the best for every later call of a near shape.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("operator", help="an operator of the library, or module:function")
    command.add_argument(
        "operands", nargs="+", metavar="name=sizes[:dtype]", help="as x=8192x4096 or labels=8192:int32"
    )
    command.add_argument("--set", action="append", default=[], metavar="name=value", help="an option of the operator")
    command.add_argument("--dtype", default="bfloat16", help="of every operand without its own (default: %(default)s)")
    command.add_argument("--target", required=True, help=f"chips, with commas between: {', '.join(compiler.CHIPS)}")
    command.add_argument("--phase", choices=PHASES, help="only this one (default: both)")
    command.add_argument("--limit", type=int, help="the most tiles to try of each kernel, the likeliest first")
    command.add_argument("--workers", type=int, help="compilers at a time (default: one a core)")
    command.add_argument("--seconds", type=float, default=300, help="time limit of one compilation")
    command.add_argument("--write", choices=WRITE, default="user", help="where to keep the best (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ranks the tiles for every chip, prints them and keeps the best; 1 if none compiled."""
    names = words.targets(options.target, compiler.CHIPS)
    if not names:
        raise Problem(f"--target must be one of {', '.join(compiler.CHIPS)}, got {options.target!r}")
    if options.write != "none":
        for target in names:
            _refuse_unwritable(target, options.write)
    phases = (options.phase,) if options.phase else PHASES
    everything, ended = [], 0
    for target in names:
        found = tune(
            options.operator,
            options.operands,
            options.set,
            target=target,
            dtype=options.dtype,
            phases=phases,
            limit=options.limit,
            seconds=options.seconds,
            workers=options.workers,
            progress=lambda total: output.progress("compiling", total, quiet=options.json),
        )
        written = keep(found, target, options.write) if options.write != "none" else {}
        everything += [_as_json(one, target, written) for one in found]
        if not options.json:
            for one in found:
                _print(one, target, _file(target, options.write) if one.question.key in written else None)
        ended = max(ended, *(int(one.best is None) for one in found))
    if options.json:
        output.as_json(everything)
    return ended


def _ratios(one: Tuning, trial: Trial) -> dict[str, float | None]:
    """How many times better than the default and than the baseline some tiles are."""
    return {
        "default": one.ratio(trial, one.trials[0]),
        "baseline": one.ratio(trial, one.trials[1]) if len(one.trials) > 1 else None,
    }


def _as_json(one: Tuning, target: str, written: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "target": target,
        "kernel": one.question.kernel,
        "dtype": one.question.dtype,
        "shape": dict(one.question.shape),
        "phase": one.phase,
        "ranked_by": one.label,
        "bound_seconds": one.bound,
        "best": one.best.tiles if one.best else None,
        "written": one.question.key in written,
        "trials": [dataclasses.asdict(trial) | {"times_better_than": _ratios(one, trial)} for trial in one.trials],
    }


def _print(one: Tuning, target: str, path: pathlib.Path | None) -> None:
    figure = "ms" if one.label == "seconds" else "score"
    numbers = ("KiB", figure, "of roofline", "× default", "× baseline")
    what = "forward" if one.phase == "forward" else "gradients, with what they need of the forward"
    shape = ", ".join(f"{name} {value}" for name, value in one.question.shape)
    table = output.table(
        f"{one.question.kernel} on {target}: {shape}, {one.question.dtype} ({what})",
        ("tiles", "status", *numbers),
        right=numbers,
    )
    reasons = []
    for trial in sorted(one.trials, key=_by_score):
        mark = dict(zip(map(id, one.trials), (" (default)", " (baseline)"), strict=False)).get(id(trial), "")
        mark = " (best)" + mark if trial is one.best else mark
        tiles = " ".join(f"{name}={value}" for name, value in trial.tiles.items())
        ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in _ratios(one, trial).values()]
        score, share = "", ""
        if trial.score is not None and one.label == "seconds":
            score, share = f"{trial.score * 1e3:.3f}", f"{one.bound / trial.score:.0%}"
        elif trial.score is not None:
            score = f"{trial.score:.2f}"
        memory = "" if trial.memory is None else f"{trial.memory / 1024:.0f}"
        table.add_row(tiles + mark, trial.status, memory, score, share, *ratios)
        if trial.reason:
            reasons.append(f"{tiles}: {trial.reason}")
    output.show(table)
    print("\n".join(reasons), end="\n" if reasons else "")
    if one.best is None:
        print("nothing compiled")
    elif path is not None:
        print(f"kept in {path}")
    print(
        "ms: median on this device"
        if any(trial.measured for trial in one.trials)
        else "ms: modelled by the schedule of the whole program, not measured"
        if one.label == "seconds"
        else "score: instructions of a warp for each clock of its tensor core in the hottest loops; no time is modelled"
    )
