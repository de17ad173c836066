"""The curve of a training run: a file with one JSON line per measurement, and its plot."""

import collections
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mistral_jax.base import memory
from mistral_jax.base.fields import Rule, check_table, integer, list_of, number, optional
from mistral_jax.base.files import read_records

_RATED = 10  # tokens/s is averaged over the last steps, this many
_SMOOTHED = 0.05  # width of the smoothing window, as a share of the curve

_FINITE = number(-sys.float_info.max, sys.float_info.max)
_MEASURED = optional(_FINITE)
_TEXT = Rule(
    "a sample",
    lambda x: isinstance(x, dict) and all(isinstance(x.get(k), str) for k in ("prompt", "text")),
)
_RULES = {
    "step": integer(0),
    "steps": integer(0),
    "skipped": integer(0),
    "tokens": integer(0, 1 << 62),
    "seconds": _FINITE,
    "samples": list_of(_TEXT),
}

Entry = dict[str, Any]


class Curve:
    """Appends entries to the curve file of a run, which may hold the curve up to a saved state.

    An entry has a `step` and one of: the metrics of a training step (see `add`), a
    `validation_loss`, or `samples`.

    Args:
      path: JSONL file; None = write and report nothing.
      step: steps taken so far. Entries of later steps, left by a run that crashed, are dropped.
      report: called with every entry.
      flops_per_token: FLOPs that the model's arithmetic needs per token.
      peak_flops: FLOP/s that the devices can do; None = unknown, and `mfu` is left out.
      steps: steps of the whole run, written to every entry of a training step; None = left out.
    """

    def __init__(
        self,
        path: Path | None,
        step: int,
        report: Callable[[Entry], None],
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        steps: int | None = None,
    ):
        earlier = []
        if path is not None:
            earlier = [entry for entry in read(path) if entry["step"] <= step] if step else []
            part = path.with_name(f".{path.name}.partial")
            part.write_text("".join(map(_to_line, earlier)), encoding="utf-8")
            os.replace(part, path)
        counted = next((entry for entry in reversed(earlier) if "tokens" in entry), {})
        self._path, self._report, self._steps = path, report, steps
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._tokens = counted.get("tokens", 0)
        self._began = time.perf_counter() - counted.get("seconds", 0.0)
        # Tokens and seconds of the last steps. The first step is left out because it compiles.
        self._rated: collections.deque[tuple[int, float]] = collections.deque(maxlen=_RATED)
        self._since: float | None = None

    def add(self, step: int, metrics: Mapping[str, Any], tokens: int, learning_rate: float) -> None:
        """Waits for the metrics of a training step and appends them as an entry.

        `tokens` and `seconds` count from the beginning of the run. `tokens_per_second` is averaged
        over the last 10 steps, `mfu` is the share of the peak FLOP/s that is used, and `memory` is
        the peak memory so far in bytes.

        Args:
          step: number of the step, from 1.
          metrics: scalars that the training step returned.
          tokens: number of tokens in the step's batch, without padding.
          learning_rate: learning rate of the step.
        """
        metrics = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        metrics.pop("targets", None)
        metrics["skipped"] = int(metrics.get("skipped", 0))
        now = time.perf_counter()
        self._tokens += tokens
        if self._since is not None:
            self._rated.append((tokens, now - self._since))
        entry = {"step": step} | ({} if self._steps is None else {"steps": self._steps})
        entry |= {"loss": math.nan, **metrics, "learning_rate": learning_rate}
        entry |= {"tokens": self._tokens, "seconds": round(now - self._began, 2)}
        if self._rated:
            counts, seconds = map(sum, zip(*self._rated, strict=True))
            entry["tokens_per_second"] = round(counts / seconds, 2)
            if self._peak_flops:
                used = counts / seconds * self._flops_per_token
                entry["mfu"] = round(used / self._peak_flops, 4)
        if (most := memory.peak()) is not None:
            entry["memory"] = most
        self.write(entry)
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent inside the block, such as a validation, from tokens/s."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += time.perf_counter() - began

    def write(self, entry: Entry) -> None:
        """Appends an entry and reports it; NaN and infinity become null."""
        if self._path is None:
            return
        entry = {name: None if _is_nan(value) else value for name, value in entry.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_to_line(entry))
        self._report(entry)

    def write_samples(self, step: int, samples: Iterable[tuple[str, str]]) -> None:
        """Appends an entry of sample texts, each a pair of a prompt and its continuation."""
        texts = [{"prompt": prompt, "text": text} for prompt, text in samples]
        self.write({"step": step, "samples": texts})


def read(path: Path | str) -> list[Entry]:
    """Reads the entries of a curve, without a last line that a crash truncated.

    Raises:
      ValueError: a line is not an entry; the message names the line.
    """
    if not Path(path).exists():
        return []
    found = []
    for where, record in read_records(path, is_log=True):
        entry = {"step": None} | record
        check_table(entry, dict.fromkeys(entry, _MEASURED) | _RULES, where)
        found.append(entry)
    return found


def points(entries: Iterable[Entry], name: str) -> list[tuple[int, float]]:
    """Returns (step, value) of every entry that has a value of this name."""
    return [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]


def say(step: int, value: float) -> str:
    """Formats a value of the curve and its step, for the plot and the report."""
    return f"{value:.4g} (step {step})"


def check_plot() -> None:
    """Raises a ValueError if matplotlib is missing, before hours of training instead of after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("no plot without matplotlib: pip install matplotlib, or leave out --plot")


def plot(path: Path | str, target: Path | str) -> None:
    """Plots the training and validation loss of a curve into an image file with matplotlib.

    The training loss is drawn faintly behind its moving average; the best validation loss is
    marked.
    """
    draw(read(path)).savefig(target, dpi=150)


def draw(entries: Iterable[Entry]) -> Any:
    """Draws the figure that `plot` saves, and returns it."""
    from matplotlib.figure import Figure

    entries = list(entries)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="loss (nats a target)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if training := points(entries, "loss"):
        steps, losses = zip(*training, strict=True)
        label = f"training, {say(*training[-1])} at the end"
        axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label=label)
        axes.plot(
            steps, _smooth(losses), color="C0", label="its mean over a twentieth of the steps"
        )
    if validation := points(entries, "validation_loss"):
        axes.plot(*zip(*validation, strict=True), "o-", color="C1", markersize=4, linewidth=1)
        step, loss = min(validation, key=lambda point: point[1])
        label = f"validation, {say(step, loss)} at best"
        axes.plot(step, loss, "*", color="C1", markersize=14, markeredgecolor="white", label=label)
    if training or validation:
        axes.legend(frameon=False)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """Returns the moving average over a centred window, which is shorter near both ends."""
    half, places = int(_SMOOTHED * len(values) / 2), np.arange(len(values))
    starts, ends = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    sums = np.cumsum([0.0, *values])
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _to_line(entry: Entry) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
