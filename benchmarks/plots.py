"""Plots results: rates in each precision, and rate and memory by prompt length."""

from pathlib import Path

import engines
from results import Results

_MODEL = "229M"
_LOOK = {
    engines.OURS: ("#1f4e9c", "this project"),
    engines.TRANSFORMERS: ("#e6a03c", "Transformers"),
    engines.LLAMA: ("#8a8a8a", "llama.cpp"),
}
_BARS = (
    ("decode", 1, 32, "decoding, 1 row"),
    ("decode", 8, 32, "decoding, 8 rows"),
    ("prefill", 1, 512, "reading 512 tokens"),
    ("prefill", 1, 2048, "reading 2048 tokens"),
)
_WIDTH = 0.26
_LABEL = 0.06  # height of a bar's label, as a share of the axis


def draw(results: Results, file: Path) -> None:
    """Plots the results of the larger model with sampling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    places = [axes[0, 0], axes[0, 1], axes[0, 2], axes[1, 0]]
    for place, (work, batch, length, title) in zip(places, _BARS, strict=True):
        _bars(place, results, work=work, batch=batch, length=length)
        place.set(title=title, ylabel="tokens/s")
    _curves(axes[1, 1], results, "prefill", 1)
    axes[1, 1].set(title="reading in float32, by length", ylabel="tokens/s")
    _curves(axes[1, 2], results, "memory", 1e-6)
    axes[1, 2].set(title="memory above the weights, float32", ylabel="MB")
    for place in axes.flat:
        place.grid(axis="y", alpha=0.3)
        place.set_axisbelow(True)
        place.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=110)


def _bars(axes, results: Results, **case) -> None:
    """Draws a group of bars for each precision, and for decoding one row the limit as a line."""
    labels = []
    for at, dtype in enumerate(engines.PRECISIONS):
        for line in results.find(model=_MODEL, dtype=dtype, greedy=False, **case):
            limit = None
            if case["work"] == "decode" and case["batch"] == 1:
                limit = line["values"][engines.OURS] / line["shares"][engines.OURS]
                label = "what the memory bandwidth allows"
                ends = at - 1.5 * _WIDTH, at + 1.5 * _WIDTH
                axes.hlines(limit, *ends, "black", label=label if at == 0 else None)
            for offset, (name, (colour, label)) in enumerate(_LOOK.items()):
                rate, x = line["values"].get(name, 0), at + (offset - 1) * _WIDTH
                axes.bar(x, rate, _WIDTH * 0.92, color=colour, label=label if at == 0 else None)
                labels.append((x, rate, limit, name))
    axes.set_xticks(range(len(engines.PRECISIONS)), engines.PRECISIONS)
    axes.set_xlim(-0.55, len(engines.PRECISIONS) - 0.45)
    axes.margins(y=0.12)
    for label in labels:
        _label(axes, *label)


def _label(axes, x: float, rate: float, limit: float | None, name: str) -> None:
    """Writes a rate above its bar, or inside it if the line of the limit would cross the text."""
    height = _LABEL * axes.get_ylim()[1]
    inside = limit is not None and rate - height < limit < rate + height and rate > height
    axes.annotate(
        f"{rate:.0f}" if rate else "-",
        (x, min(rate, limit) if inside else rate),
        (0, -2 if inside else 1),
        textcoords="offset points",
        ha="center",
        va="top" if inside else "bottom",
        fontsize=7,
        color="white" if inside and name == engines.OURS else "black",
    )


def _curves(axes, results: Results, work: str, scale: float) -> None:
    """Plots float32 results of a workload against the length of the prompt."""
    lines = results.find(work=work, model=_MODEL, dtype="float32", batch=1, greedy=False)
    lines.sort(key=lambda line: line["length"])
    for name, (colour, _) in _LOOK.items():
        points = [
            (line["length"], line["values"][name] * scale)
            for line in lines
            if name in line["values"] and line["length"] >= 512
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour)
    lengths = [line["length"] for line in lines if line["length"] >= 512]
    if not lengths:
        return
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    axes.set_xticks(lengths, map(str, lengths))
    axes.minorticks_off()
    axes.set_xlabel("tokens of the prompt")
