"""The device at hand, for the commands that measure: all others must work without asking."""

import os
import platform
from typing import Any

import jax.numpy as jnp

from pallas_kernels import chips


def at_hand() -> Any:
    """The device on which JAX runs by default here."""
    (device,) = jnp.zeros(()).devices()
    return device


def chip() -> chips.Chip | None:
    """The chip of the device at hand, or None for a CPU and for an accelerator that is not known."""
    device = at_hand()
    return None if device.platform == "cpu" else chips.of_device(device)


def description() -> str:
    """The device at hand in words: "NVIDIA H100 80GB HBM3", "cpu: Intel(R) Xeon(R) ...; 8 cores"."""
    device = at_hand()
    return f"cpu: {_processor()}" if device.platform == "cpu" else device.device_kind


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
