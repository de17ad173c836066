"""Compares speed and memory with Transformers and llama.cpp, on the same weights, in turns.

Prints one JSON line for each workload, and stores it in --out with the lines of other runs, from
which it then makes a Markdown table and a plot. Programs take turns in each round. Each time is the
median of all rounds, and each ratio the median of the ratios within a round. All programs sample at
temperature 0.7 and top-p 0.95. Before anything is timed, their logits for a prompt must agree. The
`compare` extra installs the other programs, and needs a C++ compiler to build llama.cpp. A program
that is not installed is left out. benchmarks/startup.py measures the time from the start of a
command.

    pip install 'mistral-jax-flax[compare]'
    python benchmarks/compare.py [--model 229M|nano] [--dtype float32 bfloat16 int8]
        [--work limits decode prefill first position memory] [--rounds 5] [--out runs/compare]
    python benchmarks/compare.py --work table    # from earlier measurements
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import agreement
import engines
import limits
import peaks
import plots
import shapes
import shares
import tables
import workloads
from formats import Formats
from results import Results

from mistral_jax.engine.sampling import Sampling

WORKS = ("limits", *workloads.CASES, "table")
FEW_TOKENS = 16  # length of the answers whose memory is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=shapes.MODELS, default="229M")
    parser.add_argument(
        "--dtype", nargs="+", choices=engines.PRECISIONS, default=list(engines.PRECISIONS)
    )
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--batch", type=int, nargs="+", help="workloads of so many rows only")
    parser.add_argument("--length", type=int, nargs="+", help="workloads of such prompts only")
    parser.add_argument("--rounds", type=int, default=5, help="fewer for prompts above 4096 tokens")
    parser.add_argument("--greedy", action="store_true", help="all choose the likeliest token")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(peak(arguments, **json.loads(arguments.worker))))
        return
    results = Results(arguments.out / "results.json")
    if "limits" in arguments.work or not results.limits:
        say("limits")
        results.set_limits(limits.measure())
    for dtype in arguments.dtype:
        about = {"model": arguments.model, "dtype": dtype, "greedy": arguments.greedy}
        for line in measure(arguments, dtype, results.limits):
            results.add(about | line)
    tables.write(results, arguments.out / "table.md")
    plots.draw(results, arguments.out / "plot.png")


def say(*words) -> None:
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def measure(arguments, dtype: str, known: dict) -> Iterator[dict]:
    """Yields the lines of one precision; models of other precisions are not in memory."""
    wanted = list(cases(arguments))
    names = [name for name in engines.PRECISIONS[dtype] if wanted and is_here(name)]
    formats = Formats(arguments.model, arguments.out / "models")
    programs, probes = {}, {None: None}
    for work, batch, length in wanted:
        say(dtype, work, batch, "x", length)
        line = {"work": work, "batch": batch, "length": length}
        if work == "memory":
            yield line | memory(arguments, dtype, {name: (name, batch, length) for name in names})
            continue
        if not programs:
            programs = {name: engines.make(name, formats, dtype) for name in names}
            found = agreement.check(formats, programs, dtype)
            about = {"work": "agreement", "batch": 1, "length": agreement.LENGTH, "greedy": False}
            yield about | {"values": found}
        limit = shares.limit_of(work, dtype)
        if limit not in probes:
            probes[limit] = limits.probe(limit, known)
        figures = workloads.measure(
            work,
            programs,
            shapes.prompts(formats.config, batch, length),
            sampling_of(arguments),
            arguments.rounds,
            probes[limit],
        )
        line |= {"settings": getattr(programs.get(engines.LLAMA), "settings", None)}
        reached = workloads.limited(work, figures, dtype, formats.config, batch, length)
        yield line | workloads.summary(work, figures) | reached
        if work == "position":
            places = {
                workloads.place(at): (engines.OURS, batch, at) for at in (workloads.EARLY, length)
            }
            yield line | {"work": "position memory"} | memory(arguments, dtype, places)


def is_here(name: str) -> bool:
    lacking = engines.missing(name)
    if lacking:
        say(f"{name} is left out: {' and '.join(lacking)} must be installed")
    return not lacking


def cases(arguments) -> Iterator[tuple[str, int, int]]:
    """Yields the requested workloads, memory first, before this process loads a model."""
    for work in sorted(set(workloads.CASES) & set(arguments.work), key=list(workloads.CASES).index):
        for batch, length in workloads.CASES[work]:
            if batch in (arguments.batch or [batch]) and length in (arguments.length or [length]):
                yield work, batch, length


def sampling_of(arguments) -> Sampling:
    return Sampling(temperature=0.0) if arguments.greedy else Sampling()


def memory(arguments, dtype: str, requests: dict[str, tuple[str, int, int]]) -> dict:
    """Runs each request (program, rows, length) in a process of its own; returns their line."""
    found = {}
    for label, (name, batch, length) in requests.items():
        request = {"name": name, "dtype": dtype, "batch": batch, "length": length}
        command = [sys.executable, __file__, "--model", arguments.model]
        command += ["--out", str(arguments.out), "--worker", json.dumps(request)]
        command += ["--greedy"] if arguments.greedy else []
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[label] = json.loads(out.splitlines()[-1])
    above = {label: [one["peak_bytes"] - one["loaded_bytes"]] for label, one in found.items()}
    totals = {label: one["most_bytes"] for label, one in found.items()}
    return workloads.summary("memory", above) | {"totals": totals}


def peak(arguments, name: str, dtype: str, batch: int, length: int) -> dict[str, int]:
    """Returns this process's memory: before requests, the peak of the second, the peak of both.

    Programs that compile do so in the first request.
    """
    formats = Formats(arguments.model, arguments.out / "models")
    program, sampling = engines.make(name, formats, dtype), sampling_of(arguments)
    prompts = shapes.prompts(formats.config, batch, length)
    loaded = peaks.resting()
    first = peaks.peak(lambda: program.request(prompts, FEW_TOKENS, sampling))
    peaks.resting()
    second = peaks.peak(lambda: program.request(prompts, FEW_TOKENS, sampling))
    return {"loaded_bytes": loaded, "peak_bytes": second, "most_bytes": max(first, second)}


if __name__ == "__main__":
    main()
