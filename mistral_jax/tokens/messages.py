"""The form of a conversation: messages in, the parts of its prompt out. It knows no token ids.

A part is a text or a `Control` token. The two never mix: whatever a user types is a text, and a
text is never searched for control tokens, so nobody can forge the end of a turn.
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
    """A token that stands for the structure of a conversation and has no text."""

    BOS = enum.auto()
    EOS = enum.auto()
    BEGIN_INST = enum.auto()
    END_INST = enum.auto()


Part = str | Control


def chat_parts(
    messages: Sequence[Mapping[str, Any]], version: str, safe_prompt: bool = False
) -> list[Part]:
    """Lays a conversation out as the parts of a prompt, each text to be encoded by itself.

    It follows mistral-common: messages of one role in a row are joined by an empty line, and the
    system text goes before the first user message (v1) or the last (v2, v3). It takes an empty
    answer too (mistral-common does not): a model may have nothing to say.

    Args:
      messages: dicts of "role" ("system", "user" or "assistant") and "content" (a string, or a
        list of `{"type": "text", "text": ...}`, which are joined by empty lines), in order: any
        system messages, then user and assistant, beginning with user. The last is the user's, or
        the assistant's with `"prefix": True`: an answer to be continued. Keys that are None do
        not count, and neither does an answer's "weight".
      version: "v1", "v2" or "v3", of the tokenizer.
      safe_prompt: whether Mistral's safety prompt goes before the system text.

    Returns:
      The parts in order; joined as token ids they are the prompt.

    Raises:
      ValueError: a message or their order is invalid, or the version has another form.
    """
    _check_messages(messages, finished=False)
    return [part for part, _ in _lay_out(messages, version, safe_prompt)]


def lesson_parts(messages: Sequence[Mapping[str, Any]], version: str) -> list[tuple[Part, float]]:
    """Lays a finished conversation out as `chat_parts` does, with how much each part is learnt.

    Up to an answer it is the prompt that `chat_parts` makes of the messages before, but for one
    thing: where the system text goes before the last user message (v2, v3), it stands at the last
    of the whole conversation, and earlier answers are learnt without it.

    Args:
      messages: as for `chat_parts`, the last an answer without a prefix. An answer's "weight" is
        how much it is learnt: a number from 0 to 1000, 1 if it has none. Answers in a row, which
        are joined, have one weight.
      version: as for `chat_parts`.

    Returns:
      The parts in order, each with its weight: an answer's for its text and its EOS, 0 for the
      rest.

    Raises:
      ValueError: a message, their order or a weight is invalid, an answer to be learnt is empty,
        none is to be learnt, or the version has another form.
    """
    _check_messages(messages, finished=True)
    parts = _lay_out(messages, version)
    if any(part == "" and weight for part, weight in parts):
        raise ValueError("an answer is empty; expected text to be learnt, or a weight of 0")
    if not any(weight for _, weight in parts):
        raise ValueError("no answer is to be learnt: expected a weight above 0")
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
        # Users and assistants alternate by now: the last user is the last run but an answer.
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
    """Makes one message of those of one role in a row: its role, text and weight."""
    given = [message.get("weight") for message in run]
    weights = {float(role == "assistant") if weight is None else float(weight) for weight in given}
    if len(weights) > 1:
        low, *_, high = sorted(weights)
        raise ValueError(
            f"answers in a row are joined, but theirs have weights of {low:g} and {high:g}; "
            "expected one weight"
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
    """Says what is wrong with a message that follows one of the role `previous`."""
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
        return "is a system message and the last; expected a user message after it"
    if role == "assistant" and previous == "system":
        return "is an answer to nothing; expected a user message before it"
    if prefix and not (role == "assistant" and is_last):
        return "has a prefix to continue; expected that of the last message, an answer, alone"
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
        return f"has a weight and role {role!r}; expected a weight of answers alone"
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (is_number and 0 <= weight <= LARGEST_WEIGHT):
        return f"has weight {show(weight)}; expected a number from 0 to {LARGEST_WEIGHT}"
    return None


def _ending_problem(message: Mapping[str, Any], finished: bool) -> str | None:
    """Says what is wrong with the last message, of a finished conversation or of a prompt."""
    answer, prefix = message["role"] == "assistant", message.get("prefix")
    if finished and not answer:
        return "is the last and no answer; expected an answer to be learnt"
    if finished and prefix:
        return "has a prefix to continue; expected a finished answer to be learnt"
    if answer and not finished and not prefix:
        return 'is an answer and the last; add a user message, or "prefix": True to continue it'
    return None
