"""A parser of compiled HLO text: computations, instructions and loop trip counts."""

import dataclasses
import math
import re

BYTES = {"pred": 1, "token": 0, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: its element type, dimensions, and whether it is in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    main: bool = True

    @property
    def bytes(self) -> int:
        width = BYTES.get(self.dtype) or int(re.sub(r"\D", "", self.dtype.split("e")[0]) or 0) / 8
        return math.ceil(math.prod(self.dims) * width)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str  # the attributes after the operands
    root: bool
    value: str  # the text of the operands: a constant's value, a parameter's number

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def found(self, pattern: str) -> re.Match[str]:
        """``pattern`` in the text; ValueError for an instruction that XLA has written in a way that is not known."""
        match = re.search(pattern, self.text)
        if match is None:
            raise ValueError(f"no {pattern} in the instruction {self.name} = {self.opcode}(...){self.text}")
        return match

    def called(self, *attributes: str) -> list[str]:
        """The computations named by attributes such as ``calls``."""
        found = []
        for attribute in attributes:
            for one, several in re.findall(rf"\b{attribute}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.text):
                found += [one] if one else _NAME.findall(several)
        return found


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{", line)
            if head:
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            current = None
        elif (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shapes, rest = _shapes(rest[:end]), rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 2
    inside, behind = rest[:end], rest[end + 1 :]
    return Instruction(start[2], opcode, shapes, tuple(_NAME.findall(inside)), behind, bool(start[1]), inside)


def _closing(text: str) -> int:
    """The index after the bracket that closes the one at the start of ``text``."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return index + 1
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type. A layout with a memory space, such as S(1), is not in main memory."""
    return tuple(
        Shape(kind, tuple(int(n) for n in dims.split(",") if n), "S(" not in (layout or ""))
        for kind, dims, layout in _SHAPE.findall(text)
    )


def trip_count(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """The trip count of a loop: as noted by XLA, or from a condition ``counter < constant`` and the counter's increment
    (2 in an unrolled loop). None if the end is data-dependent."""
    noted = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.text)
    if noted:
        return int(noted[1])
    condition, body = (computations[loop.called(part)[0]] for part in ("condition", "body"))
    test = root = root_of(condition)
    if root.opcode == "fusion":  # whose operands are the constant and the counter
        test = root_of(computations[root.called("calls")[0]])
    operands = [condition[name] for name in root.operands]
    bounds = [int(i.value) for i in operands if i.opcode == "constant"]
    counters = [i for i in operands if i.opcode == "get-tuple-element"]
    if test.opcode != "compare" or "direction=LT" not in test.text or len(bounds) != 1 or len(counters) != 1:
        return None
    index = int(counters[0].found(r"index=(\d+)")[1])
    step = _constant_part(body, root_of(body).operands[index], computations)
    return math.ceil(bounds[0] / step) if step else None


def root_of(computation: Computation) -> Instruction:
    """The root instruction, whose value the computation returns."""
    return next(i for i in computation.values() if i.root)


def _constant_part(computation: Computation, name: str, computations: dict[str, Computation]) -> int:
    """The constant c in an expression counter + c."""
    instruction = computation[name]
    if instruction.opcode == "constant":
        return int(instruction.value)
    if instruction.opcode == "fusion":
        inner = computations[instruction.called("calls")[0]]
        outer = sum(_constant_part(computation, operand, computations) for operand in instruction.operands)
        return outer + _constant_part(inner, root_of(inner).name, computations)
    if instruction.opcode in ("add", "copy", "bitcast"):
        return sum(_constant_part(computation, operand, computations) for operand in instruction.operands)
    return 0
