"""Laws of the chat forms with tools, thoughts and infilling, held against mistral-common."""

import copy
import json
import random

import pytest
import tekken_samples
import tokenizer_samples as samples
from conversations import said, short_text
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_jax.tokens.messages import Control, chat_parts, lesson_parts
from mistral_jax.tokens.tokenizer import Tokenizer

FILES = samples.FILES | {"v7": samples.V7_FILE, "v3-tekken": tekken_samples.FILES[0]}
# Small Tekken files of the versions that mistral-common has no file of.
SMALL = ("v7", "v11", "v13")
BOS, EOS, INST, END = Control.BOS, Control.EOS, Control.BEGIN_INST, Control.END_INST


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Our tokenizer and the oracle by the name of the form."""
    files = dict(FILES)
    for version in SMALL:
        files[f"{version} small"] = tmp_path_factory.mktemp(version) / "tekken.json"
        tekken_samples.write(files[f"{version} small"], version)
    return {
        name: (Tokenizer.from_file(path), MistralTokenizer.from_file(str(path)))
        for name, path in files.items()
    }


@pytest.fixture(params=["v2", "v3", "v7", "v3-tekken", *(f"{version} small" for version in SMALL)])
def pair(request, pairs):
    return pairs[request.param]


def random_tools(rng):
    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{i}",
                "description": short_text(rng),
                "parameters": {
                    "type": "object",
                    "properties": {short_text(rng): {"type": "string"}},
                },
            },
        }
        for i in range(rng.randrange(3))
    ]


def random_call(rng, version):
    arguments = {short_text(rng): rng.choice((1, 2.5, None, short_text(rng), [True]))}
    call = {
        "type": "function",
        "function": {
            "name": f"tool_{rng.randrange(3)}",
            "arguments": rng.choice((arguments, json.dumps(arguments, indent=2))),
        },
    }
    if version != "v2" or rng.random() < 0.5:
        call["id"] = "".join(rng.choices("abcXYZ0189", k=9))
    return call


def random_tool_conversation(rng, version, finished=False):
    """A valid conversation in which some answers call tools, and tools give their results."""
    messages = [said("system", short_text(rng)) for _ in range(rng.choice((0, 1, 2)))]
    for _ in range(rng.randrange(1, 4)):
        messages += [said("user", short_text(rng)) for _ in range(rng.choice((1, 1, 2)))]
        late = version not in ("v2", "v3")
        if late and rng.random() < 0.2:
            messages += [said("system", short_text(rng)), said("user", short_text(rng))]
        while rng.random() < 0.5:
            calls = [random_call(rng, version) for _ in range(1 if version == "v2" else 2)]
            text = short_text(rng).rstrip() if late else ""
            messages.append(said("assistant", text or None, tool_calls=calls))
            for call in rng.sample(calls, len(calls)):
                result = rng.choice((short_text(rng), json.dumps({"x": short_text(rng)})))
                messages.append(said("tool", result, tool_call_id=call.get("id"), name="tool_1"))
        messages.append(said("assistant", (short_text(rng) + ".")))
    if not finished:
        while messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            messages.pop()
    return messages


def _without_none(messages):
    return [{key: x for key, x in message.items() if x is not None} for message in messages]


def _oracle_ids(oracle, messages, tools=None):
    request = ChatCompletionRequest(messages=_without_none(messages), tools=tools)
    return oracle.encode_chat_completion(request).tokens


def test_ids_with_tools_equal_mistral_commons(pair):
    tokenizer, oracle = pair
    rng = random.Random(0)
    for _ in range(150):
        messages = random_tool_conversation(rng, tokenizer.version)
        tools = random_tools(rng)
        assert tokenizer.encode_chat(messages, tools=tools) == _oracle_ids(oracle, messages, tools)


def test_lesson_ids_with_tools_equal_mistral_commons(pair):
    tokenizer, oracle = pair
    finetuning = copy.copy(oracle)
    finetuning._chat_completion_request_validator = type(oracle._chat_completion_request_validator)(
        ValidationMode.finetuning
    )
    rng = random.Random(1)
    for _ in range(100):
        messages = random_tool_conversation(rng, tokenizer.version, finished=True)
        tools = random_tools(rng)
        ids, _ = tokenizer.encode_lesson(messages, tools=tools)
        assert ids == _oracle_ids(finetuning, messages, tools)


@pytest.mark.parametrize("name", ["v2", "v3", "v7"])
def test_control_tokens_come_from_the_order_of_roles_alone(pairs, name):
    tokenizer, _ = pairs[name]
    rng = random.Random(2)

    def controls(messages, tools):
        ids = tokenizer.encode_chat(messages, tools=tools)
        return [i for i in ids if tokenizer.is_control(i)]

    for _ in range(100):
        messages = random_tool_conversation(rng, tokenizer.version)
        tools = random_tools(rng)
        harmless = copy.deepcopy(messages)
        for message in harmless:
            if message["content"]:
                message["content"] = "x"
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = {}
        plain = [{"type": "function", "function": {"name": "x"}} for _ in tools]
        assert controls(messages, tools) == controls(harmless, plain)


def test_infilling_equals_mistral_commons(pairs):
    rng = random.Random(3)
    for name in ("v3", "v7", "v3-tekken", "v13 small"):
        tokenizer, oracle = pairs[name]
        for _ in range(100):
            prefix, suffix = short_text(rng), short_text(rng)
            expected = oracle.encode_fim(FIMRequest(prompt=prefix, suffix=suffix)).tokens
            assert tokenizer.encode_fim(prefix, suffix) == expected
            control = [i for i in tokenizer.encode_fim(prefix, suffix) if tokenizer.is_control(i)]
            assert len(control) == 3


def test_codellama_fills_in_between_its_marks(tmp_path):
    marks = "▁<PRE>,▁<SUF>,▁<MID>,▁<EOT>"
    file = samples.train(tmp_path / "tokenizer.model", user_defined_symbols=marks)
    tokenizer = Tokenizer.from_file(file)
    pre, suf, mid, end = map(tokenizer.control, marks.split(","))
    ids = tokenizer.encode_fim("def", " return <MID>")
    assert ids == [
        *(tokenizer.bos_id, pre, *tokenizer.encode("def")),
        *(suf, *tokenizer.encode("☺ return <MID>")[2:], mid),
    ]
    assert tokenizer.fim_end_ids == (end,)


def test_thoughts_equal_mistral_commons(pairs):
    tokenizer, oracle = pairs["v13 small"]
    rng = random.Random(5)
    for _ in range(50):
        content = [
            {"type": "thinking", "thinking": short_text(rng), "closed": rng.random() < 0.9},
            *({"type": "text", "text": short_text(rng)} for _ in range(rng.randrange(3))),
        ]
        messages = [said("system", content), said("user", "a"), said("assistant", content)]
        messages.append(said("user", "b"))
        assert tokenizer.encode_chat(messages) == _oracle_ids(oracle, messages)


def test_a_tokenizer_without_the_tokens_cannot_fill_in(pairs):
    for name in ("v1", "v2"):
        with pytest.raises(ValueError, match=r"the tokenizer has no \[SUFFIX\]: the model cannot"):
            pairs[name][0].encode_fim("a", "b")


# Forms, spelled out

CALL = {"id": "abcdefghi", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = [
    said("system", "S"),
    said("user", "one"),
    said("assistant", None, tool_calls=[CALL]),
    said("tool", "2", tool_call_id="abcdefghi"),
]
TOOL = {"function": {"name": "add"}}
TOOL_JSON = (
    '[{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]'
)


def test_v11_names_each_call_and_its_arguments():
    assert chat_parts(CALLED, "v11", tools=[TOOL]) == [
        *(BOS, Control.BEGIN_SYSTEM, "S", Control.END_SYSTEM),
        *(Control.BEGIN_TOOLS, TOOL_JSON, Control.END_TOOLS, INST, "one", END),
        *(Control.TOOL_CALLS, "add", Control.CALL_ID, "abcdefghi", Control.ARGS, '{"a": 1}', EOS),
        *(Control.BEGIN_RESULTS, "abcdefghi", Control.TOOL_CONTENT, "2", Control.END_RESULTS),
    ]


def test_v13_has_tools_at_the_first_question_and_results_in_the_order_of_calls():
    calls = [CALL | {"id": "x"}, CALL | {"id": "y"}]
    messages = [
        *(said("user", "one"), said("assistant", "A", tool_calls=calls)),
        *(said("tool", "2", tool_call_id="y"), said("tool", "1", tool_call_id="x")),
        said("user", "two"),
    ]
    assert chat_parts(messages, "v13", tools=[TOOL]) == [
        *(BOS, Control.BEGIN_TOOLS, TOOL_JSON, Control.END_TOOLS, INST, "one", END, "A"),
        *(Control.TOOL_CALLS, "add", Control.ARGS, '{"a": 1}'),
        *(Control.TOOL_CALLS, "add", Control.ARGS, '{"a": 1}', EOS),
        *(Control.BEGIN_RESULTS, "1", Control.END_RESULTS),
        *(Control.BEGIN_RESULTS, "2", Control.END_RESULTS),
        *(INST, "two", END),
    ]


def test_v13_thinks_between_control_tokens():
    thought = [{"type": "thinking", "thinking": "T "}, {"type": "text", "text": "A "}]
    messages = [said("system", thought), said("user", "one"), said("assistant", thought)]
    inner = [Control.BEGIN_THINK, "T ", Control.END_THINK, "A "]
    parts = lesson_parts(messages, "v13")
    assert [part for part, _ in parts] == [
        *(BOS, Control.BEGIN_SYSTEM, *inner, Control.END_SYSTEM, INST, "one", END, *inner, EOS),
    ]
    assert [part for part, weight in parts if weight] == [*inner, EOS]


def test_llama_2_has_a_bos_and_an_eos_for_each_pair():
    messages = [
        *(said("system", "S"), said("user", " one "), said("assistant", " two ")),
        said("user", "three"),
    ]
    first = "[INST] <<SYS>>\nS\n<</SYS>>\n\n one [/INST]"
    parts = [BOS, first, " two ", EOS, BOS, "[INST] three [/INST]"]
    assert chat_parts(messages, "llama-2") == parts
    begun = [*messages, said("assistant", "four\n", prefix=True)]
    assert chat_parts(begun, "llama-2") == [*parts, " four\n"]


def test_llama_2_ids_are_those_of_whole_pairs(pairs):
    tokenizer = Tokenizer.from_file(FILES["v1"])
    tokenizer.chat_form = "llama-2"
    rng = random.Random(4)
    for _ in range(50):
        texts = [short_text(rng).strip() or "." for _ in range(4)]
        roles = ("user", "assistant", "user", "assistant")
        messages = [said(role, text) for role, text in zip(roles, texts, strict=True)]
        expected = []
        for question, answer in (texts[:2], texts[2:]):
            question = f"[INST] {question.strip()} [/INST] {answer.strip()} "
            expected += tokenizer.encode(question, bos=True, eos=True)
        ids, weights = tokenizer.encode_lesson(messages)
        assert ids == expected
        learnt = tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight])
        assert learnt.split() == f"{texts[1]} {texts[3]}".replace("▁", " ").split()


def test_no_form_is_refused_with_the_remedy(pairs):
    tokenizer = Tokenizer.from_file(FILES["v1"])
    tokenizer.chat_form = "none"
    with pytest.raises(ValueError, match="the model has no chat form: it is a base model"):
        tokenizer.encode_chat([said("user", "a")])
    with pytest.raises(ValueError, match="there is no chat form 'v4'; expected v1, v2, v3, v3-tek"):
        tokenizer.chat_form = "v4"
    with pytest.raises(ValueError, match="the checkpoint has no chat template; convert it from"):
        tokenizer.chat_form = "template"
    tokenizer.chat_form = "v3"
    with pytest.raises(ValueError, match=r"the tokenizer has no \[INST\], which the chat form v3"):
        tokenizer.encode_chat([said("user", "a")])


# Mistakes

USER, RESULT = said("user", "a"), said("tool", "2", tool_call_id="abcdefghi")
CALLS = said("assistant", None, tool_calls=[CALL])


def _called(**function):
    return said("assistant", None, tool_calls=[CALL | {"function": function}])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([USER, RESULT], "messages[1] has role 'tool'; expected one of system, user, assistant: n"),
        ([USER, said("assistant", "b"), RESULT], "messages[2] is a tool's result without a call"),
        ([USER, CALLS, RESULT, RESULT], "messages[3] is a tool's result without a call; expected"),
        ([USER, CALLS, said("assistant", "b")], "messages[2] is an answer"),
        (
            [USER, CALLS, USER, said("assistant", "b"), USER],
            "messages[3] is an answer, but 1 of the",
        ),
        (
            [USER, CALLS, said("tool", "2")],
            "messages[2] has id None; expected 9 letters and digits",
        ),
        ([USER, CALLS | {"content": "b"}, RESULT], "messages[1] has 'tool_calls' and content; exp"),
        (
            [USER, CALLS | {"tool_calls": "x"}, RESULT],
            "messages[1] has tool_calls 'x'; expected a list",
        ),
        ([USER, CALLS | {"tool_calls": ["x"]}, RESULT], "messages[1] tool_calls[0] is 'x'; expec"),
        ([USER, _called(arguments={}), RESULT], "messages[1] tool_calls[0] has no name; expected"),
        ([USER, _called(name="a b"), RESULT], "messages[1] tool_calls[0] has name 'a b'; expected"),
        ([USER, _called(name="a", arguments=7), RESULT], "messages[1] tool_calls[0] has arguments"),
        (
            [USER, said("assistant", None, tool_calls=[CALL | {"id": "x"}]), RESULT],
            "messages[1] tool_calls[0] has id 'x'; expected 9 letters and digits",
        ),
        ([USER, said("assistant", None)], "messages[1] has content of type NoneType; expected"),
        (
            [said("user", [{"type": "image_url", "image_url": "x"}])],
            "messages[0] has content of type 'image_url'; expected text",
        ),
    ],
)
def test_a_bad_conversation_is_refused_in_one_sentence(messages, problem):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        chat_parts(messages, "v3")
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ([{"type": "function", "function": {}}], "tools[0] has no name; expected a name in its fu"),
        ([TOOL, {"function": {"description": "x"}}], "tools[1] has no name"),
        ([{"function": {"name": "a b"}}], "tools[0] has name 'a b'; expected 1 to 64 letters"),
        ([{"function": {"name": 7}}], "tools[0] has name 7"),
        ([{"name": "add"}], "tools[0] is {'name': 'add'}; expected {"),
        (["add"], "tools[0] is 'add'"),
        ("add", "tools is 'add'; expected a list"),
        (7, "tools is 7; expected a list"),
        ([{"type": "code", "function": {"name": "a"}}], "tools[0] has type 'code'; expected 'func"),
        ([{"function": {"name": "a", "description": 7}}], "tools[0] has description 7"),
        ([{"function": {"name": "a", "parameters": []}}], "tools[0] has parameters []"),
        ([{"function": {"name": "a", "parameters": {"x": {1}}}}], "tools[0] has a value that JSON"),
    ],
)
def test_a_bad_tool_is_refused_in_one_sentence(tools, problem):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        chat_parts([USER], "v3", tools=tools)
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)


def test_a_form_without_tools_refuses_them():
    for form in ("v1", "llama-2"):
        with pytest.raises(ValueError, match=f"the chat form {form} has no tools; expected a mod"):
            chat_parts([USER], form, tools=[TOOL])
        with pytest.raises(ValueError, match=r"messages\[1\] has 'tool_calls', which is not supp"):
            chat_parts([USER, said("assistant", "x", tool_calls=[CALL]), USER], form)
