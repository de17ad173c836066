"""A tree of arrays on disk, as Orbax keeps it: written one by one, read straight onto devices.

All of Orbax is behind this file. It knows no models.
"""

import contextlib
import ctypes
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from mistral_jax import distributed, folder

Tree = Mapping[str, Any]

# Of a file, at most: of a larger one a host reads more than its part, smaller ones read slower.
_CHUNK_BYTES = 2 << 20


def save_in_background(path: Path, tree: Any) -> Callable[[], None]:
    """Begins to write a whole tree of arrays into the folder `path`, which must not exist yet.

    Of several processes all must call it, for each writes its own part of an array. On a CPU the
    arrays must not be changed or consumed before all is written.

    Returns:
      A function that waits until it is, to be called once.
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    quiet = contextlib.ExitStack()
    quiet.enter_context(_quiet())
    with context:
        response = ocp.save_async(path.absolute(), tree)

    def finish():
        with quiet:
            response.result()
        if distributed.is_first():
            # It names the folder on this machine, which may be another's business; nobody reads it.
            (path / "commit_success.txt").unlink(missing_ok=True)

    return finish


def lay_out(path: Path, tree: Tree) -> None:
    """Prepares a folder for the arrays of a tree, each of which `write` then writes.

    Args:
      path: the folder to make.
      tree: a nested dict with the keys of the tree; its leaves do not matter.
    """
    about = {"value_type": "np.ndarray", "skip_deserialize": False}
    described = {
        str(keys): {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": about,
        }
        for keys in sorted(flatten_dict(tree))
    }
    metadata = {
        "tree_metadata": described,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    (path / "state").mkdir(parents=True)
    (path / "orbax.checkpoint").touch()
    for name, contents in (
        ("_CHECKPOINT_METADATA", {"item_handlers": {"state": handler}}),
        ("state/_METADATA", metadata),
    ):
        (path / name).write_text(json.dumps(contents), encoding="utf-8")


def write(path: Path, name: str, array: np.ndarray) -> None:
    """Writes an array in its place: the same files, of Zarr 2, that Orbax makes of a tree.

    Orbax itself would need the whole tree in memory, or half as long again for writing it in parts.

    Args:
      path: a folder that was laid out for a tree.
      name: the keys on the way to the leaf, with slashes between.
      array: what to write; it has at least one axis.
    """
    chunk = _chunk_shape(array.shape, array.itemsize)
    about = {
        "chunks": chunk,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": array.dtype.name if array.dtype.kind == "V" else array.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": array.shape,
        "zarr_format": 2,
    }
    place = path / "state" / name.replace("/", ".")
    place.mkdir()
    (place / ".zarray").write_text(json.dumps(about, separators=(",", ":")), encoding="utf-8")
    counts = (math.ceil(size / part) for size, part in zip(array.shape, chunk, strict=True))
    for number in itertools.product(*map(range, counts)):
        block = array[tuple(slice(n * c, (n + 1) * c) for n, c in zip(number, chunk, strict=True))]
        # The last chunk along an axis is as long as the others.
        missing = [(0, c - size) for c, size in zip(chunk, block.shape, strict=True)]
        with open(place / ".".join(map(str, number)), "wb") as file:
            folder.write_array(file, np.pad(block, missing) if np.any(missing) else block)


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Halves the axes of a large array in turn, the longest first, until a chunk is small enough.

    Each axis at least once: whatever is split over hosts, each reads little but its own part.
    """
    parts, chunk = [1] * len(shape), list(shape)
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if math.prod(shape) * itemsize <= _CHUNK_BYTES:
        return chunk
    while any(parts[axis] == 1 for axis in axes) or math.prod(chunk) * itemsize > _CHUNK_BYTES:
        axis = min(axes, key=lambda axis: (chunk[axis] == 1, parts[axis], -shape[axis]))
        if chunk[axis] == 1:
            break
        parts[axis] *= 2
        chunk[axis] = math.ceil(shape[axis] / parts[axis])
    return chunk


def stored(path: Path) -> Tree:
    """Returns the tree at `path` with the shape and the dtype of each array, unread."""
    return _run(_alone(), lambda: ocp.metadata(path.absolute()).metadata)


def read(path: Path, abstract: Tree) -> Tree:
    """Reads arrays, each straight onto its devices.

    Args:
      path: where a tree was written; whole, for over what is missing Orbax leaks coroutines.
      abstract: the tree or a part of it, with the shapes, dtypes and shardings to read it as.
    """
    own = all(array.sharding.is_fully_addressable for array in jax.tree.leaves(abstract))
    context = _alone() if own else ocp.Context()
    context.pytree.loading.partial_load = True
    context.memory.read_concurrent_bytes = bytes_in_flight(abstract)
    with _frugal_allocator():
        return _run(context, lambda: ocp.load(path.absolute(), abstract))


def bytes_in_flight(abstract: Tree) -> int:
    """Returns how much `read` has on its way at a time: twice the largest array in float32.

    Orbax refuses to read an array that is larger than this, with its last chunk filled up.
    """
    return 1 + 2 * max(4 * math.prod(array.shape) for array in jax.tree.leaves(abstract))


def _alone() -> ocp.Context:
    """Returns a context of work that concerns this process only: Orbax waits for no other."""
    context = ocp.Context()
    if distributed.count() > 1:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


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
    with _quiet(), context:
        return task()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log of Orbax, which repeats errors and warns of plain files."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
