"""Writes results as Markdown tables, with the share of the machine's limit that each reaches."""

from collections.abc import Iterator
from pathlib import Path

import engines
import shapes
from results import Results

_TITLES = {
    "decode": "Decoding, tokens/s (share of the memory bandwidth's limit)",
    "prefill": "Reading prompts, tokens/s (share of the matrix products' limit)",
    "first": "A request for one token, ms",
    "memory": "Memory of a request above the loaded program, MB (peak of the process)",
}
_COLUMNS = {
    engines.OURS: "ours",
    engines.OURS_BFLOAT16: "ours, in bfloat16",
    engines.TRANSFORMERS: "Transformers",
    engines.LLAMA: "llama.cpp",
}


def write(results: Results, file: Path) -> None:
    """Writes all tables."""
    file.write_text("\n".join(_lines(results)) + "\n")


def _lines(results: Results) -> Iterator[str]:
    yield from _machine(results)
    for greedy in (False, True):
        for model in shapes.MODELS:
            for work, title in _TITLES.items():
                lines = results.find(work=work, model=model, greedy=greedy)
                if lines:
                    yield f"\n**{model}{', greedy' * greedy}: {title}**\n"
                    yield from _table(lines)
            for line in results.find(work="position", model=model, greedy=greedy):
                yield from _positions(line, results)
    yield from _agreement(results)


def _machine(results: Results) -> Iterator[str]:
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = machine["memory_bytes"] / 2**30
    yield (
        f"{machine['cores']} cores of {machine['processor']}, {memory:.0f} GiB; Python "
        f"{machine['python']}, {versions}."
    )
    if limits := results.limits:
        rates = ", ".join(
            f"{max(limits[dtype].values()) / 1e9:.0f} in {dtype}" for dtype in engines.PRECISIONS
        )
        yield (
            f"Measured limits: {max(limits['bytes'].values()) / 1e9:.1f} GB/s read, and matrix "
            f"products at {rates} (G operations/s)."
        )
    yield (
        "llama.cpp has no window: for longer prompts it does more work and computes other results. "
        "Its cache is in float16."
    )


def _table(lines: list[dict]) -> Iterator[str]:
    columns = _columns(lines)
    others = [name for name in columns if name in engines.OTHERS]
    heads = [_COLUMNS[name] for name in columns] + [f"ours / {_COLUMNS[name]}" for name in others]
    yield _row(["rows x prompt", "precision", *heads])
    yield _row(["---"] * (2 + len(heads)))
    for line in sorted(lines, key=_order):
        cells = [_cell(line, name) for name in columns]
        ratios = [line["ratios"].get(name) for name in others]
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        yield _row([f"{line['batch']} x {line['length']}", line["dtype"], *cells])


def _columns(lines: list[dict]) -> list[str]:
    return [name for name in _COLUMNS if any(name in line["values"] for line in lines)]


def _order(line: dict) -> tuple:
    return line["length"], line["batch"], list(engines.PRECISIONS).index(line["dtype"])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(line: dict, name: str) -> str:
    value = line["values"].get(name)
    if value is None:
        return "-"
    if line["unit"] == "s":
        return f"{value * 1e3:.1f}"
    if line["unit"] == "bytes":
        return f"{value / 1e6:.0f} ({line['totals'][name] / 1e6:.0f})"
    return f"{value:,.{0 if value >= 100 else 1}f} ({line['shares'][name]:.0%})"


def _positions(line: dict, results: Results) -> Iterator[str]:
    same = {name: line[name] for name in ("model", "dtype", "length", "greedy")}
    memory = results.find(work="position memory", **same)
    if not memory:
        return
    early, late = line["values"].values()
    early_bytes, late_bytes = memory[0]["values"].values()
    before, after = (label.split()[-1] for label in line["values"])
    yield (
        f"\n{line['model']}, {line['dtype']}: one of our tokens after {before} tokens takes "
        f"{early * 1e3:.3g} ms, and after {after} tokens {late * 1e3:.3g} ms. The requests take "
        f"{early_bytes / 1e6:.0f} and {late_bytes / 1e6:.0f} MB above the loaded program."
    )


def _agreement(results: Results) -> Iterator[str]:
    lines = results.find(work="agreement")
    if lines:
        yield "\n**Difference of the logits from those in float32, as a share of their spread**\n"
        columns = _columns(lines)
        yield _row(["model", "precision"] + [_COLUMNS[name] for name in columns])
        yield _row(["---"] * (2 + len(columns)))
        for line in sorted(lines, key=lambda line: (line["model"], _order(line))):
            values = [line["values"].get(name) for name in columns]
            cells = ["-" if value is None else f"{value:.1g}" for value in values]
            yield _row([line["model"], line["dtype"], *cells])
