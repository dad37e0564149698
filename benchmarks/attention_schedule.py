"""What the compilers' schedules say of attention on chips nobody has here: everything printed is **modelled**.

bfloat16, causal unless said, operands laid out as the kernels take them ([B, N, H, T]), so that no transposition
counts. A percentage is of the chip's peak, for the products that the mask leaves, forward once, with gradients 3.5
times; "a pair" is a query with a key it sees. Instructions are those of one thread in the loop without a mask, for each
softmax element, which are counted by their exponentials.

python -m benchmarks.attention_schedule [v5e v5p v6e h100 …]    (extras `tpu-compile` and `gpu-compile`; some minutes)
"""

import sys

import jax
import numpy as np

import jaxops
from jaxops.workbench import compiler, output
from pallas_kernels import chips

DOCUMENTS = 8


def attention(query: jax.Array, key: jax.Array, value: jax.Array, **options) -> jax.Array:
    """Of and to [B, N, H, T]."""
    turned = (x.transpose(0, 3, 1, 2) for x in (query, key, value))
    return jaxops.dot_product_attention(*turned, is_causal=True, **options).transpose(0, 2, 3, 1)


def window(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return attention(query, key, value, local_window_size=1024)


def documents(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Rows of as many equal documents."""
    length = query.shape[3]
    ids = np.repeat(np.arange(DOCUMENTS, dtype=np.int32), length // DOCUMENTS)[None]
    return attention(query, key, value, query_segment_ids=ids, key_value_segment_ids=ids)


def pairs(function: str, length: int) -> int:
    """Queries with keys they see, of one head."""
    if function == "window":
        return sum(min(i + 1, 1024 + 1) for i in range(length))
    part = length // (DOCUMENTS if function == "documents" else 1)
    return length // part * (part * (part + 1) // 2)


def job(chip: str, function: str, shape: tuple[int, int, int, int], groups: int | None = None, *, gradients: bool):
    batch, heads, size, length = shape
    words = lambda heads: "x".join(map(str, (batch, heads, size, length)))
    operands = (f"query={words(heads)}", *(f"{name}={words(groups or heads)}" for name in ("key", "value")))
    return compiler.Job(chip, f"benchmarks.attention_schedule:{function}", operands, gradients=gradients, schedule=True)


# title, function, (B, N, H, T), key heads, with gradients
TPU = [
    ("head size 128, forward", "attention", (4, 8, 128, 4096), None, False),
    ("head size 128, forward and backward", "attention", (4, 8, 128, 4096), None, True),
    ("head size 64, forward and backward", "attention", (4, 8, 64, 4096), None, True),
    ("8 heads on 2, forward and backward", "attention", (4, 8, 128, 4096), 2, True),
    ("T 16384, forward", "attention", (1, 8, 128, 16384), None, False),
    ("T 16384, forward and backward", "attention", (1, 8, 128, 16384), None, True),
    ("T 16384, window 1024, forward", "window", (1, 8, 128, 16384), None, False),
    ("T 16384, window 1024, forward and backward", "window", (1, 8, 128, 16384), None, True),
    ("T 16384, 8 documents, forward", "documents", (1, 8, 128, 16384), None, False),
    ("T 16384, 8 documents, forward and backward", "documents", (1, 8, 128, 16384), None, True),
    ("T 32768, forward and backward", "attention", (1, 2, 128, 32768), None, True),
]
GPU = [
    (f"head size {size}", "attention", (2, 16, size, 4096), None, True)
    for size in (64, 128)
]  # fmt: skip


def on_tpu(chip: str) -> None:
    results = compiler.compile_jobs([job(chip, *call, gradients=both) for _, *call, both in TPU])
    columns = ("call", "ms", "of the peak", "a pair, of causal", "temp MiB", "spill slots")
    table = output.table(f"{chip}, modelled", columns, right=columns[1:])
    causal = {}
    for (title, function, (batch, heads, size, length), _, both), result in zip(TPU, results, strict=True):
        if result["status"] != "compiled" or result["schedule"].get("seconds") is None:
            table.add_row(title, result["status"], result.get("reason", "no schedule")[:60])
            continue
        seconds, kernels = result["schedule"]["seconds"], result["schedule"]["kernels"]
        seen = batch * heads * pairs(function, length)
        flops = (3.5 if both else 1) * 4 * size * seen
        if function == "attention":
            causal[length, both] = seconds / seen
        beside = seconds / seen / causal[length, both] if function != "attention" else None
        table.add_row(
            title,
            f"{seconds * 1e3:.3f}",
            f"{flops / seconds / chips.CHIPS[chip].flops:.0%}",
            "" if beside is None else f"{beside:.2f}",
            f"{result['temp_bytes'] / 2**20:.1f}",
            str(max(kernel["spill_slots"] for kernel in kernels)),
        )
    output.show(table)


def on_gpu(chip: str) -> None:
    results = compiler.compile_jobs([job(chip, *call, gradients=both) for _, *call, both in GPU])
    columns = ("call", "kernel", "instructions an element", "registers", "spilled bytes")
    table = output.table(f"{chip}, modelled", columns, right=columns[2:])
    for (title, *_), result in zip(GPU, results, strict=True):
        if result["status"] != "compiled" or "error" in result["schedule"]:
            table.add_row(title, result["status"], (result.get("reason") or result["schedule"]["error"])[:60])
            continue
        for kernel in result["schedule"]["kernels"]:
            loops = [loop for loop in kernel["loops"] if loop["tensor_clocks"] > 0]
            found = [loop["total"] / (special // 32 * 32) for loop in loops if (special := _exponentials(loop)) >= 32]
            if found:
                spilled = kernel["spill_store_bytes"] + kernel["spill_load_bytes"]
                row = f"{min(found):.2f}", str(kernel["registers"]), str(spilled)
                table.add_row(title, kernel["name"], *row)
    output.show(table)


def _exponentials(loop: dict) -> int:
    return loop["instructions"].get("special", 0)


def main() -> None:
    for chip in sys.argv[1:] or ["v5e", "v5p", "v6e", "h100"]:
        (on_tpu if chips.CHIPS[chip].platform == "tpu" else on_gpu)(chip)


if __name__ == "__main__":
    main()
