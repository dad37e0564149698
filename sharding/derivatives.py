"""Derivatives of a function of shards that has a backward rule of its own: `jax.custom_vjp`, with forward mode.

A function f is a `plain` form in differentiable JAX and a `backward` rule. It becomes

    forward   operands ↦ outputs                          by f itself
    tangent   operands, ẋ ↦ ∂f/∂x · ẋ                     by jvp of the plain form: one primitive, linear in ẋ
    backward  operands, ȳ ↦ (∂f/∂x)ᵀ · ȳ                  by the backward rule: the transpose of that primitive

so that reverse mode saves the operands and nothing else, and every other order is JAX's own derivative of the plain
form. `jaxops.autodiff` does this for operators, which are local code; here axes of a mesh are at hand.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Rules:
    """forward(static, *operands) -> outputs, and the same in plain JAX; backward(static, operands, cotangents) -> a
    gradient of every operand. Every derivative of `backward` must be JAX's own."""

    forward: Callable[..., tuple]
    plain: Callable[..., tuple]
    backward: Callable[..., tuple]

    def __call__(self, static: Any, *operands: jax.Array) -> tuple[jax.Array, ...]:
        return _differentiable(self, static, *operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _differentiable(rules, static, *operands):
    return tuple(rules.forward(static, *operands))


def _rule(rules, static, operands, tangents):
    outputs = tuple(rules.forward(static, *operands))
    moving = tuple(not isinstance(t, SymbolicZero) for t in tangents)
    if not any(moving):
        return outputs, tuple(map(jnp.zeros_like, outputs))
    given = [t for t, moves in zip(tangents, moving, strict=True) if moves]
    avals = tuple(jax.typeof(y).to_tangent_aval() for y in outputs)
    return outputs, tuple(tangent_p.bind(*operands, *given, call=_Call(rules, static, moving, avals)))


_differentiable.defjvp(_rule, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class _Call:
    """`moving`: which operands have a tangent. `axes`: for each vmap, innermost first, which axis of an operand is
    mapped (0 or None); of a tangent it is always axis 0. `outputs`: what comes out, all vmaps included."""

    rules: Rules
    static: Any
    moving: tuple[bool, ...]
    outputs: tuple[Any, ...]
    axes: tuple[tuple[int | None, ...], ...] = ()

    def only_moving(self, values):
        return [x for x, moves in zip(values, self.moving, strict=True) if moves]

    def split(self, args):
        return args[: len(self.moving)], args[len(self.moving) :]

    def vmapped(self, f, others: int):
        for axes in self.axes:
            f = jax.vmap(f, in_axes=(*axes, *[0] * others))
        return f

    def tangent(self, *args):
        """ẏ of operands and tangents."""

        def one(*args):
            operands, tangents = self.split(args)

            def f(*moving):
                there = iter(moving)
                full = [next(there) if moves else x for x, moves in zip(operands, self.moving, strict=True)]
                return tuple(self.rules.plain(self.static, *full))

            return jax.jvp(f, tuple(self.only_moving(operands)), tuple(tangents))[1]

        return self.vmapped(one, sum(self.moving))(*args)

    def backward(self, operands, cotangents):
        def one(*args):
            operands, cotangents = self.split(args)
            return self.only_moving(self.rules.backward(self.static, operands, cotangents))

        return self.vmapped(one, len(cotangents))(*operands, *cotangents)


tangent_p = Primitive("tangent")
tangent_p.multiple_results = True
tangent_p.def_impl(lambda *args, call: jax.jit(call.tangent)(*args))


@tangent_p.def_abstract_eval
def _abstract(*_, call):
    return list(call.outputs)


def _jvp(args, tangents, *, call):
    operands, along = call.split(args)
    moving, linear = call.split(tuple(map(ad.instantiate_zeros, tangents)))
    out = tangent_p.bind(*args, call=call)
    still = all(type(t) is ad.Zero for t in tangents[: len(operands)])
    moved = tangent_p.bind(*operands, *linear, call=call)
    if still:
        return out, moved
    curved = jax.jvp(lambda *xs: call.tangent(*xs, *along), operands, moving)[1]
    return out, [a + b for a, b in zip(moved, curved, strict=True)]


def _transpose(cotangents, *args, call):
    operands, _ = call.split(args)
    return [None] * len(operands) + list(call.backward(operands, tuple(map(ad.instantiate_zeros, cotangents))))


def _batch(args, dims, *, call):
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    (operands, tangents), (here, there) = call.split(args), call.split(dims)
    first = lambda x, d: jnp.moveaxis(x, d, 0)
    operands = [x if d is None else first(x, d) for x, d in zip(operands, here, strict=True)]
    tangents = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else first(x, d)
        for x, d in zip(tangents, there, strict=True)
    ]
    axes = tuple(None if d is None else 0 for d in here)
    outputs = tuple(_mapped(a, size) for a in call.outputs)
    call = dataclasses.replace(call, axes=(*call.axes, axes), outputs=outputs)
    return tangent_p.bind(*operands, *tangents, call=call), [0] * len(outputs)


def _mapped(aval, size):
    shape = (size, *aval.shape)
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return jax.core.ShapedArray(shape, aval.dtype, sharding=sharding, manual_axis_type=aval.mat)


ad.primitive_jvps[tangent_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose
batching.primitive_batchers[tangent_p] = _batch
mlir.register_lowering(tangent_p, mlir.lower_fun(lambda *args, call: call.tangent(*args), multiple_results=True))
