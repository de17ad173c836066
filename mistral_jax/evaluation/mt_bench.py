"""MT-Bench: answers to questions of several turns, in the files that FastChat's judge reads.

Questions, temperatures and answers follow FastChat's `gen_model_answer.py`. Judging the answers is
the work of another model, and not of this package.
"""

import contextlib
import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

from mistral_jax.base.fields import check_table, either, integer, list_of, number, optional, string
from mistral_jax.base.files import read_records
from mistral_jax.engine.engine import Engine
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.sampling import Sampling
from mistral_jax.evaluation.results import write_text
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokens.answer import parse_answer
from mistral_jax.tokens.tokenizer import Tokenizer

NEW_TOKENS = 1024  # of an answer, as in FastChat
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER = 0.7  # temperature of all other categories
_MARGIN = 64  # tokens that the chat form may add to a turn
_STEP = 256

_logger = logging.getLogger(__name__)

_ID = either(integer(0), string())
_QUESTION = {
    "question_id": _ID,
    "category": string(),
    "turns": list_of(string()),
    "required_temperature": optional(number(0, 100)),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
      question_id: its number or name.
      category: what it is about, such as "writing".
      turns: what the user says, one text for each turn.
      temperature: temperature of the answers.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    temperature: float


def read_questions(path: Path) -> list[Question]:
    """Reads questions from a file of JSON Lines, such as MT-Bench's `question.jsonl`.

    Raises:
      ValueError: a line has another form, or two questions have the same id.
      OSError: the file cannot be read.
    """
    questions = {}
    for where, record in read_records(path):
        known = {name: record[name] for name in _QUESTION if name in record}
        check_table(known, _QUESTION, where)
        for name in ("question_id", "category", "turns"):
            if name not in known:
                raise ValueError(f"{where} has no {name}; expected question_id, category, turns")
        if not known["turns"] or not all(turn.strip() for turn in known["turns"]):
            raise ValueError(f"{where} has an empty turn or none; expected texts")
        if known["question_id"] in questions:
            raise ValueError(f"{where} has question_id {known['question_id']!r} a second time")
        temperature = known.get("required_temperature")
        if temperature is None:
            temperature = TEMPERATURES.get(known["category"], _OTHER)
        turns = tuple(known["turns"])
        question = Question(known["question_id"], known["category"], turns, temperature)
        questions[question.question_id] = question
    if not questions:
        raise ValueError(f"{path} is empty; expected JSON objects, one a line")
    return list(questions.values())


def read_answers(
    path: Path, questions: Sequence[Question], model_id: str
) -> dict[int | str, dict[str, Any]]:
    """Reads the answers that an earlier run wrote, by the id of their question.

    A last line that is cut off does not count, nor do answers to other questions.

    Raises:
      ValueError: the file holds something else, or the answers of another model.
      OSError: the file cannot be read.
    """
    if not path.exists():
        return {}
    turns = {question.question_id: len(question.turns) for question in questions}
    found = {}
    for where, record in read_records(path, is_log=True):
        try:
            check_table(record, {"question_id": _ID, "model_id": string()}, where)
            key, own, (choice,) = record["question_id"], record["model_id"], record["choices"]
            check_table(choice, {"turns": list_of(string())}, where)
            count = len(choice["turns"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{where} is no answer in FastChat's form; give --results another folder"
            ) from None
        if own != model_id:
            raise ValueError(
                f"{where} is an answer of {own!r}; expected {model_id!r}: give --results another "
                "folder"
            )
        if turns.get(key) == count:
            found[key] = record
    return found


def answer(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    path: Path,
    model_id: str,
    *,
    slots: int = 8,
    new_tokens: int = NEW_TOKENS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Answers questions, and writes a file with a line for each answer as soon as it is finished.

    The file keeps the answers that it has to these questions; the others are made. At the end it is
    in the order of the questions. Turns of several questions run as one continuous batch.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer, with a chat form.
      questions: the questions.
      path: file of the answers.
      model_id: name of the model in the file.
      slots: number of turns that are answered at a time.
      new_tokens: maximum number of tokens of an answer.
      report: called with the number of questions that are answered, and their number in all.

    Returns:
      The records of the file.

    Raises:
      ValueError: the model has no chat form, a question is too long, or as `read_answers`.
      OSError: the file cannot be read or written.
    """
    length = min(_length(tokenizer, questions, new_tokens), model.config.max_positions)
    for question in questions:
        if _first(tokenizer, question) >= length:
            raise ValueError(
                f"question {question.question_id} has more tokens than the model's {length} "
                "positions; shorten it"
            )
    records = read_answers(path, questions, model_id)
    left = [question for question in questions if question.question_id not in records]
    _write(path, records.values())
    report(len(records), len(questions))
    if left:
        with (
            open(path, "a", encoding="utf-8") as file,
            Engine(model, params, tokenizer, slots=slots, length=length) as engine,
            _pool(2 * slots) as pool,
        ):
            work = _Work(engine, tokenizer, length, new_tokens, model_id)
            for future in futures.as_completed([pool.submit(work.answer, one) for one in left]):
                record = future.result()
                records[record["question_id"]] = record
                file.write(_line(record))
                file.flush()
                report(len(records), len(questions))
    ordered = [records[question.question_id] for question in questions]
    _write(path, ordered)
    return ordered


def _first(tokenizer: Tokenizer, question: Question) -> int:
    """Returns the number of tokens before the first answer."""
    return len(tokenizer.encode_chat([{"role": "user", "content": question.turns[0]}]))


def _length(tokenizer: Tokenizer, questions: Sequence[Question], new_tokens: int) -> int:
    """Returns a number of tokens for all turns of any question, in steps that share programs."""
    most = max(
        _first(tokenizer, question)
        + sum(len(tokenizer.encode(turn)) for turn in question.turns[1:])
        + len(question.turns) * (new_tokens + _MARGIN)
        for question in questions
    )
    return -(-most // _STEP) * _STEP


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[futures.Executor]:
    """Yields threads; after an error, those that have not begun their work do not."""
    pool = futures.ThreadPoolExecutor(workers)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


class _Work(NamedTuple):
    """Answers questions with an engine."""

    engine: Engine
    tokenizer: Tokenizer
    length: int
    new_tokens: int
    model_id: str

    def answer(self, question: Question) -> dict[str, Any]:
        """Answers all turns of a question, each after the answers before it."""
        messages, texts = [], []
        for turn in question.turns:
            messages.append({"role": "user", "content": turn})
            count = len(self.tokenizer.encode_chat(messages))
            if count < self.length:
                room = min(self.new_tokens, self.length - count)
                texts.append(self._turn(messages, room, question))
            else:
                _logger.warning(
                    f"question {question.question_id} has no answer to turn {len(texts) + 1}: it "
                    f"has {count} tokens with the answers before, of at most {self.length}"
                )
                texts.append("")
            messages.append({"role": "assistant", "content": texts[-1]})
        return {
            "question_id": question.question_id,
            "answer_id": uuid.uuid4().hex,
            "model_id": self.model_id,
            "choices": [{"index": 0, "turns": texts}],
            "tstamp": time.time(),
        }

    def _turn(self, messages: list[dict[str, str]], new_tokens: int, question: Question) -> str:
        sampling = Sampling(question.temperature, top_p=1.0)
        completion = self.engine.submit(messages, new_tokens, sampling=sampling).result()
        if completion.error is not None:
            raise ValueError(f"question {question.question_id}: {completion.error}")
        parsed = parse_answer(self.tokenizer, completion.tokens)
        # The next turn does not see what the model thought.
        return (completion.text if parsed.thinking is None else parsed.text or "").strip()


def _write(path, records) -> None:
    write_text(path, "".join(map(_line, records)))


def _line(record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
