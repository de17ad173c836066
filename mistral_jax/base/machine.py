"""The machine under a program: its caches, accelerators and speed. It loads no model."""

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
# What a TPU's machine would say.
_NO_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that later runs start faster.

    A folder that the user has named (JAX_COMPILATION_CACHE_DIR) stays; where none can be made,
    programs are compiled anew each time. JAX removes no program that it cannot read, and none that
    is old: this does.
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
    # Small programs add up: the default leaves out what compiles within a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _mend_cache() -> None:
    """Has programs that JAX cannot read be removed, so that it writes them anew.

    JAX tells of them by a warning alone, and writes none over what is there. The warning names the
    program's function, which is the first part of its file's name. A program that could not be
    written whole is removed, too; that is shown, but once.
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
    """Removes the files that were used the longest ago, until `most` bytes are left."""
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
    """Has JAX open the devices that it will use; without a TPU, libtpu is kept quiet.

    Numbers of 64 bits, for which JAX_ENABLE_X64 asks, would serve no command. Call it after
    `distributed.initialize`, before anything that uses a device.

    Raises:
      ValueError: a platform that JAX_PLATFORMS names is not there.
    """
    jax.config.update("jax_enable_x64", False)
    # Where there is no TPU, libtpu prints errors about a pod's variables, and asks a server.
    absent = not any(any(devices.glob(pattern)) for pattern in ("accel*", "vfio/[0-9]*"))
    told = any(name in os.environ for name in ("TPU_WORKER_ID", *_NO_TPU))
    quiet = _NO_TPU if absent and not told else {}
    os.environ |= quiet
    try:
        jax.devices()
    except Exception as error:  # Of a platform without a device JAX raises an AssertionError.
        asked = jax.config.jax_platforms
        if not asked:
            raise
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        raise ValueError(
            f"JAX finds no device of JAX_PLATFORMS={asked!r}{': ' * bool(reason)}{reason}; unset "
            'it to use what is there, or install what it needs: pip install -U "jax[cuda13]"'
        ) from None
    finally:
        for name in quiet:
            del os.environ[name]


def unseen_accelerator(devices: Path = Path("/dev")) -> str | None:
    """Returns a line about a GPU or TPU that is here but that JAX does not use, or None.

    Raises:
      ValueError: a platform that JAX_PLATFORMS names is not there.
    """
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # It says the same, longer.
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
