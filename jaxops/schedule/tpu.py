"""A schedule model of compiled TPU kernels: cycles, matrix-unit occupancy, DMA bytes and modelled time, with no TPU.

The TPU compiler runs without a TPU and dumps, for each kernel, the final list of VLIW bundles: what the core will
execute, one bundle a cycle. `read` runs the scalar unit over that list (`emulator`), so that every bundle gets the
count with which it would execute: grid loops, inner loops, `pl.when` regions. From the counts follow

    cycles        executed bundles
    mxu_cycles    Σ over matrix products of the cycles that one holds its matrix unit / the number of units
    bytes         Σ over executed DMAs
    stall_cycles  waits for DMAs: one channel at peak HBM bandwidth, first in first out, `LATENCY_SECONDS` until arrival
    seconds       max(cycles + stall_cycles + last arrivals, mxu_cycles) / clock

All figures are **modelled**. What the model cannot see: HBM and VMEM bank conflicts, short or strided DMAs below peak
bandwidth, stalls of the matrix unit or of result queues that are not in the schedule, fetching a large kernel's
instructions, clock throttling, other chips (remote DMAs, collectives), what XLA hands to the SparseCores, the launch of
a kernel, and branches that hang on values the vector unit computed. Ratios between variants of a kernel are worth more
than absolute times. Where a JAX device has two cores (v5p, v4), figures are those of the first core, with its half of
the bandwidth.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from jaxops.schedule.bundles import Schedule as Schedule
from jaxops.schedule.bundles import ScheduleError as ScheduleError
from jaxops.schedule.bundles import parse
from jaxops.schedule.emulator import Channel, Cost, Execution, execute
from jaxops.schedule.scalars import Scalars as Scalars
from jaxops.schedule.scalars import known_scalars as known_scalars
from pallas_kernels.chips import Chip

LATENCY_SECONDS = 0.5e-6  # from the end of a transfer until it has arrived
PROGRAM = "(program)"  # the name of the program that calls the kernels
# What the runtime leaves in SMEM for a program, by the end of the compiler's description: it runs on the first core
# and not for the first time, so that an operand which XLA prefetches from one run for the next is there.
_RUNTIME = {"core index": 0, "chip ID": 0, "program descriptor state": 1, "spec success addr": 1, "rng seed": 0}
_SPILL_BYTES = 4096  # one vector register
_MAIN = "TLP"  # how the compiler's files call it
_BUNDLES = re.compile(r"(?:\d+-)?(.+)-\d+-final_bundles\.txt")


def environment(dump: pathlib.Path) -> dict[str, str]:
    """What has to be in `os.environ` before libtpu loads, so that compiling writes schedules into the folder `dump`.

    Flags already in `LIBTPU_INIT_ARGS` stay.
    """
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return {"LIBTPU_INIT_ARGS": " ".join(filter(None, [os.environ.get("LIBTPU_INIT_ARGS"), flags]))}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the model says of one kernel, for one execution of it.

    name: as in the compiled HLO; `PROGRAM` for the program around the kernels, whose DMAs and waits are its own.
    pallas: whether it is a Pallas kernel; otherwise one of XLA's.
    calls: how often the program executes it.
    bundles: of its text; cycles: bundles executed; mxu_cycles: of the matrix units; stall_cycles: waits for DMAs.
    read_bytes, written_bytes: from and to HBM, by DMA.
    vmem_bytes: allocated in VMEM, spill slots included.
    spill_slots: vector registers kept in VMEM; spill_stores, spill_loads: how often one was written and read.
    utilisation: the part of its cycles in which each unit's slots are used, by the compiler's name for the unit.
    warnings: sentences on what could not be modelled.
    seconds: modelled, DMA waits included.
    bound: "matrix unit", "memory" or "vector/scalar slots".
    """

    name: str
    pallas: bool
    calls: int
    bundles: int
    cycles: float
    mxu_cycles: float
    stall_cycles: float
    read_bytes: int
    written_bytes: int
    vmem_bytes: int
    spill_slots: int
    spill_stores: int
    spill_loads: int
    utilisation: dict[str, float]
    warnings: tuple[str, ...]
    seconds: float
    bound: str

    def figures(self) -> dict:
        """Everything, in values JSON has."""
        return dataclasses.asdict(self) | {"warnings": list(self.warnings)}


def read(dump: pathlib.Path, chip: Chip, scalars: Sequence[Scalars] = ()) -> list[Kernel]:
    """Every kernel of the program whose compilation for `chip` was dumped into `dump`, and last the program itself.

    The folder holds the dump of one program, made under `environment`.
    scalars: what `known_scalars` found; without it, operands in SMEM read as 0, with a warning.

    Raises `ScheduleError` with one sentence if there is no dump or it cannot be read.
    """
    dump = pathlib.Path(dump)
    files: dict[str, pathlib.Path] = {}
    for path in sorted(dump.glob("*-final_bundles.txt")):
        found = _BUNDLES.fullmatch(path.name)
        if found is None or found[1].startswith("<"):  # what the runtime does before and after the program
            continue
        if found[1] == _MAIN and _MAIN in files:
            raise ScheduleError(f"{dump} holds the dumps of several programs: empty it before each compilation")
        files[found[1]] = path
    main = files.pop(_MAIN, None)
    if not files and main is None:
        raise ScheduleError(
            f"{dump} holds no schedule: compile with what jaxops.schedule.tpu.environment says set before libtpu loads"
        )
    remaining = list(scalars)
    kernels = {}
    for name, path in files.items():
        schedule = parse(path.read_text(errors="replace"), name)
        words = _scalars_of(name, remaining) if _is_pallas(schedule) else {}
        channel = _channel(chip)
        execution = execute(schedule, channel, scalars=words)
        kernels[name] = _kernel(name, path, schedule, execution, channel, chip)
    if main is None:
        return list(kernels.values())
    return _program(main, kernels, _callees(dump), chip)


def _channel(chip: Chip) -> Channel:
    clock = chip.clock_ghz * 1e9
    return Channel(chip.bandwidth / chip.cores / clock, LATENCY_SECONDS * clock)


def _is_pallas(schedule: Schedule) -> bool:
    return "= custom-call(" in schedule.entry


def _scalars_of(name: str, remaining: list[Scalars]) -> Mapping[int, Sequence[int]]:
    """The scalars of the kernel `name`: the longest name of a Pallas call that its name begins with.

    Calls of the same name are taken in order, and each once, except the last.
    """
    plain = name.replace("-", "_")
    fitting = [one for one in remaining if one.name and plain.startswith(one.name.replace("-", "_"))]
    if not fitting:
        return {}
    longest = max(len(one.name) for one in fitting)
    fitting = [one for one in fitting if len(one.name) == longest]
    if len(fitting) > 1:
        remaining.remove(fitting[0])
    return fitting[0].words


def _callees(dump: pathlib.Path) -> dict[str, str]:
    """HLO name → the kernel that serves it: equal computations are compiled once."""
    names: dict[str, str] = {}
    for path in dump.glob("*TLP-*-deduplication-map.txt"):
        for block in path.read_text().split("key:")[1:]:
            key, *lines = block.splitlines()
            names |= {line.strip(): key.strip() for line in lines if line.startswith("  ")}
    return names


def _program(main: pathlib.Path, kernels: dict[str, Kernel], callees: dict[str, str], chip: Chip) -> list[Kernel]:
    """The kernels with their `calls`, and the program that calls them."""
    clock = chip.clock_ghz * 1e9
    cost = {
        name: Cost(kernel.seconds * clock, kernel.read_bytes + kernel.written_bytes) for name, kernel in kernels.items()
    }
    costs = cost | {hlo: cost[key] for hlo, key in callees.items() if key in cost}
    schedule = parse(main.read_text(errors="replace"), PROGRAM)
    channel = _channel(chip)
    execution = execute(schedule, channel, cells=_cells(main), costs=costs)
    calls = dict.fromkeys(kernels, 0)
    for callee, count in execution.calls.items():
        if callees.get(callee, callee) in calls:
            calls[callees.get(callee, callee)] += count
    around = _kernel(PROGRAM, main, schedule, execution, channel, chip)
    within = sum(calls[name] * kernel.seconds for name, kernel in kernels.items())
    if any("sparse-core" in purpose for _, _, _, purpose in _allocations(main)):
        around = dataclasses.replace(around, warnings=(*around.warnings, "work of the SparseCores is not counted"))
    around = dataclasses.replace(
        around, seconds=max(around.seconds - within, 0.0), stall_cycles=max(around.seconds - within, 0.0) * clock
    )
    return [*(dataclasses.replace(kernel, calls=calls[name]) for name, kernel in kernels.items()), around]


def _kernel(
    name: str, path: pathlib.Path, schedule: Schedule, execution: Execution, channel: Channel, chip: Chip
) -> Kernel:
    clock = chip.clock_ghz * 1e9
    cycles = sum(execution.counts)
    mxu_cycles = _mxu_cycles(schedule, execution.counts, chip)
    slots = _slots(path, schedule, execution.counts)
    end = max(execution.end, mxu_cycles)
    warnings = list(execution.warnings)
    if execution.unknown_operands:
        numbers = ", ".join(map(str, execution.unknown_operands))
        warnings.append(f"the values of scalar operands {numbers} are not known: read as 0")
    utilisation = {unit: used / (capacity * max(cycles, 1)) for unit, (used, capacity) in slots.items()}
    memory_cycles = (execution.read_bytes + execution.written_bytes) / channel.bytes_per_cycle
    return Kernel(
        name=name,
        pallas=_is_pallas(schedule),
        calls=1,
        bundles=len(schedule.bundles),
        cycles=cycles,
        mxu_cycles=mxu_cycles,
        stall_cycles=execution.stall,
        read_bytes=execution.read_bytes,
        written_bytes=execution.written_bytes,
        vmem_bytes=_allocated(path) + _SPILL_BYTES * schedule.vector_spills,
        spill_slots=schedule.vector_spills,
        spill_stores=slots["VSTORE:SPILL"][0],
        spill_loads=slots["VLOAD:FILL"][0],
        utilisation=utilisation,
        warnings=tuple(warnings),
        seconds=end / clock,
        bound=_bound(cycles, mxu_cycles, max(memory_cycles, execution.stall), utilisation),
    )


def _bound(cycles: float, mxu_cycles: float, memory_cycles: float, utilisation: Mapping[str, float]) -> str:
    """Memory if transfers or waits for them take longer than the bundles; the matrix unit if it is the busiest unit
    and busy for at least half of the cycles; else the slots of the other units, or the chain of instructions."""
    if memory_cycles >= max(cycles, mxu_cycles):
        return "memory"
    busiest = max((used for unit, used in utilisation.items() if unit != "MXU"), default=0.0)
    return "matrix unit" if mxu_cycles >= max(busiest, 0.5) * cycles else "vector/scalar slots"


def _mxu_cycles(schedule: Schedule, counts: Sequence[int], chip: Chip) -> float:
    """Cycles for which the matrix units are held, spread evenly over them.

    A product streams the 8 sublanes of a register, each holding one float32 row or two packed bfloat16 ones.
    """
    held = 0.0
    for bundle, count in zip(schedule.bundles, counts, strict=True):
        for opcode in bundle.vector:
            if opcode.startswith("vmatmul"):
                held += count * (8 if "f32" in opcode else 16) / chip.mxu_rows
    return held / chip.mxus


def _slots(path: pathlib.Path, schedule: Schedule, counts: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Unit → (slots used over all executed bundles, slots of one bundle), from the compiler's table of each bundle."""
    table = _beside(path, "final_hlo-static-per-bundle-utilization.txt")
    if table is None:
        raise ScheduleError(f"the table of unit utilisation is missing beside {path.name}")
    lines = table.read_text().splitlines()
    rows = [line for line in lines[4:] if line.strip()]
    if len(rows) != len(schedule.bundles):
        raise ScheduleError(f"{path.name} has {len(schedule.bundles)} bundles and its table of units {len(rows)} rows")
    units = [unit.strip() for unit in lines[1].split(",")]
    capacities = [int(word) for word in lines[2].split()]
    used = [0] * len(units)
    for row, count in zip(rows, counts, strict=True):
        if count:
            for index, word in enumerate(row.split()):
                if word != "0":
                    used[index] += int(word) * count
    return dict(zip(units, zip(used, capacities, strict=True), strict=True))


def _allocations(path: pathlib.Path) -> list[tuple[str, str, int, str]]:
    """(name, memory space, bytes, what it is for) of every allocation the compiler lists for the kernel of `path`."""
    listing = _beside(path, "pre-finalize-registers-and-allocations.txt")
    found = re.findall(
        r"#(allocation\d+) \[[^\n]*space=(\w+), size = (0x[0-9a-f]+)[^\n]*tag = '([^\n]*)'",
        listing.read_text(errors="replace") if listing else "",
    )
    return [(name, space, int(size, 16), purpose) for name, space, size, purpose in found]


def _allocated(path: pathlib.Path) -> int:
    """Bytes of VMEM that the kernel allocates, without spill slots."""
    sizes = [size for _, space, size, _ in _allocations(path) if space == "vmem"]
    return sum(size for size in sizes if size < 1 << 40)  # larger: placed by XLA, not by the kernel


def _cells(path: pathlib.Path) -> dict[str, int]:
    """What SMEM holds when a program starts, by allocation, as far as it is known."""
    return {
        name: value
        for name, space, _, purpose in _allocations(path)
        for ending, value in _RUNTIME.items()
        if space == "smem" and purpose.endswith(ending)
    }


def _beside(path: pathlib.Path, ending: str) -> pathlib.Path | None:
    """The file of the same kernel with another ending: only the number of the compiler's pass differs."""
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
    names = re.compile(re.escape(stem) + r"-\d+-" + re.escape(ending) + "$")
    return next((other for other in sorted(path.parent.iterdir()) if names.match(other.name)), None)
