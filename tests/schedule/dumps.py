"""Dumps of real compilations, and what an independent emulator says of them.

`data/<program>.tar.xz` holds the files that the schedule models read out of the dump of one program, compiled without a
device by libtpu 0.0.50.1 or by the CUDA 13 compiler, as they came; of a TPU kernel's list of allocations and of a GPU
kernel's module only the lines that are read were kept. `data/figures.json` holds the figures that a second emulator,
which shares no code with `jaxops.schedule`, gave for exactly these dumps when they were recorded, and the scalar
operands of their kernels. The programs, all in bfloat16:

    rms_norm_v5e              [8192, 4096]
    attention_v5e             causal, [4, 4096, 8, 128]; the transposes around it are XLA's
    splash_v5e                JAX's splash attention, causal, [4, 8, 4096, 128], blocks of 1024 × 1024
    splash_v5p                the same, [2, 2, 1024, 128], blocks of 256 × 256
    matmul_v6e                XLA's, [4096, 4096] × [4096, 4096]
    scan_v5e                  seven times a matmul of XLA and rms_norm, [1024, 1024]
    linear_cross_entropy_v5e  [8192, 2048] × [2048, 65536]
    attention_h100            causal, [2, 4096, 16, 128]
    rms_norm_h100             [8192, 4096]
    matmul_h100               XLA's, not tuned, [4096, 4096] × [4096, 4096]

Beside the PTX of a GPU kernel lies what ptxas reported of it and nvdisasm's listing of its machine code.
"""

import json
import pathlib
import tarfile

from jaxops.schedule.scalars import Scalars

DATA = pathlib.Path(__file__).parent / "data"
FIGURES = json.loads((DATA / "figures.json").read_text())
TPU = [name for name in FIGURES if name != "gpu"]
GPU = list(FIGURES["gpu"])


def unpacked(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The dump of the program `name`, in `folder`."""
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def scalars(name: str) -> list[Scalars]:
    """The scalar operands of the kernels of `name` that were known when it was compiled."""
    return [
        Scalars(one["name"], tuple(one["grid"]), {int(index): tuple(words) for index, words in one["words"].items()})
        for one in FIGURES[name]["scalars"]
    ]
