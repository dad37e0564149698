"""Elementwise functions of the user inside a Mosaic GPU kernel, in the primitives that its compiler takes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from pallas_kernels import activations

# Elementwise primitives that Mosaic GPU lowers, all of them tried. (Its sine is wrong far from 0.)
_COMPILED = frozenset(
    (
        "jit",
        *("abs", "add", "and", "broadcast_in_dim", "convert_element_type", "div", "eq", "exp", "exp2", "ge"),
        *("gt", "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "rem", "rsqrt"),
        *("select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sqrt", "square"),
        *("sub", "xor"),
    )
)


def refusal(equation: Any) -> str | None:
    """Why the compiler cannot take an equation of a `lowered` function, as what the function does, or None."""
    name = equation.primitive.name
    if name not in _COMPILED:
        return f"uses {name}, which the kernel cannot compile"
    for variable in equation.outvars:
        dtype = variable.aval.dtype
        if dtype.itemsize not in (1, 4):
            return f"computes in {dtype}, and the kernel only in float32, int32 and bool"
        if name == "rem" and jnp.issubdtype(dtype, jnp.floating):
            return "takes a remainder of floating numbers, which the kernel cannot compile"
    return None


def lowered(function: Callable) -> Callable:
    """`function` of arrays, in the primitives that Mosaic GPU compiles as they are."""

    def evaluate(program, *values):
        jaxpr = program.jaxpr
        found = dict(zip((*jaxpr.invars, *jaxpr.constvars), (*values, *program.consts), strict=True))
        read = lambda x: x.val if isinstance(x, core.Literal) else found[x]
        for equation in jaxpr.eqns:
            inputs, name, parameters = [read(x) for x in equation.invars], equation.primitive.name, equation.params
            if name in _INLINED:
                outputs = evaluate(parameters[_INLINED[name]], *inputs)
            elif name in _REPLACED:
                outputs = [_REPLACED[name](*inputs, **parameters)]
            else:
                outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(parameters))
                outputs = outputs if equation.primitive.multiple_results else [outputs]
            found |= zip(equation.outvars, outputs, strict=True)
        return [read(x) for x in jaxpr.outvars]

    def call(*arguments):
        program, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        return jax.tree.unflatten(jax.tree.structure(shape), evaluate(program, *arguments))

    return call


def derived(activation: Callable, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(activation(x), activation'(x) · dy), as `lowered` computes them."""
    return lowered(functools.partial(activations.along, activation))(x, dy)


def _tanh(x, **_):
    """±(1 - e) / (1 + e), e = exp(-2 |x|): the hardware's is wrong by 2⁻¹¹."""
    e = jnp.exp(-2 * jnp.abs(x))
    root = lax.rsqrt(1 + e)  # a division costs a subroutine
    size = (1 - e) * (root * root)
    return jnp.where(x >= 0, size, -size)


def _log1p(x, **_):
    """log(u) x / (u - 1), u = 1 + x: the rounding of u cancels (Goldberg 1991, theorem 4)."""
    u = 1 + x
    exact = (u == 1) | (u == jnp.inf)
    return jnp.where(exact, x, jnp.log(u) * x / jnp.where(exact, 1.0, u - 1))


def _power(x, *, y, **_):
    """x to an integer, by squaring: Mosaic takes only the square."""
    if y < 0:
        return 1 / _power(x, y=-y)
    if y < 2:
        return x if y else jnp.ones_like(x)
    half = _power(x, y=y // 2)
    return half * half * x if y % 2 else half * half


def _not(x, **_):
    return jnp.not_equal(x, True) if x.dtype == jnp.bool_ else ~x


def _convert(x, *, new_dtype, **_):
    if x.dtype == jnp.bool_ and new_dtype != jnp.bool_:
        return jnp.where(x, jnp.ones((), new_dtype), jnp.zeros((), new_dtype))
    return lax.convert_element_type(x, new_dtype)


def _select(which, *cases, **_):
    return lax.select_n(jnp.broadcast_to(which, cases[0].shape), *cases)


_INLINED = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
_REPLACED: dict[str, Callable[..., jax.Array]] = {
    "add_any": lambda x, y, **_: lax.add(x, y),
    "convert_element_type": _convert,
    "integer_pow": _power,
    "is_finite": lambda x, **_: jnp.abs(x) < jnp.inf,
    "log1p": _log1p,
    "not": _not,
    "one_minus_square": lambda x, **_: (1 - x) * (1 + x),
    "select_n": _select,
    "tanh": _tanh,
}
