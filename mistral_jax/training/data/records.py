"""Records: lines of a file, read one by one and encoded as tokens with weights.

A record is a text, a prompt with its completion, a conversation, or a preference.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mistral_jax.base.files import check_regular, read_records
from mistral_jax.tokens.tokenizer import Tokenizer

_FORMS = (("text",), ("prompt", "completion"), ("messages",))
_PAIR_FORMS = (("chosen", "rejected"), ("input", "preferred_output", "non_preferred_output"))
_KEPT_REASONS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """The tokens of a training text, and their weights in the loss.

    Attributes:
      tokens: token ids, BOS first and EOS last, [n] int32.
      weights: weight of predicting each token from the tokens before it, [n] float32; 0 = not
        learnt, as BOS.
    """

    tokens: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Two examples with a common beginning, a preferred one and a rejected one."""

    chosen: Example
    rejected: Example


@dataclasses.dataclass
class Tally:
    """Counts of good and bad records.

    Attributes:
      good: number of records that gave an example or a pair.
      chat: whether the first good record has messages, instead of text.
      bad: number of records that were skipped.
      reasons: errors of the first few bad records, one sentence each.
    """

    good: int = 0
    chat: bool = False
    bad: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def skip(self, reason: str) -> None:
        """Counts a bad record."""
        self.bad += 1
        if len(self.reasons) < _KEPT_REASONS:
            self.reasons.append(reason)


def read(
    paths: Iterable[Path | str],
    tokenizer: Tokenizer,
    *,
    pairs: bool = False,
    skip_bad: bool = False,
    tally: Tally | None = None,
) -> Iterator[Example | Pair]:
    """Reads and encodes the records of files one by one, in constant memory.

    A file has one JSON object per line; blank lines are skipped. Files whose name ends with
    ".gz" are decompressed. The keys of a record tell its form; other keys are ignored:

    - "text": a text, learnt from its first token to EOS.
    - "prompt" and "completion": two strings, encoded as `sample` encodes a prompt and continues
      it, or two lists of messages. The completion (its answers) and EOS are learnt.
    - "messages": a conversation, see `messages.lesson_parts`, perhaps with the "tools" that its
      answers call, in OpenAI's form. Its answers are learnt.
    - "chosen" and "rejected" with a "prompt", all strings or all lists of messages; or without
      a prompt, as two conversations with a common beginning; or OpenAI's "input",
      "preferred_output" and "non_preferred_output". These are pairs.

    Args:
      paths: files, and folders that Hugging Face `datasets` saved (which needs `datasets`).
      tokenizer: the tokenizer that encodes the records.
      pairs: whether the records are pairs, instead of any other form.
      skip_bad: whether to skip bad records instead of raising an error, unless all are bad.
      tally: counts the records while they are read.

    Yields:
      An `Example` or a `Pair` for each record.

    Raises:
      ValueError: a file or a record cannot be read; the message has its file and line number
        (from 1).
    """
    tally, paths = Tally() if tally is None else tally, list(paths)
    encode = _encode_pair if pairs else _encode_example
    skip = tally.skip if skip_bad else None
    for path in map(Path, paths):
        found = _saved_by_datasets(path) if path.is_dir() else read_records(path, skip)
        for where, record in found:
            try:
                example = encode(record, tokenizer)
            except ValueError as error:
                reason = f"{where}: {error}"
                if not skip_bad:
                    raise ValueError(reason) from None
                tally.skip(reason)
            else:
                if not tally.good:
                    tally.chat = not isinstance(record[_form(record, pairs)[-1]], str)
                tally.good += 1
                yield example
    if tally.bad and not tally.good:
        raise ValueError(f"all records are bad, {tally.bad} of them, such as {tally.reasons[0]}")
    if not tally.good:
        names = ", ".join(map(str, paths))
        raise ValueError(f"there are no examples in {names}; expected at least one record")


def check_paths(paths: Iterable[Path | str]) -> None:
    """Raises the ValueError that `read` would raise for a file or folder that it cannot read."""
    for path in map(Path, paths):
        if path.is_dir():
            _check_folder(path)
        else:
            check_regular(path)


def _encode_example(record: Any, tokenizer: Tokenizer) -> Example:
    match _form(record, pairs=False):
        case ("text",):
            text = _string(record, "text")
            ids = tokenizer.encode(text, bos=tokenizer.adds_bos, eos=True)
            return _example(ids, [0.0] + [1.0] * (len(ids) - 1))
        case ("messages",):
            return _lesson(record["messages"], tokenizer, record.get("tools"))
        case _:
            return _continuation(record["prompt"], record["completion"], "completion", tokenizer)


def _encode_pair(record: Any, tokenizer: Tokenizer) -> Pair:
    if _form(record, pairs=True)[0] == "input":
        given = record["input"]
        if not isinstance(given, Mapping) or "messages" not in given:
            raise ValueError('"input" has no "messages"')
        _refuse_tools(given)
        prompt, names = given["messages"], ("preferred_output", "non_preferred_output")
    else:
        prompt, names = record.get("prompt"), ("chosen", "rejected")
    chosen, rejected = (record[name] for name in names)
    if chosen == rejected:
        raise ValueError(f'"{names[0]}" and "{names[1]}" are the same; expected two answers')
    if prompt is None:
        prompt, chosen, rejected = _divide(chosen, rejected)
    return Pair(
        _continuation(prompt, chosen, names[0], tokenizer),
        _continuation(prompt, rejected, names[1], tokenizer),
    )


def _form(record: Mapping[str, Any], pairs: bool) -> tuple[str, ...]:
    """Returns the keys of a record's form, with the key of the answer last."""
    # `datasets` gives every row all keys, with None for those that its record did not have.
    keys = {key for key, value in record.items() if value is not None}
    forms, others = (_PAIR_FORMS, _FORMS) if pairs else (_FORMS, _PAIR_FORMS)
    found = [form for form in forms if keys.issuperset(form)]
    if len(found) > 1:
        raise ValueError(f"it has {_list(found, 'and')}; expected one of these")
    if not found:
        hint = ""
        if any(keys.issuperset(form) for form in others):
            hint = ", as for training without pairs" if pairs else ", as for training on pairs"
        has = ", ".join(f'"{key}"' for key in sorted(keys)) or "no keys"
        raise ValueError(f"it has {has}{hint}; expected {_list(forms, 'or')}")
    _refuse_tools(record, but="tools" if found[0] == ("messages",) else None)
    return found[0]


def _list(forms: Sequence[Sequence[str]], word: str) -> str:
    return f" {word} ".join(" with ".join(f'"{key}"' for key in form) for form in forms)


def _refuse_tools(record: Mapping[str, Any], but: str | None = None) -> None:
    for key in ("tools", "functions", "available_tools"):
        if record.get(key) and key != but:
            raise ValueError(f'it has "{key}"; expected "tools" beside "messages"')


def _continuation(prompt: Any, answer: Any, name: str, tokenizer: Tokenizer) -> Example:
    """Encodes a prompt and the answer to be learnt, both strings or both lists of messages."""
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer:
            raise ValueError(f'"{name}" is empty; expected text to be learnt')
        begin = tokenizer.encode(prompt, bos=tokenizer.adds_bos or not prompt)
        learnt = tokenizer.encode(answer, eos=True, continues=bool(prompt))
        return _example(begin + learnt, [0.0] * len(begin) + [1.0] * len(learnt))
    if isinstance(prompt, list) and isinstance(answer, list):
        return _lesson([*map(_unlearnt, prompt), *answer], tokenizer)
    kinds = f"{type(prompt).__name__} and {type(answer).__name__}"
    raise ValueError(
        f'"prompt" and "{name}" are {kinds}; expected two strings, or two lists of messages'
    )


def _divide(chosen: Any, rejected: Any) -> tuple[list, list, list]:
    """Splits two conversations into their common beginning and their different ends."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise ValueError(
            'it has no "prompt"; expected one, or "chosen" and "rejected" as whole conversations '
            "(lists of messages)"
        )
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    parting = chosen[same : same + 1] + rejected[same : same + 1]
    roles = [message.get("role") for message in parting if isinstance(message, Mapping)]
    if roles != ["assistant", "assistant"]:
        raise ValueError(
            f'"chosen" and "rejected" part at messages[{same}]; expected an answer there in both'
        )
    return chosen[:same], chosen[same:], rejected[same:]


def _unlearnt(message: Any) -> Any:
    if isinstance(message, Mapping) and message.get("role") == "assistant":
        return {**message, "weight": 0}
    return message


def _lesson(messages: Any, tokenizer: Tokenizer, tools: Any = None) -> Example:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f'"messages" is a {type(messages).__name__}; expected a list')
    return _example(*tokenizer.encode_lesson(messages, tools=tools))


def _example(ids: Sequence[int], weights: Sequence[float]) -> Example:
    example = Example(np.array(ids, np.int32), np.array(weights, np.float32))
    if not example.weights.any():
        raise ValueError("its weights are too small for float32; expected one above 1e-38")
    return example


def _string(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f'"{key}" is a {type(record[key]).__name__}; expected a string')
    if not record[key]:
        raise ValueError(f'"{key}" is empty; expected text to be learnt')
    return record[key]


def _check_folder(path: Path) -> None:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(split.name for split in path.iterdir() if split.is_dir())
        raise ValueError(f"{path} has the splits {', '.join(splits)}; name one of these folders")
    if not (path / "state.json").is_file():
        raise ValueError(
            f"{path} is a folder, but not one that `datasets` saved; name its files, or save it "
            "with save_to_disk"
        )


def _saved_by_datasets(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the rows of a folder that `datasets` saved, and the name of each row's place."""
    _check_folder(path)
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"`datasets` is needed to read {path}: pip install 'mistral-jax-flax[datasets]'"
        ) from None
    try:
        rows = datasets.load_from_disk(str(path))
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except GeneratorExit:
        raise
    except Exception as error:  # Its libraries raise errors of many types for damaged files.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read by `datasets`: {reason}") from None
