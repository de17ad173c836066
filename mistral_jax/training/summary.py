"""The report of a finished run, for people: `<run>/report.md`, and `<run>/curve.png`.

It reads the files in the run's folder. The picture needs matplotlib.
"""

import importlib.util
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import Rule, check_table, list_of
from mistral_jax.base.files import parse_json, read_json, read_text
from mistral_jax.training import curve
from mistral_jax.training.curve import Entry, points
from mistral_jax.training.display import amount, duration

_SOURCE_TYPES = {"name": str, "version": str, "files": int, "bytes": int | float}
_SOURCE = Rule(
    "a source of the corpus",
    lambda x: (
        isinstance(x, dict)
        and all(isinstance(x.get(name), kind) for name, kind in _SOURCE_TYPES.items())
    ),
)
_CURVES = tuple(
    f"{of}{name}" for of in ("", "validation_") for name in ("loss", "accuracy", "margin")
)


def write(folder: Path, recipe: Mapping[str, Any], result: Path, step: int, command: str) -> str:
    """Writes the report of a run; returns a few lines of it for the terminal.

    Args:
      folder: folder of the run.
      recipe: its recipe, from `Recipe.to_dict`.
      result: folder of the result: a checkpoint, or adapters.
      step: step of the result.
      command: command that uses the result.
    """
    entries = curve.read(folder / "curve.jsonl")
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        curve.plot(folder / "curve.jsonl", folder / "curve.png")
    parts = [
        f"# {folder.name}",
        _table(("", ""), _facts(folder, recipe, entries)),
        "## Loss",
        _table(("", "first", "last", "best"), _losses(entries)),
        *(["![loss](curve.png)"] if drawn else []),
        *_samples(entries),
        "## Use",
        f"The result, of step {step:,}, is in `{result}`:",
        _block(command),
        "`recipe.json` has all settings of the run, `curve.jsonl` all of its measurements.",
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    what = "adapters are" if recipe.get("lora") else "model is"
    return "\n".join(
        [
            *_in_short(entries),
            f"report: {folder / 'report.md'}",
            f"the {what} in {result}",
            f"to use it: {command}",
        ]
    )


def _facts(folder: Path, recipe: Mapping[str, Any], entries: Sequence[Entry]):
    """Yields table rows about the model, the data, time, speed and memory."""
    new = recipe.get("model")
    yield (
        "model",
        f"{new}, from nothing" if new else recipe.get("checkpoint") or "the bundled model",
    )
    yield "trained", _trained(recipe)
    yield from _data(folder / "data")
    yield "steps", f"{_last(entries, 'step'):,} of {recipe['rows']} x {recipe['context']} tokens"
    skipped = sum(entry.get("skipped", 0) for entry in entries)
    yield "skipped steps", f"{skipped}, not finite" if skipped else "none"
    if tokens := _last(entries, "tokens"):
        yield "tokens", f"{tokens:,}"
        yield "time", duration(_last(entries, "seconds"))
    if rates := [rate for _, rate in points(entries, "tokens_per_second")]:
        yield "speed", f"{amount(statistics.median(rates))} tokens/s"
    if shares := [share for _, share in points(entries, "mfu")]:
        yield "utilisation", f"{statistics.median(shares):.1%} of the devices' peak (MFU)"
    if memory := _last(entries, "memory"):
        yield "memory", f"{memory / 1e9:.3g} GB at most"


def _trained(recipe: Mapping[str, Any]) -> str:
    if lora := recipe.get("lora"):
        told = f"LoRA adapters of rank {lora['rank']}"
        if recipe.get("quantize", "none") != "none":
            told += f", beside weights in {recipe['quantize']}"
    else:
        told = "all parameters"
    if dpo := recipe.get("dpo"):
        told += f", on preferences (DPO, beta {dpo['beta']:g})"
    return told


def _data(folder: Path):
    """Yields table rows about the data, from the notes that `prepare` has written."""
    if (folder / "corpus.json").is_file():
        file = folder / "corpus.json"
        sources = parse_json(read_text(file), str(file))
        check_table({"corpus": sources}, {"corpus": list_of(_SOURCE)}, str(file))
        files, size = (sum(source[name] for source in sources) for name in ("files", "bytes"))
        names = ", ".join(f"{source['name']} {source['version']}" for source in sources)
        yield "data", f"{files:,} files of Python, {size / 1e6:.3g} MB, of {names}"
    if (folder / "data.json").is_file():
        notes = read_json(folder / "data.json")
        for name in ("train", "validation"):
            if name in notes:
                yield f"{name} data", _split(notes[name])


def _split(notes: Mapping[str, Any]) -> str:
    told = (
        f"{notes['examples']:,} examples in {notes['rows']:,} rows, {notes['fill']:.0%} filled; "
        f"{notes['learnt']:,} of {notes['tokens']:,} tokens learnt"
    )
    for name in ("bad", "too_long", "left_out"):
        if notes.get(name):
            told += f"; {notes[name]:,} {name.replace('_', ' ')}"
    return told


def _losses(entries: Sequence[Entry]):
    """Yields a table row for each measured value: its first, last and best, with their steps."""
    for name in _CURVES:
        if found := points(entries, name):
            best = (min if name.endswith("loss") else max)(found, key=lambda point: point[1])
            title = name if name.startswith("validation") else f"training {name}"
            chosen = found[0], found[-1], best
            yield title.replace("_", " "), *(curve.say(*point) for point in chosen)


def _samples(entries: Sequence[Entry]):
    """Yields the first and the last completion of each prompt, as Markdown."""
    rounds = [entry for entry in entries if "samples" in entry]
    if len(rounds) < 2:
        return
    yield "## Samples"
    for after in rounds[-1]["samples"]:
        yield "Prompt:"
        yield _block(after["prompt"])
        # A resumed run may have other prompts.
        told = [
            (entry["step"], sample["text"])
            for entry in rounds
            for sample in entry["samples"]
            if sample["prompt"] == after["prompt"]
        ]
        for step, text in dict((told[0], told[-1])).items():
            yield f"Step {step}:"
            yield _block(text) if text else "(nothing)"


def _in_short(entries: Sequence[Entry]):
    """Yields the line of the summary, if the curve has a loss."""
    if losses := points(entries, "loss"):
        told = f"loss {losses[0][1]:.4g} -> {losses[-1][1]:.4g}"
        if validations := points(entries, "validation_loss"):
            first = validations[0][1]
            step, best = min(validations, key=lambda point: point[1])
            told += f", validation {first:.4g} -> {best:.4g} at best, step {step}"
        tokens, seconds = _last(entries, "tokens"), _last(entries, "seconds")
        yield f"{losses[-1][0]} steps, {amount(tokens)} tokens in {duration(seconds)}: {told}"


def _last(entries: Sequence[Entry], name: str) -> float:
    return next((entry[name] for entry in reversed(entries) if name in entry), 0)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _block(text: str) -> str:
    """Formats a text as an indented code block, which may contain fences."""
    return "\n".join(f"    {line}" for line in text.rstrip("\n").split("\n"))
