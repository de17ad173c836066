"""Grammars of tool calls: what a model must write to call one of the tools of a request."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.engine.grammar import Grammar, check_schema
from mistral_jax.tokens.messages import Control
from mistral_jax.tokens.tokenizer import Tokenizer

_EXPECTED = (
    '"none", "auto", "required" (or Mistral\'s "any"), or {"type": "function", "function": '
    '{"name": ...}} with the name of one of the tools'
)


def constraint(
    tokenizer: Tokenizer, fields: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]
) -> Grammar | None:
    """Returns the grammar of an answer that may or must call tools; None = any text.

    With "auto", a model whose calls begin with a control token is free up to that token.

    Args:
      tokenizer: the model's tokenizer.
      fields: the request.
      tools: its tools, checked.

    Raises:
      ValueError: `tool_choice` names no tool.
    """
    choice = fields.get("tool_choice", "auto")
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ValueError(f"tool_choice is {show(choice)}; expected {_EXPECTED}")
    mark, arguments = (tokenizer.control(c.value) for c in (Control.TOOL_CALLS, Control.ARGS))
    several = fields.get("parallel_tool_calls", True)
    if mark is None:
        # Such models call in text: only a call that is required has a known place.
        return None if choice == "auto" else Grammar.of_lark(_tagged(tools, several))
    if arguments is None:
        rules = _listed(tools, several)
    else:
        rules = _marked(tools, several, mark, arguments)
    if choice == "auto":
        return Grammar(Grammar.of_lark(f"start: calls\n{rules}").source, after=mark)
    return Grammar.of_lark(f"start: <[{mark}]> calls\n{rules}")


def _listed(tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    """Returns the rules of a JSON list of calls, which versions 2 to 7 write."""
    more = ' (b? "," b? call)*' if several else ""
    return f'calls: b? "[" b? call{more} b? "]"\n{_objects(tools)}'


def _marked(tools: Sequence[Mapping[str, Any]], several: bool, mark: int, arguments: int) -> str:
    """Returns the rules of names and arguments after control tokens, from version 11 on."""
    kinds = [
        f"{json.dumps(tool['function']['name'])} <[{arguments}]> {_arguments(tool)}"
        for tool in tools
    ]
    more = f" (<[{mark}]> call)*" if several else ""
    return f"calls: call{more}\ncall: {' | '.join(kinds)}"


def _tagged(tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    """Returns the grammar of calls between tags, as Hermes and its like write them."""
    more = " (b? tagged)*" if several else ""
    tagged = 'tagged: "<tool_call>" b? call b? "</tool_call>"'
    return f"start: tagged{more}\n{tagged}\n{_objects(tools)}"


def _objects(tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rules of a call as a JSON object, and of blanks.

    The arguments of each tool have a schema of their own, because references in it count from its
    beginning.
    """
    kinds = []
    for tool in tools:
        name = json.dumps(json.dumps(tool["function"]["name"]))
        fields = f'b? "\\"name\\"" b? ":" b? {name} b? "," b? "\\"arguments\\"" b? ":" b?'
        kinds.append(f'"{{" {fields} {_arguments(tool)} b? "}}"')
    return f"call: {' | '.join(kinds)}\nb: /[ \\n]{{1,8}}/"


def _arguments(tool: Mapping[str, Any]) -> str:
    schema = tool["function"]["parameters"] or {"type": "object"}
    check_schema(schema, json.dumps(schema))
    blanks = {"x-guidance": {"whitespace_pattern": r"[ \n]{1,8}"}}
    return f"%json {json.dumps(schema | blanks)}"
