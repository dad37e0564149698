"""Gradients summed over devices and applied: reduce-scatter, the optimizer on a shard, all-gather, leaf by leaf.

Each device of the axes D has the gradient g of its part of the batch. What every optimizer does elementwise, a device
does for 1 / D of the elements:

    g[I_D, J] = reduce-scatter of g[I, J]         one for each leaf, as soon as the backward has made it
    p, m, v[I_D, J] ← optimizer                   one pass
    p[I, J] = all-gather of p[I_D, J]

| zero | split over D | sent in a step, of P bytes of parameters and k micro-batches |
| --- | --- | --- |
| 0 | nothing | all-reduce: 2 P |
| 1 | the optimizer's moments | reduce-scatter and all-gather: 2 P |
| 2 | and the gradients, summed over micro-batches as shards | (k + 1) P |
| 3 | and the parameters, gathered where they are used | 3 k P, 2 k P without gathering again for the backward |

A leaf is split along the first dimension that D divides; a large one that has none is padded along its longest. Small
leaves (norm scales, biases) are put into buckets, flat; large leaves are never flattened, which would cost a copy in
another layout.

Everything here is used inside `jax.shard_map(check_vma=True)`: the types say over which axes a parameter is split and
a gradient is still to be summed.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
arXiv:1910.02054.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec, get_abstract_mesh

from jaxops import optim
from jaxops.ops import checks
from pallas_kernels.tpu import reduce_update
from sharding import collectives
from sharding.mesh import check_spec
from sharding.precision import LossScale, LossScaleState, Precision

COMPRESSIONS = ("bfloat16", "int8")
IMPLEMENTATIONS = ("xla", "ring", "pallas")
_NAME = "gradient_reduction"
_BUCKET = 1 << 20  # elements of a bucket at most: the first is sent before the last small leaf has its gradient
_ALIGNED = 128  # a bucket is a multiple of it, so that it has one length for all numbers of devices that divide it
_BLOCK = 256  # elements that share a scale of int8
_PIECES = (
    "convert_element_type",
    "transpose",
    "reshape",
    "broadcast_in_dim",
    "slice",
    "dynamic_slice",
    "dynamic_update_slice",
    "concatenate",
    "squeeze",
    "split",
)


class ReductionState(NamedTuple):
    """The optimizer's state, what compression has left out so far, and the loss scale; None where there is none.

    In the trees of the optimizer's state the moments of a bucket are one vector, where the first of its leaves is, and
    the others are None.
    """

    optimizer: Any
    error: Any
    loss_scale: LossScaleState | None


class Gradients(NamedTuple):
    """Gradients summed over the devices, one array for each leaf alone or bucket: on each device its shard.

    `error` is what compression left out of those that were sent. With `implementation="pallas"` those that the kernel
    serves are still whole and to be summed, which `apply` does.
    """

    shards: tuple[jax.Array, ...]
    error: tuple[jax.Array | None, ...]


class GradientReduction(optax.GradientTransformationExtraArgs):
    """What `gradient_reduction` returns: optax's pair (init, update), and the functions of a training step."""

    def __new__(cls, how: "_How") -> "GradientReduction":
        self = super().__new__(
            cls,
            functools.partial(_init, how),
            lambda grads, state, params=None, **extra: _step(how, params, grads, state, False),
        )
        self.how = how
        return self

    how: "_How"

    def local(self, params: Any) -> Any:
        """The parameters to take gradients of: each device's own copy. Nothing is sent.

        The gradient of a parameter that is the same on every device would be summed as a whole, by an all-reduce.
        """
        return _local(self.how, params)

    def value_and_grad(self, loss: Callable, *, micro_batches: int = 1, has_aux: bool = False) -> Callable:
        """`f(params, state, *batch) -> (loss, Gradients)`: like `jax.value_and_grad(loss)`, with gradients as shards.

        `loss(params, *batch)` is a scalar: the mean over the device's part of the batch, or over the whole batch, as
        `sharding.vocab_parallel_cross_entropy(axis_names=…)` gives it. The types tell which; either way loss and
        gradients are those of the mean over all devices.

        micro_batches: arrays of `batch` are cut into so many along their first dimension, which follow each other.
          Their gradients are added in float32: with `zero` 0 and 1 whole ones, which are summed over the devices once,
          with 2 and 3 shards.
        has_aux: `loss` returns (scalar, anything), and f ((loss, anything), Gradients). The anything of micro-batches
          is stacked.

        Raises `ValueError` if the loss is no scalar or micro_batches do not divide a first dimension, besides what
        `apply` raises.
        """
        return functools.partial(_value_and_grad, self.how, loss, micro_batches, has_aux)

    def reduce(self, grads: Any, state: ReductionState, params: Any) -> Gradients:
        """The gradients, local ones of `local(params)`, summed over the devices: the first part of `apply`."""
        leaves = _leaves(self.how, params)
        groups = _groups(self.how, leaves)
        _check_state(self.how, state, leaves, groups)
        how = self.how._replace(implementation=_summing(self.how))
        return _reduced(how, leaves, groups, _given(grads, leaves), state, _factor(how, state))

    def apply(self, params: Any, grads: Any, state: ReductionState) -> tuple[Any, ReductionState]:
        """(new parameters, new state), as `apply` of `jaxops.optim.adamw`.

        grads: what `value_and_grad` or `reduce` returned, or a tree like `params`, of the gradients of
          `local(params)`.

        Raises `TypeError` or `ValueError` while tracing, naming the leaf, if it is no floating array, gradients or
        state do not fit the parameters, a gradient is summed already, or with `zero` 3 a large parameter is whole; and
        where there is no `jax.shard_map(check_vma=True)` over the axes.
        """
        return _step(self.how, params, grads, state, True)

    def gather(self, params: Any, specs: Any) -> Any:
        """p[I_D, J] ↦ p[I, J], for the leaves that `specs` split over D. Forward: all-gather. Backward: reduce-scatter.

        For `zero` 3, inside the loss, of a layer's parameters where they are used.

        params, specs: a tree, or a part of it, and the same part of `parameter_specs(…)`.

        With a `precision`, parameters travel as `compute` and gradients as `reduction`. Raises `ValueError` if a spec
        does not fit its leaf.
        """
        return _gather(self.how, params, specs)

    def policy(self, primitive: Any, *_: Any, **parameters: Any) -> bool:
        """For `jax.checkpoint(layer, policy=reduction.policy)`: whether the backward finds a result or makes it again.

        What is gathered over D is gathered again, and casts and pieces of arrays, which may be of that, are made again.
        The rest is kept: products, norms, attention. Without a checkpoint JAX keeps the gathered parameters of all
        layers.
        """
        if primitive.name in ("all_gather", "ppermute"):
            names = parameters["axis_name"]
            return not set(self.how.axes) & set(names if isinstance(names, tuple) else (names,))
        return primitive.name not in _PIECES

    def parameter_specs(self, params: Any, specs: Any = None, *, mesh: Any = None, over: Any = None) -> Any:
        """The tree of PartitionSpecs that the parameters have between steps.

        With `zero` up to 2 these are `specs`. With 3 every large leaf that `specs` do not split over one of the axes is
        split over them, along the first dimension that they divide.

        Args:
          params: the tree of whole arrays, or of `jax.ShapeDtypeStruct`.
          specs: how other axes split them, as `jax.sharding.PartitionSpec("tensor")`; None: they do not.
          mesh: or what has `shape`, {axis: size}; None: that of `jax.set_mesh`.
          over: with `zero` 3, the axes to split over, if not all. Over "fsdp" of ("data", "fsdp"): parameters are then
            gathered along "fsdp" alone, and moments are split over both.

        Raises `ValueError` if an axis is not in the mesh, or a large leaf has no dimension that they divide.
        """
        return _parameter_specs(self.how, params, specs, mesh, over)

    def state_specs(self, params: Any, specs: Any = None, *, mesh: Any = None) -> ReductionState:
        """The PartitionSpecs of the state, for the parameters' own `specs`, with `zero` 3 those of `parameter_specs`.

        Moments of a leaf alone are global arrays of the parameter's shape (padded at the end if no dimension was
        divided), those of a bucket the leaves one after the other: a checkpoint can be restored onto another mesh. What
        compression left out belongs to the devices: [devices, …].
        """
        return _state_specs(self.how, params, specs, mesh)


def gradient_reduction(
    optimizer: optim.Optimizer,
    *,
    axis: str | Sequence[str] = "data",
    zero: int = 1,
    reduce: str = "mean",
    compression: str | None = None,
    error_feedback: bool = True,
    small: int = 1 << 14,
    precision: Precision | None = None,
    loss_scale: LossScale | None = None,
    implementation: str = "xla",
) -> GradientReduction:
    """p ← p - step of the optimizer by the mean over `axis` of the gradients, each device doing 1 / D of the elements.

    Reduce-scatter, the optimizer on the shard, all-gather; the steps are methods of what is returned, a
    `GradientReduction`. Clipping by the optimizer's `max_norm` compares the norm of the whole gradient, in
    which every element counts once, also where other axes split the leaves.

    Args:
      optimizer: `jaxops.optim.adamw`, `lion` or `sgd` with its options; not its `small`.
      axis: the mesh axis D that the batch is split over, or several, as ("data", "fsdp").
      zero: what is split over D: 0 nothing, 1 the optimizer's moments, 2 and gradients, 3 and parameters.
      reduce: of gradients given to `apply` or `update`: "mean" where each device's loss is the mean over its part of
        the batch, "sum" where it is the mean over the whole, or its part of a sum. `value_and_grad` knows it itself.
      compression: how gradients are sent with `zero` 1 and 2: None, as they are; "bfloat16"; "int8" with a float32
        scale for 256 elements or less. They are added in float32 after they were sent.
      error_feedback: what compression leaves out is added to the next gradient. It is kept on every device for its
        whole gradient, in float32.
      small: leaves of at most so many elements, that no other axis splits, go into buckets. With `zero` 3 they stay
        whole.
      precision: parameters are its `parameter`, gradients are sent as its `reduction`; None: any, and as float32, or
        float64.
      loss_scale: `value_and_grad` multiplies the loss by it, and a step with a gradient that is not finite, on any
        device, changes nothing but the scale. Gradients of your own are those of `state.loss_scale.scale` · loss.
      implementation: of the reduce-scatters of leaves alone, and of `gather`: "xla" one collective, or "ring",
        transfers from neighbour to neighbour in both directions, which the compiler can put beside the products of
        other leaves. "pallas": on TPU one kernel sums, updates and gathers a leaf that is split along its first
        dimension, or a bucket, with `zero` 1, or 2 without micro-batches; XLA the others, and all elsewhere. Not with
        compression, a loss scale or `max_norm`, for which every sum has to be known before the first update.

    Raises `TypeError` or `ValueError` for an option that is not as said.

    Source: Rajbhandari et al., SC 2020, arXiv:1910.02054 (ZeRO); Karimireddy et al., "Error Feedback Fixes SignSGD",
    ICML 2019, arXiv:1901.09847; Micikevicius et al., ICLR 2018, arXiv:1710.03740 (loss scaling).
    """
    if not isinstance(optimizer, optim.Optimizer):
        raise TypeError(
            f"{_NAME}: optimizer must be one of jaxops.optim (adamw, lion, sgd), got {type(optimizer).__name__}"
        )
    axes = _axes("axis", axis)
    if isinstance(zero, bool) or zero not in (0, 1, 2, 3):
        raise ValueError(f"{_NAME}: zero must be 0, 1, 2 or 3, got {zero!r}")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"{_NAME}: reduce must be 'mean' or 'sum', got {reduce!r}")
    if compression is not None and compression not in COMPRESSIONS:
        raise ValueError(f"{_NAME}: compression must be None or one of {COMPRESSIONS}, got {compression!r}")
    if compression is not None and zero not in (1, 2):
        raise ValueError(f"{_NAME}: compression must be None unless zero is 1 or 2, got {compression!r} with {zero}")
    checks.number(_NAME, "small", small)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{_NAME}: implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "pallas":
        norm = "is the optimizer's, and the norm of the whole gradient is not known before the first update"
        for what, given, wanted, why in (
            ("zero", zero, (1, 2), "has moments alone, or gradients, to split"),
            ("compression", compression, (None,), "changes what the kernel sends"),
            ("loss_scale", loss_scale, (None,), "needs the whole gradient before the first update"),
            ("max_norm", optimizer.recipe.max_norm, (None,), norm),
        ):
            if given not in wanted:
                choices = " or ".join(map(str, wanted))
                raise ValueError(
                    f"{_NAME}: {what} must be {choices} with implementation='pallas': it {why}, got {given!r}"
                )
    for what, value, kind in (("precision", precision, Precision), ("loss_scale", loss_scale, LossScale)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{_NAME}: {what} must be a sharding.{kind.__name__} or None, got {type(value).__name__}")
    feedback = compression is not None and bool(error_feedback)
    return GradientReduction(
        _How(
            optimizer.recipe,
            axes,
            zero,
            reduce,
            compression,
            feedback,
            int(small),
            precision,
            loss_scale,
            implementation,
        )
    )


def _axes(argument: str, given: Any) -> tuple[str, ...]:
    axes = (given,) if isinstance(given, str) or not isinstance(given, Sequence) else tuple(given)
    if not axes or len(set(axes)) < len(axes) or not all(isinstance(one, str) for one in axes):
        raise ValueError(f"{_NAME}: {argument} must be a mesh axis or several different ones, got {given!r}")
    return axes


class _How(NamedTuple):
    """The checked arguments."""

    recipe: optim.Recipe
    axes: tuple[str, ...]
    zero: int
    reduce: str
    compression: str | None
    feedback: bool
    small: int
    precision: Precision | None
    loss_scale: LossScale | None
    implementation: str

    def travels_as(self, dtype: Any) -> Any:
        return self.precision.reduction if self.precision else jnp.promote_types(dtype, jnp.float32)


# ---- who has which part of what ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A parameter on one device."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    split: frozenset[str]  # the axes along which devices have different parts of it

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _Leaves(NamedTuple):
    named: optim.Leaves
    every: list[_Leaf]
    decays: list[float]
    sizes: dict[str, int]  # devices along each axis


@dataclasses.dataclass(frozen=True)
class _Group:
    """Leaves whose gradients are summed over `axes` as one array, and cut into `parts` along a dimension of it.

    dimension: None: it stays whole. size: of the dimension, with padding. bucket: whether the array is a vector of the
    leaves one after the other.
    """

    members: tuple[int, ...]
    axes: tuple[str, ...]
    parts: int
    dimension: int | None = None
    size: int = 0
    bucket: bool = False

    def whole(self, leaves: Sequence[_Leaf]) -> tuple[int, ...]:
        """The shape of the array, with its padding."""
        if self.bucket:
            return (self.size,)
        shape = leaves[self.members[0]].shape
        return shape if self.dimension is None else _with(shape, self.dimension, self.size)

    def part(self, leaves: Sequence[_Leaf]) -> tuple[int, ...]:
        """The shape of a device's part of it."""
        whole = self.whole(leaves)
        return whole if self.dimension is None else _with(whole, self.dimension, self.size // self.parts)


def _with(shape: tuple, dimension: int, entry: Any) -> tuple:
    return (*shape[:dimension], entry, *shape[dimension + 1 :])


def _leaves(how: _How, params: Any) -> _Leaves:
    """The leaves of the device's parameters, inside `jax.shard_map`."""
    sizes = {axis: collectives.axis_size(_NAME, axis) for axis in how.axes}
    if not jax.typeof(lax.axis_index(how.axes[0])).mat.varying:
        raise ValueError(
            f"{_NAME}: jax.shard_map must be called with check_vma=True (the default): the types say which gradients "
            "are summed already"
        )
    named = optim.leaves_of(_NAME, "params", params)
    every = [
        _Leaf(path, x.shape, x.dtype, frozenset(jax.typeof(x).mat.varying))
        for path, x in zip(named.paths, named.arrays, strict=True)
    ]
    for one in every:
        if how.precision is not None and one.dtype != how.precision.parameter:
            raise TypeError(
                f"{_NAME}: {one.path} must be {how.precision.parameter}, the precision's parameter, got {one.dtype}"
            )
    for one in every if how.zero == 3 else ():
        if one.size > how.small and not one.split & set(how.axes):
            raise ValueError(
                f"{_NAME}: with zero=3 {one.path}, of {one.size} elements, must be split over {_written(how.axes)}, as "
                f"parameter_specs says, got the same {one.shape} on all of their devices"
            )
    return _Leaves(named, every, how.recipe.decays(params, named), sizes)


def _groups(how: _How, leaves: _Leaves) -> list[_Group]:
    """Which leaves are summed together, and along which dimension the sum is cut. Every leaf is in one group."""
    found: list[_Group] = []
    buckets: dict[Any, tuple[list[int], int]] = {}

    def close(key: Any) -> None:
        members, size = buckets.pop(key)
        parts = math.prod(leaves.sizes[axis] for axis in how.axes)
        found.append(_Group(tuple(members), how.axes, parts, 0, _up(size, math.lcm(parts, _ALIGNED)), True))

    for i, (leaf, decay) in enumerate(zip(leaves.every, leaves.decays, strict=True)):
        axes = tuple(axis for axis in how.axes if axis not in leaf.split)
        parts = math.prod(leaves.sizes[axis] for axis in axes)
        alone = _Group((i,), axes, parts)
        if how.zero == 0 or not axes or not leaf.size:
            found.append(alone)
        elif not leaf.split and (leaf.size <= how.small or not leaf.shape):
            key = (leaf.dtype, decay)
            if key in buckets and buckets[key][1] + leaf.size > _BUCKET:
                close(key)
            members, size = buckets.get(key, ([], 0))
            buckets[key] = ([*members, i], size + leaf.size)
        elif (dimension := _divided(leaf.shape, parts)) is not None:
            found.append(dataclasses.replace(alone, dimension=dimension, size=leaf.shape[dimension]))
        elif not leaf.split:
            dimension = leaf.shape.index(max(leaf.shape))
            found.append(dataclasses.replace(alone, dimension=dimension, size=_up(leaf.shape[dimension], parts)))
        else:  # a part of a parameter, which padding would tear off from the next part; its size is odd, or it is tiny
            found.append(alone)
    for key in list(buckets):
        close(key)
    return sorted(found, key=lambda group: group.members)


def _divided(shape: Sequence[int], parts: int) -> int | None:
    """The first dimension that can be cut into so many parts: the outer ones lie together in memory."""
    return next((d for d, size in enumerate(shape) if size % parts == 0), None)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _written(axes: Sequence[str]) -> str:
    return " · ".join(map(repr, axes))


def _packed(group: _Group, arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """The array of a group: its leaves in one vector, or the leaf, with the padding."""
    arrays = [x.astype(dtype) for x in arrays]
    x = jnp.concatenate([x.ravel() for x in arrays]) if group.bucket else arrays[0]
    if group.dimension is None or x.shape[group.dimension] == group.size:
        return x
    return jnp.pad(x, _with(((0, 0),) * x.ndim, group.dimension, (0, group.size - x.shape[group.dimension])))


def _unpacked(group: _Group, x: jax.Array, leaves: Sequence[_Leaf]) -> list[jax.Array]:
    """The leaves of a group from its array."""
    members = [leaves[i] for i in group.members]
    if not group.bucket:
        return [lax.slice(x, [0] * x.ndim, members[0].shape) if x.shape != members[0].shape else x]
    found, start = [], 0
    for leaf in members:
        found.append(lax.slice_in_dim(x, start, start + leaf.size).reshape(leaf.shape))
        start += leaf.size
    return found


# ---- sums over devices ---------------------------------------------------------------------------------------------


def _local(how: _How, params: Any) -> Any:
    leaves = _leaves(how, params)
    copies = [functools.reduce(collectives.copy, how.axes, x) for x in leaves.named.arrays]
    return jax.tree.unflatten(leaves.named.structure, copies)


def _summing(how: _How) -> str:
    """The implementation where sums are wanted and no update."""
    return "xla" if how.implementation == "pallas" else how.implementation


def _given(grads: Any, leaves: _Leaves) -> list[jax.Array]:
    """The local gradients. Raises `ValueError` for one that does not fit, or is summed already."""
    return optim.gradients_of(_NAME, grads, leaves.named)


def _factor(how: _How, state: ReductionState) -> Any:
    """What makes the mean, of unscaled losses, out of the sum of the gradients."""
    count = math.prod(collectives.axis_size(_NAME, axis) for axis in how.axes) if how.reduce == "mean" else 1
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
    return 1 / (count * scale)


def _reduced(how, leaves: _Leaves, groups, gradients, state: ReductionState, factor) -> Gradients:
    """The shards of factor · Σ gradients."""
    errors = jax.tree.leaves(state.error, is_leaf=lambda x: x is None)
    shards, left = [], []
    for group in groups:
        members = [gradients[i] for i in group.members]
        for i, g in zip(group.members, members, strict=True):
            path = "grads" + leaves.every[i].path.removeprefix("params")
            if missing := [axis for axis in group.axes if axis not in jax.typeof(g).mat.varying]:
                raise ValueError(
                    f"{_NAME}: {path} must be the device's own gradient, got one that is the same on all devices of "
                    f"{_written(missing)}: summed already. Differentiate with respect to local(params)"
                )
        dtype = how.travels_as(functools.reduce(jnp.promote_types, (g.dtype for g in members)))
        if _served(how, group, leaves.every[group.members[0]], dtype):
            whole = _packed(group, members, dtype)
            shards.append(factor * whole if factor != 1 else whole)
            continue
        error = errors[group.members[0]] if how.feedback else None
        shard, error = _summed(how, group, members, factor, error)
        shards.append(shard)
        left.append(error)
    return Gradients(tuple(shards), tuple(left) if how.feedback else ())


def _served(how: _How, group: _Group, p: Any, dtype: Any) -> bool:
    """Whether the kernel sums the gradients of a group, sent as `dtype`, updates it and gathers it."""
    if (
        how.implementation != "pallas"
        or group.dimension != 0
        or group.parts == 1
        or collectives.kernel_chip()[0] is None
    ):
        return False
    gradient, *moments = (jax.ShapeDtypeStruct(p.shape, d or p.dtype) for d in (dtype, *how.recipe.dtypes))
    return reduce_update.unsupported(gradient, p, moments) is None


def _summed(how: _How, group: _Group, gradients, factor, error) -> tuple[jax.Array, jax.Array | None]:
    dtype = functools.reduce(jnp.promote_types, (g.dtype for g in gradients))
    wide = jnp.promote_types(dtype, jnp.float32)
    if how.compression is None or group.dimension is None:
        x = _packed(group, gradients, how.travels_as(dtype) if group.axes else wide)
        if group.axes:
            if group.dimension is None:
                x = lax.psum(x, group.axes)
            elif how.implementation == "ring" and not group.bucket:
                x = _ring(x, group)
            else:
                x = lax.psum_scatter(x, group.axes, scatter_dimension=group.dimension, tiled=True)
        return factor * x.astype(wide), error
    x = factor * _packed(group, gradients, wide)
    if error is not None:
        x = x + error[0]
    coded, decode = _CODES[how.compression](x, group)
    if error is not None:
        error = (x - decode(coded))[None]
    # Sent to whom it belongs and added there, in float32: a reduce-scatter would add, and round, on the way.
    move = functools.partial(
        lax.all_to_all, axis_name=group.axes, split_axis=group.dimension, concat_axis=group.dimension, tiled=True
    )
    parts = decode(jax.tree.map(move, coded))
    shape = parts.shape
    parts = parts.reshape(*shape[: group.dimension], group.parts, -1, *shape[group.dimension + 1 :])
    return parts.sum(group.dimension), error


def _ring(x: jax.Array, group: _Group) -> jax.Array:
    """The reduce-scatter of x: sums go round, and each device adds its part as they come by.

    Half of every part goes in either direction, so that both of a link's are used.
    """
    assert group.dimension is not None
    d, n, me = group.dimension, group.parts, lax.axis_index(group.axes)
    size = group.size // n
    cut = (size + 1) // 2
    halves = []
    for way, first, count in ((1, 0, cut), (-1, cut, size - cut)):
        total: Any = None
        for left in reversed(range(n) if count else ()):  # how many devices the sum still has to pass
            own = lax.dynamic_slice_in_dim(x, (me + way * left) % n * size + first, count, axis=d)
            total = own if total is None else own + total
            if left:
                total = lax.ppermute(total, group.axes, [(i, (i + way) % n) for i in range(n)])
        halves += [total] if count else []
    return jnp.concatenate(halves, axis=d)


def _bfloat16(x: jax.Array, group: _Group):
    return x.astype(jnp.bfloat16), lambda coded: coded.astype(x.dtype)


def _int8(x: jax.Array, group: _Group):
    """((int8, scales), the function back). A block lies along the last dimension, in one device's part."""
    last = x.shape[-1] // (group.parts if group.dimension == x.ndim - 1 else 1)
    block = max(size for size in range(1, min(last, _BLOCK) + 1) if last % size == 0)
    block = block if block >= min(last, _BLOCK // 8) else last  # 4 bytes of scale for a few elements are too many
    blocks = x.reshape(*x.shape[:-1], -1, block)
    largest = jnp.max(jnp.abs(blocks), -1)
    scales = jnp.where(jnp.isfinite(blocks).all(-1), largest / 127, jnp.nan)  # what is not finite must be seen later
    codes = jnp.round(blocks / jnp.where(scales > 0, scales, 1)[..., None]).astype(jnp.int8)

    def back(coded):
        codes, scales = coded
        wide = codes.reshape(*codes.shape[:-1], -1, block).astype(x.dtype) * scales[..., None]
        return wide.reshape(codes.shape)

    return (codes.reshape(x.shape), scales), back


_CODES: Mapping[str, Callable] = {"bfloat16": _bfloat16, "int8": _int8}


# ---- the optimizer -------------------------------------------------------------------------------------------------


def _check_state(how: _How, state: Any, leaves: _Leaves, groups: Sequence[_Group]) -> list[list[Any]]:
    """The moments, each where the first leaf of its group is. Raises `TypeError` or `ValueError` for another state."""
    if not isinstance(state, ReductionState) or not isinstance(state.optimizer, how.recipe.state):
        got = type(state.optimizer if isinstance(state, ReductionState) else state).__name__
        raise TypeError(f"{_NAME}: state must be a ReductionState of {how.recipe.state.__name__}, got {got}")
    for what, there, wanted in (
        ("loss_scale", state.loss_scale is not None, how.loss_scale is not None),
        ("error", state.error is not None, how.feedback),
    ):
        if there != wanted:
            raise ValueError(
                f"{_NAME}: state.{what} must {'not ' * (not wanted)}be there, as in what init returns, got "
                f"{'one' if there else 'None'}: the state was made with other options"
            )
    otherwise = "another zero, small or number of devices"
    shapes = _placed(leaves, groups, lambda group: group.part(leaves.every))
    if how.feedback:
        wholes = _placed(leaves, groups, lambda group: _error_shape(group, leaves.every))
        optim.moments_of(_NAME, ("error",), state, leaves.named, wholes, otherwise)
    return optim.moments_of(_NAME, how.recipe.fields, state.optimizer, leaves.named, shapes, otherwise)


def _placed(leaves: _Leaves, groups: Sequence[_Group], of: Callable[[_Group], Any]) -> list[Any]:
    """For every leaf `of` its group where it is the first of it, else None."""
    found: list[Any] = [None] * len(leaves.every)
    for group in groups:
        found[group.members[0]] = of(group)
    return found


def _error_shape(group: _Group, leaves: Sequence[_Leaf]) -> tuple[int, ...] | None:
    return None if group.dimension is None else (1, *group.whole(leaves))


def _init(how: _How, params: Any) -> ReductionState:
    leaves = _leaves(how, params)
    groups = _groups(how, leaves)

    def zeros(group: _Group, shape: tuple[int, ...] | None, dtype: Any) -> Any:
        if shape is None:
            return None
        split = leaves.every[group.members[0]].split | set(group.axes if group.dimension is not None else ())
        zero = jnp.zeros(shape, dtype)
        return lax.pcast(zero, tuple(sorted(split)), to="varying") if split else zero

    def tree(of: Callable[[_Group], Any]) -> Any:
        return jax.tree.unflatten(leaves.named.structure, _placed(leaves, groups, of))

    of_parameter = lambda group: leaves.every[group.members[0]].dtype
    trees = [
        tree(lambda group: zeros(group, group.part(leaves.every), of_parameter(group) if dtype is None else dtype))
        for dtype in how.recipe.dtypes
    ]
    error = None
    if how.feedback:
        wide = lambda group: jnp.promote_types(of_parameter(group), jnp.float32)
        error = tree(lambda group: zeros(group, _error_shape(group, leaves.every), wide(group)))
    scale = None if how.loss_scale is None else how.loss_scale.init()
    return ReductionState(how.recipe.state_of(jnp.zeros((), jnp.int32), trees), error, scale)


def _step(how: _How, params: Any, grads: Any, state: ReductionState, in_place: bool) -> tuple[Any, ReductionState]:
    """(new parameters if `in_place`, else updates; the new state)."""
    if params is None:
        raise ValueError(f"{_NAME}: params must be given, to know how they are split, got None")
    leaves = _leaves(how, params)
    groups = _groups(how, leaves)
    moments = _check_state(how, state, leaves, groups)
    if not isinstance(grads, Gradients):
        grads = _reduced(how, leaves, groups, _given(grads, leaves), state, _factor(how, state))
    wanted, got = [group.part(leaves.every) for group in groups], [shard.shape for shard in grads.shards]
    wholes = [group.whole(leaves.every) for group in groups]
    unsummed = [how.implementation == "pallas" and a == w != b for a, w, b in zip(got, wholes, wanted, strict=False)]
    if len(got) != len(wanted) or any(a != b and not u for a, b, u in zip(got, wanted, unsummed, strict=True)):
        raise ValueError(
            f"{_NAME}: grads must hold shards of the shapes {wanted}, got {got}: they were reduced for other "
            "parameters or with another zero"
        )

    recipe = how.recipe
    norm, finite = _norm(grads.shards, recipe.max_norm is not None, how.loss_scale is not None)
    factor: Any = 1.0 if recipe.max_norm is None else optim.clipping(norm, recipe.max_norm)
    count, scalars = recipe.scalars(state.optimizer.count, factor, optim.widest(leaves.named.arrays))
    # One pass over a shard: a step that is skipped writes what it read.
    keep = (lambda new, old: new) if finite is None else functools.partial(jnp.where, finite)

    results: list[Any] = [None] * len(leaves.every)
    for group, g, whole in zip(groups, grads.shards, unsummed, strict=True):
        first = group.members[0]
        ps, dtype = [leaves.named.arrays[i] for i in group.members], leaves.every[first].dtype
        old = [moment[first] for moment in moments]
        result: Any
        if whole:
            result, new = _by_kernel(
                how, group, _packed(group, ps, dtype), g, old, scalars, leaves.decays[first], in_place
            )
            for i, leaf in zip(group.members, _unpacked(group, result, leaves.every), strict=True):
                results[i] = leaf
            for moment, after in zip(moments, new, strict=True):
                moment[first] = after
            continue
        own = _own(group, ps, dtype)
        change, new = recipe.changed(own, g, old, scalars, leaves.decays[first])
        if in_place:
            result = keep((own.astype(change.dtype) + change).astype(own.dtype), own)
        else:
            result = keep(change.astype(own.dtype), jnp.zeros_like(own))
        if group.dimension is not None:
            result = lax.all_gather(result, group.axes, axis=group.dimension, tiled=True, to="invarying")
        for i, leaf in zip(group.members, _unpacked(group, result, leaves.every), strict=True):
            results[i] = leaf
        for moment, after, before in zip(moments, new, old, strict=True):
            moment[first] = keep(after, before)

    structure = leaves.named.structure
    trees = [jax.tree.unflatten(structure, moment) for moment in moments]
    optimizer = recipe.state_of(keep(count, state.optimizer.count), trees)
    error, scale = state.error, state.loss_scale
    if how.feedback:
        after = dict(zip((group.members[0] for group in groups), grads.error, strict=True))
        before = jax.tree.leaves(error, is_leaf=lambda x: x is None)
        kept = [None if old is None else keep(after[i], old) for i, old in enumerate(before)]
        error = jax.tree.unflatten(structure, kept)
    if how.loss_scale is not None and scale is not None and finite is not None:
        scale = how.loss_scale.adjust(scale, finite)
    return jax.tree.unflatten(structure, results), ReductionState(optimizer, error, scale)


def _by_kernel(how: _How, group: _Group, p, g, moments, scalars, decay: float, in_place: bool):
    """(the group's new parameters or updates, its new moments), of the local gradients."""
    chip = collectives.kernel_chip()[0]
    assert chip is not None

    def update(p, g, moments, scalars):
        change, new = how.recipe.changed(p, g, moments, scalars, decay)
        return (p.astype(change.dtype) + change if in_place else change).astype(p.dtype), new

    scalars = scalars.astype(jnp.float32)
    return reduce_update.forward(g, p, moments, scalars, update, axes=group.axes, chip=chip)


def _own(group: _Group, arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """The device's part of a group's parameters."""
    whole = _packed(group, arrays, dtype)
    if group.dimension is None:
        return whole
    count = group.size // group.parts
    return lax.dynamic_slice_in_dim(whole, lax.axis_index(group.axes) * count, count, axis=group.dimension)


def _norm(shards: Sequence[jax.Array], clips: bool, scales: bool) -> tuple[jax.Array, jax.Array | None]:
    """(the norm of the whole gradient, whether it is finite everywhere), the same on all devices; what is asked for.

    A shard is added over those axes that its type names: there the devices have different elements, elsewhere the same.
    """
    sums: dict[tuple[str, ...], Any] = {}
    for g in shards:
        axes = tuple(sorted(jax.typeof(g).mat.varying))
        wide = jnp.promote_types(g.dtype, jnp.float32)
        square = optim.squares(g) if clips else jnp.zeros((), wide)
        bad = jnp.sum(~jnp.isfinite(g), dtype=wide) if scales else jnp.zeros((), wide)
        sums[axes] = sums.get(axes, 0) + jnp.stack([square, bad])
    total: Any = sum((lax.psum(x, axes) if axes else x for axes, x in sums.items()), jnp.zeros(2))
    return jnp.sqrt(total[0]), total[1] == 0 if scales else None


# ---- loss and gradients --------------------------------------------------------------------------------------------


def _value_and_grad(how: _How, loss: Callable, micro_batches: int, has_aux: bool, params: Any, state: Any, *batch: Any):
    leaves = _leaves(how, params)
    groups = _groups(how, leaves)
    _check_state(how, state, leaves, groups)
    parts = _cut(micro_batches, batch)
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

    def scaled(local: Any, *batch: Any):
        """What to differentiate: of each device its part of a sum, the scaled mean."""
        value = loss(local, *batch)
        value, aux = value if has_aux else (value, None)
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(f"{_NAME}: loss must return a floating scalar, got {jax.typeof(value)}")
        value = jnp.asarray(value)
        wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        return wide * (scale / math.prod(leaves.sizes[axis] for axis in _different(how, value))), (wide, aux)

    differentiated = jax.value_and_grad(scaled, has_aux=True)
    local = _local(how, params)
    factor = 1 / (micro_batches * scale)
    reduced = functools.partial(_reduced, how, leaves, groups)
    if micro_batches == 1:
        (_, (value, aux)), grads = differentiated(local, *batch)
        gradients = reduced(_given(grads, leaves), state, factor)
    elif how.zero < 2:

        def add(total, batch):
            (_, kept), grads = differentiated(local, *batch)
            return [t + g.astype(t.dtype) for t, g in zip(total, _given(grads, leaves), strict=True)], kept

        total, (values, aux) = lax.scan(add, [_zeros_like(x, x.shape) for x in jax.tree.leaves(local)], parts)
        gradients, value = reduced(total, state, factor), values.mean()
    else:
        reduced = functools.partial(_reduced, how._replace(implementation=_summing(how)), leaves, groups)

        def add_shards(carry: Gradients, batch):
            # Else the compiler gathers parameters once, before the loop, and keeps the whole of them.
            params, batch = lax.optimization_barrier((local, batch)) if how.zero == 3 else (local, batch)
            (_, kept), grads = differentiated(params, *batch)
            new = reduced(_given(grads, leaves), state._replace(error=_tree(leaves, groups, carry.error)), factor)
            return Gradients(tuple(map(jnp.add, carry.shards, new.shards)), new.error), kept

        copies = jax.tree.leaves(local)
        shards = tuple(
            _zeros_like(x, group.part(leaves.every), () if group.dimension is not None else group.axes)
            for group in groups
            for x in [copies[group.members[0]]]
        )
        errors = jax.tree.leaves(state.error, is_leaf=lambda x: x is None)
        error = tuple(errors[group.members[0]] for group in groups) if how.feedback else ()
        gradients, (values, aux) = lax.scan(add_shards, Gradients(shards, error), parts)
        value = values.mean()
    if over := _different(how, value):
        value = lax.pmean(value, over)
    value = value if how.precision is None else value.astype(how.precision.output)
    return ((value, aux) if has_aux else value), gradients


def _different(how: _How, value: jax.Array) -> tuple[str, ...]:
    """The axes over which a device's loss is one of several, of which the mean is meant."""
    return tuple(axis for axis in how.axes if axis in jax.typeof(value).mat.varying)


def _tree(leaves: _Leaves, groups: Sequence[_Group], of_groups: Sequence[Any]) -> Any:
    if not of_groups:
        return None
    found = dict(zip((group.members[0] for group in groups), of_groups, strict=True))
    return jax.tree.unflatten(leaves.named.structure, [found.get(i) for i in range(len(leaves.every))])


def _zeros_like(x: jax.Array, shape: tuple[int, ...], summed: Sequence[str] = ()) -> jax.Array:
    """Wide zeros that vary as x does, but for the axes that are summed."""
    varying = tuple(sorted(jax.typeof(x).mat.varying - set(summed)))
    zero = jnp.zeros(shape, jnp.promote_types(x.dtype, jnp.float32))
    return lax.pcast(zero, varying, to="varying") if varying else zero


def _cut(micro_batches: int, batch: tuple) -> tuple:
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"{_NAME}: micro_batches must be a whole number above 0, got {micro_batches!r}")

    def cut(path: tuple, x: Any) -> jax.Array:
        if jnp.ndim(x) == 0 or jnp.shape(x)[0] % micro_batches:
            raise ValueError(
                f"{_NAME}: batch{jax.tree_util.keystr(path)} must have a first dimension that micro_batches = "
                f"{micro_batches} divide, got shape {jnp.shape(x)} on each device"
            )
        return jnp.reshape(x, (micro_batches, -1, *jnp.shape(x)[1:]))

    return batch if micro_batches == 1 else jax.tree.map_with_path(cut, batch)


# ---- parameters as shards ------------------------------------------------------------------------------------------


def _entries(spec: PartitionSpec, rank: int) -> list[tuple[str, ...]]:
    """The axes of every dimension."""
    given = [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in spec]
    return given + [()] * (rank - len(given))


def _spec(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    written = [entry[0] if len(entry) == 1 else entry or None for entry in entries]
    while written and written[-1] is None:
        written.pop()
    return PartitionSpec(*written)


def _gather(how: _How, params: Any, specs: Any) -> Any:
    travel = None if how.precision is None else (how.precision.compute, how.precision.reduction)

    def whole(path: tuple, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        name = "params" + jax.tree_util.keystr(path)
        check_spec(_NAME, name, x.shape, spec)
        for dimension, entry in enumerate(_entries(spec, x.ndim)):
            axes = tuple(axis for axis in entry if axis in how.axes)
            if axes != entry[len(entry) - len(axes) :]:
                raise ValueError(
                    f"{_NAME}: {name} is split over {entry}, of which {axes} can be gathered only if they come last"
                )
            if axes:
                for axis in axes:
                    collectives.axis_size(_NAME, axis)
                dtype, back = travel or (x.dtype, jnp.promote_types(x.dtype, jnp.float32))
                x = _gathered(x, axes, dimension, dtype, back, how.implementation)
        return x

    return jax.tree.map_with_path(whole, params, specs)


def _gathered(
    x: jax.Array, axes: tuple[str, ...], dimension: int, dtype: Any, back: Any, implementation: str
) -> jax.Array:
    """All-gather of x as `dtype`; its gradient is summed as `back`."""
    ring = implementation == "ring"

    def gathered(x):
        if ring:
            return _ring_gather(x.astype(dtype), axes, dimension)
        return lax.all_gather(x.astype(dtype), axes, axis=dimension, tiled=True)

    def backward(_, ct):
        ct = ct.astype(back)
        if ring:
            parts = math.prod(lax.axis_size(axis) for axis in axes)
            total = _ring(ct, _Group((), axes, parts, dimension, ct.shape[dimension]))
        else:
            total = lax.psum_scatter(ct, axes, scatter_dimension=dimension, tiled=True)
        return (total.astype(x.dtype),)

    if dtype == back and not ring:
        return gathered(x)
    differentiable = jax.custom_vjp(gathered)
    # Not the function itself, which would be one operation to `policy`, and what it gathered be kept.
    differentiable.defvjp(lambda x: (gathered(x), None), backward)
    return differentiable(x)


def _ring_gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """The all-gather of x along `axis`: half of every part goes round in either direction."""
    n, me = math.prod(lax.axis_size(name) for name in axes), lax.axis_index(axes)
    size = x.shape[axis]
    cut = (size + 1) // 2
    whole = jnp.concatenate([x] * n, axis)
    for way, first, count in ((1, 0, cut), (-1, cut, size - cut)):
        part = lax.slice_in_dim(x, first, first + count, axis=axis)
        for passed in range(1, n if count else 1):
            part = lax.ppermute(part, axes, [(i, (i + way) % n) for i in range(n)])
            start = (me - way * passed) % n * size + first
            whole = lax.dynamic_update_slice_in_dim(whole, part, start, axis)
    return whole


def _mesh_sizes(how: _How, mesh: Any) -> dict[str, int]:
    sizes = dict((get_abstract_mesh() if mesh is None else mesh).shape)
    for axis in how.axes:
        if axis not in sizes:
            raise ValueError(
                f"{_NAME}: axis must be in the mesh, got {axis!r}, "
                + (f"with axes {tuple(sizes)} there" if sizes else "with no mesh: give one, or call jax.set_mesh")
            )
    return sizes


def _specs_of(params: Any, specs: Any) -> list[tuple[str, Any, PartitionSpec]]:
    """(path, leaf, its spec) of every leaf."""
    named, structure = jax.tree_util.tree_flatten_with_path(params)
    given = jax.tree.leaves(specs) if specs is not None else [PartitionSpec()] * len(named)
    of_specs: Any = structure if specs is None else jax.tree.structure(specs)
    if of_specs != structure:
        raise ValueError(f"{_NAME}: specs must be a tree like params, {structure}, got {of_specs}")
    found = []
    for (path, leaf), spec in zip(named, given, strict=True):
        name = "params" + jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{_NAME}: {name} must be of a floating dtype, got {leaf.dtype}")
        found.append((name, leaf, spec))
    return found


def _parameter_specs(how: _How, params: Any, specs: Any, mesh: Any, over: Any) -> Any:
    sizes = _mesh_sizes(how, mesh)
    over = how.axes if over is None else _axes("over", over)
    if unknown := [axis for axis in over if axis not in how.axes]:
        raise ValueError(f"{_NAME}: over must be among the axes {how.axes}, got {unknown[0]!r}")
    parts = math.prod(sizes[axis] for axis in over)
    found = []
    for name, leaf, spec in _specs_of(params, specs):
        check_spec(_NAME, name, leaf.shape, spec)
        entries = _entries(spec, len(leaf.shape))
        local = _local_shape(leaf.shape, entries, sizes)
        taken = any(axis in how.axes for entry in entries for axis in entry)
        if how.zero == 3 and not taken and math.prod(local) > how.small:
            dimension = _divided(local, parts)
            if dimension is None:
                raise ValueError(
                    f"{_NAME}: with zero=3 {name}, of shape {tuple(leaf.shape)}, must have a dimension that is a "
                    f"multiple of {parts}, the devices along {_written(over)}"
                    + (f", on each device of the other axes, where it is {local}" if local != leaf.shape else "")
                )
            entries[dimension] += over
            spec = _spec(entries)
        found.append(spec)
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _local_shape(shape: Sequence[int], entries: Sequence[tuple[str, ...]], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size // math.prod(sizes[axis] for axis in entry) for size, entry in zip(shape, entries, strict=True))


def _state_specs(how: _How, params: Any, specs: Any, mesh: Any) -> ReductionState:
    sizes = _mesh_sizes(how, mesh)
    known = _specs_of(params, specs)
    every, dimensions = [], []
    for name, leaf, spec in known:
        check_spec(_NAME, name, leaf.shape, spec)
        entries = _entries(spec, len(leaf.shape))
        split = frozenset(axis for entry in entries for axis in entry)
        if unknown := split - set(sizes):
            raise ValueError(f"{_NAME}: {name} is split over {sorted(unknown)[0]!r}, but the mesh has {tuple(sizes)}")
        every.append(_Leaf(name, _local_shape(leaf.shape, entries, sizes), leaf.dtype, split))
        dimensions.append(entries)
    structure = jax.tree.structure(params)
    named = optim.Leaves("params", [one.path for one in every], [leaf for _, leaf, _ in known], structure)
    leaves = _Leaves(named, every, how.recipe.decays(params, named), {axis: sizes[axis] for axis in how.axes})
    groups = _groups(how, leaves)

    def moments(group: _Group) -> PartitionSpec:
        if group.bucket:
            return _spec([group.axes])
        entries = list(dimensions[group.members[0]])
        if group.dimension is not None:
            entries[group.dimension] += group.axes
        return _spec(entries)

    def error(group: _Group) -> PartitionSpec | None:
        if group.dimension is None:
            return None
        return _spec([group.axes, *([] if group.bucket else dimensions[group.members[0]])])

    def tree(of: Callable[[_Group], Any]) -> Any:
        return jax.tree.unflatten(structure, _placed(leaves, groups, of))

    everywhere: Any = PartitionSpec()
    scale = None if how.loss_scale is None else LossScaleState(everywhere, everywhere, everywhere)
    return ReductionState(
        how.recipe.state_of(everywhere, [tree(moments) for _ in how.recipe.dtypes]),
        tree(error) if how.feedback else None,
        scale,
    )
