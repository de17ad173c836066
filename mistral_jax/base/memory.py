"""Measures the memory of host and devices, and moves arrays to large pages."""

import ctypes
import math
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

_CGROUPS = (  # files with limit, usage and details of the usage: cgroup version 2, then 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_LARGE_PAGE = 2 << 20  # bytes, on x86-64 and on ARM with a base page of 4 KB
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

HOST = "this machine"


class Demand(NamedTuple):
    """The memory that arrays need in one place, and what is free there.

    Attributes:
      place: name of the host or device for messages.
      needed: bytes that the arrays take.
      free: bytes that are free; None = unknown.
    """

    place: str
    needed: int
    free: int | None


def demands(arrays: Iterable[jax.ShapeDtypeStruct], staging: int = 0) -> list[Demand]:
    """Returns the memory that arrays will need on the host and on each device of this process.

    All CPU devices share the memory of the host.

    Args:
      arrays: shapes, dtypes and shardings of the arrays.
      staging: bytes that the host needs in addition, to copy arrays to the devices.
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
    """Returns the bytes of host memory that this process can still allocate; None = unknown.

    It is the smaller of the machine's free memory and what the container's limit leaves.

    Args:
      root: folder that holds /proc and /sys; tests pass another.
    """
    found = [_available(root / "proc/meminfo")]
    found += [_cgroup_left(root / "sys/fs/cgroup", *names) for names in _CGROUPS]
    return min((free for free in found if free is not None), default=None)


def peak() -> int | None:
    """Returns the peak memory use so far in bytes; None = unknown.

    On accelerators it is the peak of the device that used most; on CPUs, the peak resident memory
    of this process.
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
    """Moves the arrays of a CPU to huge pages (2 MiB), where Linux provides them on request.

    Each decoding step reads every weight once; with pages of 4 KiB, part of its time is spent on
    TLB misses.

    Args:
      tree: pytree of arrays. Those that are moved are deleted, one after another.

    Returns:
      The same pytree. The last partial huge page of an array stays on small pages. Arrays smaller
      than a huge page, on an accelerator or on several devices are returned unchanged.
    """
    if not _LARGE_PAGES.is_file() or "[madvise]" not in _LARGE_PAGES.read_text():
        return tree
    tree = jax.tree.map(_to_large_pages, tree)
    # glibc keeps freed memory between blocks in use; this returns it to the system.
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
    # Usage includes the page cache of files, which the kernel frees on demand.
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
