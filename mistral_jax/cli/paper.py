"""The suite "paper": the benchmark table of Mistral 7B, and the report "table" on its results."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mistral_jax.base.output import one_line, tell
from mistral_jax.cli import command, suites
from mistral_jax.evaluation import results, suite, tables
from mistral_jax.evaluation.results import Results

NAME = "paper"


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite on each checkpoint, and prints one table.

    Returns:
      0 if at least one column ran and none failed; otherwise 1.
    """
    from mistral_jax.parallel import distributed

    whole = suite.read(NAME)
    names = whole.choose(arguments.tasks)
    _check_table(arguments.table)
    columns = _columns()
    targets = suites.targets(arguments, f"NAME.{NAME}.json")
    sizes = [columns.parameters(target.folder) for target in targets]
    prepared, missing = columns.prepare(
        *(whole, names, arguments.include_path, arguments.limit, arguments.allow_code_execution),
        lambda name: None if _is_terminal() else tell(f"{name}: reading its data"),
        arguments.data,
    )
    for name, reason in missing.items():
        tell(f"{name}: not run: {reason}")
    found, is_good = [], bool(prepared)
    with _progress(len(targets) * sum(own.cost for own in prepared.values())) as advance:
        for target, size in zip(targets, sizes, strict=True):
            start = Results(NAME, target.name, target.given or target.name, size, {}, missing)
            if prepared:
                own = _measure(arguments, columns, target, start, prepared, advance)
                is_good &= own.not_run.keys() <= missing.keys()
                found.append(own)
            else:
                found.append(start)
    distributed.from_first(lambda: _show(arguments, whole, found))
    return 0 if is_good else 1


def report(arguments: argparse.Namespace) -> int:
    """Prints the table of results that earlier runs wrote; returns the exit status."""
    _check_table(arguments.table)
    files = []
    for path in arguments.results or [suites.RESULTS]:
        files += sorted(path.glob(f"*.{NAME}.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(
            f"there are no results in {', '.join(map(str, arguments.results)) or suites.RESULTS}; "
            f"run --suite {NAME} first"
        )
    found = [results.read(file) for file in files]
    for file, own in zip(files, found, strict=True):
        if own.suite != NAME:
            raise ValueError(f"{file} has the results of {own.suite!r}; expected {NAME!r}")
    _show(arguments, suite.read(NAME), found)
    return 0


def _columns():
    """Imports the module that needs the harness, which prints no bars of its own."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        from mistral_jax.evaluation import columns
    except ImportError as error:
        raise ValueError(
            f"--suite {NAME} needs lm-evaluation-harness ({error}): "
            "pip install 'mistral-jax-flax[harness]'"
        ) from None
    return columns


def _check_table(path: Path | None) -> None:
    if path is not None and path.suffix.lower() not in (".md", ".html"):
        raise ValueError(f"--table is {path}; expected a file that ends with .md or .html")


def _measure(arguments, columns, target, start, prepared, advance) -> Results:
    """Runs all columns on a checkpoint; writes the results after each."""
    from mistral_jax.evaluation.harness import MistralJax
    from mistral_jax.evaluation.journal import Journal, identity
    from mistral_jax.parallel import distributed

    model, params, tokenizer = command.load_model(arguments, target.given)
    with command.announced():
        mark = identity(target.folder, model.dtype, arguments.lora, arguments.quantize)
        kept = distributed.from_first(lambda: _earlier(target.file, mark))
        not_run = {name: own for name, own in start.not_run.items() if name not in kept}
        made = dataclasses.replace(start, columns=kept, not_run=not_run, identity=mark)
        with Journal(target.file.with_suffix(".journal"), mark) as journal:
            for name, column in prepared.items():
                show = advance(f"{target.name}, {name}", column.cost)
                loaded = model, params, tokenizer, arguments.batch
                own = MistralJax(*loaded, journal=journal, advance=show)
                result, failure = None, None
                try:
                    result = columns.run(column, own, arguments.limit)
                except Exception as error:
                    failure = f"failed: {type(error).__name__}: {error}"
                made = _with(made, name, result, failure)
                distributed.from_first(lambda: results.write(target.file, made))  # noqa: B023
                _tell_column(target.name, name, made)
    return made


def _earlier(file: Path, mark: str) -> dict:
    """Returns the columns of an earlier run of the same model."""
    if not file.exists():
        return {}
    earlier = results.read(file)
    return dict(earlier.columns) if earlier.identity == mark else {}


def _with(made: Results, name: str, result, failure: str | None) -> Results:
    """Returns results with a column, or with the reason why it failed."""
    columns = {own: made.columns[own] for own in made.columns if own != name}
    not_run = {own: made.not_run[own] for own in made.not_run if own != name}
    if failure is None:
        columns[name] = result
    else:
        not_run[name] = one_line(failure)
    return dataclasses.replace(made, columns=columns, not_run=not_run)


def _tell_column(model: str, name: str, made: Results) -> None:
    """Says that a column is done, unless a bar shows it."""
    if name in made.not_run:
        tell(f"{model}, {name}: {made.not_run[name]}")
    elif not _is_terminal():
        own = made.columns[name]
        tell(f"{model}, {name}: {own.value:.1f} ({own.questions:,} questions, {own.seconds:.0f} s)")


def _show(arguments: argparse.Namespace, whole: suite.Suite, found: list[Results]) -> None:
    """Prints the table, and writes it to a file."""
    own = [tables.compare(whole, found), tables.published(whole)]
    if arguments.table:
        is_html = arguments.table.suffix.lower() == ".html"
        text = tables.to_html(own) if is_html else tables.markdown(own)
        results.write_text(arguments.table, text)
    if arguments.json:
        for one in found:
            print(json.dumps(results.as_json(one), allow_nan=False), flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for number, name in enumerate(own[0].header):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in own[0].rows:
        shown.add_row(*(cell.replace("[", r"\[") for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    console.print(shown)
    for number, note in enumerate(own[0].notes, 1):
        console.print(f"[{number}] {note}", markup=False)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def _progress(cost: int) -> Iterator[Callable[[str, int], Callable[[float], None]]]:
    """Yields a function that begins a column, and returns a function of the share done since.

    A bar shows the time left for all columns on a terminal.
    """
    if not _is_terminal() or not cost:
        yield lambda name, own: lambda share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}"), TextColumn("{task.percentage:>3.0f} %")
    shown = text[0], BarColumn(), text[1], TimeRemainingColumn()
    with Progress(*shown, console=Console(stderr=True), speed_estimate_period=300) as bar:
        task = bar.add_task("", total=cost)

        def begin(name, own):
            bar.update(task, description=name)
            return lambda share: bar.advance(task, share * own)

        yield begin
