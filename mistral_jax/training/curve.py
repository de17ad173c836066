"""The curve of a run: a JSON line for every few steps, and its plot. It decides nothing."""

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

EVERY = 10  # steps that a line sums up

Entry = dict[str, float]


class Curve:
    """Writes the curve as training goes, to a file that may hold an earlier part of it.

    Args:
      path: the JSONL file; None = none, and no report either.
      step: steps taken so far; lines of later ones, from before a crash, are dropped.
      report: is given every entry too.
    """

    def __init__(self, path: Path | None, step: int, report: Callable[[Entry], None]):
        if path is not None:
            earlier = [entry for entry in read(path) if entry["step"] <= step] if step else []
            path.write_text("".join(json.dumps(entry) + "\n" for entry in earlier))
        self._path, self._report = path, report
        self._recent: list[tuple[float, int]] = []
        self._began = time.perf_counter()

    def add(self, step: int, metrics: Mapping[str, Any], tokens: int, learning_rate: float) -> None:
        """Waits for the metrics of a step, and writes a line where one is due."""
        self._recent.append((float(metrics["loss"]), tokens))
        if step % EVERY:
            return
        seconds = time.perf_counter() - self._began
        losses, counts = zip(*self._recent, strict=True)
        self.write(
            {
                "step": step,
                "loss": sum(losses) / len(losses),
                "grad_norm": float(metrics["grad_norm"]),
                "learning_rate": learning_rate,
                "tokens_per_second": sum(counts) / seconds,
            }
        )
        self._recent, self._began = [], time.perf_counter()

    def write(self, entry: Entry) -> None:
        """Appends a line, rounded to what means something."""
        if self._path is None:
            return
        entry = {k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in entry.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._report(entry)


def read(path: Path | str) -> list[Entry]:
    """Reads the entries of a curve; a last line that a crash cut off is left out."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def check_plot() -> None:
    """Raises a ValueError if `plot` would, before hours of training rather than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("no plot without matplotlib: pip install matplotlib, or leave out --plot")


def plot(path: Path | str, target: Path | str) -> None:
    """Draws the training and the validation loss of a curve into an image file, with matplotlib."""
    from matplotlib.figure import Figure

    entries = read(path)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, losses, style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target)
