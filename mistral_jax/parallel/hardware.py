"""The figures of accelerators, from `configs/hardware.toml`. It measures nothing."""

import dataclasses

from mistral_jax.base.fields import build
from mistral_jax.base.files import read_toml
from mistral_jax.config import CONFIG_DIR


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


def known() -> dict[str, Hardware]:
    """Reads all accelerators, by their short names."""
    path = CONFIG_DIR / "hardware.toml"
    return {
        name: build(Hardware, fields, f"{path}, {name}") for name, fields in read_toml(path).items()
    }
