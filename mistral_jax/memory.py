"""The memory that is free for a model, on the host or a device. It allocates nothing."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax

_CGROUPS = (  # limit, use, and the part of the use that is cached files: version 2, then 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def host_free(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process can still allocate; None where the system does not say.

    The smaller of what the machine has available and what its container's limit leaves.
    """
    free = [_available(root / "proc/meminfo")]
    free += [_cgroup_left(root / "sys/fs/cgroup", *names) for names in _CGROUPS]
    return min((bytes_ for bytes_ in free if bytes_ is not None), default=None)


def device_free(device: jax.Device) -> int | None:
    """Returns the bytes that `device` can still hold; None where it does not say."""
    if device.platform == "cpu":
        return host_free()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def per_device(arrays: Iterable[jax.ShapeDtypeStruct]) -> Mapping[jax.Device, int]:
    """Returns the bytes that arrays with shardings take on each device of this process."""
    totals = {}
    for array in arrays:
        shard = array.sharding.shard_shape(array.shape)
        size = array.dtype.itemsize
        for axis in shard:
            size *= axis
        for device in array.sharding.addressable_devices:
            totals[device] = totals.get(device, 0) + size
    return totals


def _available(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left(root: Path, limit: str, used: str, stat: str) -> int | None:
    limits, uses = _lines(root / limit), _lines(root / used)
    if not limits or not uses or limits[0] == "max":
        return None
    cached = sum(
        int(line.split()[1])
        for line in _lines(root / stat)
        if line.split()[0] in ("inactive_file", "total_inactive_file")[-1:]
    )
    return int(limits[0]) - int(uses[0]) + cached


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
