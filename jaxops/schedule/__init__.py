"""Schedule models: what a compiled kernel will cost on a chip, read off what its compiler wrote, with no chip.

`jaxops.schedule.tpu` emulates the final VLIW schedule of a TPU kernel; `jaxops.schedule.gpu` counts what a GPU kernel's
machine code holds. Both give `Kernel`s. Everything is modelled, nothing measured: each module says what it cannot see.
"""

from collections.abc import Iterable
from typing import Any

from jaxops.schedule.bundles import ScheduleError as ScheduleError


def figures(kernels: Iterable[Any]) -> list[dict]:
    """The figures of every kernel, in values JSON has."""
    return [kernel.figures() for kernel in kernels]


def program_seconds(kernels: Iterable[Any]) -> float | None:
    """Modelled seconds of a TPU program: Σ calls × seconds over its kernels, the program around them included.

    None for a GPU program, whose trip counts are not known, and for no kernel at all.
    """
    kernels = list(kernels)
    if not kernels or not all(hasattr(kernel, "seconds") for kernel in kernels):
        return None
    return sum(kernel.calls * kernel.seconds for kernel in kernels)
