"""Accelerators: their figures, and the time that a program takes at best. It measures nothing."""

import dataclasses
from collections.abc import Iterable

from mistral_jax.config import CONFIG_DIR
from mistral_jax.files import read_toml
from mistral_jax.planning.collectives import Collective

# "Each hop over an ICI link has some intrinsic overhead", "typically around 1us": the JAX scaling
# book, part 3 (https://jax-ml.github.io/scaling-book/sharding).
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One chip; `configs/hardware.toml` says what the figures are, and where they are from.

    Attributes:
      name: the full name.
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      flops: matrix FLOP/s in bfloat16.
      link: bytes/s sent along one mesh axis.
      source: address of the figures.
      topologies: slices that its compiler knows; empty where there is no compiler without a chip.
      kinds: what JAX calls it, and chips that compute as fast (`jax.Device.device_kind`).
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    source: str
    topologies: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


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


def known() -> dict[str, Hardware]:
    """Reads all accelerators, by their short names."""
    table = read_toml(CONFIG_DIR / "hardware.toml")
    return {
        name: Hardware(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        for name, fields in table.items()
    }


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
