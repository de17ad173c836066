"""Measures conversion: its rate against copying the same files, and its private memory.

One JSON line for each source format and repetition. The source is synthetic, of 1.5 GB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from mistral_jax.convert import architecture, names, safetensors_file

from mistral_jax.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=32000,
    num_layers=14,
    embed_dim=2048,
    mlp_dim=7168,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    sliding_window=None,
)
# What the command's process holds before it has read anything.
IDLE = """
from mistral_jax.convert import progress, to_orbax
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's")
    arguments = parser.parse_args()
    idle = int(subprocess.check_output([sys.executable, "-c", IDLE])) * 1024
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        for official in (False, True):
            source = Path(work) / ("official" if official else "hf")
            largest = make_source(source, official)
            size = sum(file.stat().st_size for file in source.iterdir())
            for _ in range(arguments.repeat):
                copy = copied(source, Path(work) / "copy")
                seconds, peak = converted(source, Path(work) / "orbax")
                line = {
                    "benchmark": "convert",
                    "source": source.name,
                    "bytes": size,
                    "seconds": round(seconds, 2),
                    "copy_seconds": round(copy, 2),
                    "rate_to_copy": round(copy / seconds, 2),
                    "private_bytes_above_idle": peak - idle,
                    "in_largest_layers": round((peak - idle) / largest, 2),
                }
                print(json.dumps(line), flush=True)
            shutil.rmtree(source)


def make_source(folder: Path, official: bool) -> int:
    """Writes a source of random bfloat16; returns the bytes of its largest layer."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [row for group in names.groups(CONFIG) for row in group]
    dtype = np.dtype(ml_dtypes.bfloat16)
    heads = {row.name(official): (row.file_shape(CONFIG), dtype) for row in rows}
    tensors = (rng.standard_normal(shape, np.float32).astype(dtype) for shape, _ in heads.values())
    weights, config = ("consolidated", "params") if official else ("model", "config")
    safetensors_file.write(folder / f"{weights}.safetensors", heads, tensors)
    fields = architecture.to_official(CONFIG) if official else architecture.to_hf(CONFIG)
    (folder / f"{config}.json").write_text(json.dumps(fields))
    os.sync()
    layers = ([row.shape(CONFIG) for row in group] for group in names.groups(CONFIG))
    return max(sum(int(np.prod(shape)) * 2 for shape in shapes) for shapes in layers)


def copied(source: Path, target: Path) -> float:
    """Returns the seconds that copying and syncing the source takes."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def converted(source: Path, target: Path) -> tuple[float, int]:
    """Returns the seconds of the whole command, its start included, and its peak RssAnon."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "mistral_jax.convert", "to-orbax", source, target]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.005)
    os.sync()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command} failed")
    shutil.rmtree(target)
    return seconds, peak


def private_bytes(pid: int) -> int:
    """Returns RssAnon of a process; mapped files, which the system can drop, do not count."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    values = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(values[0]) * 1024 if values else 0


if __name__ == "__main__":
    main()
