"""Measures a model of Mistral 7B's shape on one accelerator, beside Transformers and the planner.

Writes random bfloat16 weights as a checkpoint (--folder keeps it), loads the checkpoint, and
generates. Prints one JSON line for loading, one for the limits of the device, and one for each
number of rows and length of prompts. Such a line has the tokens a second, the share of the measured
memory bandwidth that decoding reaches, and the share of the measured matrix-product rate that
prefill reaches (MFU). Transformers computes on the same weights in the same process; the first line
with it says how far the two models' logits are apart.

    python benchmarks/device.py --hardware H100 --transformers [--quantize int8] [--folder DIR]
        [--model mistral-7b-v0.3] [--layers 32] [--case 1x512 8x512 1x16384] [--seconds 300]
        [--profile DIR]
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

# PyTorch needs memory, too. JAX reads this when it first uses the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import shapes

from mistral_jax.checkpoint import checkpoint
from mistral_jax.config import ModelConfig
from mistral_jax.engine.generate import generate
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel import hardware
from mistral_jax.parallel.sharding import Layout, abstract_params
from mistral_jax.planning import arithmetic, estimate, programs

TOKENS = 128
CASES = ("1x512", "32x512", "1x4096", "8x512", "1x16384", "8x4096")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hardware", help="chip of configs/hardware.toml, for estimates")
    parser.add_argument("--model", default="mistral-7b-v0.3")
    parser.add_argument("--layers", type=int, help="number of layers; default: the model's")
    parser.add_argument("--folder", type=Path, help="folder of the checkpoint, to keep it")
    parser.add_argument("--case", nargs="+", default=CASES, help="rows x tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of an answer")
    parser.add_argument("--quantize", choices=["int8"], help="round the weights and the cache")
    parser.add_argument("--transformers", action="store_true", help="measure Transformers too")
    parser.add_argument("--seconds", type=float, help="begin no case after so many seconds")
    parser.add_argument("--profile", type=Path, help="folder for a profile of the first case")
    arguments = parser.parse_args()
    if arguments.transformers and arguments.quantize:
        parser.error("Transformers computes on the weights of this model, which are then in 8 bits")
    end = time.perf_counter() + (arguments.seconds or float("inf"))
    chip = hardware.known()[arguments.hardware] if arguments.hardware else None
    config = ModelConfig.from_name(arguments.model)
    config = dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)
    about = {"benchmark": "device", "device": jax.devices()[0].device_kind}
    with tempfile.TemporaryDirectory() as scratch:
        path = (arguments.folder or Path(scratch)) / f"random-{arguments.model}"
        if not path.is_dir():
            make(path, config)
        began = time.perf_counter()
        model, params, _ = checkpoint.load(path, dtype="bfloat16", quantize=arguments.quantize)
        model = model.clone(kv_cache_dtype=arguments.quantize)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - began
    rate = round(arithmetic.size(params) / seconds / 1e9, 2)
    found = {"load_seconds": round(seconds, 2), "gigabytes_per_second": rate}
    print(json.dumps(about | found | {"kernels": model.backend.kernels}), flush=True)
    limits = {"bytes_per_second": bandwidth(), "operations_per_second": product_rate()}
    print(json.dumps(about | {name: float(f"{rate:.3g}") for name, rate in limits.items()}))
    theirs = None
    if arguments.transformers:
        import torch_device

        theirs = torch_device.model_of(config, params)
        print(json.dumps(about | {"logits_apart": apart(model, params, theirs)}), flush=True)
    for case in arguments.case:
        if time.perf_counter() > end:
            break
        batch, prompt = map(int, case.split("x"))
        found = about | {"model": arguments.model, "layers": config.num_layers}
        found |= {"quantize": arguments.quantize, "batch": batch, "prompt": prompt}
        try:
            rates = measure(model, params, batch, prompt, arguments.tokens, arguments.profile)
        except jax.errors.JaxRuntimeError as error:  # for instance too little memory
            print(json.dumps(found | {"error": str(error).partition("\n")[0]}), flush=True)
            continue
        arguments.profile = None
        found |= rates | shares(rates, model, params, batch, prompt, limits)
        if chip is not None:
            found |= estimates(model, batch, prompt, chip)
        print(json.dumps(found), flush=True)
        if theirs is not None and time.perf_counter() < end:
            rows = shapes.prompts(config, batch, prompt)
            rates = torch_device.measure(theirs, rows, arguments.tokens)
            print(json.dumps(about | {"batch": batch, "prompt": prompt} | rates), flush=True)


def make(path: Path, config: ModelConfig) -> None:
    """Writes a checkpoint of random bfloat16 weights, the same in every layer."""
    from flax.traverse_util import flatten_dict

    rng, drawn = np.random.default_rng(0), {}
    described = flatten_dict(abstract_params(Transformer(config)), sep="/")
    with checkpoint.create(path, config, {name: x.shape for name, x in described.items()}) as write:
        for name, x in described.items():
            own = name.partition("/")[2] if name.startswith("layers_") else name
            if own not in drawn:
                scale = np.float32(config.embed_dim**-0.5)
                array = rng.standard_normal(x.shape, np.float32) * scale
                array = np.ones_like(array) if len(x.shape) == 1 else array
                drawn[own] = array.astype(ml_dtypes.bfloat16)
            write(name, drawn[own])


def apart(model, params, theirs) -> float:
    """Returns the largest difference of the logits of Transformers, by their largest number."""
    import torch_device

    (prompt,) = shapes.prompts(model.config, 1, 256)
    ids, places = np.array([prompt], np.int32), np.arange(256, dtype=np.int32)[None]
    ours = jax.jit(model.apply)({"params": params}, ids, places)[0][0, -1]
    other = torch_device.logits(theirs, prompt)
    return round(float(np.abs(np.asarray(ours) - other).max() / np.abs(other).max()), 5)


def bandwidth() -> float:
    """Returns the bytes a second of a sum of a large array, the best of five runs."""
    size = 1 << (31 if jax.default_backend() != "cpu" else 24)
    array = jnp.ones(size, jnp.bfloat16)
    return array.nbytes / fastest(jax.jit(jnp.sum), array)


def product_rate() -> float:
    """Returns operations a second in products of bfloat16 matrices, the best of five runs."""
    size = 8192 if jax.default_backend() != "cpu" else 1024
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / fastest(jax.jit(jnp.matmul), matrix, matrix)


def fastest(run, *arrays) -> float:
    """Returns the seconds of the fastest of five runs, after a first run that compiles."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        run(*arrays).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times[1:])


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


def measure(model, params, batch: int, prompt: int, tokens: int, profile: Path | None) -> dict:
    """Returns the rates of a second run; the first run compiles, and a third is profiled."""
    prompts = shapes.prompts(model.config, batch, prompt)

    def run():
        return generate(model, params, prompts, tokens, stop_ids=())

    began = time.perf_counter()
    run()
    compiling = time.perf_counter() - began
    rows = run()
    if profile is not None:
        with jax.profiler.trace(profile):
            generate(model, params, prompts, 8, stop_ids=())
    first, total = rows[0].first_seconds, max(row.seconds for row in rows)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "prefill_tokens_per_second": round(batch * prompt / first, 1),
        "decode_tokens_per_second": round(batch * (tokens - 1) / (total - first), 1),
        "first_run_seconds": round(compiling, 1),
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
        seconds = estimate.estimate(chip, flops, moved, []).seconds
        count = arithmetic.tokens(program, of)
        rates[f"{program}_at_best"] = round(count / seconds, 1)
    return rates


if __name__ == "__main__":
    main()
