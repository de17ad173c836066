"""The collectives of a compiled program, read from its HLO text.

XLA has partitioned the program by then, so the text describes what one device does.
"""

import dataclasses
import math
import re

from mistral_jax.planning.hlo import Array, Instruction, Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# HLO writes groups in three ways: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'b'}.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]"
    r"|mesh\[([^\]]*)\](?:, device_ids=\(\S+\))?(?: \{([^}]*)\})?)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{\{")


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
    # XLA may split a collective to overlap it with other work. It then appears in each piece of
    # that work, with the same channel.
    found: dict[str, list[Collective]] = {}
    for instruction, times, loops in Program(text).walk():
        if is_one(instruction):
            found.setdefault(channel(instruction), parse(instruction, devices, times, loops))
    return [collective for parts in found.values() for collective in parts]


def is_one(instruction: Instruction) -> bool:
    """Tells whether an instruction is a collective, or begins one that runs in the background."""
    return instruction.operation.removesuffix("-start") in KINDS


def channel(instruction: Instruction) -> str:
    """Returns what the pieces of one collective have in common."""
    found = _CHANNEL.search(instruction.text)
    if found is None:
        return instruction.text
    if "shard_map" not in instruction.source:
        return found[1]
    # JAX gives all collectives of all `shard_map` the same channel.
    return f"{found[1]} {instruction.source} {instruction.results}"


def parse(
    instruction: Instruction, devices: int, times: int = 1, loops: int = 0
) -> list[Collective]:
    """Reads the arrays of a collective, which may combine several.

    Args:
      instruction: the collective.
      devices: number of devices that the program runs on.
      times: number of times that it runs.
      loops: number of loops around it.
    """
    operation, arrays = instruction.operation, instruction.results
    kind = operation.removesuffix("-start")
    if operation.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
        # The type of an asynchronous start lists the operands, then the results.
        arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
    if kind == "all-to-all" and len(arrays) > 1:  # The tuple has one part for each device.
        arrays = [Array(arrays[0].dtype, (len(arrays), *arrays[0].shape))]
    about = _group(instruction.text, devices), times, loops, instruction.source
    return [Collective(kind, x.dtype, x.shape, x.bytes, *about) for x in arrays]


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
