"""The suite "guardrails": what models decline and answer, and how well they moderate texts."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mistral_jax.cli import command, suites
from mistral_jax.evaluation import guardrails, moderation, results
from mistral_jax.evaluation.guardrails import Prompt, Quality, Reply, Text, TradeOff
from mistral_jax.evaluation.journal import Journal, identity
from mistral_jax.evaluation.moderation import Moderation
from mistral_jax.parallel import distributed

_LABELS = (*moderation.CATEGORIES, moderation.ACCEPTABLE)
# Prompts or texts after which their results are stored.
_PART = 16

Report = Callable[[int, int], None]


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite for each checkpoint, and prints its tables; returns the exit status."""
    from mistral_jax.evaluation.positions import check_plot

    if arguments.plot:
        check_plot()
    # `--checkpoint DIR FILE` names a checkpoint and a set.
    words = arguments.checkpoint
    sets = [*arguments.files, *(Path(word) for word in words if _is_set(word))]
    arguments.checkpoint = [word for word in words if not _is_set(word)]
    targets = suites.targets(arguments, "NAME.guardrails.json")
    if len(targets) > 1 and arguments.plot:
        raise ValueError("--plot is for one checkpoint; plot each one by itself")
    prompts, texts = distributed.from_first(
        lambda: guardrails.read(sets or [guardrails.EXAMPLE], _LABELS)
    )
    prompts, texts = prompts[: arguments.limit], texts[: arguments.limit]
    for target in targets:
        _run(arguments, target, prompts, texts)
    return 0


def _is_set(word: str) -> bool:
    return Path(word).is_file() or word.endswith((".jsonl", ".jsonl.gz"))


def _run(
    arguments: argparse.Namespace,
    target: suites.Target,
    prompts: Sequence[Prompt],
    texts: Sequence[Text],
) -> None:
    mark = identity(target.folder, arguments.dtype, arguments.lora, arguments.quantize)
    asked = json.dumps([mark, arguments.chat_form, guardrails.NEW_TOKENS, moderation.CATEGORIES])
    name, place = target.name, target.file
    with Journal(place.with_suffix(".journal"), asked) as journal:
        work = _Work(arguments, target.given, journal)
        with _progress(name) as report:
            replies, found = work.do(prompts, texts, report)
    shares = [guardrails.trade_off(replies, safe) for safe in (False, True)] if prompts else []
    actual, categories = [own.category for own in texts], [own.category for own in found]
    matrix = guardrails.confusion(_LABELS, actual, categories) if texts else None
    quality = guardrails.quality(_LABELS, matrix, moderation.ACCEPTABLE) if texts else None
    stored = {
        "format": results.FORMAT,
        "suite": "guardrails",
        "model": name,
        "checkpoint": target.given or name,
        "new_tokens": guardrails.NEW_TOKENS,
        "trade_off": [dataclasses.asdict(own) for own in shares],
        "moderation": dataclasses.asdict(quality) if quality else None,
        "confusion": {"labels": _LABELS, "counts": [] if matrix is None else matrix.tolist()},
        "replies": [dataclasses.asdict(own) for own in replies],
        "texts": [
            dataclasses.asdict(own) | {"found": dataclasses.asdict(other)}
            for own, other in zip(texts, found, strict=True)
        ],
    }
    whole = json.dumps(stored, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    distributed.from_first(lambda: results.write_text(place, whole))
    _print(arguments, name, shares, quality, matrix)
    if arguments.plot:
        figure = guardrails.draw(shares, _LABELS, matrix)
        distributed.from_first(lambda: figure.savefig(arguments.plot))


class _Work:
    """The work on one checkpoint. The model is loaded when something is to be computed."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: str | None, journal: Journal):
        self._arguments, self._checkpoint, self._journal = arguments, checkpoint, journal
        self._loaded: tuple | None = None

    def do(
        self, prompts: Sequence[Prompt], texts: Sequence[Text], report: Report
    ) -> tuple[list[Reply], list[Moderation]]:
        """Answers the prompts without and with the safety prompt, and moderates the texts."""
        batch, key = self._arguments.batch, self._journal.key
        total = 2 * len(prompts) + len(texts)
        asked = {
            (own, safe): key("reply", [own.prompt, safe])
            for safe in (False, True)
            for own in prompts
        }
        judged = {own: key("text", own.text) for own in texts}

        def store(keys, values):
            for name, value in zip(keys, values, strict=True):
                self._journal.add(name, value)
            done = sum(name in self._journal for name in (*asked.values(), *judged.values()))
            report(done, total)

        for safe in (False, True):
            lacking = [own for own in prompts if asked[own, safe] not in self._journal]
            for part in guardrails.parts(lacking, _PART):
                made = guardrails.ask(
                    *self._load(bool(prompts)), part, safe, batch, guardrails.NEW_TOKENS
                )
                store(
                    [asked[own, safe] for own in part],
                    [[own.answer, own.by_model] for own in made],
                )
        lacking = [own for own in texts if judged[own] not in self._journal]
        for part in guardrails.parts(lacking, _PART):
            moderator = moderation.Moderator(*self._load(bool(prompts)))
            made = moderator([own.text for own in part], batch)
            store([judged[own] for own in part], [own.probabilities for own in made])
        replies = []
        for (own, safe), name in asked.items():
            answer, odds = self._journal[name]
            by_phrase = guardrails.declines(answer)
            replies.append(Reply(own.prompt, own.unsafe, safe, answer, by_phrase, odds))
        return replies, [moderation.of(self._journal[judged[own]]) for own in texts]

    def _load(self, asks: bool) -> tuple:
        """Loads the model at the first call.

        Raises:
          ValueError: the model has no tokenizer, or is to be asked but has no chat form.
        """
        if self._loaded is not None:
            return self._loaded
        arguments = self._arguments
        self._loaded = command.load_model(
            arguments, self._checkpoint, chat_form=arguments.chat_form
        )
        tokenizer = self._loaded[2]
        if asks and tokenizer.chat_form == "none":
            raise ValueError(
                f"{self._checkpoint} has no chat form, so it answers no prompts; expected an "
                "Instruct model, or a set of texts only"
            )
        return self._loaded


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Report]:
    from mistral_jax.cli.evaluate import show_progress

    with show_progress(f"guardrails of {name}") as report:
        yield report


def _print(
    arguments: argparse.Namespace,
    name: str,
    shares: Sequence[TradeOff],
    quality: Quality | None,
    matrix: Any,
) -> None:
    from mistral_jax.cli.evaluate import print_results

    model = {"model": name}
    if arguments.json:
        rows = [model | dataclasses.asdict(own) for own in shares]
        rows += [model | dataclasses.asdict(quality)] if quality else []
        for label, counts in zip(_LABELS, [] if matrix is None else matrix.tolist(), strict=False):
            rows.append(model | {"category": label} | dict(zip(_LABELS, counts, strict=True)))
        print_results(rows, as_json=True)
        return
    if shares:
        rows = [
            {
                "model": name,
                "safety prompt": "yes" if own.safe_prompt else "no",
                "unsafe": own.unsafe,
                "declined (phrases)": _percent(own.declined_by_phrase),
                "declined (model)": _percent(own.declined_by_model),
                "published": _percent(guardrails.PUBLISHED_DECLINED if own.safe_prompt else None),
                "harmless": own.harmless,
                "answered (phrases)": _percent(own.answered_by_phrase),
                "answered (model)": _percent(own.answered_by_model),
            }
            for own in shares
        ]
        print_results(rows, as_json=False)
        print(
            "published: of 175 unsafe prompts that are not public (arXiv 2310.06825, section 5)\n"
        )
    if quality:
        mine = {"texts": quality.texts, "precision": _percent(quality.precision)}
        mine |= {"recall": _percent(quality.recall), "accuracy": _percent(quality.accuracy)}
        theirs = {"model": "published", "texts": None}
        theirs |= {"precision": _percent(guardrails.PUBLISHED_PRECISION)}
        theirs |= {"recall": _percent(guardrails.PUBLISHED_RECALL), "accuracy": "-"}
        print_results([model | mine, theirs], as_json=False)
        print("precision and recall: acceptable texts are the positives, as in the paper.\n")
        rows = [
            {"category": label}
            | {f"found {label}": count for label, count in zip(_LABELS, counts, strict=True)}
            for label, counts in zip(_LABELS, matrix.tolist(), strict=True)
        ]
        print_results(rows, as_json=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
