"""Measures loading: seconds, private memory and bytes read, by layout and number of processes.

Prints one JSON line for each process. The checkpoint has 2.1 GB of random bfloat16 weights, and the
processes share 8 devices. `excess_bytes` is the peak of private memory, less that of an idle
process and the bytes of its shards. `read_ratio` is the bytes that the process reads from files,
divided by the bytes of its parts of the model.

    python benchmarks/load.py [--processes 1 2] [--sharding tensor fsdp ...]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import peaks

from mistral_jax.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=32000,
    num_layers=16,
    embed_dim=2048,
    mlp_dim=7168,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    sliding_window=None,
)
LAYOUTS = ("tensor", "fsdp", "fsdp_tensor", "data_tensor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sharding", nargs="+", default=LAYOUTS)
    parser.add_argument("--folder", type=Path, help="temporary folder; default: the system's")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(load(*arguments.worker)), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        make(Path(work) / "checkpoint", CONFIG)
        for count in arguments.processes:
            for name in arguments.sharding:
                launch(str(Path(work) / "checkpoint"), name, count)


def make(path: Path, config: ModelConfig) -> None:
    """Writes a checkpoint of random bfloat16 weights."""
    from flax.traverse_util import flatten_dict

    from mistral_jax.checkpoint import checkpoint
    from mistral_jax.model.transformer import Transformer
    from mistral_jax.parallel.sharding import abstract_params

    rng = np.random.default_rng(0)
    shapes = flatten_dict(abstract_params(Transformer(config)), sep="/")
    shapes = {name: array.shape for name, array in shapes.items()}
    with checkpoint.create(path, config, shapes) as write:
        for name, shape in shapes.items():
            write(name, rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16))


def launch(path: str, name: str, count: int) -> None:
    """Loads in a number of processes that share 8 devices, and prints the line of each."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    workers = []
    for index in range(count):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(8 // count),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, __file__, "--worker", path, name]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    for index, worker in enumerate(workers):
        last = worker.communicate()[0].decode().splitlines()[-1]
        about = {"benchmark": "load", "sharding": name, "processes": count, "process": index}
        print(json.dumps(about | json.loads(last)), flush=True)


def load(path: str, name: str) -> dict:
    """Loads a checkpoint; returns the measurements."""
    import jax

    from mistral_jax.checkpoint import arrays, checkpoint
    from mistral_jax.parallel import distributed

    distributed.initialize()
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())
    arrays.stored(Path(path) / "params")  # Setup is not measured.
    idle, read, params = peaks.private_bytes(), bytes_read(), None

    def run():
        nonlocal params
        _, params, _ = checkpoint.load(path, sharding=name, dtype="bfloat16")
        jax.block_until_ready(params)

    began = time.perf_counter()
    peak = peaks.peak(run)
    seconds = time.perf_counter() - began
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    own = sum(
        len({str(shard.index) for shard in leaf.addressable_shards})
        * leaf.addressable_shards[0].data.nbytes
        for leaf in leaves
    )
    return {
        "seconds": round(seconds, 2),
        "shard_bytes": held,
        "excess_bytes": peak - idle - held,
        "own_bytes": own,
        "read_bytes": bytes_read() - read,
        "read_ratio": round((bytes_read() - read) / own, 3),
    }


def bytes_read() -> int:
    """Returns the bytes that this process has read from files, from the page cache or a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


if __name__ == "__main__":
    main()
