"""Laws of chat templates: who writes control tokens, what is learnt, what a template may do."""

import itertools
import random
import time

import chat_templates
import pytest
import tokenizer_samples as samples
from conversations import said, short_text

from mistral_jax.tokens import renderer
from mistral_jax.tokens.chat import ChatForm
from mistral_jax.tokens.jinja import GENERATED, UNKNOWN, USER, WRITTEN, Traced
from mistral_jax.tokens.sentencepiece import SentencePiece
from mistral_jax.tokens.tokenizer import Tokenizer

IM_START, IM_END = 32000, 32001
HELLO = [said("user", "Hello")]


@pytest.fixture(scope="module")
def base():
    """The tokenizer of 7B v0.1 with the tokens that ChatML adds."""
    model = Tokenizer.from_file(samples.FILES["v1"])._model
    added = {IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
    return SentencePiece(model, 32002, added)


def with_template(tokenizer, source, **fields):
    tokenizer.chat = ChatForm("template", {"default": source}, **fields)
    return tokenizer


def forged(rng):
    """A text that spells control tokens, or parts of them."""
    pieces = ("<|im_end|>", "<|im_", "end|>", "</s>", "<s>", "</think>", "[INST]", "a ", "\n", " b")
    return "".join(rng.choices(pieces, k=rng.randrange(5)))


def random_alternating(rng, text, finished):
    roles = itertools.islice(itertools.cycle(("user", "assistant")), 2 * rng.randrange(1, 4))
    messages = [said(role, text(rng) or ".") for role in roles]
    if rng.random() < 0.5:
        messages.insert(0, said("system", text(rng) or "."))
    return messages if finished else messages[:-1]


# Control tokens


@pytest.mark.parametrize("name", [*chat_templates.ALL])
def test_what_a_user_types_stays_text(base, name):
    """The control tokens are those of the same conversation of harmless texts."""
    tokenizer = with_template(base, chat_templates.ALL[name])
    rng = random.Random(0)
    for _ in range(40):
        messages = random_alternating(rng, forged, finished=False)
        if name == "inst" and messages[0]["role"] == "system":
            del messages[0]
        ids = tokenizer.encode_chat(messages)
        harmless = tokenizer.encode_chat([message | {"content": "x"} for message in messages])
        controls = [[i for i in x if tokenizer.is_control(i)] for x in (ids, harmless)]
        assert controls[0] == controls[1]


def test_a_control_token_cannot_be_assembled_from_pieces(base):
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [
        said("user", "<|im_"),
        said("user", "end|>"),
        said("user", "<"),
        said("user", "/s>"),
    ]
    assert with_template(base, source).encode_chat(messages) == [
        base.bos_id,
        *base.encode("<|im_end|></s>"),
    ]
    source = "{% for m in messages %}{{ '<|im_' }}{{ m.content }}{{ bos_token }}{% endfor %}"
    ids = with_template(base, source).encode_chat([said("user", "end|>")])
    assert ids == [*base.encode("<|im_end|>"), base.bos_id]


def test_a_token_may_be_written_in_parts_and_with_the_role(base):
    source = "{% for m in messages %}{{ '<|im' ~ ('_' + 'start') ~ '|>' }}{{ m.role }}{% endfor %}"
    assert with_template(base, source).encode_chat(HELLO) == [IM_START, *base.encode("user")]
    source = "{{ ('%s|>' % '<|im_start') }}{{ '<|im_start| >'.replace(' ', '') }}"
    assert with_template(base, source).encode_chat(HELLO) == [IM_START, IM_START]


def test_a_token_that_cannot_be_traced_is_an_error_unless_a_user_typed_it(base):
    source = "{{ '{}|>'.format('<|im_start') }}{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"makes <\|im_start\|> by an operation that hides"):
        with_template(base, source).encode_chat(HELLO)
    typed = [said("user", "<|im_start|>")]
    assert IM_START not in with_template(base, "{{ messages[0].content | upper | lower }}") \
        .encode_chat(typed)  # fmt: skip


def test_strings_keep_their_marks_through_methods_or_say_unknown():
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choices("ab <>|\n", k=rng.randrange(9)))
        marks = bytes(rng.choices((USER, WRITTEN), k=len(text)))
        traced, at = Traced(text, marks), rng.randrange(-3, 9)
        other = Traced("<b", bytes([WRITTEN, USER]))
        sep = rng.choice(("a", " ", "ab", "\n"))
        for operate in (
            lambda x, at=at: x[at:],
            lambda x: x[::-1],
            lambda x: x.strip(),
            lambda x: x.lstrip("a "),
            lambda x: x.removeprefix("a").removesuffix("b"),
            lambda x, sep=sep: x.split(sep)[-1],
            lambda x, sep=sep: x.rsplit(sep, 1)[0],
            lambda x: (x.split() or [x])[-1],
            lambda x, sep=sep: x.partition(sep)[2],
            lambda x: (x.splitlines() or [x])[-1],
            lambda x: x * 2,
        ):
            result = operate(traced)
            assert str.__str__(result) == operate(text)
            # Each character is one of the original, with its mark.
            known = set(zip(text, marks, strict=True))
            assert known.issuperset(zip(result, result._marks, strict=True))
        joined = other + traced + "x"
        assert (joined, joined._marks) == (f"<b{text}x", bytes([1, 0]) + marks + bytes([UNKNOWN]))
        assert traced.replace(sep, other) == text.replace(sep, "<b")
        assert len(traced.replace(sep, other)._marks) == len(text.replace(sep, "<b"))
        assert traced.upper() == text.upper()
    assert GENERATED == 4


def test_marks_follow_their_characters():
    """Every character has a spelling of its own, so its mark can be looked up."""
    text = "".join(map(chr, range(0x4E00, 0x4E40)))
    spaced = " \n".join(text[i : i + 7] for i in range(0, 64, 7))
    marks = bytes(ord(char) % 2 for char in spaced)
    traced = Traced(spaced, marks)
    pieces = [
        *traced.split(), *traced.split("\n"), *traced.splitlines(), *traced.rsplit(" ", 3),
        *traced.partition(text[20]), *traced.rpartition("\n"), traced.strip(text[:5]), *traced,
        traced.replace(text[3], text[3] + text[3]), f"{''}".join([traced]), traced[5:-3:2],
    ]  # fmt: skip
    for piece in pieces:
        for char, mark in zip(piece, getattr(piece, "_marks", b""), strict=False):
            if char >= "\u4e00" and mark != UNKNOWN:
                assert mark == ord(char) % 2


# What is learnt


@pytest.mark.parametrize("name", [*chat_templates.ALL])
def test_a_lesson_has_the_prompts_of_inference_and_learns_answers_with_their_end(base, name):
    tokenizer = with_template(base, chat_templates.ALL[name])
    rng = random.Random(2)
    for _ in range(20):
        messages = random_alternating(rng, short_text, finished=True)
        if name == "inst" and messages[0]["role"] == "system":
            del messages[0]
        for message in messages:
            # Without a space after [/INST], its bracket and the answer may share a token.
            message["content"] = "x " + message["content"].strip()
        ids, weights = tokenizer.encode_lesson(messages)
        begin = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.encode_chat(messages[:i])
            assert ids[: len(prompt)] == prompt
            assert not any(weights[begin : len(prompt)])
            begin = len(prompt)
            while begin < len(ids) and weights[begin]:
                begin += 1
            learnt = ids[len(prompt) : begin]
            assert learnt[-1] in (tokenizer.eos_id, IM_END)
            said_text = tokenizer.decode(learnt).strip()
            if name not in ("zephyr", "vicuna", "intricate"):
                assert said_text == tokenizer.decode(tokenizer.encode(message["content"])).strip()
        assert not any(weights[begin:])
        assert set(weights) == {0.0, 1.0}


def test_weights_are_those_of_the_answers(base):
    for source in (chat_templates.CHATML, chat_templates.GENERATION):
        messages = [*HELLO, said("assistant", "a", weight=0.5), *HELLO, said("assistant", "b")]
        ids, weights = with_template(base, source).encode_lesson(messages)
        assert [w for i, w in zip(ids, weights, strict=True) if i == IM_END] == [0, 0.5, 0, 1]
        messages[1]["weight"] = 0
        ids, weights = base.encode_lesson(messages)
        assert [w for i, w in zip(ids, weights, strict=True) if i == IM_END] == [0, 0, 0, 1]


def test_the_end_after_a_generation_is_learnt(base):
    source = chat_templates.GENERATION.replace(
        "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ eos_token }}"
    )
    tokenizer = with_template(base, source, tokens={"eos_token": "<|im_end|>"})
    ids, weights = tokenizer.encode_lesson([*HELLO, said("assistant", "a")])
    learnt = [i for i, w in zip(ids, weights, strict=True) if w]
    assert learnt == [*base.encode("a", continues=True), IM_END]


def test_a_template_that_changes_earlier_answers_cannot_teach(base):
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else 'x' }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [*HELLO, said("assistant", "a"), *HELLO, said("assistant", "b")]
    with pytest.raises(ValueError, match=r"writes messages\[1\] differently when others follow"):
        with_template(base, source).encode_lesson(messages)


def test_an_answer_can_be_begun(base):
    for source in (chat_templates.CHATML, chat_templates.HEADERS):
        tokenizer = with_template(base, source)
        prompt = tokenizer.encode_chat(HELLO)
        ids = tokenizer.encode_chat([*HELLO, said("assistant", "Yes,", prefix=True)])
        assert ids[: len(prompt) - 1] == prompt[:-1]
        assert tokenizer.decode(ids).endswith("Yes,")
        assert ids[-1] not in (IM_END, tokenizer.eos_id)


def test_the_safe_prompt_is_the_systems(base):
    tokenizer = with_template(base, chat_templates.CHATML)
    for messages in (HELLO, [said("system", "S"), *HELLO]):
        text = tokenizer.decode(tokenizer.encode_chat(messages, safe_prompt=True))
        assert text.startswith("system\nAlways assist with care")
        assert ("S" in text.split("content.")[1]) == (len(messages) == 2)


def test_tools_and_calls_are_objects_for_a_template(base):
    tokenizer = with_template(base, chat_templates.TOOLS)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"x": "</s>"}}}
    call = {"id": "abc", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [*HELLO, said("assistant", None, tool_calls=[call]), said("tool", "2")]
    text = tokenizer.decode(tokenizer.encode_chat(messages, tools=[tool]))
    assert '"parameters": {"x": "</s>"}' in text
    assert '{"name": "add", "arguments": {"a": 1}}' in text
    with pytest.raises(ValueError, match=r"tools\[0\] has no name"):
        tokenizer.encode_chat(HELLO, tools=[{"function": {}}])
    with pytest.raises(ValueError, match="reads no tools; expected a model that was trained with"):
        with_template(base, chat_templates.CHATML).encode_chat(HELLO, tools=[tool])


# What a template may do


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('no\nway') }}", "the chat template fails: no way"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: it reads the attribute __class__"),
        ("{{ messages.__class__ }}", "the chat template fails: it reads the attribute __class__"),
        ("{{ ''['__class__'] }}", "the chat template fails: it reads the attribute __class__"),
        ("{{ ''|attr('__class__') }}", "the chat template fails: it reads the attribute __class__"),
        ("{{ messages.append(1) }}", "the chat template fails: it reads the attribute append"),
        ("{% if %}", "the chat template fails: Expected an expression"),
        ("{{ x.y.z }}", "the chat template fails: 'x' is undefined"),
        ("{{ 1 + 'a' }}", "the chat template fails: unsupported operand"),
        ("{% include 'x' %}", "the chat template fails: no loader"),
        ("{{ 'x' * 100000000 }}", "the chat template fails: it writes more than 16,777,216 char"),
        ("{{ 'x' * 10000000000 }}", "the chat template fails: it needs more than 1024 MiB"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "the chat template fails: its macr"),
        ("{{ range(10 ** 9) | list }}", "the chat template fails: Range too big"),
        ("", "the chat template writes nothing; expected the conversation"),
    ],
)
def test_a_template_that_fails_is_named_in_one_sentence(base, source, problem):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        with_template(base, source).encode_chat(HELLO)
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)
    assert "object" not in str(error.value)
    assert with_template(base, chat_templates.CHATML).encode_chat(HELLO)[0] == IM_START


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{{ 7 ** (7 ** 12) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x | tojson }}",
    ],
)
def test_a_template_without_an_end_is_ended(base, source, monkeypatch):
    renderer.WORKER.stop()
    monkeypatch.setattr(renderer, "_SECONDS", 0.5)
    monkeypatch.setattr(renderer, "_BYTES", 1 << 28)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"^the chat template (computes for more|fails: it needs)"):
        with_template(base, source).encode_chat(HELLO)
    assert time.process_time() - began < 2
    renderer.WORKER.stop()


def test_a_template_without_jinja2_names_the_extra(base, monkeypatch):
    renderer.WORKER.stop()
    monkeypatch.setattr(renderer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"jinja2 is needed .*flax\[chat-templates\]'"):
        with_template(base, chat_templates.CHATML).encode_chat(HELLO)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "the conversation is empty"),
        ("Hello", "the conversation is 'Hello'"),
        ([said("user", None)], "messages[0] is {"),
        ([said("im_end", "a")], "messages[0] has role 'im_end'; expected one of system, user"),
        ([said("user", [{"type": "image_url"}])], "messages[0] has content of type 'image_url'"),
        ([said("user", 7)], "messages[0] has content of type int"),
        ([*HELLO, said("assistant", "a")], "messages[1] is an answer and the last message"),
        ([said("user", "a", prefix=True)], "messages[0] has a prefix to continue"),
        ([said("user", "a", name={1})], "a message has a value that JSON cannot express"),
        ([said("user", "a", weight=1)], "a message has a weight and role 'user'"),
    ],
)
def test_a_bad_conversation_is_refused(base, messages, problem):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        with_template(base, chat_templates.CHATML).encode_chat(messages)
    assert str(error.value).startswith(problem)
