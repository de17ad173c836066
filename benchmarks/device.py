"""Measures one accelerator with a model of Mistral 7B's shape, beside the planner's estimate.

Writes random weights in bfloat16 as a checkpoint (--folder keeps it), loads them as any other,
and generates. One JSON line for loading, and one for each batch size.

    python benchmarks/device.py --hardware H100 [--folder DIR] [--model mistral-7b-v0.3]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import load
import peers

from mistral_jax import checkpoint
from mistral_jax.config import ModelConfig
from mistral_jax.generation.generate import generate
from mistral_jax.planning import arithmetic, hardware, programs
from mistral_jax.sharding import Layout

TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hardware", help="a chip of configs/hardware.toml, to compare with")
    parser.add_argument("--model", default="mistral-7b-v0.3")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or will be")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    arguments = parser.parse_args()
    chip = hardware.known()[arguments.hardware] if arguments.hardware else None
    with tempfile.TemporaryDirectory() as scratch:
        path = (arguments.folder or Path(scratch)) / f"random-{arguments.model}"
        if not path.is_dir():
            load.make(path, ModelConfig.from_name(arguments.model))
        began = time.perf_counter()
        model, params, _ = checkpoint.load(path, dtype="bfloat16")
        jax.block_until_ready(params)
        seconds = time.perf_counter() - began
    size = arithmetic.size(params)
    about = {"benchmark": "device", "device": jax.devices()[0].device_kind}
    rate = round(size / seconds / 1e9, 2)
    print(json.dumps(about | {"load_seconds": round(seconds, 2), "gigabytes_per_second": rate}))
    for batch in arguments.batch:
        found = measure(model, params, batch, arguments.prompt)
        if chip is not None:
            found |= estimates(model, batch, arguments.prompt, chip)
        print(json.dumps(about | {"batch": batch, "prompt": arguments.prompt} | found), flush=True)


def measure(model, params, batch: int, prompt: int) -> dict:
    """Returns the rates of a second run, the first of which compiles."""
    prompts = peers.prompts(model.config, batch, prompt)
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
    """Returns the planner's rates at best."""
    layout = Layout(jax.make_mesh((1,), ("device",), devices=jax.devices()[:1]), ())
    of = programs.shapes(layout, batch, prompt + TOKENS, "bfloat16")
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
