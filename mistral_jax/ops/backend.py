"""`Backend`: the kind of device that a program is traced for, and the kernels that it may use.

It is chosen once, before tracing, and no traced function asks JAX for its devices. So a CPU can
trace the program of a TPU, and tests can compare each implementation with the plain one.
"""

import dataclasses
from collections.abc import Sequence

import jax

from mistral_jax.base import machine
from mistral_jax.ops import cudnn, library, triton

# JAX's names of the TPU v6e.
V6E = ("TPU v6 lite", "TPU v6e")


@dataclasses.dataclass(frozen=True)
class Backend:
    """The kind of device that programs are traced for.

    `Backend()` has no kernels: programs then use XLA's operations only, and run on any device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      chip: the feature of the chip that decides between implementations: the compute capability of
        a GPU, JAX's name of a TPU ("TPU v6 lite"), "vnni" for a CPU with instructions that multiply
        bytes.
      alone: whether programs run on one device, without a mesh.
      kernels: names of the kernels that programs may call: "native" (C++, on a CPU; see
        `kernels.py`), "splash" (training), "flash" (prompts) and "ragged" (decoding) on a TPU,
        "cudnn" (prompts), "cudnn-training" (with its gradient) and "triton" (decoding) on an NVIDIA
        GPU.
    """

    platform: str = "cpu"
    chip: str = ""
    alone: bool = False
    kernels: tuple[str, ...] = ()

    @classmethod
    def of(cls, devices: Sequence[jax.Device], planned: bool = False) -> "Backend":
        """Chooses the backend for the devices that hold a model.

        Args:
          devices: all devices of the model; they are of one kind.
          planned: whether programs are only compiled for these devices, and not run. Their kernels
            are then assumed to work. Planned CPU devices stand in for other devices, and get no
            kernels.
        """
        platform, alone = devices[0].platform, len(devices) == 1
        if platform == "tpu":
            chip = str(getattr(devices[0], "device_kind", ""))
            return cls("tpu", chip, alone, ("splash", "flash", "ragged"))
        if platform in ("gpu", "cuda", "rocm"):
            # AMD's GPUs have a name here, such as "gfx90a", and no cuDNN.
            chip = str(getattr(devices[0], "compute_capability", ""))
            major = chip.partition(".")[0]
            new = major.isdigit() and int(major) >= 8
            kernels = (name for name, runs in _OF_GPU.items() if new and (planned or runs()))
            return cls("gpu", chip, alone, tuple(kernels))
        if platform != "cpu" or planned or not alone:
            return cls(platform, alone=alone and platform != "cpu")
        chip = "vnni" if "vnni" in machine.processor() else ""
        return cls("cpu", chip, True, ("native",) if library.load() is not None else ())

    @property
    def by_heads(self) -> bool:
        """Whether keys and values are cached by heads, [B, K, S, H].

        Matrix products of accelerators, and kernels of a TPU, read the keys of one head at a time.
        In another order of axes they would need a transposed copy of the cache. cuDNN would need
        one of a cache by heads, and the Triton kernel takes the keys of a head with a stride.
        """
        return self.platform != "cpu" and "triton" not in self.kernels

    @property
    def writes_operands(self) -> bool:
        """Whether XLA should write large operands of products out before the products.

        For a v6e it otherwise computes a norm or an activation again for each tile of the product,
        on the vector unit, which then takes longer than the matrix unit.
        """
        return self.chip in V6E

    @property
    def is_one_cpu(self) -> bool:
        """Whether the program being traced runs on one CPU, without a mesh."""
        return self.platform == "cpu" and self.alone and jax.sharding.get_abstract_mesh().empty

    @property
    def has_native(self) -> bool:
        """Whether the program being traced may call the C++ kernels."""
        return "native" in self.kernels and self.is_one_cpu


PLAIN = Backend()
# Each kernel of an NVIDIA GPU, and the function that tries it.
_OF_GPU = {
    "cudnn": lambda: cudnn.runs(),
    "cudnn-training": lambda: cudnn.trains(),
    "triton": lambda: triton.runs(),
}


def default() -> Backend:
    """Chooses the backend for arrays without an explicit placement, which JAX puts on device 0.

    With several accelerators the caller may still spread the arrays over a mesh, and XLA cannot
    partition a TPU kernel. So the choice counts all accelerators, but only one CPU device.
    """
    devices = jax.local_devices()
    return Backend.of(devices[:1] if devices[0].platform == "cpu" else devices)
