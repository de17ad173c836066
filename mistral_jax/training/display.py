"""The display of a training run: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

from mistral_jax.training.curve import Entry

_EVERY = 10  # steps between two plain lines
_SHOWN_PROMPT = 200  # characters shown of a sample's prompt, counted from its end
_UNTOLD = ("step", "steps", "tokens", "seconds")
_IN_BAR = ("loss", "tokens_per_second", "mfu", "memory")


@contextlib.contextmanager
def show(steps: int | None = None) -> Iterator[Callable[[Entry], None]]:
    """Yields a function that shows an entry of the curve on standard error.

    On a terminal, a progress bar shows the latest training metrics, and validations, samples and
    skipped steps are printed above it. Elsewhere, every tenth step prints a line.

    Args:
      steps: steps of the whole run, used until an entry states them; None = unknown.
    """
    time_left = _TimeLeft()
    if sys.stderr is None:  # pythonw has no standard error.
        yield lambda entry: None
        return
    if not sys.stderr.isatty():

        def print_entry(entry: Entry) -> None:
            left, step = time_left(entry), entry["step"]
            is_due = step % _EVERY == 0 or step == entry.get("steps") or entry.get("skipped")
            if "loss" not in entry or is_due:
                print(line(entry, left), file=sys.stderr, flush=True)

        yield print_entry
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    columns = BarColumn(14), MofNCompleteColumn(), TextColumn("{task.fields[line]}", markup=False)
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as bar:
        task = bar.add_task("training", total=steps, line="preparing")

        def show_entry(entry: Entry) -> None:
            left = time_left(entry)
            if "loss" in entry:
                told = _fields({name: entry[name] for name in _IN_BAR if name in entry})
                bar.update(task, completed=entry["step"], total=entry.get("steps", steps))
                bar.update(task, line="  ".join(told + left), refresh=True)
            for sample in entry.get("samples", ()):
                prompt, text = _printable(_tail(sample["prompt"])), _printable(sample["text"])
                title = f"step {entry['step']}  sample\n", "bold"
                bar.console.print(Text.assemble(title, (prompt, "dim"), text), soft_wrap=True)
            if "validation_loss" in entry or entry.get("skipped"):
                bar.console.print(line(entry, []), soft_wrap=True)

        yield show_entry


def line(entry: Entry, time_left: list[str]) -> str:
    """Formats an entry of the curve as one line of text, or as one line for each sample."""
    told = [f"step {entry['step']}"]
    if "samples" in entry:
        pairs = ((_tail(sample["prompt"]), sample["text"]) for sample in entry["samples"])
        samples = (" ".join(json.dumps(s, ensure_ascii=False) for s in pair) for pair in pairs)
        return "\n".join(f"{told[0]}  sample  {sample}" for sample in samples)
    fields = {name: value for name, value in entry.items() if name not in _UNTOLD}
    if not fields.get("skipped"):
        fields.pop("skipped", None)
    told += _fields(fields)
    return "  ".join(told + time_left)


def duration(seconds: float) -> str:
    """Formats seconds as m:ss or h:mm:ss, such as 4:05 or 12:34:56."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def amount(value: float) -> str:
    """Formats a number with three digits and a unit prefix: 950, 12.3k, 4.57M."""
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


class _TimeLeft:
    """Estimates the time left from the pace since the first entry seen."""

    def __init__(self):
        self._first: tuple[int, float] | None = None

    def __call__(self, entry: Entry) -> list[str]:
        if not entry.keys() >= {"steps", "seconds"}:
            return []
        step, seconds = entry["step"], entry["seconds"]
        if self._first is None:
            self._first = step, seconds
        steps, spent = step - self._first[0], seconds - self._first[1]
        if not steps or step == entry["steps"]:
            return []
        return [f"{duration(spent / steps * (entry['steps'] - step))} left"]


def _fields(entry: Entry) -> list[str]:
    return [_field(name, value) for name, value in entry.items()]


def _field(name: str, value: float | None) -> str:
    match name:
        case "tokens_per_second":
            return f"{amount(value)} tokens/s"
        case "mfu":
            return f"{value:.0%} MFU"
        case "memory":
            return f"{value / 1e9:.3g} GB"
    number = "not finite" if value is None else f"{value:.4g}"
    return f"{name.replace('_', ' ')} {number}"


def _tail(text: str) -> str:
    return text if len(text) <= _SHOWN_PROMPT else "…" + text[-_SHOWN_PROMPT:]


def _printable(text: str) -> str:
    """Replaces control characters, which could move a terminal's cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
