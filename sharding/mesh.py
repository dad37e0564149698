"""Meshes with named axes, and where the parameters lie on them."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Outermost first. Neighbours along the last axis are neighbours on the chips' network, so that what communicates most
# comes last: a tensor axis in every layer, a pipeline once for each micro-batch.
AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
    axis_types: AxisType = AxisType.Auto,
) -> Mesh:
    """devices ↦ [pipeline, data, fsdp, expert, context, tensor], every axis there, also those of size 1.

    So a `PartitionSpec` may name any of them whatever the mesh. On TPUs `jax.experimental.mesh_utils` orders the
    devices along the torus: the ring of the last axis that is above 1 has only nearest neighbours.

    Args:
      data: copies of the model, each with its part of the batch.
      fsdp: parts of the batch too; the parameters are split over it and gathered where they are used.
      tensor: parts of each matrix, of heads and features.
      context: parts of the sequence.
      pipeline: parts of the layers.
      expert: parts of the experts.
      devices: all devices if None.
      axis_types: of all axes, `AxisType.Auto` (XLA partitions) or `AxisType.Explicit` (types say where arrays lie).

    Sizes are Python ints above 0; one of them may be -1: what the others leave.

    Raises `TypeError` if a size is no int, `ValueError` if it is neither above 0 nor -1, if more than one is -1, or if
    the product is not the number of devices.
    """
    sizes = dict(pipeline=pipeline, data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"make_mesh: {name} must be an int, got {type(size).__name__}")
        if size < 1 and size != -1:
            raise ValueError(f"make_mesh: {name} must be above 0, or -1 for what the others leave, got {size}")
    if devices is not None and len(devices) == 0:
        raise ValueError("make_mesh: devices must hold at least one, got none")
    count = jax.device_count() if devices is None else len(devices)
    given = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"make_mesh: one axis at most may be -1, got {' and '.join(open_axes)}")
    written = " · ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "1"
    if count % given or (not open_axes and given != count):
        raise ValueError(
            f"make_mesh: the sizes must multiply to the number of devices, {count}, got {written}"
            + (f", of which those that are given make {given}" if open_axes else f" = {given}")
        )
    shape = tuple(count // given if size == -1 else int(size) for size in sizes.values())
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(axis_types,) * len(sizes))


def partition_specs(tree: Any, rules: Rules, mesh: Mesh | None = None) -> Any:
    """The tree of PartitionSpecs of the arrays of `tree`, by the first rule whose pattern is found in an array's path.

    Args:
      tree: a pytree of arrays or of what has a shape, an `nnx.State`, or a model.
      rules: (regular expression, `PartitionSpec`) in their order. A path is "blocks/0/mlp/up/kernel", and the pattern
        is searched for in it. What no rule finds is an error: end with `(".*", PartitionSpec())` to keep the rest on
        every device.
      mesh: to check axes and sizes by, if given.

    Raises `ValueError` naming the path if no rule finds it, if the spec is longer than the shape, or with a mesh if it
    names an axis that is not there, or one that does not divide the dimension.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]

    def of(path: tuple, leaf: Any) -> PartitionSpec:
        name = path_name(path)
        for pattern, spec in compiled:
            if pattern.search(name):
                check_spec("partition_specs", name, leaf.shape, spec, mesh)
                return spec
        raise ValueError(
            f"partition_specs: no rule finds {name!r}, of shape {tuple(leaf.shape)}; end the rules with "
            '(".*", PartitionSpec()) to have the rest on every device'
        )

    return jax.tree.map_with_path(of, tree)


def shard(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """`tree` with every array on `mesh`, where `rules` put it (see `partition_specs`).

    Without rules the arrays are where the metadata of their `nnx.Variable`s say (`nnx.with_partitioning`, or the layers
    of `sharding.nn`), and on every device where there are none.

    Raises `ValueError` as `partition_specs` with a mesh does.
    """
    if rules is None:
        specs = nnx.get_partition_spec(tree)
        jax.tree.map_with_path(
            lambda path, leaf, spec: check_spec("shard", path_name(path), leaf.shape, spec, mesh), tree, specs
        )
    else:
        specs = partition_specs(tree, rules, mesh)
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def check_spec(function: str, name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Any = None) -> None:
    """Raises `ValueError` unless an array of `shape` can be split as `spec` says, over `mesh` if it is given."""
    if len(spec) > len(shape):
        raise ValueError(f"{function}: {name} has shape {tuple(shape)}, its {spec} must not be longer")
    if mesh is None:
        return
    for dimension, entry in enumerate(spec):
        axes = entry if isinstance(entry, tuple) else () if entry in (None, PartitionSpec.UNCONSTRAINED) else (entry,)
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(f"{function}: {name} is split over {axis!r}, but the mesh has axes {mesh.axis_names}")
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dimension] % parts:
            raise ValueError(
                f"{function}: {name} has shape {tuple(shape)}, its dimension {dimension} must be a multiple of "
                f"{parts}, the devices along {' · '.join(map(repr, axes))}"
            )


def path_name(path: tuple) -> str:
    """ "mlp/up/kernel" of a key path; what the array of a variable is called is left out."""
    entries = (getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))) for entry in path)
    names = [str(entry) for entry in entries]
    if len(names) > 1 and names[-1] in ("value", "raw_value"):
        names.pop()
    return "/".join(names)
