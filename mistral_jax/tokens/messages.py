"""Converts conversations to the parts of a prompt, texts and control tokens, in forms by name.

Each text is encoded separately and is never searched for control tokens, so what a user types
cannot become the end of a turn. The tokenizer maps parts to token ids.
"""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.tokens import conversation
from mistral_jax.tokens.conversation import Rules, Thought, Turn
from mistral_jax.tokens.tools import Call, check_tools, parsed, to_json

SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. "
    "Avoid harmful, unethical, prejudiced, or negative content. "
    "Ensure replies promote fairness and positivity."
)


class Control(enum.Enum):
    """A control token, which marks the structure of a conversation; its value is its spelling."""

    BOS = "<s>"
    EOS = "</s>"
    BEGIN_INST = "[INST]"
    END_INST = "[/INST]"
    BEGIN_SYSTEM = "[SYSTEM_PROMPT]"
    END_SYSTEM = "[/SYSTEM_PROMPT]"
    BEGIN_TOOLS = "[AVAILABLE_TOOLS]"
    END_TOOLS = "[/AVAILABLE_TOOLS]"
    TOOL_CALLS = "[TOOL_CALLS]"
    CALL_ID = "[CALL_ID]"
    ARGS = "[ARGS]"
    BEGIN_RESULTS = "[TOOL_RESULTS]"
    END_RESULTS = "[/TOOL_RESULTS]"
    TOOL_CONTENT = "[TOOL_CONTENT]"
    BEGIN_THINK = "[THINK]"
    END_THINK = "[/THINK]"
    PREFIX = "[PREFIX]"
    SUFFIX = "[SUFFIX]"
    LLAMA_PREFIX = "▁<PRE>"
    LLAMA_SUFFIX = "▁<SUF>"
    LLAMA_MIDDLE = "▁<MID>"
    LLAMA_END = "▁<EOT>"


class Later(str):
    """A text that continues the text before it: no space is put before its first word."""

    __slots__ = ()


class Infill(str):
    """A text to follow the answer: encoded after a character whose two tokens are removed."""

    __slots__ = ()


Part = str | Control
Weighted = tuple[Part, float]

# The forms of Mistral's models by name. "v3-tekken" is "v3" with a tokenizer that puts no spaces.
_TOOLS = Rules(tools=True)
_V3 = Rules(tools=True, call_ids="9")
_V7 = _V3._replace(calls_with_text=True, late_system=True, joins_system=False)
_V11 = _V7._replace(same_ids=True)
_V13 = _V11._replace(call_ids="any", thoughts=("system", "assistant"))
RULES = {
    "v1": Rules(),
    "v2": _TOOLS,
    "v3": _V3,
    "v3-tekken": _V3,
    "v7": _V7,
    "v11": _V11,
    "v13": _V13,
    "v15": _V13._replace(thoughts=("assistant",), joint=""),
    "llama-2": Rules(),
}


def chat_parts(
    messages: Sequence[Mapping[str, Any]],
    form: str,
    safe_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Part]:
    """Returns the parts of the prompt for a conversation; each text is encoded separately.

    Mistral's forms are those of mistral-common: consecutive messages of one role are joined by an
    empty line. The system text is put before the first user message (v1, llama-2) or the last one
    (v2, v3), or is a turn of its own (v7 and later). Unlike mistral-common, it accepts an empty
    answer, because a model may give one.

    Args:
      messages: dicts with "role" ("system", "user", "assistant" or "tool") and "content" (a
        string, or a list of `{"type": "text", "text": ...}`, which are joined by empty lines).
        System messages come first, if any; from v7 on they may also follow user messages. The last
        message is the user's or a tool's, or the assistant's with `"prefix": True`, which is an
        answer to continue. From v2 on, an answer may have "tool_calls" in OpenAI's form, and tool
        messages with "tool_call_id" (in v2, "name") follow it. In v13, content may have
        `{"type": "thinking", "thinking": ...}`. Keys whose value is None are ignored, and so is
        the "weight" of an answer.
      form: the name of the form, a key of `RULES`.
      safe_prompt: whether to put Mistral's safety prompt before the system text.
      tools: tools that the model may call, in OpenAI's form; None = none.

    Returns:
      The parts in order. Their token ids, concatenated, are the prompt.

    Raises:
      ValueError: a message or the order of messages is invalid, or the form is unknown.
    """
    turns = conversation.read(messages, _rules(form), finished=False)
    return [part for part, _ in _lay_out(turns, form, _tools(tools, form), safe_prompt)]


def lesson_parts(
    messages: Sequence[Mapping[str, Any]],
    form: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Weighted]:
    """Returns the parts of a finished conversation to train on, each with its loss weight.

    The parts before an answer are the prompt that `chat_parts` returns for the messages before it,
    except for what v2 and v3 put before the last user message of the whole conversation, the
    system text and the tools: earlier answers are trained without them.

    Args:
      messages: as for `chat_parts`, but the last message is an answer without "prefix". The
        "weight" of an answer is its loss weight, from 0 to 1000; the default is 1. Consecutive
        answers are joined and must have equal weights.
      form: as for `chat_parts`.
      tools: as for `chat_parts`.

    Returns:
      The parts in order, each with its loss weight: that of the answer for its text, its tool calls
      and its EOS, 0 for all other parts.

    Raises:
      ValueError: a message, the order of messages or a weight is invalid; an answer with a weight
        above 0 is empty; all weights are 0; or the form is unknown.
    """
    turns = conversation.read(messages, _rules(form), finished=True)
    if any(turn.weight and not (turn.content or turn.calls) for turn in turns):
        raise ValueError("an answer is empty; expected text to be learnt, or a weight of 0")
    parts = _lay_out(turns, form, _tools(tools, form))
    if any(part == "" and weight for part, weight in parts):
        raise ValueError("an answer is empty; expected text to be learnt, or a weight of 0")
    if not any(weight for _, weight in parts):
        raise ValueError("no answer is to be learnt; expected one with a weight above 0")
    return parts


def infill_parts(prefix: str, suffix: str, form: str) -> list[Part]:
    """Returns the parts of a prompt for the text between a prefix and a suffix.

    Mistral's order is the suffix first, so that the answer continues the prefix directly. CodeLlama
    writes a mark after both. Neither puts a space before the suffix.

    Args:
      prefix: the text before the answer.
      suffix: the text after it.
      form: the name of the chat form: "llama-2" is CodeLlama's.
    """
    if form == "llama-2":
        return [
            *(Control.BOS, Control.LLAMA_PREFIX, prefix),
            *(Control.LLAMA_SUFFIX, Infill(suffix), Control.LLAMA_MIDDLE),
        ]
    return [Control.BOS, Control.SUFFIX, Infill(suffix), Control.PREFIX, prefix]


def _rules(form: str) -> Rules:
    if form not in RULES:
        raise ValueError(f"there is no chat form {show(form)}; expected {', '.join(RULES)}")
    return RULES[form]


def _tools(tools: Sequence[Mapping[str, Any]] | None, form: str) -> list[dict[str, Any]]:
    checked = check_tools(tools)
    if checked and not _rules(form).tools:
        raise ValueError(f"the chat form {form} has no tools; expected a model that can call them")
    return checked


def _lay_out(
    turns: list[Turn], form: str, tools: list[dict[str, Any]], safe_prompt: bool = False
) -> list[Weighted]:
    if safe_prompt:
        turns = [Turn("system", (SAFE_PROMPT,)), *turns]
    if RULES[form].joins_system:
        systems = [turn.text for turn in turns if turn.role == "system"]
        turns = [turn for turn in turns if turn.role != "system"]
        system = conversation.join(systems)
    else:
        system = ""
    if form == "llama-2":
        parts = _llama(turns, system)
    else:
        parts = _Mistral(form, turns, system, tools).parts()
    return parts[:-1] if turns[-1].opened else parts


def _llama(turns: Sequence[Turn], system: str) -> list[Weighted]:
    """Lays out a conversation as Meta's `generation.py` does: a BOS and an EOS for each pair."""
    parts: list[Weighted] = []
    for i, turn in enumerate(turns):
        if turn.role == "user":
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turn.text}" if system and i == 0 else turn.text
            parts += [(Control.BOS, 0.0), (f"[INST] {text.strip()} [/INST]", 0.0)]
        else:
            text = f" {turn.text.lstrip()}" if turn.opened else f" {turn.text.strip()} "
            parts += [(Later(text), turn.weight), (Control.EOS, turn.weight)]
    return parts


class _Mistral:
    """Lays out a conversation as mistral-common's tokenizer of one version does."""

    def __init__(
        self, form: str, turns: Sequence[Turn], system: str, tools: Sequence[Mapping[str, Any]]
    ):
        self._version = int(form.removesuffix("-tekken")[1:])
        self._turns, self._system, self._tools = turns, system, tools
        users = [i for i, turn in enumerate(turns) if turn.role == "user"] or [-1]
        self._first, self._last = users[0], users[-1]

    def parts(self) -> list[Weighted]:
        """Returns the parts of the whole conversation with their loss weights."""
        parts: list[Weighted] = [(Control.BOS, 0.0)]
        for i, turn in enumerate(self._ordered()):
            match turn.role:
                case "assistant":
                    parts += [(part, turn.weight) for part in self._answer(turn, i)]
                case "user":
                    parts += [(part, 0.0) for part in self._user(turn, i)]
                case "tool":
                    parts += [(part, 0.0) for part in self._result(turn, i)]
                case "system":
                    inner = self._content(turn)
                    whole = [Control.BEGIN_SYSTEM, *inner, Control.END_SYSTEM]
                    parts += [(part, 0.0) for part in whole]
        return parts

    def _ordered(self) -> list[Turn]:
        """Returns the turns; from v11 on, with results in the order of their calls."""
        if self._version < 11:
            return list(self._turns)
        ordered: list[Turn] = []
        order: dict[str | None, int] = {}
        for turn in self._turns:
            if turn.role == "assistant":
                order = {call.id: i for i, call in enumerate(turn.calls)}
            ordered.append(turn)
            if turn.role == "tool":
                begin = len(ordered)
                while begin and ordered[begin - 1].role == "tool":
                    begin -= 1
                ordered[begin:] = sorted(ordered[begin:], key=lambda t: order.get(t.call_id, 0))
        return ordered

    def _user(self, turn: Turn, i: int) -> list[Part]:
        if self._version == 1:
            text = f"{self._system}\n\n{turn.text}" if self._system and i == 0 else turn.text
            return [f"[INST] {text} [/INST]"]
        place = self._first if self._version >= 13 else self._last
        before: list[Part] = []
        if self._tools and i == place:
            before = [Control.BEGIN_TOOLS, to_json(list(self._tools)), Control.END_TOOLS]
        text = f"{self._system}\n\n{turn.text}" if self._system and i == self._last else turn.text
        return [*before, Control.BEGIN_INST, text, Control.END_INST]

    def _answer(self, turn: Turn, i: int) -> list[Part]:
        if self._version == 1:
            return [turn.text, Control.EOS]
        if turn.calls and self._version == 2 and i < self._last:
            return []  # v2 forgets calls and results of earlier questions.
        if turn.calls:
            text = self._content(turn) if turn.content else []
            return [*text, *self._calls(turn.calls), Control.EOS]
        return [*self._content(turn), Control.EOS]

    def _content(self, turn: Turn) -> list[Part]:
        """Returns the texts and thoughts of a turn; an empty content is an empty text."""
        if not any(isinstance(part, Thought) for part in turn.content):
            return [turn.text.rstrip(" ") if turn.role == "assistant" else turn.text]
        parts: list[Part] = []
        for part in turn.content:
            if isinstance(part, Thought):
                end = [Control.END_THINK] if part.closed else []
                parts += [Control.BEGIN_THINK, part.text, *end]
            else:
                parts.append(part)
        return parts

    def _calls(self, calls: Sequence[Call]) -> list[Part]:
        if self._version < 11:
            return [Control.TOOL_CALLS, to_json([self._call(call) for call in calls])]
        parts: list[Part] = []
        for call in calls:
            named = [Control.TOOL_CALLS, call.name]
            if self._version == 11 and call.id is not None:
                named += [Control.CALL_ID, call.id]
            parts += [*named, Control.ARGS, to_json(call.arguments)]
        return parts

    def _call(self, call: Call) -> dict[str, Any]:
        found = {"name": call.name, "arguments": call.arguments}
        return found if self._version == 2 or call.id is None else {**found, "id": call.id}

    def _result(self, turn: Turn, i: int) -> list[Part]:
        text = turn.text
        if self._version == 2:
            if i < self._last:
                return []
            inner = [to_json([{"name": turn.name, "content": parsed(text or "{}")}])]
        elif self._version == 3:
            inner = [to_json({"content": parsed(text or "{}"), "call_id": turn.call_id})]
        elif self._version < 13:
            inner = [turn.call_id, Control.TOOL_CONTENT, text]
        else:
            inner = [text]
        return [Control.BEGIN_RESULTS, *inner, Control.END_RESULTS]
