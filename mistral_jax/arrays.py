"""A tree of arrays on disk, as Orbax keeps it: written one by one, read straight onto devices.

All of Orbax is behind this file. It knows no models.
"""

import contextlib
import ctypes
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from mistral_jax import folder

Tree = Mapping[str, Any]

_CHUNK_BYTES = 32 << 20  # What a device that needs a part of an array reads at least.


def save(path: Path, tree: Any) -> None:
    """Writes a whole tree of arrays into the folder `path`, which must not exist yet."""
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    _run(context, lambda: ocp.save(path.absolute(), tree))
    # It names the folder on this machine, which may be another's business, and nobody reads it.
    (path / "commit_success.txt").unlink(missing_ok=True)


def lay_out(path: Path, tree: Tree) -> None:
    """Prepares a folder for the arrays of a tree, each of which `write` then writes.

    Args:
      path: the folder to make.
      tree: a nested dict with the keys of the tree; its leaves do not matter.
    """
    placeholders = jax.tree.map(
        lambda _: np.zeros(1, np.int8), tree, is_leaf=lambda node: not isinstance(node, Mapping)
    )
    save(path, placeholders)


def write(path: Path, name: str, array: np.ndarray) -> None:
    """Writes an array in its place: the same files, of Zarr 2, that Orbax makes of a tree.

    Orbax itself would need the whole tree in memory, or half as long again for writing it in parts.

    Args:
      path: a folder that was laid out for a tree.
      name: the keys on the way to the leaf, with slashes between.
      array: what to write; it has at least one axis.
    """
    place = path / "state" / name.replace("/", ".")
    rows = math.ceil(len(array) / math.ceil(array.nbytes / _CHUNK_BYTES))
    about = {
        "chunks": [rows, *array.shape[1:]],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": array.dtype.name if array.dtype.kind == "V" else array.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": array.shape,
        "zarr_format": 2,
    }
    shutil.rmtree(place)  # The placeholder.
    place.mkdir()
    (place / ".zarray").write_text(json.dumps(about, separators=(",", ":")), encoding="utf-8")
    for number, start in enumerate(range(0, len(array), rows)):
        with open(place / ".".join([str(number), *"0" * (array.ndim - 1)]), "wb") as file:
            folder.write_array(file, array[start : start + rows])
            file.truncate(rows * array[0].nbytes)  # The last chunk is as long as the others.


def stored(path: Path) -> Tree:
    """Returns the tree at `path` with the shape and the dtype of each array, unread."""
    return _run(ocp.Context(), lambda: ocp.metadata(path.absolute()).metadata)


def read(path: Path, abstract: Tree) -> Tree:
    """Reads arrays, each straight onto its devices.

    Args:
      path: where a tree was written; whole, for over what is missing Orbax leaks coroutines.
      abstract: the tree or a part of it, with the shapes, dtypes and shardings to read it as.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.memory.read_concurrent_bytes = bytes_in_flight(abstract)
    with _frugal_allocator():
        return _run(context, lambda: ocp.load(path.absolute(), abstract))


def bytes_in_flight(abstract: Tree) -> int:
    """Returns how much `read` has on its way at a time: twice the largest array in float32.

    Orbax refuses to read an array that is larger than this, with its last chunk filled up.
    """
    return 1 + 2 * max(4 * math.prod(array.shape) for array in jax.tree.leaves(abstract))


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
