"""User-written modifiers of attention, traced into every tile:

    score_mod(score, batch, head, query, key) -> score     of the logits, before they are masked
    mask_mod(batch, head, query, key) -> bool              whether the query attends to the key

Both are elementwise. `score` is floating; the positions are int32 and broadcast with it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

TILE = (2, 3)  # queries × keys of the tile on which a modifier is tried
_POSITIONS = ("batch", "head", "query", "key")
# What mixes elements of an array, or makes them anew: it would mean something else in every tile.
_MIXING = (
    "argm",
    "concat",
    "conv_general",
    "cum",
    "dot_",
    "pad",
    "random_",
    "reduce_",
    "rev",
    "sort",
    "threefry",
    "top_k",
)


def _arguments(scored: bool) -> list[jax.ShapeDtypeStruct]:
    shape = jax.ShapeDtypeStruct
    score = [shape(TILE, jnp.float32)] if scored else []
    return [*score, *(shape(s, jnp.int32) for s in ((1, 1), (1, 1), (TILE[0], 1), (1, TILE[1])))]


def traced(function: Callable, *, scored: bool) -> core.ClosedJaxpr:
    """The program of a modifier, a `score_mod` if `scored`."""
    return jax.make_jaxpr(function)(*_arguments(scored))


def mixing(program: core.ClosedJaxpr) -> str | None:
    """What in the program of a modifier is not elementwise, or None."""
    depends = set(program.jaxpr.invars)  # what is made of constants alone may be made in any way
    for equation in program.jaxpr.eqns:
        if any(not isinstance(x, core.Literal) and x in depends for x in equation.invars):
            depends.update(equation.outvars)
            for one in (equation, *equations(list(equation.params.values()))):
                name = one.primitive.name
                if name.startswith(_MIXING) and name != "reduce_precision":
                    return name
    return None


def captured(program: core.ClosedJaxpr) -> list[Any]:
    """The arrays, concrete or traced, that a modifier took from around it; Python and NumPy numbers are none."""
    literals = [x.val for e in equations(program) for x in e.invars if isinstance(x, core.Literal)]
    found = [*literals, *(x for inner in _programs(program) for x in getattr(inner, "consts", ()))]
    return [x for x in found if np.ndim(x) or isinstance(x, jax.Array)]


def no_kernel(score_mod: Callable | None, mask_mod: Callable | None, bias=None) -> str | None:
    """Why no kernel takes these modifiers, beside this bias [B, N, T, S], whatever the chip, or None."""
    # The terms of its gradient cancel, but for what slopes and sinks make of them: row sums of both would be needed.
    if score_mod is not None and bias is not None and bias.shape[3] == 1:
        return f"a bias that all keys share, {bias.shape}, beside a score_mod has its gradient in XLA only"
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if function is not None:
            arrays = captured(traced(function, scored=name == "score_mod"))
            if arrays:
                return f"{name} captures an array of shape {np.shape(arrays[0])}, and a kernel takes only scalars"
    return None


def uses(mask_mod: Callable) -> dict[str, bool]:
    """Which of "batch", "head", "query" and "key" a `mask_mod` depends on."""
    program = traced(mask_mod, scored=False)
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return dict(zip(_POSITIONS, used, strict=True))


def score_and_slope(score_mod: Callable, score: jax.Array, *positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(score_mod(score), its derivative by the score), of a tile."""
    return jax.jvp(lambda score: score_mod(score, *positions), (score,), (jnp.ones_like(score),))


@functools.lru_cache(maxsize=64)
def count_seen(
    mask_mod: Callable,
    band: Any,
    shape: tuple[int, int, int, int],
    rows: int,
    columns: int,
) -> np.ndarray:
    """How many pairs of each block are seen, int32 [batch or 1, heads or 1, row blocks, column blocks].

    A block has rows × columns pairs, and the logits the shape (batch, heads, queries, keys). `band` (a `masks.Band`)
    holds beside `mask_mod`. Evaluated here and now on the CPU, whatever is being traced around it; once per process.
    """
    batch, heads, queries, keys = shape
    used = uses(mask_mod)
    batch, heads = batch if used["batch"] else 1, heads if used["head"] else 1
    row_blocks, column_blocks = -(-queries // rows), -(-keys // columns)
    column = np.arange(column_blocks * columns, dtype=np.int32)

    def of_block(place):
        one, head, block = place
        row = (block * rows + jnp.arange(rows, dtype=jnp.int32))[:, None]
        seen = mask_mod(one.reshape(1, 1), head.reshape(1, 1), row, column[None])
        seen = seen & (row < queries) & (column < keys) & band.allowed(row, column)
        return jnp.sum(jnp.broadcast_to(seen, (rows, column.size)).reshape(rows, -1, columns), (0, 2), dtype=jnp.int32)

    places = np.indices((batch, heads, row_blocks), dtype=np.int32).reshape(3, -1)
    with jax.ensure_compile_time_eval(), jax.default_device("cpu"):
        counts = jax.jit(lambda places: jax.lax.map(of_block, places))(tuple(places))
    return np.asarray(counts).reshape(batch, heads, row_blocks, column_blocks)


def _programs(value: Any) -> Iterator[Any]:
    """A program, and every one inside it or anywhere in a list."""
    if isinstance(value, tuple | list):
        for one in value:
            yield from _programs(one)
    elif isinstance(jaxpr := getattr(value, "jaxpr", value), core.Jaxpr):
        yield value
        for equation in jaxpr.eqns:
            yield from _programs(list(equation.params.values()))


def equations(value: Any) -> Iterator[Any]:
    """Every equation of a program, of those inside it, or of all programs anywhere in a list."""
    for program in _programs(value):
        yield from getattr(program, "jaxpr", program).eqns
