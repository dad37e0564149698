"""Pallas' interpreters as kernels are proved in them: races raise, memory starts as NaN, no state is left behind.

`tpu` is JAX's own interpreter. The GPU interpreter of JAX 0.12 lacks a few things, which `gpu` supplies while open:

- wgmma with a left operand in registers, and values stored to its accumulators;
- race checks of what wgmma reads from shared memory: a product is an event of the asynchronous proxy, as a copy is, so
  a missing fence or a tile freed too early is a race;
- copies that gather windows (`plgpu.im2col_ref`);
- what GPUs before Hopper have instead: mma, and copies without a barrier (cp.async), which arrive as late as they may;
- `inline_mgpu` of a function that says in plain JAX what it does, as its attribute `meaning`.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.core import Im2ColTransform, WGMMAAbstractAccumulatorRef
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.state.primitives import ref_set
from jax._src.state.types import AbstractRef
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def unoptimized() -> Iterator[None]:
    """XLA compiles without the optimisations of LLVM: sooner, for what runs once."""
    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    jax.config.update(flag, True)
    try:
        yield
    finally:
        jax.config.update(flag, before)


@contextlib.contextmanager
def tpu(**parameters: Any) -> Iterator[None]:
    """TPU kernels traced in this context are interpreted, with race detection. Its state is fresh, also after an error.

    parameters: of `pltpu.InterpretParams`.
    """
    interpret_pallas_call.reset_tpu_interpret_mode_state()
    try:
        with (
            unoptimized(),
            pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**{"detect_races": True, **parameters})),
        ):
            yield
    finally:
        interpret_pallas_call.reset_tpu_interpret_mode_state()


@contextlib.contextmanager
def gpu(**parameters: Any) -> Iterator[None]:
    """Mosaic GPU kernels traced in this context are interpreted, with race detection, also of what wgmma reads.

    parameters: of `plgpu.InterpretGPUParams`. The interpreter's state is fresh, also after an error.
    """
    theirs: Any = jaxpr_interpret.JaxprInterpreter
    originals = {name: getattr(theirs, name) for name in _OURS}
    store, wait = primitives.wgmma_accumulator_store, plgpu.wait_gmem_to_smem
    for name, function in _OURS.items():
        setattr(theirs, name, functools.partialmethod(function, originals[name]))
    # An accumulator is memory like any other there. (It is an ordinary value only when a kernel is lowered.)
    primitives.wgmma_accumulator_store = lambda ref, value: ref_set(ref, None, value)
    # The other direction's wait is one that the interpreter knows and does in order; None tells them apart.
    plgpu.wait_gmem_to_smem = lambda n: primitives.wait_smem_to_gmem_p.bind(n=n, wait_read_only=None)
    _in_flight.clear()
    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        with (
            unoptimized(),
            plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**{"detect_races": True, **parameters})),
        ):
            yield
    finally:
        for name, function in originals.items():
            setattr(theirs, name, function)
        primitives.wgmma_accumulator_store, plgpu.wait_gmem_to_smem = store, wait
        gpu_callbacks.reset_gpu_interpret_mode_state()


def has_run(platform: str) -> bool:
    """Whether a kernel of `platform` ("tpu" or "gpu") was interpreted since its interpreter was opened."""
    return (interpret_pallas_call.races if platform == "tpu" else gpu_callbacks._races) is not None


@gpu_callbacks.fail_on_exception
def _multiply(
    *,
    token,
    mesh_location,
    thread,
    acc,
    lhs,
    rhs,
    acc_transforms,
    lhs_transforms,
    rhs_transforms,
    lhs_is_ref,
    source_info,
):
    """acc += lhs @ rhs, with the reads of shared memory checked for races."""
    memory = gpu_callbacks._get_shared_memory()
    log = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    clock = None
    if memory.detect_races:
        unit = memory.get_next_tma_thread_id()
        with memory.lock:
            memory.clocks[thread].inc(unit)
            clock = memory.clocks[thread].async_smem_clock.copy()

    def content(ref, transforms):
        key = gpu_callbacks.HostAllocationKey.from_array(ref)
        access = memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
        return key, access, memory.get_buffer_content(key, access, thread, logging_info=log)[0]

    def read(ref, transforms):
        key, access, value = content(ref, transforms)
        if clock is not None:
            gpu_callbacks.get_races().check_read(thread, clock, key, access, source_info=source_info)
        return value

    lhs = read(lhs, lhs_transforms) if lhs_is_ref else np.asarray(lhs)
    rhs = read(rhs, rhs_transforms)
    key, access, old = content(acc, acc_transforms)
    new = old + np.matmul(lhs, rhs, dtype=old.dtype)
    memory.store_buffer_content(key, access, new, thread, logging_info=log)
    return token


def _called(self, function, equation, token, **arrays):
    """The next token, after `function` has run on the host for the thread that `self` interprets."""
    return callback.io_callback(
        functools.partial(function, source_info=equation.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        **arrays,
    )


def _interpret_wgmma(self, original, equation, token, read_inputs):
    del original
    acc, lhs, rhs, *leaves = read_inputs()
    trees = [equation.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    acc_transforms, lhs_transforms, rhs_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    avals = [variable.aval for variable in equation.invars[:3]]
    acc, acc_transforms = jaxpr_interpret.resolve_ref(avals[0], acc, acc_transforms)
    rhs, rhs_transforms = jaxpr_interpret.resolve_ref(avals[2], rhs, rhs_transforms)
    lhs_is_ref = isinstance(avals[1], AbstractRef)
    if lhs_is_ref:
        lhs, lhs_transforms = jaxpr_interpret.resolve_ref(avals[1], lhs, lhs_transforms)
    token = _called(
        *(self, functools.partial(_multiply, lhs_is_ref=lhs_is_ref), equation, token),
        acc=acc,
        lhs=lhs,
        rhs=rhs,
        acc_transforms=acc_transforms,
        lhs_transforms=lhs_transforms,
        rhs_transforms=rhs_transforms,
    )
    return token, []


@gpu_callbacks.fail_on_exception
def _set_accumulator(*, token, mesh_location, thread, ref, value, source_info):
    """Registers belong to one warpgroup: there is nobody to race with."""
    key = gpu_callbacks.HostAllocationKey.from_array(ref)
    memory = gpu_callbacks._get_shared_memory()
    log = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    memory.store_buffer_content(key, memory.access(key, ()), np.asarray(value), thread, logging_info=log)
    return token


def _interpret_swap(self, original, equation, token, read_inputs):
    if not isinstance(equation.invars[0].aval, WGMMAAbstractAccumulatorRef):
        return original(self, equation, token, read_inputs)
    ref, value = read_inputs()
    token = _called(self, _set_accumulator, equation, token, ref=ref, value=value)
    return token, value  # nobody asks what was there before


_in_flight: dict[Any, list[Callable[[], None]]] = collections.defaultdict(list)  # copies of each thread, in order


@gpu_callbacks.fail_on_exception
def _start_copy(*, token, mesh_location, thread, source, source_transforms, target, target_transforms, source_info):
    log = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)

    def place(ref, transforms):
        key = gpu_callbacks.HostAllocationKey.from_array(ref)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        return key, gpu_callbacks._get_shared_memory().access(key, transforms)

    def copy():
        memory, ((key, access), (target_key, target_access)) = gpu_callbacks._get_shared_memory(), places
        value = memory.get_buffer_content(key, access, thread, logging_info=log)[0]
        if value is None or value.shape != access.shape:
            raise IndexError(f"a copy reads out of bounds: {access}")
        memory.store_buffer_content(target_key, target_access, value, thread, logging_info=log)

    places = place(source, source_transforms), place(target, target_transforms)
    _in_flight[thread].append(copy)
    return token


@gpu_callbacks.fail_on_exception
def _finish_copies(*, token, thread, but):
    copies = _in_flight[thread]
    while len(copies) > but:
        copies.pop(0)()
    return token


class _GatherWindows(gpu_callbacks.AsyncCopyGmemToSmemTask):
    """A copy of which the interpreter reads all of the source; what arrives is one element of some windows."""

    def __init__(self, view: Im2ColTransform, index, **how):
        super().__init__(**how)
        self.view, self.index = view, index

    def __call__(self, tma_thread_id: int):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        x = memory.get_buffer_content(self.src_allocation_key, self.src_access, self.thread, logging_info=None)[0]
        assert x is not None
        padded = np.pad(x, [(0, 0), *self.view.padding, (0, 0)])
        rows, *offsets, channels = self.index
        counts = self.view.spatial_out_shape(x.shape)
        windows = np.arange(rows.start, min(rows.start + rows.size, len(x) * int(np.prod(counts))))
        image, *places = np.unravel_index(windows, (len(x), *counts))
        assert all(0 <= o < extent for o, extent in zip(offsets, self.view.window_shape, strict=True)), offsets
        there = tuple(place + offset for place, offset in zip(places, offsets, strict=True))
        found = padded[(image, *there)][:, channels.start : channels.start + channels.size]
        value = np.zeros((rows.size, channels.size), x.dtype)
        value[: found.shape[0], : found.shape[1]] = found
        self.post_read(tma_thread_id, memory)
        log = self.logging_info
        memory.store_buffer_content(self.dst_allocation_key, self.dst_access, value, self.thread, logging_info=log)
        self.post_write(tma_thread_id, memory)


@gpu_callbacks.fail_on_exception
def _gather_windows(
    *, token, mesh_location, thread, source, index, target, target_transforms, barrier, view, source_info
):
    memory = gpu_callbacks._get_shared_memory()
    source, target, barrier = map(gpu_callbacks.HostAllocationKey.from_array, (source, target, barrier))
    target_transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(target_transforms))
    copy = _GatherWindows(
        view,
        jax.tree.map(int, index),
        mesh_location=mesh_location,
        thread=thread,
        src_allocation_key=source,
        src_access=memory.access(source, ()),
        dst_allocation_key=target,
        dst_access=memory.access(target, target_transforms),
        barrier_allocation_key=barrier,
        source_info=source_info,
        clock=memory.incr_clock(thread) if memory.detect_races else None,
    )
    memory.execute_async_task(copy)
    return token


def _interpret_gather(self, equation, token, read_inputs):
    source, target, barrier, *leaves = read_inputs()
    trees = [equation.params[f"{name}_transforms_treedef"] for name in ("src", "dst", "barrier")]
    (view, indexer), target_transforms, barrier_transforms = jax.tree.unflatten(
        jax.tree_util.treedef_tuple(trees), leaves
    )
    key = jaxpr_interpret._get_barrier_allocation_key_from_inval(barrier, trees[2], jax.tree.leaves(barrier_transforms))
    token = _called(
        *(self, functools.partial(_gather_windows, view=view), equation, token),
        source=source,
        index=indexer.indices,
        target=target,
        target_transforms=target_transforms,
        barrier=key,
    )
    return token, []


def _interpret_copy(self, original, equation, token, read_inputs):
    if equation.params["has_barrier"]:
        transforms = equation.params["src_transforms_treedef"].unflatten(
            [0] * equation.params["src_transforms_treedef"].num_leaves
        )
        if any(isinstance(transform, Im2ColTransform) for transform in transforms):
            return _interpret_gather(self, equation, token, read_inputs)
        return original(self, equation, token, read_inputs)
    source, target, *leaves = read_inputs()
    trees = [equation.params[f"{name}_transforms_treedef"] for name in ("src", "dst")]
    source_transforms, target_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    source, source_transforms = jaxpr_interpret.resolve_ref(equation.invars[0].aval, source, source_transforms)
    target, target_transforms = jaxpr_interpret.resolve_ref(equation.invars[1].aval, target, target_transforms)
    token = _called(
        *(self, _start_copy, equation, token),
        source=source,
        source_transforms=source_transforms,
        target=target,
        target_transforms=target_transforms,
    )
    return token, []


def _interpret_wait(self, original, equation, token, read_inputs):
    if equation.params["wait_read_only"] is not None:
        return original(self, equation, token, read_inputs)
    finish = functools.partial(_finish_copies, but=equation.params["n"])
    return callback.io_callback(finish, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, thread=self.thread), []


def _interpret_arithmetic(self, original, equation, read_inputs):
    if equation.primitive is not primitives.mma_p:
        return original(self, equation, read_inputs)
    acc, left, right = read_inputs()
    return acc + jnp.matmul(left.astype(acc.dtype), right.astype(acc.dtype), precision="highest")


def _interpret_inline(self, original, equation, token, read_inputs):
    meaning = getattr(equation.params["mgpu_fn"], "meaning", None)
    if meaning is None:
        return original(self, equation, token, read_inputs)
    result = meaning(*read_inputs()[: equation.params["pytree_args"].num_leaves])
    return token, jax.tree.leaves(result)


_OURS = {
    "_interpret_wgmma_ref_p": _interpret_wgmma,
    "_interpret_swap_p": _interpret_swap,
    "_interpret_copy_gmem_to_smem_p": _interpret_copy,
    "_interpret_wait_smem_to_gmem_p": _interpret_wait,
    "_interpret_arithmetic_primitive": _interpret_arithmetic,
    "_interpret_inline_mgpu_p": _interpret_inline,
}
