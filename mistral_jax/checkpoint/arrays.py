"""A tree of arrays on disk, as Orbax keeps it: read straight onto devices, saved in the background.

All of Orbax is behind this file. It knows no models.
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

# What Orbax notes in a checkpoint as the class that wrote it.
HANDLER = f"{ocp.handlers.PyTreeHandler.__module__}.{ocp.handlers.PyTreeHandler.__qualname__}"


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


def stored(path: Path, found: Mapping[str, zarr.Array] | None = None) -> Tree:
    """Returns the tree at `path` with the shape and the dtype of each array, unread.

    Args:
      path: where a tree was written.
      found: what `zarr.stored` says of it, if it was asked already.

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
    """Reads arrays, each straight onto its devices.

    Args:
      path: where a tree was written; whole, for over what is missing Orbax leaks coroutines.
      abstract: the tree or a part of it, with the shapes, dtypes and shardings to read it as.

    Raises:
      ValueError: it cannot be read.
    """
    own = all(array.sharding.is_fully_addressable for array in jax.tree.leaves(abstract))
    context = _alone() if own else ocp.Context()
    context.pytree.loading.partial_load = True
    context.memory.read_concurrent_bytes = bytes_in_flight(abstract)
    with _frugal_allocator():
        return _run(path, context, lambda: ocp.load(path.absolute(), abstract))


def bytes_in_flight(abstract: Tree) -> int:
    """Returns how much of the host's memory `read` uses for what is on its way to the devices.

    Two of the largest array keep the disk busy; one is enough where there is no room for more.
    """
    least = least_in_flight(abstract)
    arrays = jax.tree.leaves(abstract)
    needed = {demand.place: demand for demand in memory.demands(arrays, least)}
    host = needed[memory.HOST]
    room = math.inf if host.free is None else host.free - host.needed
    return least + max(0, min(least, room))


def least_in_flight(abstract: Tree) -> int:
    """Returns the least of the host's memory that `read` can do with: its largest array in float32.

    Orbax refuses to read an array that is larger than this, with its last chunk filled up.
    """
    return 1 + max(4 * _padded(array.shape) for array in jax.tree.leaves(abstract))


def _padded(shape: tuple[int, ...]) -> int:
    """Returns how many numbers an array has in its files."""
    counts = (c * math.ceil(n / c) for n, c in zip(shape, zarr.chunk_shape(shape, 4), strict=True))
    return math.prod(counts)


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


def _run(path: Path, context: ocp.Context, task: Callable[[], Any]) -> Any:
    with _quiet(), context:
        try:
            return task()
        except MemoryError:
            raise
        except Exception as error:  # Orbax raises what its parts do, of any type.
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} cannot be read: {said[:300]}") from error


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
