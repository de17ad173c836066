"""Converts the messages of a conversation to the parts of a prompt: texts and control tokens.

Each text is encoded separately and is never searched for control tokens, so what a user types
cannot become the end of a turn. The tokenizer maps parts to token ids.
"""

import enum
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mistral_jax.base.fields import show

SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. "
    "Avoid harmful, unethical, prejudiced, or negative content. "
    "Ensure replies promote fairness and positivity."
)
LARGEST_WEIGHT = 1000
_ROLES = ("system", "user", "assistant")


class Control(enum.Enum):
    """A control token: it marks the structure of a conversation and has no text."""

    BOS = enum.auto()
    EOS = enum.auto()
    BEGIN_INST = enum.auto()
    END_INST = enum.auto()


Part = str | Control


def chat_parts(
    messages: Sequence[Mapping[str, Any]], version: str, safe_prompt: bool = False
) -> list[Part]:
    """Returns the parts of the prompt for a conversation; each text is encoded separately.

    The form is that of mistral-common: consecutive messages of one role are joined by an empty
    line, and the system text is put before the first user message (v1) or the last one (v2, v3).
    Unlike mistral-common, it accepts an empty answer, because a model may give one.

    Args:
      messages: dicts with "role" ("system", "user" or "assistant") and "content" (a string, or a
        list of `{"type": "text", "text": ...}`, which are joined by empty lines). System messages
        come first, if any; then user and assistant, beginning with user. The last message is the
        user's, or the assistant's with `"prefix": True`, which is an answer to continue. Keys
        whose value is None are ignored, and so is the "weight" of an answer.
      version: version of the tokenizer: "v1", "v2" or "v3".
      safe_prompt: whether to put Mistral's safety prompt before the system text.

    Returns:
      The parts in order. Their token ids, concatenated, are the prompt.

    Raises:
      ValueError: a message or the order of messages is invalid, or the chat form of the version is
        not supported.
    """
    _check_messages(messages, finished=False)
    return [part for part, _ in _lay_out(messages, version, safe_prompt)]


def lesson_parts(messages: Sequence[Mapping[str, Any]], version: str) -> list[tuple[Part, float]]:
    """Returns the parts of a finished conversation to train on, each with its loss weight.

    The parts before an answer are the prompt that `chat_parts` returns for the messages before it,
    except for the system text in v2 and v3: it is put before the last user message of the whole
    conversation, so earlier answers are trained without it.

    Args:
      messages: as for `chat_parts`, but the last message is an answer without "prefix". The
        "weight" of an answer is its loss weight, from 0 to 1000; the default is 1. Consecutive
        answers are joined and must have equal weights.
      version: as for `chat_parts`.

    Returns:
      The parts in order, each with its loss weight: that of the answer for its text and its EOS, 0
      for all other parts.

    Raises:
      ValueError: a message, the order of messages or a weight is invalid; an answer with a weight
        above 0 is empty; all weights are 0; or the chat form of the version is not supported.
    """
    _check_messages(messages, finished=True)
    parts = _lay_out(messages, version)
    if any(part == "" and weight for part, weight in parts):
        raise ValueError("an answer is empty; expected text to be learnt, or a weight of 0")
    if not any(weight for _, weight in parts):
        raise ValueError("no answer is to be learnt; expected one with a weight above 0")
    return parts


def _lay_out(
    messages: Sequence[Mapping[str, Any]], version: str, safe_prompt: bool = False
) -> list[tuple[Part, float]]:
    if version not in ("v1", "v2", "v3"):
        raise ValueError(f"a {version} tokenizer has a chat form of its own; expected v1, v2 or v3")
    runs = [
        _merge(role, list(run))
        for role, run in itertools.groupby(messages, key=lambda message: message["role"])
    ]
    system = runs.pop(0)[1] if runs[0][0] == "system" else ""
    system = _join([SAFE_PROMPT, system]) if safe_prompt else system
    if system:
        # Runs alternate between user and assistant, so the last user run is the last or the one
        # before it.
        place = 0 if version == "v1" else len(runs) - 1 - (runs[-1][0] == "assistant")
        runs[place] = ("user", f"{system}\n\n{runs[place][1]}", 0.0)

    parts: list[tuple[Part, float]] = [(Control.BOS, 0.0)]
    for role, text, weight in runs:
        if role == "assistant":
            text = text if version == "v1" else text.rstrip(" ")
            parts += [(text, weight), (Control.EOS, weight)]
        elif version == "v1":
            parts.append((f"[INST] {text} [/INST]", 0.0))
        else:
            parts += [(Control.BEGIN_INST, 0.0), (text, 0.0), (Control.END_INST, 0.0)]
    return parts[:-1] if messages[-1].get("prefix") else parts


def _merge(role: str, run: Sequence[Mapping[str, Any]]) -> tuple[str, str, float]:
    """Joins consecutive messages of one role; returns the role, the text and the loss weight."""
    given = [message.get("weight") for message in run]
    weights = {float(role == "assistant") if weight is None else float(weight) for weight in given}
    if len(weights) > 1:
        low, *_, high = sorted(weights)
        raise ValueError(
            f"answers in a row are joined, but these have weights {low:g} and {high:g}; expected "
            "equal weights"
        )
    return role, _join(_text(message["content"]) for message in run), weights.pop()


def _text(content: str | Sequence[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else _join(part["text"] for part in content)


def _join(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _check_messages(messages: Sequence[Mapping[str, Any]], finished: bool) -> None:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ValueError(f"the conversation is {show(messages)}; expected a list of messages")
    if not messages:
        raise ValueError("the conversation is empty; expected at least a user message")
    previous = "system"
    for i, message in enumerate(messages):
        is_last = i == len(messages) - 1
        problem = _problem(message, previous, is_last)
        if not problem and is_last:
            problem = _ending_problem(message, finished)
        if problem:
            raise ValueError(f"messages[{i}] {problem}")
        previous = message["role"]


def _problem(message: Any, previous: str, is_last: bool) -> str | None:
    """Returns the error in a message that follows one of the role `previous`, or None."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        return f'is {show(message)}; expected a dict with "role" and "content"'
    role, content, prefix = message["role"], message["content"], message.get("prefix", False)
    if not isinstance(role, str) or role not in _ROLES:
        return f"has role {show(role)}; expected one of {', '.join(_ROLES)}"
    given = {key for key, value in message.items() if value is not None}
    if unknown := given - {"role", "content", "prefix", "weight"}:
        return f"has {show(min(unknown, key=str))}, which is not supported"
    if not isinstance(prefix, bool | None):
        return f"has prefix {show(prefix)}; expected true or false"
    if not _is_content(content):
        return f"has content of type {type(content).__name__}; expected a string or text parts"
    if role == "system" and previous != "system":
        return "is a system message in mid-conversation; expected it at the beginning"
    if role == "system" and is_last:
        return "is a system message and the last one; expected a user message after it"
    if role == "assistant" and previous == "system":
        return "is an answer to nothing; expected a user message before it"
    if prefix and not (role == "assistant" and is_last):
        return "has a prefix to continue; only the last message, an answer, may have one"
    if "weight" in given:
        return _weight_problem(role, message["weight"])
    return None


def _is_content(content: Any) -> bool:
    if isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        for part in content
    )


def _weight_problem(role: str, weight: Any) -> str | None:
    if role != "assistant":
        return f"has a weight and role {role!r}; only answers may have a weight"
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (is_number and 0 <= weight <= LARGEST_WEIGHT):
        return f"has weight {show(weight)}; expected a number from 0 to {LARGEST_WEIGHT}"
    return None


def _ending_problem(message: Mapping[str, Any], finished: bool) -> str | None:
    """Returns the error in the last message of a finished conversation or a prompt, or None."""
    answer, prefix = message["role"] == "assistant", message.get("prefix")
    if finished and not answer:
        return "is the last message and not an answer; expected an answer to be learnt"
    if finished and prefix:
        return "has a prefix to continue; expected a finished answer to be learnt"
    if answer and not finished and not prefix:
        return (
            'is an answer and the last message; add a user message, or "prefix": True to continue '
            "it"
        )
    return None
