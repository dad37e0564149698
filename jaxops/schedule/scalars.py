"""Scalar operands of Pallas calls whose values are known while tracing: tables of blocks, masks, offsets.

A kernel's grid often hangs on them (a sparse mask skips blocks). XLA gets them as constants, but a kernel's schedule
says only that it loads them from SMEM; here they are found by carrying constants through the traced program.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

_MOST_ELEMENTS = 1 << 25  # larger constants are not carried along
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")  # a primitive's parameter that holds the program it calls once
_CONTROL = ("scan", "while", "cond")


@dataclasses.dataclass(frozen=True)
class Scalars:
    """What is known of one `pallas_call`: its kernel's name, its grid, and the SMEM words of operands by index."""

    name: str
    grid: tuple[int | None, ...]  # None: a bound that is an operand itself
    words: Mapping[int, tuple[int, ...]]


def smem_words(array: np.ndarray) -> tuple[int, ...]:
    """The 32-bit words of an integer array as SMEM holds it.

    One dimension of 32-bit integers is contiguous. Otherwise rows are padded to 128 words, and 8- and 16-bit integers
    are packed, four or two consecutive rows to a word, the first one lowest.
    """
    width = {"b": 1, "i": array.dtype.itemsize, "u": array.dtype.itemsize}[array.dtype.kind]
    values = array.astype(np.int64)
    if array.ndim <= 1 and width == 4:
        return tuple(values.ravel().tolist())
    values = values.reshape(-1, *values.shape[-1:]) if values.ndim <= 1 else values
    packed = max(4 // width, 1)
    rows, columns = values.shape[-2:]
    padded = np.zeros((*values.shape[:-2], -(-rows // packed) * packed, -(-columns // 128) * 128), np.int64)
    padded[..., :rows, :columns] = values & ((1 << 8 * width) - 1)
    grouped = padded.reshape(-1, packed, padded.shape[-1])
    shifts = 8 * width * np.arange(packed)
    return tuple((grouped << shifts[:, None]).sum(axis=1).ravel().tolist())


def known_scalars(traced: Any, arguments: Sequence[Any] = ()) -> list[Scalars]:
    """What is known of every `pallas_call` of a traced program, in program order.

    traced: what `jax.jit(f).trace(*args)` returns.
    arguments: the values of the flattened arguments that are to be taken as known, None for the others. Without it,
      only what the program computes from constants is known.
    """
    found: list[Scalars] = []
    closed = traced.jaxpr
    given = list(arguments) + [None] * (len(closed.jaxpr.invars) - len(arguments))
    _carry(closed.jaxpr, closed.consts, [None if value is None else np.asarray(value) for value in given], found)
    return found


def _carry(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any], found: list[Scalars]) -> list[Any]:
    """The known outputs of `jaxpr`, None for the others; appends its Pallas calls to `found`."""
    known = {
        variable: np.asarray(value)
        for variable, value in [*zip(jaxpr.constvars, constants, strict=True), *zip(jaxpr.invars, inputs, strict=True)]
        if value is not None and np.size(value) < _MOST_ELEMENTS
    }

    def value_of(variable: Any) -> Any:
        return np.asarray(variable.val) if isinstance(variable, core.Literal) else known.get(variable)

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        values = [value_of(variable) for variable in equation.invars]
        results: Sequence[Any] = ()
        inner = next((equation.params[key] for key in _INNER if _is_program(equation.params.get(key))), None)
        if name == "pallas_call":
            found.append(_of_call(equation, values))
        elif inner is not None and name not in _CONTROL:
            program = getattr(inner, "jaxpr", inner)
            if len(program.invars) == len(values):
                results = _carry(program, getattr(inner, "consts", ()), values, found)
        elif inner is not None:
            _calls_within(equation, found)
        elif all(value is not None for value in values) and all(
            getattr(variable.aval, "size", _MOST_ELEMENTS) < _MOST_ELEMENTS for variable in equation.outvars
        ):
            results = _evaluate(equation, values)
        known |= {
            variable: value for variable, value in zip(equation.outvars, results, strict=False) if value is not None
        }
    return [value_of(variable) for variable in jaxpr.outvars]


def _is_program(parameter: Any) -> bool:
    return isinstance(getattr(parameter, "jaxpr", parameter), core.Jaxpr)


def _calls_within(equation: Any, found: list[Scalars]) -> None:
    """The Pallas calls of a loop or branch: their operands differ from trip to trip, so nothing of them is known."""
    for parameter in equation.params.values():
        for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            program = getattr(inner, "jaxpr", inner)
            if isinstance(program, core.Jaxpr):
                constants = getattr(inner, "consts", [None] * len(program.constvars))
                _carry(program, constants, [None] * len(program.invars), found)


def _evaluate(equation: Any, values: Sequence[np.ndarray]) -> list[Any]:
    try:
        results = equation.primitive.bind(*values, **equation.params)
        return [np.asarray(result) for result in (results if equation.primitive.multiple_results else [results])]
    except Exception:  # a primitive that cannot be computed here (a collective, say): its results are not known
        return []


def _of_call(equation: Any, values: Sequence[Any]) -> Scalars:
    mapping = equation.params["grid_mapping"]
    prefetched = mapping.num_index_operands + mapping.num_dynamic_grid_bounds
    words = {
        index: smem_words(value)
        for index, value in enumerate(values)
        if value is not None and value.dtype.kind in "iub" and (index < prefetched or value.size < 1 << 16)
    }
    information = equation.params.get("name_and_src_info")
    return Scalars(
        name=getattr(information, "name", None) or equation.params.get("name") or "",
        grid=tuple(int(bound) if isinstance(bound, (int, np.integer)) else None for bound in mapping.grid),
        words=words,
    )
