"""The memory that arrays will take, and that which is free for them. It allocates nothing."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax

_CGROUPS = (  # the limit, what is used, and how it divides: version 2, then version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


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


HOST = "this machine"


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
