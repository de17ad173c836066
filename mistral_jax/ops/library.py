"""The shared library of C++ kernels: compiled once, cached on disk, registered with XLA.

The name of a cached library holds a digest of its bytes, which is checked before the library is
loaded, for a damaged one would crash the process. Any failure logs one line, and programs use XLA's
operations instead.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

from mistral_jax.base import machine

SOURCES = sorted((Path(__file__).parent / "native").iterdir())
# Dtypes of matrices, keys and values.
DTYPES = ("float32", "bfloat16", "int8")
# The most rows for which products are faster here than in XLA. int8 products have no such limit on
# a processor with instructions that multiply bytes.
MOST_ROWS = 8
TARGETS = (
    *(f"{name}_{dtype}" for name in ("product", "attend") for dtype in DTYPES),
    *("widen_bfloat16", "widen_int8", "take", "put"),
)
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w"),
    f"-DMOST_ROWS={MOST_ROWS}",
)
_SECONDS = 120
_COST = "XLA's own operations are used instead, and tokens take up to twice the time"

_logger = logging.getLogger(__name__)

# Set while the compiler runs, so that a command can tell the user what it is waiting for.
compiling = threading.Event()


@functools.cache
def load() -> ctypes.CDLL | None:
    """Finds the compiled kernels or compiles them, and registers them with XLA.

    The result is cached for the process, so that a failure is logged once.

    Returns:
      The library, or None after a failure.
    """
    try:
        library = _open()
        for name in TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(f"mistral_jax_{name}", handler, platform="cpu")
    except Exception as error:  # With an FFI of another version JAX may raise any type.
        _logger.warning("no C++ kernels: %s; %s", _in_a_line(error), _COST)
        return None
    return library


def find_compiler() -> list[str] | None:
    """Returns the command of the C++ compiler, from CXX or `c++`; None if it is not installed."""
    words = shlex.split(os.environ.get("CXX") or "c++")
    if not words or (path := shutil.which(words[0])) is None:
        return None
    return [path, *words[1:]]


def _open() -> ctypes.CDLL:
    """Opens the cached library, or compiles it.

    Without a writable cache folder it is compiled into a temporary folder, for this process only.
    """
    if (compiler := find_compiler()) is None:
        raise FileNotFoundError(f"there is no C++ compiler {os.environ.get('CXX') or 'c++'!r}")
    key = _key(compiler)
    try:
        folder = machine.cache_folder("kernels")
        if path := _find(folder, key):
            return ctypes.CDLL(str(path))
        work = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError) as error:
        _logger.warning(
            "C++ kernels cannot be kept, and are compiled at every start: %s",
            _in_a_line(error),
        )
        work = tempfile.TemporaryDirectory()
        folder = Path(work.name)
    with work:
        made = Path(work.name) / "kernels.so"
        sources = [str(path) for path in SOURCES if path.suffix == ".cc"]
        compiling.set()
        try:
            _run([*compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(made)])
        finally:
            compiling.clear()
        # A rename is atomic, so a process that compiles at the same time never sees half a file.
        return ctypes.CDLL(str(made.replace(folder / f"{key}-{_digest(made.read_bytes())}.so")))


def _find(folder: Path, key: str) -> Path | None:
    """Returns the cached library with this key, and deletes damaged ones."""
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            return path
        path.unlink(missing_ok=True)
    return None


def _key(compiler: Sequence[str]) -> str:
    """Returns a digest of everything that a library depends on, such as compiler and jaxlib."""
    interface = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api"
    texts = [path.read_bytes() for path in (*SOURCES, *sorted(interface.glob("*.h")))]
    about = texts, _FLAGS, list(compiler), jaxlib.__version__, machine.processor()
    return _digest(repr(about).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _run(command: Sequence[str]) -> None:
    """Runs a compiler; after a timeout, kills it and the processes that it started."""
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        ) as process,
    ):
        try:
            code = process.wait(_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{command[0]} took more than {_SECONDS} seconds") from None
            raise
        if code:
            said.seek(0)
            first = said.readline(1000).decode(errors="replace").strip()
            raise RuntimeError(
                f"{command[0]} ended with status {code}" + f": {first}" * bool(first)
            )


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
