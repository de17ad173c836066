"""The compiler's own estimate of a program's time, read from its HLO text.

The TPU compiler writes the cycles that it expects of an operation into the program
(`estimated_cycles`). Operations of the entry and of loop bodies count, a loop's as often as it
runs. Copies in the background (`copy-start`) have no cycles: they overlap with other operations.
"""

import dataclasses
import re
from collections.abc import Iterable

from mistral_jax.parallel.hardware import Hardware
from mistral_jax.planning.hlo import Instruction, Program, arrays

# The share of the peak and of the bandwidth that a Pallas kernel without a stated cost reaches.
KERNEL_SHARE = 0.6

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COST = re.compile(r'"cost_estimate":\{([^}]*)\}')
_FIELD = re.compile(r'"(\w+)":"?(\d+)')
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}, ")
# Matrix products of Pallas's splash attention, for each pair of a block of queries and one of keys.
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a program.

    Attributes:
      name: name of its instruction.
      types: HLO type of its result.
      source: the path of names in the program that it comes from; "" if XLA added it.
      run: seconds of one run.
      times: number of runs in each run of the program, or in each step of decoding.
      kernel: whether it is a Pallas kernel, whose time is an estimate by arithmetic.
    """

    name: str
    types: str
    source: str
    run: float
    times: int
    kernel: bool

    @property
    def seconds(self) -> float:
        """Seconds of all runs."""
        return self.run * self.times


def read(text: str, chip: Hardware, steps: bool = False, attended: float = 1.0) -> list[Operation]:
    """Reads the operations of a program that take time.

    A conditional counts its most costly branch. In a loop of decoding steps, a conditional outside
    the model counts its branch for False, which greedy rows take: `engine/logits.py` and
    `engine/decode.py` put the work that rows must request into the branches for True.

    A Pallas kernel has no cycles. If the call states a cost, the kernel takes the time of its FLOPs
    at the chip's peak, or that of its bytes at the chip's bandwidth, whichever is longer; if it
    states none, `KERNEL_SHARE` of both is assumed. The bytes are then those of operands and
    results, and FLOPs are known for splash attention only.

    Args:
      text: `compiled.as_text()`.
      chip: the chip that the program is compiled for.
      steps: whether to count one step of the outermost loop, as for decoding, in place of the whole
        program.
      attended: share of the cost of the attention kernels that a run takes, because they skip keys.

    Returns:
      The operations, in the order of the program; empty if the compiler wrote no estimates.
    """
    program = Program(text)
    if chip.clock is None or not _CYCLES.search(text):
        return []

    def cost(name: str) -> float:
        walked = program.walk(follow, name)
        return sum(times * (_seconds(each, chip, attended) or 0) for each, times, _ in walked)

    def follow(instruction: Instruction) -> Iterable[str]:
        if instruction.operation in ("while", "call", "async-start"):
            return instruction.called
        if instruction.operation != "conditional":
            return ()
        if steps and "Transformer" not in instruction.source:
            return instruction.branches[:1]
        return [max(instruction.branches, key=cost)]

    found = []
    for instruction, times, loops in program.walk(follow):
        seconds = _seconds(instruction, chip, attended)
        if seconds and (loops or not steps):
            names = instruction.name, instruction.types, instruction.source
            found.append(Operation(*names, seconds, times, _is_kernel(instruction)))
    return found


def total(operations: Iterable[Operation]) -> float:
    """Returns the seconds of operations that run one after another."""
    return sum(operation.seconds for operation in operations)


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.operation == "custom-call" and '"tpu_custom_call"' in instruction.text


def _seconds(instruction: Instruction, chip: Hardware, attended: float) -> float | None:
    """Returns the seconds of one run of an operation; None if the compiler gives it no time."""
    if not _is_kernel(instruction):
        cycles = _CYCLES.search(instruction.text)
        return int(cycles[1]) / chip.clock if cycles else None
    share = attended if "/attn/" in instruction.source else 1.0
    if stated := _COST.search(instruction.text):
        cost = {name: int(value) for name, value in _FIELD.findall(stated[1])}
        flops, moved = cost.get("flops", 0), cost.get("bytes_accessed", 0)
        return share * max(flops / chip.flops, moved / chip.bandwidth)
    given = _OPERANDS.search(instruction.text)
    operands = arrays(given[1]) if given else []
    moved = sum(x.bytes for x in [*operands, *instruction.results])
    flops = share * _splash_flops(instruction, operands)
    return max(flops / chip.flops, moved / chip.bandwidth) / KERNEL_SHARE


def _splash_flops(instruction: Instruction, operands) -> float:
    """Counts the FLOPs of splash attention over all pairs of queries and keys; 0 = unknown."""
    named = re.search(r"splash_\w*?(fwd|dkv|dq)", instruction.text)
    wide = [x.shape for x in operands if len(x.shape) >= 3 and x.dtype in ("bf16", "f32")]
    if not named or len(wide) < 2:
        return 0
    *rows, heads, length, width = wide[0]
    pairs = heads * length * wide[1][-2]
    for size in rows:
        pairs *= size
    return 2 * _SPLASH[named[1]] * pairs * width
