"""`Backend`: the devices that programs are traced for, and the kernels that they may use there.

It is chosen before anything is traced, and nothing below asks JAX what devices there are: so a
program can be traced on a CPU for a TPU, and each implementation be compared with the plain one.
"""

import dataclasses
from collections.abc import Sequence

import jax

from mistral_jax.base import machine
from mistral_jax.ops import cudnn, library


@dataclasses.dataclass(frozen=True)
class Backend:
    """What programs are traced for. `Backend()` stands for XLA's own operations on any device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      chip: what of it decides how something is computed: the compute capability of a GPU, "vnni"
        for a CPU that multiplies bytes.
      alone: whether programs run on one device, where no mesh is in use.
      kernels: names of the kernels that may be used: "native" (the C++ of `kernels.py`), "splash"
        (of a TPU), "cudnn" (of an NVIDIA GPU).
    """

    platform: str = "cpu"
    chip: str = ""
    alone: bool = False
    kernels: tuple[str, ...] = ()

    @classmethod
    def of(cls, devices: Sequence[jax.Device], planned: bool = False) -> "Backend":
        """Chooses for the devices that a model lies on.

        Args:
          devices: all of them, of one kind.
          planned: whether they are there to be compiled for, not to run anything. Their kernels
            are then assumed to work; planned CPU devices stand for others, and have none.
        """
        platform, alone = devices[0].platform, len(devices) == 1
        if platform == "tpu":
            return cls("tpu", alone=alone, kernels=("splash",))
        if platform in ("gpu", "cuda", "rocm"):
            # The capability of AMD's GPUs is a name, such as "gfx90a".
            chip = str(getattr(devices[0], "compute_capability", ""))
            major = chip.partition(".")[0]
            runs = major.isdigit() and int(major) >= 8 and (planned or cudnn.runs())
            return cls("gpu", chip, alone, ("cudnn",) if runs else ())
        if platform != "cpu" or planned or not alone:
            return cls(platform, alone=alone and platform != "cpu")
        chip = "vnni" if "vnni" in machine.processor() else ""
        return cls("cpu", chip, True, ("native",) if library.load() is not None else ())

    @property
    def is_one_cpu(self) -> bool:
        """Whether what is traced now is for one CPU: no mesh is in use."""
        return self.platform == "cpu" and self.alone and jax.sharding.get_abstract_mesh().empty

    @property
    def has_native(self) -> bool:
        """Whether what is traced now may call the C++ kernels."""
        return "native" in self.kernels and self.is_one_cpu


PLAIN = Backend()


def default() -> Backend:
    """Chooses for arrays that nobody has placed: they lie on the first device.

    Where a process has several accelerators, somebody may yet spread them, which XLA does with a
    CPU's kernels and cannot do with a TPU's.
    """
    devices = jax.local_devices()
    return Backend.of(devices[:1] if devices[0].platform == "cpu" else devices)
