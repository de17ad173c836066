"""Pages of memory: a CPU finds numbers that lie on large ones faster. It knows no models."""

import ctypes
import mmap
from pathlib import Path
from typing import Any

import jax
import numpy as np

_LARGE = 2 << 20  # bytes, on x86-64 and on ARM with small pages of 4 KB
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def move(tree: Any) -> Any:
    """Moves a CPU's arrays to pages of 2 MB, where Linux gives them on request, as by default.

    A token reads every weight once; on pages of 4 KB a part of its time goes into finding the next.

    Args:
      tree: arrays; those that are moved are consumed, one after another.

    Returns:
      The tree. Of an array, whole large pages lie on such, and its end on small ones; arrays
      smaller than one, on another device or on several are those given.
    """
    if not _SETTING.is_file() or "[madvise]" not in _SETTING.read_text():
        return tree
    tree = jax.tree.map(_moved, tree)
    # What was consumed lay between what is still in use: glibc would keep it for later.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    return tree


def _moved(array: jax.Array) -> jax.Array:
    on_one_cpu = [device.platform for device in array.sharding.device_set] == ["cpu"]
    if not on_one_cpu or array.nbytes < _LARGE:
        return array
    memory = mmap.mmap(-1, array.nbytes + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    numbers = np.frombuffer(memory, np.uint8)
    begin = -numbers.ctypes.data % _LARGE
    memory.madvise(mmap.MADV_HUGEPAGE, begin, array.nbytes // _LARGE * _LARGE)
    place = numbers[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(place, array)
    sharding = array.sharding
    array.delete()
    return jax.device_put(place, sharding, may_alias=True)
