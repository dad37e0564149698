"""User-written activations inside a kernel: elementwise functions of a float32 tile, and their gradients by JAX."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import modifiers

# Primitives that hold a program, which is looked into.
_HOLDERS = ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit")
# What a tile of every size and layout goes through element by element, and the compiler of each platform lowers.
_ON_BOTH = (
    *("abs", "add", "convert_element_type", "div", "eq", "exp", "exp2", "ge", "gt", "integer_pow", "le", "log"),
    *("logistic", "lt", "max", "min", "mul", "ne", "neg", "rsqrt", "select_n", "sign", "sqrt", "square", "sub"),
)
_ELEMENTWISE = {
    "tpu": (
        *_ON_BOTH,
        *("add_any", "and", "clamp", "cos", "floor", "is_finite", "log1p", "not", "one_minus_square", "or", "pow"),
        *("round", "sin", "stop_gradient", "tan", "tanh"),
    ),
    "gpu": _ON_BOTH,
}
_TILE = (16, 128)


def along(activation: Callable, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(activation(x), activation'(x) · dy), of a tile: elementwise, forward and reverse mode are the same."""
    return jax.jvp(activation, (x,), (dy,))


@functools.lru_cache(maxsize=256)
def unsupported(activation: Callable | None, platform: str, computed: Callable = along) -> str | None:
    """Why a kernel of `platform` ("tpu" or "gpu") cannot hold this activation, or None.

    computed(activation, x, dy) is what it computes on tiles; by default the gradient, too.
    """
    if activation is None:
        return None
    tile = jax.ShapeDtypeStruct(_TILE, jnp.float32)
    try:
        program = jax.make_jaxpr(functools.partial(computed, activation))(tile, tile)
    except TypeError as error:  # a custom_vjp
        return f"activation has no forward-mode derivative: {str(error).partition('.')[0]}"
    if arrays := modifiers.captured(program):
        return f"activation captures an array of shape {jnp.shape(arrays[0])}, and a kernel takes only scalars"
    for equation in modifiers.equations(program):
        name = equation.primitive.name
        if name == "broadcast_in_dim" and all(x.aval.shape in ((), _TILE) for x in equation.invars):
            continue
        if name not in _HOLDERS and name not in _ELEMENTWISE[platform]:
            return f"activation or its gradient calls {name}, which no kernel of {platform} holds"
        for x in (*equation.invars, *equation.outvars):
            if name not in _HOLDERS and not _fits(x.aval):
                return f"activation computes in {x.aval.dtype}, and a kernel in float32"
        if platform == "gpu" and name == "convert_element_type" and equation.invars[0].aval.dtype == jnp.bool_:
            return "activation makes numbers of booleans, which no kernel of gpu does: use jnp.where"
    return None


def _fits(aval: jax.core.ShapedArray) -> bool:
    return aval.dtype in (jnp.float32, jnp.bool_) or (aval.shape == () and aval.dtype == jnp.int32)
