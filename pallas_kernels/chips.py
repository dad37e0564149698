"""Facts about the chips, in one place, and which chip the code being traced or lowered is for.

Every number is public: peak dense bf16 FLOP/s and HBM bytes/s of one device as JAX sees it, and the memories of one
core. The chip is read from the abstract device of the current mesh, never from a live device: a machine without any
accelerator compiles for all of them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.sharding import AbstractDevice, AbstractMesh, get_abstract_mesh, use_abstract_mesh

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    `vmem_bytes` (TPU) is the vector memory of one core; `smem_bytes` (GPU) the shared memory one block may own;
    `mxu` (TPU) the side of the matrix unit; `cores` the cores behind one JAX device; `flops` and `bandwidth` the peak
    bf16 FLOP/s and HBM bytes/s of that device; `capability` (GPU) the CUDA compute capability. To compile
    without the device: `topology` (TPU), the smallest slice; `memory_bytes`, `l2_bytes`, `clock_ghz` and `lanes`, the
    float32 units of a core (GPU). For the schedule models: `mxus`, the matrix units of a core, and `mxu_rows`, the rows
    of a product one takes a cycle (TPU; from them and the peak follows the clock); `tensor_fma`, the bf16
    multiply-additions a cycle of one of the four tensor cores of a GPU core.
    """

    name: str
    platform: str  # "tpu" or "gpu"
    device_kind: str  # as jax.Device.device_kind prints it
    cores: int
    flops: float
    bandwidth: float
    vmem_bytes: int = 0
    mxu: int = 0
    smem_bytes: int = 0
    capability: tuple[int, int] = (0, 0)
    aliases: tuple[str, ...] = ()
    topology: str = ""
    memory_bytes: int = 0
    l2_bytes: int = 0
    clock_ghz: float = 0.0
    lanes: int = 0
    mxus: int = 0
    mxu_rows: int = 0
    tensor_fma: int = 0


def _tpu(name, kind, cores, flops, bandwidth, vmem, mxu, slice_shape, *aliases):
    mxus, mxu_rows = (4, 1) if mxu == 128 else (2, 2)
    flops_per_cycle = 2 * cores * mxus * mxu_rows * mxu * mxu
    return Chip(
        name,
        "tpu",
        kind,
        cores,
        flops,
        bandwidth,
        vmem_bytes=vmem * MIB,
        mxu=mxu,
        aliases=aliases,
        topology=f"{name}:{slice_shape}",
        clock_ghz=flops / flops_per_cycle / 1e9,
        mxus=mxus,
        mxu_rows=mxu_rows,
    )


def _gpu(name, kind, cores, flops, bandwidth, smem, capability, memory_gb, l2_mib, clock_ghz, lanes, tensor_fma):
    return Chip(
        name,
        "gpu",
        kind,
        cores,
        flops,
        bandwidth,
        smem_bytes=smem,
        capability=capability,
        memory_bytes=int(memory_gb * 1e9),
        l2_bytes=l2_mib * MIB,
        clock_ghz=clock_ghz,
        lanes=lanes,
        tensor_fma=tensor_fma,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 2, 275e12, 1228e9, 16, 128, "2x2x1"),
        _tpu("v5e", "TPU v5 lite", 1, 197e12, 819e9, 128, 128, "2x2", "TPU v5e"),
        _tpu("v5p", "TPU v5", 2, 459e12, 2765e9, 64, 128, "2x2x1", "TPU v5p"),
        _tpu("v6e", "TPU v6 lite", 1, 918e12, 1640e9, 128, 256, "2x2", "TPU v6e"),
        _tpu("tpu7x", "TPU7x", 1, 1153e12, 3690e9, 64, 256, "2x2x1"),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 108, 312e12, 2039e9, 166912, (8, 0), 85, 40, 1.41, 64, 256),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 132, 989e12, 3352e9, 232448, (9, 0), 85, 50, 1.98, 128, 512),
        _gpu("b200", "NVIDIA B200", 148, 2250e12, 8000e9, 232448, (10, 0), 191.5, 126, 1.965, 128, 1024),
    )
}
# What a kernel is made for when nobody said which chip: the least memory of the chips the kernels are proved on.
_DEFAULT = {"tpu": CHIPS["v5p"], "gpu": CHIPS["h100"]}
_UNLISTED_GPU = dataclasses.replace(CHIPS["a100"], smem_bytes=101376)  # what every GPU since capability 8.6 has


def named(name: str) -> Chip:
    """The chip called `name`. Raises `ValueError` with the known names otherwise."""
    if name not in CHIPS:
        raise ValueError(f"target must be one of {', '.join(CHIPS)}, got {name!r}")
    return CHIPS[name]


def of_kind(device_kind: str) -> Chip | None:
    """The chip whose `device_kind` JAX prints so, or None."""
    for chip in CHIPS.values():
        if device_kind in (chip.device_kind, *chip.aliases):
            return chip
        if chip.platform == "gpu" and chip.name.upper() in device_kind:  # "NVIDIA H100 PCIe" and its like
            return chip
    return None


def of_device(device: Any) -> Chip | None:
    """The chip of a device, live or abstract, or None. An unlisted GPU is known by its compute capability."""
    chip = of_kind(device.device_kind)
    capability = getattr(device, "compute_capability", "")
    if chip is None and device.platform in ("gpu", "cuda") and capability.replace(".", "").isdigit():
        numbers = tuple(map(int, capability.split(".")))
        return dataclasses.replace(
            _UNLISTED_GPU, name=device.device_kind, device_kind=device.device_kind, capability=numbers
        )
    return chip


def targeted() -> Chip | None:
    """The chip the current mesh names, or None."""
    device = get_abstract_mesh().abstract_device
    return of_device(device) if device is not None else None


def current(platform: str) -> Chip:
    """The chip of `platform` ("tpu" or "gpu") that is being compiled for; a default if the mesh does not say."""
    chip = targeted()
    return chip if chip is not None and chip.platform == platform else _DEFAULT[platform]


@dataclasses.dataclass(frozen=True, repr=False)
class _Device(AbstractDevice):
    """An abstract device that also tells its compute capability (Mosaic GPU asks for it), and whether its kernels are
    interpreted. It is part of the mesh and so of every trace's cache key."""

    compute_capability: str = ""
    interpreted: bool = False


def abstract_device(chip: Chip, *, interpreted: bool = False) -> AbstractDevice:
    """What a mesh says of `chip`."""
    capability = ".".join(map(str, chip.capability)) if chip.platform == "gpu" else ""
    return _Device(chip.device_kind, chip.cores, chip.platform, capability, interpreted)


@contextlib.contextmanager
def target(chip: Chip, *, interpreted: bool = False) -> Iterator[Chip]:
    """Within this context, tracing and lowering are for `chip`."""
    device = abstract_device(chip, interpreted=interpreted)
    mesh = get_abstract_mesh()
    mesh = AbstractMesh((), (), abstract_device=device) if mesh.empty else mesh.update(abstract_device=device)
    with use_abstract_mesh(mesh):
        yield chip


def interpreted() -> bool:
    """Whether the current target's kernels are to run in the interpreter."""
    return getattr(get_abstract_mesh().abstract_device, "interpreted", False)
