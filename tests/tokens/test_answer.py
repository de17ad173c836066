"""Laws of parsing answers: what a form writes is what is parsed."""

import itertools
import random

import pytest
import tokenizer_samples as samples
from conversations import said, short_text

from mistral_jax.tokens.answer import Answer, Splitter, parse_answer
from mistral_jax.tokens.tokenizer import Tokenizer

FILES = samples.FILES | {"v7": samples.V7_FILE}
HELLO = [said("user", "Hello")]


@pytest.fixture(scope="module")
def tokenizers():
    return {name: Tokenizer.from_file(path) for name, path in FILES.items()}


def answer_ids(tokenizer, message):
    """The ids of an answer, as a model that has learnt the form makes them."""
    ids, weights = tokenizer.encode_lesson([*HELLO, message])
    return [token for token, weight in zip(ids, weights, strict=True) if weight]


def call(name, arguments, call_id):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "v7"])
def test_texts_come_back(tokenizers, name):
    rng = random.Random(0)
    for _ in range(100):
        text = short_text(rng).replace("▁", " ").replace("\ufffd", "").strip(" ") or "."
        ids = answer_ids(tokenizers[name], said("assistant", text))
        assert parse_answer(tokenizers[name], ids) == Answer(text)


@pytest.mark.parametrize("name", ["v3", "v7"])
def test_calls_come_back(tokenizers, name):
    rng = random.Random(1)
    for _ in range(50):
        calls = [
            call(
                f"tool_{i}", f'{{"a": "{i} [INST] [TOOL_CALLS]"}}', "".join(rng.choices("abc", k=9))
            )
            for i in range(rng.randrange(1, 3))
        ]
        text = "said [TOOL_CALLS]" if name == "v7" and rng.random() < 0.5 else ""
        message = Answer(text, tuple(calls)).message()
        found = parse_answer(tokenizers[name], answer_ids(tokenizers[name], message))
        assert found == Answer(text, tuple(calls))
        assert answer_ids(tokenizers[name], found.message()) == answer_ids(
            tokenizers[name], message
        )


def test_a_call_without_an_id_gets_one(tokenizers):
    message = said("assistant", None, tool_calls=[call("add", '{"a": 1}', None)] * 2)
    found = parse_answer(tokenizers["v2"], answer_ids(tokenizers["v2"], message))
    ids = [one["id"] for one in found.tool_calls]
    assert all(len(one) == 9 for one in ids)
    assert len(set(ids)) == 2


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Hello", Answer("Hello")),
        ("<think>\nT\n</think>\n\nA", Answer("A", thinking="T")),
        ("T\n</think>\n\nA", Answer("A", thinking="T")),
        ("<think>T", Answer("", thinking="T")),
        ("[THINK]T [/THINK]A", Answer("A", thinking="T ")),
        ("say <think>T</think>", Answer("say <think>T</think>")),
        (
            'a\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
            Answer("a", (call("add", '{"a": 1}', None),)),
        ),
        (
            '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}',
            Answer("", (call("f", "{}", None), call("g", "{}", None))),
        ),
        ("<tool_call>\nnot JSON\n</tool_call>", Answer("<tool_call>\nnot JSON\n</tool_call>")),
        (
            '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{}',
            Answer("", (call("add", '{"a": 1}', "abcdefghi"), call("f", "{}", None))),
        ),
        ('[TOOL_CALLS][{"name": "f", "arg', Answer('[TOOL_CALLS][{"name": "f", "arg')),
        ("[TOOL_CALLS]7", Answer("[TOOL_CALLS]7")),
    ],
)
def test_answers_in_text(tokenizers, text, answer):
    found = parse_answer(tokenizers["v3"], text)
    for one, expected in zip(found.tool_calls, answer.tool_calls, strict=True):
        assert one["function"] == expected["function"]
        assert expected["id"] in (None, one["id"])
    assert (found.text, found.thinking) == (answer.text, answer.thinking)


def test_thoughts_stream_apart():
    """However a text is cut into pieces, the kinds are those of the parsed whole."""
    rng = random.Random(3)
    for text in ("<think>a <b</think>\n\nc < d</think>", "\n<think>a", "<thin", "no <think>a", ""):
        answer = parse_answer(None, text) if text else Answer()
        for _ in range(50):
            cuts = sorted(rng.choices(range(len(text) + 1), k=4))
            ends = [0, *cuts, len(text)]
            split, found = Splitter(), []
            for begin, end in itertools.pairwise(ends):
                found += split.push(text[begin:end])
            found += split.flush()
            kinds = {"text": "", "thinking": ""}
            for piece in found:
                kinds[piece.kind] += piece
            assert kinds["thinking"].strip("\n") == (answer.thinking or "")
            assert kinds["text"] == answer.text
