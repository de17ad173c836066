"""The report of an evaluation: tables or JSON Lines, and a bar. It computes nothing."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

_UNFOLDED = 1000

Value = str | int | float | None


def show(results: Sequence[Mapping[str, Value]], as_json: bool) -> None:
    """Prints results of one kind: as a table, or as a JSON object each."""
    if as_json:
        for result in results:
            # JSON has no infinity, and a loss may be one.
            known = {name: _finite(value) for name, value in result.items()}
            print(json.dumps(known, allow_nan=False), flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, value in results[0].items():
        side = "left" if isinstance(value, str) else "right"
        table.add_column(name.replace("_", " "), justify=side, overflow="fold")
    for result in results:
        table.add_row(*map(_cell, result.values()))
    # Only a terminal has an edge at which names are to be folded.
    Console(width=None if sys.stdout.isatty() else _UNFOLDED).print(table)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what shows how many tokens are done: a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = f"{what} tokens", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value or "-"
