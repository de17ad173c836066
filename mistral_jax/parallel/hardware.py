"""The figures of accelerators, read from `configs/hardware.toml`."""

import dataclasses

from mistral_jax.base.fields import build
from mistral_jax.base.files import read_toml
from mistral_jax.config import CONFIG_DIR


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One chip; `configs/hardware.toml` defines the figures and names their sources.

    Attributes:
      name: full name.
      memory: device memory, bytes.
      bandwidth: memory bandwidth, bytes/s.
      flops: matrix FLOP/s in bfloat16.
      link: bytes/s sent along one mesh axis.
      source: address of the figures.
      topologies: slices that its compiler knows; empty if programs cannot be compiled without a
        chip.
      kinds: `jax.Device.device_kind` of this chip, and of chips with the same FLOP/s.
      clock: cycles/s of its matrix units, for estimates that its compiler counts in cycles; None if
        its compiler writes none.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    source: str
    topologies: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    clock: float | None = None


def known() -> dict[str, Hardware]:
    """Returns all accelerators by their short names."""
    path = CONFIG_DIR / "hardware.toml"
    return {
        name: build(Hardware, fields, f"{path}, {name}") for name, fields in read_toml(path).items()
    }
