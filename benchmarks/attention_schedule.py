"""What the compilers' schedules say of attention on chips nobody has here: everything printed is **modelled**.

bfloat16, causal unless said. On TPUs the kernels are called with operands laid out as they take them, so that no
transposition counts. A percentage is of the chip's peak, for the products that the mask leaves: those of the forward
pass, with gradients 3.5 times as many. "beside causal": the cycles for each cycle that the matrix units are held, of a
mask that cuts more, over those of the causal call of that length. Instructions, on GPUs, are those of one thread in the
loop without a mask, for each softmax element, which are counted by their exponentials.

python -m benchmarks.attention_schedule [v5e v5p v6e h100 …]    (extras `tpu-compile` and `gpu-compile`; some minutes)
"""

import sys
from typing import Any

import jax
import numpy as np

from jaxops.workbench import compiler, output
from pallas_kernels import chips
from pallas_kernels.tpu import attention

DOCUMENTS = 8


def _options(query: jax.Array, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": query.shape[2] ** -0.5, "is_causal": True}
    if kind == "window":
        options["local_window_size"] = (1024, None)
    elif kind == "documents":  # as many equal ones in each row
        ids = np.repeat(np.arange(DOCUMENTS, dtype=np.int32), query.shape[3] // DOCUMENTS)
        ids = np.broadcast_to(ids, (query.shape[0], len(ids)))
        options |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
    return options


def _turned(**operands: jax.Array) -> dict[str, jax.Array]:
    return {name: x.transpose(0, 3, 1, 2) for name, x in operands.items()}


def forward(query: jax.Array, key: jax.Array, value: jax.Array, *, kind: str = "causal") -> jax.Array:
    """Of and to [B, N, H, T], by the TPU kernel."""
    turned = _turned(query=query, key=key, value=value)
    return attention.forward(**turned, **_options(query, kind))[0][0].transpose(0, 2, 3, 1)


def both(query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array, *, kind: str = "causal") -> dict:
    """The output and the gradients, of and to [B, N, H, T]."""
    turned = _turned(query=query, key=key, value=value)
    options = _options(query, kind)
    outputs, residuals = attention.forward(**turned, **options)
    cotangents = dout.transpose(0, 3, 1, 2), None
    found = attention.backward(**turned, **options, outputs=outputs, residuals=residuals, cotangents=cotangents)
    return {name: x.transpose(0, 2, 3, 1) for name, x in (found | {"out": outputs[0]}).items()}


def pairs(kind: str, length: int) -> int:
    """Queries with keys they see, of one head."""
    if kind == "window":
        return sum(min(i + 1, 1024 + 1) for i in range(length))
    part = length // (DOCUMENTS if kind == "documents" else 1)
    return length // part * (part * (part + 1) // 2)


def job(chip: str, kind: str, shape: tuple[int, int, int, int], groups: int, gradients: bool) -> compiler.Job:
    batch, heads, size, length = shape
    words = lambda name, heads: f"{name}={batch}x{heads}x{size}x{length}"
    operands = [words("query", heads), words("key", groups), words("value", groups)]
    operands += [words("dout", heads)] if gradients else []
    function = f"benchmarks.attention_schedule:{'both' if gradients else 'forward'}"
    return compiler.Job(chip, function, tuple(operands), (f"kind={kind}",), schedule=True)


# (B, N, H, T), key heads; once forward and once with gradients
TPU = [
    ("head size 128", "causal", (4, 8, 128, 4096), 8),
    ("head size 64", "causal", (4, 8, 64, 4096), 8),
    ("8 heads on 2", "causal", (4, 8, 128, 4096), 2),
    ("T 16384", "causal", (1, 8, 128, 16384), 8),
    ("T 16384, window 1024", "window", (1, 8, 128, 16384), 8),
    ("T 16384, 8 documents", "documents", (1, 8, 128, 16384), 8),
    ("T 32768", "causal", (1, 2, 128, 32768), 2),
]
GPU = (64, 128)  # head sizes, of [2, 4096, 16, H]


def on_tpu(chip: str) -> None:
    calls = [(*call, gradients) for call in TPU for gradients in (False, True)]
    results = compiler.compile_jobs([job(chip, *call) for _, *call in calls])
    columns = ("call", "ms", "of the peak", "beside causal", "temp MiB", "spill slots")
    table = output.table(f"{chip}, modelled", columns, right=columns[1:])
    causal: dict[Any, float] = {}
    for (title, kind, (batch, heads, size, length), _, gradients), result in zip(calls, results, strict=True):
        title += ", forward and backward" if gradients else ", forward"
        if result["status"] != "compiled" or result["schedule"].get("seconds") is None:
            table.add_row(title, result["status"], result.get("reason", "no schedule")[:60])
            continue
        seconds, kernels = result["schedule"]["seconds"], result["schedule"]["kernels"]
        flops = (3.5 if gradients else 1) * 4 * size * batch * heads * pairs(kind, length)
        ours = [k for k in kernels if k["pallas"]]
        busy = sum(k["mxu_cycles"] for k in ours) / sum(k["cycles"] for k in ours)
        if kind == "causal":
            causal[length, gradients] = busy
        table.add_row(
            title,
            f"{seconds * 1e3:.3f}",
            f"{flops / seconds / chips.CHIPS[chip].flops:.0%}",
            "" if kind == "causal" else f"{causal[length, gradients] / busy:.2f}",
            f"{result['temp_bytes'] / 2**20:.1f}",
            str(max(kernel["spill_slots"] for kernel in kernels)),
        )
    output.show(table)


def on_gpu(chip: str) -> None:
    jobs = [
        compiler.Job(
            chip,
            "dot_product_attention",
            tuple(f"{name}=2x4096x16x{size}" for name in ("query", "key", "value")),
            ("is_causal=True",),
            gradients=True,
            schedule=True,
        )
        for size in GPU
    ]
    results = compiler.compile_jobs(jobs)
    columns = ("call", "kernel", "instructions an element", "registers", "spilled bytes")
    table = output.table(f"{chip}, modelled", columns, right=columns[2:])
    for size, result in zip(GPU, results, strict=True):
        title = f"head size {size}"
        if result["status"] != "compiled" or "error" in result["schedule"]:
            table.add_row(title, result["status"], (result.get("reason") or result["schedule"]["error"])[:60])
            continue
        for kernel in result["schedule"]["kernels"]:
            loops = [loop for loop in kernel["loops"] if loop["tensor_clocks"] > 0]
            elements = [loop["instructions"].get("special", 0) // 32 * 32 for loop in loops]
            found = [loop["total"] / count for loop, count in zip(loops, elements, strict=True) if count]
            if found:
                spilled = kernel["spill_store_bytes"] + kernel["spill_load_bytes"]
                row = f"{min(found):.2f}", str(kernel["registers"]), str(spilled)
                table.add_row(title, kernel["name"], *row)
    output.show(table)


def main() -> None:
    for chip in sys.argv[1:] or ["v5e", "v5p", "v6e", "h100"]:
        (on_tpu if chips.CHIPS[chip].platform == "tpu" else on_gpu)(chip)


if __name__ == "__main__":
    main()
