"""What the compiled program of a function sends, by kind of collective and mesh axis."""

import collections
from collections.abc import Callable
from typing import Any

import jax

from jaxops.workbench.collectives import collectives


def compiled(function: Callable, *operands: Any) -> Any:
    """`function`, compiled for these operands."""
    return jax.jit(function).lower(*operands).compile()


def sent(program: Any, axes: dict[str, int]) -> dict[tuple[str, str], int]:
    """Bytes of a program's collectives on one device, {(kind, axis): their sum}; groups of one device send none."""
    total: collections.Counter = collections.Counter()
    for one in collectives(program.as_text(), axes):
        axis = "+".join(name for name in (one["axis"] or "?").split("+") if axes.get(name, 0) != 1)
        if axis:
            total[one["kind"], axis] += one["bytes"] * one["count"]
    return dict(total)
