"""Elementwise functions of the user inside a TPU kernel: what Mosaic compiles of them."""

from typing import Any

import jax.numpy as jnp

# Elementwise primitives that Mosaic lowers, on float32, 32-bit integers and booleans.
_COMPILED = frozenset(
    (
        *("abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "cos"),
        *("div", "eq", "erf", "exp", "exp2", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log"),
        *("log1p", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or"),
        *("pow", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic"),
        *("shift_right_logical", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
    )
)
_PROGRAMS = frozenset(("custom_jvp_call", "jit"))  # what is in them is asked for by itself
_TYPES = ("bool", "float32", "int32", "uint32")


def refusal(equation: Any) -> str | None:
    """Why the compiler cannot take an equation of a function of the user, as what the function does, or None."""
    name = equation.primitive.name
    if name not in _COMPILED | _PROGRAMS:
        return f"uses {name}, which the TPU kernel does not lower"
    if name == "select_n" and equation.outvars[0].aval.dtype == jnp.bool_:
        return "chooses between booleans, which the TPU kernel does not lower: write (c & a) | (~c & b)"
    for variable in (*equation.invars, *equation.outvars):
        if jnp.dtype(variable.aval.dtype).name not in _TYPES:
            return f"computes in {variable.aval.dtype}; the TPU kernel takes {', '.join(_TYPES)}"
    return None
