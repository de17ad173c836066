"""Checks tools and tool calls in the form of OpenAI's API, and writes them as Mistral's JSON."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mistral_jax.base.fields import show

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NAME_EXPECTED = "1 to 64 letters, digits, underscores and dashes"
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


class Call(NamedTuple):
    """A call of a tool by the model.

    Attributes:
      name: name of the function.
      arguments: its arguments: any JSON value, usually an object; or the model's text, if that is
        not JSON.
      id: name of the call, which its result repeats; None = it has none.
    """

    name: str
    arguments: Any
    id: str | None = None


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Returns tools as Mistral's forms write them, with defaults for what is missing.

    Args:
      tools: a list of `{"type": "function", "function": {"name", "description", "parameters"}}`;
        `parameters` is a JSON schema. Other keys are ignored. None = no tools.

    Raises:
      ValueError: a tool is not a function with a name, or has a value that is not JSON.
    """
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise ValueError(f"tools is {show(tools)}; expected a list of tools")
    return [_checked(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _checked(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(
            f'{where} is {show(tool)}; expected {{"type": "function", "function": {{"name": ...}}}}'
        )
    if tool.get("type", "function") != "function":
        raise ValueError(f"{where} has type {show(tool['type'])}; expected 'function'")
    if function.get("name") is None:
        raise ValueError(f"{where} has no name; expected a name in its function")
    check_name(function["name"], where)
    description, parameters = function.get("description"), function.get("parameters")
    if not isinstance(description, str | None):
        raise ValueError(f"{where} has description {show(description)}; expected a string")
    if not isinstance(parameters, Mapping | None):
        raise ValueError(f"{where} has parameters {show(parameters)}; expected a JSON schema")
    checked = {
        "name": function["name"],
        "description": description or "",
        "parameters": dict(parameters or {}),
    }
    to_json(checked, where)
    return {"type": "function", "function": checked}


def check_calls(calls: Any, where: str) -> list[Call]:
    """Returns the calls of an answer's `tool_calls`, a list of OpenAI's form.

    A call is `{"id": ..., "function": {"name": ..., "arguments": ...}}`. Arguments are an object,
    or its JSON text.

    Args:
      calls: the list; None = no calls.
      where: name of the message for error messages.

    Raises:
      ValueError: a call is not of this form.
    """
    if calls is None:
        return []
    if isinstance(calls, str | bytes | Mapping) or not isinstance(calls, Sequence):
        raise ValueError(f"{where} has tool_calls {show(calls)}; expected a list of calls")
    return [_call(call, f"{where} tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(
            f'{where} is {show(call)}; expected {{"id": ..., "function": {{"name": ..., '
            '"arguments": ...}}'
        )
    if function.get("name") is None:
        raise ValueError(f"{where} has no name; expected the name of the tool")
    check_name(function["name"], where)
    name, arguments, call_id = function["name"], function.get("arguments"), call.get("id")
    if not isinstance(call_id, str | None):
        raise ValueError(f"{where} has id {show(call_id)}; expected a string")
    if isinstance(arguments, Mapping):
        to_json(arguments, where)
        arguments = dict(arguments)
    elif isinstance(arguments, str | None):
        arguments = parsed(arguments or "{}")
    else:
        raise ValueError(
            f"{where} has arguments {show(arguments)}; expected an object, or its JSON text"
        )
    # mistral-common's name for a call without an id.
    return Call(name, arguments, None if call_id in ("", "null") else call_id)


def is_name(name: Any) -> bool:
    """Tells whether a value is a name that a function may have."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: Any, where: str) -> None:
    """Raises a ValueError if a value is not a name that a function may have."""
    if not is_name(name):
        raise ValueError(f"{where} has name {show(name)}; expected {NAME_EXPECTED}")


def check_id(call_id: str | None, where: str, any_id: bool) -> None:
    """Raises a ValueError if the id of a call is missing, or not one that the form can have.

    Args:
      call_id: the id.
      where: name of the call or message for the error message.
      any_id: whether the form accepts any id.
    """
    if call_id is None or (not any_id and not _CALL_ID.fullmatch(call_id)):
        expected = "one" if any_id else "9 letters and digits"
        raise ValueError(f"{where} has id {show(call_id)}; expected {expected}")


def parsed(text: str) -> Any:
    """Returns the value of a JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def to_json(value: Any, where: str = "the value") -> str:
    """Returns a value as JSON in one line, with all characters as they are.

    Raises:
      ValueError: a part of it has no JSON form.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{where} has a value that JSON cannot express: {show(value)}") from None
