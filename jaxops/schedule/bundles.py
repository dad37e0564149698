"""The final schedule of a TPU kernel as the compiler prints it, parsed into bundles.

A TPU core executes one *bundle* of instructions a cycle. The compiler's dump lists them in order:

       0x5 LB: > { %s13 = sadd.s32 1, %s12  ;;  %p2 = scmp.ge.s32.totalorder %s13, 32  ;;  %v4 = vld [vmem:[%s5]] }
       0x6   : > { %7 = dma.hbm_to_vmem [thread:$0] (!%p2), /*hbm=*/%s3, /*size_in_granules=*/65536, … }
       0x7   : > { %9 = sbr.rel (!%p2) target = $region12 }

Registers are named once (`%s13_s4`: value 13 in scalar register 4). `(!%p2)` is a predicate, `%x = smov (%p2, %a), %b`
means b if p2 else a. A branch takes effect after `DELAY_SLOTS` more bundles.
"""

import dataclasses
import re

DELAY_SLOTS = 4

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(LH|LB|LE|PB|PF|CT)? *: ((?:> ?)*) ?\{", re.MULTILINE)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_INSTRUCTION = re.compile(r"(?:(%?\w+) = )?([\w.\-]+)\s*(.*)", re.DOTALL)
# Before the operands, or behind the address of a load or store.
_PREDICATE = re.compile(r"(\[smem:.*\]\] )?\((!?)%(p\w+)(?:, ([^)]*))?\),?\s*(.*)", re.DOTALL)
_NOTE = "\0"
_ENTRY = re.compile(r"/\* entry bundle: (.*?) \*/", re.DOTALL)


class ScheduleError(ValueError):
    """A dump that cannot be read, in one sentence."""


@dataclasses.dataclass(frozen=True, slots=True)
class Predicate:
    """Execute if `register` holds, or if it does not when `negated`. `otherwise`: the value of a move that does not."""

    register: str
    negated: bool
    otherwise: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """One scalar instruction; `result` is the register it sets ("" if none), without the %.

    A branch's only operand is the number of the region it jumps to, a call's the name of the callee ("" for those of
    the runtime), an operand of the kernel has its index. A division is "sdivrem.u32 Rem" or "sdivrem.u32 Div", by which
    of its results is meant.
    """

    result: str
    opcode: str
    predicate: Predicate | None
    operands: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Bundle:
    """What executes in one cycle. `mark` is the compiler's note ("LB" opens a loop's body, "PF" ends a region …)."""

    mark: str
    scalar: tuple[Instruction, ...]
    vector: tuple[str, ...]  # opcodes only: the emulator never computes a vector


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All bundles of a kernel; `regions` maps a region's number to its first bundle.

    `entry` is what the compiler says the kernel computes, as a line of HLO; `vector_spills` the number of VMEM slots
    that hold vector registers.
    """

    bundles: tuple[Bundle, ...]
    regions: dict[int, int]
    entry: str
    vector_spills: int


def parse(text: str, name: str) -> Schedule:
    """The schedule in `text`, a `…-final_bundles.txt`. Raises `ScheduleError` if bundles are missing."""
    starts = list(_BUNDLE.finditer(text))
    if not starts:
        raise ScheduleError(f"{name}: no bundle in its final schedule: the dump is empty or of another compiler")
    bundles: list[Bundle] = []
    regions: dict[int, int] = {}
    for index, start in enumerate(starts):
        if int(start[1], 16) != index:
            raise ScheduleError(f"{name}: bundle {index} of its final schedule is missing")
        body = text[start.end() : starts[index + 1].start() if index + 1 < len(starts) else len(text)]
        for region in _REGION.findall(body):
            regions.setdefault(int(region), index)
        if "}" not in body:
            raise ScheduleError(f"{name}: its final schedule breaks off in bundle {index}")
        bundles.append(_bundle(start[2] or "", body))
    entry = _ENTRY.search(text)
    spills = len(set(re.findall(r"vmem:\[#(allocation\d+_spill)", text)))
    return Schedule(tuple(bundles), regions, entry[1] if entry else "", spills)


def _bundle(mark: str, body: str) -> Bundle:
    scalar, vector = [], []
    body = re.sub(r"%(\d+)\b", r"%n\1", body)  # a result that is in no register has only a number
    for statement in _COMMENT.sub(_note, body).rsplit("}", 1)[0].split(" ;;  "):
        found = _INSTRUCTION.match(statement.strip())
        if found is None:
            continue
        result, opcode, rest = (found[1] or "").lstrip("%"), found[2], found[3].strip()
        rest, _, note = rest.partition(_NOTE)
        if opcode[0] == "v":
            vector.append(opcode)
            if not result.startswith(("s", "p")):
                continue
        rest = re.sub(r"^\[thread:\$\d+\]\s*", "", rest.strip())
        predicate = None
        if guarded := _PREDICATE.match(rest):
            predicate = Predicate(guarded[3], guarded[2] == "!", guarded[4])
            rest = (guarded[1] or "") + guarded[5]
        if opcode.startswith("inlined_call_operand"):
            index = re.search(r"index: (\d+), kind", rest)
            operands: tuple[str, ...] = (index[1],) if index else ()
        elif opcode == "inlined_call":
            operands = (note,)
        elif opcode.startswith("sbr"):
            target = re.search(r"\$region(\d+)", rest)
            operands = (target[1],) if target else ()
        elif opcode == "sst":
            address, _, value = rest.rpartition("]] ")
            operands = (address + "]]", value.strip())
        else:
            operands = _split(rest.strip())
        if opcode.startswith("sdivrem"):
            opcode = f"{opcode} {note}"
        scalar.append(Instruction(result, opcode, predicate, operands))
    return Bundle(mark, tuple(scalar), tuple(vector))


def _note(comment: re.Match) -> str:
    """What of a comment is more than a comment: the callee of a call, and which result of a division is meant."""
    called = re.match(r"/\* (?:%([\w.\-]+) = \S|k(Rem|Div) \*/)", comment[0])
    return _NOTE + (called[1] or called[2]) if called else ""


def _split(text: str) -> tuple[str, ...]:
    """The operands of `text`, separated by the commas outside of brackets."""
    parts, depth, begin = [], 0, 0
    for position, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[begin:position].strip())
            begin = position + 1
    parts.append(text[begin:].strip())
    return tuple(part for part in parts if part)
