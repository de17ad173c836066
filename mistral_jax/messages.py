"""The form of a conversation: messages in, the parts of its prompt out. It knows no token ids.

A part is a text or a `Control` token. The two never mix: whatever a user types is a text, and a
text is never searched for control tokens, so nobody can forge the end of a turn.
"""

import enum
import itertools
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. "
    "Avoid harmful, unethical, prejudiced, or negative content. "
    "Ensure replies promote fairness and positivity."
)
_ROLES = ("system", "user", "assistant")


class Control(enum.Enum):
    """A token that stands for the structure of a conversation and has no text."""

    BOS = enum.auto()
    EOS = enum.auto()
    BEGIN_INST = enum.auto()
    END_INST = enum.auto()


def chat_parts(
    messages: Sequence[Mapping[str, Any]], version: str, safe_prompt: bool = False
) -> list[str | Control]:
    """Lays a conversation out as the parts of a prompt, each text to be encoded by itself.

    It follows mistral-common: messages of one role in a row are joined by an empty line, and the
    system text goes before the first user message (v1) or the last (v2, v3). It takes an empty
    answer too (mistral-common does not): a model may have nothing to say.

    Args:
      messages: dicts of "role" ("system", "user" or "assistant") and "content" (a string), in
        order: any system messages, then user and assistant, beginning with user. The last is the
        user's, or the assistant's with `"prefix": True`: an answer to be continued.
      version: "v1", "v2" or "v3", of the tokenizer.
      safe_prompt: whether Mistral's safety prompt goes before the system text.

    Returns:
      The parts in order; joined as token ids they are the prompt.

    Raises:
      ValueError: a message or their order is invalid, or the version has another form.
    """
    if version not in ("v1", "v2", "v3"):
        raise ValueError(f"a {version} tokenizer has a chat form of its own; expected v1, v2 or v3")
    _check_messages(messages)
    runs = [
        (role, _join(message["content"] for message in run))
        for role, run in itertools.groupby(messages, key=lambda message: message["role"])
    ]
    system = runs.pop(0)[1] if runs[0][0] == "system" else ""
    system = _join([SAFE_PROMPT, system]) if safe_prompt else system
    continued = runs[-1][0] == "assistant"
    if system:
        # Users and assistants alternate by now: the last user is the last run but a continued one.
        place = 0 if version == "v1" else len(runs) - 1 - continued
        runs[place] = ("user", f"{system}\n\n{runs[place][1]}")

    parts: list[str | Control] = [Control.BOS]
    for role, text in runs:
        if role == "assistant":
            parts += [text if version == "v1" else text.rstrip(" "), Control.EOS]
        elif version == "v1":
            parts.append(f"[INST] {text} [/INST]")
        else:
            parts += [Control.BEGIN_INST, text, Control.END_INST]
    return parts[:-1] if continued else parts


def _join(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ValueError("the conversation is empty; expected at least a user message")
    previous = "system"
    for i, message in enumerate(messages):
        problem = _problem(message, previous, is_last=i == len(messages) - 1)
        if problem:
            raise ValueError(f"messages[{i}] {problem}")
        previous = message["role"]


def _problem(message: Any, previous: str, is_last: bool) -> str | None:
    """Says what is wrong with a message that follows one of the role `previous`."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        return f'is {reprlib.repr(message)}; expected a dict with "role" and "content"'
    role, content, prefix = message["role"], message["content"], message.get("prefix", False)
    if role not in _ROLES:
        return f"has role {role!r}; expected one of {', '.join(_ROLES)}"
    if unknown := message.keys() - {"role", "content", "prefix"}:
        return f"has {min(unknown, key=str)!r}, which is not supported"
    if not isinstance(content, str):
        return f"has content of type {type(content).__name__}; expected a string"
    if role == "system" and previous != "system":
        return "is a system message in mid-conversation; expected it at the beginning"
    if role == "system" and is_last:
        return "is a system message and the last; expected a user message after it"
    if role == "assistant" and previous == "system":
        return "is an answer to nothing; expected a user message before it"
    if prefix and not (role == "assistant" and is_last):
        return "has a prefix to continue; expected that of the last message, an answer, alone"
    if role == "assistant" and is_last and not prefix:
        return 'is an answer and the last; add a user message, or "prefix": True to continue it'
    return None
