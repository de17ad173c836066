"""Divides an answer into OpenAI's deltas while it streams: text, thoughts and tool calls.

An answer that is not streamed is the sum of its deltas (`join`), so both say the same.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mistral_jax.engine.answer import Piece
from mistral_jax.tokens.answer import Splitter
from mistral_jax.tokens.messages import Control
from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.tokens.tools import is_name

Delta = dict[str, Any]

_CALLS, _ID, _ARGUMENTS = (
    control.value for control in (Control.TOOL_CALLS, Control.CALL_ID, Control.ARGS)
)
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# The beginning of a call of a JSON list, up to the arguments.
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)


class Deltas:
    """Turns the pieces of one answer into deltas.

    Attributes:
      has_calls: whether the answer has called a tool.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, reads_calls: bool):
        """Starts an answer.

        Args:
          tokenizer: the model's tokenizer.
          name: name of the answer, from which the ids of its calls are derived.
          reads_calls: whether the request has tools; without them, calls are text.
        """
        self._calls = _Calls(name)
        self._marks: dict[int | None, str] = {}
        if reads_calls:
            self._marks = {tokenizer.control(mark): mark for mark in (_CALLS, _ID, _ARGUMENTS)}
            self._marks.pop(None, None)
        self._tokenizer, self._splitter = tokenizer, Splitter()
        self._tags = _Tags(self._calls) if reads_calls and not self._marks else None
        self._reader: _Reader | None = None

    @property
    def has_calls(self) -> bool:
        """Whether the answer has called a tool."""
        return self._calls.count > 0

    def push(self, piece: Piece) -> list[Delta]:
        """Takes the next piece; returns the deltas that are certain by now."""
        mark = self._marks.get(piece.token)
        if self._reader is None and mark != _CALLS:
            return self._plain(self._splitter.push(piece.text))
        made = []
        if self._reader is None:
            made += self._plain([*self._splitter.push(piece.text), *self._splitter.flush()])
            self._reader = _Reader(self._tokenizer, self._calls)
        if piece.token is None:
            return made
        return made + list(self._reader.push(piece.token, mark))

    def flush(self) -> list[Delta]:
        """Returns what was held back, after the last piece."""
        made = self._plain(self._splitter.flush())
        if self._tags is not None:
            made += self._tags.flush()
        if self._reader is not None:
            made += self._reader.flush()
        return made

    def _plain(self, parts: Iterable[str]) -> list[Delta]:
        made: list[Delta] = []
        for part in filter(None, parts):
            if getattr(part, "kind", "text") == "thinking":
                made.append({"reasoning_content": str(part)})
            elif self._tags is not None:
                made += self._tags.push(str(part))
            else:
                made.append({"content": str(part)})
        return made


def join(deltas: Iterable[Delta]) -> dict[str, Any]:
    """Returns the message that deltas add up to."""
    text: dict[str, str] = {}
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if name in delta:
                text[name] = text.get(name, "") + delta[name]
        for part in delta.get("tool_calls", ()):
            if part["index"] in calls:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
            else:
                call = {name: value for name, value in part.items() if name != "index"}
                calls[part["index"]] = call | {"function": dict(part["function"])}
    message = {"role": "assistant", "content": text.get("content", None if calls else "")}
    if "reasoning_content" in text:
        message["reasoning_content"] = text["reasoning_content"]
    if calls:
        message["tool_calls"] = list(calls.values())
    return message


class _Calls:
    """Makes the deltas of calls, which have consecutive indices and ids of 9 characters."""

    def __init__(self, name: str):
        self._name, self.count = name, 0

    def begin(self, function: str, call_id: str = "") -> Delta:
        made = hashlib.sha256(f"{self._name} {self.count}".encode()).hexdigest()[:9]
        self.count += 1
        fields = {"id": call_id or made, "type": "function"}
        return self._delta(fields, {"name": function, "arguments": ""})

    def go_on(self, arguments: str) -> Delta:
        return self._delta({}, {"arguments": arguments})

    def whole(self, text: str) -> list[Delta]:
        """Returns the deltas of a call that is a JSON object; none if it is not one."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return []
        if not isinstance(call, dict) or not is_name(call.get("name")):
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call_id = call.get("id")
        begun = self.begin(call["name"], call_id if isinstance(call_id, str) else "")
        return [begun, self.go_on(arguments)]

    def _delta(self, fields: dict[str, str], function: dict[str, str]) -> Delta:
        return {"tool_calls": [{"index": self.count - 1, **fields, "function": function}]}


class _Reader:
    """Reads what follows [TOOL_CALLS]: a JSON list (v2 to v7), or names and arguments (v11 on)."""

    def __init__(self, tokenizer: Tokenizer, calls: _Calls):
        self._calls, self._decoder = calls, tokenizer.stream()
        self._place = _CALLS  # the last mark
        self._text = {_CALLS: "", _ID: ""}
        self._list: _List | None = None

    def push(self, token: int, mark: str | None) -> Iterator[Delta]:
        text = self._decoder.push(token)
        if mark is None:
            yield from self._read(text)
        elif mark == _CALLS:
            yield from self._end()
        elif self._list is None:
            if mark == _ARGUMENTS and self._place != _ARGUMENTS:
                name = self._text[_CALLS].strip()
                if is_name(name):
                    yield self._calls.begin(name, self._text[_ID].strip())
                    self._text = {_CALLS: "", _ID: ""}
            self._place = mark

    def flush(self) -> Iterator[Delta]:
        yield from self._read(self._decoder.flush())
        yield from self._end()

    def _read(self, text: str) -> Iterator[Delta]:
        if self._place == _ARGUMENTS:
            if text:
                yield self._calls.go_on(text)
            return
        if self._list is None:
            self._text[self._place] += text
            text = self._text[_CALLS].lstrip()
            if self._place == _ID or not text.startswith(("[", "{")):
                return
            self._list, self._text[_CALLS] = _List(self._calls), ""
        yield from self._list.push(text)

    def _end(self) -> Iterator[Delta]:
        """Ends a list or a call; what is neither is text."""
        if rest := self._list.rest() if self._list else self._text[_CALLS]:
            yield {"content": rest}
        self._place, self._list, self._text = _CALLS, None, {_CALLS: "", _ID: ""}


class _List:
    """Reads a JSON list of calls, or one call, character by character."""

    def __init__(self, calls: _Calls):
        self._calls = calls
        self._element, self._depth, self._in_string, self._escaped = "", 0, False, False
        self._sent: int | None = None  # index in the element up to which arguments were sent
        self._end: int | None = None  # index at which the arguments end
        self._raw = ""

    def push(self, text: str) -> Iterator[Delta]:
        for character in text:
            if self._raw or (self._depth == 0 and character not in " \t\r\n,[]{"):
                self._raw += character
            elif self._depth > 0 or character == "{":
                self._element += character
                yield from self._step(character)
        if self._sent is not None:
            yield from self._send()

    def rest(self) -> str:
        """Returns what was no call."""
        held = self._element if self._sent is None else ""
        self._element = ""
        return held + self._raw

    def _step(self, character: str) -> Iterator[Delta]:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
            head = _HEAD.fullmatch(self._element[:-1]) if self._depth == 2 else None
            if head and character == "{" and self._sent is None:
                yield self._calls.begin(head[1])
                self._sent = len(self._element) - 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1 and self._sent is not None and self._end is None:
                self._end = len(self._element)
            if self._depth == 0:
                yield from self._finish()

    def _send(self) -> Iterator[Delta]:
        if new := self._element[self._sent : self._end]:
            yield self._calls.go_on(new)
            self._sent += len(new)

    def _finish(self) -> Iterator[Delta]:
        if self._sent is not None:
            yield from self._send()
        elif whole := self._calls.whole(self._element):
            yield from whole
        else:
            self._raw = self._element
        self._element, self._sent, self._end = "", None, None


class _Tags:
    """Reads calls between `<tool_call>` tags, as Hermes and its like write them."""

    def __init__(self, calls: _Calls):
        self._calls, self._held = calls, ""

    def push(self, text: str) -> list[Delta]:
        self._held += text
        made: list[Delta] = []
        while True:
            if self._held.startswith(_OPEN):
                inside, close, after = self._held.removeprefix(_OPEN).partition(_CLOSE)
                if not close:
                    return made
                made += self._calls.whole(inside) or [{"content": f"{_OPEN}{inside}{_CLOSE}"}]
                self._held = after
                continue
            before, tag, after = self._held.partition(_OPEN)
            sure = next(i for i in range(len(before) + 1) if tag or _OPEN.startswith(before[i:]))
            sure = len(before) if tag else sure
            if before[:sure].strip() or (before[:sure] and not self._calls.count):
                made.append({"content": before[:sure]})
            self._held = before[sure:] + tag + after
            if not tag:
                return made

    def flush(self) -> list[Delta]:
        held, self._held = self._held, ""
        whole = self._calls.whole(held.removeprefix(_OPEN)) if held.startswith(_OPEN) else []
        return whole or ([{"content": held}] if held.strip() else [])
