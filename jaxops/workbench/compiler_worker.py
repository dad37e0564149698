"""The process that compiles for one chip: `python -m jaxops.workbench.compiler_worker CHIP FOLDER`.

It takes a job a line (a `Job` as JSON) on its input and prints its result between two marks. `compiler` starts it, with
a folder of its own; where that has a folder "dump", the compiler writes its schedules there.
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxops import autodiff, dispatch
from jaxops.inspection import operator_calls
from jaxops.workbench import programs
from jaxops.workbench.call import Problem, call
from jaxops.workbench.collectives import collectives
from jaxops.workbench.compiler import BEGIN, END, Job
from pallas_kernels import chips


def _gpu_description(chip: chips.Chip) -> str:
    """What XLA wants to know of a GPU that is not there, as a text proto."""
    major, minor = chip.capability
    # Of the shared memory of a multiprocessor 1 KiB is reserved for each block.
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {chip.smem_bytes}
          shared_memory_per_core: {chip.smem_bytes + 1024} core_count: {chip.cores} fpus_per_core: {chip.lanes}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {chip.l2_bytes} clock_rate_ghz: {chip.clock_ghz}
          device_memory_size: {chip.memory_bytes} registers_per_core_limit: 65536 registers_per_block_limit: 65536
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
        runtime_version {{ major: 13 minor: 0 patch: 0 }}
        device_description_str: "{chip.device_kind}"
    """


@functools.cache
def devices_of(chip: chips.Chip, slice_shape: str | None = None) -> tuple[Any, ...]:
    """The devices of a slice of `chip`s (None: the smallest there is) to compile for.

    Raises `Problem` where the compiler knows no such slice.
    """
    try:
        if chip.platform == "tpu":
            name = f"{chip.name}:{slice_shape}" if slice_shape else chip.topology
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        else:
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology_name=chip.name,
                topology=slice_shape or "1x1x1",
                target_config=_gpu_description(chip),
            )
    except Exception as error:  # whatever the compiler raises
        if slice_shape is None:
            raise
        raise Problem(f"--mesh: no slice {chip.name}:{slice_shape}: {programs.plain_words(str(error))}") from error
    return tuple(topology.devices)


def mesh_of(chip: chips.Chip, topology: str, axes: str) -> Mesh:
    """The mesh of all devices of `topology`, "v5p:8x16x16", with `axes`, "data=64,tensor=32" (empty: "data")."""
    devices = devices_of(chip, topology.partition(":")[2])
    sizes: dict[str, int] = {}
    for word in (axes or f"data={len(devices)}").split(","):
        name, _, size = word.partition("=")
        if not (name.isidentifier() and size.isdigit()):
            raise Problem(f"--axes must be name=size with commas between, as in data=64,tensor=32, got {axes!r}")
        sizes[name] = int(size)
    if math.prod(sizes.values()) != len(devices):
        raise Problem(f"--axes must multiply to the {len(devices)} devices of {topology}, got {axes}")
    kinds = (AxisType.Auto,) * len(sizes)
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=kinds)


def _spec(word: str, mesh: Mesh) -> PartitionSpec:
    """PartitionSpec("data", None) of "data,None"."""
    entries: list[Any] = []
    for entry in word.split(",") if word else ():
        names = () if entry == "None" else tuple(entry.split("+"))
        if unknown := [name for name in names if name not in mesh.shape]:
            raise Problem(f"an operand is sharded over the axes {', '.join(mesh.shape)} or None, got {unknown[0]!r}")
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def _program(job: Job, device: Any, mesh: Mesh | None) -> tuple[Callable, tuple[Any, ...]]:
    """(function, operands) of a job. Raises `Problem` where its words make no sense."""
    words, shardings = [], list[Sharding]()
    for text in job.operands:
        word, at, spec = text.partition("@")
        if at and mesh is None:
            raise Problem(f"an operand can be sharded, as in {text!r}, only with --mesh")
        if at and spec.count(",") > word.count("x", word.find("=")):
            raise Problem(f"there are more mesh axes after @ than sizes before it in {text}")
        words.append(word)
        shardings.append(NamedSharding(mesh, _spec(spec, mesh)) if mesh else SingleDeviceSharding(device))
    options = job.options + ((f"implementation={job.implementation}",) if job.implementation else ())
    function, structs = call(job.function, words, options, job.dtype, False)
    operands = {}
    for text, (name, struct), sharding in zip(job.operands, structs.items(), shardings, strict=True):
        try:
            sharding.shard_shape(struct.shape)
        except ValueError as error:
            raise Problem(
                f"every sharded axis of an operand must be a multiple of its mesh axes, got {text}"
            ) from error
        operands[name] = jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
    if not job.gradients:
        return lambda operands: function(**operands), (operands,)
    chosen = {name: x for name, x in operands.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    if not chosen:
        raise Problem(f"{job.function} has no floating operand to take a gradient of")
    fixed = {name: x for name, x in operands.items() if name not in chosen}

    def floating_outputs(chosen, fixed):
        outputs = jax.tree.leaves(function(**chosen, **fixed))
        return [output for output in outputs if jnp.issubdtype(output.dtype, jnp.floating)]

    def gradients(chosen, fixed, cotangents):
        return jax.vjp(lambda chosen: floating_outputs(chosen, fixed), chosen)[1](cotangents)

    # On a mesh the compiler chooses how cotangents are sharded.
    where = None if mesh else SingleDeviceSharding(device)
    outputs = jax.eval_shape(floating_outputs, chosen, fixed)
    cotangents = [jax.ShapeDtypeStruct(output.shape, output.dtype, sharding=where) for output in outputs]
    return gradients, (chosen, fixed, cotangents)


def _runs(traced: Any, chip: chips.Chip) -> list[dict[str, str]]:
    """What each of the library's operators in a program would run as on `chip`."""
    found = []
    for equation in operator_calls(traced.jaxpr.jaxpr):
        call = equation.params["call"]
        reason = autodiff.refusal(chip.platform, call, [v.aval for v in equation.invars])
        choice = dispatch.choose(call.order, reason)
        run = {
            "operator": call.operator.name,
            "phase": call.phase,
            "implementation": choice.implementation or "none",
            "reason": "; ".join(reason for _, reason in choice.refusals),
        }
        if run not in found:
            found.append(run)
    return found


def compile_one(job: Job, chip: chips.Chip, dump: pathlib.Path | None) -> dict[str, Any]:
    """The result of `job`, as `compiler.compile_jobs` describes it, without what the compiler prints aside."""
    started = traced = None
    try:
        mesh = mesh_of(chip, job.mesh, job.axes) if job.mesh else None
        device = devices_of(chip)[0] if mesh is None else None
        with contextlib.ExitStack() as within:
            within.enter_context(jax.set_mesh(mesh) if mesh else chips.target(chip))
            if job.tiles is not None:
                from pallas_kernels import tuned

                within.enter_context(tuned.forced(job.tiles))
            function, operands = _program(job, device, mesh)
            traced = jax.jit(function).trace(*operands)
            with chips.target(chip):
                runs = _runs(traced, chip)
            started = time.perf_counter()
            compiled = traced.lower().compile()
            seconds = time.perf_counter() - started
    except Problem as problem:
        return {"status": "failed", "reason": str(problem), "bad_question": True}
    except Exception as error:  # whatever a compiler raises is what the result says
        return failure(error, traced, chip)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    kernels = text.count(programs.KERNEL_CALL[chip.platform])
    strict = "pallas" in (job.implementation, *(word.partition("implementation=")[2] for word in job.options))
    if strict and not kernels:
        return {"status": "failed", "reason": "the compiled program holds no kernel"}
    if mesh is not None and not kernels:
        for run in runs:
            if run["implementation"] == "pallas":
                run |= {"implementation": "xla", "reason": f"partitioned automatically over {mesh.size} devices"}
    cost = compiled.cost_analysis() or {}
    found: dict[str, Any] = {
        "status": "compiled",
        "runs": runs,
        "kernels": kernels,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "compile_seconds": round(seconds, 3),
        "collectives": collectives(text, mesh.shape) if mesh else [],
    }
    if chip.platform == "tpu":
        found["vmem_bytes"] = programs.vmem_bytes(text)
    if dump is not None:
        found["schedule"] = _schedule(dump, chip, traced)
        if chip.platform == "gpu":  # while it dumps, Mosaic does not print its resources
            kernels_read = found["schedule"].get("kernels", ())
            ours = [one for one in kernels_read if one["name"].endswith("_mosaic_gpu_kernel")]
            for name in ("smem_bytes", "registers", "spill_store_bytes"):
                found[name.replace("_store", "")] = max((one[name] for one in ours), default=0)
    return found


def _schedule(dump: pathlib.Path, chip: chips.Chip, traced: Any) -> dict[str, Any]:
    """{"kernels": modelled figures of each, "seconds": of the program or None}, or {"error": one sentence}."""
    from jaxops import schedule
    from jaxops.schedule import gpu, tpu

    try:
        kernels: list[Any]
        if chip.platform == "tpu":
            kernels = tpu.read(dump, chip, tpu.known_scalars(traced))
        else:
            kernels = gpu.read(dump, chip)
    except schedule.ScheduleError as error:
        return {"error": str(error)}
    return {"kernels": schedule.figures(kernels), "seconds": schedule.program_seconds(kernels)}


def failure(error: Exception, traced: Any, chip: chips.Chip) -> dict[str, Any]:
    """What an exception of the compiler means: refused, out of memory with the buffers named, or failed."""
    message = str(error)
    if reason := programs.refusal(message):
        return {"status": "refused", "reason": programs.plain_words(reason)}
    found = programs.out_of_memory(message)
    if found is None:
        name = "" if isinstance(error, (ValueError, jax.errors.JaxRuntimeError)) else f"{type(error).__name__}: "
        return {"status": "failed", "reason": name + programs.plain_words(message)}
    kernel = found.pop("kernel", None)
    if not found["buffers"] and traced is not None:
        found["buffers"] = buffers_of(traced, chip, kernel)
    named = ", ".join(f"{buffer['name']} {programs.size(buffer['bytes'])}" for buffer in found["buffers"][:8])
    reason = (
        f"{f'the kernel {kernel}' if kernel else 'a kernel'} exceeds {found.pop('memory')}: it needs "
        f"{programs.size(found['needed_bytes'])}, the limit is {programs.size(found['limit_bytes'])}"
        + (f"; its buffers: {named}" if named else "")
    )
    return {"status": "failed", "reason": reason, **found}


def buffers_of(traced: Any, chip: chips.Chip, kernel: str | None) -> list[dict[str, Any]]:
    """The windows and scratches of a TPU kernel as its `pallas_call` asks for them, largest first.

    For when the compiler does not name them. A window is there twice where the grid has several steps. kernel: as the
    compiler calls it, "rms_norm_forward.3"; None: of all kernels of the program.
    """
    found = []
    for equation in _kernel_calls(traced.jaxpr.jaxpr, chip):
        if kernel and equation.params.get("name") and re.sub(r"\.\d+$", "", kernel) != equation.params["name"]:
            continue
        grid = equation.params["grid_mapping"]
        blocks = grid.block_mappings
        names = equation.params["jaxpr"].debug_info.safe_arg_names(len(equation.params["jaxpr"].invars))
        names = names[grid.num_index_operands + grid.num_dynamic_grid_bounds :]
        copies = 1 if all(steps == 1 for steps in grid.grid) else 2
        refs = [
            (block.transformed_block_aval, getattr(block.pipeline_mode, "buffer_count", copies)) for block in blocks
        ]
        refs += [(scratch, 1) for scratch in grid.scratch_avals]
        for name, (ref, count) in zip(names, refs, strict=True):
            if str(ref.memory_space).lower() not in ("vmem", "default", "none"):
                continue
            aval = ref.inner_aval
            label = f"{name} {aval.str_short(short_dtypes=True)}" + (f" ×{count}" if count > 1 else "")
            found.append({"name": label, "bytes": math.prod(aval.shape) * aval.dtype.itemsize * count})
    return sorted(found, key=lambda buffer: -buffer["bytes"])


def _kernel_calls(jaxpr: Any, chip: chips.Chip) -> Iterator[Any]:
    """Every TPU `pallas_call` of a program, those inside of the library's operators included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        elif equation.primitive is autodiff.operator_p:
            run = equation.params["call"].run("pallas", chip.platform)
            avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
            # Kernels that refuse are not in the program, and may not be traceable.
            with contextlib.suppress(ValueError, NotImplementedError), dispatch.alone(chips.abstract_device(chip)):
                yield from _kernel_calls(jax.make_jaxpr(run)(*avals).jaxpr, chip)
        else:
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if isinstance(inner, core.Jaxpr):
                        yield from _kernel_calls(inner, chip)


def main(chip_name: str, folder: pathlib.Path) -> None:
    """Compiles job after job. What is printed between two marks belongs to that job."""
    threading.Thread(target=end_with, args=(os.getppid(), folder), daemon=True).start()
    chip = chips.named(chip_name)
    dump = folder / "dump" if (folder / "dump").is_dir() else None
    flush = ctypes.CDLL(None).fflush  # the compilers print through C's own buffer
    devices_of(chip)  # loads the compiler, which says much before the first job
    flush(None)
    for line in sys.stdin:
        fields = json.loads(line)
        job = Job(**{**fields, "operands": tuple(fields["operands"]), "options": tuple(fields["options"])})
        if dump:
            for left in dump.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        print(f"\n{BEGIN}", flush=True)
        result = compile_one(job, chip, dump)
        jax.clear_caches()
        flush(None)
        print(f"\n{END}{json.dumps(result)}", flush=True)


def end_with(supervisor: int, folder: pathlib.Path) -> None:
    """Ends this process once `supervisor` is gone, a compiler that hangs included."""
    while os.getppid() == supervisor:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
