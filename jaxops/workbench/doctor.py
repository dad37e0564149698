"""`jaxops doctor`: whether this installation is sound: versions, devices, environment, compiler, precision, operators.

Every finding is "ok", "warning" (it works, but not as one may think) or "FAIL" (results or operators are not to be
trusted), with what was found and one sentence of advice.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxops.workbench import output
from jaxops.workbench.call import Problem, operators

_EXAMPLES = """examples:
  jaxops doctor
  jaxops doctor --seconds 30
  jaxops doctor --json | jq '.findings[] | select(.level != "ok")'

Exit codes: 0 nothing failed, 1 something did.
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. level: "ok", "warning" or "FAIL"."""

    about: str
    level: str
    found: str
    advice: str = ""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `doctor` to the command line."""
    command = commands.add_parser(
        "doctor",
        help="whether this installation is sound, each operator tested on its device",
        description="Looks at versions, devices, environment, compiler and precision, and tests every operator on the "
        "device at hand against float64.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--seconds", type=float, default=120, help="limit of the operators' test (default: %(default)g)"
    )
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints every finding; 1 if one of them failed."""
    if options.seconds <= 0:
        raise Problem(f"--seconds must be above 0, got {options.seconds:g}")
    findings = []
    with output.progress("doctor", 2 * len(operators()), quiet=options.json) as advance:
        for finding in examine(options.seconds):
            findings.append(finding)
            advance(finding.about)
    failed = [finding for finding in findings if finding.level == "FAIL"]
    warned = [finding for finding in findings if finding.level == "warning"]
    if options.json:
        output.as_json({"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        table = output.table("doctor", ("", "about", "found", "advice"))
        for finding in findings:
            table.add_row(finding.level, finding.about, finding.found, finding.advice)
        output.show(table)
        print(f"{len(findings)} findings: {len(warned)} warnings, {len(failed)} failures")
    return 1 if failed else 0


def examine(seconds: float = 120) -> Iterator[Finding]:
    """Everything, in the order of the table. seconds: the limit of the operators' test."""
    yield from versions()
    yield from environment(os.environ)
    try:
        yield from devices_found()
    except RuntimeError as error:
        yield Finding(
            "devices", "FAIL", _line(error), "JAX_PLATFORMS names a platform without a device, or its driver is broken"
        )
        return
    yield from compiler()
    yield from precision()
    yield from self_test(seconds)


# ---- versions -------------------------------------------------------------------------------------------------------

# distribution → whose metadata says which versions serve
_NEEDED = {"jax": "jaxops", "jaxlib": "jax", "flax": "jaxops", "numpy": "jaxops", "optax": "jaxops"}
_OPTIONAL = {
    "libtpu": "jax",
    "jax-cuda12-plugin": "jax",
    "jax-cuda12-pjrt": "jax",
    "jax-cuda13-plugin": "jax",
    "jax-cuda13-pjrt": "jax",
    "rich": "jaxops",
    "matplotlib": "jaxops",
}


def versions() -> Iterator[Finding]:
    """Python, and every distribution that JAX and this library depend on, against the ranges they state."""
    python = platform.python_version()
    enough = tuple(map(int, python.split(".")[:2])) >= (3, 12)
    yield Finding("python", "ok" if enough else "FAIL", python, "" if enough else "install Python 3.12 or later")
    for name, owner in (_NEEDED | _OPTIONAL).items():
        found = _version(name)
        if found is None:
            if name in _NEEDED:
                yield Finding(name, "FAIL", "not installed", f"pip install {name}")
            continue
        wanted = required(name, owner)
        if within(found, wanted):
            yield Finding(name, "ok", found)
        else:
            yield Finding(name, "FAIL", f"{found}, but {owner} needs {wanted}", f"pip install '{name}{wanted}'")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def required(name: str, owner: str) -> str:
    """The range of versions of `name` that the metadata of `owner` states, as "<0.13,>=0.12"; "" for any."""
    for line in importlib.metadata.requires(owner) or ():
        matched = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)", line)
        if matched and matched[1].replace("_", "-").lower() == name and matched[2].strip():
            return matched[2].strip().strip("()").replace(" ", "")
    return ""


def within(version: str, wanted: str) -> bool:
    """Whether `version` is in a range such as ">=0.12,<0.13" or "==0.0.50.*"; what follows a letter does not count."""

    def numbers(text: str) -> tuple[int, ...]:
        found = tuple(int(part) for part in re.findall(r"\d+", re.split(r"[a-z+]", text)[0]))
        return found + (0,) * (6 - len(found))  # 0.12 is 0.12.0

    have = numbers(version)
    for operator, limit in re.findall(r"(>=|<=|==|!=|>|<)([\w.*]+)", wanted):
        if limit.endswith(".*"):
            given = limit.count(".")
            order = 0 if have[:given] == numbers(limit)[:given] else 1
        else:
            order = (have > numbers(limit)) - (have < numbers(limit))
        holds = {">=": order >= 0, "<=": order <= 0, "==": order == 0, "!=": order != 0, ">": order > 0, "<": order < 0}
        if not holds[operator]:
            return False
    return True


# ---- environment and devices ----------------------------------------------------------------------------------------


def environment(variables: Mapping[str, str]) -> Iterator[Finding]:
    """The variables of JAX and XLA that are set and change what is computed, where, or in how much memory."""
    for name, judge in _VARIABLES.items():
        value = variables.get(name)
        if value:
            level, advice = judge(value)
            yield Finding(name, level, value, advice)


def _platforms(value: str) -> tuple[str, str]:
    plugins = [name for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin") if _version(name)]
    if value == "cpu" and plugins:
        return "warning", f"{plugins[0]} is installed but not used: unset it to run on the accelerator"
    return "ok", f"JAX looks for {value} only"


def _fraction(value: str) -> tuple[str, str]:
    with contextlib.suppress(ValueError):
        if 0 < float(value) <= 1:
            return "ok", "the share of the GPU's memory that JAX takes at once"
    return "FAIL", "must be a number above 0 and at most 1"


def _flags(value: str) -> tuple[str, str]:
    if "xla_cpu_enable_fast_math=true" in value:
        return (
            "warning",
            "fast math lets XLA assume that there is no NaN and no infinity: masked rows may come out wrong",
        )
    if "xla_force_host_platform_device_count" in value:
        return "warning", "the CPU is split into virtual devices, which share its cores: do not time anything so"
    return "ok", "given to XLA"


def _true(warning: str) -> Callable[[str], tuple[str, str]]:
    return lambda value: ("ok", "off") if value.lower() in ("0", "false", "off", "no") else ("warning", warning)


_VARIABLES: dict[str, Callable[[str], tuple[str, str]]] = {
    "JAX_PLATFORMS": _platforms,
    "XLA_FLAGS": _flags,
    "LIBTPU_INIT_ARGS": lambda value: ("ok", "given to the TPU compiler"),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": _fraction,
    "JAX_DEFAULT_MATMUL_PRECISION": lambda value: (
        "ok",
        "every product that does not ask for a precision has this one",
    ),
    "JAX_ENABLE_X64": _true("arrays are float64 where no dtype is given: no kernel serves it, and TPUs emulate it"),
    "JAX_DISABLE_JIT": _true("nothing is compiled as a whole: everything is slow"),
    "JAX_DEBUG_NANS": _true("every result is checked on the host: everything is slow"),
    "JAX_NUMPY_DTYPE_PROMOTION": lambda value: (
        ("warning", "mixed dtypes raise, also inside of libraries") if value == "strict" else ("ok", "JAX's default")
    ),
}


def devices_found() -> Iterator[Finding]:
    """The device JAX runs on by default, and how many there are. Raises `RuntimeError` if there is none."""
    from jaxops.workbench import devices

    device, count = devices.at_hand(), jax.device_count()
    memory = (device.memory_stats() or {}).get("bytes_limit")
    what = f"{count} × {devices.description()}" + (f", {memory / 1e9:.1f} GB each" if memory else "")
    if device.platform != "cpu":
        known = devices.chip()
        if known is None:
            yield Finding("devices", "warning", what, "no kernel is made for this device: all operators run in XLA")
        else:
            yield Finding("devices", "ok", what, f"kernels are made for {known.name}")
        return
    idle = [name for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin") if _version(name)]
    if idle and not os.environ.get("JAX_PLATFORMS"):
        advice = (
            f"{idle[0]} is installed, but JAX found no device for it: is the driver there, is another process using it?"
        )
        yield Finding("devices", "warning", what, advice)
    else:
        yield Finding("devices", "ok", what, "a CPU runs everything in XLA")


# ---- the compiler ---------------------------------------------------------------------------------------------------


def compiler() -> Iterator[Finding]:
    """What this version of XLA is known to do badly, each tried on the device at hand."""
    for about, probe in (
        ("bfloat16 products", _bfloat16_product),
        ("float16 sums of products", _float16_sum),
        ("lax.ragged_dot", _ragged_dot),
    ):
        try:
            yield probe(about)
        except Exception as error:  # a compiler may fail in any way
            yield Finding(about, "FAIL", _line(error), "this does not compile or run here")


def _bfloat16_product(about: str) -> Finding:
    """bfloat16 · bfloat16 with the result asked for in bfloat16, against the same asked for in float32, then cast."""
    x = jnp.full((512, 512), 0.5, jnp.bfloat16)
    plain, wide = _times(
        lambda x: x @ x, lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(x.dtype), x
    )
    found = f"{plain / wide:.1f} × the time of one with preferred_element_type=float32"
    if plain > 1.4 * wide:
        return Finding(about, "warning", found, "use jaxops.matmul, or preferred_element_type=float32 and a cast")
    return Finding(about, "ok", found)


def _float16_sum(about: str) -> Finding:
    """A product of float16 that is told to sum in float32 (`DotAlgorithmPreset.F16_F16_F32`)."""
    x = jnp.full((64, 64), 0.5, jnp.float16)
    dot = jax.jit(lambda x: jnp.dot(x, x, precision=lax.DotAlgorithmPreset.F16_F16_F32))
    try:
        jax.block_until_ready(dot(x))
    except Exception as error:
        advice = "ask for preferred_element_type=float32 instead of a DotAlgorithm"
        return Finding(about, "warning", f"F16_F16_F32 is not supported here: {_line(error)[:60]}", advice)
    return Finding(about, "ok", "F16_F16_F32 is supported")


def _ragged_dot(about: str) -> Finding:
    """A product in 8 groups against one product of the same size."""
    x, w = jnp.full((512, 128), 0.5, jnp.float32), jnp.full((8, 128, 128), 0.5, jnp.float32)
    sizes = jnp.full(8, 64, jnp.int32)
    grouped, whole = _times(lambda x: lax.ragged_dot(x, w, sizes), lambda x: x @ w[0], x)
    found = f"{grouped / whole:.1f} × the time of one product of that size"
    if grouped > 3 * whole:
        return Finding(about, "warning", found, "every group may be multiplied with all rows: sort and pad to blocks")
    return Finding(about, "ok", found)


def _times(first: Callable, second: Callable, x: jax.Array) -> tuple[float, float]:
    from jaxops.workbench import timing

    calls = {}
    for name, function in (("first", first), ("second", second)):
        calls[name] = functools.partial(jax.jit(function).lower(x).compile(), x)
    spreads = timing.take_turns(calls, 7)
    return spreads["first"].minimum, spreads["second"].minimum


# ---- precision ------------------------------------------------------------------------------------------------------


def precision() -> Iterator[Finding]:
    """What numbers do here that one may not expect."""
    yield _float32_product()
    ones = jnp.ones(4096, jnp.bfloat16)
    total = float(jax.jit(lambda x: x @ x)(ones))
    if total == 4096:
        yield Finding("bfloat16 products' sums", "ok", "4096 ones sum to 4096: they are wider than bfloat16")
    else:
        advice = "ask for preferred_element_type=float32"
        yield Finding("bfloat16 products' sums", "FAIL", f"4096 ones sum to {total:g}", advice)
    small = float(jax.jit(lambda x: x * 0.5)(jnp.float32(2e-38)))
    if small:
        yield Finding("denormal numbers", "ok", "float32 keeps numbers below 1.2e-38")
    else:
        advice = "do not divide by what may be as small; scale losses of float16"
        yield Finding("denormal numbers", "warning", "float32 numbers below 1.2e-38 become 0", advice)
    one, large = jnp.bfloat16(1), jnp.bfloat16(256)
    kept = float(jax.jit(lambda a, b: (a + b) - b)(one, large)) == 1
    if kept:
        found = "under jit they are rounded once, at the end: (1 + 256) - 256 is 1, and 0 without jit"
        advice = "compare with jit on both sides; lax.reduce_precision rounds where it has to be"
        yield Finding("bfloat16 in one program", "warning", found, advice)
    else:
        yield Finding("bfloat16 in one program", "ok", "every operation is rounded, as without jit")


def _float32_product() -> Finding:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = float(np.linalg.norm(np.asarray(jax.jit(jnp.dot)(a, b), np.float64) - exact) / np.linalg.norm(exact))
    about, found = "float32 products", f"relative error {error:.0e} by default"
    if error < 1e-6:
        return Finding(about, "ok", found)
    what = "TF32 (10 bits)" if error < 1e-3 else "bfloat16 (8 bits)"
    advice = "ask for precision='highest', or set JAX_DEFAULT_MATMUL_PRECISION=highest, where that is too coarse"
    return Finding(about, "warning", f"{found}: the operands are rounded to {what}", advice)


# ---- the operators --------------------------------------------------------------------------------------------------

# Sizes that divide no tile, but for the head size, which kernels ask for.
_SIZES = {"R": 65, "D": 200, "B": 2, "T": 100, "N": 4, "H": 64, "M": 65, "G": 3, "K": 96, "V": 1000, "S": 7, "C": 96}


def self_test(seconds: float = 120) -> Iterator[Finding]:
    """Every operator on the device at hand, by the path it takes by default: value and gradients against float64.

    float32 first, then bfloat16. What is not reached within `seconds` is a warning.
    """
    end = time.monotonic() + seconds
    for dtype in ("float32", "bfloat16"):
        for name in sorted(operators()):
            if time.monotonic() > end:
                advice = f"give --seconds more than {seconds:g}"
                yield Finding(f"{name}, {dtype}", "warning", "not reached in time", advice)
            else:
                yield _tested(name, dtype)


def _tested(name: str, dtype: str) -> Finding:
    from jaxops.workbench import measurement

    usual = measurement.USUAL[name]
    words = tuple(measurement.with_sizes(word, _SIZES) for word in usual.operands)
    question = measurement.Question(name, words, usual.options, dtype, True)
    about, advice = f"{name}, {dtype}", "do not trust this operator here: report it with this table"
    start = time.monotonic()
    try:
        row = measurement.tried(question)
        runs = _runs(*question.call())
    except Exception as error:  # a backend may fail in any way
        return Finding(about, "FAIL", _line(error), advice)
    if row.reason:
        return Finding(about, "FAIL", row.reason, advice)
    seconds = f"{time.monotonic() - start:.1f} s"
    return Finding(about, "ok", f"{runs}: value and gradients, worst relative error {row.error:.0e} ({seconds})")


def _runs(function: Callable, shapes: Mapping[str, Any]) -> str:
    """What the call runs as on the device at hand: "kernel" or "XLA"."""
    from jaxops.inspection import explain
    from jaxops.workbench import devices
    from pallas_kernels import chips

    chip = devices.chip()
    if chip is None or chip.name not in chips.CHIPS:
        return "XLA"
    lines = explain(function, target=chip.name, **shapes).lines
    return "kernel" if any(line.implementation == "pallas" for line in lines) else "XLA"


def _line(error: Exception) -> str:
    """The first words of an exception."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else words[:200] + " …"
