"""The suite "mt-bench": answers to questions of two turns, in FastChat's files."""

import argparse
import json

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
    from mistral_jax.cli.evaluate import show_progress
    from mistral_jax.evaluation import mt_bench

    model_id, path = target.file.stem, target.file  # FastChat takes the name from the file's.
    loaded = command.load_model(arguments, target.given, chat_form=arguments.chat_form)
    with command.announced(), show_progress("answering questions") as show:
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
