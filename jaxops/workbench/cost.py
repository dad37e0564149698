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

from jaxops import autodiff
from pallas_kernels import chips


@dataclasses.dataclass(frozen=True)
class Cost:
    """`exact` is False where the flops depend on what only a run knows, a loop counted once or a raw kernel."""

    flops: int
    bytes: int
    exact: bool = True


def of(function: Callable[..., Any], *args: Any, **operands: Any) -> Cost:
    """The cost of `function(*args, **operands)`; arrays may be `jax.ShapeDtypeStruct`s. Nothing is computed.

    Raises whatever `function` raises for bad input.
    """
    program = jax.jit(function).trace(*args, **operands).jaxpr
    flops, called, exact = _count(program.jaxpr)
    inputs = [*program.jaxpr.constvars, *program.jaxpr.invars]
    return Cost(flops, max(_bytes([*inputs, *program.jaxpr.outvars]), called), exact)


def bound(cost: Cost, chip: chips.Chip, dtype: Any) -> tuple[float, Literal["compute", "memory"]]:
    """The roofline: (the seconds no program can beat, what sets them), for products of `dtype` on `chip`.

    Raises `ValueError` for a dtype without a published peak, as float64.
    """
    rate = peak_flops(chip, dtype)
    if rate is None:
        raise ValueError(f"no peak is known for products of {jnp.dtype(dtype)} on {chip.name}")
    compute, memory = cost.flops / rate, cost.bytes / chip.bandwidth
    return (compute, "compute") if compute > memory else (memory, "memory")


def peak_flops(chip: chips.Chip, dtype: Any) -> float | None:
    """The peak FLOP/s of products of `dtype`, or None where none is published.

    Eight bits go at twice the rate of sixteen (not on v4). float32 is what JAX does by default: one bfloat16 pass on
    TPU, TF32 at half the rate on GPU.
    """
    size = jnp.dtype(dtype).itemsize
    if size == 1:
        return chip.flops * (1 if chip.name == "v4" else 2)
    if size == 2:
        return chip.flops
    if size == 4:
        return chip.flops / (2 if chip.platform == "gpu" else 1)
    return None


def _bytes(variables: Any) -> int:
    arrays = {v: v.aval for v in variables if not isinstance(v, core.Literal) and hasattr(v.aval, "dtype")}
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in arrays.values())


def _count(jaxpr: Any) -> tuple[int, int, bool]:
    """(flops, bytes of the operator calls, whether that is all known) of a program and its inner programs."""
    flops, moved, exact = 0, 0, True
    for equation in jaxpr.eqns:
        name, times = equation.primitive.name, 1
        if equation.primitive is autodiff.operator_p:
            more, known = _operator(equation)
            flops, exact = flops + more, exact and known
            moved += _bytes([*equation.invars, *equation.outvars])
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
