"""One way to compare implementations of an operator on the machine at hand.

ratio = median(baseline time) / median(variant time), the baseline being the last variant.

Other programs slow a machine down for seconds at a time, so the variants take turns: every round times each of them
once, in an order that rotates, and only ratios within one run mean anything. A timed call follows an untimed one of the
same variant, as in a training loop: a variant that maps and frees gigabytes would otherwise slow whoever comes next.
Before anything is timed, the variants must agree.

    python -m benchmarks.norms
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured for one variant. Times in seconds; temp_bytes: what XLA allocates beside inputs and outputs."""

    name: str
    median: float
    minimum: float
    maximum: float
    temp_bytes: int
    ratio: float  # how many times faster than the baseline


def compare(
    variants: Mapping[str, Callable],
    args: Sequence,
    *,
    rounds: int = 10,
    tolerance: float = 1e-3,
) -> list[Row]:
    """Times `jit(variant)(*args)` for every variant, interleaved. The last variant is the baseline.

    Args:
      variants: name → function of `args`; all return pytrees of the same structure.
      args: the arguments, pytrees of arrays; they are put on the device once.
      rounds: how often each variant runs, after one warm-up.
      tolerance: largest allowed ‖output - baseline's‖ / ‖baseline's‖ (Frobenius norms) for each leaf.

    Returns:
      One `Row` per variant, in the order given.

    Raises:
      ValueError: `variants` is empty or `rounds` is below 1.
      AssertionError: two variants disagree; nothing has been timed then.
    """
    if not variants or rounds < 1:
        raise ValueError(f"compare needs at least one variant and one round, got {len(variants)} and {rounds}")
    args = jax.device_put(tuple(args))
    compiled = {name: jax.jit(function).lower(*args).compile() for name, function in variants.items()}
    *_, baseline = compiled
    expected = _leaves(compiled[baseline](*args))
    for name, function in compiled.items():
        _check_agreement(name, _leaves(function(*args)), baseline, expected, tolerance)

    times: dict[str, list[float]] = {name: [] for name in compiled}
    names = itertools.cycle(compiled)
    for _ in range(rounds):
        for _ in compiled:
            name = next(names)
            jax.block_until_ready(compiled[name](*args))  # after itself, not in caches and pages its neighbour left
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            times[name].append(time.perf_counter() - start)
        next(names)  # rotate: nobody always runs after the same neighbour
    reference = statistics.median(times[baseline])
    return [
        Row(
            name,
            statistics.median(seconds),
            min(seconds),
            max(seconds),
            compiled[name].memory_analysis().temp_size_in_bytes,
            reference / statistics.median(seconds),
        )
        for name, seconds in times.items()
    ]


def with_gradients(function: Callable, argnums: Sequence[int] = (0,)) -> Callable:
    """(output, gradients) of `function`, the cotangent being the last argument: forward and backward in one program."""

    def forward_and_backward(*args):
        *inputs, cotangent = args

        def of_chosen(*chosen):
            full = list(inputs)
            for index, value in zip(argnums, chosen, strict=True):
                full[index] = value
            return function(*full)

        output, pull_back = jax.vjp(of_chosen, *(inputs[index] for index in argnums))
        return output, pull_back(cotangent)

    return forward_and_backward


def report(title: str, rows: Sequence[Row]) -> None:
    """Prints the rows as a table: with `rich` where it is installed, else as plain text."""
    header = ("variant", "median ms", "min", "max", "temp MB", "times faster")
    body = [
        (
            row.name,
            *(f"{1e3 * seconds:.2f}" for seconds in (row.median, row.minimum, row.maximum)),
            f"{row.temp_bytes / 1e6:.1f}",
            f"{row.ratio:.2f}",
        )
        for row in rows
    ]
    try:
        import rich.console
        import rich.table
    except ImportError:
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        print(title)
        for line in [header, *body]:
            first, *rest = (
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print("  ".join([first, *rest]))
        return
    table = rich.table.Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for line in body:
        table.add_row(*line)
    rich.console.Console().print(table)


def _leaves(tree) -> list[np.ndarray]:
    # float64: the norm of a large float16 or bfloat16 array overflows or stalls in its own type.
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _check_agreement(name, got, baseline, expected, tolerance) -> None:
    shapes, expected_shapes = ([leaf.shape for leaf in leaves] for leaves in (got, expected))
    if shapes != expected_shapes:
        raise AssertionError(f"{name} returns shapes {shapes}, {baseline} returns {expected_shapes}")
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        distance = np.linalg.norm((ours - theirs).ravel())
        scale = np.linalg.norm(theirs.ravel())
        # `not <=` also catches NaN.
        if not distance <= tolerance * scale + 1e-30:
            raise AssertionError(
                f"{name} differs from {baseline} in output {i}: relative error {distance / max(scale, 1e-30):.2e}, "
                f"allowed {tolerance:.0e}"
            )
