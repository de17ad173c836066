"""The suite "mt-bench": answers to questions of two turns, in FastChat's files."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator

from mistral_jax.cli import command, suites


def run(arguments: argparse.Namespace) -> int:
    """Writes the answers of each checkpoint; returns the exit status."""
    from mistral_jax.evaluation import mt_bench

    if len(arguments.files) != 1:
        raise ValueError(
            f"--suite mt-bench has {len(arguments.files)} files of questions; expected one FILE, "
            "such as MT-Bench's question.jsonl"
        )
    questions = mt_bench.read_questions(arguments.files[0])[: arguments.limit]
    for target in suites.targets(arguments, "mt-bench/NAME.jsonl"):
        _answer(arguments, target, questions)
    return 0


def _answer(arguments: argparse.Namespace, target: suites.Target, questions: list) -> None:
    from mistral_jax.evaluation import mt_bench

    model_id, path = target.file.stem, target.file  # FastChat takes the name from the file's.
    loaded = command.load_model(arguments, target.given, chat_form=arguments.chat_form)
    with command.announced(), _progress() as show:
        records = mt_bench.answer(
            *(*loaded, questions, path, model_id),
            slots=arguments.batch,
            new_tokens=arguments.max_tokens or mt_bench.NEW_TOKENS,
            report=show,
        )
    if arguments.json:
        fields = {"model": model_id, "questions": len(records), "answers": str(path)}
        print(json.dumps(fields), flush=True)
    else:
        print(f"{model_id} answered {len(records)} questions: {path}", flush=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (questions answered, questions in all), which updates a bar."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = "answering questions", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
