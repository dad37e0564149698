"""One way to compare implementations on the machine at hand.

Other programs slow a machine down for seconds at a time, so the variants take turns: every round times each of them
once, in an order that rotates, and only ratios within one run mean anything. A timed call follows an untimed one of the
same variant, as in a training loop: a variant that maps and frees gigabytes would otherwise slow whoever comes next.
Before anything is timed, the variants must agree.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.cost import Peak


@dataclasses.dataclass(frozen=True)
class Spread:
    """The seconds of one variant, one figure a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def maximum(self) -> float:
        return max(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """(lower, upper): half of the rounds lie between them."""
        lower, upper = np.quantile(self.seconds, (0.25, 0.75))
        return float(lower), float(upper)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured for one variant. temp_bytes: what XLA allocates beside inputs and outputs."""

    name: str
    spread: Spread
    temp_bytes: int
    ratio: float  # median of the baseline / median of this one: how many times faster than the baseline


def take_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, advance: Callable[[str], None] = lambda _: None
) -> dict[str, Spread]:
    """Times every call once a round, in a rotating order, each right after an untimed call of itself.

    A call is over when the JAX arrays it returns are there. `advance(name)` is called after each timed call. Raises
    `ValueError` for no call or no round.
    """
    if not calls or rounds < 1:
        raise ValueError(f"timing needs at least one variant and one round, got {len(calls)} and {rounds}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = itertools.cycle(calls)
    for _ in range(rounds):
        for _ in calls:
            name = next(names)
            jax.block_until_ready(calls[name]())  # after itself, not in caches and pages its neighbour left
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(time.perf_counter() - start)
            advance(name)
        next(names)  # rotate: nobody always runs after the same neighbour
    return {name: Spread(tuple(seconds)) for name, seconds in times.items()}


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
    spreads = take_turns({name: functools.partial(function, *args) for name, function in compiled.items()}, rounds)
    reference = spreads[baseline].median
    return [
        Row(name, spread, temp_bytes(compiled[name]), reference / spread.median) for name, spread in spreads.items()
    ]


_SIDE, _LENGTH = 1024, 1 << 24


def peak_calls(dtype: Any) -> dict[str, Callable[[], Any]]:
    """What shows what this device can do, to take turns with what is measured: a product of 1024³, a triad a + 2 · b.

    Sums are float32, and so are products of a dtype of less than 16 bits or no fraction. The triad's two arrays of
    64 MiB fit no cache, and the result takes the place of the first.
    """
    plain = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1
    matrix = jnp.full((_SIDE, _SIDE), 0.5, dtype if plain else jnp.float32)
    wide = jnp.promote_types(matrix.dtype, jnp.float32)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=wide)).lower(matrix).compile()
    a, b = jnp.zeros(_LENGTH, jnp.float32), jnp.zeros(_LENGTH, jnp.float32)
    add = jax.jit(lambda a, b: a + 2 * b, donate_argnums=0).lower(a, b).compile()

    def triad():
        nonlocal a
        a = add(a, b)
        return a

    return {"peak: product": functools.partial(product, matrix), "peak: triad": triad}


def peak_of(spreads: Mapping[str, Spread]) -> Peak:
    """The best of the rounds of `peak_calls`. Other programs on the machine lower it."""
    product, triad = (spreads[name].minimum for name in ("peak: product", "peak: triad"))
    return Peak(2 * _SIDE**3 / product, 12 * _LENGTH / triad, "measured in this run: a product, a triad")


def temp_bytes(compiled: Any) -> int:
    """What XLA allocates for a compiled program beside inputs and outputs; 0 where the backend does not say."""
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)


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
            *(f"{1e3 * seconds:.2f}" for seconds in (row.spread.median, row.spread.minimum, row.spread.maximum)),
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
