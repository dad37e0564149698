"""What the instructions of a compiled program move and compute, read from its text."""

import dataclasses
import math
import re

_BITS = {"pred": 8, "bf16": 16, "token": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?)\s([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
# They run other computations, whose instructions are counted by themselves.
CONTROL = ("while", "conditional", "call", "async-start", "async-done", "async-update")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, executed once.

    bytes: its operands and its results. flops: of the products in it; None for a custom call, which does not say. A
    fusion that updates a slice in place counts the whole array. `source` is JAX's name of what it came from.
    """

    name: str
    opcode: str
    bytes: int
    flops: int | None
    source: str


def instructions(text: str) -> dict[str, Instruction]:
    """Every instruction of a compiled program (`Compiled.as_text()`) by name, those of inner computations included."""
    parsed: dict[str, tuple[str, str, str, str]] = {}  # name → computation, type, opcode, the rest
    computation = ""
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            name, kind, opcode, rest = found.groups()
            parsed[name] = computation, kind, opcode, rest
        elif found := _COMPUTATION.match(line):
            computation = found[1]
    types = {name: kind for name, (_, kind, _, _) in parsed.items()}
    products: dict[str, int | None] = {}  # computation → flops of its products
    own: dict[str, int | None] = {}
    for name, (computation, kind, opcode, rest) in parsed.items():  # a computation comes before what calls it
        own[name] = _flops(kind, opcode, rest, types, products)
        before, mine = products.get(computation, 0), own[name]
        products[computation] = None if before is None or mine is None else before + mine
    return {
        name: Instruction(
            name,
            opcode,
            sum(_bytes(part) for part in (kind, *(types.get(x, "") for x in _operands(rest)))),
            own[name],
            source[1] if (source := re.search(r'op_name="([^"]*)"', rest)) else "",
        )
        for name, (_, kind, opcode, rest) in parsed.items()
    }


def _operands(rest: str) -> list[str]:
    depth, end = 1, len(rest)
    for i, letter in enumerate(rest):
        depth += (letter in "([{") - (letter in ")]}")
        if not depth:
            end = i
            break
    return re.findall(r"%([\w.-]+)", rest[:end])


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(kind)]


def _bytes(kind: str) -> int:
    bits = 0
    for dtype, dims in _shapes(kind):
        digits = re.match(r"[a-z]+(\d+)", dtype)  # f32, s8, f8e4m3fn
        bits += math.prod(dims) * (_BITS[dtype] if dtype in _BITS else int(digits[1]) if digits else 0)
    return bits // 8


def _flops(kind: str, opcode: str, rest: str, types: dict[str, str], products: dict[str, int | None]) -> int | None:
    if opcode == "custom-call":
        return None
    if opcode == "fusion":
        called = re.search(r"calls=%?([\w.-]+)", rest)
        return products.get(called[1], 0) if called else 0
    if opcode not in ("dot", "convolution"):
        return 0
    size = math.prod(_shapes(kind)[0][1])
    left, right = (_shapes(types.get(name, "f32[]"))[0][1] for name in _operands(rest)[:2])
    if opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2 * size * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=\w+_(\w+)->", rest)
    return 2 * size * math.prod(right) // max(right[labels[1].index("o")] if labels else 1, 1)
