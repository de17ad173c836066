"""Laws of text generation: streams equal wholes, and stop strings cut wherever they lie."""

import dataclasses
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizer_samples

from mistral_jax.engine import prefill
from mistral_jax.engine import text as text_module
from mistral_jax.engine.generate import generate
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.score import score
from mistral_jax.engine.text import chat, complete, completions, stream
from mistral_jax.tokens.tokenizer import Tokenizer

WARM = Sampling(temperature=1, top_p=1, seed=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer of Mistral's kind: with byte pieces and control tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Tokenizer.from_file(tokenizer_samples.train_small_mistral(path))


@pytest.fixture(scope="module")
def mistral(tokenizer):
    """A model with three tokens more than its tokenizer, its params, and the tokenizer."""
    model, params = tiny.build(sliding_window=[5, None], vocab_size=tokenizer.vocab_size + 3)
    return model, jax.tree.map(jnp.asarray, params), tokenizer


def test_a_completion_is_the_text_of_what_follows(mistral):
    model, params, tokenizer = mistral
    prompt = "def train(path"
    ids = tokenizer.encode(prompt, bos=True)
    tokens = generate(model, params, [ids], 20, sampling=WARM)[0].tokens
    known = [token for token in ids + tokens if token < tokenizer.vocab_size]
    text = complete(*mistral, prompt, 20, sampling=WARM)
    assert text
    assert prompt + text == tokenizer.decode(known)


def test_texts_of_a_batch_are_those_alone(mistral):
    prompts = ["", "import", "日本"]  # an empty one starts from BOS
    alone = [complete(*mistral, prompt, 12, sampling=WARM) for prompt in prompts]
    assert all(isinstance(text, str) and text for text in alone)
    assert complete(*mistral, prompts, 12, sampling=[WARM] * 3) == alone


@pytest.mark.parametrize(
    "prompt",
    ["while", [{"role": "user", "content": "Hello"}]],
    ids=["completion", "chat"],
)
def test_the_pieces_of_a_stream_join_to_the_whole(mistral, prompt):
    whole = complete if isinstance(prompt, str) else chat
    pieces = list(stream(*mistral, prompt, 40, sampling=WARM))
    assert "" not in pieces
    assert len(pieces) > 10
    assert "".join(pieces) == whole(*mistral, prompt, 40, sampling=WARM)


def test_an_answer_begins_anew_and_a_continued_one_does_not(mistral):
    tokenizer = mistral[2]
    space = Sampling(0, logit_bias={tokenizer.encode("text")[0]: 100})
    question = {"role": "user", "content": "Hello"}
    half = {"role": "assistant", "content": "A", "prefix": True}
    answer = chat(*mistral, [question], 1, sampling=space)
    rest = chat(*mistral, [question, half], 1, sampling=space)
    assert rest == f" {answer}"


def test_a_stop_string_ends_a_text_wherever_it_lies(mistral):
    whole = complete(*mistral, "x", 40, sampling=WARM)
    for start, length in ((3, 1), (5, 2), (8, 5), (10, 15), (20, 9)):
        stop = whole[start : start + length]
        expected = whole[: whole.index(stop)]
        assert complete(*mistral, "x", 40, sampling=WARM, stop=stop) == expected
        stops = ["never there", stop]
        assert "".join(stream(*mistral, "x", 40, sampling=WARM, stop=stops)) == expected


def test_a_stop_string_ends_its_own_row_alone(mistral):
    prompts = [mistral[2].encode(text, bos=True) for text in ("x", "y", "z")]
    heard = ["", "", ""]

    def on_text(row, piece):
        assert piece
        heard[row] += piece

    options = {"sampling": [WARM] * 3, "on_text": on_text}
    whole = completions(*mistral, prompts, 40, **options)
    assert heard == [row.text for row in whole]
    stop = next(c for c in whole[0].text[10:] if c not in whole[1].text + whole[2].text)
    stopped, *free = completions(*mistral, prompts, 40, stop=stop, **options)
    assert free == whole[1:]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[0].text[: whole[0].text.index(stop)]
    assert stopped.tokens == whole[0].tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) == len(stopped.logprobs) < 40


def test_any_tokens_and_stops_give_the_text_up_to_the_first_stop(tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        decoder = tokenizer.stream([1])
        whole = "".join(map(decoder.push, tokens)) + decoder.flush()
        starts = [rng.randrange(len(whole) + 1) for _ in range(rng.randrange(3))]
        stops = [whole[at : at + rng.randint(1, 4)] + rng.choice(["", "", "?"]) for at in starts]
        stops = [stop for stop in stops if stop]
        text = text_module.RowText(tokenizer, [1], stops)
        pieces = []
        for token in tokens:
            pieces.append(text.push(token))
            if text.ended:
                break
        pieces.append(text.flush())
        found = [whole.index(stop) for stop in stops if stop in whole]
        assert "".join(pieces) == whole[: min(found, default=None)]


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], 3, None])
def test_a_stop_that_is_no_string_is_refused(mistral, stop):
    with pytest.raises(ValueError, match="expected strings that are not empty"):
        complete(*mistral, "x", stop=stop)
    with pytest.raises(ValueError, match="expected strings that are not empty"):
        stream(*mistral, "x", stop=stop)


def test_a_batch_of_chats_is_each_alone(mistral):
    question = {"role": "user", "content": "Hello"}
    half = {"role": "assistant", "content": "A", "prefix": True}
    alone = [chat(*mistral, messages, 12, sampling=WARM) for messages in ("Hi", [question, half])]
    assert all(isinstance(answer, str) and answer for answer in alone)
    assert chat(*mistral, ["Hi", [question, half]], 12, sampling=[WARM] * 2) == alone
    assert chat(*mistral, ["Hi"], 12, sampling=WARM) == alone[:1]


def test_a_text_to_chat_is_one_message_of_the_users(mistral):
    messages = [{"role": "user", "content": "Hello"}]
    expected = chat(*mistral, messages, 12, sampling=WARM)
    assert chat(*mistral, "Hello", 12, sampling=WARM) == expected
    assert expected != complete(*mistral, "Hello", 12, sampling=WARM)


def test_sampling_may_be_given_by_its_fields(mistral):
    fields = {"temperature": 1, "top_p": 1, "seed": 1}
    for ask in (complete, chat, lambda *given, **more: "".join(stream(*given, **more))):
        assert ask(*mistral, "x", 12, **fields) == ask(*mistral, "x", 12, sampling=WARM)
        with pytest.raises(ValueError, match="no keyword 'top'; the nearest field of Sampling"):
            ask(*mistral, "x", 12, top=0.5)


def test_a_model_of_nan_ends_in_a_sentence(mistral):
    model, params, tokenizer = mistral
    bad = tokenizer.encode("x")[-1]
    table = params["embed"]["embedding"].at[bad].set(np.nan)
    broken = model, params | {"embed": {"embedding": table}}, tokenizer
    apart = dataclasses.replace(WARM, logit_bias={bad: -math.inf})  # The sound row never meets it.
    prompts = [tokenizer.encode(text, bos=True) for text in ("y", "x")]
    sound, failed = completions(*broken, prompts, 5, sampling=[apart] * 2)
    assert (failed.text, failed.finish_reason) == ("", "error")
    assert (sound.error, sound.text) == (None, complete(*broken, "y", 5, sampling=apart))
    with pytest.raises(ValueError, match=r"^prompt 1: the model's logits are not finite"):
        complete(*broken, ["y", "x"], 5)
    with pytest.raises(ValueError, match=r"^the model's logits are not finite"):
        chat(*broken, "x", 5)
    pieces = stream(*broken, "x", 5)
    with pytest.raises(ValueError, match=r"^the model's logits are not finite"):
        list(pieces)
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        score(*broken, "xx")


def test_banning_all_that_has_a_text_is_refused(mistral):
    bias = dict.fromkeys(range(mistral[2].vocab_size), -np.inf)
    with pytest.raises(ValueError, match="logit_bias bans every token"):
        complete(*mistral, "x", logit_bias=bias)
    with pytest.raises(ValueError, match="logit_bias bans every token"):
        stream(*mistral, "x", logit_bias=bias)
    letter = mistral[2].encode("a")[-1]
    del bias[letter]
    assert set(complete(*mistral, "x", 3, logit_bias=bias)) == {"a"}


@pytest.mark.parametrize(
    ("ask", "arguments", "message"),
    [
        (complete, ([1, 5, 6],), "prompt is [1, 5, 6]; expected a text, or a list of texts"),
        (complete, (7,), "prompt is 7; expected a text"),
        (complete, (None,), "prompt is None; expected a text"),
        (complete, (b"x",), "prompt is b'x'; expected a text"),
        (complete, ([{"role": "user", "content": "x"}],), "prompt is [{'content': 'x', 'role'"),
        (complete, ({"role": "user"},), "prompt is {'role': 'user'}; expected a text"),
        (complete, ([],), "there are no prompts; expected at least one"),
        (complete, ("x", -1), "max_new_tokens is -1; expected an integer above 0"),
        (complete, ("x", "y"), "max_new_tokens is 'y'; expected an integer above 0"),
        (chat, ([],), "messages is []; expected a text, a list of messages such as"),
        (chat, (None,), "messages is None; expected a text, a list of messages"),
        (chat, ([1, 5],), "messages is [1, 5]; expected a text, a list of messages"),
        (chat, ([[["x"]]],), "messages is [[['x']]]; expected a text, a list of messages"),
        (chat, ([[], "x"],), "messages is [[], 'x']; expected a text, a list of messages"),
        (chat, ({"role": "user", "content": "x"},), "messages is {'content': 'x', 'role': 'user'}"),
        (chat, ([{"role": "user"}],), "messages[0] is {'role': 'user'}; expected a dict"),
        (stream, (["x", "y"],), "prompt is a batch; expected one text or conversation"),
        (stream, ([1, 5],), "messages is [1, 5]; expected a text"),
        (stream, ("x", 0), "max_new_tokens is 0; expected an integer above 0"),
    ],
)
def test_what_is_no_prompt_is_refused_in_a_sentence(mistral, ask, arguments, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        ask(*mistral, *arguments)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("ask", [complete, chat, stream])
def test_a_model_without_a_tokenizer_takes_no_texts(mistral, ask):
    for tokenizer in (None, mistral[1]):
        with pytest.raises(ValueError, match=r"^tokenizer is .*; expected a Tokenizer"):
            ask(*mistral[:2], tokenizer, "x")


def test_a_score_is_the_sum_of_the_full_pass(mistral, monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK", 16)
    model, params, tokenizer = mistral
    text = "Straße 日本 and some more words, past a few windows and chunks"
    ids = tokenizer.encode(text, bos=True)
    assert len(ids) > 3 * 16
    logits = jax.jit(model.apply)({"params": params}, *tiny.ragged([ids]))[0][0]
    logprobs = np.asarray(jax.nn.log_softmax(logits[:-1]))[range(len(ids) - 1), ids[1:]]
    scored = score(*mistral, text)
    size = len(text.encode())
    assert (scored.tokens, scored.bytes) == (len(ids) - 1, size)
    # Each term is off by 1e-5 at most; see test_generate.
    assert scored.logprob == pytest.approx(float(logprobs.sum()), abs=1e-5 * len(ids))
    assert scored.bits_per_byte == pytest.approx(-scored.logprob / np.log(2) / size)


def test_an_empty_text_has_no_score(mistral):
    with pytest.raises(ValueError, match="the text is empty"):
        score(*mistral, "")
