"""Collectives in conjugate pairs: the gradient of each is the other, and JAX's own transposition makes it so.

Inside `jax.shard_map(check_vma=True)` an array either varies over a mesh axis (each device has its own, X[I_T, J] or a
part of a sum) or is the same on all its devices. The types say which, so that a gradient is summed over an axis exactly
where an array that was the same everywhere met one that varies.

| forward | of x | to | backward |
| --- | --- | --- | --- |
| `copy` | the same everywhere | varying | all-reduce |
| `jax.lax.psum` (all-reduce) | varying: parts of a sum | the same everywhere | `copy`: nothing is sent |
| `all_gather` | varying: shards | varying: the whole | `reduce_scatter` |
| `reduce_scatter` | varying: parts of a sum | varying: shards | `all_gather` |
| `all_gather_same` | varying: shards | the same everywhere | each its own part: nothing is sent |
| `all_to_all` | varying, split along one dimension | varying, split along another | `all_to_all` back |

These are JAX's primitives, tiled, with sizes checked. With `check_vma=False` JAX does not know which is which, and the
gradients of `copy` and `psum` are not these.
"""

import jax
from jax import lax
from jax.sharding import get_abstract_mesh

from pallas_kernels import chips


def axis_size(function: str, axis: str) -> int:
    """How many devices are along `axis`. Raises `ValueError` unless an enclosing `jax.shard_map` is over it."""
    try:
        return lax.axis_size(axis)
    except NameError:
        there = tuple(get_abstract_mesh().manual_axes)
        raise ValueError(
            f"{function}: axis must be a mesh axis of an enclosing jax.shard_map, got {axis!r}, "
            + (f"with axes {there} there" if there else "with no shard_map there")
        ) from None


def divisible(function: str, name: str, x: jax.Array, dimension: int, parts: int, axis: str) -> None:
    """Raises `ValueError` unless `dimension` of x can be cut into as many parts as there are devices along `axis`."""
    if x.shape[dimension] % parts:
        raise ValueError(
            f"{function}: {name} has shape {x.shape}, its dimension {dimension % x.ndim} must be a multiple of "
            f"{parts}, the devices along {axis!r}"
        )


def kernel_chip() -> tuple[chips.Chip | None, str | None]:
    """The chip that the mesh is of, and why there are no kernels for it, or on this mesh."""
    mesh = get_abstract_mesh()
    device = mesh.abstract_device
    if device is None:
        return None, "the mesh does not tell which chip it is of"
    if device.platform != "tpu":
        return None, f"kernels with remote DMA run on TPU only, and the mesh is of {device.device_kind} devices"
    if chips.of_device(device) is None:
        return None, f"no kernel is made for {device.device_kind}"
    if automatic := [axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1]:
        return None, f"mesh axes {automatic} are partitioned automatically: wrap the call in jax.shard_map over them"
    return chips.of_device(device), None


def copy(x: jax.Array, axis: str) -> jax.Array:
    """x[...] to every device of `axis`. Forward: identity. Backward: sum over `axis` (all-reduce).

    Copy once what several products take: each that has to copy for itself sums a gradient of its own. An x that varies
    over `axis` already is returned as it is.
    """
    axis_size("copy", axis)
    return x if axis in jax.typeof(x).mat.varying else lax.pcast(x, (axis,), to="varying")


def all_gather(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """x[I_T, …] ↦ x[I, …] along `dimension`. Forward: all-gather. Backward: `reduce_scatter`."""
    axis_size("all_gather", axis)
    return lax.all_gather(x, axis, axis=dimension % x.ndim, tiled=True)


def all_gather_same(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """x[I_T, …] ↦ x[I, …], known to be the same on every device. Forward: all-gather. Backward: the device's own part.

    For what every device then uses alike, as an output does. Before products that differ from device to device,
    `all_gather` is right: there every device has a part of the gradient.
    """
    axis_size("all_gather_same", axis)
    return lax.all_gather(x, axis, axis=dimension % x.ndim, tiled=True, to="invarying")


def reduce_scatter(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """Parts of a sum x[I, …] ↦ shards of Σ_T x, [I_T, …]. Forward: reduce-scatter. Backward: `all_gather`.

    Raises `ValueError` if the devices along `axis` do not divide the dimension.
    """
    divisible("reduce_scatter", "x", x, dimension, axis_size("reduce_scatter", axis), axis)
    return lax.psum_scatter(x, axis, scatter_dimension=dimension % x.ndim, tiled=True)


def all_to_all(x: jax.Array, axis: str, split: int, concat: int) -> jax.Array:
    """x[I_T, J] ↦ x[I, J_T]: dimension `split` is cut, `concat` is put together. Backward: the same the other way.

    Raises `ValueError` if the devices along `axis` do not divide dimension `split`.
    """
    divisible("all_to_all", "x", x, split, axis_size("all_to_all", axis), axis)
    return lax.all_to_all(x, axis, split % x.ndim, concat % x.ndim, tiled=True)
