"""`Backend`: the kind of device that a program is traced for, and the kernels that it may use.

It is chosen once, before tracing, and no traced function asks JAX for its devices. So a CPU can
trace the program of a TPU, and tests can compare each implementation with the plain one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mistral_jax.base import machine
from mistral_jax.ops import cudnn, library, triton

# JAX's names of two chips.
V5E, V6E = ("TPU v5 lite", "TPU v5e"), ("TPU v6 lite", "TPU v6e")
# By default an operation may use 16 MiB of the vector memory of a v5e and 32 MiB of a v6e, of which
# both have 128. With few rows, products of larger parts of matrices come closer to the bandwidth.
# XLA also aligns all temporaries in HBM to 16 KiB by default. A step of decoding has 50 to 80 for
# each layer that hold 512 bytes, most of them the pair of pointers of a copy in the background.
_TPU = (
    ("xla_tpu_scoped_vmem_limit_kib", "65536"),
    ("xla_jf_program_hbm_alignment_in_kib", "2"),
)
# With 64 MiB, XLA unrolls the products of many rows so far that a training step of one layer takes
# 5 minutes of CPU time to compile for a v5e; with 32 MiB, it takes 2, and runs 1 % longer. On a
# v6e, 64 MiB save 4 % of the time of products.
_V5E_TRAINING = (("xla_tpu_scoped_vmem_limit_kib", "32768"),)
# By default XLA splits a product with a partitioned matrix into a ring of small products, and reads
# and writes their sum in float32 in each round. This threshold, 1 TB, leaves the product whole: XLA
# then gathers the matrix while other products run.
_TPU_EXCHANGES = (("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000"),)
# Sums of gradients run while other work does. On a v5e, products carry parts of them; on a v6e, the
# SparseCores exchange gradients and matrices. "2d" and "nd" are for more than one axis of chips.
_V5E_EXCHANGES = (
    ("xla_enable_async_all_reduce", "true"),
    ("xla_enable_async_reduce_scatter_fusion", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter", "true"),
)
_V6E_EXCHANGES = (
    ("xla_tpu_enable_sparse_core_collective_offload_2d_all_gather", "true"),
    ("xla_tpu_enable_sparse_core_collective_offload_all_gather", "true"),
    ("xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter", "true"),
    ("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", "true"),
)


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
        `kernels.py`), "splash" (training), "flash" (prompts), "ragged" (decoding) and "grouped"
        (products of experts) on a TPU, "cudnn" (prompts), "cudnn-training" (with its gradient) and
        "triton" (decoding) on an NVIDIA GPU.
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
            return cls("tpu", chip, alone, ("splash", "flash", "ragged", "grouped"))
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
        one of a cache by heads, and the Triton kernel reads a head with a stride.
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

    @property
    def options(self) -> dict[str, str]:
        """Options of XLA's compiler for all programs of a model."""
        return dict(_TPU) if self.platform == "tpu" and self.chip in V5E + V6E else {}

    @property
    def training_options(self) -> dict[str, str]:
        """Options of XLA's compiler for training."""
        options = self.options
        if self.platform == "tpu" and self.chip in V5E:
            options |= dict(_V5E_TRAINING)
        if self.platform != "tpu" or self.alone:
            return options
        exchanges = {V5E: _V5E_EXCHANGES, V6E: _V6E_EXCHANGES}
        return options | dict(
            _TPU_EXCHANGES
            + next((found for chips, found in exchanges.items() if self.chip in chips), ())
        )


PLAIN = Backend()


class ModelJit:
    """`jax.jit` of a function of a model, with the compiler's options of the model's backend.

    It decorates a function whose first argument is the model, which is static.
    """

    def __init__(self, function: Callable, **options: Any):
        """Takes the options of `jax.jit`; `static_argnames` must name the model."""
        functools.update_wrapper(self, function)
        self._options = options
        self._programs: dict[tuple, Any] = {}

    def __call__(self, model: Any, *arguments: Any, **named: Any) -> Any:
        """Calls the function."""
        return self._of(model)(model, *arguments, **named)

    def trace(self, model: Any, *arguments: Any, **named: Any) -> jax.stages.Traced:
        """Traces the function, as `jax.jit(function).trace` does."""
        return self._of(model).trace(model, *arguments, **named)

    def lower(self, model: Any, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        """Traces and lowers the function, as `jax.jit(function).lower` does."""
        return self._of(model).lower(model, *arguments, **named)

    def _of(self, model):
        options = model.backend.options
        key = tuple(sorted(options.items()))
        if key not in self._programs:
            self._programs[key] = jax.jit(
                self.__wrapped__, compiler_options=options, **self._options
            )
        return self._programs[key]

    def _cache_size(self) -> int:
        # JAX keeps one cache for all of them, because they compile one function.
        return max((program._cache_size() for program in self._programs.values()), default=0)


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
