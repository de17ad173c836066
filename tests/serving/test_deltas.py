"""Deltas of answers: streamed in any pieces, they add up to what `parse_answer` finds."""

import json
import random

import pytest
import tokenizer_samples

from mistral_jax.engine.answer import Piece
from mistral_jax.engine.grammar import Grammars
from mistral_jax.engine.text import RowText
from mistral_jax.serving import tools
from mistral_jax.serving.deltas import Deltas, join
from mistral_jax.tokens.answer import parse_answer
from mistral_jax.tokens.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
            "$defs": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {}}}
LISTS = [
    [{"name": "weather", "arguments": {"city": 'P"a}r]is\\', "days": 3}}],
    [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time", "arguments": {}}],
    [{"arguments": {"city": "Rome"}, "name": "weather"}],
    [{"name": "weather", "arguments": {"a": {"b": [1, {"c": "}"}]}}, "id": "abcdefghi"}],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    made = Tokenizer.from_file(tokenizer_samples.train_small_mistral(path))
    assert made.control("[TOOL_CALLS]") is not None
    return made


def deltas(tokenizer, ids, reads_calls=True):
    """Returns the deltas of an answer, token by token."""
    text, made = RowText(tokenizer, (), ()), Deltas(tokenizer, "answer", reads_calls)
    found = []
    for token in ids:
        found += made.push(Piece(text.push(token), token, 0.0, {}))
    if rest := text.flush():
        found += made.push(Piece(rest, None, None, {}))
    return found + made.flush(), made


def called(message):
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]


@pytest.mark.parametrize("calls", LISTS)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("before", ["", "Let me see."])
def test_a_list_of_calls(tokenizer, calls, indent, before):
    mark = tokenizer.control("[TOOL_CALLS]")
    written = json.dumps(calls, indent=indent)
    ids = [*tokenizer.encode(before), mark, *tokenizer.encode(written)]
    parts, made = deltas(tokenizer, ids)
    message = join(parts)
    expected = parse_answer(tokenizer, ids).message()
    assert called(message) == called(expected)
    assert (message["content"] or "") == before
    assert made.has_calls
    first = [part["tool_calls"][0] for part in parts if "tool_calls" in part]
    assert [call["index"] for call in first if "id" in call] == list(range(len(calls)))
    assert all(len(call["id"]) == 9 for call in first if "id" in call)


def test_arguments_are_streamed_as_they_are_written(tokenizer):
    ids = [tokenizer.control("[TOOL_CALLS]"), *tokenizer.encode(json.dumps(LISTS[0]))]
    parts, _ = deltas(tokenizer, ids)
    pieces = [part["tool_calls"][0]["function"].get("arguments") for part in parts]
    assert len(list(filter(None, pieces))) > 5


@pytest.mark.parametrize(
    "written", ['[{"name": 5}]', "[1, 2]", "no JSON", '[{"name": "f"', "", '{"a": 1} rest']
)
def test_what_is_no_call_is_text(tokenizer, written):
    ids = [tokenizer.control("[TOOL_CALLS]"), *tokenizer.encode(written)]
    parts, made = deltas(tokenizer, ids)
    assert not made.has_calls
    assert "tool_calls" not in join(parts)


def test_without_tools_everything_is_text(tokenizer):
    ids = [tokenizer.control("[TOOL_CALLS]"), *tokenizer.encode('[{"name": "f"}]')]
    parts, _ = deltas(tokenizer, ids, reads_calls=False)
    assert join(parts)["content"] == '[{"name": "f"}]'


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("choice", ["auto", "required", {"function": {"name": "weather"}}])
def test_the_grammar_of_calls_allows_calls_and_nothing_else(tokenizer, several, choice):
    fields = {"tool_choice": choice, "parallel_tool_calls": several}
    grammar = tools.constraint(tokenizer, fields, [WEATHER, TIME])
    mark = tokenizer.control("[TOOL_CALLS]")
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])

    def accepts(*calls):
        matcher = grammars.start(grammar, True)
        if choice == "auto":
            assert not matcher.push(9)  # any text before
        written = json.dumps([{"name": name, "arguments": given} for name, given in calls])
        try:
            ended = [matcher.push(token) for token in (mark, *tokenizer.encode(written))]
        except ValueError:
            return False
        return ended[-1] or matcher.push(tokenizer.eos_id) is not None

    assert accepts(("weather", {"city": "Rome", "days": 2}))
    assert not accepts(("weather", {"days": 2}))
    assert not accepts(("weather", {"city": 5}))
    assert not accepts(("unknown", {}))
    assert accepts(("time", {"any": 1})) == (not isinstance(choice, dict))
    twice = ("weather", {"city": "Rome"}), ("weather", {"city": "Bern"})
    assert accepts(*twice) == several


def test_a_choice_of_no_tool_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"tool_choice is .*'nothing'.*; expected"):
        tools.constraint(tokenizer, {"tool_choice": {"function": {"name": "nothing"}}}, [TIME])


def test_calls_between_tags(tokenizer):
    """Of models without a control token for calls, as Hermes and its like."""
    rng = random.Random(0)
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    written = json.dumps(call)
    whole = f"See: <tool_call>\n{written}\n</tool_call>\n<tool_call>{written}</tool_call>"
    for _ in range(20):
        made = _tagged(tokenizer)
        found, rest = [], whole
        while rest:
            size = rng.randint(1, 9)
            found += made.push(Piece(rest[:size], None, None, {}))
            rest = rest[size:]
        message = join(found + made.flush())
        assert called(message) == [("weather", {"city": "Rome"})] * 2
        assert message["content"] == "See: "


def _tagged(tokenizer):
    class Plain:
        def control(self, _):
            return None

        def stream(self, *_):
            return tokenizer.stream()

    return Deltas(Plain(), "answer", True)
