"""What a call has to compute and to move at least, read from its traced program, and the time a chip needs for that.

    flops = Σ 2 · m · n · k over the matrix products and convolutions
    bytes = max(operands + outputs of the program, Σ operands + outputs over its calls of operators)

These are the flops of the model: what an implementation computes again to save memory does not count, and neither do
elementwise arithmetic, exponentials and sums, which no matrix unit does. An operator says its flops by its own formula,
or its reference is counted. The bytes are those of an operator that reads each operand once, writes each output once
and keeps nothing on the chip for the next operator.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from jaxops import autodiff, dispatch
from pallas_kernels import chips


@dataclasses.dataclass(frozen=True)
class Cost:
    """`exact` is False where the flops depend on what only a run knows, a loop counted once or a raw kernel."""

    flops: int
    bytes: int
    exact: bool = True


def of(function: Callable[..., Any], *args: Any, **operands: Any) -> Cost:
    """The cost of `function(*args, **operands)`; arrays may be `jax.ShapeDtypeStruct`s. Nothing is computed.

    What no output needs does not count.

    Raises whatever `function` raises for bad input.
    """
    whole = jax.jit(function).trace(*args, **operands).jaxpr.jaxpr
    program, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))
    flops, called, exact = _count(program)
    return Cost(flops, max(_bytes([*program.constvars, *program.invars, *program.outvars]), called), exact)


def of_call(equation: Any) -> Cost:
    """The cost of one call of an operator, as its equation stands in a traced program: of this phase, every vmap."""
    flops, exact = _operator(equation)
    return Cost(flops, _moved(equation), exact)


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a device can do at most: FLOP/s of matrix products of one dtype (None: not known), bytes/s of its memory.

    `source` says who says so.
    """

    flops: float | None
    bandwidth: float
    source: str

    def bound(self, cost: Cost) -> tuple[float, Literal["compute", "memory"]]:
        """The roofline: the seconds that no program of this cost can beat, and what sets them.

        Raises `ValueError` if it has products and their peak is not known.
        """
        if cost.flops and self.flops is None:
            raise ValueError(f"no peak is known for products of this dtype ({self.source})")
        compute, memory = cost.flops / (self.flops or 1), cost.bytes / self.bandwidth
        return (compute, "compute") if compute > memory else (memory, "memory")


def published(chip: chips.Chip, dtype: Any) -> Peak:
    """The peak of `chip` by its maker, for products of `dtype`.

    Eight bits go at twice the rate of sixteen (not on v4). float32 is what JAX does by default: one bfloat16 pass on
    TPU, TF32 at half the rate on GPU. For other dtypes, as float64, the peak of products is not known.
    """
    by_size = {1: 1 if chip.name == "v4" else 2, 2: 1, 4: 0.5 if chip.platform == "gpu" else 1}
    rate = by_size.get(jnp.dtype(dtype).itemsize)
    return Peak(None if rate is None else chip.flops * rate, chip.bandwidth, f"{chip.name}, published")


def bound(cost: Cost, chip: chips.Chip, dtype: Any) -> tuple[float, Literal["compute", "memory"]]:
    """The roofline of `cost` on `chip`: (seconds, what sets them). Raises `ValueError` as `Peak.bound` does."""
    return published(chip, dtype).bound(cost)


def _bytes(variables: Any) -> int:
    arrays = {v: v.aval for v in variables if not isinstance(v, core.Literal) and hasattr(v.aval, "dtype")}
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in arrays.values())


def _moved(equation: Any) -> int:
    """The bytes of one call of an operator: what it writes, and what its rule reads of all that it is given.

    What two operands have in common as their gradient is written once.
    """
    call = equation.params["call"]
    with dispatch.alone():
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
        rule = jax.make_jaxpr(call.run("xla", None).__wrapped__)(*shapes).jaxpr
    _, read = partial_eval.dce_jaxpr(rule, [True] * len(rule.outvars))
    return _bytes([*(v for v, used in zip(equation.invars, read, strict=True) if used), *rule.outvars])


def _count(jaxpr: Any) -> tuple[int, int, bool]:
    """(flops, bytes of the operator calls, whether that is all known) of a program and its inner programs."""
    flops, moved, exact = 0, 0, True
    for equation in jaxpr.eqns:
        name, times = equation.primitive.name, 1
        if equation.primitive is autodiff.operator_p:
            more, known = _operator(equation)
            flops, exact = flops + more, exact and known
            moved += _moved(equation)
            continue
        if name in _PRODUCTS:
            flops += _PRODUCTS[name](equation)
            continue
        inner = [_count(program) for program in _inner(equation)]
        if not inner:
            continue
        if name == "cond":  # the dearest branch
            inner = [max(inner)]
        elif name == "scan":
            times = equation.params["length"]
        elif name == "while":
            exact = exact and not any(f or m for f, m, _ in inner)
        elif name == "pallas_call":  # a step may skip what its body holds
            grid = equation.params["grid_mapping"].grid
            times, exact = math.prod(size for size in grid if isinstance(size, int)), False
        flops += times * sum(f for f, _, _ in inner)
        moved += times * sum(m for _, m, _ in inner)
        exact = exact and all(known for _, _, known in inner)
    return flops, moved, exact


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for program in value if isinstance(value, (tuple, list)) else (value,):
            program = getattr(program, "jaxpr", program)
            if isinstance(program, core.Jaxpr):
                yield program


def _operator(equation: Any) -> tuple[int, bool]:
    """The flops of one call of an operator; without a formula a derivative counts two products for each of forward."""
    call = equation.params["call"]
    operands, copies = autodiff.unmapped_operands(call, [v.aval for v in equation.invars])
    static = dict(call.static)
    if call.operator.cost is not None:
        forward, backward = call.operator.cost(**operands, **static)
        exact = True
    else:
        reference = jax.make_jaxpr(lambda operands: call.operator.reference(**operands, **static))(operands)
        forward, _, exact = _count(reference.jaxpr)
        backward = 2 * forward
    return copies * (forward if call.phase == "forward" else backward), exact


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged_dot(equation: Any) -> int:
    left, right = (v.aval.shape for v in equation.invars[:2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    used = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2 * math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in used)


def _convolution(equation: Any) -> int:
    kernel = equation.invars[1].aval.shape
    per_output = math.prod(kernel) // max(kernel[equation.params["dimension_numbers"].rhs_spec[0]], 1)
    return 2 * math.prod(equation.outvars[0].aval.shape) * per_output


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
