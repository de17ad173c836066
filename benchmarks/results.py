"""Stores measurements as JSON: lines of results, the machine's limits, and the machine itself.

A line has the workload (`work`, `model`, `dtype`, `batch`, `length`, `greedy`) and `values`, a
number for each program. A new line replaces the old line of the same workload.
"""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

ABOUT = ("work", "model", "dtype", "batch", "length", "greedy")
_PACKAGES = ("jax", "flax", "torch", "transformers", "llama-cpp-python")


class Results:
    """Measurements in a file.

    Attributes:
      lines: the measurements, a dict each.
      limits: see `limits.measure`; empty before they are measured.
      machine: see `machine`.
    """

    def __init__(self, file: Path):
        """Reads the file if it exists."""
        self._file = file
        found = json.loads(file.read_text()) if file.is_file() else {}
        self.lines: list[dict] = found.get("lines", [])
        self.limits: dict = found.get("limits", {})
        self.machine: dict = found.get("machine", {})

    def add(self, line: dict) -> None:
        """Stores a line in the file, and prints it."""
        line = _rounded(line)
        print(json.dumps(line), flush=True)
        self.lines = [old for old in self.lines if _about(old) != _about(line)] + [line]
        self._save()

    def set_limits(self, limits: dict) -> None:
        """Stores the highest rate ever measured of each limit: other load only lowers a rate."""
        limits = _rounded(limits)
        print(json.dumps({"work": "limits"} | limits), flush=True)
        for name, ways in limits.items():
            known = self.limits.get(name, {})
            self.limits[name] = {way: max(rate, known.get(way, 0)) for way, rate in ways.items()}
        self._save()

    def find(self, **about) -> list[dict]:
        """Returns the lines that have all these values."""
        return [line for line in self.lines if about.items() <= _about(line).items()]

    def _save(self) -> None:
        self.machine = machine()
        self.lines.sort(key=lambda line: [str(value).zfill(9) for value in _about(line).values()])
        found = {"machine": self.machine, "limits": self.limits, "lines": self.lines}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(found, indent=1) + "\n")


def _rounded(value):
    """Rounds floats to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def _about(line: dict) -> dict:
    return {name: line.get(name) for name in ABOUT}


def machine() -> dict:
    """Returns what the results depend on: the processor, its memory, and versions."""
    described = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in described if line.startswith("model name")]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": versions,
    }
