"""Compiles prefill and decoding for an H100 that need not exist, and counts kernels and bytes.

Prints one JSON line for each program: the kernels that it launches (in decoding, those of one step
of the loop), the gigabytes that they write (without updates in place), the most that one of them
writes, and the compiler's temporaries on top of weights and cache. Nothing runs and no time is
measured. Without a GPU the compiler cannot measure which of its kernels are the fastest.

    pip install 'jax[cuda12]'
    python benchmarks/gpu.py [--model mistral-7b-v0.1] [--layers 2] [--batch 1] [--prompt 4096]
        [--quantize int8] [--kv-cache-dtype int8] [--plain] [--show]
"""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator

import jax

from mistral_jax.checkpoint import quantization
from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.parallel.sharding import Layout, abstract_params
from mistral_jax.planning import programs

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 80000000000
}
"""
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
# Operations that launch no kernel.
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "opt-barrier"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mistral-7b-v0.1")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--quantize", choices=["int8"])
    parser.add_argument("--kv-cache-dtype", choices=["int8"])
    parser.add_argument("--plain", action="store_true", help="attention without cuDNN")
    parser.add_argument("--show", action="store_true", help="list the kernels, too")
    arguments = parser.parse_args()
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=[device()])
    layout = Layout(mesh, (("batch", "data"),))
    config = ModelConfig.from_name(arguments.model)
    config = dataclasses.replace(config, num_layers=arguments.layers)
    small = {}
    if arguments.quantize:
        small = quantization.matrices(
            abstract_params(Transformer(config, backend=PLAIN)), output=True
        )
    sizes = arguments.batch, arguments.prompt, "bfloat16", small, arguments.kv_cache_dtype
    of = programs.shapes(layout, *sizes)
    model = programs.model(config, layout, of)
    kernels = () if arguments.plain else ("cudnn", "triton")
    model = model.clone(backend=Backend("gpu", "9.0", alone=True, kernels=kernels))
    for program in ("prefill", "decode"):
        compiled = programs.lower(program, model, layout, of).compile()
        kernels = list(started(compiled.as_text(), loop=program == "decode"))
        written = [size for _, size in kernels]
        about = {"benchmark": "gpu", "program": program, "batch": of.batch, "tokens": of.chunk}
        found = {
            "kernels": len(kernels),
            "written_gb": round(sum(written) / 1e9, 4),
            "largest_gb": round(max(written) / 1e9, 4),
            "temporaries_gb": round(compiled.memory_analysis().temp_size_in_bytes / 1e9, 4),
        }
        print(json.dumps(about | found), flush=True)
        if arguments.show:
            for line, size in kernels:
                print(f"{size / 1e6:10.3f} MB  {line[:160]}")


def device() -> jax.Device:
    """Returns a device that describes an H100 to the compiler."""
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # The check would query a driver.
    described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    jax.config.update("jax_platforms", "cpu")
    return described.devices[0]


def started(program: str, loop: bool) -> Iterator[tuple[str, int]]:
    """Yields each kernel of a compiled program, or of its longest loop, and the bytes it writes.

    The kernels of an inner loop are yielded once for each iteration.
    """
    parts = {
        part.removeprefix("ENTRY ").split()[0]: part for part in re.split(r"\n(?=%|ENTRY)", program)
    }
    entry = next(part for part in parts.values() if part.startswith("ENTRY"))
    bodies = re.findall(r" while\(.*body=(%[\w.-]+)", entry)
    chosen = max((parts[name] for name in bodies), key=len) if loop else entry
    yield from _of(chosen, parts)


def _of(part: str, parts: dict[str, str]) -> Iterator[tuple[str, int]]:
    for whole in part.splitlines()[1:]:
        line = whole.partition(", metadata=")[0].strip().removeprefix("ROOT ")
        if not (match := re.match(r"%(\S+) = (\(.*?\)|\S+) ([\w-]+)\(", line)):
            continue
        name, result, operation = match.groups()
        if operation == "while":
            turns = re.search(r'known_trip_count":{"n":"(\d+)"', whole)
            body = re.search(r"body=(%[\w.-]+)", line).group(1)
            yield from int(turns.group(1) if turns else 1) * list(_of(parts[body], parts))
        elif operation not in FREE:
            in_place = "dynamic_update_slice" in name or "scatter" in name
            yield line, 0 if in_place else sum(map(size, re.findall(r"\w+\[[\d,]*\]", result)))


def size(array: str) -> int:
    """Returns the bytes of an array, given as text such as bf16[2,4096]."""
    dtype, _, shape = array[:-1].partition("[")
    return BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)


if __name__ == "__main__":
    main()
