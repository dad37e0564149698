"""A call of an operator, written in words: which function, which operands of which shape and dtype, which options."""

import argparse
import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxops

# What an expression of an option may name.
NAMES = {"jaxops": jaxops, "jnp": jnp}


class Problem(Exception):
    """What was asked cannot be done, in one line for whoever asked."""


def operators() -> dict[str, Callable]:
    """The operators of this library by name."""
    return {
        name: value
        for name, value in vars(jaxops).items()
        if inspect.isfunction(value) and value.__module__.startswith("jaxops.ops.")
    }


def nearest(what: str, name: str, known: Iterable[str]) -> Problem:
    """The problem that `name` is none of the `known`, with the likeliest one."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]}?" if close else ""
    return Problem(f"{what} must be one of {', '.join(known)}, got {name!r}{hint}")


def function(name: str) -> Callable:
    """The operator `name`, or the function that "module:name" says. Raises `Problem` where there is none."""
    if ":" not in name:
        known = operators()
        if name not in known:
            raise nearest("the operator", name, known)
        return known[name]
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise Problem(f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise nearest(f"a name in {module_name}", path, [n for n in vars(found) if not n.startswith("_")])
        found = getattr(found, part)
    if not callable(found):
        raise Problem(f"{name} must be a function, got {type(found).__name__}")
    return found


def operand(text: str, dtype: str) -> tuple[str, jax.ShapeDtypeStruct]:
    """("x", its shape and dtype) of "x=8192x4096" (in `dtype`) or "labels=8192:int32". Raises `Problem` otherwise.

    What follows a < is `bound`'s.
    """
    name, equals, rest = text.partition("<")[0].partition("=")
    sizes, _, own = rest.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split("x")) if sizes else ()
    except ValueError:
        shape = (-1,)
    if not (name.isidentifier() and equals) or any(size < 0 for size in shape):
        raise Problem(f"an operand must be name=sizes or name=sizes:dtype, as in x=8192x4096, got {text!r}")
    return name, jax.ShapeDtypeStruct(shape, _dtype(name, own or dtype))


def bound(text: str, default: int = 2) -> int:
    """50257 of "labels=8192:int32<50257": random integers are below it. Raises `Problem` for what is no number."""
    words, less, most = text.partition("<")
    if not less:
        return default
    if not most.isdigit() or int(most) < 1 or not jnp.issubdtype(operand(words, "float32")[1].dtype, jnp.integer):
        raise Problem(f"a bound must follow an integer dtype, as in labels=8192:int32<50257, got {text!r}")
    return int(most)


def _dtype(name: str, dtype: str) -> np.dtype:
    try:
        return jnp.dtype(dtype)
    except TypeError as error:
        raise Problem(f"the dtype of {name} must be one that JAX knows, as bfloat16 or int32, got {dtype!r}") from error


def option(text: str) -> tuple[str, Any]:
    """("is_causal", True) of "is_causal=True": a Python literal, a function, else the text itself.

    A function is a lambda or a name of jaxops or jnp: "score_mod=lambda s, b, h, i, j: jnp.tanh(s)",
    "activation=jaxops.silu". Raises `Problem` where there is none.
    """
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise Problem(f"an option must be name=value, as in is_causal=True, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        if not value.startswith(("lambda ", *(f"{module}." for module in NAMES))):
            return name, value
    try:
        return name, eval(value, dict(NAMES))
    except Exception as error:
        raise Problem(f"option {name}: {value} is no function: {type(error).__name__}: {error}") from error


def parts(
    name: str, operands: Sequence[str], options: Sequence[str], dtype: str
) -> tuple[Callable, dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """(function, operands, options) of a call that the function's signature takes. Raises `Problem` as `call` does."""
    f = function(name)
    arrays = dict(operand(text, dtype) for text in operands)
    static = dict(option(text) for text in options)
    try:
        inspect.signature(f).bind(**arrays, **static)
    except TypeError as error:
        raise Problem(f"{name}: {error}; its arguments are {inspect.signature(f)}") from error
    return f, arrays, static


def call(
    name: str, operands: Sequence[str], options: Sequence[str], dtype: str, gradients: bool
) -> tuple[Callable, dict[str, jax.ShapeDtypeStruct]]:
    """(f, operands) such that f(**operands) is the call; with `gradients`, also those of all floating operands.

    Raises `Problem` where the words do not make sense, or the function has no such argument.
    """
    f, arrays, static = parts(name, operands, options, dtype)

    def forward(**arrays: Any) -> Any:
        return f(**arrays, **static)

    def forward_and_backward(**arrays: Any) -> Any:
        chosen = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        fixed = {name: x for name, x in arrays.items() if name not in chosen}
        output, pull_back = jax.vjp(lambda chosen: forward(**chosen, **fixed), chosen)
        return output, pull_back(jax.tree.map(jnp.ones_like, output))

    return (forward_and_backward if gradients else forward), arrays


def add_call_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of every command that is about one call: operator, operands, --set, --dtype, --gradients."""
    command.add_argument("operator", help="an operator of the library, or module:function")
    command.add_argument(
        "operands", nargs="+", metavar="name=sizes[:dtype]", help="as x=8192x4096 or labels=8192:int32"
    )
    command.add_argument("--set", action="append", default=[], metavar="name=value", help="an option of the operator")
    command.add_argument("--dtype", default="bfloat16", help="of every operand without its own (default: %(default)s)")
    command.add_argument("--gradients", action="store_true", help="forward and backward, for all floating operands")


def targets(text: str, known: Sequence[str]) -> list[str]:
    """The chips in "v5e,h100". Raises `Problem` with the nearest known name for an unknown one."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise nearest("--target", name, known)
    return names
