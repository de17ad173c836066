"""The fields of requests: one table a route, which checks bodies and describes the API.

Names and defaults are OpenAI's; vLLM's, llama.cpp's and Mistral's are accepted beside them. A field
that is not in the table of its route is refused by its name, and null stands for the default.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from mistral_jax.base import files
from mistral_jax.base.fields import (
    LARGEST_INT,
    Rule,
    boolean,
    check_table,
    either,
    integer,
    list_of,
    number,
    optional,
    string,
    table_of,
)
from mistral_jax.engine.sampling import MOST_TOP

# Maximum number of answers to one prompt, of prompts in one request, and of stop strings.
MOST_ANSWERS, _MOST_PROMPTS, _MOST_STOPS = 128, 1024, 64

Rules = Mapping[str, Rule]


def _only(*values: Any) -> Rule:
    """Returns a rule for a field that other servers use, and whose other values are refused."""
    shown = " or ".join(map(str, values)).lower()
    return Rule(
        f"{shown}, which alone is supported",
        lambda x: any(type(x) is type(value) and x == value for value in values),
        {"enum": list(values)},
    )


_USAGE = {"include_usage", "continuous_usage_stats"}
_IDS = list_of(integer(0))
_LABEL = string()

_SAMPLING: Rules = {
    "temperature": number(0, 100),
    "top_p": number(0, 1),
    "top_k": integer(-1),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 100),
    "logit_bias": table_of(number(-100, 100)),
    "seed": integer(-(2**63), 2**63 - 1),
    "random_seed": integer(-(2**63), 2**63 - 1),
    "stop": either(string(), list_of(string(), _MOST_STOPS)),
    "stop_token_ids": list_of(integer(0), _MOST_STOPS),
    "ignore_eos": boolean(),
}
_GRAMMAR: Rules = {
    "response_format": table_of(),
    "structured_outputs": table_of(),
    "json_schema": either(table_of(), boolean()),
    "regex": string(),
    "grammar": string(),
}
_COMMON: Rules = {
    "model": string(),
    **_SAMPLING,
    **_GRAMMAR,
    "max_tokens": integer(0),
    "n": integer(1, MOST_ANSWERS),
    "stream": boolean(),
    "stream_options": Rule(
        "an object with include_usage or continuous_usage_stats, each true or false",
        lambda x: (
            isinstance(x, dict) and x.keys() <= _USAGE and all(type(y) is bool for y in x.values())
        ),
        {
            "type": "object",
            "properties": dict.fromkeys(sorted(_USAGE), boolean().schema),
            "additionalProperties": False,
        },
    ),
    "user": _LABEL,
    "metadata": _only({}),
    "store": _only(False),
    "service_tier": _only("auto", "default"),
}
COMPLETION: Rules = {
    **_COMMON,
    "prompt": either(
        string(),
        list_of(string(), _MOST_PROMPTS, 1),
        list_of(integer(0), LARGEST_INT, 1),
        list_of(list_of(integer(0), LARGEST_INT, 1), _MOST_PROMPTS, 1),
    ),
    "suffix": string(),
    "echo": boolean(),
    "logprobs": integer(0, MOST_TOP),
    "best_of": _only(1),
    "add_special_tokens": boolean(),
}
CHAT: Rules = {
    **_COMMON,
    "messages": list_of(table_of(), LARGEST_INT, 1),
    "max_completion_tokens": integer(0),
    "logprobs": boolean(),
    "top_logprobs": integer(0, MOST_TOP),
    "tools": list_of(table_of(), 1024),
    "tool_choice": either(string("none", "auto", "any", "required"), table_of()),
    "parallel_tool_calls": boolean(),
    "safe_prompt": boolean(),
    "add_generation_prompt": boolean(),
    "continue_final_message": boolean(),
    "modalities": _only(["text"]),
    "prompt_cache_key": _LABEL,
    "safety_identifier": _LABEL,
}
# llama.cpp's own form of a completion, and of filling in.
_NATIVE_OPTIONS: Rules = {
    **{name: rule for name, rule in _SAMPLING.items() if name != "random_seed"},
    "logit_bias": either(
        table_of(number(-100, 100)),
        list_of(list_of(either(integer(0), string(), number(-100, 100), _only(False)), 2, 2)),
    ),
    "repeat_penalty": number(0.01, 100),
    "json_schema": _GRAMMAR["json_schema"],
    "grammar": string(),
    "model": string(),
    "n_predict": integer(-1),
    "max_tokens": integer(-1),
    "n_probs": integer(0, MOST_TOP),
    "return_tokens": boolean(),
    "cache_prompt": _only(True),
    "stream": boolean(),
}
NATIVE: Rules = {
    **_NATIVE_OPTIONS,
    "prompt": either(string(), list_of(either(string(), integer(0), _IDS), LARGEST_INT, 1)),
}
INFILL: Rules = {
    **_NATIVE_OPTIONS,
    "input_prefix": string(),
    "input_suffix": string(),
    "prompt": string(),
}
# The first names are vLLM's, the others llama.cpp's.
TOKENIZE: Rules = {
    "model": string(),
    "prompt": string(),
    "messages": CHAT["messages"],
    "tools": CHAT["tools"],
    "add_special_tokens": boolean(),
    "return_token_strs": boolean(),
    "content": string(),
    "add_special": boolean(),
    "with_pieces": boolean(),
}
DETOKENIZE: Rules = {"model": string(), "tokens": _IDS}

REQUIRED = {
    "COMPLETION": ("prompt",),
    "CHAT": ("messages",),
    "NATIVE": ("prompt",),
    "INFILL": ("input_prefix", "input_suffix"),
    "DETOKENIZE": ("tokens",),
}

# Fields of the servers above that are refused, with the reason.
_REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_json": "use response_format",
    "guided_regex": "use regex",
    "guided_grammar": "use structured_outputs",
    "guided_choice": "use structured_outputs",
    "audio": "the model writes text",
    "use_beam_search": "answers are sampled",
}


def parse(body: bytes, rules: Rules, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Parses and checks the body of a request.

    Args:
      body: the body, a JSON object in UTF-8.
      rules: the table of its route.
      required: fields that must be there.

    Returns:
      The fields that are not null.

    Raises:
      ValueError: the body is not a JSON object, a field is missing, unknown or unsupported, or has
        an invalid value.
    """
    values = files.parse_json(files.decode(body, "the body", "JSON in UTF-8"), "the body")
    if not isinstance(values, dict):
        raise ValueError(f"the body is a JSON {type(values).__name__}; expected an object")
    values = {name: value for name, value in values.items() if value is not None}
    for name in values.keys() - rules.keys():
        near = difflib.get_close_matches(name[:80], rules, 1, 0)[0]
        reason = _REFUSED.get(name, f"the nearest supported field is {near!r}")
        raise ValueError(f"the field {name[:80]!r} is not supported: {reason}")
    check_table(values, rules, "the request")
    for name in required:
        if name not in values:
            raise ValueError(f"the request has no {name!r}; expected {rules[name].expected}")
    return values


def schema(name: str) -> dict[str, Any]:
    """Returns the JSON schema of the bodies of the table `name`, such as "CHAT"."""
    rules: Rules = globals()[name]
    required = REQUIRED.get(name, ())
    fields = {
        key: dict(rule.schema if key in required else optional(rule).schema)
        for key, rule in rules.items()
    }
    made = {"type": "object", "properties": fields, "additionalProperties": False}
    return made | ({"required": list(required)} if required else {})
