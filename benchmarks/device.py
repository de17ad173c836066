"""Measures a model of Mistral 7B's shape on one accelerator, beside Transformers and the planner.

Writes random bfloat16 weights as a checkpoint (--folder keeps it), loads the checkpoint, and
generates. Prints one JSON line for loading, one for the limits of the device, and one for each
number of rows and length of prompts. Such a line has the tokens a second, the share of the measured
memory bandwidth that decoding reaches, and the share of the measured matrix-product rate that
prefill reaches (MFU).

    python benchmarks/device.py --hardware H100 --transformers [--quantize int8] [--folder DIR]
        [--model mistral-7b-v0.3] [--batch 1 8 32] [--prompt 512 4096 16384]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import load
import shapes

from mistral_jax.base.machine import read_bandwidth
from mistral_jax.checkpoint import checkpoint
from mistral_jax.config import ModelConfig
from mistral_jax.engine.generate import generate
from mistral_jax.parallel import hardware
from mistral_jax.parallel.sharding import Layout
from mistral_jax.planning import arithmetic, programs

TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hardware", help="chip of configs/hardware.toml, for estimates")
    parser.add_argument("--model", default="mistral-7b-v0.3")
    parser.add_argument("--folder", type=Path, help="folder of the checkpoint, to keep it")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[512])
    parser.add_argument("--quantize", choices=["int8"], help="round the weights")
    parser.add_argument("--transformers", action="store_true", help="measure Transformers too")
    arguments = parser.parse_args()
    theirs = transformers(arguments) if arguments.transformers else {}
    chip = hardware.known()[arguments.hardware] if arguments.hardware else None
    with tempfile.TemporaryDirectory() as scratch:
        path = (arguments.folder or Path(scratch)) / f"random-{arguments.model}"
        if not path.is_dir():
            load.make(path, ModelConfig.from_name(arguments.model))
        began = time.perf_counter()
        model, params, _ = checkpoint.load(path, dtype="bfloat16", quantize=arguments.quantize)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - began
    size = arithmetic.size(params)
    about = {"benchmark": "device", "device": jax.devices()[0].device_kind}
    rate = round(size / seconds / 1e9, 2)
    print(json.dumps(about | {"load_seconds": round(seconds, 2), "gigabytes_per_second": rate}))
    limits = {"bytes_per_second": read_bandwidth(), "operations_per_second": product_rate()}
    print(json.dumps(about | {name: float(f"{rate:.3g}") for name, rate in limits.items()}))
    for batch in arguments.batch:
        for prompt in arguments.prompt:
            found = measure(model, params, batch, prompt)
            found |= shares(found, model, params, batch, prompt, limits)
            if chip is not None:
                found |= estimates(model, batch, prompt, chip)
            found |= theirs.get((batch, prompt), {})
            print(json.dumps(about | {"batch": batch, "prompt": prompt} | found), flush=True)


def transformers(arguments) -> dict[tuple[int, int], dict[str, float]]:
    """Measures Transformers in a process of its own, before JAX reserves the device's memory."""
    command = [sys.executable, str(Path(__file__).with_name("torch_device.py"))]
    command += ["--model", arguments.model, "--tokens", str(TOKENS)]
    for name in ("batch", "prompt"):
        command += [f"--{name}", *map(str, getattr(arguments, name))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = {}
    for line in map(json.loads, out.splitlines()):
        case = line.pop("batch"), line.pop("prompt")
        found[case] = {f"transformers_{name}": rate for name, rate in line.items()}
    return found


def product_rate() -> float:
    """Returns operations a second in products of bfloat16 matrices, the best of five runs."""
    size = 8192 if jax.default_backend() != "cpu" else 1024
    matrix = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def shares(found: dict, model, params, batch: int, prompt: int, limits: dict) -> dict:
    """Returns the shares of the device's limits that the measured rates reach."""
    layout, of = request(model, batch, prompt)
    cache = programs.arguments("decode", model, layout, of)[1]
    moved = arithmetic.moved("decode", (params, cache), model.config)
    flops = arithmetic.flops("prefill", model.config, of)
    step = batch / found["decode_tokens_per_second"]
    token = flops / arithmetic.tokens("prefill", of)
    reached = token * found["prefill_tokens_per_second"] / limits["operations_per_second"]
    return {
        "decode_share_of_bandwidth": round(moved / step / limits["bytes_per_second"], 3),
        "prefill_mfu": round(reached, 3),
    }


def request(model, batch: int, prompt: int):
    """Returns a layout of one device, and the shapes of a request."""
    layout = Layout(jax.make_mesh((1,), ("device",), devices=jax.devices()[:1]), ())
    return layout, programs.shapes(layout, batch, prompt + TOKENS, "bfloat16")


def measure(model, params, batch: int, prompt: int) -> dict:
    """Returns the rates of a second run; the first run compiles."""
    prompts = shapes.prompts(model.config, batch, prompt)
    for _ in range(2):
        rows = generate(model, params, prompts, TOKENS, stop_ids=())
    first, total = rows[0].first_seconds, max(row.seconds for row in rows)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "prefill_tokens_per_second": round(batch * prompt / first, 1),
        "decode_tokens_per_second": round(batch * (TOKENS - 1) / (total - first), 1),
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def estimates(model, batch: int, prompt: int, chip: hardware.Hardware) -> dict:
    """Returns the planner's rates, which are upper bounds."""
    layout, of = request(model, batch, prompt)
    rates = {}
    for program in ("prefill", "decode"):
        held = programs.arguments(program, model, layout, of)
        flops = arithmetic.flops(program, model.config, of)
        moved = arithmetic.moved(program, held, model.config)
        seconds = hardware.estimate(chip, flops, moved, []).seconds
        count = arithmetic.tokens(program, of)
        rates[f"{program}_at_best"] = round(count / seconds, 1)
    return rates


if __name__ == "__main__":
    main()
