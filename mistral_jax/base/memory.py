"""The memory of a machine: what is free, what arrays will take, the most in use, large pages."""

import ctypes
import math
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

_CGROUPS = (  # the limit, what is used, and how it divides: version 2, then version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_LARGE_PAGE = 2 << 20  # bytes, on x86-64 and on ARM with small pages of 4 KB
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

HOST = "this machine"


class Demand(NamedTuple):
    """What some arrays ask of one place.

    Attributes:
      place: what a message calls it.
      needed: bytes that they take there.
      free: bytes that it has left; None = it does not say.
    """

    place: str
    needed: int
    free: int | None


def demands(arrays: Iterable[jax.ShapeDtypeStruct], staging: int = 0) -> list[Demand]:
    """Returns what arrays with shardings ask of each memory of this process.

    CPU devices share one: the host's.

    Args:
      arrays: what there will be.
      staging: bytes that the host needs besides, for what is on its way to the devices.
    """
    needed: dict[jax.Device | None, int] = {None: staging} if staging else {}
    for array in arrays:
        shard = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for device in array.sharding.addressable_devices:
            memory = None if device.platform == "cpu" else device
            needed[memory] = needed.get(memory, 0) + shard
    return [
        Demand(HOST, size, host_free())
        if device is None
        else Demand(str(device), size, _device_free(device))
        for device, size in needed.items()
    ]


def host_free(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process can still allocate; None = the system does not say.

    It is the smaller of what the machine has and what the limit of its container leaves.

    Args:
      root: where /proc and /sys are.
    """
    found = [_available(root / "proc/meminfo")]
    found += [_cgroup_left(root / "sys/fs/cgroup", *names) for names in _CGROUPS]
    return min((free for free in found if free is not None), default=None)


def peak() -> int | None:
    """Returns the most bytes in use so far, in the fullest memory here; None = nobody has told.

    Accelerators: of their own memory. CPU devices: of the machine's, by this process.
    """
    if jax.local_devices()[0].platform != "cpu":
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        return max(
            (s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None
        )
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def to_large_pages(tree: Any) -> Any:
    """Moves a CPU's arrays to pages of 2 MB, where Linux gives them on request, as by default.

    A token reads every weight once; on pages of 4 KB a part of its time goes into finding the next.

    Args:
      tree: arrays; those that are moved are consumed, one after another.

    Returns:
      The tree. Of an array, whole large pages lie on such, and its end on small ones; arrays
      smaller than one, on another device or on several are those given.
    """
    if not _LARGE_PAGES.is_file() or "[madvise]" not in _LARGE_PAGES.read_text():
        return tree
    tree = jax.tree.map(_to_large_pages, tree)
    # What was consumed lay between what is still in use: glibc would keep it for later.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    return tree


def _device_free(device: jax.Device) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _available(meminfo: Path) -> int | None:
    fields = dict(line.split(":", 1) for line in _lines(meminfo))
    if "MemAvailable" not in fields:
        return None
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_left(root: Path, limit: str, used: str, stat: str) -> int | None:
    limits, uses = _lines(root / limit), _lines(root / used)
    if not limits or not uses or limits[0] == "max":
        return None
    # Files that were read count as used until something else needs their memory.
    counts = dict(line.split() for line in _lines(root / stat))
    cached = counts.get("total_inactive_file", counts.get("inactive_file", 0))
    return int(limits[0]) - int(uses[0]) + int(cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _to_large_pages(array: jax.Array) -> jax.Array:
    on_one_cpu = [device.platform for device in array.sharding.device_set] == ["cpu"]
    if not on_one_cpu or array.nbytes < _LARGE_PAGE:
        return array
    memory = mmap.mmap(-1, array.nbytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    numbers = np.frombuffer(memory, np.uint8)
    begin = -numbers.ctypes.data % _LARGE_PAGE
    memory.madvise(mmap.MADV_HUGEPAGE, begin, array.nbytes // _LARGE_PAGE * _LARGE_PAGE)
    place = numbers[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(place, array)
    sharding = array.sharding
    array.delete()
    return jax.device_put(place, sharding, may_alias=True)
