"""The communication in a compiled program: which collectives, of how many bytes, over which mesh axis, and whether the
schedule has something to compute meanwhile.

Read from the text of the scheduled program. What it cannot tell is time: an overlapped collective may still take longer
than the work beside it, and links are shared.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions that keep a chip busy. Moving (copy, slice) is not here: it is memory traffic, as communication is.
_WORK = ("fusion", "dot", "convolution", "custom-call", "while", "conditional", "call", "sort", "scatter", "reduce")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


def collectives(text: str, axes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The collectives of a scheduled program, in its order: [{"name", "kind", "bytes", "count", "axis", "overlapped",
    "branch"}].

    bytes: of one execution on one device, the larger of what goes in and what comes out. count: how often a run
    executes it, where the trip counts of the loops around it are known, else None. axis: of the mesh `axes` (name →
    size), "data" or "data+tensor"; None if its groups are along no axes. overlapped: it is asynchronous, and between
    its start and its end stands work on arrays. branch: of the conditionals around it, the outermost first, the indices
    of the branches that it stands in; `count` takes each to be run every time.
    """
    computations = dict(_computations(text))
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)
    found: list[dict[str, Any]] = []

    def visit(computation: str, count: int | None, branch: tuple[int, ...]) -> None:
        instructions = computations.get(computation, [])
        types = {one.name: one.type for one in instructions}
        for index, one in enumerate(instructions):
            kind, groups = _collective(one, computations)
            if kind and _goes_on(one):
                continue
            if kind:
                end = _end(one, instructions[index + 1 :])
                beside = instructions[index + 1 : index + 1 + end] if end is not None else []
                sends = lambda other: bool(_collective(other, computations)[0]) and not _continues(other)
                work = [other for other in beside if _works(other, types) and not sends(other)]
                result = one.type if end is None else instructions[index + 1 + end].type
                size = max(_bytes(result), sum(_bytes(types.get(name, "")) for name in one.operands))
                found.append(
                    {
                        "name": one.name,
                        "kind": kind,
                        "bytes": size,
                        "count": count,
                        "axis": _axis(groups, axes),
                        "overlapped": bool(work) and '"is_sync":true' not in one.attributes,
                        "branch": branch,
                    }
                )
            elif one.opcode in ("while", "conditional", "call"):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.attributes)
                known = int(trips[1]) if trips else None if one.opcode == "while" else 1
                for index, inner in enumerate(_called(one)):
                    inside = (*branch, index) if one.opcode == "conditional" else branch
                    visit(inner, count * known if count is not None and known is not None else None, inside)

    if entry:
        visit(entry[1], 1, ())
    return found


def _computations(text: str) -> Iterator[tuple[str, list[_Instruction]]]:
    """(name, its instructions in the order of the schedule) of every computation of a program."""
    name, instructions = "", list[_Instruction]()
    for line in text.splitlines():
        if begin := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name, instructions = begin[1], []
        elif line.startswith("}"):
            yield name, instructions
        elif found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line):
            kind, rest = _split_type(line[found.end() :])
            if call := re.match(r"([\w-]+)\(([^)]*)\)", rest):
                operands = tuple(re.findall(r"%([\w.-]+)", call[2]))
                instructions.append(_Instruction(found[1], kind, call[1], operands, rest[call.end() :]))


def _split_type(text: str) -> tuple[str, str]:
    """("(f32[8]{0}, u32[])", "all-gather-start(%x), …") of "(f32[8]{0}, u32[]) all-gather-start(%x), …"."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def _collective(one: _Instruction, computations: Mapping[str, list[_Instruction]]) -> tuple[str | None, str]:
    """(kind, attributes with its groups) of an instruction that communicates, or (None, "")."""
    own = one.opcode.removesuffix("-start")
    if own in _KINDS:
        return own, one.attributes
    if one.opcode in ("fusion", "async-start"):
        for called in _called(one):
            for inner in computations.get(called, []):
                kind, groups = _collective(inner, computations)
                if kind:  # TPU's reduce-scatter is an all-reduce fused with the slicing of its result
                    return "reduce-scatter" if called.startswith("all-reduce-scatter") else kind, groups
    return None, ""


def _called(one: _Instruction) -> list[str]:
    names = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)", one.attributes)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", one.attributes):
        names += re.findall(r"%?([\w.-]+)", branches)
    return names


def _continues(one: _Instruction) -> bool:
    """Whether an instruction works while it drives a collective that another has started: on v5e, fusions do."""
    return one.opcode == "fusion" and any(name.startswith("async_collective_fusion") for name in _called(one))


def _goes_on(one: _Instruction) -> bool:
    """Whether an instruction continues or ends a collective that has been counted where it starts."""
    return _continues(one) or (one.opcode == "fusion" and one.name.startswith("async-collective-done"))


def _end(one: _Instruction, after: list[_Instruction]) -> int | None:
    """Where in `after` what `one` started is done, or None if it starts nothing."""
    fused = one.opcode == "fusion" and one.name.startswith("async-collective-start")
    if not fused and not one.opcode.endswith("-start"):
        return None
    done = one.opcode.removesuffix("-start") + "-done"
    names = {one.name}
    for index, other in enumerate(after):
        if names & set(other.operands):
            if other.name.startswith("async-collective-done") if fused else other.opcode == done:
                return index
            if other.opcode == "async-update" or (fused and (other.opcode == "get-tuple-element" or _continues(other))):
                names.add(other.name)
    return None


def _works(one: _Instruction, types: Mapping[str, str]) -> bool:
    """Whether an instruction computes on arrays; what advances a loop counter does not count."""
    arrays = any(re.search(r"\[\d", types.get(name, "")) for name in (one.name, *one.operands))
    return one.opcode in _WORK and arrays


def _bytes(kind: str) -> int:
    """Of an array type, or of all arrays of a tuple that are not counters or flags."""
    total = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", kind):
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        total += math.prod(int(size) for size in shape.split(",") if size) * bits // 8
    return total


def _axis(attributes: str, axes: Mapping[str, int]) -> str | None:
    """The mesh axes along which the groups of a collective lie, "data+tensor", or None."""
    if named := re.search(r"replica_groups=mesh\[[^\]]*\] ?\{([^}]*)\}", attributes):
        return "+".join(re.findall(r"'([^']+)'", named[1])) or None
    ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes):
        coordinates = np.array(np.unravel_index(np.array(_sets(pairs[1])), ids.shape))  # [axis, pair, 2]
        moved = (coordinates[..., 0] != coordinates[..., 1]).any(-1)
        return "+".join(name for name, along in zip(axes, moved, strict=True) if along) or None
    groups = _groups(attributes)
    if groups is None:
        return None
    wanted = {frozenset(group) for group in groups}
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(range(len(axes)), count):
            rows = np.moveaxis(ids, chosen, range(-count, 0)).reshape(-1, math.prod(ids.shape[i] for i in chosen))
            if {frozenset(row) for row in rows.tolist()} == wanted:
                return "+".join(list(axes)[i] for i in chosen)
    return None


def _groups(attributes: str) -> list[list[int]] | None:
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        return _sets(listed[1])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota is None:
        return None
    shape, source, order = ([int(size) for size in part.split(",")] if part else None for part in iota.groups())
    assert shape and source
    ids = np.arange(math.prod(source)).reshape(source)
    return (ids.transpose(order) if order else ids).reshape(shape).tolist()


def _sets(text: str) -> list[list[int]]:
    return [[int(one) for one in group.split(",") if one] for group in re.findall(r"\{([\d,]*)\}", text)]
