"""Parses the answer of a model: text, tool calls, and what it thought before."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mistral_jax.tokens.messages import Control

_CALLS, _ID, _ARGUMENTS = (
    control.value for control in (Control.TOOL_CALLS, Control.CALL_ID, Control.ARGS)
)
_THINK = {
    Control.BEGIN_THINK.value: Control.END_THINK.value,
    "<think>": "</think>",
}
_MARKS = (_CALLS, _ID, _ARGUMENTS, *itertools.chain.from_iterable(_THINK.items()))
_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


class Piece(str):
    """A piece of a streamed answer.

    Attributes:
      kind: "text", "thinking" or "tool_calls".
    """

    kind: str

    def __new__(cls, text: str, kind: str = "text") -> "Piece":
        """Makes a piece of a kind."""
        made = super().__new__(cls, text)
        made.kind = kind
        return made


class Splitter:
    """Tells what a model writes between `<think>` and `</think>` from its answer, while it streams.

    A few characters that may begin a tag are held back. Models with control tokens for it need
    none: their pieces have a kind already.
    """

    def __init__(self):
        self._held, self._tag = "", "<think>"
        self._begins = False  # whether the answer begins after its thoughts

    def push(self, piece: str) -> list[Piece]:
        """Takes the next piece; returns pieces, each of one kind, without the tags."""
        if getattr(piece, "kind", "text") != "text" or not self._tag:
            piece = piece.lstrip("\n") if self._begins else piece
            self._begins = self._begins and not piece
            return [*self.flush(), piece if isinstance(piece, Piece) else Piece(piece)]
        self._held += piece
        if self._tag == "<think>":
            begun = self._held.lstrip()
            if self._tag.startswith(begun[: len(self._tag)]) and len(begun) < len(self._tag):
                return []
            if not begun.startswith(self._tag):
                self._tag = ""
                return self.flush()
            self._held, self._tag = begun.removeprefix(self._tag), "</think>"
        before, tag, after = self._held.partition(self._tag)
        if tag:
            self._tag, self._held, self._begins = "", "", True
            return [Piece(before, "thinking"), *self.push(after)]
        sure = next(i for i in range(len(before) + 1) if self._tag.startswith(before[i:]))
        self._held = before[sure:]
        return [Piece(before[:sure], "thinking")]

    def flush(self) -> list[Piece]:
        """Returns what was held back, after the last piece."""
        kind = "thinking" if self._tag == "</think>" else "text"
        held, self._held = self._held, ""
        return [Piece(held, kind)] if held else []


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Attributes:
      text: what it says.
      tool_calls: the tools that it calls, in OpenAI's form; arguments are JSON texts.
      thinking: what it thought before it answered; None = nothing.
    """

    text: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    thinking: str | None = None

    def message(self) -> dict[str, Any]:
        """Returns the answer as a message of a conversation, without its thoughts."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            calls = [dict(call) for call in self.tool_calls]
            message |= {"content": self.text or None, "tool_calls": calls}
        return message


def kinds(tokenizer: Any) -> dict[int, str]:
    """Returns the kind of what follows each control token that changes it."""
    named = {"[THINK]": "thinking", "[/THINK]": "text", _CALLS: "tool_calls"}
    found = {tokenizer.control(mark): kind for mark, kind in named.items()}
    return {token: kind for token, kind in found.items() if token is not None}


def parse_answer(tokenizer: Any, answer: Sequence[int] | str) -> Answer:
    """Parses an answer in the form of Mistral's models, or of Hermes and its like.

    Only token ids tell control tokens from text that spells them, so ids are parsed exactly. In a
    text, the spellings are taken for control tokens. A call that is not valid JSON is text.

    Args:
      tokenizer: the model's tokenizer.
      answer: token ids of the answer, or its text with control tokens spelled out.

    Returns:
      The answer. A call without an id gets one, so that the tool's result can name it.
    """
    parts = list(_of_text(answer) if isinstance(answer, str) else _of_ids(tokenizer, answer))
    return _parse(parts)


def _of_text(text: str) -> Iterator[tuple[bool, str]]:
    """Yields the parts of a text: whether it is a mark, and its text."""
    begin = 0
    for match in _MARK.finditer(text):
        yield False, text[begin : match.start()]
        yield True, match[0]
        begin = match.end()
    yield False, text[begin:]


def _of_ids(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[bool, str]]:
    """Yields the parts of an answer's tokens, as `_of_text`."""
    ids = list(ids)
    marks = {tokenizer.control(mark): mark for mark in _MARKS} | {None: ""}
    marks.pop(None)
    named = tokenizer.chat_form == "template"
    for is_control, run in itertools.groupby(ids, lambda i: tokenizer.is_control(i)):
        if not is_control:
            text = tokenizer.decode(run)
            yield from _thoughts(text)
            continue
        for token in run:
            if token in marks:
                yield True, marks[token]
            elif named and token != tokenizer.eos_id and token != tokenizer.bos_id:
                # Such as <tool_call>, which some fine-tunes added to the vocabulary.
                spelled = tokenizer.piece(token)
                if spelled in ("<tool_call>", "</tool_call>"):
                    yield False, spelled


def _thoughts(text: str) -> Iterator[tuple[bool, str]]:
    """Yields the parts of a text in which the marks of thoughts alone are marks."""
    begin = 0
    for match in re.finditer("</?think>", text):
        yield False, text[begin : match.start()]
        yield True, match[0]
        begin = match.end()
    yield False, text[begin:]


def _parse(parts: list[tuple[bool, str]]) -> Answer:
    thinking, parts = _split_thoughts(parts)
    text, calls, raw = [], [], []
    groups = _groups(parts)
    text.append("".join(part for _, part in next(groups)))
    for group in groups:
        found = _calls(group)
        calls += found
        if not found:
            raw.append("".join(part for _, part in group))
    said = "".join(text + raw)
    if not calls and "<tool_call>" in said:
        found, said = _tagged(said)
        calls += found
    named = tuple(_openai(call, i) for i, call in enumerate(calls))
    if thinking is not None:
        said = said.lstrip("\n")
    return Answer(said, named, thinking)


def _split_thoughts(parts: list[tuple[bool, str]]) -> tuple[str | None, list[tuple[bool, str]]]:
    """Returns the thoughts, and the parts without them.

    An end without a beginning belongs to a prompt that began the thoughts. Thoughts without an end
    were cut.
    """
    ends = [i for i, (mark, text) in enumerate(parts) if mark and text in _THINK.values()]
    begins = [i for i, (mark, text) in enumerate(parts) if mark and text in _THINK]
    if not ends and not begins:
        return None, parts
    begin = begins[0] if begins and (not ends or begins[0] < ends[0]) else -1
    end = ends[0] if ends else len(parts)
    if begin >= 0 and any(text.strip() for _, text in parts[:begin]):
        marks = (*_THINK, *_THINK.values())
        return None, [(is_mark and text not in marks, text) for is_mark, text in parts]
    thinking = "".join(text for _, text in parts[begin + 1 : end])
    if (begin >= 0 and parts[begin][1] == "<think>") or begin < 0:
        thinking = thinking.strip("\n")
    return thinking, parts[end + 1 :]


def _groups(parts: list[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """Yields the parts before the first call, then those of each call with its mark."""
    group: list[tuple[bool, str]] = []
    for part in parts:
        if part == (True, _CALLS):
            yield group
            group = []
        group.append(part)
    yield group


def _calls(group: list[tuple[bool, str]]) -> list[dict[str, Any]]:
    """Returns the calls after a mark: a JSON list (v2 to v7), or a name and arguments (v11 on)."""
    fields, place = {}, _CALLS
    for is_mark, text in group:
        if is_mark:
            place = text
        else:
            fields[place] = fields.get(place, "") + text
    try:
        if _ARGUMENTS in fields:
            name, call_id = fields.get(_CALLS, "").strip(), fields.get(_ID)
            return [{"name": name, "arguments": json.loads(fields[_ARGUMENTS]), "id": call_id}]
        listed = json.loads(fields.get(_CALLS, ""))
    except (ValueError, RecursionError):
        return []
    listed = listed if isinstance(listed, list) else [listed]
    return listed if all(map(_is_call, listed)) else []


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("name"), str)


def _tagged(text: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the calls between `<tool_call>` tags, and the text without them."""
    calls: list[dict[str, Any]] = []

    def take(match: re.Match) -> str:
        try:
            call = json.loads(match[1])
        except (ValueError, RecursionError):
            return match[0]
        if not _is_call(call):
            return match[0]
        calls.append(call)
        return ""

    rest = _TAGGED.sub(take, text)
    return calls, rest.strip() if calls else text


def _openai(call: dict[str, Any], i: int) -> dict[str, Any]:
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    call_id = call.get("id")
    if not isinstance(call_id, str) or not call_id:
        told = repr((i, call["name"], arguments)).encode("utf-8", "surrogatepass")
        call_id = hashlib.sha256(told).hexdigest()[:9]
    function = {"name": call["name"], "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}
