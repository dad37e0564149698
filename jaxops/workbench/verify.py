"""`jaxops verify`: an operator's outputs and every gradient against float64, as it runs here and as kernels would."""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxops import autodiff
from jaxops.inspection import explain
from jaxops.workbench import comparison, output, peers, specimens
from jaxops.workbench.call import Problem, bound, operand, parts, targets
from jaxops.workbench.comparison import Row
from jaxops.workbench.specimens import Specimen
from pallas_kernels import chips

_EXAMPLES = """examples:
  jaxops verify rms_norm
  jaxops verify rms_norm x=300x1000 scale=1000 --dtype bfloat16 --interpret tpu
  jaxops verify dot_product_attention --transforms --fuzz 50
  jaxops verify my_package.operators:my_operator x=300x129 scale=129 --interpret tpu --target v5p --fuzz 20
  jaxops verify my_package.losses:my_loss logits=64x1000 'labels=64:int32<1000' --json
  jaxops verify softmax --against torch

An operator is compared with its own reference: in float64, which is the truth, and in the operands' dtypes, whose error
is the yardstick. Exit code 1: something does not hold.
"""
_DEFAULT_CHIP = {"tpu": "v5e", "gpu": "h100"}
_SHRINK_SECONDS = 60.0
_SETS = 4  # of random numbers that a call by chance is tried on: its programs are compiled once


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `verify` to the command line."""
    command = commands.add_parser(
        "verify",
        help="outputs and gradients against float64, transforms, kernels in the interpreter, shapes by chance",
        description="Outputs and every gradient of an operator against float64, by name, with an error budget.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    switch: Any = argparse.BooleanOptionalAction
    command.add_argument("operator", help="an operator of the library, or module:function")
    command.add_argument(
        "operands",
        nargs="*",
        metavar="name=sizes[:dtype[<bound]]",
        help="as x=300x129 or 'labels=300:int32<1000' (integers below 1000; default 2); an operator of the library has "
        "some by itself",
    )
    command.add_argument("--set", action="append", default=[], metavar="name=value", help="an option of the operator")
    command.add_argument("--dtype", default="float32", help="of every operand without its own (default: %(default)s)")
    command.add_argument("--interpret", choices=("tpu", "gpu"), help="also run its kernels in Pallas' interpreter")
    command.add_argument("--target", help="the chip whose kernels are interpreted (default: v5e or h100)")
    command.add_argument("--races", action=switch, default=True, help="detect races in the interpreter")
    command.add_argument("--poison", action=switch, default=True, help="memory of the interpreter starts as NaN")
    command.add_argument(
        "--transforms", action="store_true", help="also every transform, those over 8 devices included"
    )
    command.add_argument("--fuzz", type=int, default=0, metavar="N", help="also N calls by chance")
    command.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    command.add_argument("--against", choices=("torch",), help="also compare with PyTorch's own operator")
    command.add_argument("--seconds", type=float, default=900, help="time limit of all (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compares with float64 what was asked for, and shrinks a failure; 1 if there is one."""
    if options.fuzz < 0:
        raise Problem(f"--fuzz must be at least 0, got {options.fuzz}")
    if options.fuzz:
        specimens.hypothesis()
    if options.against:
        peers.require(options.against)
    kernels = _kernels(options)
    if options.transforms:
        _ask_for_devices()
    if not options.json:
        output.table("", ())  # says at once that rich is missing
    specimen = specimen_of(options.operator, options.operands, options.set, options.dtype, options.seed)
    with _limited(options.seconds):
        report = _report(specimen, kernels, options)
    (_as_json if options.json else _print)(specimen, report)
    return 0 if report.holds else 1


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which chip's kernels are interpreted, and what is watched."""

    chip: str
    races: bool = True
    poison: bool = True

    @property
    def modes(self) -> tuple[dict[str, str], ...]:
        """A missing wait shows as a race where copies are done at once, as NaN where they are done when waited for."""
        if chips.named(self.chip).platform == "gpu" or not self.races:
            return ({},)
        return ({"dma_execution_mode": "eager"}, {"dma_execution_mode": "on_wait"})


@dataclasses.dataclass
class Report:
    """What was found: the rows of every part, what a part left out and why, and a program that shows a failure.

    tried: how many calls by chance; sets: of random numbers that each was tried on.
    """

    parts: list[tuple[str, list[Row]]] = dataclasses.field(default_factory=list)
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    tried: int = 0
    sets: int = 1
    program: str = ""

    @property
    def holds(self) -> bool:
        return all(row.holds for _, rows in self.parts for row in rows)


def _report(specimen: Specimen, kernels: Kernels | None, options: argparse.Namespace) -> Report:
    """Every part that was asked for; the first that fails is the last, because what follows would say it again."""
    report = Report()

    def shown(within: str = "") -> str:
        return program(specimen, report.parts[-1][1], within)

    parts: list[tuple[str, Callable[[], list[Row]], Callable[[], str]]] = [
        ("here", lambda: first_order(specimen), shown)
    ]
    if kernels is not None:
        for mode in kernels.modes:
            what = " ".join([f"kernels of {kernels.chip}, interpreted", *(f"(copies {m})" for m in mode.values())])
            interpreted_rows = functools.partial(interpreted_first_order, specimen, kernels, mode)
            parts.append((what, interpreted_rows, functools.partial(shown, within=_words(kernels, mode))))
    if options.against:
        parts.append(("torch, float32", lambda: against_torch(specimen), lambda: ""))
    if options.transforms:

        def all_transforms() -> list[Row]:
            with output.progress("transforms", len(comparison.TRANSFORMS), quiet=options.json) as advance:
                rows, left_out = transforms(specimen, advance)
            report.left_out += left_out
            return rows

        parts.append(("float32", all_transforms, lambda: _program_of_transform(specimen, report.parts[-1][1])))
    for what, rows, shown_by in parts:
        report.parts.append((what, rows()))
        if not report.holds:
            report.program = shown_by()
            return report
    if options.fuzz:
        report.sets = 1 if kernels else _SETS
        with output.progress("by chance", options.fuzz, quiet=options.json) as advance:
            failure, report.tried = fuzz(specimen, options.fuzz, options.seed, kernels, advance)
        if failure is not None:
            report.parts.append((str(failure.specimen), failure.rows))
            report.program = program(failure.specimen, failure.rows, within=failure.within)
    return report


# ---- the parts, as functions ----------------------------------------------------------------------------------------


def specimen_of(
    name: str, operands: Sequence[str], options: Sequence[str], dtype: str = "float32", seed: int = 0
) -> Specimen:
    """The call that the words of a command line describe, or the usual one of an operator of this library.

    Raises `Problem` where the words do not make sense, or the function does not take such arguments.
    """
    if not operands and name in specimens.USUAL:
        usual, set_ = specimens.USUAL[name]
        operands, options = usual.split(), [*set_.split(), *options]
    _, _, static = parts(name, operands, options, dtype)
    made = {}
    for text in operands:
        operand_name, like = operand(text, dtype)
        made[operand_name] = specimens.named(operand_name, like.shape, like.dtype, bound(text))
    written = dict(text.split("=", 1) for text in options)  # of a function, whose repr is no expression
    static = {option: written[option] if callable(value) else repr(value) for option, value in static.items()}
    specimen = Specimen(name, made, static, seed)
    _problems(specimen)
    return specimen


def first_order(specimen: Specimen) -> list[Row]:
    """Outputs and gradients as the call runs on this machine."""
    return _judged(specimen.function(), specimen)


def interpreted_first_order(specimen: Specimen, kernels: Kernels, mode: dict[str, str] | None = None) -> list[Row]:
    """Outputs and gradients of the kernels of a chip in Pallas' interpreter, outside `jax.jit`.

    Raises `Problem` where no kernel would run.
    """
    function = specimen.function()
    if isinstance(function.func, type(jax.jit(abs))):  # an interpreted kernel has effects, which jit does not take
        function = functools.partial(inspect.unwrap(function.func), **function.keywords)
    if "implementation" in inspect.signature(function.func).parameters and "implementation" not in specimen.options:
        function = functools.partial(function, implementation=("pallas", "xla"))  # a kernel may have no backward
    arrays = specimen.arrays()
    try:
        explained = explain(lambda operands: function(**operands), arrays, target=kernels.chip)
    except (TypeError, ValueError) as error:
        raise Problem(_first_line(error)) from error
    refusals = {line.reason for line in explained.lines if line.implementation != "pallas"}
    if explained.lines and len([line for line in explained.lines if line.implementation == "pallas"]) == 0:
        raise Problem(f"{specimen.name}: no kernel would run on {kernels.chip}: {'; '.join(sorted(refusals))}")
    within = functools.partial(interpreted, kernels.chip, kernels.races, kernels.poison, **(mode or {}))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # the interpreter prints what it finds wrong with semaphores
        rows = _judged(function, specimen, within)
    left = [line for line in said.getvalue().splitlines() if "non-zero count" in line]
    return [*rows, *(Row("semaphore", math.inf, 0, 0, line) for line in left[:1])]


@contextlib.contextmanager
def interpreted(chip: str, races: bool = True, poison: bool = True, **parameters: Any) -> Iterator[None]:
    """Within this context the kernels of `chip` run in Pallas' interpreter, outside `jax.jit`.

    Raises `Problem` at its end if none did.
    """
    from jaxops import interpreter

    facts = chips.named(chip)
    parameters |= {"detect_races": races, "uninitialized_memory": "nan" if poison else "zero"}
    if facts.platform == "tpu":
        # A "parallel" axis of the grid may be cut in two: two cores show what one would hide.
        open_, parameters = interpreter.tpu, {"num_cores_or_threads": 2, **parameters}
    else:
        open_ = interpreter.gpu
    with chips.target(facts, interpreted=True), open_(**parameters):
        yield
        if not interpreter.has_run(facts.platform):
            raise Problem(
                "no kernel ran in the interpreter: call operators outside jax.jit, jax.checkpoint and lax loops"
            )


def transforms(specimen: Specimen, advance: Callable[[str], None] = lambda _: None) -> tuple[list[Row], list[tuple]]:
    """(the comparison under every transform, the transforms that were left out and why), on float32 operands.

    Those over devices split the first axis of the first differentiable operand, and of every operand whose first axis
    has the same size, over 8 devices; its size is rounded up to a multiple of 8. A transform is left out where the
    function by reference does not take it either, or, over devices by hand, is not independent along that axis.
    """
    specimen, sharded = _split(_in_float32(specimen))
    given, plain = _posed(specimen.function(), specimen, sharded)
    rows, left_out = [], []
    for name in comparison.TRANSFORMS:
        why = _why_not(name, plain, sharded)
        if why:
            left_out.append((name, why))
        else:
            try:
                rows.append(comparison.transformed(name, given, plain, "float32"))
            except Exception as error:
                theirs = _error_of(comparison.TRANSFORMS[name], plain)
                if theirs is None or specimen.name in specimens.USUAL:
                    rows.append(_raised(f"transform {name}", error))
                else:
                    left_out.append((name, f"not by reference either: {_first_line(theirs)}"))
        advance(name)
    return rows, left_out


def against_torch(specimen: Specimen) -> list[Row]:
    """Outputs and gradients of PyTorch's own operator, run on the CPU in float32, against the same float64 oracle.

    It may be four times as far from it as ours: another order of sums is no error, another meaning is. (In 16 bits
    PyTorch rounds between the parts of some operators, which would hide the one behind the other.) Raises `Problem`
    where PyTorch is not installed or has no such operator with these operands and options.
    """
    specimen = _in_float32(specimen)
    theirs = peers.find("torch", specimen.name, {**specimen.operands, **specimen.static()})
    if isinstance(theirs, str):
        raise Problem(f"--against torch: {theirs}")
    _, plain = _problems(specimen)
    theirs = functools.partial(theirs, **specimen.static())
    got, unfused, oracle = _by_torch(theirs, plain), plain.unfused(), plain.exact()
    rows = []
    for name in oracle:
        like = np.asarray(got[name].reshape(oracle[name].shape)).astype(unfused[name].dtype)
        row = comparison.judge(f"torch's {name}", like, [(unfused[name], oracle[name])], "float32")
        rows.append(dataclasses.replace(row, allowed=4 * row.allowed))
    return rows


@dataclasses.dataclass(frozen=True)
class Failure:
    """A call by chance that does not hold; `within` is the interpreter it ran in, in words of `program`."""

    specimen: Specimen
    rows: list[Row]
    within: str = ""


def fuzz(
    specimen: Specimen,
    count: int,
    seed: int = 0,
    kernels: Kernels | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> tuple[Failure | None, int]:
    """(the smallest failure among `count` calls by chance, how many were tried).

    Sizes, dtypes, options and masks are drawn by hypothesis, which also shrinks what fails, for at most a minute. Each
    is tried on four sets of random numbers. With `kernels`, which take one, the calls they refuse are not counted.
    """
    hypothesis = specimens.hypothesis()
    failures: list[Failure] = []
    seen: dict[str, bool] = {}
    clock: list[float] = []

    def attempt(drawn: Specimen) -> None:
        key = repr(drawn)
        if clock and _now() - clock[0] > _SHRINK_SECONDS:
            raise _Enough
        if key not in seen:
            try:
                found = _failure(drawn, kernels)
            except Problem:  # the function or its kernel does not take such a call
                hypothesis.reject()
            seen[key] = found is None
            if not failures:
                advance(", ".join(f"{n} {'x'.join(map(str, x.shape))}" for n, x in drawn.operands.items()))
            if found is not None:
                failures.append(found)
                clock.append(_now())
        if not seen[key]:
            raise _Fails

    chance = specimens.by_chance(specimen, most=160 if kernels else 300)
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        verbosity=hypothesis.Verbosity.quiet,
    )
    with contextlib.suppress(_Fails, _Enough):
        settings(hypothesis.seed(seed)(hypothesis.given(chance)(attempt)))()
    return min(failures, key=lambda f: f.specimen.size(), default=None), len(seen)


class _Fails(Exception):
    """A call by chance does not hold."""


class _Enough(BaseException):
    """Not an Exception: hypothesis would take it for another failure."""


def _now() -> float:
    import time

    return time.monotonic()


def _failure(specimen: Specimen, kernels: Kernels | None) -> Failure | None:
    if kernels is None:
        function, posed = specimen.function(), None
        for seed in range(specimen.seed, specimen.seed + _SETS):
            one = dataclasses.replace(specimen, seed=seed)
            posed = _posed(function, one) if posed is None else _with(one.arrays(), *posed)
            rows = _compared(specimen.name, *posed)
            if not all(row.holds for row in rows):
                return Failure(one, rows)
        return None
    for mode in kernels.modes:
        rows = interpreted_first_order(specimen, kernels, mode)
        if not all(row.holds for row in rows):
            return Failure(specimen, rows, _words(kernels, mode))
    return None


# ---- what is asked of the comparison --------------------------------------------------------------------------------


def _problems(specimen: Specimen) -> tuple[comparison.Problem, comparison.Problem]:
    """Raises `Problem` where the function does not take the operands."""
    return _posed(specimen.function(), specimen)


def _posed(function: Callable, specimen: Specimen, sharded: Any = None) -> Any:
    try:
        given, plain = comparison.problems(function, specimen.arrays(), sharded=sharded)
    except Exception as error:  # whatever a function of the user's raises on what it does not take
        raise Problem(f"{specimen.name} does not take {specimen}: {_first_line(error)}") from error
    if not plain.weights:
        raise Problem(f"{specimen.name} must return floating arrays, got none")
    return given, plain


def _with(arrays: dict[str, jax.Array], *posed: comparison.Problem) -> tuple[comparison.Problem, ...]:
    """The same problems of other operands."""
    return tuple(dataclasses.replace(problem, operands=arrays) for problem in posed)


def _judged(function: Callable, specimen: Specimen, within: Any = None) -> list[Row]:
    given, plain = _posed(function, specimen)
    return _compared(specimen.name, given, plain, within)


def _compared(name: str, given: comparison.Problem, plain: comparison.Problem, within: Any = None) -> list[Row]:
    try:
        return comparison.first_order(given, plain, neighbours=comparison.NEIGHBOURS, within=within)
    except Problem:
        raise
    except Exception as error:  # whatever a kernel or a rule raises is what is to be reported
        if "Only interpret mode is supported" in str(error):
            raise Problem(
                f"{name} calls a kernel outside any Operator: nothing says what it means; make it an Operator "
                "with a reference"
            ) from error
        return [_raised("call", error)]


def _raised(name: str, error: Exception) -> Row:
    """A row that says which kernel raised, and what."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        call = frame.f_locals.get("call")
        if call is not None and isinstance(getattr(call, "operator", None), autodiff.Operator):
            name = f"{name}: {call.operator.name}, {call.phase}"
            break
    return Row(name, math.inf, 0, 0, _in_short(str(error), type(error).__name__))


def _in_short(text: str, kind: str) -> str:
    """What an interpreter's exception says, in one line."""
    accesses = re.findall(r"(read|write) of .*? from .*?, (\S.*)", text[text.find("RACE DETECTED") :])
    if "RACE DETECTED" in text and accesses:
        return "race: " + " and ".join(f"{access} at {where.strip()}" for access, where in accesses[:2])
    raised = [line for line in text.splitlines() if re.match(r"\w*(Error|Exception)\b.*: ", line)]
    return raised[-1] if raised else f"{kind}: {text.strip().splitlines()[0] if text.strip() else ''}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _error_of(function: Callable, *args: Any) -> Exception | None:
    try:
        function(*args)
    except Exception as error:
        return error
    return None


def _in_float32(specimen: Specimen) -> Specimen:
    operands = {
        name: dataclasses.replace(x, dtype="float32") if jnp.issubdtype(x.dtype, jnp.floating) else x
        for name, x in specimen.operands.items()
    }
    return dataclasses.replace(specimen, operands=operands)


def _split(specimen: Specimen) -> tuple[Specimen, dict[str, int]]:
    """The call with a first axis that 8 devices divide, and which operands have it; {} where it cannot be so."""
    floating = [x for x in specimen.operands.values() if jnp.issubdtype(x.dtype, jnp.floating) and x.shape]
    size = floating[0].shape[0] if floating else 0
    whole = -(-size // comparison.DEVICES) * comparison.DEVICES
    larger = specimens.resized(specimen, {size: whole})
    if size:
        with contextlib.suppress(Problem):
            _problems(larger)
            return larger, {name: 0 for name, x in larger.operands.items() if x.shape and x.shape[0] == whole}
    return specimen, {}


def _why_not(transform: str, plain: comparison.Problem, sharded: dict[str, int]) -> str:
    """Why a transform over devices is left out, or ""."""
    if transform not in comparison.OVER_DEVICES:
        return ""
    if jax.device_count() < comparison.DEVICES:
        return f"needs {comparison.DEVICES} devices, here are {jax.device_count()}"
    if not sharded:
        return "the first axis cannot be a multiple of 8"
    if "shard_map" in transform and not _independent(plain, sharded):
        return "the function is not independent along the first axis, so that shards do not add up to the whole"
    return ""


def _independent(plain: comparison.Problem, sharded: dict[str, int]) -> bool:
    """Whether a shard of the operands gives that shard of the outputs, by reference."""
    rows = next(plain.operands[name].shape[0] for name in sharded) // comparison.DEVICES
    shard = {name: x[rows : 2 * rows] if name in sharded else x for name, x in plain.operands.items()}
    whole = plain.value()
    try:
        part = plain.function(shard)
    except Exception:
        return False
    return all(
        whole[name].ndim > 0
        and whole[name][rows : 2 * rows].shape == part[name].shape
        and comparison.error(part[name], whole[name][rows : 2 * rows]) < 1e-5
        for name in whole
    )


def _by_torch(function: Callable, plain: comparison.Problem) -> dict[str, np.ndarray]:
    """Output and gradients by torch's own derivative."""
    import torch

    operands = {name: torch.from_numpy(np.array(x)) for name, x in plain.operands.items()}
    leaves = {name: operands[name].requires_grad_() for name in plain.differentiable}
    found = peers.torch_outputs(function(**operands))
    weights = {name: torch.from_numpy(plain.weights[name]).float().reshape(y.shape) for name, y in found.items()}
    scalar = sum((torch.sin(y.float()) * weights[name]).sum() for name, y in found.items())
    gradients = torch.autograd.grad(scalar, list(leaves.values()))
    found |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {name: x.detach().double().numpy() for name, x in found.items()}


# ---- a program that shows a failure ---------------------------------------------------------------------------------


def program(specimen: Specimen, rows: Sequence[Row], within: str = "", transform: str = "") -> str:
    """A Python program that makes this one call, compares it as here, and fails as here."""
    module, _, path = specimen.name.rpartition(":")
    called = f"{module}.{path}" if module else f"jaxops.{path}"
    modules = sorted({"jaxops", *([module] if module else [])})
    lines = [f'"""{called} fails: {next(str(row) for row in rows if not row.holds)}."""'.replace("\\", "/"), ""]
    if transform:
        lines += ["import os", "", 'os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"', ""]
    lines += ["import functools", ""] if within else []
    lines += ["import jax.numpy as jnp", "import numpy as np", ""]
    lines += [
        f"import {name}" for name in modules if name != "jaxops" or not module or "jaxops." in str(specimen.options)
    ]
    lines += ["from jaxops.workbench import comparison"] + (["from jaxops.workbench import verify"] if within else [])
    lines += ["", f"random = np.random.default_rng({specimen.seed})", "operands = {"]
    lines += [f'    "{n}": jnp.asarray({x.expression}, "{x.dtype}"),' for n, x in specimen.operands.items()]
    lines += ["}", "", "", "def call(**operands):"]
    static = dict(specimen.options)
    if within and "implementation" in inspect.signature(specimen.function().func).parameters:
        static.setdefault("implementation", "'pallas'")
    arguments = ", ".join(["**operands", *(f"{name}={text}" for name, text in static.items())])
    lines += [f"    return {called}({arguments})", "", ""]
    if transform:
        specimen, sharded = _split(specimen)
        lines += [
            f"given, plain = comparison.problems(call, operands, sharded={sharded})",
            f'rows = [comparison.transformed("{transform}", given, plain, "float32")]',
        ]
    elif within:
        lines += [f"rows = comparison.against_float64(call, operands, within={within})"]
    else:
        lines += ["rows = comparison.against_float64(call, operands)"]
    lines += ['print(*rows, sep="\\n")', "wrong = [row for row in rows if not row.holds]", "assert not wrong, wrong[0]"]
    return "\n".join(lines) + "\n"


def _program_of_transform(specimen: Specimen, rows: Sequence[Row]) -> str:
    name = next(row.name for row in rows if not row.holds).removeprefix("transform ")
    transform = max((t for t in comparison.TRANSFORMS if name.startswith(t)), key=len)
    return program(_split(_in_float32(specimen))[0], rows, transform=transform)


def _words(kernels: Kernels, mode: dict[str, str]) -> str:
    arguments = [repr(kernels.chip), f"races={kernels.races}", f"poison={kernels.poison}"]
    return f"functools.partial(verify.interpreted, {', '.join([*arguments, *(f'{n}={v!r}' for n, v in mode.items())])})"


# ---- the command's own ----------------------------------------------------------------------------------------------


def _kernels(options: argparse.Namespace) -> Kernels | None:
    if options.interpret is None:
        if options.target:
            raise Problem("--target says whose kernels are interpreted: give --interpret tpu or --interpret gpu too")
        return None
    of_platform = [name for name, chip in chips.CHIPS.items() if chip.platform == options.interpret]
    found = targets(options.target or _DEFAULT_CHIP[options.interpret], of_platform)
    if len(found) != 1:
        raise Problem(f"--target must be one chip, got {options.target!r}")
    return Kernels(found[0], options.races, options.poison)


def _ask_for_devices() -> None:
    """Eight devices of the CPU, unless JAX has started already."""
    from jax._src import xla_bridge

    flag = "--xla_force_host_platform_device_count"
    if not xla_bridge.backends_are_initialized() and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={comparison.DEVICES}".strip()


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends the program after so long: a kernel that waits for a signal nobody sends would wait for ever."""

    def give_up() -> None:
        print(
            f"jaxops: not done after {seconds:g} s (--seconds): a kernel may wait for a signal that never comes",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _as_json(specimen: Specimen, report: Report) -> None:
    finite = lambda x: x if math.isfinite(x) else None
    rows = [
        {
            "part": what,
            "name": row.name,
            "holds": row.holds,
            "error": finite(row.error),
            "unfused": finite(row.unfused),
            "allowed": finite(row.allowed),
            "why": row.why,
        }
        for what, rows in report.parts
        for row in rows
    ]
    output.as_json(
        {
            "call": str(specimen),
            "holds": report.holds,
            "comparisons": rows,
            "left_out": [{"transform": name, "why": why} for name, why in report.left_out],
            "by_chance": report.tried,
            "sets": report.sets,
            "program": report.program,
        }
    )


def _print(specimen: Specimen, report: Report) -> None:
    columns = ("", "what", "error", "unfused", "allowed", "")
    table = output.table(str(specimen), columns, right=("error", "unfused", "allowed"))
    for what, rows in report.parts:
        for i, row in enumerate(rows):
            numbers = ("", "", "") if row.why else (f"{row.error:.1e}", f"{row.unfused:.1e}", f"{row.allowed:.1e}")
            table.add_row("" if i else what, row.name, *numbers, "holds" if row.holds else f"FAILS {row.why}".strip())
    output.show(table)
    for name, why in report.left_out:
        print(f"left out: {name}: {why}")
    if report.tried:
        print(f"{report.tried} calls by chance, each on {report.sets} set{'s' * (report.sets > 1)} of random numbers")
    if report.program:
        print(f"\nThis program shows it:\n\n{report.program}")
