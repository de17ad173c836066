"""The evaluation command, `python -m mistral_jax.evaluate`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_jax.cli import command, suites

_UNFOLDED = 1000  # columns of a table that is not printed on a terminal

Value = str | int | float | None

DESCRIPTION = """\
Measures how well a model predicts texts (perplexity, bits per byte) and how its loss depends on the
position in a text, how often it chooses the right answer, and its results on the tasks of
lm-evaluation-harness, one by one or as the table of benchmarks that Mistral 7B was announced with.
Values in brackets are defaults.
"""
EPILOG = """\
Examples:
  %(prog)s README.md docs/*.md
  %(prog)s --checkpoint mistral-7b-v0.1 book.txt --positions 16 \\
      --circle 16384 --plot loss.png
  %(prog)s --choices questions.jsonl
  %(prog)s --checkpoint mistral-7b-v0.3 --tasks hellaswag arc_easy
  %(prog)s --checkpoint mistral-7b-v0.1 --suite paper --table table.md

A .jsonl file has one text per line, as {"text": ...}; each text is evaluated separately. A line of
--choices is {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0}, or "answer": "A".
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _settle(_parser().parse_args(argv))
    return command.run(lambda: _run(arguments), show_traceback="traceback" in arguments)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog=command.called("evaluate"),
        usage="%(prog)s [FILE ...] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=26, width=100
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument_group("evaluations").add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="texts in UTF-8, of any length")
    add(
        "--positions",
        nargs="?",
        type=command.count,
        const=0,
        metavar="N",
        help="also print the loss by position in the text, in N equal buckets [powers of two]",
    )
    add(
        "--circle",
        type=command.count,
        metavar="T",
        help="with --positions N: read every T tokens of a text N times, each time rotated by "
        "another T / N tokens, so that all buckets average over the same tokens",
    )
    add("--plot", type=Path, metavar="FILE", help="plot the loss by position with matplotlib")
    add("--choices", type=Path, metavar="FILE", help="multiple-choice questions in JSON Lines")
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="tasks of lm-evaluation-harness, or columns of the suite",
    )
    add("--include-path", type=Path, metavar="DIR", help="folder with more tasks, in YAML")
    add("--data", type=Path, metavar="DIR", help="folder of TASK.jsonl: local data of tasks")
    add("--num-fewshot", type=int, metavar="K", help="examples before a question [the task's]")
    add("--limit", type=command.count, metavar="N", help="questions of each task [all]")

    suites.add_options(parser)

    group = parser.add_argument_group("the model")
    add = group.add_argument
    command.add_model(group, several=True)
    command.add_layout(group)
    add(
        "--batch", type=command.count, default=8, metavar="N", help="texts or answers at a time [8]"
    )
    command.add_cache(group)
    add = parser.add_argument_group("the output").add_argument
    add("--json", action="store_true", help="print each result as a JSON object on one line")
    return parser


def _settle(arguments: argparse.Namespace) -> argparse.Namespace:
    """Splits lists of words, which a suite reads whole; elsewhere further words may be files.

    Without a suite, `--checkpoint DIR FILE` names one checkpoint and a text, and so does
    `--tasks A FILE` if the file exists and is not a task in YAML.
    """
    named = [word for words in arguments.checkpoint or [] for word in words]
    tasks, files = arguments.tasks, []
    if not (arguments.suite or arguments.report):
        last = (arguments.checkpoint or [[]])[-1]
        named = last[:1]
        files = [Path(word) for words in arguments.checkpoint or [] for word in words[1:]]
        texts = [word for word in tasks[1:] if _is_text(word)]
        files += map(Path, texts)
        tasks = [word for word in tasks if word not in texts]
    arguments.files = [*arguments.files, *files]
    arguments.checkpoint = named
    arguments.tasks = [name for word in tasks for name in word.split(",") if name]
    return arguments


def _is_text(word: str) -> bool:
    return Path(word).is_file() and Path(word).suffix not in (".yaml", ".yml")


def _run(arguments: argparse.Namespace) -> int | None:
    suites.check(arguments)
    if arguments.suite or arguments.report:
        return suites.run(arguments)
    return _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    from mistral_jax.evaluation import choices, perplexity, positions
    from mistral_jax.parallel import distributed

    _check(arguments)
    arguments.checkpoint = arguments.checkpoint[0] if arguments.checkpoint else None
    if arguments.plot:
        positions.check_plot()
    texts = distributed.from_first(
        lambda: [perplexity.read_texts(path) for path in arguments.files]
    )
    path = arguments.choices
    questions = distributed.from_first(lambda: choices.read(path) if path else [])
    suite = _suite(arguments) if arguments.tasks else None

    loaded = command.load_model(arguments, arguments.checkpoint)
    with command.announced():
        if texts:
            _perplexity(arguments, loaded, texts)
        if questions:
            with show_progress("answering tokens") as show:
                found = choices.logprobs(*loaded, questions, arguments.batch, show)
            fields = dataclasses.asdict(choices.accuracy(questions, found))
            print_results([{"choices": str(path)} | fields], arguments.json)
        if suite is not None:
            print_results(suite(*loaded, arguments.batch), arguments.json)


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.files or arguments.choices or arguments.tasks):
        raise ValueError("there is nothing to evaluate; give a FILE, --choices or --tasks")
    if (arguments.positions is not None or arguments.plot) and not arguments.files:
        raise ValueError("--positions and --plot need texts; give a FILE")
    if arguments.circle and (not arguments.positions or arguments.circle % arguments.positions):
        raise ValueError(
            f"--circle is {arguments.circle}; expected a multiple of N in --positions N"
        )
    for name in ("include_path", "data", "num_fewshot", "limit"):
        if getattr(arguments, name) is not None and not arguments.tasks:
            raise ValueError(f"--{name.replace('_', '-')} is for --tasks; name some")


def _suite(arguments: argparse.Namespace) -> Callable[..., list[dict[str, Any]]]:
    """Prepares harness tasks before the model is loaded; returns a function that runs them."""
    try:
        from mistral_jax.evaluation.harness import prepare_tasks
    except ImportError as error:
        raise ValueError(
            f"--tasks needs lm-evaluation-harness ({error}): "
            "pip install 'mistral-jax-flax[harness]'"
        ) from None
    return prepare_tasks(
        arguments.tasks,
        arguments.include_path,
        arguments.num_fewshot,
        arguments.limit,
        arguments.data,
    )


def _perplexity(arguments: argparse.Namespace, loaded, texts: list[list[str]]) -> None:
    """Scores the texts of all files in common batches; prints the loss by file and by position."""
    from mistral_jax.evaluation import perplexity, positions
    from mistral_jax.parallel import distributed

    together = [text for own in texts for text in own]
    circles = _circles(arguments, loaded[2], together) if arguments.circle else []
    with show_progress("reading tokens") as show:
        found = perplexity.token_losses(*loaded, together, arguments.batch, show)
    rest = iter(found)
    named = [
        (str(path), perplexity.loss(own, [next(rest) for _ in own]))
        for path, own in zip(arguments.files, texts, strict=True)
    ]
    if len(named) > 1:
        named.append(("all", perplexity.loss(together, found)))
    print_results([_fields(name, loss) for name, loss in named], arguments.json)
    if arguments.positions is None and not arguments.plot:
        return
    if circles:
        with show_progress("reading circles of tokens") as show:
            found = perplexity.row_losses(*loaded[:2], circles, arguments.batch, show)
    buckets = positions.by_position(found, arguments.positions or None)
    print_results([bucket._asdict() for bucket in buckets], arguments.json)
    if arguments.plot:
        config = loaded[0].config
        distributed.from_first(lambda: positions.plot(buckets, config, arguments.plot))


def _circles(arguments: argparse.Namespace, tokenizer, texts: list[str]) -> list[list[int]]:
    """Returns the rows of tokens for --circle."""
    from mistral_jax.evaluation import positions

    length, count = arguments.circle, arguments.positions
    encoded = [tokenizer.encode(text) for text in texts]
    rows = [row for ids in encoded for row in positions.turns(ids, length, count)]
    if not rows:
        raise ValueError(
            f"--circle is {length}; the longest text has {max(map(len, encoded))} tokens"
        )
    return [[tokenizer.first_id, *row] for row in rows]


def _fields(name: str, loss) -> dict[str, Any]:
    return {
        "file": name,
        "documents": loss.documents,
        "tokens": loss.tokens,
        "bytes": loss.bytes,
        "loss": loss.per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
    }


def print_results(results: Sequence[Mapping[str, Value]], as_json: bool) -> None:
    """Prints results of one kind, as a table or as one JSON object per line."""
    if as_json:
        for result in results:
            fields = {name: _number(value) for name, value in result.items()}
            print(json.dumps(fields, allow_nan=False), flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, value in results[0].items():
        side = "left" if isinstance(value, str) else "right"
        table.add_column(name.replace("_", " "), justify=side, overflow="fold")
    for result in results:
        table.add_row(*map(_cell, result.values()))
    # Long names are folded at the width of a terminal, but not in a file or pipe.
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    Console(width=None if is_terminal else _UNFOLDED).print(table)


@contextlib.contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, in all), which updates a bar on a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _number(value: Value) -> Value:
    """Returns a value that JSON can hold: NaN and infinities become None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value or "-"
