"""Measures time and memory of prefill by prompt length, with a window of 1024 and without one.

The model is the 229M model with fewer layers, which are all alike. Its float32 weights are random.
Prints one JSON line for each length, measured in a process of its own: the seconds of a second run,
and the peak of the process's private memory, including the weights. Then plots both.

    python benchmarks/lengths.py [--layers 2] [--lengths 2048 ... 65536] [--out runs/lengths]
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import peaks
import shapes

from mistral_jax.engine.prefill import prefill
from mistral_jax.model.transformer import Transformer

KINDS = {"window": 1024, "none": None}
LENGTHS = tuple(2048 << i for i in range(6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--out", type=Path, default=Path("runs/lengths"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, length = arguments.worker
        print(json.dumps(measure(KINDS[kind], arguments.layers, int(length))))
        return
    lines = []
    for kind in KINDS:
        for length in arguments.lengths:
            command = [sys.executable, __file__, "--layers", str(arguments.layers)]
            command += ["--worker", kind, str(length)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            about = {"benchmark": "lengths", "layers": arguments.layers, "attends": kind}
            lines.append(about | {"tokens": length} | json.loads(out.splitlines()[-1]))
            print(json.dumps(lines[-1]), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(lines, arguments.out / "lengths.png")


def measure(window: int | None, layers: int, length: int) -> dict[str, float]:
    """Returns the seconds of a second run, and the peak of this process's private bytes."""
    config = dataclasses.replace(
        shapes.MODELS["229M"],
        num_layers=layers,
        sliding_window=window,
        max_positions=length + 1,
    )
    model = Transformer(config)
    token = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), token, token)["params"])
    prompts = shapes.prompts(config, 1, length)

    def read():
        jax.block_until_ready(prefill(model, params, prompts, length + 1))

    read()
    peaks.resting()
    began = time.perf_counter()
    most = peaks.peak(read)
    return {"seconds": round(time.perf_counter() - began, 3), "bytes": most}


def draw(lines: list[dict], file: Path) -> None:
    """Plots both: on logarithmic axes, a time that is linear in the tokens is a straight line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    looks = {"window": ("#1f4e9c", "window of 1024"), "none": ("#b3472f", "no window")}
    panels = (
        ("seconds", 1, "log", "seconds to read a prompt"),
        ("bytes", 1e-6, "linear", "MB, weights included"),
    )
    for axes, (name, scale, spacing, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for kind, (colour, label) in looks.items():
            points = [(x["tokens"], x[name] * scale) for x in lines if x["attends"] == kind]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
        tokens = sorted({x["tokens"] for x in lines})
        axes.set(title=title, xlabel="tokens", xscale="log", yscale=spacing)
        axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axes.set_ylim(bottom=0 if spacing == "linear" else None)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
