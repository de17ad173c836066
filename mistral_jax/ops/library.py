"""The library of C++ kernels: compiled once, kept among the user's caches, registered with XLA.

A library is used only where its bytes are those that were written: a damaged one, once mapped into
memory, would end the process. Whatever goes wrong is said in one line, and XLA's operations stand
in.
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
# Of matrices, keys and values.
DTYPES = ("float32", "bfloat16", "int8")
# Rows up to which products are faster here than XLA's; of int8, where the processor multiplies
# bytes, any number.
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

# Set while they are compiled, for who tells the user what takes long.
compiling = threading.Event()


@functools.cache
def load() -> ctypes.CDLL | None:
    """Compiles the kernels or finds them compiled, and registers them; None if that failed.

    It is done once a process, so a failure is told once.
    """
    try:
        library = _open()
        for name in TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(f"mistral_jax_{name}", handler, platform="cpu")
    except Exception as error:  # An FFI that is not the library's raises what JAX happens to.
        _logger.warning("no C++ kernels: %s; %s", _in_a_line(error), _COST)
        return None
    return library


def find_compiler() -> list[str] | None:
    """Returns the C++ compiler's command, from CXX or the system's; None where there is none."""
    words = shlex.split(os.environ.get("CXX") or "c++")
    if not words or (path := shutil.which(words[0])) is None:
        return None
    return [path, *words[1:]]


def _open() -> ctypes.CDLL:
    """Opens the library that is kept, or compiles it, for this process alone if need be."""
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
        # Whole or not at all, whoever else compiles it now.
        return ctypes.CDLL(str(made.replace(folder / f"{key}-{_digest(made.read_bytes())}.so")))


def _find(folder: Path, key: str) -> Path | None:
    """Returns a library that is kept under `key`, and removes those that are damaged."""
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            return path
        path.unlink(missing_ok=True)
    return None


def _key(compiler: Sequence[str]) -> str:
    """Returns a digest of what a library depends on: any other compiler or jaxlib gets another."""
    interface = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api"
    texts = [path.read_bytes() for path in (*SOURCES, *sorted(interface.glob("*.h")))]
    about = texts, _FLAGS, list(compiler), jaxlib.__version__, machine.processor()
    return _digest(repr(about).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _run(command: Sequence[str]) -> None:
    """Runs a compiler; one that takes too long is ended together with what it started."""
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
