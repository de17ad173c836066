"""Conversations through a checkpoint's own Jinja template.

Control tokens come from the template alone. `jinja.py` marks who wrote each character of the
result: a spelling of a control token becomes that token if the template wrote all of it, and stays
text if any of it came from a message or a tool.
"""

import contextlib
import itertools
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mistral_jax.base.fields import show
from mistral_jax.tokens import jinja
from mistral_jax.tokens.conversation import answer_weight
from mistral_jax.tokens.messages import SAFE_PROMPT
from mistral_jax.tokens.renderer import Rendered, render
from mistral_jax.tokens.tools import check_tools

_ROLES = ("system", "user", "assistant", "tool", "developer")


class Piece(NamedTuple):
    """A control token or a text of a rendered conversation.

    Attributes:
      begin: place of its first character.
      end: place after its last character.
      token: id of the control token; None = it is text.
      continues: whether it is text that continues the piece before it.
    """

    begin: int
    end: int
    token: int | None
    continues: bool = False


class TemplateForm:
    """Encodes conversations through a template.

    Args:
      tokenizer: the tokenizer.
      templates: the templates by name: "default", and perhaps "tool_use".
      tokens: spellings of special tokens by their names in the templates.
      spaces: where the tokenizer's space goes in front of a text: "each" text between control
        tokens, or only the "first" one, if it begins the conversation.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: Mapping[str, str],
        tokens: Mapping[str, str],
        spaces: str = "each",
    ):
        self._tokenizer, self._templates, self._spaces = tokenizer, templates, spaces
        own = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        spelled = {name: tokenizer.piece(token) for name, token in own.items() if token is not None}
        self._tokens = {**spelled, **tokens}
        self._controls = dict(tokenizer.controls)
        if tokenizer.unk_id is not None:  # A template may use it to pad.
            self._controls.setdefault(tokenizer.piece(tokenizer.unk_id), tokenizer.unk_id)
        longest = sorted(self._controls, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        safe_prompt: bool,
    ) -> list[int]:
        """Returns the ids of the prompt for the next answer; see `Chat.encode_chat`."""
        messages = check(messages, finished=False)
        if safe_prompt:
            messages = _with_safe_prompt(messages)
        found = self._render(messages, tools, messages[-1]["role"] != "assistant")
        pieces = list(self._pieces(found, _user_strings(messages, tools)))
        return [token for piece in self._cut(pieces, ()) for token in self._ids(found, piece)]

    def lesson(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[int], list[float]]:
        """Returns the ids of a finished conversation and their weights; see `encode_lesson`."""
        messages = check(messages, finished=True)
        weights = [answer_weight(m) for m in messages if m["role"] == "assistant"]
        if not any(weights):
            raise ValueError("no answer is to be learnt; expected one with a weight above 0")
        whole = self._render(messages, tools, asks=False)
        pieces = list(self._pieces(whole, _user_strings(messages, tools)))
        if any(mark & jinja.GENERATED for mark in whole.marks):
            spans = self._generated(whole, pieces)
        else:
            spans = list(self._answers(messages, tools, whole, pieces))
        if len(spans) != len(weights):
            if len(set(weights)) > 1:
                raise ValueError(
                    f"the chat template marks {len(spans)} answers of {len(weights)}; expected "
                    "equal weights"
                )
            weights = weights[:1] * len(spans)
        cuts = sorted({place for span in spans for place in span})
        ids: list[int] = []
        learnt: list[float] = []
        for piece in self._cut(pieces, cuts):
            more = self._ids(whole, piece)
            weight = next(
                (w for (a, b), w in zip(spans, weights, strict=True) if a <= piece.begin < b), 0.0
            )
            ids += more
            learnt += [weight] * len(more)
        if not any(learnt):
            raise ValueError("the chat template writes no answer to be learnt; expected its text")
        return ids, learnt

    def _generated(self, whole: Rendered, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Returns what is inside of `{% generation %}`, and the EOS directly after it."""
        learnt = bytes(bool(mark & jinja.GENERATED) for mark in whole.marks)
        spans = [match.span() for match in re.finditer(b"\1+", learnt)]
        ends = {p.begin: p for p in pieces if p.token is not None and p.token in self._ends}
        inside = {p.end for p in pieces if p.token is not None}
        extends = [b in ends and b not in inside for _, b in spans]
        return [
            (a, ends[b].end if more else b) for (a, b), more in zip(spans, extends, strict=True)
        ]

    @property
    def _ends(self) -> set[int]:
        spelled = self._controls.get(self._tokens.get("eos_token"))
        return {self._tokenizer.eos_id, *([] if spelled is None else [spelled])}

    def _answers(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        whole: Rendered,
        pieces: Sequence[Piece],
    ) -> Iterator[tuple[int, int]]:
        """Yields the span of each answer: what its message adds to the prompt before it.

        What a template writes after the last control token of an answer, such as the line break
        after `<|im_end|>`, is not learnt: the answer has ended.
        """
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            is_last = i == len(messages) - 1
            until = whole if is_last else self._render(messages[: i + 1], tools, asks=False)
            before = self._render(messages[:i], tools, asks=True)
            if not whole.text.startswith(until.text) or not until.text.startswith(before.text):
                raise ValueError(
                    f"the chat template writes messages[{i}] differently when others follow it, so "
                    "what the model learns would not be what it is asked; expected a template "
                    "that only appends, or one with {% generation %}"
                )
            begin, end = len(before.text), len(until.text)
            ends = [p.end for p in pieces if p.token is not None and begin < p.end <= end]
            if ends and not whole.text[ends[-1] : end].strip():
                end = ends[-1]
            yield begin, end

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        asks: bool,
    ) -> Rendered:
        check_tools(tools)
        is_use = bool(tools) and "tool_use" in self._templates
        source = self._templates["tool_use" if is_use else "default"]
        if tools and "tools" not in source:
            raise ValueError(
                "the chat template of this model reads no tools; expected a model that was trained "
                "with tools, or none"
            )
        mark = None
        if messages[-1].get("prefix"):
            mark = f"{secrets.token_hex(8)} "
            messages = [*messages[:-1], _with_end(messages[-1], mark)]
        found = render(
            {
                "template": source,
                "messages": [_plain(message) for message in messages],
                "tools": [dict(tool) for tool in tools] if tools else None,
                "variables": {**self._tokens, "add_generation_prompt": asks, "documents": None},
            }
        )
        return found if mark is None else _until(found, mark)

    def _pieces(self, found: Rendered, typed: Sequence[str]) -> Iterator[Piece]:
        """Yields the control tokens that the template wrote, and the texts between them."""
        begin = 0
        for match in self._pattern.finditer(found.text):
            marks = {mark & 3 for mark in found.marks[match.start() : match.end()]}
            if jinja.USER in marks:
                continue
            if jinja.UNKNOWN in marks:
                if any(match[0] in text for text in typed):
                    continue
                raise ValueError(
                    f"the chat template makes {match[0]} by an operation that hides whether a "
                    "message contains it; expected it as a literal, in the template or joined to "
                    "other texts"
                )
            if match.start() > begin:
                yield Piece(begin, match.start(), None)
            yield Piece(*match.span(), self._controls[match[0]])
            begin = match.end()
        if begin < len(found.text):
            yield Piece(begin, len(found.text), None)

    def _cut(self, pieces: Sequence[Piece], cuts: Sequence[int]) -> Iterator[Piece]:
        """Yields the pieces, with texts cut at these places."""
        for piece in pieces:
            inner = [cut for cut in cuts if piece.begin < cut < piece.end]
            if piece.token is not None or not inner:
                yield piece
                continue
            places = [piece.begin, *inner, piece.end]
            for begin, end in itertools.pairwise(places):
                yield Piece(begin, end, None, continues=begin != piece.begin)

    def _ids(self, found: Rendered, piece: Piece) -> list[int]:
        if piece.token is not None:
            return [piece.token]
        continues = piece.continues or (self._spaces == "first" and piece.begin > 0)
        return self._tokenizer.encode(found.text[piece.begin : piece.end], continues=continues)


def check(messages: Any, finished: bool) -> list[dict[str, Any]]:
    """Checks what no template may decide: types, roles, and who speaks last.

    Raises:
      ValueError: a message is not of this kind; the message has its index.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ValueError(f"the conversation is {show(messages)}; expected a list of messages")
    if not messages:
        raise ValueError("the conversation is empty; expected at least a user message")
    for i, message in enumerate(messages):
        if problem := _problem(message, i == len(messages) - 1, finished):
            raise ValueError(f"messages[{i}] {problem}")
    return [dict(message) for message in messages]


def _problem(message: Any, is_last: bool, finished: bool) -> str | None:
    if not isinstance(message, Mapping) or "role" not in message:
        return f'is {show(message)}; expected a dict with "role" and "content"'
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or role not in _ROLES:
        return f"has role {show(role)}; expected one of {', '.join(_ROLES)}"
    if content is None and not (role == "assistant" and calls):
        return f'is {show(message)}; expected a dict with "role" and "content"'
    if not isinstance(content, str | list | None):
        return f"has content of type {type(content).__name__}; expected a string or text parts"
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "thinking"):
            return f"has content of type {show(kind)}; expected text, which alone is read"
    if message.get("prefix") and not (role == "assistant" and is_last and not finished):
        return "has a prefix to continue; only the last message, an answer, may have one"
    answer_weight(message)
    if finished and role == "assistant" and answer_weight(message) and not (content or calls):
        raise ValueError("an answer is empty; expected text to be learnt, or a weight of 0")
    if not is_last:
        return None
    if finished and role != "assistant":
        return "is the last message and not an answer; expected an answer to be learnt"
    if not finished and role == "assistant" and not message.get("prefix"):
        return (
            'is an answer and the last message; add a user message, or "prefix": True to continue '
            "it"
        )
    return None


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message as templates expect it: arguments are objects, nothing is None."""
    plain = {k: v for k, v in message.items() if v is not None and k not in ("weight", "prefix")}
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Any) -> Any:
    """Returns a tool call with its arguments as an object; OpenAI's form has their JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    with contextlib.suppress(ValueError):
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    return call


def _with_safe_prompt(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first = messages[0]
    if first["role"] == "system" and isinstance(first["content"], str):
        content = "\n\n".join(filter(None, (SAFE_PROMPT, first["content"])))
        return [{**first, "content": content}, *messages[1:]]
    return [{"role": "system", "content": SAFE_PROMPT}, *messages]


def _with_end(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Returns an answer to be continued, with a mark at its end."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + mark}
    last = {**content[-1], "text": content[-1].get("text", "") + mark}
    return {**message, "content": [*content[:-1], last]}


def _until(found: Rendered, mark: str) -> Rendered:
    """Returns what is before the mark of an answer to be continued."""
    place = found.text.rfind(mark.strip())
    if place < 0:
        raise ValueError("the chat template leaves out the answer to be continued; expected it")
    text = found.text[:place]
    if found.text[place : place + len(mark)] != mark:  # The template removes spaces at the end.
        text = text.rstrip()
    return Rendered(text, found.marks[: len(text)])


def _user_strings(value: Any, tools: Any = None) -> list[str]:
    """Returns all strings in messages and tools."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value
    found = []
    if isinstance(value, Mapping | list | tuple):
        found = [text for item in inner for text in _user_strings(item)]
    return found + (_user_strings(list(tools)) if tools else [])
