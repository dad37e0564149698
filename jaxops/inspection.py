"""What would run where, and why: `explain` and `target`."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from jaxops import autodiff, cost, dispatch
from pallas_kernels import chips


@contextlib.contextmanager
def target(name: str, *, interpret: bool = False) -> Iterator[chips.Chip]:
    """Within this context, what is traced and lowered is for the chip `name`, whatever this machine has.

    name: "v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "h100" or "b200".
    interpret: also run that chip's kernels here, on the CPU, in Pallas' interpreter with race detection (calls
      outside `jax.jit`).

    Returns the chip's facts. Raises `ValueError` for an unknown name.
    """
    chip = chips.named(name)
    with chips.target(chip, interpreted=interpret), _interpreter(chip) if interpret else contextlib.nullcontext():
        yield chip


def _interpreter(chip: chips.Chip) -> contextlib.AbstractContextManager[None]:
    from jaxops import interpreter  # the interpreters are a slow import

    return interpreter.tpu() if chip.platform == "tpu" else interpreter.gpu()


@dataclasses.dataclass(frozen=True)
class Line:
    """One operator call of a program: which phase, how often, what would run, why not the others, and what it takes.

    `saved_bytes` is what a forward call keeps for its backward beyond its operands; `tiles` how its kernel is cut, and
    `chip_bytes` what that is estimated to take of the chip's own memory (VMEM of a TPU core, shared memory of a GPU
    block), None where XLA runs or the kernel does not say. `flops` of matrix products and `bytes` to and from device
    memory are what the call needs at least (`jaxops.cost`), and `bound_seconds` the time below which the chip
    cannot do that, set by `bound`, "compute" or "memory"; None where no peak is published, as for a CPU. `note` is what
    the operator has to add: which tiles a mask leaves, what a definition in plain JAX holds at once.
    """

    operator: str
    phase: str
    operands: str
    count: int
    chip: str
    implementation: str
    reason: str
    saved_bytes: int
    tiles: str | None
    chip_bytes: int | None
    flops: int
    bytes: int
    bound_seconds: float | None
    bound: str | None
    note: str | None

    def __str__(self) -> str:
        why = f"  ({self.reason})" if self.reason else ""
        times = f" ×{self.count}" if self.count > 1 else ""
        text = f"{self.operator} {self.phase}{times} [{self.operands}] on {self.chip}: {self.implementation}{why}"
        return f"{text}; {self.note}" if self.note else text


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The operator calls of one traced program, in order of first appearance.

    `temp_bytes` is None where it was not compiled.
    """

    lines: tuple[Line, ...]
    temp_bytes: int | None = None

    def __str__(self) -> str:
        lines = [str(line) for line in self.lines]
        if self.temp_bytes is not None:
            lines.append(f"temporary memory of the compiled program: {self.temp_bytes / 1e6:.1f} MB")
        return "\n".join(lines) or "no jaxops operator is called"

    __repr__ = __str__


def explain(
    function: Callable[..., Any], *args: Any, target: str | None = None, compile: bool = False, **kwargs: Any
) -> Explanation:
    """Which implementation each jaxops operator in `function(*args, **kwargs)` would run on a chip, and why no other.

    function: an operator, or any traceable function that calls some, `jax.grad` of it included.
    args, kwargs: its arguments; arrays may be `jax.ShapeDtypeStruct`s.
    target: a chip name as for `jaxops.target`; None asks for the current target, or for the CPU if there is none.
    compile: also compile the program here and report its temporary memory (only without a target).

    Nothing is computed. Raises `ValueError` for an unknown target, and whatever `function` raises for bad input.
    """
    within = contextlib.nullcontext() if target is None else chips.target(chips.named(target))
    is_array = lambda x: isinstance(x, (jax.ShapeDtypeStruct, jax.Array)) or hasattr(x, "dtype")
    flat, tree = jax.tree.flatten((args, kwargs))
    arrays = [i for i, x in enumerate(flat) if is_array(x)]

    def call(*values):
        full = list(flat)
        for i, value in zip(arrays, values, strict=True):
            full[i] = value
        args_, kwargs_ = jax.tree.unflatten(tree, full)
        return function(*args_, **kwargs_)

    with within:
        chip = chips.targeted()
        traced = jax.jit(call).trace(*[flat[i] for i in arrays])
        found: dict[tuple, Line] = {}
        for equation in operator_calls(traced.jaxpr.jaxpr):
            line = _line(equation, chip)
            key = (line.operator, line.phase, line.operands)
            found[key] = dataclasses.replace(line, count=found[key].count + 1) if key in found else line
        temp = None
        if compile and chip is None:
            temp = traced.lower().compile().memory_analysis().temp_size_in_bytes
    return Explanation(tuple(found.values()), temp)


def _line(equation: Any, chip: chips.Chip | None) -> Line:
    call = equation.params["call"]
    avals = [v.aval for v in equation.invars]
    if chip is None:
        reason: str | None = "kernels run on TPU and CUDA only"
    else:
        reason = autodiff.refusal(chip.platform, call, avals)
    choice = dispatch.choose(call.order, reason)
    tiles, chip_bytes, tile = (None, None, None) if choice.implementation != "pallas" else _cut(call, avals, chip)
    note = None
    if call.operator.note and (tile or choice.implementation == "xla"):
        note = call.operator.note(call.phase, tile, **autodiff.unmapped_operands(call, avals)[0], **dict(call.static))
    needed = cost.of_call(equation)
    peak = None if chip is None else cost.published(chip, avals[0].dtype)
    bound_seconds, bound = (None, None) if peak is None or peak.flops is None else peak.bound(needed)
    saved = equation.outvars[call.operator.differentiable_outputs :] if call.phase == "forward" else ()
    operands = zip(call.names, avals, strict=False)  # past the operands come what was saved, and tangents or cotangents
    return Line(
        operator=call.operator.name,
        phase=call.phase,
        operands=", ".join(f"{name} {aval.str_short(short_dtypes=True)}" for name, aval in operands),
        count=1,
        chip=chip.name if chip else "cpu",
        implementation=choice.implementation or "none",
        reason=choice.reason,
        saved_bytes=sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in saved),
        tiles=tiles,
        chip_bytes=chip_bytes,
        flops=needed.flops,
        bytes=needed.bytes,
        bound_seconds=bound_seconds,
        bound=bound,
        note=note,
    )


def _cut(call: Any, avals: Any, chip: Any) -> tuple[str | None, int | None, tuple[int, int] | None]:
    """The tiles that the kernel of a call takes, the bytes of the chip's own memory that it plans with, and the rows
    and columns of a tile if it says."""
    kernel = getattr(call.operator, chip.platform)
    if not hasattr(kernel, "tiles"):
        return None, None, None
    operands, _ = autodiff.unmapped_operands(call, avals)
    tiles = kernel.tiles(call.phase, **operands, **dict(call.static))
    chip_bytes = (
        kernel.memory(call.phase, tiles, **operands, **dict(call.static)) if hasattr(kernel, "memory") else None
    )
    tile = kernel.tile(call.phase, tiles, **operands, **dict(call.static)) if hasattr(kernel, "tile") else None
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(tiles).items()), chip_bytes, tile


def operator_calls(jaxpr: Any) -> Iterator[Any]:
    """Every operator call of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive is autodiff.operator_p:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, core.Jaxpr):
                    yield from operator_calls(inner)
