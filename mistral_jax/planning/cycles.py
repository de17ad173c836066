"""The compiler's own estimate of a program's time, read from its HLO text.

The TPU compiler writes the cycles that it expects of an operation into the program
(`estimated_cycles`). Operations of the entry and of loop bodies count, a loop's as often as it
runs. Copies in the background (`copy-start`) have no cycles, and overlap with other operations as
far as these leave bandwidth; `read` reports them as operations that `total` does not count.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from mistral_jax.ops import flash
from mistral_jax.parallel.hardware import Hardware
from mistral_jax.planning import collectives, estimate, hlo
from mistral_jax.planning.hlo import Array, Instruction, Program, arrays

# The share of the peak and of the bandwidth that a Pallas kernel without a stated cost reaches.
KERNEL_SHARE = 0.6

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COST = re.compile(r'"cost_estimate":\{([^}]*)\}')
_FIELD = re.compile(r'"(\w+)":"?(\d+)')
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}, ")
# Names of kernels of attention.
_ATTENTION = re.compile(r"attend|attention|splash")
# Matrix products of splash attention for each block of queries and each of keys: in the forward
# pass, and for the gradients of keys and values, and of queries.
_SPLASH = re.compile(r"splash\w*?_(fwd|dkv|dq)")
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
# Operations that run a computation in the background.
_STARTS = ("async-start", "call-start")
# Names in the path of an operation that JAX adds to those of the model's modules.
_ADDED = re.compile(
    r"while|body|cond|closed_call|checkpoint|rematted_computation|branch_\d+_fun|shard_map|"
    r"pallas_call|custom_[jv]{2}p_call"
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a program.

    Attributes:
      name: name of its instruction.
      types: HLO type of its result.
      source: the path of names in the program that it comes from; "" if XLA added it.
      run: seconds of one run.
      times: number of runs in each run of the program, or in each step of decoding.
      kind: "compiled" if the compiler estimates it. Other times are arithmetic: "kernel" for a
        Pallas kernel, "wait" for the wait for a collective, "copy" for a copy in the background.
    """

    name: str
    types: str
    source: str
    run: float
    times: int
    kind: str = "compiled"

    @property
    def seconds(self) -> float:
        """Seconds of all runs."""
        return self.run * self.times

    @property
    def place(self) -> str:
        """Its place in the model, without the number of the layer, and what it computes there."""
        name = self.name.split(".")[0]
        *path, last = self.source.split("/")
        if not last:
            return f"{name} of {hlo.first_array(self.types)}, added by XLA"
        inside = [i for i, part in enumerate(path) if "Transformer" in part]
        modules = path[inside[-1] + 1 :] if inside else []
        names = [part for part in modules if part.isidentifier() and not _ADDED.fullmatch(part)]
        if self.kind == "kernel":
            names = [part for part in names if part not in name]
        where = re.sub(r"\blayers_\d+", "layers", "/".join(names)) or "Transformer"
        if not inside:
            where = "outside the model"
        if any("transpose(" in part for part in path):
            where += ", backward"
        elif "rematted_computation" in path:
            where += ", again"
        what = {"kernel": f"kernel {name}", "wait": "wait for an exchange"}.get(self.kind, last)
        return f"{where} ({what})"


def read(
    text: str, chip: Hardware, devices: int = 1, steps: bool = False, attended: float = 1.0
) -> list[Operation]:
    """Reads the operations of a program that take time.

    A conditional counts its most costly branch. In a loop of decoding steps, a conditional outside
    the model counts its branch for False, which greedy rows take: `engine/logits.py` and
    `engine/decode.py` put the work that rows must request into the branches for True.

    A Pallas kernel has no cycles. If the call states a cost, the kernel takes the time of its FLOPs
    at the chip's peak, or that of its bytes at the chip's bandwidth, whichever is longer. For the
    kernel of prompts the share of the peak is known (`flash.PEAK_SHARES`). If the call states no
    cost, `KERNEL_SHARE` of both is assumed. The bytes are then those of operands and results, and
    FLOPs are known for attention only.

    Collectives have no cycles. They take the time of the roofline (`estimate.seconds`), one after
    another, beginning with the first operation that carries them. An operation that needs the
    result waits for it, and the wait counts. A collective that is not in the background shares the
    links with those that are: it takes twice its time at most.

    Args:
      text: `compiled.as_text()`.
      chip: the chip that the program is compiled for.
      devices: number of devices that the program runs on.
      steps: whether to count one step of the outermost loop, as for decoding, in place of the whole
        program.
      attended: share of the cost of the attention kernels that a run takes, because they skip keys.

    Returns:
      The operations, in the order of the program; empty if the compiler wrote no estimates.
    """
    if chip.clock is None or not _CYCLES.search(text):
        return []
    reader = _Reader(Program(text), chip, devices, steps, attended)
    reader.run(reader.program.entry, not steps)
    return reader.found


class _Reader:
    """Goes through a program in the order of its schedule; `found` receives the operations."""

    def __init__(
        self, program: Program, chip: Hardware, devices: int, steps: bool, attended: float
    ):
        self.program, self.chip, self.devices = program, chip, devices
        self.steps, self.attended = steps, attended
        self.found: list[Operation] = []

    def run(self, name: str, counts: bool, times: int = 1) -> float:
        """Adds the operations of a computation, and returns its seconds.

        Args:
          name: name of the computation.
          counts: whether its operations count, or only those of the loops in it.
          times: number of its runs.
        """
        clock, links = 0.0, 0.0
        ready: dict[str, float] = {}
        carriers = self._carriers(name)
        last = {channel: names[-1] for channel, names in carriers.items()}
        carried = {each: channel for channel, names in carriers.items() for each in names}
        for instruction in self.program.computations[name]:
            before, kind = clock, "kernel" if _is_kernel(instruction) else "compiled"
            seconds = _seconds(instruction, self.chip, self.attended)
            if seconds:
                clock += self._add(instruction, seconds, times, counts, kind)
            if instruction.operation in ("copy-start", "slice-start"):
                # A copy's type names its result first, a slice's its operand.
                moved = instruction.results[instruction.operation == "slice-start"].bytes
                self._add(instruction, moved / self.chip.bandwidth, times, counts, "copy")
            for other in self._entered(instruction):
                loop = instruction.operation == "while"
                trips = self.program.trips(instruction) if loop else 1
                clock += trips * self.run(other, counts or loop, times * trips)
            channel = carried.get(instruction.name)
            if channel is None:
                continue
            if channel not in ready:
                own = sum(
                    estimate.seconds(each, self.chip)
                    for each in collectives.parse(self._collective(instruction), self.devices)
                )
                links, alone = max(links, before) + own, len(carriers[channel]) == 1
                if alone:  # It shares the links with those in the background, which end later.
                    ready = {each: end + own * (end > before) for each, end in ready.items()}
                ready[channel] = min(links, before + 2 * own) if alone else links
            if last[channel] == instruction.name and ready[channel] > clock:
                clock += self._add(instruction, ready[channel] - clock, times, counts, "wait")
        return clock

    def _add(self, instruction, seconds, times, counts, kind) -> float:
        if counts:
            names = instruction.name, instruction.types, instruction.source
            self.found.append(Operation(*names, seconds, times, kind))
        return seconds

    def _entered(self, instruction: Instruction) -> Iterable[str]:
        """Returns the computations whose operations run, and are not in `instruction`'s time."""
        if instruction.operation in ("while", "call"):
            return instruction.called
        if instruction.operation in _STARTS:
            return () if self._collective(instruction) else instruction.called
        if instruction.operation != "conditional":
            return ()
        if self.steps and "Transformer" not in instruction.source:
            return instruction.branches[:1]
        return [max(instruction.branches, key=self._cost)]

    def _cost(self, name: str) -> float:
        known = len(self.found)
        seconds = self.run(name, True)
        del self.found[known:]
        return seconds

    def _collective(self, instruction: Instruction) -> Instruction | None:
        """Returns the collective that an instruction is, or that it carries.

        A fusion carries one beside its own work. The SparseCore of a v6e runs one asynchronously.
        """
        if collectives.is_one(instruction):
            return instruction
        carries = instruction.operation in ("fusion", *_STARTS)
        inside = (
            other
            for name in (instruction.called if carries else ())
            for other, *_ in self.program.walk(name=name)
        )
        return next(filter(collectives.is_one, inside), None)

    def _carriers(self, name: str) -> dict[str, list[str]]:
        """Returns the names of the instructions that carry each collective of a computation."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        starts: dict[str, str] = {}
        for instruction in self.program.computations[name]:
            if collective := self._collective(instruction):
                channel = collectives.channel(collective)
                found[channel].append(instruction.name)
                starts[instruction.name] = channel
            elif instruction.operation.endswith("-done"):
                start = re.search(r"-done\([^%)]*%?([\w.-]+)", instruction.text)
                if start and start[1] in starts:
                    found[starts[start[1]]].append(instruction.name)
        return found


def total(operations: Iterable[Operation]) -> float:
    """Returns the seconds of operations that run one after another, without copies."""
    return sum(operation.seconds for operation in operations if operation.kind != "copy")


def copied(operations: Iterable[Operation]) -> float:
    """Returns the seconds of the copies in the background, if nothing else uses the bandwidth."""
    return sum(operation.seconds for operation in operations if operation.kind == "copy")


def costly(operations: Iterable[Operation], count: int = 5) -> list[tuple[str, float, int]]:
    """Returns the most costly places: names, seconds of all their operations, and their number.

    The operations of all layers are joined.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    runs: dict[str, int] = collections.defaultdict(int)
    for operation in operations:
        if operation.kind == "copy":
            continue
        seconds[operation.place] += operation.seconds
        runs[operation.place] += operation.times
    largest = sorted(seconds, key=seconds.get, reverse=True)[:count]
    return [(place, seconds[place], runs[place]) for place in largest]


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.operation == "custom-call" and '"tpu_custom_call"' in instruction.text


def _seconds(instruction: Instruction, chip: Hardware, attended: float) -> float | None:
    """Returns the seconds of one run of an operation; None if the compiler gives it no time."""
    if not _is_kernel(instruction):
        cycles = _CYCLES.search(instruction.text)
        return int(cycles[1]) / chip.clock if cycles else None
    share = attended if _ATTENTION.search(instruction.name) else 1.0
    if stated := _COST.search(instruction.text):
        cost = {name: int(value) for name, value in _FIELD.findall(stated[1])}
        flops, moved = cost.get("flops", 0), cost.get("bytes_accessed", 0)
        peak = chip.flops * _peak_share(instruction, chip)
        return share * max(flops / peak, moved / chip.bandwidth)
    given = _OPERANDS.search(instruction.text)
    operands = arrays(given[1]) if given else []
    moved = sum(x.bytes for x in [*operands, *instruction.results])
    flops = share * _attention_flops(instruction, operands)
    return max(flops / chip.flops, moved / chip.bandwidth) / KERNEL_SHARE


def _peak_share(instruction: Instruction, chip: Hardware) -> float:
    """Returns the share of the peak at which the FLOPs that a kernel states count."""
    shares = flash.PEAK_SHARES if instruction.name.startswith(flash.NAME) else {}
    return next((share for kind, share in shares.items() if kind in chip.kinds), 1.0)


def _attention_flops(instruction: Instruction, operands: Sequence[Array]) -> float:
    """Counts the FLOPs of a kernel of attention over all pairs of queries and keys."""
    queries = [x.shape for x in operands if len(x.shape) >= 3 and x.dtype in ("bf16", "f32")]
    if not _ATTENTION.search(instruction.name) or not queries:
        return 0
    wide = [x.shape for x in operands if len(x.shape) >= 3 and x.shape[-1] == queries[0][-1]]
    keys = max(shape[-2] for shape in wide[1:] or wide)
    splash = _SPLASH.search(instruction.name)
    products = _PRODUCTS[splash[1]] if splash else 2
    return 2 * products * math.prod(queries[0]) * keys
