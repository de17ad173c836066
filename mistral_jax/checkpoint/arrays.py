"""Trees of arrays on disk, read and saved with Orbax.

Arrays are read directly onto their devices, and saved in the background. Only this file uses Orbax.
"""

import contextlib
import ctypes
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp

from mistral_jax.base import memory
from mistral_jax.checkpoint import zarr
from mistral_jax.parallel import distributed

Tree = Mapping[str, Any]

# The class that Orbax names in a checkpoint as its writer.
HANDLER = f"{ocp.handlers.PyTreeHandler.__module__}.{ocp.handlers.PyTreeHandler.__qualname__}"


def save_in_background(path: Path, tree: Any) -> Callable[[], None]:
    """Begins to write a tree of arrays into the folder `path`, which must not exist yet.

    With several processes all must call it, for each writes its own part of each array. On a CPU
    the arrays must not be changed or donated until the write ends.

    Returns:
      A function that waits for the end of the write; call it once.
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
            # The file holds the folder's path on this machine, which may be private, and is not
            # needed to read the checkpoint.
            (path / "commit_success.txt").unlink(missing_ok=True)

    return finish


def stored(path: Path, found: Mapping[str, zarr.Array] | None = None) -> Tree:
    """Returns the shape and dtype of each array of the tree at `path`, without reading arrays.

    Args:
      path: the folder of the tree.
      found: the result of `zarr.stored` for it, if the caller has it already.

    Raises:
      ValueError: a file is missing or damaged; see `zarr.stored`.
    """
    if zarr.is_other(path):
        return _run(path, _alone(), lambda: ocp.metadata(path.absolute()).metadata)
    found = zarr.stored(path) if found is None else found
    paths = {tuple(name.split("/")) for name in found}
    if inner := next((p for p in paths for n in range(1, len(p)) if p[:n] in paths), None):
        raise ValueError(f"{path} has {'/'.join(inner)} in another array; copy it again")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in found.items()}
    return unflatten_dict(shapes, sep="/")


def read(path: Path, abstract: Tree) -> Tree:
    """Reads arrays directly onto their devices.

    Args:
      path: the folder of a tree. Its files must be complete: Orbax leaks coroutines over missing
        ones.
      abstract: the tree or a part of it, with the shapes, dtypes and shardings to read.

    Raises:
      ValueError: an array cannot be read.
    """
    own = all(array.sharding.is_fully_addressable for array in jax.tree.leaves(abstract))
    context = _alone() if own else ocp.Context()
    context.pytree.loading.partial_load = True
    context.memory.read_concurrent_bytes = bytes_in_flight(abstract)
    with _frugal_allocator():
        return _run(path, context, lambda: ocp.load(path.absolute(), abstract))


def bytes_in_flight(abstract: Tree) -> int:
    """Returns how many bytes of host memory `read` uses for arrays on their way to the devices.

    Room for two of the largest array keeps the disk busy. With less memory one is enough.
    """
    least = least_in_flight(abstract)
    arrays = jax.tree.leaves(abstract)
    needed = {demand.place: demand for demand in memory.demands(arrays, least)}
    host = needed[memory.HOST]
    room = math.inf if host.free is None else host.free - host.needed
    return least + max(0, min(least, room))


def least_in_flight(abstract: Tree) -> int:
    """Returns the least host memory in bytes that `read` needs: its largest array in float32.

    Orbax refuses to read an array that is larger than its limit, with the last chunks padded.
    """
    return 1 + max(4 * _padded(array.shape) for array in jax.tree.leaves(abstract))


def _padded(shape: tuple[int, ...]) -> int:
    """Returns the number of elements of an array in its files, whose last chunks are padded."""
    counts = (c * math.ceil(n / c) for n, c in zip(shape, zarr.chunk_shape(shape, 4), strict=True))
    return math.prod(counts)


def _alone() -> ocp.Context:
    """Returns an Orbax context for this process only, which waits for no other process."""
    context = ocp.Context()
    if distributed.count() > 1:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


@contextlib.contextmanager
def _frugal_allocator() -> Iterator[None]:
    """Makes glibc return freed large blocks to the system.

    Otherwise it keeps the buffers of Orbax's many threads: half the size of the model, as measured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: None)
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 128 << 10)
    try:
        yield
    finally:  # The values that glibc reaches by itself in a program with large blocks.
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def _run(path: Path, context: ocp.Context, task: Callable[[], Any]) -> Any:
    with _quiet(), context:
        try:
            return task()
        except MemoryError:
            raise
        except Exception as error:  # Orbax raises errors of any type, from its own dependencies.
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} cannot be read: {said[:300]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log of Orbax, which repeats errors and warns about plain files."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
