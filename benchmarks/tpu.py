"""Compiles Mistral 7B for TPUs that need not exist, and compares the compiler's estimate with the
least time that the chip allows.

Prints one JSON line for each case: the estimate, the least time, their ratio ("share"), the bound
that the project sets for the ratio, and whether it holds. Nothing runs; `planning/cycles.py` says
how times are counted. Two programs of few layers are compiled, and extrapolated to all layers.

    pip install 'mistral-jax-flax[tpu-compiler]'
    python benchmarks/tpu.py --list
    python benchmarks/tpu.py [--chip v5e] [--layers 2 4] [--remat save_products] [--top 5]
        [--save-hlo DIR] [CASE ...]

A CASE is a part of a case's name, such as decode, decode-int8, or prompt-bf16-v0.3-512.

- decode: a step with full caches. The least time is that of the bytes of weights and cache.
  Copies that the compiler runs in the background have no estimate and are not counted. If they
  leave an estimate below the least time, the share is 1; "copy_milliseconds" is their time if
  nothing else uses the bandwidth, so that the true time is at most the sum of both.
- room: a step in rooms of 32,768 slots, of which 1,000 are filled. The least time is that of rooms
  of 1,024 slots with as many filled, by the same estimate.
- prompt: all chunks of prompts, each with the keys that it sees. The least time, as that of
  training, is that of the model's FLOPs at the chip's peak; recomputation is not counted.
- train: a step on 4,096 tokens a chip, with all parameters or with LoRA, on 1, 8 and 64 chips.
  "fits" says whether the state and the temporaries fit into the chip's memory. A program of few
  layers keeps more of them than it must, so the true number can be lower. A case takes minutes;
  `--layers 1 2` is enough.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import jax

from mistral_jax.checkpoint import quantization
from mistral_jax.checkpoint.lora import Lora
from mistral_jax.config import ModelConfig
from mistral_jax.engine import prefill
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN
from mistral_jax.parallel import hardware
from mistral_jax.parallel.sharding import Layout, abstract_params, read_layout
from mistral_jax.planning import arithmetic, cycles, forecast, programs
from mistral_jax.training.flops import mean_seen, of_attention, of_weights, per_token

MODELS = {"v0.1": "mistral-7b-v0.1", "v0.3": "mistral-7b-v0.3"}
TOPOLOGIES = {1: "1x1", 8: "2x4", 64: "8x8"}
CHIPS = ("v5e", "v6e")
# The most time of a step with rooms of 32,768 slots, as a multiple of that with rooms of 1,024; and
# the most bytes of temporaries.
ROOM, TEMPORARIES = 1.15, 20e6
LORA = Lora(rank=16, alpha=32)
# Slots that a kernel of decoding reads at a time.
SLOTS = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
      name: the case's name.
      program: one of `programs.PROGRAMS`.
      model: a key of `MODELS`.
      rows: number of rows; in training, a row for each chip.
      length: tokens of the prompt or of a row in training, or cache slots of a row.
      bound: least ratio of the least time to the estimate.
      int8: whether weights and cache are int8.
      filled: filled slots of each row; None = all.
      chips: number of chips, over which `fsdp` partitions the model.
      lora: whether adapters are trained.
    """

    name: str
    program: str
    model: str
    rows: int
    length: int
    bound: float
    int8: bool = False
    filled: int | None = None
    chips: int = 1
    lora: bool = False


def cases() -> Iterator[Case]:
    for kind, bound in (("bf16", 0.85), ("int8", 0.75)):
        int8 = kind == "int8"
        for rows in (1, 8, 32):
            yield Case(f"decode-{kind}-{rows}", "decode", "v0.1", rows, 4096, bound, int8)
        for rows in (1, 8):
            name = f"room-{kind}-{rows}"
            yield Case(name, "decode", "v0.3", rows, 32768, 1 / ROOM, int8, filled=1000)
        for model in MODELS:
            for length in (512, 4096, 32768):
                for rows in (1, 8):
                    name = f"prompt-{kind}-{model}-{length}x{rows}"
                    yield Case(name, "prefill", model, rows, length, 0.65, int8)
    for lora in (False, True):
        for chips in TOPOLOGIES:
            name = f"train-{'lora' if lora else 'full'}-{chips}"
            yield Case(name, "train", "v0.1", chips, 4096, 0.65, chips=chips, lora=lora)


def main() -> None:
    parser = argparse.ArgumentParser(description="The TPU compiler's estimates of Mistral 7B.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="parts of names [all cases]")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="[v5e and v6e]")
    parser.add_argument("--layers", nargs=2, type=int, default=[2, 4], metavar="N")
    parser.add_argument("--remat", default="save_products", help="as in a recipe, in training")
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
    for chip in arguments.chip or CHIPS:
        for case in chosen:
            print(json.dumps(measure(case, chip, arguments)), flush=True)


def measure(case: Case, chip: str, arguments: argparse.Namespace) -> dict:
    """Compiles a case; returns its line."""
    began = time.perf_counter()
    whole = ModelConfig.from_name(MODELS[case.model])
    few, more = arguments.layers
    first, second = (Estimate.of(case, layers, chip, arguments) for layers in (few, more))
    found = first.extended(second, (whole.num_layers - few) / (more - few))
    least, tokens = least_time(case, whole, chip)
    line = {
        "benchmark": "tpu",
        "case": case.name,
        "chip": chip,
        "milliseconds": round(found.seconds * 1e3, 3),
        "least_milliseconds": round(least * 1e3, 3),
        "tokens_per_second": round(tokens / found.seconds, 1),
        "kernel_milliseconds": round(found.kernels * 1e3, 3),
        "wait_milliseconds": round(found.waits * 1e3, 3),
        "copy_milliseconds": round(found.copies * 1e3, 3),
        "layer_milliseconds": round((second.seconds - first.seconds) / (more - few) * 1e3, 4),
        "temporaries_mb": round(found.temporaries / 1e6, 1),
    }
    if case.filled:  # The yardstick is a room that the filled slots almost fill.
        small = dataclasses.replace(case, length=1024)
        first, second = (Estimate.of(small, layers, chip, arguments) for layers in (few, more))
        least = first.extended(second, (whole.num_layers - few) / (more - few)).seconds
        line["small_room_milliseconds"] = round(least * 1e3, 3)
    share = float(least / found.seconds)
    share = share if case.filled else min(1.0, share)
    line |= {"share": round(share, 3), "bound": round(case.bound, 3), "holds": share >= case.bound}
    if case.program == "train":
        line["memory_gb"] = round((found.held + found.temporaries) / 1e9, 2)
        line["fits"] = found.held + found.temporaries <= hardware.known()[chip].memory
    if case.program == "decode":
        line["temporaries_hold"] = found.temporaries < TEMPORARIES
    return line | {"seconds_to_compile": round(time.perf_counter() - began, 1)}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler says of a step, or of a whole prompt.

    Attributes:
      seconds: its time.
      kernels: part of the time that is Pallas kernels', by arithmetic.
      waits: part of the time that waits for exchanges, by arithmetic.
      copies: time of the copies in the background, which `seconds` does not count.
      held: bytes of the arguments, such as weights and the state of training.
      temporaries: bytes.
    """

    seconds: float
    kernels: float
    waits: float
    copies: float
    held: float
    temporaries: float

    def extended(self, other: "Estimate", factor: float) -> "Estimate":
        """Extrapolates from this estimate over another one, which has more layers."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Estimate(*(a + factor * (b - a) for a, b in pairs))

    @classmethod
    def of(cls, case: Case, layers: int, chip: str, arguments) -> "Estimate":
        """Compiles a case's programs with a number of layers."""
        config = ModelConfig.from_name(MODELS[case.model])
        config = dataclasses.replace(config, num_layers=layers)
        on = layout(chip, case.chips)
        of = sizes(case, config, on)
        model = programs.model(config, on, of).clone(remat=arguments.remat or None)
        if case.program == "decode":
            room = prefill.slots(model, of.length)
            filled = min(room, case.filled or room)
            program = Compiled(case, model, of, chip, arguments)
            return program.estimate(-(-filled // SLOTS) * SLOTS / room)
        if case.program == "train":
            program = Compiled(case, model, of, chip, arguments)
            return program.estimate(arithmetic.attended("train", model, of))
        start, parts = 0, []
        while start < case.length:
            width = prefill.chunk_width(of.batch, case.length - start, model.backend)
            chunk = dataclasses.replace(of, chunk=width)
            program = Compiled(case, model, chunk, chip, arguments)
            parts.append(program.estimate(arithmetic.attended("prefill", model, chunk, start)))
            start += width
        *times, held, temporaries = zip(*map(dataclasses.astuple, parts), strict=True)
        return cls(*map(sum, times), max(held), max(temporaries))


class Compiled:
    """One compiled program; `known` keeps those of the last case."""

    known: ClassVar[dict] = {}

    def __init__(self, case: Case, model: Transformer, of: programs.Shapes, chip: str, arguments):
        self.case, self.chip, self.top = case, chip, arguments.top
        key = case, chip, of.chunk, model.config.num_layers
        if key not in self.known:
            if case not in {known[0] for known in self.known}:
                self.known.clear()
            on = layout(chip, case.chips)
            program = programs.lower(case.program, model, on, of).compile()
            text = forecast.text_of(program)
            sizes = program.memory_analysis()
            memory = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
            self.known[key] = text, memory, {}
            if arguments.save_hlo:
                arguments.save_hlo.mkdir(parents=True, exist_ok=True)
                name = f"{chip}-{case.name}-{of.length}-{of.chunk}-{model.config.num_layers}.txt"
                (arguments.save_hlo / name).write_text(text)
        self.text, self.memory, self.shares = self.known[key]

    def estimate(self, share: float) -> Estimate:
        """Reads the estimate, with a share of the work of the attention kernels."""
        if share not in self.shares:
            steps = self.case.program == "decode"
            chip = hardware.known()[self.chip]
            found = cycles.read(self.text, chip, self.case.chips, steps, share)
            for place, seconds, runs in cycles.costly(found, self.top if not self.shares else 0):
                print(f"{seconds * 1e6:12.1f} us {runs:5} runs  {place}", file=sys.stderr)
            kernels, waits = (
                cycles.total(each for each in found if each.kind == kind)
                for kind in ("kernel", "wait")
            )
            times = cycles.total(found), kernels, waits, cycles.copied(found)
            self.shares[share] = Estimate(*times, *self.memory)
        return self.shares[share]


@functools.cache
def layout(chip: str, chips: int) -> Layout:
    devices = list(forecast.tpu_devices(chip, TOPOLOGIES[chips]))
    if chips > 1:
        return read_layout("fsdp", ModelConfig.from_name(MODELS["v0.1"]), devices, None)
    mesh = jax.make_mesh((1,), ("device",), (jax.sharding.AxisType.Auto,), devices=devices[:1])
    return Layout(mesh, ())


def sizes(case: Case, config: ModelConfig, on: Layout) -> programs.Shapes:
    small = {}
    if case.int8:
        shapes = abstract_params(Transformer(config, backend=PLAIN))
        small = quantization.matrices(shapes, output=True)
    cache = "int8" if case.int8 else None
    train = case.program == "train"
    of = programs.shapes(on, case.rows, case.length, "bfloat16", small, cache, train)
    return dataclasses.replace(of, lora=LORA if case.lora else None)


def least_time(case: Case, config: ModelConfig, chip: str) -> tuple[float, int]:
    """Returns the least seconds of the whole model on each chip, and the number of tokens."""
    on, figures = layout(chip, case.chips), hardware.known()[chip]
    of = sizes(case, config, on)
    if case.program == "decode":
        model = programs.model(config, on, of)
        params, cache = programs.arguments("decode", model, on, of)
        room = prefill.slots(model, of.length)
        weights = arithmetic.moved("decode", (params, ()), config)
        held = arithmetic.size(cache) * min(case.filled or room, room) / room
        flops = arithmetic.flops("decode", config, of)
        return max((weights + held) / figures.bandwidth, flops / figures.flops), of.batch
    count = of.batch * case.length
    if case.program == "train":
        flops = count * per_token(config, case.length, adapters=case.lora)
    else:
        flops = of_weights(config, count, of.batch)
        flops += of_attention(config, count, mean_seen(config, case.length))
    return float(flops / figures.flops / case.chips), count


if __name__ == "__main__":
    main()
