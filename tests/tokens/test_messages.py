"""Laws of the chat form, held against mistral-common with Mistral's own tokenizer files."""

import copy
import itertools
import random

import pytest
import tokenizer_samples as samples
from conversations import finished_conversation, random_conversation, said
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_jax.tokens.messages import SAFE_PROMPT, Control, chat_parts, lesson_parts
from mistral_jax.tokens.tokenizer import Tokenizer

BOS, EOS, INST, END = Control.BOS, Control.EOS, Control.BEGIN_INST, Control.END_INST


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Our tokenizer and the oracle, of each version's file and of a small one."""
    # The oracle goes by the name's end.
    small = samples.train_small_mistral(tmp_path_factory.mktemp("chat") / "small.model.v2")
    files = samples.FILES | {"small": small}
    return {
        name: (Tokenizer.from_file(path), MistralTokenizer.from_file(str(path)))
        for name, path in files.items()
    }


@pytest.fixture(params=["v1", "v2", "v3", "small"])
def pair(request, pairs):
    return pairs[request.param]


def _oracle_ids(oracle, messages):
    return oracle.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens


# The same ids as mistral-common


def test_chat_ids_equal_mistral_commons(pair):
    tokenizer, oracle = pair
    rng = random.Random(0)
    for _ in range(200):
        messages = random_conversation(rng)
        assert tokenizer.encode_chat(messages) == _oracle_ids(oracle, messages)


def test_the_safe_prompt_is_a_first_system_message(pair):
    tokenizer, oracle = pair
    rng = random.Random(1)
    for _ in range(50):
        messages = random_conversation(rng)
        safe = [said("system", SAFE_PROMPT), *messages]
        ids = tokenizer.encode_chat(messages, safe_prompt=True)
        assert ids == tokenizer.encode_chat(safe) == _oracle_ids(oracle, safe)


def test_what_is_accepted_is_what_mistral_common_accepts_but_for_three_orders(pair):
    """Over conversations of any order: the same ids, or refused by both.

    It alone also takes a system message in mid-conversation, an answer without a question before
    it, and a conversation of system messages only.
    """
    tokenizer, oracle = pair
    rng = random.Random(2)
    accepted = 0
    for _ in range(600):
        messages = [
            said(role, rng.choice(("a", "b ", " c")))
            for role in rng.choices(("system", "user", "assistant"), (1, 3, 2), k=rng.randrange(6))
        ]
        for message in messages:
            if message["role"] == "assistant" and rng.random() < 0.3:
                message["prefix"] = True
        roles = [message["role"] for message in messages]
        first = next((i for i, role in enumerate(roles) if role != "system"), None)
        plain = first is not None and roles[first] == "user" and "system" not in roles[first:]
        try:
            expected = _oracle_ids(oracle, messages) if plain else None
        except MistralCommonException:
            expected = None
        if expected is None:
            with pytest.raises(ValueError, match=r"^(messages\[\d\] |the conversation is empty)"):
                tokenizer.encode_chat(messages)
        else:
            accepted += 1
            assert tokenizer.encode_chat(messages) == expected
    assert 100 < accepted < 500


# Conversations to learn from


def test_lesson_ids_equal_mistral_commons_for_finetuning(pair):
    from mistral_common.protocol.instruct.validator import ValidationMode

    tokenizer, oracle = pair
    # The mode alone, so that the file is not read again.
    finetuning = copy.copy(oracle)
    finetuning._chat_completion_request_validator = type(oracle._chat_completion_request_validator)(
        ValidationMode.finetuning
    )
    rng = random.Random(4)
    for _ in range(200):
        messages = finished_conversation(rng)
        assert tokenizer.encode_lesson(messages)[0] == _oracle_ids(finetuning, messages)


def test_a_lesson_has_the_prompts_and_answers_of_inference(pair):
    """Up to every answer its ids are the prompt's, if no later system text is in the way."""
    tokenizer, _ = pair
    rng = random.Random(5)
    for _ in range(100):
        messages = [
            m
            for m in finished_conversation(rng)
            if m["role"] != "system" or tokenizer.version == "v1"
        ]
        ids, weights = tokenizer.encode_lesson(messages)
        expected = [0.0] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or messages[i - 1]["role"] == "assistant":
                continue
            run = itertools.takewhile(lambda m: m["role"] == "assistant", messages[i:])
            text = "\n\n".join(m["content"] for m in run)
            answer = tokenizer.encode(text if tokenizer.version == "v1" else text.rstrip(" "))
            prompt = tokenizer.encode_chat(messages[:i])
            end = len(prompt) + len(answer) + 1
            assert ids[:end] == [*prompt, *answer, tokenizer.eos_id]
            expected[len(prompt) : end] = [1.0] * (end - len(prompt))
        assert weights == expected


def test_weights_are_those_of_the_answers():
    weighted = [*CONVERSATION, said("assistant", "four", weight=0.5)]
    weighted[2] = weighted[2] | {"weight": 0}
    learnt = [(part, weight) for part, weight in lesson_parts(weighted, "v3") if weight]
    assert learnt == [("four", 0.5), (EOS, 0.5)]
    # A prompt has none; those of its answers do not matter.
    assert chat_parts(weighted[:-1], "v3") == chat_parts(CONVERSATION, "v3")


# The form, spelled out

CONVERSATION = [
    said("system", "S"),
    said("user", "one"),
    said("assistant", "two  "),
    said("user", "three"),
]


def test_v1_is_text_with_the_system_text_at_the_first_user_message():
    parts = [BOS, "[INST] S\n\none [/INST]", "two  ", EOS, "[INST] three [/INST]"]
    assert chat_parts(CONVERSATION, "v1") == parts


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_v2_and_v3_have_the_system_text_at_the_last_user_message(version):
    parts = [BOS, INST, "one", END, "two", EOS, INST, "S\n\nthree", END]
    assert chat_parts(CONVERSATION, version) == parts
    open_answer = [*CONVERSATION, said("assistant", "four", prefix=True)]
    assert chat_parts(open_answer, version) == [*parts, "four"]


def test_parts_of_text_are_joined_as_mistral_common_joins_them(pair):
    tokenizer, oracle = pair
    parts = [{"type": "text", "text": text} for text in ("one", " two", "three")]
    messages = [said("system", parts), said("user", parts)]
    assert tokenizer.encode_chat(messages) == _oracle_ids(oracle, messages)


def test_messages_of_one_role_in_a_row_are_joined():
    messages = [said("system", s) for s in ("S", "", "T")]
    messages += [said("user", s) for s in ("", "one", "", "two")]
    messages += [said("assistant", "three"), said("assistant", "four", prefix=True)]
    parts = [BOS, INST, "S\n\nT\n\none\n\ntwo", END, "three\n\nfour"]
    assert chat_parts(messages, "v3") == parts


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_empty_answer_is_its_end_alone(version):
    messages = [said("user", "a"), said("assistant", ""), said("user", "b")]
    before, after = (chat_parts([said("user", text)], version) for text in "ab")
    assert chat_parts(messages, version) == [*before, "", EOS, *after[1:]]


def test_ids_of_a_real_prompt(pairs):
    hello = [said("user", "Hello")]
    assert pairs["v1"][0].encode_chat(hello) == [
        1,
        733,
        16289,
        28793,
        22557,
        733,
        28748,
        16289,
        28793,
    ]
    assert pairs["v3"][0].encode_chat(hello) == [1, 3, 23325, 4]


def test_messages_are_left_as_they_were():
    messages = [dict(message) for message in CONVERSATION]
    chat_parts(messages, "v3", safe_prompt=True)
    assert messages == CONVERSATION


# Control tokens


def test_control_tokens_come_from_the_order_of_roles_alone(pair):
    """Whatever the texts say, the control tokens are those of the same roles saying "x"."""
    tokenizer, _ = pair
    rng = random.Random(3)

    def control_ids(messages):
        return [i for i in tokenizer.encode_chat(messages) if tokenizer._model.is_control(i)]

    for _ in range(200):
        messages = random_conversation(rng)
        harmless = [message | {"content": "x"} for message in messages]
        assert control_ids(messages) == control_ids(harmless)


# Mistakes

USER = said("user", "a")
ANSWER = said("assistant", "b")
SYSTEM = said("system", "c")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "the conversation is empty; expected at least a user message"),
        ([SYSTEM], "messages[0] is a system message and the last one; expected a user message"),
        ([SYSTEM, SYSTEM], "messages[1] is a system message and the last"),
        ([USER, SYSTEM], "messages[1] is a system message in mid-conversation"),
        ([USER, ANSWER, SYSTEM, USER], "messages[2] is a system message in mid-conversation"),
        ([ANSWER], "messages[0] is an answer to nothing"),
        ([SYSTEM, ANSWER, USER], "messages[1] is an answer to nothing"),
        ([USER, ANSWER], "messages[1] is an answer and the last message; add a user message"),
        ([USER, ANSWER | {"prefix": True}, USER], "messages[1] has a prefix to continue"),
        ([USER | {"prefix": True}], "messages[0] has a prefix to continue"),
        ([said("tool", "a")], "messages[0] has role 'tool'; expected one of system, user, as"),
        ([said("User", "a")], "messages[0] has role 'User'"),
        ([said(None, "a")], "messages[0] has role None"),
        ([said(["user"], "a")], "messages[0] has role ['user']"),
        ([said("user", None)], "messages[0] has content of type NoneType; expected a string"),
        ([USER, said("user", [{"type": "text"}])], "messages[1] has content of type list"),
        ([said("user", [{"type": "image_url", "text": "a"}])], "messages[0] has content of ty"),
        ([USER | {"weight": 1}, ANSWER, USER], "messages[0] has a weight and role 'user'"),
        ([USER, ANSWER | {"weight": -1}, USER], "messages[1] has weight -1; expected a number"),
        ([said("user", b"a")], "messages[0] has content of type bytes"),
        ([USER, ANSWER | {"functions": []}, USER], "messages[1] has 'functions', which is not su"),
        ([{"role": "user"}], "messages[0] is {'role': 'user'}; expected a dict with"),
        ([{"content": "a"}], "messages[0] is {'content': 'a'}"),
        (["Hello"], "messages[0] is 'Hello'; expected a dict"),
        ([None], "messages[0] is None; expected a dict"),
        ([said(7, "a")], "messages[0] has role 7"),
        ([USER, ANSWER | {"prefix": "yes"}], "messages[1] has prefix 'yes'; expected true or f"),
        ([USER | {7: 1}], "messages[0] has 7, which is not supported"),
        ([USER, ANSWER | {"weight": "1"}, USER], "messages[1] has weight '1'; expected a number"),
        ("Hello", "the conversation is 'Hello'; expected a list of messages"),
        (b"Hello", "the conversation is b'Hello'; expected a list"),
        (USER, "the conversation is {"),
        (None, "the conversation is None; expected a list"),
        (7, "the conversation is 7; expected a list"),
        (iter([USER]), "the conversation is <list_iterator"),
    ],
)
def test_a_bad_conversation_is_refused_in_one_sentence(pair, messages, problem):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        pair[0].encode_chat(messages)
    assert str(error.value).startswith(problem)
    assert len(str(error.value)) < 120
    assert "\n" not in str(error.value)
    if not isinstance(messages, list):
        with pytest.raises(ValueError, match=r"^the conversation is"):
            pair[0].encode_lesson(messages)


def test_text_that_is_not_unicode_is_refused(pair):
    with pytest.raises(ValueError, match="lone surrogate"):
        pair[0].encode_chat([said("user", "a\ud800")])
