"""What a compiler made and said, read: kernels, memory, collectives, reasons."""

import re
from typing import Any

KERNEL_CALL = {"tpu": 'custom_call_target="tpu_custom_call"', "gpu": 'custom_call_target="mosaic_gpu'}


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


def gpu_resources(printed: str, kernels: int) -> dict[str, int]:
    """Registers of a thread and spilled bytes from ptxas' report, shared memory from Mosaic's; the most of any kernel.

    Mosaic reports a kernel when it is lowered, ptxas when it is compiled: of the `kernels` XLA kept, the last lowered.
    """
    reports = re.findall(
        r"Compiling entry function '\S+_mosaic_gpu_kernel'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        printed,
        re.S,
    )
    shared = []
    for scratch, rest in re.findall(r"^Resources\(.*?smem_scratch_bytes=(\d+)(.*)", printed, re.M):
        barriers = sum(int(size) * int(count) for size, count in re.findall(r"num_barriers=(\d+).*?\): (\d+)", rest))
        shared.append(int(scratch) + 8 * barriers)
    return {
        "smem_bytes": max(shared[-kernels:], default=0) if kernels else 0,
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


def last_words(printed: list[str]) -> str:
    """What a process said when it died."""
    said = [line for line in printed if line.strip()]
    fatal = [line for line in said if re.search(r"LLVM ERROR|Check failed|Fatal|Error:", line)]
    return plain_words((fatal or said or ["nothing was said"])[-1])


def refusal(message: str) -> str | None:
    """The kernel's own reason in the error of a call that asked for kernels alone, or None if it is another error."""
    at_lowering = re.search(r"none of \('pallas',\) can run here \(pallas: (.*)\)$", message, re.S)
    while_tracing = re.search(r"implementation 'pallas' was asked for, but (?:[tg]pu: )?(.*)$", message, re.S)
    found = at_lowering or while_tracing
    return found[1] if found else None


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([KMG]?)", text).groups()  # type: ignore[union-attr]
    return round(float(number) * _UNITS[unit])


def out_of_memory(message: str) -> dict[str, Any] | None:
    """Of a kernel that needs too much VMEM or shared memory: {"memory", "needed_bytes", "limit_bytes", "buffers"}.

    `buffers` are those that the compiler names, largest first: [{"name", "bytes"}]. `kernel` is there where the message
    names it. None for any other message.
    """
    smem = re.search(r"exceeds available shared memory: smem_bytes=(\d+) > max_smem_bytes=(\d+)", message)
    if smem:
        return {"memory": "shared memory", "needed_bytes": int(smem[1]), "limit_bytes": int(smem[2]), "buffers": []}
    vmem = re.search(r"in memory space vmem\. Used ([\d.]+[KMG]?) of ([\d.]+[KMG]?) vmem", message) or re.search(
        r"Scoped allocation with size ([\d.]+[KMG]?) and limit ([\d.]+[KMG]?) exceeded scoped vmem limit", message
    )
    if not vmem:
        return None
    found: dict[str, Any] = {
        "memory": "VMEM",
        "needed_bytes": _bytes(vmem[1]),
        "limit_bytes": _bytes(vmem[2]),
        "buffers": [],
    }
    if kernel := re.search(r"%?([\w.-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", message):
        found["kernel"] = kernel[1]
    for size, rest in re.findall(r"^ +\d+\. Size: (\S+)\n(.*?)(?====|\Z)", message, re.M | re.S):
        window = re.search(r"Tag: (\w+) window .*? for operator \w+ (\d+)\. The window shape is (\S+),", rest)
        shape, buffering = re.search(r"Shape: (\S+)", rest), re.search(r"has (\d+) buffering levels", rest)
        name = f"{window[1]} {window[2]} {window[3]}" if window else shape[1] if shape else "?"
        found["buffers"].append({"name": name + (f" ×{buffering[1]}" if buffering else ""), "bytes": _bytes(size)})
    return found


def size(count: float) -> str:
    """512 B, 1.5 KiB, 2.0 MiB, 3.0 GiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"
