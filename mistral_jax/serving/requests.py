"""Turns the checked fields of a request into prompts and the arguments of `Engine.submit`."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.engine.completion import Token
from mistral_jax.engine.grammar import Grammar
from mistral_jax.engine.sampling import Sampling
from mistral_jax.serving import tools as tool_grammars
from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.tokens.tools import check_tools

Fields = Mapping[str, Any]

_SAMPLING = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
    "repetition_penalty",
)


class TooLong(ValueError):
    """Raised when a prompt leaves no room for a token.

    Attributes:
      tokens: number of tokens of the prompt.
      length: maximum number of tokens of prompt and answer together.
    """

    def __init__(self, tokens: int, length: int):
        super().__init__(
            f"the prompt has {tokens} tokens; expected at most {length - 1}, because prompt and "
            f"answer together have at most {length}: shorten it"
        )
        self.tokens, self.length = tokens, length


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a request.

    Attributes:
      ids: its tokens.
      is_new: whether the answer begins a text, instead of continuing the prompt's.
      odds: log-probabilities of its tokens, if the request asks for them.
    """

    ids: list[int]
    is_new: bool = False
    odds: Sequence[Token | None] = ()


def completion_prompts(tokenizer: Tokenizer, fields: Fields) -> list[Prompt]:
    """Returns the prompts of a completion: of texts, or of token ids."""
    given = fields["prompt"]
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    suffix = fields.get("suffix")
    bos = tokenizer.adds_bos and fields.get("add_special_tokens", True)
    if suffix is not None and not all(isinstance(one, str) for one in given):
        raise ValueError("suffix is for a prompt of text, and this one is token ids")
    prompts = []
    for one in given:
        if suffix is not None:
            one = tokenizer.encode_fim(one, suffix)
        elif isinstance(one, str):
            one = tokenizer.encode(one, bos=bos)
        prompts.append(Prompt(one or [tokenizer.first_id]))
    return prompts


def chat_prompt(tokenizer: Tokenizer, fields: Fields) -> Prompt:
    """Returns the prompt of a conversation."""
    messages = [_message(message) for message in fields["messages"]]
    continues = fields.get("continue_final_message", False)
    if continues == fields.get("add_generation_prompt", not continues):
        raise ValueError(
            "add_generation_prompt begins a new answer, and continue_final_message continues the "
            "last one; expected one of them"
        )
    if continues:
        messages[-1]["prefix"] = True
    safe = fields.get("safe_prompt", False)
    ids = tokenizer.encode_chat(messages, safe_prompt=safe, tools=tools_of(fields))
    return Prompt(ids, not messages[-1].get("prefix", False))


def tools_of(fields: Fields) -> list[dict[str, Any]] | None:
    """Returns the tools that the model may call; None = none."""
    tools = check_tools(fields.get("tools")) or None
    return None if fields.get("tool_choice") == "none" else tools


def options(tokenizer: Tokenizer, fields: Fields, defaults: Sampling) -> dict[str, Any]:
    """Returns arguments of `Engine.submit`; `max_new_tokens` only if the request limits it.

    Args:
      tokenizer: the model's tokenizer.
      fields: the request.
      defaults: sampling of requests that state none.
    """
    made: dict[str, Any] = {
        "sampling": sampling(fields, defaults),
        "stop": fields.get("stop", ()),
        "grammar": constraint(fields),
    }
    most = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if most is not None:
        made["max_new_tokens"] = most
    if tools := tools_of(fields):
        chosen = tool_grammars.constraint(tokenizer, fields, tools)
        if chosen and made["grammar"]:
            raise ValueError(
                "the request has a grammar for the text and tools; expected one of them, or "
                'tool_choice "none"'
            )
        made["grammar"] = chosen or made["grammar"]
    elif fields.get("tool_choice") not in (None, "none", "auto"):
        raise ValueError(f"tool_choice is {show(fields['tool_choice'])}, and there are no tools")
    return made


def stop_ids(fields: Fields, eos_ids: Sequence[int]) -> list[int]:
    """Returns the tokens that end an answer."""
    return [*([] if fields.get("ignore_eos") else eos_ids), *fields.get("stop_token_ids", ())]


def sampling(fields: Fields, defaults: Sampling) -> Sampling:
    """Returns the sampling of a request; without a seed, it gets a random one."""
    values = {name: fields[name] for name in _SAMPLING if name in fields}
    if "top_k" in fields:
        values["top_k"] = max(fields["top_k"], 0)  # vLLM's name for all tokens is -1
    if "repeat_penalty" in fields:
        values["repetition_penalty"] = fields["repeat_penalty"]
    seed = fields.get("seed", fields.get("random_seed"))
    seed = secrets.randbits(32) if seed is None or seed == -1 else seed % 2**32
    bias = fields.get("logit_bias", {})
    return dataclasses.replace(defaults, **values, seed=seed, logit_bias=_biases(bias))


def constraint(fields: Fields) -> Grammar | None:
    """Returns the grammar that the answer must follow; None = any text.

    Raises:
      ValueError: there are several, or one is invalid.
    """
    found = {
        name: grammar
        for name in ("response_format", "structured_outputs", "json_schema", "regex", "grammar")
        if name in fields and (grammar := _CONSTRAINTS[name](fields[name])) is not None
    }
    if len(found) > 1:
        raise ValueError(f"the request has {' and '.join(found)}; expected one of them")
    return next(iter(found.values()), None)


def _response_format(value: Fields) -> Grammar | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_schema(value["schema"]) if "schema" in value else Grammar.json()
    if kind == "json_schema":
        inner = value.get("json_schema")
        inner = value if inner is None and "schema" in value else inner
        if not isinstance(inner, dict) or "schema" not in inner:
            raise ValueError(
                f'response_format is {show(value)}; expected {{"type": "json_schema", '
                '"json_schema": {"name": ..., "schema": {...}}}'
            )
        return Grammar.json_schema(inner["schema"])
    if kind == "regex" and isinstance(value.get("regex"), str):
        return Grammar.regex(value["regex"])
    if kind == "grammar" and isinstance(value.get("grammar"), str):
        return Grammar.lark(value["grammar"])
    raise ValueError(
        f"response_format has type {show(kind)}; expected text, json_object, json_schema, regex or "
        "grammar, with the field that it needs"
    )


def _structured(value: Fields) -> Grammar | None:
    """Reads vLLM's field."""
    value = {name: one for name, one in value.items() if one is not None}
    if len(value) != 1:
        raise ValueError(
            f"structured_outputs has {show(sorted(value))}; expected one of json, regex, choice, "
            "grammar, json_object"
        )
    ((kind, one),) = value.items()
    if kind == "json":
        return Grammar.json_schema(one)
    if kind == "json_object" and one is True:
        return Grammar.json()
    if kind == "regex" and isinstance(one, str):
        return Grammar.regex(one)
    if kind == "grammar" and isinstance(one, str):
        return Grammar.lark(one)
    if kind == "choice" and isinstance(one, list) and one and all(isinstance(x, str) for x in one):
        return Grammar.choice(one)
    raise ValueError(f"structured_outputs has {kind} {show(one)}, which is not supported")


_CONSTRAINTS = {
    "response_format": _response_format,
    "structured_outputs": _structured,
    "json_schema": Grammar.json_schema,
    "regex": Grammar.regex,
    "grammar": Grammar.gbnf,
}


def _message(message: Fields) -> dict[str, Any]:
    """Returns a message of OpenAI's API in the form that chat forms take."""
    found = {name: value for name, value in message.items() if value is not None}
    if "content" in message and "tool_calls" not in found:
        found.setdefault("content", message["content"])
    if found.get("role") == "developer":
        found["role"] = "system"
    # The server wrote it in an earlier answer; models do not see their earlier thoughts.
    found.pop("reasoning_content", None)
    if not found.get("tool_calls", True):
        del found["tool_calls"]
    return found


def _biases(given: Any) -> dict[int, float]:
    """Returns the biases of an object, or of llama.cpp's list of pairs, of which false bans."""
    pairs = given.items() if isinstance(given, dict) else given
    biases = {}
    for name, value in pairs:
        try:
            token = int(name)
        except (TypeError, ValueError):
            raise ValueError(f"logit_bias names {show(name)}; expected a token id") from None
        if isinstance(name, float):
            raise ValueError(f"logit_bias names {show(name)}; expected a token id")
        biases[token] = float("-inf") if value is False else value
    return biases
