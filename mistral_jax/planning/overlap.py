"""How much of a program's communication overlaps with its computation, read from the schedule.

XLA has ordered the instructions of a compiled program, and the TPU compiler has written its
estimate of cycles at most of them. Walking through them in this order shows for how long a device
waits for collectives. Loads of weights into fast memory are not followed.
"""

import dataclasses
import re

from mistral_jax.parallel.hardware import Hardware
from mistral_jax.planning import collectives
from mistral_jax.planning.collectives import Collective
from mistral_jax.planning.estimate import estimate

_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLS = re.compile(r"calls=%?([\w.-]+)")
_DONE = re.compile(r" [a-z-]+-done\(.*?%([\w.-]+)")
_WHILE = re.compile(r" while\(.*body=%?([\w.-]+)")
_BRANCHES = re.compile(
    r" conditional\(.*(?:branch_computations=\{(.*?)\}|true_computation=(\S+), "
    r"false_computation=([\w.%-]+))"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=(\S+)")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The times of one run of a program on one device, in seconds.

    Attributes:
      work: time of all operations with an estimate. Kernels of Pallas have none.
      exchange: time of the collectives, one after another.
      exposed: time for which the device waits for collectives.
    """

    work: float = 0.0
    exchange: float = 0.0
    exposed: float = 0.0

    def plus(self, other: "Overlap", times: int = 1) -> "Overlap":
        """Adds the times of another program that runs after this one, `times` times."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Overlap(*(mine + times * more for mine, more in pairs))


def read(text: str, devices: int, hardware: Hardware, clock: float) -> Overlap:
    """Reads the overlap of a program that the TPU compiler has scheduled.

    A branch counts as the branch with the most work, and a loop of unknown length as one round.

    Args:
      text: `compiled.as_text()`.
      devices: number of devices that the program runs on.
      hardware: the chip.
      clock: cycles of a second.
    """
    named, entry = collectives.computations(text)

    def run(name: str) -> Overlap:
        lines = named[name]
        exchanges = [_exchange(name, line, named, devices) for line in lines]
        names = [_NAME.match(line)[1] for line in lines]
        of_name = {name: key for name, (key, _) in zip(names, exchanges, strict=True) if key}
        # A collective runs from the first instruction that names it to the last.
        keys = [
            key or of_name.get(done[1] if (done := _DONE.search(line)) else "", "")
            for line, (key, _) in zip(lines, exchanges, strict=True)
        ]
        last = {key: place for place, key in enumerate(keys)}
        total, ends, links = Overlap(), {}, {}
        for place, (line, key, (_, found)) in enumerate(zip(lines, keys, exchanges, strict=True)):
            now = total.work + total.exposed
            if key and key not in ends:
                seconds = _seconds(found, hardware)
                link = pairs[1] if (pairs := _PAIRS.search(line)) else ""
                links[link] = ends[key] = max(now, links.get(link, 0.0)) + seconds
                total = total.plus(Overlap(exchange=seconds))
            if cycles := _CYCLES.search(line):
                total = total.plus(Overlap(work=int(cycles[1]) / clock))
            elif loop := _WHILE.search(line):
                total = total.plus(run(loop[1]), collectives.trips(line, named))
            elif branches := _BRANCHES.search(line):
                called = re.findall(r"[\w.-]+", ",".join(filter(None, branches.groups())))
                total = total.plus(max(map(run, called), key=lambda branch: branch.work))
            if key and last[key] == place:
                wait = max(0.0, ends[key] - total.work - total.exposed)
                total = total.plus(Overlap(exposed=wait))
        return total

    return run(entry)


def _exchange(name: str, line: str, named, devices: int) -> tuple[str, list[Collective]]:
    """Returns a key of the collective that an instruction belongs to, and its arrays."""
    called = _CALLS.search(line)
    place, inner = (called[1], named[called[1]]) if called else (name, [line])
    for one in inner:
        if found := collectives.parse(place, one, named, devices):
            channel = _CHANNEL.search(one)
            return channel[1] if channel else _NAME.match(line)[1], found
    return "", []


def _seconds(found: list[Collective], hardware: Hardware) -> float:
    """Estimates the time of a collective; a permute in one direction has half of the link."""
    time = estimate(hardware, 0.0, 0.0, found).exchange
    return 2 * time if found[0].kind == "collective-permute" else time
