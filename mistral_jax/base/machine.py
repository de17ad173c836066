"""Sets up the devices, compilation cache and cache folders of the machine a program runs on."""

import contextlib
import functools
import glob
import logging
import os
import platform
import re
import stat
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

_CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_CACHE_WARNING = re.compile(
    "Error (?P<what>reading|writing) persistent compilation cache entry for '(?P<name>[^']+)'"
)
# Environment variables that a TPU machine sets. Without them libtpu queries a metadata server.
_NO_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def use_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, so that later runs start faster.

    The cache is in JAX_COMPILATION_CACHE_DIR if that is set, else in the user's cache folder. If
    that folder cannot be created, programs are compiled in every run. JAX keeps unreadable and old
    entries for ever; this function removes them.
    """
    _mend_cache()
    if os.environ.get(_CACHE_VARIABLE):
        return
    try:
        path = cache_folder("xla")
    except (OSError, RuntimeError):
        return
    _remove_oldest(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # By default JAX does not cache programs that compile within a second, but these add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _mend_cache() -> None:
    """Removes cache entries that JAX cannot read, so that JAX writes them again.

    JAX only warns about such an entry and does not overwrite it. The warning names the program's
    function, with which the entry's file name begins. Entries that could not be written completely
    are removed too, and the first of these warnings is shown.
    """
    before, told = warnings.showwarning, []

    def show(message, *rest, **more):
        found = _CACHE_WARNING.match(str(message))
        folder = jax.config.jax_compilation_cache_dir
        if found is None or not folder:
            before(message, *rest, **more)
            return
        for path in Path(folder).glob(f"{glob.escape(found['name'])}-*-cache"):
            with contextlib.suppress(OSError):
                path.unlink()
        if found["what"] == "writing" and not told:
            told.append(message)
            before(message, *rest, **more)

    warnings.filterwarnings("always", message=_CACHE_WARNING.pattern)
    warnings.showwarning = show


def _remove_oldest(folder: Path, most: int = 4 << 30) -> None:
    """Removes the least recently used files until at most `most` bytes are left."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            known = path.lstat()
            if stat.S_ISREG(known.st_mode):
                files.append((max(known.st_atime, known.st_mtime), known.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size


def open_devices(devices: Path = Path("/dev")) -> None:
    """Initializes JAX's devices, without libtpu's errors on a machine that has no TPU.

    It also turns JAX_ENABLE_X64 off, because no command uses 64-bit numbers. Call it after
    `distributed.initialize` and before anything that uses a device.

    Args:
      devices: folder of the device files; tests pass another.

    Raises:
      ValueError: JAX_PLATFORMS names a platform without a device.
    """
    jax.config.update("jax_enable_x64", False)
    # Without a TPU, libtpu prints errors about missing variables and queries a metadata server.
    absent = not any(any(devices.glob(pattern)) for pattern in ("accel*", "vfio/[0-9]*"))
    told = any(name in os.environ for name in ("TPU_WORKER_ID", *_NO_TPU))
    quiet = _NO_TPU if absent and not told else {}
    os.environ |= quiet
    try:
        jax.devices()
    except Exception as error:  # JAX raises AssertionError for a platform without a device.
        asked = jax.config.jax_platforms
        if not asked:
            raise
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        raise ValueError(
            f"JAX finds no device for JAX_PLATFORMS={asked!r}{': ' * bool(reason)}{reason}; unset "
            'it to use what is there, or install what it needs: pip install -U "jax[cuda13]"'
        ) from None
    finally:
        for name in quiet:
            del os.environ[name]


def unseen_accelerator(devices: Path = Path("/dev")) -> str | None:
    """Returns a note if this machine has a GPU or TPU that JAX does not use, else None.

    Args:
      devices: folder of the device files; tests pass another.

    Raises:
      ValueError: JAX_PLATFORMS names a platform without a device.
    """
    # JAX logs a longer warning about the same.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    open_devices()
    if os.environ.get("JAX_PLATFORMS") or jax.local_devices()[0].platform != "cpu":
        return None
    for pattern, name, extra in (("nvidia[0-9]*", "GPU", "cuda13"), ("accel[0-9]*", "TPU", "tpu")):
        if any(devices.glob(pattern)):
            return (
                f"note: this machine has a {name} that JAX does not see, so the CPU is used; "
                f'install what it needs: pip install -U "jax[{extra}]"'
            )
    return None


@functools.cache
def processor() -> str:
    """Returns a string that identifies this CPU's instruction set, as a key for cached binaries."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return flags[0] if flags else f"{platform.machine()} {platform.processor()}"


def read_bandwidth() -> float:
    """Measures the memory bandwidth of the default device.

    It times a matrix-vector product, which reads each element once, as decoding reads the weights.

    Returns:
      Bytes per second, the best of five runs.
    """
    matrix = jnp.ones((8192, 8192), jnp.float32)  # 256 MiB: larger than any cache
    multiply = jax.jit(lambda matrix, vector: matrix @ vector)

    def seconds():
        began = time.perf_counter()
        multiply(matrix, matrix[0]).block_until_ready()
        return time.perf_counter() - began

    seconds()  # compiles
    return matrix.nbytes / min(seconds() for _ in range(5))


def cache_folder(name: str) -> Path:
    """Creates the folder `name` in the user's cache folder and returns its path.

    Raises:
      OSError or RuntimeError: the user has no home folder, or it is read-only.
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
