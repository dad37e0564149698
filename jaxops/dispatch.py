"""Which implementation runs where: the only file that names platforms.

An operator is traced once, as one opaque call. When that call is lowered the platform is known, and so are the device
it is for and whether the program is partitioned by hand; only then the first implementation of the requested order that
can serve all that is taken. So one traced program becomes a Mosaic call on TPU, a Mosaic GPU call on CUDA and plain XLA
on CPU, on a machine that has none of the accelerators.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax._src import config
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, Mesh, get_abstract_mesh, use_abstract_mesh

from pallas_kernels import chips

IMPLEMENTATIONS = ("pallas", "xla")
KERNEL_PLATFORMS = ("tpu", "gpu")
_MOST_VMAPS = {"gpu": 1}  # a TMA descriptor has at most five axes, and every vmap adds one
_PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}  # JAX's name for a platform with kernels → ours

Implementation = str | Sequence[str] | None


def order_of(name: str, implementation: Implementation) -> tuple[str, ...]:
    """The implementations to try, first to last. Raises `ValueError` for an unknown one."""
    if implementation is None:
        return IMPLEMENTATIONS
    order = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [one for one in order if one not in IMPLEMENTATIONS]
    if unknown or not order:
        raise ValueError(
            f"{name}: implementation must be None, one of {IMPLEMENTATIONS} or a sequence of them, "
            f"got {implementation!r}"
        )
    return order


def only_xla(name: str, implementation: Implementation) -> None:
    """For an operator without kernels: checks `implementation`. Raises `ValueError` if it asks for "pallas" alone."""
    if "xla" not in order_of(name, implementation):
        raise ValueError(f"{name}: implementation 'pallas' was asked for, but {name} has no Pallas kernel yet")


def too_many_vmaps(platform: str, levels: int) -> str | None:
    """Why the kernels of `platform` do not serve a call under so many vmaps, or None."""
    most = _MOST_VMAPS.get(platform, levels)
    return None if levels <= most else f"the kernels of {platform} take at most {most} vmap, got {levels} nested"


def on_cpu(cpu: Callable, otherwise: Callable, *operands: Any) -> Any:
    """`cpu(*operands)` in a program for the CPU, else `otherwise(*operands)`: for XLA rules tiled for a cache."""
    return lax.platform_dependent(*operands, cpu=cpu, default=otherwise)


def on_tpu(tpu: Callable, otherwise: Callable, *operands: Any) -> Any:
    """`tpu(*operands)` in a program for a TPU, else `otherwise(*operands)`: for XLA rules cut for its vector unit."""
    return lax.platform_dependent(*operands, tpu=tpu, default=otherwise)


def row_major(x: jax.Array) -> jax.Array:
    """x, which XLA is to keep with its last axis together; in an exported program, which cannot ask for a layout, XLA
    chooses."""
    return _row_major_p.bind(x)


def _lower_row_major(context, x):
    exported = context.module_context.lowering_parameters.for_export
    constraint = lambda x: x if exported else with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return mlir.lower_fun(constraint, multiple_results=False)(context, x)


_row_major_p = Primitive("row_major")
_row_major_p.def_impl(lambda x: x)
_row_major_p.def_abstract_eval(lambda x: x)
batching.defvectorized(_row_major_p)
mlir.register_lowering(_row_major_p, _lower_row_major)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs on a platform and why the implementations before it do not."""

    implementation: str | None  # None: nothing in the order can run
    refusals: tuple[tuple[str, str], ...]  # (implementation, reason)

    @property
    def reason(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.refusals)


def choose(order: Sequence[str], kernel_refusal: str | None) -> Choice:
    """The first of `order` that runs, given why the kernel of this platform would not (None: it would)."""
    refusals: list[tuple[str, str]] = []
    for name in order:
        if name == "xla" or kernel_refusal is None:
            return Choice(name, tuple(refusals))
        refusals.append((name, kernel_refusal))
    return Choice(None, tuple(refusals))


@contextlib.contextmanager
def alone(device: Any = None) -> Iterator[None]:
    """No mesh: what is traced inside is local code of one device, of the kind of `device` or the current target."""
    device = device or get_abstract_mesh().abstract_device
    # The flag of an enclosing shard_map outlives its mesh while lowering: it would ask every pallas_call for mesh axes.
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), config._check_vma(False):
        yield


def _partitioning(context: Any) -> str | None:
    """Why a kernel cannot stand in a program of this axis context, or None."""
    if hasattr(context, "manual_axes"):  # inside shard_map
        automatic = set(context.mesh.axis_names) - set(context.manual_axes) - set(context.mesh.manual_axes)
        automatic = {axis for axis in automatic if context.mesh.shape[axis] > 1}
        if automatic:
            return (
                f"mesh axes {sorted(automatic)} are partitioned automatically: wrap the call in jax.shard_map over them"
            )
    elif getattr(context, "num_devices", 1) != 1:
        devices = f"{context.num_devices} devices"
        return f"the program is partitioned automatically over {devices}: wrap the call in jax.shard_map"
    return None


def _chip(context: Any, platform: str) -> tuple[chips.Chip, str | None]:
    """The chip a program is lowered for, and why it has no kernels if it has none.

    The chip is the target, else what the axis context tells.
    """
    devices = getattr(context, "device_assignment", None)
    if devices is None and isinstance(getattr(context, "mesh", None), Mesh):
        devices = tuple(context.mesh.devices.flat)
    if chips.targeted() is None and devices and devices[0].platform in (platform, "cuda"):
        chip = chips.of_device(devices[0])
        return chip or chips.current(platform), None if chip else f"no kernel is made for {devices[0].device_kind}"
    return chips.current(platform), None


def register(primitive: Any, refusal: Callable[[str, Any, Sequence[Any]], str | None]) -> None:
    """Gives `primitive` its evaluation and its lowerings, by the choice above.

    Its parameter `call` has `order` and `run(implementation, platform)`, a function of the operands;
    `refusal(platform, call, avals)` is why the kernel of `platform` would not serve `call`, or None.
    """

    def chosen(call, avals, platform, obstacle):
        if platform is None:
            reason: str | None = "kernels run on TPU and CUDA only"
        else:
            reason = obstacle or refusal(platform, call, avals)
        choice = choose(call.order, reason)
        if choice.implementation is None:
            raise ValueError(f"{call.operator.name}: none of {call.order} can run here ({choice.reason})")
        return call.run(choice.implementation, platform)

    @functools.cache
    def compiled(call):
        return jax.jit(lambda *operands: primitive.bind(*operands, call=call))

    def evaluate(*operands, call):
        target = chips.targeted()
        if target is None or not chips.interpreted():
            return compiled(call)(*operands)
        # The interpreter has effects, which an opaque call inside a jitted program may not have: run it as it is.
        with alone():
            return chosen(call, [jax.typeof(x) for x in operands], target.platform, None)(*operands)

    def rule_for(platform: str | None):
        def rule(ctx, *operands, call):
            context = ctx.module_context.axis_context
            device, obstacle = None, None
            if platform is not None:
                chip, obstacle = _chip(context, platform)
                device, obstacle = chips.abstract_device(chip), obstacle or _partitioning(context)
            with alone(device):
                run = chosen(call, ctx.avals_in, platform, obstacle)
                local = ctx.replace(avals_in=[jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in])
                return mlir.lower_fun(run)(local, *operands)

        return rule

    prim_requires_devices_during_lowering.add(primitive)  # else JAX does not say which chip a program is lowered for
    primitive.def_impl(evaluate)
    mlir.register_lowering(primitive, rule_for(None))
    for name, ours in _PLATFORMS.items():
        mlir.register_lowering(primitive, rule_for(ours), platform=name)
