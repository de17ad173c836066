"""Requests of many threads get what each would get alone, whatever else the engine does."""

import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mistral_jax as mj
from mistral_jax.engine import engine as engine_module
from mistral_jax.engine import prefill
from mistral_jax.engine.engine import Engine
from mistral_jax.engine.generate import generate
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.text import RowText, chat, complete, completions
from mistral_jax.engine.worker import Busy
from mistral_jax.parallel.sharding import abstract_params, read_layout

WARM = Sampling(temperature=1, top_p=1, seed=1)
# Logits near 1 through two layers, in float32.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTH = 200


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return tiny.with_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def warm():
    """Small chunks, for all of this module: prompts take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "CHUNK", 32)
        yield


@pytest.fixture(scope="module")
def engine(mistral, warm):
    with Engine(*mistral, slots=4, length=LENGTH) as made:
        made.warm_up()
        yield made


@pytest.fixture(scope="module")
def compiled():
    """Names of what JAX traces or compiles from now on; cleared by who asks."""
    names = []

    def listen(event, _, **__):
        if event.startswith("/jax/core/compile/"):
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


def request_of(rng: random.Random, size: int) -> dict:
    """Returns the arguments of a random request."""
    prompt = [rng.randrange(size) for _ in range(rng.choice([1, 3, 20, 33, 70]))]
    if rng.random() < 0.3:  # Some begin with the same tokens.
        prompt = [*range(3, 3 + rng.choice([32, 64, 80])), *prompt]
    sampling = Sampling(
        temperature=rng.choice([0, 1]),
        top_k=rng.choice([0, 9]),
        top_p=rng.choice([1, 0.9]),
        repetition_penalty=rng.choice([1, 1.2]),
        logit_bias=rng.choice([{}, {4: 2.5}]),
        seed=rng.randrange(99),
    )
    return {
        "prompt": prompt,
        "max_new_tokens": rng.randint(1, 30),
        "sampling": sampling,
        "stop_ids": rng.choice([None, (), range(3, 30)]),
        "top_logprobs": rng.choice([0, 0, 3]),
    }


def alone(mistral, prompt, **options):
    return generate(*mistral[:2], [prompt], **options)[0]


def assert_same(found, expected):
    assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, **CLOSE)
    assert [list(top) for top in found.top_logprobs] == [list(t) for t in expected.top_logprobs]


def test_threads_that_submit_at_once_get_what_each_would_alone(mistral, engine):
    rng = random.Random(0)
    asked = [[request_of(rng, mistral[0].config.vocab_size) for _ in range(3)] for _ in range(8)]
    found = [[None] * 3 for _ in asked]
    barrier = threading.Barrier(8)

    def ask(thread):
        barrier.wait()
        answers = [engine.submit(**request) for request in asked[thread]]
        found[thread] = [answer.result(300) for answer in answers]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for requests, answers in zip(asked, found, strict=True):
        for request, answer in zip(requests, answers, strict=True):
            assert_same(answer, alone(mistral, **request))


def test_after_warming_up_no_request_compiles_anything(mistral, engine, compiled):
    rng = random.Random(1)
    size = mistral[0].config.vocab_size
    jax.jit(lambda x: x + size)(np.float32(1))
    assert compiled
    compiled.clear()
    answers = []
    for _ in range(100):
        request = request_of(rng, size) | {"max_new_tokens": rng.randint(1, 9)}
        n = rng.choice([None, None, None, 2])
        answer = engine.submit(**request, n=n)
        answers += [answer] if n is None else answer
        if rng.random() < 0.1:
            answers[-1].cancel()
    for answer in answers:
        answer.result(300)
    assert compiled == []
    assert engine.stats()["reused_tokens"] > 0


def test_a_request_is_read_piece_by_piece(mistral, engine):
    tokenizer = mistral[2]
    prompt = "def train(path"
    answer = engine.submit(prompt, 20, sampling=WARM, top_logprobs=2)
    pieces = list(answer)
    (expected,) = completions(
        *mistral, [tokenizer.encode(prompt, bos=True)], 20, sampling=WARM, top_logprobs=2
    )
    assert "".join(piece.text for piece in pieces) == expected.text == answer.result().text
    tokens = [piece for piece in pieces if piece.token is not None]
    assert [piece.token for piece in tokens] == expected.tokens
    assert [list(piece.top_logprobs) for piece in tokens] == [
        list(top) for top in expected.top_logprobs
    ]
    assert list(answer) == pieces  # and again


def test_texts_and_messages_are_those_of_complete_and_chat(mistral, engine):
    messages = [{"role": "user", "content": "Hello"}]
    whole = complete(*mistral, "x", 40, sampling=WARM)
    assert engine.submit("x", 40, sampling=WARM).result(300).text == whole
    stopped = engine.submit("x", 40, sampling=WARM, stop=whole[8:12]).result(300)
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(whole[8:12])], "stop")
    answered = engine.submit(messages, 12, temperature=1, top_p=1, seed=1).result(300)
    assert answered.text == chat(*mistral, messages, 12, sampling=WARM)


def test_answers_to_one_prompt_draw_apart_as_rows_of_a_batch_do(mistral, engine):
    prompt = [1, 5, 9]
    rows = generate(*mistral[:2], [prompt] * 3, 12, sampling=WARM, stop_ids=())
    answers = engine.submit(prompt, 12, sampling=WARM, stop_ids=(), n=3)
    assert [answer.result(300).tokens for answer in answers] == [row.tokens for row in rows]


def test_what_was_read_before_is_not_read_again(mistral, engine):
    """Turn by turn of a conversation; the answers are the same as without it."""
    rng = random.Random(2)
    ids = [rng.randrange(400) for _ in range(40)]
    reused = engine.stats()["reused_tokens"]
    for seed in range(4):
        sampling = Sampling(1, seed=seed)
        answer = engine.submit(ids, 9, sampling=sampling, stop_ids=()).result(300)
        assert_same(answer, alone(mistral, ids, max_new_tokens=9, sampling=sampling, stop_ids=()))
        before, reused = reused, engine.stats()["reused_tokens"]
        # All but the last token of the answer, which was never fed, and of the question.
        assert reused - before == (len(ids) - 21 if seed else 0)
        ids = [*ids, *answer.tokens, *(rng.randrange(400) for _ in range(20))]


def test_without_memory_for_prefixes_all_is_read(mistral, warm):
    with Engine(*mistral[:2], slots=1, length=64, prefix_bytes=0) as engine:
        answers = [engine.submit([7] * 30, 3, stop_ids=(), sampling=WARM) for _ in range(2)]
        assert answers[0].result(300) == answers[1].result(300)
        assert engine.stats()["reused_tokens"] == engine.stats()["prefix_bytes"] == 0


def test_a_cancelled_request_ends_with_what_it_has(mistral, engine):
    before = engine.stats()["cancelled"]
    answer = engine.submit([1, 5, 9], 150, sampling=WARM, stop_ids=())
    waiting = [engine.submit([1, 5, 9], 150, stop_ids=()) for _ in range(6)]
    next(iter(answer))
    for one in (answer, *waiting):
        one.cancel()
    assert {one.result(300).finish_reason for one in (answer, *waiting)} == {"cancelled"}
    whole = alone(mistral, [1, 5, 9], max_new_tokens=150, sampling=WARM, stop_ids=())
    tokens = answer.result().tokens
    assert tokens == whole.tokens[: len(tokens)]
    assert engine.stats()["cancelled"] == before + 7
    sound = engine.submit([1, 5, 9], 20, sampling=WARM, stop_ids=()).result(300)
    assert sound.tokens == whole.tokens[:20]


def test_a_row_that_fails_ends_alone(mistral, warm):
    model, params, _ = mistral
    table = params["embed"]["embedding"].at[7].set(jnp.nan)
    with Engine(model, params | {"embed": {"embedding": table}}, slots=2, length=64) as engine:
        bias = {7: -np.inf}
        bad, sound = (engine.submit(p, 9, stop_ids=(), logit_bias=bias) for p in ([1, 7], [1, 5]))
        assert bad.result(300).finish_reason == "error"
        with pytest.raises(ValueError, match="not finite"):
            list(bad)
        assert len(sound.result(300).tokens) == 9
        assert engine.stats()["failed"] == 1


def test_an_exception_reaches_all_who_wait(mistral, warm, monkeypatch):
    engine = Engine(*mistral, slots=1, length=64)
    answers = [engine.submit([1, 2], 9) for _ in range(3)]

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(engine._worker._scheduler, "step", fail)
    late = engine.submit([1, 2], 60)
    for answer in (*answers[1:], late):
        with pytest.raises(RuntimeError, match="the engine ended: no room"):
            answer.result(300)
    with pytest.raises(RuntimeError, match="the engine ended: no room"):
        list(late)
    with pytest.raises(RuntimeError, match="the engine ended: no room"):
        engine.submit([1, 2], 9)
    assert engine.drain(1)
    engine.close()


def test_the_queue_is_bounded_and_a_drained_engine_accepts_nothing(mistral, warm):
    engine = Engine(*mistral, slots=1, length=64, most_waiting=2)
    accepted = [engine.submit([1, 2], 9, stop_ids=()) for _ in range(3)]
    with pytest.raises(Busy, match=r"the engine has \d requests, and accepts 3; try again later"):
        engine.submit([1, 2], 50, stop_ids=(), n=3)
    with pytest.raises(ValueError, match="n is 4, and the engine accepts 3 requests at a time"):
        engine.submit([1, 2], 9, n=4)
    assert engine.drain(300)
    assert all(answer.done for answer in accepted)
    assert engine.stats()["finished"] == len(accepted)
    with pytest.raises(RuntimeError, match="the engine takes no requests: it is being drained"):
        engine.submit([1, 2], 9)
    engine.close()
    engine.close()


def test_tokens_that_wait_are_bounded(mistral, warm):
    with Engine(*mistral, slots=1, length=LENGTH, most_waiting_tokens=50) as engine:
        answers = [engine.submit([1] * 60, 130, stop_ids=())]  # more than the bound, but alone
        while not answers[0].pieces():
            pass
        answers += engine.submit([2] * 40, 1, n=2)
        with pytest.raises(Busy, match="40 tokens of prompts wait, and the engine accepts 50"):
            engine.submit([3] * 11, 1)
        answers.append(engine.submit([3] * 10, 1))
        assert [answer.result(300).finish_reason for answer in answers[1:]] == ["length"] * 3


def test_owners_take_turns(mistral, warm):
    """The one request of an owner waits for one request of another owner, not for all."""
    with Engine(*mistral, slots=1, length=LENGTH) as engine:
        ended = []

        def ask(owner, i):
            answer = engine.submit([1, 2, i], 5, stop_ids=(), owner=owner)
            answer.on_change(lambda: answer.done and ended.append(owner))
            return answer

        first = engine.submit([1, 2], 100, stop_ids=())
        answers = [ask("many", i) for i in range(5)] + [ask("few", 9), ask("other", 8)]
        for answer in (first, *answers):
            answer.result(300)
    assert ended[:3] == ["many", "few", "other"]
    assert ended[3:] == ["many"] * 4


@pytest.mark.parametrize("name", ["push", "flush"])
def test_an_answer_that_fails_takes_only_itself_down(engine, monkeypatch, name):
    sound = getattr(RowText, name)

    def breaks(self, *token):
        if self._stop == ["break"]:
            raise TypeError("a fault")
        return sound(self, *token)

    monkeypatch.setattr(RowText, name, breaks)
    failing = engine.submit("one two", 9, stop="break", stop_ids=())
    others = [engine.submit("one two", 9, stop_ids=(), seed=seed) for seed in range(3)]
    assert failing.result(300).error == "the answer failed: TypeError: a fault"
    assert failing.result().finish_reason == ("error" if name == "push" else "length")
    assert [len(answer.result(300).tokens) for answer in others] == [9] * 3


def test_listeners_hear_of_every_piece_and_cannot_stop_the_engine(engine):
    seen = threading.Semaphore(0)
    answer = engine.submit("one two", 9, stop_ids=())
    answer.on_change(seen.release)
    other = engine.submit("one two", 9, stop_ids=())
    other.on_change(lambda: 1 / 0)
    pieces = []
    while True:
        assert seen.acquire(timeout=300)
        done = answer.done
        pieces += answer.pieces(len(pieces))
        if done:
            break
    assert "".join(piece.text for piece in pieces) == answer.result().text
    assert other.result(300).text == answer.result().text


def test_answers_count_the_tokens_that_were_restored(mistral, warm):
    prompt = list(range(3, 103))
    with Engine(*mistral, slots=2, length=LENGTH) as engine:
        first, again = (engine.submit(prompt, 3) for _ in range(2))
        first.result(300)
        later = engine.submit([*prompt, 1], 3)
        later.result(300)
        assert first.cached_tokens == again.cached_tokens == 0
        assert later.cached_tokens == engine.stats()["reused_tokens"] > 50


def test_closing_ends_what_runs(mistral, warm):
    engine = Engine(*mistral, slots=1, length=LENGTH)
    answers = [engine.submit([1, 2], 190, stop_ids=()) for _ in range(3)]
    engine.close()
    with pytest.raises(RuntimeError, match="closed before the end"):
        answers[-1].result(10)
    with pytest.raises(RuntimeError, match="it was closed; make another"):
        engine.submit([1, 2], 9)


def test_an_engine_that_is_dropped_ends_its_thread(mistral, warm):
    before = threading.active_count()
    answer = Engine(*mistral[:2], slots=1, length=64).submit([1, 2], 3, stop_ids=())
    assert len(answer.result(300).tokens) == 3
    del answer
    for thread in threading.enumerate():
        if thread.name == "engine" and threading.active_count() > before:
            thread.join(0.5)
    assert threading.active_count() == before


def test_an_engine_that_waits_does_nothing(mistral, engine, monkeypatch):
    turns = []
    monkeypatch.setattr(engine._worker, "_turn", lambda: turns.append(1))
    threading.Event().wait(0.1)
    assert turns == []
    assert engine.stats()["seconds_since_step"] == 0


def test_the_public_name():
    assert mj.Engine is engine_module.Engine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": 0}, "slots is 0; expected an integer above 0"),
        ({"most_waiting": "x"}, "most_waiting is 'x'; expected an integer above 0"),
        ({"prefix_bytes": -1}, "prefix_bytes is -1; expected an integer from 0"),
        ({"length": 1}, "length is 1; expected an integer from 2 to the model's 32768 positions"),
        ({"length": 10**6}, "length is 1000000; expected an integer from 2"),
    ],
)
def test_engines_that_make_no_sense_are_refused(mistral, arguments, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Engine(*mistral, **arguments)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 150, {"max_new_tokens": 51}, "the prompt has 150 tokens, which with 51 new ones"),
        ([], {}, "prompt 0 is empty; expected at least the BOS token"),
        ([1, 10**6], {}, "prompt 0 has 1000000; expected token ids"),
        (7, {}, "prompt is 7; expected a text, messages, or token ids"),
        ([[1, 2]], {}, "messages is [[1, 2]]; expected a text, a list of messages"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer above 0"),
        ("x", {"n": 0}, "n is 0; expected an integer above 0"),
        ("x", {"stop": [""]}, "stop has ''; expected strings that are not empty"),
        ("x", {"sampling": [WARM]}, "sampling is a list; a request has one Sampling"),
        ("x", {"logit_bias": {10**6: 1}}, "logit_bias names token 1000000; expected 0 to"),
        ("x", {"temprature": 1}, "there is no keyword 'temprature'"),
    ],
)
def test_requests_that_make_no_sense_are_refused(engine, prompt, options, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        engine.submit(prompt, **({"max_new_tokens": 9} | options))
    assert str(refusal.value).startswith(message)


@pytest.mark.slow
def test_devices_of_a_mesh_serve_what_one_does(warm, compiled):
    """Rows lie on four devices, and heads on two; a second turn copies what the first one read."""
    fields = {"n_heads": 8, "n_kv_heads": 2, "hidden_dim": 48, "vocab_size": 56}
    model, params = tiny.build(sliding_window=[5, None], **fields)
    layout = read_layout("data_tensor", model.config)
    places = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout))
    laid = model.clone(rules=layout.rules), jax.device_put(params, places)
    with Engine(*laid, slots=4, length=100) as engine:
        engine.warm_up()
        ids = list(range(1, 40))
        for _ in range(2):
            compiled.clear()
            answers = engine.submit(ids, 6, sampling=WARM, stop_ids=(), n=2)
            tokens = [answer.result(300).tokens for answer in answers]
            assert compiled == []
            rows = generate(model, params, [ids] * 2, 6, sampling=WARM, stop_ids=())
            assert tokens == [row.tokens for row in rows]
            ids += [*tokens[0], 3, 4]
        assert engine.stats()["reused_tokens"] == 39 + 5
