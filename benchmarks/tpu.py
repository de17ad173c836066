"""Compiles Mistral 7B for TPUs that need not exist, and compares the compiler's estimate with the
least time that the chip allows.

Prints one JSON line for each case: the estimate, the least time, their ratio ("share"), the bound
that the project sets for the ratio, and whether it holds. Nothing runs; `planning/cycles.py` says
how times are counted. Two programs of few layers are compiled, and the cost of a layer and of the
rest are extrapolated to all layers.

    pip install libtpu
    python benchmarks/tpu.py --list
    python benchmarks/tpu.py [--chip v5e] [--layers 2 4] [--top 5] [--save-hlo DIR] [CASE ...]

A CASE is a part of a case's name, such as decode, decode-int8, or prompt-v0.3-512.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from mistral_jax.checkpoint import quantization
from mistral_jax.config import ModelConfig
from mistral_jax.engine import prefill
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN
from mistral_jax.parallel import hardware
from mistral_jax.parallel.sharding import Layout, abstract_params
from mistral_jax.planning import arithmetic, cycles, forecast, programs
from mistral_jax.training.flops import mean_seen, of_attention, of_weights

MODELS = {"v0.1": "mistral-7b-v0.1", "v0.3": "mistral-7b-v0.3"}
TOPOLOGIES = {"v5e": "1x1", "v6e": "1x1", "v5p": "2x2x1"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
      name: the case's name.
      program: "prefill" or "decode".
      model: "v0.1" or "v0.3".
      rows: number of rows.
      length: tokens of the prompt, or cache slots of a row.
      bound: least ratio of the least time to the estimate.
      int8: whether weights and cache are int8.
      filled: filled slots of each row; None = all.
    """

    name: str
    program: str
    model: str
    rows: int
    length: int
    bound: float
    int8: bool = False
    filled: int | None = None


def cases() -> Iterator[Case]:
    for int8, bound in ((False, 0.85), (True, 0.75)):
        kind = "int8" if int8 else "bf16"
        for rows in (1, 8, 32):
            yield Case(f"decode-{kind}-{rows}", "decode", "v0.1", rows, 4096, bound, int8)
    for rows in (1, 8):
        yield Case(f"room-1024-{rows}", "decode", "v0.3", rows, 1024, 0.0, filled=1000)
        yield Case(f"room-32768-{rows}", "decode", "v0.3", rows, 32768, 0.0, filled=1000)
    for model in MODELS:
        for length in (512, 4096, 32768):
            for rows in (1, 8):
                name = f"prompt-{model}-{length}x{rows}"
                yield Case(name, "prefill", model, rows, length, 0.65)


def main() -> None:
    parser = argparse.ArgumentParser(description="The TPU compiler's estimates of Mistral 7B.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="parts of names [all cases]")
    parser.add_argument("--chip", action="append", choices=TOPOLOGIES, help="[v5e and v6e]")
    parser.add_argument("--layers", nargs=2, type=int, default=[2, 4], metavar="N")
    parser.add_argument("--top", type=int, default=0, help="list the most costly operations, too")
    parser.add_argument("--save-hlo", type=Path, metavar="DIR", help="save the optimised programs")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    arguments = parser.parse_args()
    chosen = [
        case
        for case in cases()
        if not arguments.cases or any(part in case.name for part in arguments.cases)
    ]
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return
    forecast.fake_devices(1)
    for chip in arguments.chip or ("v5e", "v6e"):
        for case in chosen:
            print(json.dumps(measure(case, chip, arguments)), flush=True)


def measure(case: Case, chip: str, arguments: argparse.Namespace) -> dict:
    """Compiles a case; returns its line."""
    began = time.perf_counter()
    figures = hardware.known()[chip]
    whole = ModelConfig.from_name(MODELS[case.model])
    points = []
    for layers in arguments.layers:
        config = dataclasses.replace(whole, num_layers=layers)
        points.append(estimate(case, config, chip, arguments))
    (first, few), (second, temporaries) = points
    a, b = arguments.layers
    layer = (second - first) / (b - a)
    seconds = first + (whole.num_layers - a) * layer
    least, tokens = least_time(case, whole, figures, layout(chip))
    share = float(least / seconds)
    return {
        "benchmark": "tpu",
        "case": case.name,
        "chip": chip,
        "milliseconds": round(seconds * 1e3, 3),
        "least_milliseconds": round(float(least) * 1e3, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "share": round(share, 3),
        "bound": case.bound,
        "holds": bool(share >= case.bound),
        "layer_milliseconds": round(layer * 1e3, 4),
        "rest_milliseconds": round((first - a * layer) * 1e3, 4),
        "temporaries_mb": round(max(few, temporaries) / 1e6, 1),
        "seconds_to_compile": round(time.perf_counter() - began, 1),
    }


@functools.cache
def layout(chip: str) -> Layout:
    device = list(forecast.tpu_devices(chip, TOPOLOGIES[chip]))[:1]
    mesh = jax.make_mesh((1,), ("device",), (jax.sharding.AxisType.Auto,), devices=device)
    return Layout(mesh, ())


def sizes(case: Case, config: ModelConfig, on: Layout) -> programs.Shapes:
    small = {}
    if case.int8:
        shapes = abstract_params(Transformer(config, backend=PLAIN))
        small = quantization.matrices(shapes, output=True)
    cache = "int8" if case.int8 else None
    return programs.shapes(on, case.rows, case.length, "bfloat16", small, cache)


def estimate(case: Case, config: ModelConfig, chip: str, arguments) -> tuple[float, int]:
    """Returns the estimated seconds of a step or of a whole prompt, and the temporaries."""
    on = layout(chip)
    of = sizes(case, config, on)
    model = programs.model(config, on, of)
    if case.program == "decode":
        return compiled(case, model, of, chip, arguments, case.filled or case.length)
    seconds, temporaries, rest = 0.0, 0, case.length
    read: dict[int, tuple[float, int]] = {}
    while rest > 0:
        width = prefill.chunk_width(of.batch, rest, model.backend)
        if width not in read:
            chunk = dataclasses.replace(of, chunk=width)
            read[width] = compiled(case, model, chunk, chip, arguments, case.length)
        seconds += read[width][0]
        temporaries = max(temporaries, read[width][1])
        rest -= width
    return seconds, temporaries


def compiled(case, model, of, chip, arguments, filled) -> tuple[float, int]:
    """Compiles one program; returns its estimated seconds, and its temporaries in bytes."""
    program = programs.lower(case.program, model, layout(chip), of).compile()
    text = program.as_text()
    room = prefill.slots(model, of.length)
    share = min(filled, room) / room
    if arguments.save_hlo:
        arguments.save_hlo.mkdir(parents=True, exist_ok=True)
        name = f"{chip}-{case.name}-{of.chunk}-{model.config.num_layers}.txt"
        (arguments.save_hlo / name).write_text(text)
    operations = cycles.read(text, hardware.known()[chip], case.program == "decode", share)
    costly = sorted(operations, key=lambda each: -each.seconds)[: arguments.top]
    for each in costly:
        kind = " (kernel)" if each.kernel else ""
        line = f"{each.seconds * 1e6:10.1f} us  {each.name}{kind} {each.types[:60]}  {each.source}"
        print(line, file=sys.stderr)
    return cycles.total(operations), program.memory_analysis().temp_size_in_bytes


def least_time(case: Case, config: ModelConfig, chip, on: Layout) -> tuple[float, int]:
    """Returns the least seconds of the whole model, and the number of tokens."""
    of = sizes(case, config, on)
    if case.program == "decode":
        model = programs.model(config, on, of)
        params, cache = programs.arguments("decode", model, on, of)
        room = prefill.slots(model, of.length)
        weights = arithmetic.moved("decode", (params, ()), config)
        held = arithmetic.size(cache) * min(case.filled or room, room) / room
        flops = arithmetic.flops("decode", config, of)
        return max((weights + held) / chip.bandwidth, flops / chip.flops), of.batch
    count = of.batch * case.length
    flops = of_weights(config, count, of.batch)
    flops += of_attention(config, count, mean_seen(config, case.length))
    return flops / chip.flops, count


if __name__ == "__main__":
    main()
