"""Derivative rules, built in one place: kernels serve the first derivative, XLA every other one.

An operator f is a reference (its meaning in plain JAX) and pairs of rules (forward, backward), one pair per
implementation. It becomes one opaque primitive with three phases:

    forward   operands ↦ outputs, residuals (if it is differentiated)        served by a forward rule
    tangent   operands, outputs, residuals; ẋ ↦ ∂f/∂x · ẋ                    served by jvp of the reference, in XLA
    backward  operands, outputs, residuals; ȳ ↦ (∂f/∂x)ᵀ · ȳ                 served by a backward rule

The derivative of forward is tangent, and the transpose of tangent is backward: reverse mode meets only the two
kernels. The derivative of tangent and of backward is taken through the reference, so that every higher order, forward
or reverse, is JAX's own. The first output is differentiable, and as many after it as the operator says; the others (a
log-sum-exp, say) are constants to every derivative.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes, get_abstract_mesh

from jaxops import dispatch

Arrays = dict[str, jax.Array]

_plain = jax.make_user_context(False)  # part of the cache key of every trace


@contextlib.contextmanager
def by_reference() -> Iterator[None]:
    """Within this context every operator is its reference in plain JAX: no rule of ours runs and no kernel."""
    with _plain(True):
        yield


@dataclasses.dataclass(frozen=True)
class Rules:
    """An implementation. Operands and static options come as keywords.

    forward(**operands, **static) -> (outputs, residuals), two tuples;
    backward(**operands, outputs=, residuals=, cotangents=, **static) -> {name: gradient} for the differentiable
    operands that are there. There is a cotangent for each output, None where it is known to be zero; never the first.
    None in the place of backward: JAX's own, of the reference.
    """

    forward: Callable[..., tuple[tuple, tuple]]
    backward: Callable[..., Arrays] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """An operator: its meaning, its rules, its kernels.

    reference(**operands, **static) -> outputs, in plain differentiable JAX. `differentiable` names the operands that
    take a gradient, `differentiable_outputs` counts the outputs that have one, from the first.
    `tpu` and `gpu` are kernel modules (unsupported, forward, backward; without backward XLA serves it; value, where a
    forward kernel that saves no residuals is cheaper) or the sentence why there is none.
    `partition` maps the PartitionSpec of the first operand to those of the outputs, under explicit sharding; None: they
    depend on other operands too, and JAX's own rules place what the reference does.
    cost(**operands, **static) -> the flops of the matrix products of (forward, backward), from the operands' shapes;
    without it those of the reference are counted. note(phase, tile, **operands, **static) -> what else `explain` should
    say, or None; `tile` is what the kernel's own `tile` says, None in XLA.
    """

    name: str
    differentiable: tuple[str, ...]
    reference: Callable[..., tuple]
    xla: Rules
    tpu: ModuleType | SimpleNamespace | str
    gpu: ModuleType | SimpleNamespace | str
    partition: Callable[[PartitionSpec], tuple[PartitionSpec, ...]] | None = lambda spec: (spec,)
    cost: Callable[..., tuple[int, int]] | None = None
    note: Callable[..., str | None] | None = None
    differentiable_outputs: int = 1

    def __call__(
        self, operands: Mapping[str, Any], *, implementation: dispatch.Implementation = None, **static: Any
    ) -> tuple[jax.Array, ...]:
        """The outputs for `operands` (absent ones None).

        Raises `ValueError` if `implementation` is unknown, or strict and refused.
        """
        there = {name: jnp.asarray(x) for name, x in operands.items() if x is not None}
        if _plain.value:
            outputs, moving = self.reference(**there, **static), self.differentiable_outputs
            return (*outputs[:moving], *map(lax.stop_gradient, outputs[moving:]))
        call = _Call(
            self, "forward", tuple(there), tuple(sorted(static.items())), dispatch.order_of(self.name, implementation)
        )
        if any(x.size == 0 for x in there.values()):
            return tuple(self.reference(**there, **static))
        if "xla" not in call.order:
            self._refuse_early(call, there)
        if self.partition is None and (axes := _explicit_axes()):
            if "xla" not in call.order:
                raise ValueError(
                    f"{self.name}: implementation 'pallas' was asked for, but mesh axes {sorted(axes)} are partitioned "
                    "automatically: wrap the call in jax.shard_map over them"
                )
            return tuple(self.reference(**there, **static))
        count = len(_forward_shapes(call, tuple((x.shape, x.dtype) for x in there.values()))[0])
        return _locally(
            lambda *xs: tuple(operator_p.bind(*varying_alike(xs), call=call))[:count], self.partition, *there.values()
        )

    def gradients(
        self,
        operands: Mapping[str, Any],
        outputs: tuple[jax.Array, ...],
        cotangents: tuple[jax.Array, ...],
        *,
        implementation: dispatch.Implementation = None,
        **static: Any,
    ) -> Arrays:
        """What the backward rule of an operator without residuals says of outputs that the caller has, by name.

        cotangents: of the differentiable outputs. For a part of a larger call, whose outputs these are: JAX must not
        differentiate it, as it would take them for those of this call.
        """
        there = {name: x for name, x in operands.items() if x is not None}
        order = dispatch.order_of(self.name, implementation)
        call = _Call(self, "backward", tuple(there), tuple(sorted(static.items())), order, outputs=len(outputs))
        found = operator_p.bind(*varying_alike((*there.values(), *outputs, *cotangents)), call=call)
        return dict(zip(call.differentiable, found, strict=True))

    def refusal(self, platform: str, operands: Mapping[str, Any], static: Mapping[str, Any]) -> str | None:
        """Why the kernel of `platform` ("tpu" or "gpu") would not serve these operands, or None."""
        kernel = getattr(self, platform)
        return kernel if isinstance(kernel, str) else kernel.unsupported(**operands, **static)

    def _refuse_early(self, call: "_Call", operands: Arrays) -> None:
        """Kernels alone were asked for: raise while tracing if none of them, or not the target's, can run."""
        target = dispatch.chips.targeted()
        platforms = (target.platform,) if target else dispatch.KERNEL_PLATFORMS
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in operands.items()}
        reasons = {platform: self.refusal(platform, shapes, dict(call.static)) for platform in platforms}
        if all(reasons.values()):
            why = "; ".join(f"{platform}: {reason}" for platform, reason in reasons.items())
            raise ValueError(f"{self.name}: implementation 'pallas' was asked for, but {why}")


@dataclasses.dataclass(frozen=True)
class _Call:
    """One phase of one operator, by value: equal calls share their compiled programs.

    `axes` holds, for each enclosing vmap, innermost first, the mapped axis of every operand (0 or None); all else is
    mapped over axis 0. `saving`: of forward, whether it also gives the residuals. `still`: of backward and tangent, the
    differentiable outputs that take no part because their cotangent is zero.
    """

    operator: Operator
    phase: str
    names: tuple[str, ...]
    static: tuple[tuple[str, Any], ...]
    order: tuple[str, ...]
    outputs: int = 0
    axes: tuple[tuple[int | None, ...], ...] = ()
    saving: bool = False
    still: tuple[int, ...] = ()

    @property
    def moving(self) -> list[int]:
        """The differentiable outputs that take part."""
        return [i for i in range(self.operator.differentiable_outputs) if i not in self.still]

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name in self.operator.differentiable if name in self.names)

    def at(self, phase: str, **changes: Any) -> "_Call":
        return dataclasses.replace(self, phase=phase, **changes)

    def outside(self) -> "_Call":
        """The forward phase under no vmap."""
        return dataclasses.replace(self, phase="forward", outputs=0, axes=(), saving=False, still=())

    def positions(self) -> list[int]:
        return [self.names.index(name) for name in self.differentiable]

    def split(self, args):
        """(operands, outputs and residuals, the rest)."""
        n = len(self.names)
        extra = len(self.moving if self.phase == "backward" else self.differentiable)
        return tuple(args[:n]), tuple(args[n : len(args) - extra]), tuple(args[len(args) - extra :])

    def vmapped(self, f, others: int):
        """`f(*operands, *others)` under this call's vmaps."""
        for axes in self.axes:
            f = jax.vmap(f, in_axes=(*axes, *([0] * others)))
        return f

    # ---- the phases as plain functions of arrays ----

    def _reference(self, operands):
        """The differentiable outputs as a function of the differentiable operands, and where they are."""
        named = dict(zip(self.names, operands, strict=True))

        def f(*primals):
            full = {**named, **dict(zip(self.differentiable, primals, strict=True))}
            outputs = self.operator.reference(**full, **dict(self.static))
            return tuple(outputs[i] for i in self.moving)

        return f, [named[name] for name in self.differentiable]

    def plain_tangent(self, operands, tangents):
        def one(*args):
            f, primals = self._reference(args[: len(self.names)])
            return jax.jvp(f, tuple(primals), tuple(args[len(self.names) :]))[1]

        return self.vmapped(one, len(tangents))(*operands, *tangents)

    def plain_backward(self, operands, cotangents):
        def one(*args):
            f, primals = self._reference(args[: len(self.names)])
            return jax.vjp(f, *primals)[1](args[len(self.names) :])

        return self.vmapped(one, len(cotangents))(*operands, *cotangents)

    def run(self, implementation: str, platform: str | None):
        """This phase, done by `implementation`, as a function of all its arrays. Traced and compiled once per call."""
        return _jitted(self, implementation, platform)


@functools.cache
def _jitted(call: _Call, implementation: str, platform: str | None):
    operator, static = call.operator, dict(call.static)
    rules = operator.xla if implementation == "xla" or platform is None else getattr(operator, platform)

    def forward(*operands):
        named = dict(zip(call.names, operands, strict=True))
        if not call.saving and hasattr(rules, "value"):
            return tuple(rules.value(**named, **static))
        outputs, residuals = rules.forward(**named, **static)
        return (*outputs, *(residuals if call.saving else ()))

    def backward(*args):
        operands, saved, moving = call.split(args)
        if rules.backward is None:
            f, primals = call._reference(operands)
            return jax.vjp(f, *primals)[1](tuple(moving))
        named = dict(zip(call.names, operands, strict=True))
        cotangents = dict(zip(call.moving, moving, strict=True))
        gradients = rules.backward(
            **named,
            outputs=saved[: call.outputs],
            residuals=saved[call.outputs :],
            cotangents=tuple(map(cotangents.get, range(call.outputs))),
            **static,
        )
        return tuple(gradients[name].astype(named[name].dtype) for name in call.differentiable)

    def tangent(*args):
        operands, _, tangents = call.split(args)
        return call.plain_tangent(operands, tangents)

    if call.phase == "tangent":
        f = tangent
    elif call.phase == "forward":
        f = call.vmapped(forward, 0)
    else:  # every array after the operands is mapped

        def f(*args):
            return call.vmapped(backward, len(args) - len(call.names))(*args)

    f.__name__ = f"{operator.name}_{call.phase}_{implementation}"
    f.__qualname__ = f.__name__
    return jax.jit(f)


# ---- meshes: the operator is local code ----------------------------------------------------------------------------


def _explicit_axes() -> tuple[str, ...]:
    mesh = get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def _locally(f, partition, *operands):
    """`f(*operands)` with every explicit mesh axis automatic inside; the outputs are sharded as `partition` says."""
    explicit = _explicit_axes()
    if not explicit:
        return f(*operands)
    return auto_axes(f, axes=explicit, out_sharding=partition(jax.typeof(operands[0]).sharding.spec))(*operands)


def varying_alike(operands):
    """All operands varying over the manual mesh axes any of them varies over. Backward: sum over the axes added."""
    axes = [jax.typeof(x).mat.varying for x in operands]
    union = frozenset().union(*axes)
    return [
        x if have == union else lax.pcast(x, tuple(union - have), to="varying")
        for x, have in zip(operands, axes, strict=True)
    ]


# ---- the primitive -------------------------------------------------------------------------------------------------

operator_p = Primitive("jaxops")
operator_p.multiple_results = True


@functools.lru_cache(maxsize=4096)
def _forward_shapes(call: _Call, shapes) -> tuple[tuple, tuple]:
    """Shapes and dtypes of (outputs, residuals) of the forward rule, outside every vmap."""
    operands = {name: jax.ShapeDtypeStruct(*s) for name, s in zip(call.names, shapes, strict=True)}
    with dispatch.alone():
        outputs, residuals = jax.eval_shape(
            lambda **xs: call.operator.xla.forward(**xs, **dict(call.static)), **operands
        )
    return tuple(outputs), tuple(residuals)


def _unmapped(call: _Call, shapes):
    """Shapes of the operands inside the vmaps, and the sizes of the mapped axes, outermost first."""
    sizes = []
    for axes in reversed(call.axes):
        sizes.append(next(shape[0] for (shape, _), axis in zip(shapes, axes, strict=True) if axis is not None))
        shapes = [
            (shape[1:] if axis is not None else shape, dtype) for (shape, dtype), axis in zip(shapes, axes, strict=True)
        ]
    return tuple(shapes), tuple(sizes)


@operator_p.def_abstract_eval
def _abstract(*avals, call):
    inner, sizes = _unmapped(call, [(a.shape, a.dtype) for a in avals[: len(call.names)]])
    outputs, residuals = _forward_shapes(call.outside(), inner)
    if call.phase == "forward":
        out = [(sizes + s.shape, s.dtype) for s in (*outputs, *(residuals if call.saving else ()))]
    elif call.phase == "tangent":
        out = [(sizes + outputs[i].shape, outputs[i].dtype) for i in call.moving]
    else:
        out = [(sizes + inner[i][0], inner[i][1]) for i in call.positions()]
    varying = frozenset().union(*(a.mat.varying for a in avals))
    like = avals[0]
    return [_typed(shape, dtype, like, varying) for shape, dtype in out]


def _typed(shape, dtype, like, varying):
    """An abstract array on the mesh of `like`, unsharded over its automatic axes, varying over the manual `varying`."""
    mesh = like.sharding.mesh
    if mesh.empty:
        return jax.core.ShapedArray(shape, dtype)
    return jax.core.ShapedArray(
        shape,
        dtype,
        sharding=NamedSharding(mesh, PartitionSpec(*[None] * len(shape))),
        manual_axis_type=like.mat.update(varying=varying),
    )


def unmapped_operands(call: _Call, avals) -> tuple[dict[str, jax.ShapeDtypeStruct], int]:
    """The operands of a call as its rules see them, inside every vmap, and how many such calls the vmaps make."""
    inner, sizes = _unmapped(call, [(a.shape, a.dtype) for a in avals[: len(call.names)]])
    return {n: jax.ShapeDtypeStruct(*s) for n, s in zip(call.names, inner, strict=True)}, math.prod(sizes)


def refusal(platform: str, call: _Call, avals) -> str | None:
    """Why no kernel of `platform` serves this phase of an operator, given its abstract arrays, or None."""
    if call.phase == "tangent":
        return "forward mode and every order above the first run in XLA"
    kernel = getattr(call.operator, platform)
    if call.phase == "backward" and not isinstance(kernel, str) and not hasattr(kernel, "backward"):
        return "its gradient is computed in XLA"
    return dispatch.too_many_vmaps(platform, len(call.axes)) or call.operator.refusal(
        platform, unmapped_operands(call, avals)[0], dict(call.static)
    )


def _jvp(primals, tangents, *, call):
    n, dense = len(call.names), ad.instantiate_zeros
    if call.phase == "forward":
        moving = [tangents[i] for i in call.positions()]
        if all(type(t) is ad.Zero for t in moving):
            out = operator_p.bind(*primals, call=call)
            return out, [_zero(o) for o in out]
        out = operator_p.bind(*primals, call=call.at("forward", saving=True))
        inner, sizes = _unmapped(call, [(x.shape, x.dtype) for x in primals])
        outputs = len(_forward_shapes(call.outside(), inner)[0])
        moving = [_mapped(call, sizes, i, dense(t)) for i, t in zip(call.positions(), moving, strict=True)]
        moved = operator_p.bind(*primals, *out, *moving, call=call.at("tangent", outputs=outputs, saving=False))
        out = out if call.saving else out[:outputs]
        return out, [*moved, *map(_zero, out[len(moved) :])]
    out = operator_p.bind(*primals, call=call)
    operands, saved, linear = call.split(primals)
    moving, linear_moving = [tangents[i] for i in call.positions()], tangents[n + len(saved) :]
    along = list(operator_p.bind(*operands, *saved, *map(dense, linear_moving), call=call))
    if all(type(t) is ad.Zero for t in moving):
        return out, along

    def plain(*xs):
        full = list(operands)
        for position, x in zip(call.positions(), xs, strict=True):
            full[position] = x
        if call.phase == "tangent":
            return call.plain_tangent(full, linear)
        return call.plain_backward(full, linear)

    points = tuple(operands[i] for i in call.positions())
    moved = jax.jvp(plain, points, tuple(map(dense, moving)))[1]
    return out, [a + b for a, b in zip(along, moved, strict=True)]


def _zero(x):
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _mapped(call: _Call, sizes, position: int, x):
    """`x`, mapped as operand `position` is, mapped by every vmap. Backward: sum over the axes added."""
    for level, (axes, size) in enumerate(zip(reversed(call.axes), sizes, strict=True)):
        if axes[position] is None:
            x = jnp.broadcast_to(jnp.expand_dims(x, level), (*x.shape[:level], size, *x.shape[level:]))
    return x


def _transpose(cotangents, *args, call):
    operands, saved, linear = call.split(args)
    if call.phase != "tangent":  # backward is linear in its cotangents: its transpose is tangent
        found = operator_p.bind(*operands, *saved, *map(ad.instantiate_zeros, cotangents), call=call.at("tangent"))
    else:
        moving = dict(zip(call.moving, cotangents, strict=True))
        still = tuple(i for i, ct in moving.items() if i > 0 and type(ct) is ad.Zero)
        given = [ad.instantiate_zeros(ct) for i, ct in moving.items() if i not in still]
        found = operator_p.bind(*operands, *saved, *given, call=call.at("backward", still=(*call.still, *still)))
    # what is known (not undefined) was an instantiated zero: it takes no cotangent
    known = [None] * (len(operands) + len(saved))
    return known + [ct if ad.is_undefined_primal(x) else None for ct, x in zip(found, linear, strict=True)]


def _batch(args, dims, *, call):
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    n = len(call.names)
    mapped = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args[:n], dims[:n], strict=True)]
    axes = tuple(None if d is None else 0 for d in dims[:n])
    if all(axis is None for axis in axes):  # only tangents or cotangents are mapped
        mapped[0], axes = jnp.broadcast_to(mapped[0], (size, *mapped[0].shape)), (0, *axes[1:])
    rest = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args[n:], dims[n:], strict=True)
    ]
    out = operator_p.bind(*mapped, *rest, call=dataclasses.replace(call, axes=(*call.axes, axes)))
    return out, [0] * len(out)


ad.primitive_jvps[operator_p] = _jvp
ad.primitive_transposes[operator_p] = _transpose
batching.primitive_batchers[operator_p] = _batch
dispatch.register(operator_p, refusal)
