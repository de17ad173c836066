"""The roofline: the least time that a program takes on given hardware, by arithmetic."""

import dataclasses
from collections.abc import Iterable

from mistral_jax.parallel.hardware import Hardware
from mistral_jax.planning.collectives import Collective

# "Each hop over an ICI link has some intrinsic overhead", "typically around 1us": the JAX scaling
# book, part 3 (https://jax-ml.github.io/scaling-book/sharding).
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The least time of a program, in seconds, for each limit of the hardware.

    Attributes:
      compute: time of the matrix products.
      memory: time to read and write device memory.
      exchange: time of the collectives, one after another.
    """

    compute: float
    memory: float
    exchange: float

    @property
    def seconds(self) -> float:
        """The least time of the program, with perfect overlap: the roofline."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def serial_seconds(self) -> float:
        """The least time if collectives overlap with nothing else."""
        return max(self.compute, self.memory) + self.exchange

    @property
    def binds(self) -> str:
        """The limit that takes longest: "compute", "memory" or "exchange"."""
        times = dataclasses.asdict(self)
        return max(times, key=times.get)


def estimate(
    hardware: Hardware, flops: float, moved: float, collectives: Iterable[Collective]
) -> Estimate:
    """Estimates the time of a program.

    Args:
      hardware: the chip.
      flops: FLOPs of one device.
      moved: bytes that one device reads and writes in its memory.
      collectives: the program's collectives.
    """
    exchange = sum(each.times * seconds(each, hardware) for each in collectives)
    return Estimate(flops / hardware.flops, moved / hardware.bandwidth, exchange)


def seconds(collective: Collective, hardware: Hardware) -> float:
    """Returns the least time of one run of a collective.

    It is that of its bytes or that of its hops, whichever is longer. A ring works in both
    directions, so there are hops around half of it (the scaling book, part 3).
    """
    rounds = 2 if collective.kind == "all-reduce" else 1
    hops = rounds * (collective.group // 2) * HOP_SECONDS
    return max(hops, collective.sent / hardware.link)
