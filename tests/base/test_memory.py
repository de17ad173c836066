import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from mistral_jax.base import memory


def system(root, **files):
    for name, content in files.items():
        file = root / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return memory.host_free(root)


MEMINFO = {"proc__meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    4000 kB\n"}
V2 = {
    "sys__fs__cgroup__memory_DOT_max": "3000000\n",
    "sys__fs__cgroup__memory_DOT_current": "2500000\n",
    "sys__fs__cgroup__memory_DOT_stat": "anon 5\ninactive_file 300000\nactive_file 7\n",
}
V1 = {
    "sys__fs__cgroup__memory__memory_DOT_limit_in_bytes": "3000000\n",
    "sys__fs__cgroup__memory__memory_DOT_usage_in_bytes": "2500000\n",
    "sys__fs__cgroup__memory__memory_DOT_stat": "inactive_file 1\ntotal_inactive_file 200000\n",
}


def test_free_is_what_the_machine_has_available(tmp_path):
    assert system(tmp_path, **MEMINFO) == 4000 * 1024


def test_free_is_what_the_container_leaves_without_cached_files(tmp_path):
    assert system(tmp_path / "2", **MEMINFO, **V2) == 800_000
    assert system(tmp_path / "1", **MEMINFO, **V1) == 700_000
    unlimited = V2 | {"sys__fs__cgroup__memory_DOT_max": "max\n"}
    assert system(tmp_path / "max", **MEMINFO, **unlimited) == 4000 * 1024


def test_a_system_that_does_not_say(tmp_path):
    assert system(tmp_path) is None


def test_this_machine_says_something_credible():
    assert 2**20 < memory.host_free() < 2**50


def test_cpu_devices_share_the_host_s_memory():
    devices = jax.devices()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    arrays = [
        jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=split),  # 192 bytes in all
        jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=whole),  # 10 on each of 8
        jax.ShapeDtypeStruct((7,), jnp.int8, sharding=SingleDeviceSharding(devices[3])),
    ]
    ((place, needed, free),) = memory.demands(arrays)
    assert (place, needed) == ("this machine", 192 + 80 + 7)
    assert free is not None


class Accelerator:
    """Stands for a GPU, as far as `memory` looks at one."""

    platform = "gpu"

    def __init__(self, stats):
        self.memory_stats = lambda: stats

    def __str__(self):
        return "gpu:0"


class Everything:
    """Stands for a sharding that puts a whole array on each device."""

    def __init__(self, *devices):
        self.addressable_devices = set(devices)

    def shard_shape(self, shape):
        return shape


def test_what_is_on_its_way_to_an_accelerator_is_in_the_host_s_memory(monkeypatch):
    monkeypatch.setattr(memory, "host_free", lambda: 1000)
    sharding = Everything(Accelerator({"bytes_limit": 100, "bytes_in_use": 60}))
    array = SimpleNamespace(shape=(3,), dtype=jnp.dtype(jnp.float32), sharding=sharding)
    assert sorted(memory.demands([array], 700)) == [("gpu:0", 12, 40), (memory.HOST, 700, 1000)]


def test_each_accelerator_has_its_own():
    full, unknown = Accelerator({"bytes_limit": 100, "bytes_in_use": 60}), Accelerator(None)
    sharding = Everything(full, unknown)
    array = SimpleNamespace(shape=(3,), dtype=jnp.dtype(jnp.float32), sharding=sharding)
    found = sorted(memory.demands([array, array]), key=lambda demand: demand.free or 0)
    assert found == [("gpu:0", 24, None), ("gpu:0", 24, 40)]


def test_memory_is_at_least_what_is_resident_and_never_falls():
    held = np.ones(2**26, np.uint8)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    during = memory.peak()
    # The system's counters lag behind each other a little.
    assert held.nbytes < 0.9 * resident < during < 2**50
    del held
    assert memory.peak() >= during


def test_the_fullest_accelerator_counts(monkeypatch):
    stats = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 9}, None]
    found = [SimpleNamespace(platform="gpu", memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: found)
    assert memory.peak() == 9
    monkeypatch.setattr(jax, "local_devices", lambda: found[2:])
    assert memory.peak() is None
