"""Certificates: every operator compiled by the real compilers for every chip, on a machine that has none of them.

    python -m benchmarks.certify              # writes docs/certificates.json and docs/certificates.md
    python -m benchmarks.certify --check      # writes nothing; exit 1 if something that compiled no longer does

A cell is operator × direction × chip × dtype × shape, called as a user would: the public operator with
`implementation="pallas"`, its backward through `jax.vjp` with the cotangent as an operand. Green means that the
compiler made a program of it and that the program holds the kernel. Every chip has its own process, so a compiler that
aborts or hangs costs one cell.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

from pallas_kernels import chips

CHIPS = ("v5e", "v5p", "v6e", "tpu7x", "h100", "a100", "b200")
DTYPES = ("bfloat16", "float32")
DIRECTIONS = ("forward", "backward")
DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
# Distributions that hold the compilers, and the extra of this project that installs them.
COMPILERS = {
    "tpu": ("tpu-compile", ("libtpu",)),
    "gpu": ("gpu-compile", ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")),
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
}
KERNEL_CALL = {"tpu": 'custom_call_target="tpu_custom_call"', "gpu": 'custom_call_target="mosaic_gpu'}
BEGIN, END = "certificate begins ", "certificate ends "


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator: the shapes of its floating and of its int32 operands, and its options."""

    operator: str
    shape: str  # "main" or "awkward"
    floats: dict
    integers: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        operands = {**self.floats, **self.integers}
        described = [f"{name}[{', '.join(map(str, shape))}]" for name, shape in operands.items()]
        return ", ".join(described + [f"{name}={value}" for name, value in self.options.items()])


def _attention(batch, length, heads, key_heads, dim):
    return {
        "query": (batch, length, heads, dim),
        "key": (batch, length, key_heads, dim),
        "value": (batch, length, key_heads, dim),
    }


CASES = (
    Case("rms_norm", "main", {"x": (8192, 4096), "scale": (4096,)}),
    Case("rms_norm", "awkward", {"x": (3, 37, 1000), "scale": (1000,)}, options={"scale_offset": 1.0}),
    Case("layer_norm", "main", {"x": (8192, 4096), "scale": (4096,), "bias": (4096,)}),
    Case("layer_norm", "awkward", {"x": (3, 37, 1000), "scale": (1000,), "bias": (1000,)}),
    Case("dot_product_attention", "main", _attention(4, 4096, 8, 8, 128), options={"is_causal": True}),
    Case(
        "dot_product_attention",
        "awkward",
        _attention(2, 1000, 6, 2, 64),
        {"query_seq_lengths": (2,), "key_value_seq_lengths": (2,)},
        {"is_causal": True, "local_window_size": (255, 0)},
    ),
    Case("linear_cross_entropy", "main", {"x": (8192, 2048), "weight": (2048, 65536)}, {"labels": (8192,)}),
    Case(
        "linear_cross_entropy",
        "awkward",
        {"x": (1000, 512), "weight": (512, 50257)},
        {"labels": (1000,)},
        {"label_smoothing": 0.1, "z_loss": 1e-4, "logits_soft_cap": 30.0},
    ),
)


def cells() -> list[tuple[Case, str, str]]:
    """(case, direction, dtype) of one chip, in the order in which its process works them off."""
    return [(case, direction, dtype) for case in CASES for dtype in DTYPES for direction in DIRECTIONS]


def key_of(chip: str, case: Case, direction: str, dtype: str) -> str:
    return "/".join((case.operator, direction, chip, dtype, case.shape))


# ------------------------------------------------------------------------------------------ the process of one chip


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


def device_of(chip: chips.Chip):
    """A device of `chip` to compile for."""
    from jax.experimental import topologies

    if chip.platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=chip.name, topology="1x1x1", target_config=_gpu_description(chip)
        )
    return topology.devices[0]


def _program(case: Case, direction: str, dtype: str, sharding):
    """(function, its operands) of a cell."""
    import jax

    import jaxops

    operator = getattr(jaxops, case.operator)
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    floats = {name: struct(shape, dtype) for name, shape in case.floats.items()}
    integers = {name: struct(shape, "int32") for name, shape in case.integers.items()}

    def forward(floats, integers):
        return operator(**floats, **integers, **case.options, implementation="pallas")

    if direction == "forward":
        return forward, (floats, integers)
    out = jax.eval_shape(forward, floats, integers)

    def backward(floats, integers, cotangent):
        return jax.vjp(lambda floats: forward(floats, integers), floats)[1](cotangent)

    return backward, (floats, integers, struct(out.shape, out.dtype))


def certify(chip: chips.Chip, case: Case, direction: str, dtype: str, device) -> dict:
    """The certificate of one cell, without what the compiler prints aside."""
    import jax
    from jax.sharding import SingleDeviceSharding

    try:
        function, operands = _program(case, direction, dtype, SingleDeviceSharding(device))
        compiled = jax.jit(function).lower(*operands).compile()
    except Exception as error:  # whatever a compiler raises is what the cell says
        words = plain_words(str(error))
        refused = re.search(r"none of \('pallas',\) can run here \(pallas: (.*)\)$", words)
        return {"status": "refused", "reason": refused[1]} if refused else {"status": "failed", "reason": words}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    kernels = text.count(KERNEL_CALL[chip.platform])
    if not kernels:
        return {"status": "failed", "reason": "the compiled program holds no kernel"}
    found = {
        "status": "compiled",
        "kernels": kernels,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }
    if chip.platform == "tpu":
        found["vmem_bytes"] = vmem_bytes(text)
    return found


def vmem_bytes(text: str) -> int:
    """The most VMEM set aside for a kernel of the program `text`; 0 if none asks for more than the default."""
    sizes = [
        int(size)
        for line in text.splitlines()
        if KERNEL_CALL["tpu"] in line
        for config in re.findall(r'scoped_memory_configs":\[(.*?)\]', line)
        for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', config)
    ]
    return max(sizes, default=0)


def gpu_resources(printed: str, kernels: int) -> dict:
    """Registers of a thread and spilled bytes from ptxas' report, shared memory from Mosaic's; the most of any kernel.

    Mosaic reports a kernel when it is lowered, ptxas when it is compiled: of the `kernels` XLA kept, the last lowered.
    """
    reports = re.findall(
        r"Compiling entry function '\S+_mosaic_gpu_kernel'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        printed,
        re.S,
    )
    shared = []
    for line in re.findall(r"^Resources\((.*)", printed, re.M):
        scratch = int(re.search(r"smem_scratch_bytes=(\d+)", line)[1])
        barriers = sum(int(size) * int(count) for size, count in re.findall(r"num_barriers=(\d+).*?\): (\d+)", line))
        shared.append(scratch + 8 * barriers)
    return {
        "smem_bytes": max(shared[-kernels:], default=0),
        "registers": max((int(registers) for _, registers in reports), default=0),
        "spill_bytes": max((int(spills) for spills, _ in reports), default=0),
    }


def plain_words(message: str) -> str:
    """The first words of a compiler's message, without what differs from one machine or run to the next."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("-----")]
    words = " ".join(lines[:3])
    words = re.sub(r"(/[\w.+-]+){2,}", "<path>", words)
    words = re.sub(r"0x[0-9a-f]+", "<address>", words)
    return words if len(words) <= 400 else words[:400] + " …"


def work(chip_name: str, start: int) -> None:
    """Compiles the cells of a chip from the `start`-th on. What is printed between two marks belongs to that cell."""
    chip = chips.named(chip_name)
    device = device_of(chip)
    flush = ctypes.CDLL(None).fflush  # the compilers print through C's own buffer
    for index, (case, direction, dtype) in enumerate(cells()[start:], start):
        print(f"{BEGIN}{index}", flush=True)
        found = certify(chip, case, direction, dtype, device)
        flush(None)
        print(f"{END}{json.dumps(found)}", flush=True)


# ---------------------------------------------------------------------------------------------------- the supervisor


def _lines(process, seconds: float) -> Iterator[str]:
    """What `process` prints; raises `queue.Empty` once it prints nothing for `seconds`."""
    lines: queue.Queue = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get(timeout=seconds)) is not None:
        yield line


def last_words(printed: list[str]) -> str:
    """What a process said when it died."""
    fatal = [line for line in printed if re.search(r"LLVM ERROR|Check failed|Fatal|Error:", line)]
    return plain_words((fatal or printed or ["nothing was said"])[-1])


def worker(chip_name: str, start: int) -> list[str]:
    """The command that works off the cells of a chip from the `start`-th on."""
    return [sys.executable, "-m", "benchmarks.certify", "--worker", chip_name, "--start", str(start)]


def supervise(chip_name: str, seconds: float) -> dict[str, dict]:
    """Certificates of all cells of a chip, by key."""
    keys = [key_of(chip_name, *cell) for cell in cells()]
    results: dict[str, dict] = {}
    while len(results) < len(keys):
        process = subprocess.Popen(
            worker(chip_name, len(results)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **ENVIRONMENT},
            cwd=DOCS.parent,
        )
        printed: list[str] = []
        end = "the compiler aborted: {}"
        try:
            for line in _lines(process, seconds):
                if line.startswith(BEGIN):
                    printed = []
                elif line.startswith(END):
                    found = json.loads(line[len(END) :])
                    if found["status"] == "compiled" and chips.named(chip_name).platform == "gpu":
                        found |= gpu_resources("".join(printed), found["kernels"])
                    results[keys[len(results)]] = found
                else:
                    printed.append(line)
        except queue.Empty:
            end = f"no end after {seconds:.0f} s: {{}}"
        finally:
            process.kill()
            process.wait()
        if len(results) < len(keys):  # the cell at which the process ended; the next process takes the one after it
            results[keys[len(results)]] = {"status": "failed", "reason": end.format(last_words(printed))}
    return results


def versions(platforms) -> dict[str, str]:
    names = ["jax", *(name for platform in sorted(platforms) for name in COMPILERS[platform][1])]
    return {name: importlib.metadata.version(name) for name in names}


def missing(platforms) -> str | None:
    """One sentence on what to install, or None."""
    absent, extras = [], []
    for platform in sorted(platforms):
        extra, names = COMPILERS[platform]
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(name)
                continue
            absent.append(name)
            extras = [*extras, extra] if extra not in extras else extras
    if not absent:
        return None
    return f"the compilers are missing ({', '.join(absent)}): pip install 'jaxops[{','.join(extras)}]'"


def reddened(before: dict, now: dict) -> list[str]:
    """One line for each cell that compiled in the certificates `before` and does not in `now`."""
    lines = []
    for key, old in before["cells"].items():
        new = now["cells"].get(key)
        if new is not None and old["status"] == "compiled" != new["status"]:
            lines.append(f"{key}: compiled before, now {new['status']}: {new['reason']}")
    return lines


# ---------------------------------------------------------------------------------------------------------- the pages


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _table(header, rows) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def render(certificates: dict) -> str:
    """docs/certificates.md."""
    found = certificates["cells"]
    names = [name for name in CHIPS if any(key.split("/")[2] == name for key in found)]
    reasons: list[str] = []

    def mark(cell):
        if cell["status"] == "compiled":
            return "✓"
        text = ("refused: " if cell["status"] == "refused" else "**failed**: ") + cell["reason"]
        if text not in reasons:
            reasons.append(text)
        return f"{'–' if cell['status'] == 'refused' else '✗'} [{reasons.index(text) + 1}]"

    versions_line = ", ".join(f"{name} {version}" for name, version in certificates["versions"].items())
    lines = [
        "# Certificates",
        "",
        'Every operator with `implementation="pallas"`, compiled ahead of time by the real compiler of every chip on a',
        "machine that has none of them. Written by `python -m benchmarks.certify`; nothing was measured on hardware.",
        "",
        f"Compilers: {versions_line}.",
        "",
        "✓ compiled, and the program holds the kernel; – the kernel refuses, and by default XLA runs instead;",
        "✗ the compiler failed. Numbers in brackets are the reasons below the table.",
        "",
    ]
    rows = []
    for case, direction, dtype in cells():
        by_chip = [found.get(key_of(name, case, direction, dtype)) for name in names]
        if any(by_chip):
            rows.append(
                [case.operator, case.shape, dtype, direction, *(mark(cell) if cell else "" for cell in by_chip)]
            )
    lines += [*_table(["operator", "shape", "dtype", "direction", *names], rows), ""]
    lines += [f"{number}. {text.replace('|', chr(92) + '|')}" for number, text in enumerate(reasons, 1)] + [""]
    lines += [
        "## Memory",
        "",
        "temp: what the program allocates in device memory besides its arguments and results. VMEM: what is set aside",
        "for a kernel. VMEM, shared memory, registers of a thread and spills: the most of any kernel of the program.",
        "",
    ]
    for case in CASES:
        rows = []
        for dtype in DTYPES:
            for direction in DIRECTIONS:
                for name in names:
                    cell = found.get(key_of(name, case, direction, dtype))
                    if cell and cell["status"] == "compiled":
                        rows.append([dtype, direction, name, str(cell["kernels"]), *_figures(cell)])
        if rows:
            lines += [f"### {case.operator}, {case.shape}", "", f"`{case}`", ""]
            header = [
                "dtype",
                "direction",
                "chip",
                "kernels",
                "temp",
                "arguments",
                "results",
                "VMEM or shared memory",
                "registers",
                "spills",
            ]
            lines += [*_table(header, rows), ""]
    return "\n".join(lines)


def _figures(cell: dict) -> list[str]:
    sizes = [_size(cell[name]) for name in ("temp_bytes", "argument_bytes", "output_bytes")]
    if "vmem_bytes" in cell:
        return [*sizes, _size(cell["vmem_bytes"]) if cell["vmem_bytes"] else "default", "", ""]
    return [*sizes, _size(cell["smem_bytes"]), str(cell["registers"]), _size(cell["spill_bytes"])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certify", description=__doc__.split("\n")[0])
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated, of " + ", ".join(CHIPS))
    parser.add_argument(
        "--check", action="store_true", help="compare with docs/certificates.json instead of writing it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="chips at a time")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of one cell")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.start)
        return 0
    names = arguments.chips.split(",")
    if unknown := [name for name in names if name not in CHIPS]:
        parser.error(f"--chips must be of {', '.join(CHIPS)}, got {', '.join(unknown)}")
    platforms = {chips.named(name).platform for name in names}
    if sentence := missing(platforms):
        print(sentence, file=sys.stderr)
        return 2
    committed, page = DOCS / "certificates.json", DOCS / "certificates.md"
    before = json.loads(committed.read_text()) if committed.exists() else {"versions": {}, "cells": {}}
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = pool.map(functools.partial(supervise, seconds=arguments.seconds), names)
        found = {key: cell for result in results for key, cell in result.items()}
    now = {"versions": versions(platforms), "cells": found}
    counts = [sum(cell["status"] == status for cell in found.values()) for status in ("compiled", "refused", "failed")]
    print("{} compiled, {} refused, {} failed".format(*counts))
    for key, cell in found.items():
        if cell["status"] == "failed":
            print(f"  {key}: {cell['reason']}")
    if arguments.check:
        lines = reddened(before, now)
        print("\n".join(lines) or "nothing that compiled before fails now")
        return 1 if lines else 0
    merged = {**before["cells"], **found}
    order = [key_of(name, *cell) for name in CHIPS for cell in cells()]
    now = {
        "versions": {**before["versions"], **now["versions"]},
        "cells": {key: merged[key] for key in order if key in merged},
    }
    committed.write_text(json.dumps(now, indent=1) + "\n")
    page.write_text(render(now))
    return 0


if __name__ == "__main__":
    sys.exit(main())
