"""The collectives of a compiled program, read from its text. It compiles nothing.

The text is XLA's (HLO) after partitioning: what it says happens on one device.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Three ways to write groups: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'b'}.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]"
    r"|mesh\[([^\]]*)\](?:, device_ids=\(\S+\))?(?: \{([^}]*)\})?)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{\{")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange.

    Attributes:
      kind: one of `KINDS`.
      dtype: XLA's name of its numbers: "f32", "bf16", "s32", "pred".
      shape: of the result on one device.
      bytes: of the result on one device.
      group: devices that exchange with each other.
      times: how often it happens each time the program runs; a loop of unknown length counts once.
      loops: loops that it lies in.
      source: what it comes from: the path of names in the program.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    group: int
    times: int
    loops: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends, along a ring of its group (the least for large arrays)."""
        share = (self.group - 1) / self.group
        match self.kind:
            case "all-reduce":
                return 2 * share * self.bytes
            case "reduce-scatter":
                return share * self.bytes * self.group
            case "collective-permute":
                return self.bytes
        return share * self.bytes


def read(text: str, devices: int) -> list[Collective]:
    """Reads the collectives of a program; those that were combined into one are told apart.

    Args:
      text: `compiled.as_text()`.
      devices: all that the program runs on.
    """
    computations, entry = _computations(text)
    # One that runs beside other work stands, under one channel, in each piece of that work.
    found: dict[str, list[Collective]] = {}
    for line, times, loops in _walk(computations, entry, 1, 0):
        channel = _CHANNEL.search(line)
        found.setdefault(channel[1] if channel else line, _parse(line, times, loops, devices))
    return [collective for parts in found.values() for collective in parts]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = collections.defaultdict(list)
    current = entry = ""
    for line in text.splitlines():
        if (header := _COMPUTATION.match(line)) and not line.startswith(" "):
            current = header[1]
            entry = current if line.startswith("ENTRY") else entry
        elif " = " in line:
            computations[current].append(re.sub(r"/\*.*?\*/", "", line))
    return computations, entry


def _walk(computations, name: str, times: int, loops: int) -> Iterator[tuple[str, int, int]]:
    """Yields each exchanging instruction, how often it runs, and the loops that it lies in."""
    for line in computations[name]:
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        if instruction[2].removesuffix("-start") in KINDS:
            yield line, times, loops
            continue  # What it calls adds two numbers.
        inner = times, loops
        if instruction[2] == "while":
            inner = times * _trips(line, computations), loops + 1
        called = _CALLED.findall(line)
        if branches := _BRANCHES.search(line):
            called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        for other in called:
            yield from _walk(computations, other, *inner)


def _trips(line: str, computations) -> int:
    """Returns how often a loop runs: as XLA notes, or to where it counts; 1 if neither is said."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = "\n".join(computations[_CONDITION.search(line)[1]])
    counts = _CONSTANT.findall(condition)
    return int(counts[0]) if len(counts) == 1 and "direction=LT" in condition else 1


def _parse(line: str, times: int, loops: int, devices: int) -> list[Collective]:
    """Reads an instruction; there is more than one array where several were combined."""
    shapes, operation = _INSTRUCTION.match(line).groups()
    kind, arrays = operation.removesuffix("-start"), _arrays(shapes)
    if operation.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
        # Its type names the operands too, and before the results.
        arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
    if kind == "all-to-all" and len(arrays) > 1:  # One part for each device.
        dtype, shape, size = arrays[0]
        arrays = [(dtype, (len(arrays), *shape), size * len(arrays))]
    source = re.search(r'op_name="([^"]*)"', line)
    about = _group(line, devices), times, loops, source[1] if source else ""
    return [Collective(kind, *array, *about) for array in arrays]


def _arrays(shapes: str) -> list[tuple[str, tuple[int, ...], int]]:
    """Returns the dtype, the shape and the bytes of each array of a type."""
    arrays = []
    for dtype, sizes in _ARRAY.findall(shapes):
        shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        arrays.append((dtype, shape, math.prod(shape) * bits // 8))
    return arrays


def _group(line: str, devices: int) -> int:
    """Returns how many devices take part in one exchange."""
    if _PAIRS.search(line):
        return 2
    listed, size, mesh, axes = (_GROUPS.search(line) or re.match("()()()()", "")).groups()
    if listed:
        return len(listed.split(","))
    if size:
        return int(size)
    if mesh and axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        # 'a':(2)4 is a part of axis a, of size 4.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return devices
