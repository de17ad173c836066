"""The machine under a program: its caches, accelerators and speed. It loads no model."""

import functools
import os
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

_CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that later runs start faster.

    A folder that the user has named (JAX_COMPILATION_CACHE_DIR) stays; where none can be made,
    programs are compiled anew each time.
    """
    if os.environ.get(_CACHE_VARIABLE):
        return
    try:
        path = cache_folder("xla")
    except (OSError, RuntimeError):
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs add up: the default leaves out what compiles within a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def unseen_accelerator(devices: Path = Path("/dev")) -> str | None:
    """Returns a line about a GPU or TPU that is here but that JAX does not use, or None."""
    if os.environ.get("JAX_PLATFORMS") or jax.default_backend() != "cpu":
        return None
    for pattern, name, extra in (("nvidia[0-9]*", "GPU", "cuda13"), ("accel[0-9]*", "TPU", "tpu")):
        if any(devices.glob(pattern)):
            return (
                f"note: this machine has a {name} that JAX does not see, so the CPU is used; "
                f'install what it needs: pip install -U "jax[{extra}]"'
            )
    return None


def is_one_cpu() -> bool:
    """Whether what is traced now is for one CPU: no accelerator is here, and no mesh in use."""
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty


@functools.cache
def processor() -> str:
    """Returns what tells this processor's instructions from another's; on Linux, names of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return flags[0] if flags else f"{platform.machine()} {platform.processor()}"


def read_bandwidth() -> float:
    """Measures the bytes a second at which a device reads its memory: the best of five products.

    A matrix times a vector, which reads each number once, as decoding reads the weights.
    """
    matrix = jnp.ones((8192, 8192), jnp.float32)  # 256 MiB: more than any cache holds
    multiply = jax.jit(lambda matrix, vector: matrix @ vector)

    def seconds():
        began = time.perf_counter()
        multiply(matrix, matrix[0]).block_until_ready()
        return time.perf_counter() - began

    seconds()  # compiles
    return matrix.nbytes / min(seconds() for _ in range(5))


def cache_folder(name: str) -> Path:
    """Makes a folder among the user's caches, and returns it.

    Raises:
      OSError or RuntimeError: there is no home, or a read-only one.
    """
    path = _user_cache() / "mistral_jax" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _user_cache() -> Path:
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
