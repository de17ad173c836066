"""Measures conversion: its speed relative to `cp` and `sync` of the same files, and its memory.

Prints one JSON line for each measurement: from either format to Orbax, and back. The source has
1.8 GB of random weights. Time and private memory are those above an idle process, which only
imports the modules that the conversion needs.
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
import peaks
from mistral_jax.convert import architecture

from mistral_jax.checkpoint import names, safetensors_file
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
IDLE = """
import jax
from mistral_jax.base import output
from mistral_jax.convert import to_orbax, to_torch
jax.devices()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="temporary folder; default: the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        orbax, back = Path(work) / "orbax", Path(work) / "back"
        for kind in ("hf", "official"):
            source = Path(work) / kind
            largest = make_source(source, kind == "official")
            for _ in range(arguments.repeat):
                measure(kind, "to-orbax", source, orbax, largest)
                measure(kind, "to-torch", orbax, back, largest, "--format", kind)
                shutil.rmtree(orbax)
                shutil.rmtree(back)
            shutil.rmtree(source)


def measure(kind: str, command: str, source: Path, target: Path, largest: int, *options: str):
    copy = copied(source, target)
    idle_seconds, idle_bytes = idle()
    seconds, peak = run([command, source, target, *options])
    line = {
        "benchmark": "convert",
        "command": command,
        "format": kind,
        "bytes": sum(file.stat().st_size for file in source.rglob("*") if file.is_file()),
        "copy_seconds": round(copy, 2),
        "seconds": round(seconds - idle_seconds, 2),
        "start_seconds": round(idle_seconds, 2),
        "rate_to_copy": round(copy / (seconds - idle_seconds), 2),
        "private_bytes": peak - idle_bytes,
        "in_largest_layers": round((peak - idle_bytes) / largest, 2),
    }
    print(json.dumps(line), flush=True)


def make_source(folder: Path, official: bool) -> int:
    """Writes a checkpoint of random bfloat16 weights; returns the bytes of its largest layer."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = names.weights(CONFIG)
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
    """Returns the seconds to copy and sync a folder."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def idle() -> tuple[float, int]:
    """Returns the seconds and the RssAnon of an idle process."""
    start = time.perf_counter()
    kilobytes = int(subprocess.check_output([sys.executable, "-c", IDLE]))
    return time.perf_counter() - start, kilobytes * 1024


def run(arguments: list) -> tuple[float, int]:
    """Runs a conversion command; returns its seconds and its largest RssAnon."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "mistral_jax.convert", *arguments]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, peaks.private_bytes(process.pid))
            time.sleep(0.005)
    os.sync()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return seconds, peak


if __name__ == "__main__":
    main()
