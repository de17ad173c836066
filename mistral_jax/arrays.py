"""A tree of arrays on disk, as Orbax keeps it: written a part at a time, read onto devices.

All of Orbax is behind this file. It knows no models.
"""

import contextlib
import ctypes
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

Tree = Mapping[str, Any]


class Writer:
    """Writes a tree whose parts come one after the other, such as the layers of a model.

    Orbax works in a thread of its own: it goes on while the next part is made, and an interrupt
    does not find it half-way. Use it as a context; the tree is whole when that ends well.
    """

    def __init__(self, path: Path):
        """Prepares to write into the folder `path`, which must not exist yet."""
        self._path = path.absolute()
        self._thread = ThreadPoolExecutor(1)
        self._last: Future | None = None
        self._context = ocp.Context()
        saving = self._context.array.saving
        # Measured: plain files are written faster than Orbax's database, or than compressed ones.
        saving.use_ocdbt = saving.use_compression = False
        saving.storage_options.chunk_byte_size = 32 << 20  # What a device reads at least.
        self._context.memory.deepcopy_host_arrays = False

    def add(self, part: Tree) -> None:
        """Writes a part, once the part before is on the disk.

        Raises:
          OSError: that one could not be written.
        """
        self._submit(lambda: ocp.partial.save(self._path, part))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, error: type | None, *_: Any) -> None:
        with self._thread:
            if error is None:
                self._submit(lambda: ocp.partial.finalize(self._path))
                self._wait()

    def _submit(self, task: Callable[[], None]) -> None:
        self._wait()
        self._last = self._thread.submit(_run, self._context, task)

    def _wait(self) -> None:
        last, self._last = self._last, None
        try:
            if last:
                last.result()
        except (ValueError, OSError) as error:
            reason = re.search(r": ([^:]+) \[os_error_code", str(error))
            raise OSError(reason[1] if reason else str(error)) from error


def stored(path: Path) -> Tree:
    """Returns the tree at `path` with the shape and the dtype of each array, unread."""
    return _run(ocp.Context(), lambda: ocp.metadata(path.absolute()).metadata)


def read(path: Path, abstract: Tree) -> Tree:
    """Reads arrays, each straight onto its devices.

    Args:
      path: where a tree was written, wholly: of what is missing, Orbax leaks coroutines.
      abstract: the tree or a part of it, with the shapes, dtypes and shardings to read it as.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.memory.read_concurrent_bytes = bytes_in_flight(abstract)
    with _frugal_allocator():
        return _run(context, lambda: ocp.load(path.absolute(), abstract))


def bytes_in_flight(abstract: Tree) -> int:
    """Returns how much `read` has on its way at a time: as much as the largest array in float32."""
    return 1 + max(4 * math.prod(array.shape) for array in jax.tree.leaves(abstract))


@contextlib.contextmanager
def _frugal_allocator() -> Iterator[None]:
    """Has glibc return large blocks when they are freed.

    Else it keeps the buffers of Orbax's many threads: half the size of a model, measured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: None)
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 128 << 10)
    try:
        yield
    finally:  # To where it gets by itself in a program that uses large blocks.
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def _run(context: ocp.Context, task: Callable[[], Any]) -> Any:
    """Calls `task` in a context of Orbax, whose log repeats errors and warns of plain files."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with context:
            return task()
    finally:
        logger.setLevel(level)
