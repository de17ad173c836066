"""Starts a Python program as several processes, as a launcher does, and is such a program.

As a program, it runs the function that its first argument names, and prints the result as JSON.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

# By default XLA's CPU backend divides a program into pieces and compiles them at the same time. On
# two cores, which other tests use too, this takes a third longer.
UNDIVIDED = "--xla_cpu_parallel_codegen_split_count=1"
# The settings of conftest.py: with them a process computes the same bits as the tests do.
ALIKE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # XLA's older emitters for fused operations on a CPU compile twice as fast.
    "XLA_FLAGS": f"{UNDIVIDED} --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
}
PROMPTS = [[1, 7, 9], [1, *range(10, 40)], [5]]
TEXT = "a text that is longer than one chunk"


class Ended(NamedTuple):
    """The exit status and the output of a process."""

    status: int
    out: str
    err: str


# Makes a Python program find what the tests have compiled. JAX's cache keys include XLA_FLAGS, and
# conftest.py changes that variable once XLA has read it.
BEGIN = f"import os, jax; jax.devices(); os.environ['XLA_FLAGS'] = '{UNDIVIDED}'\n"


def settings() -> dict[str, str]:
    """Returns variables with which a program compiles, and keeps programs, as the tests do."""
    import jax

    kept = {}
    if folder := jax.config.jax_compilation_cache_dir:
        kept["JAX_COMPILATION_CACHE_DIR"] = folder
        kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return ALIKE | kept


def environment(devices: int = 8) -> dict[str, str]:
    """Returns the environment of a program that computes as the tests do."""
    return os.environ | settings() | {"JAX_NUM_CPU_DEVICES": str(devices)}


def together(
    *command: object,
    count: int = 2,
    devices: int = 4,
    stdin: str = "",
    signal_once: Callable[[], bool] | None = None,
    timeout: float = 200,
) -> list[Ended]:
    """Runs `python *command` as several processes, each with its own devices.

    Args:
      command: arguments of Python.
      count: number of processes.
      devices: CPU devices per process.
      stdin: input of the first process; the others have none.
      signal_once: condition after which all processes get SIGTERM; None = no signal.
      timeout: seconds until all processes must have ended.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    common = environment(devices) | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    with contextlib.ExitStack() as stack:

        def start(index):
            # A process that writes to a pipe may block until the pipe is read; files do not block.
            given, out, err = (stack.enter_context(TemporaryFile("w+")) for _ in range(3))
            given.write(stdin if index == 0 else "")
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=common | {"JAX_PROCESS_ID": str(index)},
                stdin=given,
                stdout=out,
                stderr=err,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process, out, err

        ends, deadline = [], time.monotonic() + timeout
        started = [start(index) for index in range(count)]
        if signal_once is not None:
            while not signal_once() and time.monotonic() < deadline:
                time.sleep(0.1)
            for process, _, _ in started:
                process.terminate()
        for process, out, err in started:
            process.wait(deadline - time.monotonic())
            out.seek(0)
            err.seek(0)
            ends.append(Ended(process.returncode, out.read(), _without_notes(err.read())))
        return ends


def _without_notes(err: str) -> str:
    """Drops lines that depend on the machine's speed.

    A command says that it compiles if that takes some seconds. Gloo's threads count their peers,
    and may interleave such lines.
    """
    err = re.sub(r"(?m)^compiling .*, once: later runs find them\n", "", err)
    pieces = "[Gloo] Rank ", " is connected to ", "Expected number of connected", " peer ranks"
    counting = "|".join(map(re.escape, (*pieces, ". ", " is : ")))
    if "[Gloo]" not in err:
        return err
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not re.fullmatch(rf"({counting}|\d|\s)*", line))


def work(checkpoint: str, target: str, sharding: str, mesh: str) -> dict:
    """Loads a model, generates, scores and saves; returns the results."""
    from types import SimpleNamespace

    import mistral_jax as mj

    model, params, _ = mj.load(checkpoint, sharding=sharding, mesh=json.loads(mesh))
    size = model.config.vocab_size
    ids = SimpleNamespace(encode=lambda text, bos: [1, *(byte % size for byte in text.encode())])
    samplings = [mj.Sampling(0), mj.Sampling(1, seed=5), mj.Sampling(0.8, top_k=9, seed=6)]
    rows = mj.generate(model, params, PROMPTS, 10, sampling=samplings, stop_ids=())
    mj.save(target, model.config, params)
    return {
        "tokens": [row.tokens for row in rows],
        "logprobs": [row.logprobs for row in rows],
        "score": mj.score(model, params, ids, TEXT).logprob,
    }


def bytes_read(checkpoint: str, sharding: str) -> dict:
    """Loads a model twice; returns for each process the bytes that the second load read.

    Beside them, the bytes of its shards, those of the files that hold a part of them, and as many
    as it would read if each device read its files alone. Devices that need the same file share a
    read only where they ask for it at the same time.
    """
    import jax
    from flax.traverse_util import flatten_dict
    from jax.experimental.multihost_utils import process_allgather

    import mistral_jax as mj
    from mistral_jax.checkpoint import zarr

    def read():
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))

    for _ in range(2):
        before = read()
        _, params, _ = mj.load(checkpoint, sharding=sharding)
        jax.block_until_ready(params)
        after = read()
    own = files = alone = 0
    stored = zarr.stored(Path(checkpoint) / "params")
    for name, leaf in flatten_dict(params, sep="/").items():
        array, found = stored[name], set()
        shards = {str(shard.index): shard for shard in leaf.addressable_shards}
        for shard in shards.values():
            parts = [
                range((at.start or 0) // c, -(-(n if at.stop is None else at.stop) // c))
                for at, n, c in zip(shard.index, array.shape, array.chunk, strict=True)
            ]
            needed = set(itertools.product(*parts))
            own += shard.data.nbytes
            alone += len(needed) * array.file_bytes
            found |= needed
        files += len(found) * array.file_bytes

    counts = {"read": after - before, "own": own, "files": files, "alone": alone}
    return {name: process_allgather(count).tolist() for name, count in counts.items()}


def adapt(checkpoint: str, folder: str, target: str) -> dict:
    """Generates with adapters over all devices, separate and merged, and saves them again."""
    import jax

    import mistral_jax as mj
    from mistral_jax.checkpoint import adapters
    from mistral_jax.checkpoint.lora import adapter_shardings

    found = {}
    for merge in (False, True):
        model, params, _ = mj.load(checkpoint, sharding="fsdp_tensor", lora=folder, merge=merge)
        rows = mj.generate(model, params, PROMPTS, 10, sampling=mj.Sampling(0), stop_ids=())
        found[f"merge={merge}"] = [row.tokens for row in rows]
    lora, own = adapters.read(folder, model.config)
    places = adapter_shardings(params, own)
    adapters.save(target, model.config, lora, jax.device_put(own, places))
    return found


def late() -> int:
    """Delays the first process for longer than the runtime waits for a connection."""
    from mistral_jax.parallel import distributed

    return distributed.from_first(lambda: time.sleep(35) or 7)


def wait(folder: str) -> None:
    """Makes a file named after the process, and waits."""
    Path(folder, os.environ["JAX_PROCESS_ID"]).touch()
    time.sleep(600)


def train(configs: str, process: str, number: str, *arguments: str) -> int:
    """Trains a tiny model on made-up texts; in step 13, one process gets a signal.

    It waits until the state of step 10 is saved, which happens in the background.
    """
    from mistral_jax import config
    from mistral_jax.cli import train
    from mistral_jax.training.data import batches, corpus

    config.CONFIG_DIR = Path(configs)
    texts = {f"{i}.py": "def f(x):\n    return x + 1\n" * 9 + f"# {i}\n" for i in range(40)}
    corpus.gather = lambda roots: [corpus.Source("any", "1", "MIT", texts)]
    corpus._VALIDATION_SHARE = 5
    batch_at = batches.window_batch

    def batch_and_signal(step, *rest, **named):
        if step == 13 and os.environ["JAX_PROCESS_ID"] == process:
            state = Path(arguments[arguments.index("--run") + 1], "states", "00000010")
            while not state.exists():
                time.sleep(0.1)
            os.kill(os.getpid(), int(number))
        return batch_at(step, *rest, **named)

    batches.window_batch = batch_and_signal
    return train.main(["--no-compilation-cache", *arguments])


def finetune(recipe: str, run: str, sharding: str) -> str:
    """Trains adapters with a recipe; returns the command that uses them."""
    from mistral_jax.training import run as runs
    from mistral_jax.training.recipe import Recipe

    made = Recipe.from_dict(json.loads(recipe))
    return runs.train(made, run, lambda entry: None, sharding).command


def main() -> int:
    task, *arguments = sys.argv[1:]
    if task == "train":
        return train(*arguments)
    from mistral_jax.cli import command

    tasks = {"bytes": bytes_read} | {f.__name__: f for f in (work, adapt, late, wait, finetune)}
    return command.run(lambda: print(json.dumps(tasks[task](*arguments))))


if __name__ == "__main__":
    sys.exit(main())


def has_landlock() -> bool:
    """Asks the kernel for its version of Landlock, without which programs are refused."""
    if sys.platform != "linux":
        return False
    create_ruleset, version = 444, 1
    return ctypes.CDLL(None).syscall(create_ruleset, None, 0, version) > 0
