"""Multiple choice: the model's answer is the choice with the highest log-probability.

Tokens and scores follow lm-evaluation-harness.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mistral_jax.base.fields import show
from mistral_jax.base.files import read_records
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.score import likelihoods
from mistral_jax.evaluation.perplexity import check_finite
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokens.tokenizer import Tokenizer

_QUESTION = ("question", "query", "prompt", "context")
_ANSWER = ("answer", "gold")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its choices.

    Attributes:
      context: text before a choice; may be empty.
      choices: the possible answers, at least two.
      answer: index of the correct choice.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of questions that are answered correctly, by three rules.

    Attributes:
      questions: number of questions.
      acc: share of questions whose correct choice has the highest log-probability.
      acc_norm: the same, with log-probabilities divided by the choice's length in characters.
      acc_bytes: the same, with lengths in bytes of UTF-8; it differs for non-ASCII texts only.
      acc_stderr: standard error of `acc`; None for a single question.
      acc_norm_stderr: standard error of `acc_norm`; None for a single question.
      acc_bytes_stderr: standard error of `acc_bytes`; None for a single question.
    """

    questions: int
    acc: float
    acc_norm: float
    acc_bytes: float
    acc_stderr: float | None
    acc_norm_stderr: float | None
    acc_bytes_stderr: float | None


def read(path: Path) -> list[Question]:
    """Reads questions from a file of JSON Lines.

    A record has the question ("question", "query", "prompt" or "context"), "choices" (a list of
    strings), and the index from 0 or the letter from A of the correct one ("answer" or "gold").

    Raises:
      ValueError: a line has another form; the message names it.
      OSError: the file cannot be read.
    """
    questions = [_question(record, where) for where, record in read_records(path)]
    if not questions:
        raise ValueError(f"{path} is empty; expected JSON objects, one a line")
    return questions


def logprobs(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    batch: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """Computes the log-probability of every choice of every question.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      questions: the questions.
      batch: choices per batch.
      report: called repeatedly with the number of tokens read so far, and in total.

    Returns:
      The log-probability of each choice in nats, one list per question.
    """
    pairs = [encode(tokenizer, q.context, choice) for q in questions for choice in q.choices]
    rows = [context + choice for context, choice in pairs]
    given = [len(context) for context, _ in pairs]
    found = likelihoods(model, params, rows, batch, report, given)
    sums = iter(math.fsum(row.logprobs.tolist()) for row in found)
    return [[next(sums) for _ in question.choices] for question in questions]


def accuracy(questions: Sequence[Question], found: Sequence[Sequence[float]]) -> Accuracy:
    """Computes the accuracy from the log-probabilities that `logprobs` returned.

    Raises:
      ValueError: a log-probability is not finite.
    """
    check_finite(found)

    def judge(length):
        right = [
            float(np.argmax(np.divide(row, [*map(length, q.choices)])) == q.answer)
            for q, row in zip(questions, found, strict=True)
        ]
        error = statistics.stdev(right) / math.sqrt(len(right)) if len(right) > 1 else None
        return statistics.fmean(right), error

    rules = judge(lambda choice: 1), judge(len), judge(lambda choice: len(choice.encode()))
    means, errors = zip(*rules, strict=True)
    return Accuracy(len(questions), *means, *errors)


def encode(tokenizer: Tokenizer, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Encodes a question and a choice, with a space between them unless there is white space.

    The choice's tokens are those that follow the question's in the encoding of both together;
    they include the white space between the two.

    Raises:
      ValueError: the choice adds no token.
    """
    if not context:
        return [tokenizer.first_id], tokenizer.encode(choice)
    whole = context + choice if context[-1].isspace() else f"{context} {choice}"
    first = tokenizer.encode(context.rstrip(), bos=tokenizer.adds_bos)
    rest = tokenizer.encode(whole, bos=tokenizer.adds_bos)[len(first) :]
    if not rest:
        raise ValueError(f"the answer {choice!r} to {context[-40:]!r} has no token of its own")
    return first, rest


def _question(record: dict[str, Any], where: str) -> Question:
    """Builds a question from a record; a ValueError says what is wrong with it."""
    context, choices = _one_of(record, _QUESTION, where), record.get("choices")
    if not isinstance(context, str):
        raise ValueError(f"{where}: the question is {show(context)}; expected a string")
    if not isinstance(choices, list) or not all(isinstance(text, str) and text for text in choices):
        raise ValueError(f'{where}: "choices" is {show(choices)}; expected a list of strings')
    if len(choices) < 2:
        raise ValueError(f'{where}: "choices" has {len(choices)} entries; expected at least 2')
    answer = given = _one_of(record, _ANSWER, where)
    last = chr(ord("A") + len(choices) - 1)
    if isinstance(answer, str):
        answer = ord(answer.upper()) - ord("A") if len(answer) == 1 else -1
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: the answer is {show(given)}; expected an index from 0 to "
            f"{len(choices) - 1}, or a letter from A to {last}"
        )
    return Question(context, tuple(choices), answer)


def _one_of(record: dict[str, Any], names: Sequence[str], where: str) -> Any:
    """Returns the value of the only field among `names` that a record has."""
    found = [name for name in names if name in record]
    if len(found) != 1:
        raise ValueError(
            f"{where} has {found or 'none'} of {', '.join(names)}; expected one of them"
        )
    return record[found[0]]
