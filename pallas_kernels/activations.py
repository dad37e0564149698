"""User-written activations inside a kernel: elementwise functions of a float32 tile, and their gradients by JAX."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import modifiers

_TILE = (16, 128)


def along(activation: Callable, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(activation(x), activation'(x) · dy), of a tile: elementwise, forward and reverse mode are the same."""
    return jax.jvp(activation, (x,), (dy,))


def before(activation: Callable | None, residuals, dy: jax.Array, bias, residual) -> tuple[jax.Array, dict[str, Any]]:
    """(dz in float32, the gradients of bias and residual that are present) of y = activation(z) + residual, the bias
    part of z, which is saved if there is an activation."""
    dz = dy.astype(jnp.float32)
    if activation is not None:
        dz = along(activation, residuals[0].astype(jnp.float32), dz)[1]
    gradients = {}
    if bias is not None:
        gradients["bias"] = jnp.sum(dz, tuple(range(dz.ndim - 1))).astype(bias.dtype)
    if residual is not None:
        gradients["residual"] = dy.astype(residual.dtype)
    return dz, gradients


@functools.lru_cache(maxsize=256)
def unsupported(
    activation: Callable | None, refusal: Callable[[Any], str | None], computed: Callable = along
) -> str | None:
    """Why a kernel cannot hold this activation, or None.

    refusal(equation) says why the kernel's compiler cannot take it, or None: that of `elementwise` of its platform.
    computed(activation, x, dy) is what the kernel computes on tiles; by default the gradient, too.
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
        variables = (*equation.invars, *equation.outvars)
        if equation.primitive.name == "broadcast_in_dim" and any(x.aval.shape not in ((), _TILE) for x in variables):
            return "activation or its gradient makes an array of another shape"
        if reason := refusal(equation):
            return f"activation or its gradient {reason}"
        for x in variables:
            if not _fits(x.aval):
                return f"activation computes in {x.aval.dtype}, and a kernel in float32"
    return None


def _fits(aval: jax.core.ShapedArray) -> bool:
    return aval.dtype in (jnp.float32, jnp.bool_) or (aval.shape == () and aval.dtype == jnp.int32)
