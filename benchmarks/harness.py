"""Compares lm-evaluation-harness on this engine and on its own Transformers backend, in turns.

Both answer the same requests with the same weights in float32 on the CPU, after their answers have
been compared. Prints one JSON line for each kind of request: the median seconds of each backend,
and the median of the ratios within a round. Questions are made of Python's standard library.

    pip install 'mistral-jax-flax[parity]'
    python benchmarks/harness.py [--checkpoint DIR] [--work examples choices write] [--rounds 3]
        [--questions 40] [--batch 8]
"""

import argparse
import inspect
import json
import os
import random
import statistics
import tempfile
import textwrap
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import mistral_jax as mj
from mistral_jax.base import machine
from mistral_jax.checkpoint import checkpoint
from mistral_jax.evaluation.harness import MistralJax

WORKS = ("examples", "choices", "write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="folder of a checkpoint [the bundled model]")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    machine.use_compilation_cache()
    loaded = mj.load(arguments.checkpoint, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers_backend(arguments.checkpoint, Path(folder) / "hf", arguments.batch)

    def ours():
        # A new one, because it keeps its answers.
        return MistralJax(*loaded, arguments.batch, max_length=theirs.max_length)

    for work in arguments.work:
        kind, requests = make(work, arguments.questions)
        compare(getattr(ours(), kind)(requests), getattr(theirs, kind)(requests), work)
        getattr(ours(), kind)(requests)
        rounds = [
            [seconds(getattr(model, kind), requests) for model in (ours(), theirs)]
            for _ in range(arguments.rounds)
        ]
        line = {
            "work": work,
            "model": arguments.checkpoint or "nano",
            "requests": len(requests),
            "batch": arguments.batch,
            "ours": round(statistics.median(own for own, _ in rounds), 3),
            "transformers": round(statistics.median(other for _, other in rounds), 3),
            "ratio": round(statistics.median(other / own for own, other in rounds), 2),
            "processor": machine.processor(),
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(line), flush=True)


def transformers_backend(given: str | None, folder: Path, batch: int) -> HFLM:
    """Exports a checkpoint, and loads it as the harness does."""
    from mistral_jax.convert.to_torch import to_torch

    to_torch(checkpoint.find(given), folder)
    return HFLM(str(folder), dtype="float32", device="cpu", batch_size=batch)


def make(work: str, count: int) -> tuple[str, list[Instance]]:
    """Returns the kind of requests, and requests whose texts are lines of Python."""
    lines = [line for line in inspect.getsource(textwrap).splitlines() if len(line) > 30]
    draw = random.Random(0)

    def text(least, most):
        return " ".join(draw.choice(lines).strip() for _ in range(draw.randint(least, most)))

    def question(answer):
        options = "\n".join(f"{letter}. {draw.choice(lines).strip()}" for letter in "ABCD")
        return f"{text(1, 2)}\n{options}\nAnswer:{answer}"

    if work == "examples":
        shown = "\n\n".join(question(f" {draw.choice('ABCD')}") for _ in range(5))
        asked = [f"{shown}\n\n{question('')}" for _ in range(count)]
        pairs = [(context, f" {letter}") for context in asked for letter in "ABCD"]
        return "loglikelihood", instances("loglikelihood", pairs)
    if work == "choices":
        pairs = [
            (context, f" {text(1, 1)}")
            for context in (text(2, 4) for _ in range(count))
            for _ in range(4)
        ]
        return "loglikelihood", instances("loglikelihood", pairs)
    options = {"until": ["\n\n", "):\n"], "max_gen_toks": 64, "do_sample": False}
    shown = "\n\n".join(f"Q: {text(1, 1)}\nA: {text(1, 1)}" for _ in range(3))
    pairs = [(f"{shown}\n\nQ: {text(1, 3)}\nA:", dict(options)) for _ in range(count)]
    return "generate_until", instances("generate_until", pairs)


def instances(kind: str, pairs: list[tuple]) -> list[Instance]:
    """Returns requests of the harness."""
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(pairs)]


def compare(ours: list, theirs: list, work: str) -> None:
    """Raises an AssertionError if the answers differ by more than rounding."""
    if work == "write":
        alike = sum(own == other for own, other in zip(ours, theirs, strict=True))
        # Two tokens may be equally likely up to rounding.
        assert alike >= 0.9 * len(ours), f"{alike} of {len(ours)} texts are equal"
        return
    found, expected = ([score for score, _ in own] for own in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def seconds(function, requests: list[Instance]) -> float:
    """Returns the seconds that a call takes."""
    began = time.perf_counter()
    function(requests)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
