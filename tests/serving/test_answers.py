"""Answers over HTTP are those of the engine, token for token, streamed or not."""

import json

import httpx2
import openai
import pytest

import mistral_jax as mj
from mistral_jax.engine.score import likelihoods
from mistral_jax.engine.text import completions

WARM = {"temperature": 1.0, "top_p": 1.0, "seed": 3}
CHAT = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def client(served):
    with openai.OpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=0) as made:
        yield made


def events(served, path, **body):
    """Yields the events of a stream."""
    with served.client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_what_complete_returns(post, mistral):
    expected = mj.complete(*mistral, "one two", 20, **WARM)
    assert post("/v1/completions", prompt="one two", max_tokens=20, **WARM)["choices"] == [
        {"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}
    ]


def test_an_answer_is_what_chat_returns(post, mistral):
    expected = mj.chat(*mistral, CHAT, 20, **WARM)
    (choice,) = post("/v1/chat/completions", messages=CHAT, max_tokens=20, **WARM)["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}


@pytest.mark.parametrize("form", ["text", "texts", "ids", "several ids"])
def test_prompts_may_be_texts_or_ids(post, mistral, form):
    tokenizer = mistral[2]
    texts = ["one two", "three four five"] if form in ("texts", "several ids") else ["one two"]
    ids = [tokenizer.encode(text, bos=True) for text in texts]
    given = {"text": texts[0], "texts": texts, "ids": ids[0], "several ids": ids}[form]
    answer = post("/v1/completions", prompt=given, n=2, max_tokens=9, **WARM)
    expected = [mj.Engine(*mistral, slots=2, length=100).submit(one, 9, n=2, **WARM) for one in ids]
    expected = [each.result().text for pair in expected for each in pair]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(texts)))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(map(len, ids))
    assert usage["completion_tokens"] == 9 * 2 * len(texts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("odds", [None, 0, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_adds_up_to_the_response(served, post, n, odds):
    asked = {"prompt": "one two", "max_tokens": 20, "n": n, **WARM}
    asked |= {} if odds is None else {"logprobs": odds}
    whole = post("/v1/completions", **asked)
    parts = events(served, "/v1/completions", **asked, stream_options={"include_usage": True})
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 20 * n
    assert len({part["id"] for part in parts}) == 1
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in parts[:-1] if p["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        if odds is not None:
            for name, values in choice["logprobs"].items():
                given = [x for part in own if part["logprobs"] for x in part["logprobs"][name]]
                assert given == values


def test_a_streamed_conversation_adds_up_to_the_response(served, post):
    asked = {"messages": CHAT, "max_tokens": 20, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = post("/v1/chat/completions", **asked, **WARM)
    parts = events(served, "/v1/chat/completions", **asked, **WARM)
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in parts if p["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": None}
        assert own[-1]["delta"] == {}
        said = "".join(part["delta"]["content"] for part in own[1:-1])
        assert said == choice["message"]["content"]
        odds = [entry for part in own[1:-1] for entry in part["logprobs"]["content"]]
        assert odds == choice["logprobs"]["content"]
        # Bytes of a character that the last token leaves incomplete belong to no token.
        assert "".join(entry["token"] for entry in odds).rstrip("\ufffd") == said.rstrip("\ufffd")


def test_log_probabilities_are_the_engines(post, mistral):
    ids = mistral[2].encode("one two", bos=True)
    (row,) = completions(*mistral, [ids], 9, top_logprobs=3, **WARM)
    answer = post("/v1/completions", prompt=ids, max_tokens=9, logprobs=3, **WARM)
    odds = answer["choices"][0]["logprobs"]
    assert odds["token_logprobs"] == pytest.approx(row.logprobs)
    for found, likeliest in zip(odds["top_logprobs"], row.top_logprobs, strict=True):
        assert max(found.values()) == pytest.approx(max(likeliest.values()))
    text = answer["choices"][0]["text"]
    ends = [*odds["text_offset"][1:], len(text)]
    spans = zip(odds["tokens"], odds["text_offset"], ends, strict=True)
    assert all(text[begin:end] == token for token, begin, end in spans if token.isascii())


def test_a_prompt_is_echoed(served, post, mistral):
    asked = {"prompt": "one two", "max_tokens": 9, "echo": True, **WARM}
    expected = "one two" + mj.complete(*mistral, "one two", 9, **WARM)
    assert post("/v1/completions", **asked)["choices"][0]["text"] == expected
    parts = events(served, "/v1/completions", **asked)
    assert "".join(part["choices"][0]["text"] for part in parts) == expected


def test_an_echoed_prompt_has_its_log_probabilities(served, post, mistral):
    """As lm-evaluation-harness asks for them."""
    model, params, tokenizer = mistral
    ids = tokenizer.encode("one two three four five " * 3, bos=True)
    asked = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    choice = post("/v1/completions", **asked)["choices"][0]
    odds = choice["logprobs"]
    (expected,) = likelihoods(model, params, [ids], 1)
    assert len(odds["tokens"]) == len(ids) + 1
    assert odds["token_logprobs"][0] is odds["top_logprobs"][0] is None
    assert odds["token_logprobs"][1:-1] == pytest.approx(expected.logprobs.tolist(), abs=1e-5)
    pairs = zip(odds["tokens"][1:-1], odds["top_logprobs"][1:-1], strict=True)
    likeliest = [max(top, key=top.get) == token for token, top in pairs]
    assert likeliest == expected.greedy.tolist()
    (part, *_) = events(served, "/v1/completions", **asked)
    echoed = part["choices"][0]["logprobs"]["token_logprobs"]
    assert echoed == odds["token_logprobs"][:-1]


def test_stop_strings_and_stop_tokens_end_an_answer(post, mistral):
    text = mj.complete(*mistral, "one two", 40, **WARM)
    stop = text[5:8]
    for given in (stop, ["never to be seen", stop]):
        answer = post("/v1/completions", prompt="one two", max_tokens=40, stop=given, **WARM)
        assert answer["choices"][0]["text"] == text.partition(stop)[0]
        assert answer["choices"][0]["finish_reason"] == "stop"
    ids = mistral[2].encode("one two", bos=True)
    (row,) = completions(*mistral, [ids], 40, **WARM)
    last = row.tokens[7]
    answer = post(
        "/v1/completions", prompt=ids, max_tokens=40, stop_token_ids=[last], ignore_eos=True, **WARM
    )
    assert answer["usage"]["completion_tokens"] == row.tokens.index(last)


def test_without_a_seed_answers_differ_and_with_one_they_do_not(post):
    def said(**fields):
        body = {"prompt": "one", "max_tokens": 30, "temperature": 2.0, "top_p": 1.0} | fields
        return post("/v1/completions", **body)["choices"][0]["text"]

    assert said() != said()
    assert said(seed=5) == said(random_seed=5) != said(seed=6)


def test_the_client_of_openai_gets_what_it_expects(client, mistral):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    asked = {"model": "gpt-4o", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    text = mj.chat(*mistral, CHAT, 12, temperature=0)
    assert answer.choices[0].message.content == text
    assert answer.model == "tiny"
    assert answer.system_fingerprint.startswith("b")
    odds = answer.choices[0].logprobs.content
    assert "".join(one.token for one in odds) == text
    assert b"".join(bytes(one.bytes) for one in odds).decode(errors="replace") == text
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    made = client.completions.create(model="tiny", prompt="one two", max_tokens=5, temperature=0)
    assert made.choices[0].text == mj.complete(*mistral, "one two", 5, temperature=0)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(**asked | {"max_tokens": -3})


def test_tokens_become_text_and_text_becomes_tokens(served, post, mistral):
    tokenizer = mistral[2]
    text = "one two ä 🤗"
    ids = tokenizer.encode(text, bos=True)
    assert post("/tokenize", prompt=text)["tokens"] == ids
    assert post("/tokenize", content=text)["tokens"] == ids[1:]
    assert post("/tokenize", content=text, add_special=True)["tokens"] == ids
    assert post("/tokenize", messages=CHAT)["tokens"] == tokenizer.encode_chat(CHAT)
    assert post("/detokenize", tokens=ids) == {"prompt": text, "content": text}
    pieces = post("/tokenize", content=text, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == ids[1:]
    spelled = [one["piece"] for one in pieces]
    spelled = [bytes(one) if isinstance(one, list) else one.encode() for one in spelled]
    assert b"".join(spelled).decode().strip() == text
    info = served.client.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>"


def test_the_native_form_of_llama_cpp(served, post, mistral):
    expected = mj.complete(*mistral, "one two", 20, **WARM)
    asked = {"prompt": "one two", "n_predict": 20, "n_probs": 2, **WARM}
    answer = post("/completion", **asked, return_tokens=True)
    assert answer["content"] == expected
    assert len(answer["tokens"]) == answer["tokens_predicted"] == 20
    assert len(answer["completion_probabilities"]) == 20
    parts = events(served, "/completion", **asked)
    assert "".join(part["content"] for part in parts) == expected
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]
    ids = mistral[2].encode("one two", bos=True)
    both = post("/completion", **asked | {"prompt": [ids, "one two"]})
    assert [one["content"] for one in both] == [expected] * 2
    mixed = post("/completion", **asked | {"prompt": [*ids, "three"]})
    assert mixed["tokens_evaluated"] > len(ids)


def test_a_client_that_leaves_ends_its_request(served):
    body = {"prompt": "one", "max_tokens": 150, "temperature": 0, "n": 4, "ignore_eos": True}
    before = served.service.stats()
    with httpx2.Client(base_url=served.url, timeout=0.02) as client:  # noqa: SIM117
        with pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/completions", json=body)
    with served.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        next(answer.iter_lines())
    served.service.loaded.engine.warm_up()  # waits until no request is left
    stats = served.service.stats()
    assert stats["running"] == stats["waiting"] == 0
    assert stats["cancelled"] - before["cancelled"] == 8
    assert stats["new_tokens"] - before["new_tokens"] < 8 * 150
