"""A static profile of compiled GPU kernels: registers, spills, shared memory, occupancy and what their loops execute.

The CUDA compiler runs without a GPU. `read` assembles the PTX it dumped with `ptxas -v`, disassembles the result, and
finds the natural loops of the machine code. For each loop it counts the instructions of a warp and the clocks that one
trip keeps the units of a quarter of a core (it has four schedulers, each with a tensor core) busy:

    issue clocks    one per instruction
    tensor clocks   multiply-additions of the matrix products / those of the tensor core in a clock
    special clocks  8 per exponential, reciprocal, … (4 lanes of 32)
    fp32 clocks     32 / lanes per float32 instruction of a warp

All figures are **modelled** or the compiler's own. What the model cannot see: how often a loop runs, hence any time of
a kernel; memory latency and bandwidth, L2, bank conflicts, the wait at a barrier, how warps overlap (a warpgroup that
waits for a product lets another issue), clock throttling. The shape of a tcgen05 product is not in its opcode, so its
tensor clocks count as 0. Compare variants of one kernel by their loops; do not read a time off them.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence

from jaxops.schedule.bundles import ScheduleError as ScheduleError
from pallas_kernels.chips import Chip

TOOL_SECONDS = 300  # time limit of one run of ptxas or nvdisasm
_REGISTERS = 65536  # of a core
_THREADS = 2048
_BLOCKS = 32
_WARP = 32
_RESERVED_SMEM = 1024  # of a block, by the driver

# Opcode (up to the first dot) → class of instruction. What is not here is "other".
_CLASSES = {
    "tensor": "HGMMA QGMMA IGMMA HMMA QMMA DMMA IMMA UTCHMMA UTCQMMA UTCIMMA",
    "fp32": "FFMA FFMA2 FADD FADD2 FMUL FMUL2 FMNMX FMNMX3 FFMA32I FADD32I FMUL32I",
    "special": "MUFU",
    "convert": "F2F F2FP F2I I2F I2FP HADD2 HMUL2 HFMA2 PRMT",
    "integer": "IMAD IADD IADD3 ISETP IMNMX IABS VIADD VIADDMNMX VIMNMX LOP3 LEA SHF SEL MOV FSEL FSETP POPC FLO "
    "R2UR S2R CS2R S2UR",
    "uniform": "UIMAD UIADD3 ULOP3 UMOV ULEA USHF UISETP USEL UPRMT R2P ULDC LDCU LDC",
    "shuffle": "SHFL",
    "shared load": "LDS LDSM",
    "shared store": "STS STSM",
    "global load": "LDG LD LDGSTS",
    "global store": "STG ST RED ATOM ATOMG",
    "bulk copy": "UTMALDG UTMASTG UTMAREDG UBLKCP",
    "barrier": "BAR SYNCS WARPSYNC DEPBAR LDGDEPBAR WARPGROUP NANOSLEEP UTMACMDFLUSH FENCE MEMBAR",
    "local": "LDL STL",
    "branch": "BRA BSSY BSYNC EXIT CALL RET BRX WARPGROUPDEPBAR",
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes.split()}
_SPECIAL_CLOCKS = 8


def environment(dump: pathlib.Path) -> dict[str, str]:
    """What has to be in `os.environ` before the CUDA plugin loads, so that compiling writes PTX into the folder `dump`.

    Flags already in `XLA_FLAGS` stay.
    """
    flags = f"--xla_dump_to={dump} --xla_dump_emitter_re=thunk-sequence|ptx"
    return {
        "MOSAIC_GPU_DUMP_TO": str(dump),
        "XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS"), flags])),
    }


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a kernel's machine code, for one warp and one trip.

    span: its first and last instruction, by number; instructions: count by class; total: their sum, without NOPs.
    bound: what the clocks say is busiest: "tensor cores", "special functions", "fp32" or "instruction issue".
    """

    span: tuple[int, int]
    instructions: dict[str, int]
    total: int
    tensor_clocks: float
    special_clocks: float
    fp32_clocks: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler and the model say of one kernel.

    registers: of a thread; smem_bytes: of a block, static and dynamic; threads: of a block; grid: blocks, None where
      the dump does not say.
    blocks_per_core, occupancy: blocks that fit on a core and the part of its threads they fill, and what limits them:
      `limiter` is "threads", "blocks", "registers" or "shared memory".
    instructions: of the whole text, by class; loops: hottest first, see `Loop`.
    """

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    smem_bytes: int
    threads: int
    grid: tuple[int, ...] | None
    blocks_per_core: int
    occupancy: float
    limiter: str
    instructions: dict[str, int]
    loops: tuple[Loop, ...]

    def figures(self) -> dict:
        """Everything, in values JSON has."""
        found = dataclasses.asdict(self)
        found["grid"] = None if self.grid is None else list(self.grid)
        found["loops"] = [loop | {"span": list(loop["span"])} for loop in found["loops"]]
        return found


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is launched: dynamic shared memory, and where the dump says so grid and threads of a block."""

    dynamic_smem_bytes: int = 0
    grid: tuple[int, ...] | None = None
    threads: int | None = None


def read(dump: pathlib.Path, chip: Chip) -> list[Kernel]:
    """Every kernel of the program whose compilation for `chip` was dumped into `dump` under `environment`.

    Needs ptxas and nvdisasm (the extra `gpu-compile`). Raises `ScheduleError` with one sentence if they are missing, if
    there is no PTX, or if it cannot be read.
    """
    dump = pathlib.Path(dump)
    sources = [path for path in sorted(dump.glob("*.ptx")) if ".entry" in path.read_text(errors="replace")]
    if not sources:
        raise ScheduleError(
            f"{dump} holds no PTX: compile with what jaxops.schedule.gpu.environment says set before the plugin loads"
        )
    ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")
    launches = launches_of(dump)
    kernels = []
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            cubin = pathlib.Path(folder) / "kernel.cubin"
            target = re.search(r"^\.target\s+(\w+)", source.read_text(errors="replace"), re.MULTILINE)
            if target is None:
                raise ScheduleError(f"{source.name} names no target: it is not complete PTX")
            report = _run([ptxas, "-v", f"-arch={target[1]}", str(source), "-o", str(cubin)]).stderr
            code = _run([nvdisasm, "-c", str(cubin)]).stdout
        kernels += profile(source.read_text(errors="replace"), report, code, chip, launches)
    return kernels


def tool(name: str) -> str:
    """The path of ptxas or nvdisasm: that of the installed nvidia packages, else the one on the PATH."""
    for folder in map(pathlib.Path, sys.path):
        for path in itertools.chain(folder.glob(f"nvidia/cu*/bin/{name}"), folder.glob(f"nvidia/cuda_*/bin/{name}")):
            return str(path)
    if found := shutil.which(name):
        return found
    raise ScheduleError(f"{name} is missing: pip install 'jaxops[gpu-compile]'")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess:
    name = pathlib.Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TOOL_SECONDS)
    except subprocess.TimeoutExpired:
        raise ScheduleError(f"{name} did not end within {TOOL_SECONDS} s") from None
    if done.returncode:
        raise ScheduleError(f"{name} failed: {' '.join(done.stderr.split())[:400]}")
    return done


def launches_of(dump: pathlib.Path) -> dict[str, Launch]:
    """The launch of each kernel by name: from XLA's list of thunks and from the modules Mosaic GPU dumped."""
    launches = {}
    for path in sorted(dump.glob("*thunk_sequence.txt")):
        for name, grid, threads, smem in re.findall(
            r"\]\s+(\S+)\s+grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+)", path.read_text()
        ):
            sizes = _numbers(threads)
            launches[name] = Launch(int(smem), _numbers(grid), sizes[0] * sizes[1] * sizes[2])
    for path in sorted(dump.glob("*.before_layout_inference.txt")) + sorted(dump.glob("*.mlir-passes.log")):
        text = path.read_text(errors="replace")
        smem = re.search(r"dynamic_shared_memory_size %c(\d+)", text)
        kernel = re.search(r"^\.visible \.entry (\w+)", _sibling(path, ".ptx"), re.MULTILINE)
        if smem and kernel:
            blocks = re.search(r"gpu\.launch[^\n]*? blocks\([^)]*\) in \(([^)]*)\)", text)
            grid = tuple(int(size) for size in re.findall(r"= %c(\d+)", blocks[1])) if blocks else ()
            launches[kernel[1]] = Launch(int(smem[1]), grid or None)
    return launches


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _sibling(path: pathlib.Path, ending: str) -> str:
    """The text of the file with the same stem, "" if there is none: Mosaic GPU names all files of a module alike."""
    other = path.with_name(path.name.split(".")[0] + ending)
    return other.read_text(errors="replace") if other.exists() else ""


# ------------------------------------------------------------------------------------------------------------- profile


def profile(ptx: str, report: str, code: str, chip: Chip, launches: Mapping[str, Launch] | None = None) -> list[Kernel]:
    """The kernels of one PTX module, from what `ptxas -v` reports of it and the disassembly of its machine code."""
    functions = disassembled(code)
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        used = re.search(r"Used (\d+) registers", part)
        if used is None or name not in functions:
            raise ScheduleError(f"{name}: ptxas or nvdisasm did not finish it")
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        stack, stores, loads = map(int, frame.groups()) if frame else (0, 0, 0)
        static = re.search(r"(\d+) bytes smem", part)
        launch = (launches or {}).get(name, Launch())
        threads = _threads(ptx, name) or launch.threads or 128
        smem = (int(static[1]) if static else 0) + launch.dynamic_smem_bytes
        blocks, limiter = _blocks_per_core(int(used[1]), threads, smem, chip)
        function = functions[name]
        kernels.append(
            Kernel(
                name=name,
                registers=int(used[1]),
                stack_bytes=stack,
                spill_store_bytes=stores,
                spill_load_bytes=loads,
                smem_bytes=smem,
                threads=threads,
                grid=launch.grid,
                blocks_per_core=blocks,
                occupancy=blocks * -(-threads // _WARP) * _WARP / _THREADS,
                limiter=limiter,
                instructions=_classes(function.instructions),
                loops=_ranked(function, chip),
            )
        )
    return kernels


def _threads(ptx: str, name: str) -> int | None:
    """Threads of a block, as the kernel's declaration limits or requires them."""
    declared = re.search(re.escape(name) + r"\([^{]*?\)\s*((?:\.\w+[^\n{]*\n)*)", ptx)
    sizes = re.search(r"\.(?:reqntid|maxntid) (\d+)(?:, (\d+))?(?:, (\d+))?", declared[1]) if declared else None
    return int(sizes[1]) * int(sizes[2] or 1) * int(sizes[3] or 1) if sizes else None


def _blocks_per_core(registers: int, threads: int, smem: int, chip: Chip) -> tuple[int, str]:
    """How many blocks fit on a core, and what runs out first.

    Registers are given to a warp 256 at a time, each of four schedulers having a quarter; shared memory 128 bytes at a
    time.
    """
    warps = -(-threads // _WARP)
    of_warp = -(-max(registers, 1) * _WARP // 256) * 256
    fits = {
        "threads": _THREADS // (warps * _WARP),
        "blocks": _BLOCKS,
        "registers": _REGISTERS // of_warp // 4 * 4 // warps,
        "shared memory": (chip.smem_bytes + _RESERVED_SMEM) // (-(-(smem + _RESERVED_SMEM) // 128) * 128),
    }
    limiter = min(fits, key=lambda name: fits[name])
    return fits[limiter], limiter


# -------------------------------------------------------------------------------------------------------- machine code


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of machine code. `guarded`: executed only where a predicate holds."""

    opcode: str
    operands: str
    guarded: bool


@dataclasses.dataclass(frozen=True)
class Function:
    """The machine code of a kernel; `labels` maps a label to the number of the instruction it stands before."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]


_LINE = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")


def disassembled(code: str) -> dict[str, Function]:
    """The functions in the output of `nvdisasm -c`, by name."""
    functions: dict[str, tuple[list[Instruction], dict[str, int]]] = {}
    current: tuple[list[Instruction], dict[str, int]] | None = None
    for line in code.splitlines():
        if begins := re.match(r"\.text\.(\S+):", line):
            current = functions.setdefault(begins[1], ([], {}))
        elif line.lstrip().startswith(".section") and ".text." not in line:
            current = None
        elif current is None:
            continue
        elif label := re.match(r"(\.L_\S+):", line):
            current[1][label[1]] = len(current[0])
        elif found := _LINE.match(line):
            current[0].append(Instruction(found[2], found[3], found[1] is not None))
    return {name: Function(tuple(instructions), labels) for name, (instructions, labels) in functions.items()}


def _classes(instructions: Iterable[Instruction]) -> dict[str, int]:
    names = (_CLASS_OF.get(one.opcode.split(".")[0], "other") for one in instructions if one.opcode != "NOP")
    return dict(collections.Counter(names))


def _tensor_clocks(opcode: str, chip: Chip) -> float:
    """Clocks a product keeps one tensor core busy; a warpgroup's product is shared by four."""
    if found := re.match(r"[HQI]GMMA\.64x(\d+)x(\d+)", opcode):  # 16 of its 64 rows on each
        return 16 * int(found[1]) * int(found[2]) / chip.tensor_fma / (1 if opcode[0] == "H" else 2)
    if found := re.match(r"[HIQ]MMA\.(16816|1688|16832|16864)", opcode):  # m16 n8 k16 and so on, by one warp
        size = {"1688": 1024, "16816": 2048, "16832": 2048, "16864": 4096}[found[1]]
        return size / chip.tensor_fma * (2 if ".TF32" in opcode else 1)
    return 0.0


def _loop(function: Function, numbers: Sequence[int], chip: Chip) -> Loop:
    body = [function.instructions[number] for number in numbers]
    classes = _classes(body)
    total = sum(classes.values())
    tensor = sum(_tensor_clocks(one.opcode, chip) for one in body)
    special = classes.get("special", 0) * _SPECIAL_CLOCKS
    fp32 = classes.get("fp32", 0) * (128 // chip.lanes)
    clocks = {"tensor cores": tensor, "special functions": special, "fp32": fp32, "instruction issue": total}
    bound = max(clocks, key=lambda name: clocks[name])
    return Loop((numbers[0], numbers[-1]), classes, total, tensor, special, fp32, bound)


def _ranked(function: Function, chip: Chip) -> tuple[Loop, ...]:
    """All loops, those first in which the work is done: most tensor clocks, then products, then instructions.

    A loop comes after those inside it if they hold its work: a third of its products, or of a loop without any, a
    quarter of its instructions.
    """
    found = {numbers: _loop(function, numbers, chip) for numbers in natural_loops(function)}
    sets = {numbers: set(numbers) for numbers in found}

    def products(numbers: tuple[int, ...]) -> int:
        return found[numbers].instructions.get("tensor", 0)

    def holds_work(inner: tuple[int, ...], outer: tuple[int, ...]) -> bool:
        if not sets[inner] < sets[outer]:
            return False
        if products(outer):
            return products(inner) * 3 >= products(outer)
        return found[inner].total * 4 > found[outer].total

    def rank(numbers: tuple[int, ...]) -> tuple:
        around = any(holds_work(inner, numbers) for inner in found)
        return around, -found[numbers].tensor_clocks, -products(numbers), -found[numbers].total

    return tuple(found[numbers] for numbers in sorted(found, key=rank))


def natural_loops(function: Function) -> list[tuple[int, ...]]:
    """The numbers of the instructions of every natural loop: a branch back to a block that dominates it.

    Loops that only spin until a barrier's phase are left out.
    """
    instructions, count = function.instructions, len(function.instructions)
    targets: dict[int, int] = {}
    conditional: dict[int, bool] = {}
    ends: set[int] = set()
    for number, one in enumerate(instructions):
        base = one.opcode.split(".")[0]
        if base in ("BRA", "UBRA"):
            label = re.search(r"`\((\.L_\S+?)\)", one.operands)
            if label and function.labels.get(label[1], count) < count:
                targets[number] = function.labels[label[1]]
                hinted = ".DIV" in one.opcode or ".CONV" in one.opcode
                conditional[number] = one.guarded or hinted or bool(re.search(r"\bU?P\d", one.operands))
        if base in ("BRA", "UBRA", "EXIT", "RET", "BRX"):
            ends.add(number)
    starts = sorted({0, *targets.values(), *(number + 1 for number in ends if number + 1 < count)})
    block_of = {start: block for block, start in enumerate(starts)}
    spans = list(zip(starts, [*starts[1:], count], strict=True))
    successors: list[list[int]] = []
    for block, (_, end) in enumerate(spans):
        last, following = end - 1, [block + 1] if block + 1 < len(spans) else []
        if last in targets:
            successors.append([block_of[targets[last]], *(following if conditional[last] else [])])
        elif last in ends and not instructions[last].guarded:
            successors.append([])
        else:
            successors.append(following)
    predecessors: list[list[int]] = [[] for _ in spans]
    for block, following in enumerate(successors):
        for other in following:
            predecessors[other].append(block)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            if (block == 0 or predecessors[block]) and dominators[block] >> head & 1:
                body, work = bodies.setdefault(head, {head}), [block]
                while work:
                    other = work.pop()
                    if other not in body:
                        body.add(other)
                        work += predecessors[other]
    loops = [tuple(number for block in sorted(body) for number in range(*spans[block])) for body in bodies.values()]
    return [numbers for numbers in loops if len(numbers) > 1 and not _spins([instructions[i] for i in numbers])]


def _dominators(predecessors: Sequence[Sequence[int]]) -> list[int]:
    """For every block the set of blocks on all ways to it from block 0, as bits."""
    everything = (1 << len(predecessors)) - 1
    dominators = [1] + [everything] * (len(predecessors) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(predecessors)):
            common = everything
            for other in predecessors[block]:
                common &= dominators[other]
            common |= 1 << block
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


def _spins(body: Sequence[Instruction]) -> bool:
    waits = any(re.match("SYNCS|NANOSLEEP|LD|ATOM|CCTL", one.opcode) for one in body)
    return len(body) < 14 and waits and not any("MMA" in one.opcode for one in body)
