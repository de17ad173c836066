"""The least time that a program takes on given hardware: the roofline. It measures nothing."""

import dataclasses
from collections.abc import Iterable

from mistral_jax.parallel.hardware import Hardware
from mistral_jax.planning.collectives import Collective

# "Each hop over an ICI link has some intrinsic overhead", "typically around 1us": the JAX scaling
# book, part 3 (https://jax-ml.github.io/scaling-book/sharding).
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The least seconds that a program takes, by what could bind it.

    Attributes:
      compute: of its matrix products.
      memory: of reading and writing device memory.
      exchange: of sending between devices, one collective after the other.
    """

    compute: float
    memory: float
    exchange: float

    @property
    def seconds(self) -> float:
        """The least time of all, where what can overlap does: the roofline."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def serial_seconds(self) -> float:
        """The time if exchanges overlap with nothing."""
        return max(self.compute, self.memory) + self.exchange

    @property
    def binds(self) -> str:
        """What takes longest."""
        times = dataclasses.asdict(self)
        return max(times, key=times.get)


def estimate(
    hardware: Hardware, flops: float, moved: float, collectives: Iterable[Collective]
) -> Estimate:
    """Estimates the time of a program.

    A collective takes the longer of what its bytes and its hops do, half way round a ring each way
    (the scaling book, part 3).

    Args:
      hardware: the chip.
      flops: of one device.
      moved: bytes that one device reads and writes.
      collectives: what the devices exchange.
    """
    exchange = 0.0
    for collective in collectives:
        rounds = 2 if collective.kind == "all-reduce" else 1
        hops = rounds * (collective.group // 2) * HOP_SECONDS
        exchange += collective.times * max(hops, collective.sent / hardware.link)
    return Estimate(flops / hardware.flops, moved / hardware.bandwidth, exchange)
