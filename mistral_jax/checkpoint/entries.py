"""Entries of an array on disk, such as the matrix of one expert, read without the others."""

import itertools

import numpy as np

from mistral_jax.checkpoint import zarr


def read(array: zarr.Array, index: int) -> np.ndarray:
    """Reads one entry along the first axis of an array, from the files that hold it."""
    axes = zip(array.shape[1:], array.chunk[1:], strict=True)
    blocks = [[slice(i, min(i + c, size)) for i in range(0, size, c)] for size, c in axes]
    file, row = divmod(index, array.chunk[0])
    entry = np.empty(array.shape[1:], array.dtype)
    for number in itertools.product(*(range(len(parts)) for parts in blocks)):
        place = tuple(parts[n] for n, parts in zip(number, blocks, strict=True))
        path = array.place / ".".join(map(str, (file, *number)))
        held = np.memmap(path, array.dtype, "r", shape=array.chunk)[row]
        entry[place] = held[tuple(slice(part.stop - part.start) for part in place)]
    return entry
