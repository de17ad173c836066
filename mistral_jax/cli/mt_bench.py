"""The suite "mt-bench": answers to questions of two turns, in FastChat's files."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mistral_jax.cli import command, suites
from mistral_jax.tokens import storage


def run(arguments: argparse.Namespace) -> int:
    """Writes the answers of each checkpoint; returns the exit status."""
    from mistral_jax.evaluation import mt_bench

    if len(arguments.files) != 1:
        raise ValueError(
            f"--suite mt-bench has {len(arguments.files)} files of questions; expected one FILE, "
            "such as MT-Bench's question.jsonl"
        )
    questions = mt_bench.read_questions(arguments.files[0])[: arguments.limit]
    if len(arguments.results) > 1:
        raise ValueError("--results names several folders; expected the one to write to")
    (folder,) = arguments.results or [suites.RESULTS]
    for checkpoint in arguments.checkpoint or [None]:
        _answer(arguments, checkpoint, questions, folder / "mt-bench")
    return 0


def _answer(arguments: argparse.Namespace, name: str | None, questions: list, folder: Path) -> None:
    from mistral_jax.base import machine
    from mistral_jax.base.output import Screen
    from mistral_jax.checkpoint import checkpoint
    from mistral_jax.evaluation import mt_bench

    if arguments.compilation_cache:
        machine.use_compilation_cache()
    if note := machine.unseen_accelerator():
        command.tell(note)
    model_id = Path(name).absolute().name if name else checkpoint.BUNDLED.name
    path = folder / f"{model_id}.jsonl"
    with command.announced():
        model, params, tokenizer = checkpoint.load(
            name,
            sharding=arguments.sharding,
            mesh=arguments.mesh,
            dtype=arguments.dtype,
            lora=arguments.lora,
            quantize=arguments.quantize,
            chat_form=arguments.chat_form,
            progress=Screen(),
        )
        if tokenizer is None:
            raise ValueError(f"{name} has no {storage.EXPECTED}; put the model's there")
        with _progress() as show:
            records = mt_bench.answer(
                *(model, params, tokenizer, questions, path, model_id),
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
