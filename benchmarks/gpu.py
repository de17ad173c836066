"""Compiles the programs for an H100 that need not exist, and counts their kernels and bytes.

Prints one JSON line for each program: the kernels that it launches (in decoding, those of one step
of the loop), the gigabytes that they read and write (without updates in place), the least that it
must read, the most that one kernel writes, what kernels around the loop of decoding write, and the
compiler's temporaries on top of weights and cache. A kernel is taken to read each of its operands
once, except for slots that are not filled. Nothing runs and no time is measured. Without a GPU the
compiler cannot measure which of its kernels are the fastest.

    pip install 'jax[cuda12]'
    python benchmarks/gpu.py [--only decode prefill train] [--layers 2] [--plain] [--show]
"""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mistral_jax.checkpoint import precision, quantization
from mistral_jax.checkpoint.lora import Lora, attach, init_adapters
from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops import triton
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.parallel.sharding import Layout, abstract_params
from mistral_jax.planning import arithmetic, programs
from mistral_jax.training.loss import make_loss_fn
from mistral_jax.training.optimizers import make_optimizer
from mistral_jax.training.states import abstract_state
from mistral_jax.training.step import Batch, make_train_step

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
BYTES |= {"s64": 8, "u64": 8, "f64": 8}
# Operations that launch no kernel.
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "opt-barrier"}
KERNELS = ("cudnn", "cudnn-training", "triton")


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, and the sizes that it is compiled for.

    Attributes:
      program: "prefill", "decode" or "train".
      rows: number of rows.
      tokens: tokens of a row, or cache slots of a row.
      model: name of the model's config.
      filled: number of slots that are filled in decoding; None = all.
      int8: whether weights and cache are int8.
      lora: whether to train adapters only.
    """

    program: str
    rows: int
    tokens: int = 4096
    model: str = "mistral-7b-v0.1"
    filled: int | None = None
    int8: bool = False
    lora: bool = False


NEW = "mistral-7b-v0.3"
CASES = (
    *(Case("decode", rows, int8=int8) for int8 in (False, True) for rows in (1, 8, 32)),
    *(Case("decode", 8, tokens, NEW, filled=1000) for tokens in (1024, 32768)),
    *(Case("prefill", rows) for rows in (1, 8)),
    Case("prefill", 1, int8=True),
    *(Case("prefill", rows, tokens, NEW) for rows, tokens in ((1, 4096), (1, 32768), (8, 4096))),
    *(Case("train", 1, lora=lora) for lora in (False, True)),
)


class Kernel(NamedTuple):
    """A launched kernel: its line in the program, and the bytes that it reads and writes."""

    line: str
    read: int
    written: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=programs.PROGRAMS, default=programs.PROGRAMS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="attention by XLA's operations")
    parser.add_argument("--show", action="store_true", help="list the kernels, too")
    arguments = parser.parse_args()
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=[device()])
    layout = Layout(mesh, (("batch", "data"),))
    kernels = () if arguments.plain else KERNELS
    for case in CASES:
        if case.program not in arguments.only:
            continue
        lowered, least = lower(case, layout, arguments.layers, kernels)
        compiled = lowered.compile()
        about = {"benchmark": "gpu", "layers": arguments.layers} | dataclasses.asdict(case)
        found, kernels_of = count(compiled, case)
        found["least_gb"] = round(least / 1e9, 4)
        print(json.dumps(about | found), flush=True)
        if arguments.show:
            for line, read, written in kernels_of:
                print(f"{read / 1e6:10.3f} {written / 1e6:10.3f} MB  {line[:160]}")


def lower(
    case: Case, layout: Layout, layers: int, kernels: tuple[str, ...]
) -> tuple[jax.stages.Lowered, float]:
    """Lowers the program of a case; returns the least bytes that it must read and write, too."""
    config = dataclasses.replace(ModelConfig.from_name(case.model), num_layers=layers)
    small = {}
    if case.int8:
        small = quantization.matrices(
            abstract_params(Transformer(config, backend=PLAIN)), output=True
        )
    sizes = case.rows, case.tokens, "bfloat16", small, "int8" if case.int8 else None
    of = programs.shapes(layout, *sizes, train=case.program == "train")
    model = programs.model(config, layout, of)
    model = model.clone(backend=Backend("gpu", "9.0", alone=True, kernels=kernels))
    held = programs.arguments(case.program, model, layout, of)
    if case.lora:
        return lower_lora(model, layout, of)
    least = arithmetic.moved(case.program, held, config)
    if case.program == "decode" and case.filled:
        cache = arithmetic.size(held[1])
        least -= cache - cache * case.filled // case.tokens
    return programs.lower(case.program, model, layout, of), least


def lower_lora(model: Transformer, layout: Layout, of: Any) -> tuple[jax.stages.Lowered, float]:
    """Lowers a training step of adapters beside frozen bfloat16 weights."""
    lora, optimizer = Lora(), make_optimizer("adamw", 1e-4, clip_norm=1.0)
    params = programs.weights("train", model, layout, of)
    frozen = precision.typed(params, jnp.dtype(jnp.bfloat16))
    one = jax.tree.leaves(params)[0].sharding
    adapters = jax.eval_shape(lambda: init_adapters(lora, params, jax.random.key(0)))
    adapters = jax.tree.map(lambda x: x.update(sharding=one), adapters)
    state = abstract_state(optimizer, adapters, layout).replace(frozen=frozen)
    state = jax.tree.map(lambda x: x.update(sharding=one), state)

    def assemble(trainable, frozen):
        return attach(frozen, trainable, lora.scale)

    places = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(make_loss_fn(model, assemble), optimizer, places=places)
    ids = jax.ShapeDtypeStruct((of.batch, of.length), jnp.int32, sharding=one)
    least = 2 * arithmetic.size(frozen) + 10 * arithmetic.size(adapters)
    return step.lower(state, Batch(ids, ids, ids)), least


def device() -> jax.Device:
    """Returns a device that describes an H100 to the compiler."""
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # The check would query a driver.
    described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    jax.config.update("jax_platforms", "cpu")
    return described.devices[0]


def count(compiled: jax.stages.Compiled, case: Case) -> tuple[dict[str, float], list[Kernel]]:
    """Returns what is printed of a program, and its kernels."""
    program, loop = compiled.as_text(), case.program == "decode"
    share = 1.0
    if loop and case.filled:
        share = -(-case.filled // triton.BLOCK) * triton.BLOCK / case.tokens
    kernels = list(started(program, loop, share))
    around = list(started(program, False, share)) if loop else kernels
    found = {
        "kernels": len(kernels),
        "read_gb": sum(kernel.read for kernel in kernels) / 1e9,
        "written_gb": sum(kernel.written for kernel in kernels) / 1e9,
        "largest_gb": max(kernel.written for kernel in kernels) / 1e9,
        "temporaries_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
    }
    if loop:  # The loop itself is yielded with the kernels of one step.
        own = sum(kernel.written for kernel in around) / 1e9
        found["around_gb"] = own - found["written_gb"]
    return {name: round(value, 4) for name, value in found.items()}, kernels


def started(program: str, loop: bool, share: float = 1.0) -> Iterator[Kernel]:
    """Yields the kernels of a program's entry, or of the body of its largest loop.

    The kernels of an inner loop are yielded once for each iteration.

    Args:
      program: the optimised program, as text.
      loop: whether to take the loop.
      share: share of keys and values that the kernel of decoding reads.
    """
    parts = {
        part.removeprefix("ENTRY ").split()[0]: part for part in re.split(r"\n(?=%|ENTRY)", program)
    }
    entry = next(part for part in parts.values() if part.startswith("ENTRY"))
    bodies = re.findall(r" while\(.*body=(%[\w.-]+)", entry)
    chosen = max((parts[name] for name in bodies), key=len) if loop else entry
    yield from _of(chosen, parts, share)


def _of(part: str, parts: dict[str, str], share: float) -> Iterator[Kernel]:
    sizes = {}
    for name, result, operation, operands, whole in _operations(part):
        sizes[name] = size(result)
        given, written = [sizes.get(operand, 0) for operand in operands], sizes[name]
        if operation == "while":
            turns = re.search(r'known_trip_count":{"n":"(\d+)"', whole)
            body = re.search(r"body=(%[\w.-]+)", whole).group(1)
            yield from int(turns.group(1) if turns else 1) * list(_of(parts[body], parts, share))
        elif operation not in FREE:
            if called := re.search(r" calls=(%[\w.-]+)", whole):
                given = map(min, given, _used(parts[called.group(1)]))
            elif name.startswith("pallas_call"):
                given = (x * share if x > written else x for x in given)
            if "dynamic_update_slice" in name or "scatter" in name:
                written = 0  # in place
            yield Kernel(whole.partition(", metadata=")[0].strip(), int(sum(given)), written)


def _used(part: str) -> list[int]:
    """Returns the most bytes that a fusion uses of each operand: of some, only slices."""
    alias, found, order = {}, {}, {}
    for name, result, operation, operands, whole in _operations(part):
        if operation == "parameter":
            alias[name] = name
            found[name] = 0
            order[name] = int(re.search(r" parameter\((\d+)\)", whole).group(1))
        elif operation == "bitcast" and operands[0] in alias:
            alias[name] = alias[operands[0]]
        else:
            for place, operand in enumerate(operands):
                if operand in alias:
                    sliced = place == 0 and operation in ("dynamic-slice", "gather", "slice")
                    updated = place == 0 and operation in ("dynamic-update-slice", "scatter")
                    used = size(result) if sliced else 0 if updated else math.inf
                    found[alias[operand]] += used
    return [found[name] for name in sorted(order, key=order.get)]


def _operations(part: str) -> Iterator[tuple[str, str, str, list[str], str]]:
    """Yields the name, result, operation, operands and line of each operation of a computation."""
    for whole in part.splitlines()[1:]:
        line = whole.partition(", metadata=")[0].strip().removeprefix("ROOT ")
        if match := re.match(r"%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)", line):
            name, result, operation, given = match.groups()
            yield name, result, operation, re.findall(r"%([\w.-]+)", given), whole


def size(result: str) -> int:
    """Returns the bytes of an array or tuple, given as text such as bf16[2,4096]."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return sum(
        BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in arrays
    )


if __name__ == "__main__":
    main()
