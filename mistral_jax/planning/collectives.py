"""The collectives of a compiled program, read from its HLO text.

XLA has partitioned the program by then, so the text describes what one device does.
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
_BODY = re.compile(r"body=%?([\w.-]+)")
_OPERAND = re.compile(r"%([\w.-]+)")
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# HLO writes groups in three ways: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'b'}.
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
      dtype: XLA's name of the dtype: "f32", "bf16", "s32", "pred".
      shape: shape of the result on one device.
      bytes: size of the result on one device.
      group: number of devices that exchange with each other.
      times: number of times it runs in each run of the program; a loop of unknown length counts
        once.
      loops: number of loops around it.
      source: the path of names in the program that it comes from.
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
        """Bytes that a device sends in a ring of its group, which is optimal for large arrays."""
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
    """Reads the collectives of a program, one entry for each array.

    XLA may combine several arrays in one instruction.

    Args:
      text: `compiled.as_text()`.
      devices: number of devices that the program runs on.
    """
    named, entry = computations(text)
    # XLA may split a collective to overlap it with other work. It then appears in each piece of
    # that work, with the same channel.
    found: dict[str, list[Collective]] = {}
    for name, line, times, loops in _walk(named, entry, 1, 0):
        channel = _CHANNEL.search(line)
        arrays = parse(name, line, named, devices, times, loops)
        found.setdefault(channel[1] if channel else line, arrays)
    return [collective for parts in found.values() for collective in parts]


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the instructions of each computation in a program's text, and the entry's name."""
    named: dict[str, list[str]] = collections.defaultdict(list)
    current = entry = ""
    for line in text.splitlines():
        if (header := _COMPUTATION.match(line)) and not line.startswith(" "):
            current = header[1]
            entry = current if line.startswith("ENTRY") else entry
        elif " = " in line:
            named[current].append(re.sub(r"/\*.*?\*/", "", line))
    return named, entry


def _walk(named, name: str, times: int, loops: int) -> Iterator[tuple[str, str, int, int]]:
    """Yields each collective: its computation and text, how often it runs, the loops around it."""
    for line in named[name]:
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        if instruction[2].removesuffix("-start") in KINDS:
            yield name, line, times, loops
            continue  # It calls only a computation that adds two numbers.
        inner = times, loops
        if instruction[2] == "while":
            inner = times * trips(line, named), loops + 1
        called = _CALLED.findall(line)
        if branches := _BRANCHES.search(line):
            called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        for other in called:
            yield from _walk(named, other, *inner)


def trips(line: str, named: dict[str, list[str]]) -> int:
    """Returns the trip count of a loop, from XLA's note or the loop's limit; 1 if it is unknown.

    Args:
      line: the instruction of the loop.
      named: the instructions of each computation.
    """
    if known := _TRIPS.search(line):
        return int(known[1])
    limit = named[_CONDITION.search(line)[1]]
    condition = "\n".join(limit)
    counts = _CONSTANT.findall(condition)
    if len(counts) != 1 or "direction=LT" not in condition:
        return 1
    return math.ceil(int(counts[0]) / _step(limit, named[_BODY.search(line)[1]]))


def _step(condition: list[str], body: list[str]) -> int:
    """Returns what a loop adds to its counter in each round: more than 1 if XLA has unrolled it."""
    index = re.search(r" get-tuple-element\(.*index=(\d+)", "\n".join(condition))
    root = re.search(r"ROOT .* tuple\((.*?)\)", "\n".join(body))
    if not index or not root:
        return 1
    made = {line.split(" = ")[0].split()[-1].lstrip("%"): line for line in body}

    def operands(line, operation):
        found = re.search(rf" {operation}\((.*?)\)", line)
        return [made.get(name, "") for name in _OPERAND.findall(found[1])] if found else []

    following = operands(root[0], "tuple")[int(index[1])]
    added = [_CONSTANT.search(line) for line in operands(following, "add")]
    return next((int(constant[1]) for constant in added if constant), 1)


def parse(
    name: str,
    line: str,
    named: dict[str, list[str]],
    devices: int,
    times: int = 1,
    loops: int = 0,
) -> list[Collective]:
    """Reads the arrays of a collective, which may combine several; none of other instructions.

    Args:
      name: name of the computation that holds the instruction.
      line: the instruction.
      named: the instructions of each computation.
      devices: number of devices that the program runs on.
      times: number of times that the instruction runs.
      loops: number of loops around it.
    """
    instruction = _INSTRUCTION.match(line)
    if not instruction or instruction[2].removesuffix("-start") not in KINDS:
        return []
    if name.startswith("all-reduce-scatter"):
        # The TPU's fusion of an all-reduce and a slice sums only a part on each device.
        result = _INSTRUCTION.match(named[name][-1])[1]
        line = line.replace(instruction[1], result, 1).replace(" all-reduce(", " reduce-scatter(")
    shapes, operation = _INSTRUCTION.match(line).groups()
    kind, arrays = operation.removesuffix("-start"), _arrays(shapes)
    if operation.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
        # The type of an asynchronous start lists the operands, then the results.
        arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
    if kind == "all-to-all" and len(arrays) > 1:  # The tuple has one part for each device.
        dtype, shape, size = arrays[0]
        arrays = [(dtype, (len(arrays), *shape), size * len(arrays))]
    source = re.search(r'op_name="([^"]*)"', line)
    about = _group(line, devices), times, loops, source[1] if source else ""
    return [Collective(kind, *array, *about) for array in arrays]


def _arrays(shapes: str) -> list[tuple[str, tuple[int, ...], int]]:
    """Returns the dtype, the shape and the size in bytes of each array of an HLO type."""
    arrays = []
    for dtype, sizes in _ARRAY.findall(shapes):
        shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        arrays.append((dtype, shape, math.prod(shape) * bits // 8))
    return arrays


def _group(line: str, devices: int) -> int:
    """Returns the number of devices that take part in one collective."""
    if _PAIRS.search(line):
        return 2
    listed, size, mesh, axes = (_GROUPS.search(line) or re.match("()()()()", "")).groups()
    if listed:
        return len(listed.split(","))
    if size:
        return int(size)
    if mesh and axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        # 'a':(2)4 stands for a part of axis a, of size 4.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return devices
