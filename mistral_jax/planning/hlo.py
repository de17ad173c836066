"""The text of a compiled program: its computations, and the instructions that a run executes.

`collectives.py` and `cycles.py` read programs through this module. The text is HLO, as
`compiled.as_text()` returns it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(true|false)_computation=%?([\w.-]+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_BODY = re.compile(r"body=%?([\w.-]+)")
_OPERAND = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array.

    Attributes:
      dtype: XLA's name of the dtype: "f32", "bf16", "s32", "pred".
      shape: shape on one device.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size on one device."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return math.prod(self.shape) * bits // 8


def arrays(types: str) -> list[Array]:
    """Reads the arrays of an HLO type, which may be a tuple."""
    return [
        Array(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(types)
    ]


def first_array(types: str) -> str:
    """Returns the first array of an HLO type, without its layout."""
    found = _ARRAY.search(types)
    return found[0] if found else types


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: its name, which is unique in the program.
      types: HLO type of its result.
      operation: name of the operation, such as "fusion" or "while".
      text: the whole instruction, in one line.
    """

    name: str
    types: str
    operation: str
    text: str

    @property
    def results(self) -> list[Array]:
        """The arrays of its result."""
        return arrays(self.types)

    @property
    def source(self) -> str:
        """The path of names in the program that it comes from; "" if XLA added it."""
        found = _SOURCE.search(self.text)
        return found[1] if found else ""

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional, of which one runs; that for False comes first."""
        if found := _BRANCHES.search(self.text):
            return [branch.strip().lstrip("%") for branch in found[1].split(",")]
        return [name for _, name in sorted(_TRUE_FALSE.findall(self.text))]

    @property
    def called(self) -> list[str]:
        """All computations that it calls."""
        return _CALLED.findall(self.text) + self.branches


class Program:
    """A compiled program.

    Attributes:
      computations: the instructions of each computation.
      entry: name of the computation that runs first.
    """

    def __init__(self, text: str):
        """Reads the text of a program."""
        self.computations: dict[str, list[Instruction]] = collections.defaultdict(list)
        current = self.entry = ""
        for line in _lines(text):
            if (header := _COMPUTATION.match(line)) and not line.startswith(" "):
                current = header[1]
                self.entry = current if line.startswith("ENTRY") else self.entry
            elif found := _INSTRUCTION.match(bare := re.sub(r"/\*.*?\*/", "", line)):
                self.computations[current].append(Instruction(*found.groups(), bare))

    def walk(
        self,
        follow: Callable[[Instruction], Iterable[str]] = lambda instruction: instruction.called,
        name: str | None = None,
        times: int = 1,
        loops: int = 0,
    ) -> Iterator[tuple[Instruction, int, int]]:
        """Yields each instruction, how often it runs, and the number of loops around it.

        Args:
          follow: returns the computations to enter at an instruction.
          name: the computation to begin in; None = the entry.
          times: how often that computation runs.
          loops: the number of loops around it.
        """
        for instruction in self.computations[self.entry if name is None else name]:
            yield instruction, times, loops
            inner = times, loops
            if instruction.operation == "while":
                inner = times * self.trips(instruction), loops + 1
            for other in follow(instruction):
                yield from self.walk(follow, other, *inner)

    def trips(self, loop: Instruction) -> int:
        """Returns the trip count of a loop: XLA's note or the loop's limit; 1 if it is unknown."""
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition = self.computations[_CONDITION.search(loop.text)[1]]
        text = "\n".join(instruction.text for instruction in condition)
        counts = _CONSTANT.findall(text)
        if len(counts) != 1 or "direction=LT" not in text:
            return 1
        body = self.computations[_BODY.search(loop.text)[1]]
        return math.ceil(int(counts[0]) / _step(text, body))


def _step(condition: str, body: Sequence[Instruction]) -> int:
    """Returns what a loop adds to its counter in each round: more than 1 if XLA has unrolled it."""
    made = {instruction.name: instruction for instruction in body}

    def operands(instruction):
        inside = instruction.text.partition(f" {instruction.operation}(")[2].partition(")")[0]
        return [made.get(name) for name in _OPERAND.findall(inside)]

    index = re.search(r" get-tuple-element\(.*index=(\d+)", condition)
    if not index or body[-1].operation != "tuple":
        return 1
    following = operands(body[-1])[int(index[1])]
    if following is None or following.operation != "add":
        return 1
    added = [_CONSTANT.search(x.text) for x in operands(following) if x is not None]
    return next((int(constant[1]) for constant in added if constant), 1)


def _lines(text: str) -> Iterator[str]:
    """Yields the lines of a program; an instruction with metadata in several lines is joined."""
    parts: list[str] = []
    for line in text.splitlines():
        # Continuation lines hold JSON; they begin with a quotation mark or a closing brace.
        if parts and (line.startswith('"') or (line.startswith("}") and line != "}")):
            parts.append(line)
            continue
        if parts:
            yield "".join(parts)
        parts = [line]
    yield "".join(parts)
