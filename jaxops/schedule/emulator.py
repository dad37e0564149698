"""Runs the scalar unit of a TPU core over a parsed schedule: how often every bundle executes, and what its DMAs cost.

Vectors are never computed. What is computed is the *slice* of scalar instructions that branches, DMAs and waits depend
on: loop counters, window indices, predicates, scalar-prefetch operands in SMEM, spilled scalars. Every basic block of
that slice becomes one piece of Python, executed as often as the block is.

Cannot be seen: branches that depend on what the vector unit computed, or on memory nobody told (they fall through, that
is: the guarded region is entered, the loop left), and everything about time that is not in the schedule except DMA
waits, which `Channel` models.
"""

import bisect
import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import CodeType

from jaxops.schedule.bundles import DELAY_SLOTS, Instruction, Predicate, Schedule

GRANULE_BYTES = 32  # the unit in which a DMA's size is given
STEP_LIMIT = 5_000_000  # executed basic blocks
_SPACE = 1 << 64  # every allocation and operand has its own addresses, larger than any shifted 32-bit integer
_INT32 = 1 << 32


class Channel:
    """The HBM interface: transfers follow one another at peak bandwidth, each arriving `latency` cycles after its end.

    Arrivals are counted at flags: a wait names a flag and how much must have arrived there.
    """

    def __init__(self, bytes_per_cycle: float, latency: float):
        self.bytes_per_cycle = bytes_per_cycle
        self.latency = latency
        self.free = 0.0  # when the last transfer ends
        self.last_arrival = 0.0
        self.read_bytes = 0
        self.written_bytes = 0
        self._arrivals: dict[int, collections.deque] = collections.defaultdict(collections.deque)

    def start(self, now: float, flag: int, granules: int, *, reads: bool, writes: bool) -> None:
        """Queues a transfer of `granules` that reads from HBM, writes to it, or both."""
        size = max(granules, 0) * GRANULE_BYTES
        self.read_bytes += size * reads
        self.written_bytes += size * writes
        self.free = max(self.free, now) + size * (reads + writes) / self.bytes_per_cycle
        self.last_arrival = max(self.last_arrival, self.free + self.latency)
        self._arrivals[flag].append([self.free + self.latency, max(granules, 0)])

    def wait(self, now: float, flag: int, granules: int) -> float:
        """The time at which `granules` more have arrived at `flag`; `now` if nothing is under way."""
        arrivals = self._arrivals[flag]
        while granules > 0 and arrivals:
            taken = min(granules, arrivals[0][1])
            now = max(now, arrivals[0][0])
            granules -= taken
            arrivals[0][1] -= taken
            if not arrivals[0][1]:
                arrivals.popleft()
        return now


@dataclasses.dataclass(frozen=True)
class Execution:
    """What the emulation of one kernel saw. `counts`: executions of each bundle; times in cycles."""

    counts: tuple[int, ...]
    stall: float
    end: float
    read_bytes: int
    written_bytes: int
    calls: Mapping[str, int]
    unknown_operands: tuple[int, ...]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call of another kernel costs its caller: cycles, and bytes that have to pass the caller's channel."""

    cycles: float
    bytes: int


# ------------------------------------------------------------------------------------------------ instructions → Python

_ARITHMETIC = {"sadd.s32": "+", "ssub.s32": "-", "smul.u32": "*", "sand.u32": "&", "sor.u32": "|", "sxor.u32": "^"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC = {
    "por": "({} or {})",
    "pand": "({} and {})",
    "pnand": "(not ({} and {}))",
    "pxor": "({} != {})",
    "pnor": "(not ({} or {}))",
}


class _Opaque(Exception):
    """An operand or instruction the scalar emulation has no value for."""


@dataclasses.dataclass(frozen=True)
class _Expression:
    """Python for the value of an instruction, the registers it reads, and the SMEM address it loads from, if any."""

    text: str
    registers: frozenset[str]
    address: str = ""


class _Reader:
    """Turns operands into Python, collecting the registers they read."""

    def __init__(self, spaces: dict[str, int]):
        self.spaces = spaces
        self.registers: set[str] = set()

    def register(self, word: str) -> str:
        self.registers.add(word)
        return word

    def value(self, operand: str) -> str:
        """`%s3`, `17`, `[#allocation4 + $0x1]`, `%s3 [#allocation4]` (what stands behind is a note), a sum of them."""
        operand = re.sub(r"\[resolvable[^\]]*\]", "", operand).strip()
        if operand.startswith("%"):
            return self.register(re.split(r"[^\w]", operand[1:])[0])
        terms = [self._term(term.strip()) for term in operand.strip("[]").split("+")]
        return terms[0] if len(terms) == 1 else "(" + " + ".join(terms) + ")"

    def _term(self, term: str) -> str:
        if re.fullmatch(r"%\w+", term):
            return self.register(term[1:])
        if term.startswith("#"):
            return str(address_of(self.spaces, term[1:]))
        if re.fullmatch(r"\$?0x[0-9a-f]+", term):
            return str(int(term.lstrip("$"), 16))
        if re.fullmatch(r"-?\d+", term):
            number = int(term)
            return str(number - _INT32 if number >= _INT32 // 2 else number)
        raise _Opaque(term)

    def address(self, operand: str) -> str:
        found = re.fullmatch(r"\[smem:(\[.*\])\]", operand)
        if not found:
            raise _Opaque(operand)
        return self.value(found[1])

    def holds(self, predicate: Predicate) -> str:
        name = self.register(predicate.register)
        return f"(not {name})" if predicate.negated else name


def address_of(spaces: dict[str, int], name: str) -> int:
    """Where the allocation or operand `name` begins; a new place the first time it is named."""
    return spaces.setdefault(name, (16 * len(spaces) + 1) * _SPACE)


def _place(address: int) -> tuple[int, int]:
    """(beginning of its allocation, offset) of an address. Some DMAs have theirs shifted left by 4."""
    if address // _SPACE % 16 != 1:
        address >>= 4
    begin = address // _SPACE * _SPACE
    return begin, address - begin


def _expression(instruction: Instruction, spaces: dict[str, int]) -> _Expression:
    """Raises `_Opaque` for what is not scalar arithmetic."""
    read = _Reader(spaces)
    opcode, operands = instruction.opcode, instruction.operands
    address = ""
    if opcode in _ARITHMETIC and len(operands) == 2:
        text = f"({read.value(operands[0])} {_ARITHMETIC[opcode]} {read.value(operands[1])})"
        if opcode == "smul.u32":
            text = f"wrap{text}"
    elif opcode == "sshll.u32":
        text = f"wrap({read.value(operands[0])} << ({read.value(operands[1])} & 31))"
    elif opcode == "sshra.s32":
        text = f"({read.value(operands[0])} >> ({read.value(operands[1])} & 31))"
    elif opcode == "sshrl.u32":
        text = f"(({read.value(operands[0])} & {_INT32 - 1}) >> ({read.value(operands[1])} & 31))"
    elif opcode in ("smin.u32", "smin.s32", "smax.u32", "smax.s32"):
        # Unsigned: the compiler's idiom for |x| is smin.u32(-x, x).
        key = ", key=unsigned" if opcode.endswith("u32") else ""
        text = f"{opcode[1:4]}({read.value(operands[0])}, {read.value(operands[1])}{key})"
    elif opcode in ("smov", "pmov"):
        text = read.value(operands[0])
        predicate = instruction.predicate
        if predicate and predicate.otherwise:
            text = f"({text} if {read.holds(predicate)} else {read.value(predicate.otherwise)})"
    elif opcode.startswith("int_to_ptr"):
        text = read.value(operands[0])
    elif opcode.startswith("scalar_lea"):
        text = "(" + " + ".join(read.value(operand) for operand in operands) + ")"
    elif opcode == "scalar_select":
        condition, true, false = map(read.value, operands)
        text = f"({true} if {condition} else {false})"
    elif opcode.startswith("scmp."):
        _, comparison, kind = opcode.split(".")[:3]
        sides = [read.value(operand) for operand in operands]
        if kind == "u32":
            sides = [f"({side} & {_INT32 - 1})" for side in sides]
        elif kind != "s32":
            raise _Opaque(opcode)
        text = f"({sides[0]} {_COMPARISONS[comparison]} {sides[1]})"
    elif opcode in _LOGIC:
        text = _LOGIC[opcode].format(read.value(operands[0]), read.value(operands[1]))
    elif opcode == "pneg":
        text = f"(not {read.value(operands[0])})"
    elif opcode == "reloc":
        text = "0"
    elif opcode == "scalar_parameter_address":
        text = str(address_of(spaces, f"parameter {operands[0]}"))
    elif opcode in ("sdivrem.u32 Rem", "sdivrem.u32 Div"):
        sign = "%" if opcode.endswith("Rem") else "//"
        text = f"(unsigned({read.value(operands[0])}) {sign} {read.value(operands[1])})"
    elif opcode == "spop.drf":  # the result of a division, when it is ready
        text = read.value(operands[0])
    elif opcode == "sld":
        address = read.address(operands[0])
        text = f"load({address})"
    elif opcode == "sphi":  # which one is chosen depends on where control comes from: see _Program._phis
        text = ", ".join(read.value(operand) for operand in operands)
    elif opcode.startswith("inlined_call_operand"):
        text = str(address_of(spaces, f"operand {operands[0]}"))
    else:
        raise _Opaque(opcode)
    return _Expression(text, frozenset(read.registers), address)


def _unsigned(value: int) -> int:
    return value & (_INT32 - 1)


def _wrap(value: int) -> int:
    """`value` as a 32-bit signed integer; an address, which is never so small, stays."""
    if value >= _SPACE:
        return value
    value &= _INT32 - 1
    return value - _INT32 if value >= _INT32 // 2 else value


# --------------------------------------------------------------------------------------------------------------- slice


@dataclasses.dataclass(frozen=True)
class _Store:
    """A store to SMEM, as Python. `value` is None if it has none the emulation can compute."""

    condition: str
    address: str
    value: str | None
    registers: frozenset[str]


@dataclasses.dataclass(frozen=True)
class _Slice:
    """The registers and stores that control flow and DMAs depend on."""

    values: Mapping[str, _Expression]
    stores: Mapping[Instruction, _Store]
    opaque: frozenset[str]  # registers without a value


def _translate(
    instructions: Sequence[Instruction], spaces: dict[str, int]
) -> tuple[dict[str, _Expression], dict[Instruction, _Store], set[str]]:
    """Every scalar register and every store as Python, and the registers that scalar arithmetic alone does not give."""
    values: dict[str, _Expression] = {}
    stores: dict[Instruction, _Store] = {}
    opaque: set[str] = set()
    for one in instructions:
        if one.opcode == "sst":
            with contextlib.suppress(_Opaque):  # an address that cannot be read
                stores[one] = _store(one, spaces)
        elif one.result:
            try:
                values[one.result] = _expression(one, spaces)
            except (_Opaque, ValueError, IndexError, KeyError):
                opaque.add(one.result)
    return values, stores, opaque


def _store(one: Instruction, spaces: dict[str, int]) -> _Store:
    read = _Reader(spaces)
    address = read.address(one.operands[0])
    condition = read.holds(one.predicate) if one.predicate else ""
    value = None
    with contextlib.suppress(_Opaque):
        value = read.value(one.operands[1])
    return _Store(condition, address, value, frozenset(read.registers))


def _slice(instructions: Sequence[Instruction], spaces: dict[str, int], known: Collection[int] | None) -> _Slice:
    """What branches, DMAs and waits need. SMEM's contents before are known at the addresses `known`; None: anywhere."""
    values, stores, opaque = _translate(instructions, spaces)
    places: dict[str, list[Instruction]] = collections.defaultdict(list)  # address → stores to it
    for one, store in stores.items():
        places[store.address].append(one)
    given = {one.address for one in values.values()} if known is None else set(map(str, known))

    def lost(store: _Store) -> bool:
        return store.value is None or not opaque.isdisjoint(store.registers)

    changed = True
    while changed:  # what is computed from an opaque value, or passes through a fixed place that holds one, is opaque
        opaque_places = {store.address for store in stores.values() if store.address.isdigit() and lost(store)}
        found = {
            name
            for name, expression in values.items()
            if name not in opaque
            and (
                any(register in opaque or register not in values for register in expression.registers)
                or expression.address in opaque_places
                or (expression.address and expression.address not in given and expression.address not in places)
            )
        }
        opaque |= found
        changed = bool(found)

    needed: set[str] = set()
    kept: dict[Instruction, _Store] = {}
    work: list[str] = []

    def keep(one: Instruction) -> None:
        if one not in kept and not lost(stores[one]):
            kept[one] = stores[one]
            work.extend(stores[one].registers)

    for one in instructions:
        if one.opcode.startswith(("sbr", "dma")):
            work += [one.predicate.register] if one.predicate else []
            work += re.findall(r"%(\w+)", " ".join(one.operands))
        elif one in stores and "_spill" not in one.operands[0]:
            keep(one)  # it may be read through any address
    while work:
        name = work.pop()
        if name in needed or name in opaque or name not in values:
            continue
        needed.add(name)
        work += values[name].registers
        for one in places.get(values[name].address, ()):
            keep(one)
    return _Slice({name: values[name] for name in needed}, kept, frozenset(opaque))


# --------------------------------------------------------------------------------------------------------- basic blocks


@dataclasses.dataclass(frozen=True)
class _Branch:
    target: int  # block
    back: bool  # to an earlier bundle: a loop
    taken: CodeType | None  # None: never


@dataclasses.dataclass(frozen=True)
class _Block:
    start: int
    end: int
    entered: CodeType | None  # assigns the phis, coming from above
    repeated: CodeType | None  # the same, coming from the end of the loop
    body: CodeType | None
    branch: _Branch | None


def _code(lines: Sequence[str], mode: str = "exec") -> CodeType | None:
    return compile("\n".join(lines), "<schedule>", mode) if lines else None


class _Program:
    """The slice of a schedule as basic blocks."""

    def __init__(self, schedule: Schedule, cells: Mapping[str, int] | None):
        self.schedule = schedule
        self.spaces: dict[str, int] = {}
        self.warnings: set[str] = set()
        self.cells = {address_of(self.spaces, name): value for name, value in (cells or {}).items()}
        instructions = [one for bundle in schedule.bundles for one in bundle.scalar]
        self.slice = _slice(instructions, self.spaces, None if cells is None else self.cells)
        self.space = {one.result: one.opcode.rpartition(".")[2] for one in instructions if one.result}
        self.blocks = self._blocks()

    def _blocks(self) -> list[_Block]:
        bundles, regions = self.schedule.bundles, self.schedule.regions
        leaders, branches = {0}, {}
        for index, bundle in enumerate(bundles):
            if bundle.mark:
                leaders.add(index)
            for one in bundle.scalar:
                if one.opcode.startswith("sbr"):
                    if not one.operands or int(one.operands[0]) not in regions:
                        self.warnings.add("a computed branch is taken to fall through")
                        continue
                    end = min(index + DELAY_SLOTS, len(bundles) - 1)
                    branches[end] = (index, one, regions[int(one.operands[0])])
                    leaders |= {end + 1, regions[int(one.operands[0])]}
        starts = sorted(leader for leader in leaders if leader < len(bundles))
        blocks = []
        for number, start in enumerate(starts):
            end = starts[number + 1] if number + 1 < len(starts) else len(bundles)
            branch = None
            if end - 1 in branches:
                index, one, target = branches[end - 1]
                branch = self._branch(one, bisect.bisect_right(starts, target) - 1, back=target <= index)
            body = [line for i in range(start, end) for line in self._bundle_lines(i, i - start)]
            blocks.append(_Block(start, end, self._phis(start, 0), self._phis(start, 1), _code(body), branch))
        return blocks

    def _branch(self, one: Instruction, target: int, *, back: bool) -> _Branch:
        if one.predicate is None:
            return _Branch(target, back, _code(["True"], "eval"))
        if one.predicate.register not in self.slice.values:
            self.warnings.add(
                "a loop depends on data: one trip is counted"
                if back
                else "a branch depends on data: its region is taken to be entered"
            )
            return _Branch(target, back, None)
        return _Branch(target, back, _code([_Reader(self.spaces).holds(one.predicate)], "eval"))

    def _phis(self, start: int, arrival: int) -> CodeType | None:
        """Assigns the phis of a loop's first bundle, all at once; `arrival` 0: from above, 1: from the loop's end."""
        phis = [
            one
            for one in self.schedule.bundles[start].scalar
            if one.opcode == "sphi" and one.result in self.slice.values
        ]
        if not phis:
            return None
        read = _Reader(self.spaces)
        chosen = [read.value(one.operands[min(arrival, len(one.operands) - 1)]) for one in phis]
        return _code([", ".join(one.result for one in phis) + ", = " + ", ".join(chosen) + ","])

    def _bundle_lines(self, index: int, offset: int) -> list[str]:
        """Python for a bundle: its registers, then what it does to memory. `offset`: cycles since the block began."""
        registers, effects = [], []
        for one in self.schedule.bundles[index].scalar:
            if one.opcode == "sst":
                if one in self.slice.stores:
                    store = self.slice.stores[one]
                    line = f"memory[{store.address}] = {store.value}"
                    effects.append(f"if {store.condition}: {line}" if store.condition else line)
            elif one.opcode.startswith("dma"):
                effects += self._dma(one, offset)
            elif one.opcode == "inlined_call":
                effects.append(f"call({offset}, {one.operands[0]!r})")
            elif one.opcode != "sphi" and one.result in self.slice.values:
                registers.append(f"{one.result} = {self.slice.values[one.result].text}")
        return registers + effects

    def _dma(self, one: Instruction, offset: int) -> list[str]:
        if "host" in one.opcode or one.opcode == "dma.done":
            return []
        read = _Reader(self.spaces)
        try:
            condition = read.holds(one.predicate) if one.predicate else "True"
            if one.opcode == "dma.done.wait":
                line = f"wait({offset}, {read.value(one.operands[0])}, {read.value(one.operands[1])})"
            else:
                source, granules, target, flag = one.operands[:4]
                origin, _, destination = one.opcode.rpartition(".")[2].partition("_to_")
                if one.opcode == "dma.general":  # the pointers say between which memories
                    origin, destination = self.space.get(source[1:], ""), self.space.get(target[1:], "")
                reads, writes = origin == "hbm", destination == "hbm"
                line = f"start({offset}, {read.value(flag)}, {read.value(granules)}, {reads}, {writes})"
                if destination == "smem":
                    line += f"; fill({self._known(source)}, {self._known(target)})"
                if not (reads or writes):
                    self.warnings.add("a copy that does not touch HBM is taken to last as long as the latency")
        except (_Opaque, ValueError, IndexError):
            self.warnings.add("a DMA could not be read and is not counted")
            return []
        if not read.registers <= set(self.slice.values):
            self.warnings.add("a DMA whose size or predicate depends on data is not counted")
            return []
        return [f"if {condition}: {line}"]

    def _known(self, operand: str) -> str:
        """Python for an operand that may have no value: then 0."""
        read = _Reader(self.spaces)
        text = read.value(operand)
        return text if read.registers <= set(self.slice.values) else "0"


# ----------------------------------------------------------------------------------------------------------- emulation


def execute(
    schedule: Schedule,
    channel: Channel,
    *,
    scalars: Mapping[int, Sequence[int]] | None = None,
    cells: Mapping[str, int] | None = None,
    costs: Mapping[str, Cost] | None = None,
) -> Execution:
    """Runs the scalar unit over `schedule`.

    channel: a fresh one; times are in cycles of the core.
    scalars: the SMEM words of the operands whose values are known, by operand index.
    cells: what SMEM holds before, by allocation; elsewhere nothing is known. None, for a kernel, which finds little
      there but the number of its core: everything is 0.
    costs: of the kernels that this one calls, if it is the program that calls them all.
    """
    scalars = scalars or {}
    program = _Program(schedule, cells)
    blocks = program.blocks
    operands = {
        address: int(name.removeprefix("operand ")) for name, address in program.spaces.items() if "operand" in name
    }
    memory = dict(program.cells)
    for address, index in operands.items():
        memory.update((address + place, _wrap(word)) for place, word in enumerate(scalars.get(index, ())))
    unknown: set[int] = set()
    calls: collections.Counter = collections.Counter()
    now = stall = 0.0

    def load(address: int) -> int:
        value = memory.get(address)
        if value is None:
            if (owner := operands.get(_place(address)[0])) is not None:
                unknown.add(owner)
            return 0
        return value

    def fill(source: int, target: int) -> None:
        index = operands.get(_place(source)[0])
        if index is not None and index in scalars:
            to = sum(_place(target))
            memory.update((to + place, _wrap(word)) for place, word in enumerate(scalars[index]))
        elif cells is None:
            unknown.add(-1 if index is None else index)

    def start(offset: int, flag: int, granules: int, reads: bool, writes: bool) -> None:
        channel.start(now + offset, flag, granules, reads=reads, writes=writes)

    def wait(offset: int, flag: int, granules: int) -> None:
        nonlocal now, stall
        waited = channel.wait(now + offset, flag, granules) - (now + offset)
        stall += waited
        now += waited

    def call(offset: int, callee: str) -> None:
        nonlocal now
        calls[callee] += 1
        cost = (costs or {}).get(callee)
        if cost is not None:
            channel.free = max(channel.free, now + offset) + cost.bytes / channel.bytes_per_cycle
            now = max(now + cost.cycles, channel.free - offset)

    names: dict[str, object] = dict.fromkeys([*program.slice.values, *program.slice.opaque], 0)
    functions: dict[str, Callable] = dict(
        load=load, fill=fill, start=start, wait=wait, call=call, wrap=_wrap, unsigned=_unsigned, min=min, max=max
    )
    names |= {**functions, "memory": memory}
    executed = [0] * len(blocks)
    warnings = set(program.warnings)
    number, back, steps = 0, False, 0
    while number < len(blocks):
        if steps == STEP_LIMIT:
            warnings.add(f"more than {STEP_LIMIT} blocks: the emulation was broken off")
            break
        steps += 1
        block = blocks[number]
        executed[number] += 1
        phis = block.repeated if back else block.entered
        if phis is not None:
            exec(phis, names)
        if block.body is not None:
            exec(block.body, names)
        now += block.end - block.start
        branch = block.branch
        if branch is not None and branch.taken is not None and eval(branch.taken, names):
            number, back = branch.target, branch.back
        else:
            number, back = number + 1, False
    counts = [0] * len(schedule.bundles)
    for block, count in zip(blocks, executed, strict=True):
        counts[block.start : block.end] = [count] * (block.end - block.start)
    if -1 in unknown:
        warnings.add("scalars were copied from memory whose values are not known: read as 0")
    return Execution(
        counts=tuple(counts),
        stall=stall,
        end=max(now, channel.last_arrival),
        read_bytes=channel.read_bytes,
        written_bytes=channel.written_bytes,
        calls=dict(calls),
        unknown_operands=tuple(sorted(unknown - {-1})),
        warnings=tuple(sorted(warnings)),
    )
