"""Laws of generation: what a row gets depends on its prompt and its sampling alone."""

import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.config import ModelConfig
from mistral_jax.engine import decode, prefill, scheduler, slots
from mistral_jax.engine.completion import Token
from mistral_jax.engine.generate import generate, stream_tokens
from mistral_jax.engine.logits import penalize
from mistral_jax.engine.sampling import RowSampling, Sampling
from mistral_jax.model.cache import init_cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.parallel.sharding import abstract_params

PROMPTS = [[1, 7, 9], [1, *range(10, 40)], [5]]
GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1, top_p=0.98, seed=5)
# Logits near 1 through two layers, in float32.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def mistral():
    """A model with a windowed, a full and a dilated layer, and its params."""
    model, params = tiny.build(n_layers=3, sliding_window=[5, None, 3], dilation=[1, 1, 2])
    return model, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def warm(mistral):
    """What `WARM` makes of the prompts, each with a request of its own."""
    return generate(*mistral, PROMPTS, 30, sampling=[WARM] * 3, stop_ids=())


def forward(model, params, rows):
    """Returns the logits of each row by one pass without a cache."""
    logits = np.asarray(tiny.forward(model, params, *tiny.ragged(rows))[0])
    return [x[: len(row)] for x, row in zip(logits, rows, strict=True)]


def test_the_likeliest_tokens_are_those_of_the_full_pass(mistral):
    completions = generate(*mistral, PROMPTS, 30, sampling=GREEDY, stop_ids=())
    texts = [[*p, *c.tokens] for p, c in zip(PROMPTS, completions, strict=True)]
    assert len(texts[1]) > 5 * 5  # windows
    for prompt, completion, logits in zip(
        PROMPTS, completions, forward(*mistral, texts), strict=True
    ):
        assert completion.tokens == logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()
        assert completion.finish_reason == "length"


def test_log_probabilities_are_the_models_own_before_any_filter(mistral):
    sampling = Sampling(3, top_k=2, repetition_penalty=3, logit_bias={4: 50})
    completions = generate(*mistral, PROMPTS, 5, sampling=sampling, top_logprobs=3)
    texts = [[*p, *[4] * 5] for p in PROMPTS]
    for prompt, completion, logits in zip(
        PROMPTS, completions, forward(*mistral, texts), strict=True
    ):
        assert completion.tokens == [4] * 5
        logprobs = np.asarray(jax.nn.log_softmax(logits[len(prompt) - 1 : -1]))
        np.testing.assert_allclose(completion.logprobs, logprobs[:, 4], **CLOSE)
        best = np.argsort(-logprobs, axis=1)[:, :3]
        assert [list(top) for top in completion.top_logprobs] == best.tolist()
        values = [list(top.values()) for top in completion.top_logprobs]
        np.testing.assert_allclose(values, np.take_along_axis(logprobs, best, axis=1), **CLOSE)


def test_a_row_of_a_batch_is_that_row_alone(mistral, warm):
    for prompt, completion in zip(PROMPTS, warm, strict=True):
        (alone,) = generate(*mistral, [prompt], 30, sampling=WARM, stop_ids=())
        assert alone.tokens == completion.tokens
        np.testing.assert_allclose(alone.logprobs, completion.logprobs, **CLOSE)


def test_a_stream_is_a_batch_of_one(mistral, warm):
    tokens = list(stream_tokens(*mistral, PROMPTS[1], 30, sampling=WARM, stop_ids=()))
    assert [token.id for token in tokens] == warm[1].tokens
    np.testing.assert_allclose([token.logprob for token in tokens], warm[1].logprobs, **CLOSE)


def test_the_same_seed_gives_the_same_text_and_another_another(mistral, warm):
    again = generate(*mistral, PROMPTS, 30, sampling=[WARM] * 3, stop_ids=())
    assert again == warm
    other = Sampling(1, top_p=0.98, seed=6)
    mixed = generate(*mistral, PROMPTS, 30, sampling=[WARM, other, WARM], stop_ids=())
    assert [a.tokens == b.tokens for a, b in zip(mixed, warm, strict=True)] == [True, False, True]


def test_rows_that_share_a_sampling_draw_apart(mistral, warm):
    rows = generate(*mistral, PROMPTS[:1] * 3, 30, sampling=WARM, stop_ids=())
    assert rows[0].tokens == warm[0].tokens
    assert len({tuple(row.tokens) for row in rows}) == 3


def test_a_text_continues_from_any_point_of_itself(mistral, warm):
    prompt, text = PROMPTS[0], warm[0].tokens
    (rest,) = generate(*mistral, [prompt + text[:11]], 19, sampling=WARM, stop_ids=())
    assert rest.tokens == text[11:]


def test_every_way_to_cut_a_prompt_gives_the_same_tokens(mistral, warm, monkeypatch):
    for size in (16, 32):
        monkeypatch.setattr(prefill, "CHUNK", size)
        (cut,) = generate(*mistral, PROMPTS[1:2], 30, sampling=WARM, stop_ids=())
        assert cut.tokens == warm[1].tokens


def test_chunks_hold_every_token_once_in_few_shapes(monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK", 32)
    widths = set()
    for longest in range(1, 100):
        rows = [list(range(100, 100 + longest)), [7] * (longest // 3), []]
        found = [[], [], []]
        for tokens, positions in prefill.chunks(rows):
            widths.add(tokens.shape[1])
            for row, own in enumerate(found):
                real = positions[row] >= 0
                assert positions[row][real].tolist() == list(range(len(own), len(own) + real.sum()))
                own += tokens[row][real].tolist()
        assert found == rows
    assert widths == {16, 32}


def test_a_request_gets_the_room_that_it_needs(mistral):
    model, params = mistral
    config = model.config

    def cache_bytes(length):
        cache, _ = prefill.prefill(model, params, [[1, 2]], length)
        return sum(x.nbytes for layer in cache for x in (layer.k, layer.v))

    a_slot = 2 * config.num_kv_heads * config.head_dim * 4
    assert cache_bytes(10) == a_slot * (5 + 256 + 5)  # the dilated window spans five, too
    # At most doubled where it is small, and a quarter more where it is large.
    for length in (257, 1000, 1025, 4097, 30_000):
        most = max(min(2 * length, 4096), 1.25 * length)
        assert length <= prefill.room(length) <= most
    assert len({prefill.room(length) for length in range(1, 32_769)}) < 18


def test_rows_come_in_few_counts():
    for rows in range(1, 200):
        assert rows <= prefill.row_count(rows) < 2 * rows
        assert rows <= 8 or prefill.row_count(rows) < 1.5 * rows
    counts = {prefill.row_count(rows) for rows in range(1, 33)}
    assert counts == {1, 2, 4, 8, 12, 16, 24, 32}


def test_what_remains_of_a_prompt_is_at_most_half_padding():
    widths = set()
    for longest in range(1, 1100):
        found = [tokens.shape[1] for tokens, _ in prefill.chunks([[7] * longest])]
        widths |= set(found)
        assert longest <= sum(found) <= max(16, 2 * longest)
        assert sum(found) - longest <= found[-1] / 2 or found[-1] == 16
        assert len(found) <= longest // 512 + 5
    assert widths == {16, 64, 512}


def test_stop_ids(mistral, warm):
    text = warm[0].tokens
    place = next(i for i in range(3, 30) if text.index(text[i]) == i)
    others = generate(*mistral, PROMPTS, 30, sampling=[WARM] * 3, stop_ids=[52, text[place]])
    assert others[0].tokens == text[:place]
    assert others[0].logprobs == warm[0].logprobs[:place]
    assert others[0].finish_reason == "stop"
    for other, whole in zip(others, warm, strict=True):  # rows that end do not change the rest
        assert other.tokens == whole.tokens[: len(other.tokens)]
        assert len(other.tokens) == 30 or whole.tokens[len(other.tokens)] in (52, text[place])


def test_the_end_of_text_stops_unless_it_may_not(mistral):
    end = Sampling(temperature=0, logit_bias={2: 100})
    stopped, endless = (
        generate(*mistral, PROMPTS, 3, sampling=end, stop_ids=ids, top_logprobs=3)
        for ids in (None, ())
    )
    assert [(row.tokens, row.finish_reason) for row in stopped] == [([], "stop")] * 3
    assert [(row.tokens, row.finish_reason) for row in endless] == [([2, 2, 2], "length")] * 3


def test_a_row_ends_where_its_caller_says(mistral, warm):
    seen = [[], [], []]

    def until(row, token):
        seen[row].append(token)
        return row == 1 and len(seen[1]) == 4

    rows = generate(*mistral, PROMPTS, 30, sampling=[WARM] * 3, stop_ids=(), until=until)
    assert [len(row.tokens) for row in rows] == [30, 4, 30]
    assert [row.finish_reason for row in rows] == ["length", "stop", "length"]
    assert [row.tokens for row in rows] == seen
    assert seen == [whole.tokens[: len(own)] for whole, own in zip(warm, seen, strict=True)]


def test_on_a_gpu_few_rows_are_read_in_longer_chunks():
    gpu = Backend("gpu")
    assert {prefill.chunk_size(rows, PLAIN) for rows in (1, 2, 3, 4, 32)} == {512}
    widths = {rows: prefill.chunk_size(rows, gpu) for rows in (1, 2, 3, 4, 32)}
    assert widths == {1: 2048, 2: 1024, 3: 512, 4: 512, 32: 512}
    (first, places), (last, _) = prefill.chunks([range(2100)], backend=gpu)
    assert (first.shape, last.shape) == ((1, 2048), (1, 64))
    np.testing.assert_array_equal(places[0], np.arange(2048))


@pytest.mark.parametrize(
    ("chip", "widths"), [("TPU v5 lite", [1024, 512, 512]), ("TPU v6 lite", [2048, 1024, 512])]
)
def test_on_a_tpu_chunks_fit_the_chip(chip, widths):
    tpu = Backend("tpu", chip)
    assert [prefill.chunk_size(rows, tpu) for rows in (1, 2, 8)] == widths
    assert prefill.widths(1, tpu) == [16, 64, 512, *[1024] * (widths[0] > 1024), widths[0]]
    assert prefill.padded(512, tpu) == 512


@pytest.mark.parametrize("kept", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_a_cache_that_lies_by_heads_makes_the_same_text(mistral, monkeypatch, kept):
    """As on a GPU, where no array of the cache is turned by a loop of steps."""
    model = mistral[0].clone(kv_cache_dtype=kept)

    def texts(model):
        whole = generate(model, mistral[1], PROMPTS, 30, sampling=[WARM] * 3, stop_ids=())
        streamed = stream_tokens(model, mistral[1], PROMPTS[1], 30, sampling=WARM, stop_ids=())
        return [row.tokens for row in whole], [token.id for token in streamed]

    expected = texts(model)
    shapes, loop = [], scheduler.decode

    def looked_at(model, params, state, *rest):
        shapes.append(jax.tree.map(jnp.shape, state.cache[0]))
        return loop(model, params, state, *rest)

    monkeypatch.setattr(scheduler, "decode", looked_at)
    assert texts(model.clone(backend=Backend("gpu"))) == expected
    numbers = {
        jax.tree.leaves(layer.k, is_leaf=lambda x: isinstance(x, tuple))[0] for layer in shapes
    }
    assert numbers == {(4, 2, 5, 8), (1, 2, 5, 8)}


def test_penalties_see_the_prompt_and_the_answer(mistral):
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.1, "frequency_penalty": 0.3}
    samplings = [Sampling(0, **penalties), GREEDY, Sampling(0, logit_bias={5: 2})]
    completions = generate(*mistral, PROMPTS, 20, sampling=samplings, stop_ids=(), top_logprobs=3)
    texts = [[*p, *c.tokens] for p, c in zip(PROMPTS, completions, strict=True)]
    rows = RowSampling.stack(samplings, [0] * 3, PROMPTS, 53).penalties
    for i, logits in enumerate(forward(*mistral, texts)):
        own = jax.tree.map(lambda x, i=i: x[i : i + 1], rows)
        for step, token in enumerate(completions[i].tokens):
            counts = np.bincount(completions[i].tokens[:step], minlength=53)[None]
            seen = logits[None, len(PROMPTS[i]) + step - 1]
            assert token == np.argmax(penalize(seen, own, counts))


def test_requests_reuse_the_compiled_programs(mistral, monkeypatch):
    def limit_traces(module, name, **options):
        counted = chex.assert_max_traces(getattr(module, name).__wrapped__, n=1)
        monkeypatch.setattr(module, name, jax.jit(counted, **options))

    chex.clear_trace_counter()
    limit_traces(prefill, "read_chunk", static_argnames="model")
    limit_traces(decode, "_first_step", static_argnames="model")
    limit_traces(scheduler, "decode", static_argnames="model")
    assert scheduler.decode is not decode.decode
    for length, new, sampling in (
        (1, 1, GREEDY),
        (5, 200, WARM),
        (16, 7, Sampling(top_k=3, seed=9)),
        (9, 64, Sampling(0.2, top_p=1, min_p=0.1)),
        (12, 9, Sampling(0.2, repetition_penalty=1.1, logit_bias={4: 2})),
    ):
        options = {"sampling": sampling, "top_logprobs": length}
        generate(*mistral, [[1] * length], new, stop_ids=[3] * (length % 4), **options)
        list(stream_tokens(*mistral, [1] * length, new, sampling=sampling))


@pytest.mark.slow
def test_few_programs_serve_requests_of_all_kinds(monkeypatch):
    """One for each width of a chunk, and four more, for each count of rows."""
    monkeypatch.setattr(prefill, "CHUNK", 32)
    model, params = tiny.build(n_layers=1, vocab_size=59)
    programs = prefill.read_chunk, prefill.start_reading, decode._first_step, decode.decode
    programs = *programs, slots.insert
    before = [program._cache_size() for program in programs]
    rng = random.Random(0)
    for rows in [1, 2, 3, 4] * 5:
        prompts = [[1] * rng.randint(1, 99) for _ in range(rows)]
        sampling = Sampling(
            temperature=rng.choice([0, 1]),
            top_k=rng.choice([0, 9]),
            repetition_penalty=rng.choice([1, 1.2]),
            logit_bias=rng.choice([{}, {4: 2.5}]),
            seed=rng.randrange(99),
        )
        top, stops = rng.randrange(6), rng.choice([None, (), (3, 4, 5)])
        new = rng.randint(1, 9)
        generate(model, params, prompts, new, sampling=sampling, stop_ids=stops, top_logprobs=top)
    counts = [program._cache_size() for program in programs]
    made = [after - first for after, first in zip(counts, before, strict=True)]
    assert made[:4] == [2 * 3, 3, 3, 3]


@pytest.fixture(scope="module")
def broken():
    """A model whose token 7 has an embedding of NaN, and its params."""
    model, params = tiny.build(sliding_window=[5, None])
    table = params["embed"]["embedding"].at[7].set(jnp.nan)
    return model, params | {"embed": {"embedding": table}}


def test_a_row_whose_logits_are_not_finite_ends_alone_as_an_error(mistral, broken):
    model, params = broken
    sound, bad = [1, 5, 9], [1, 7]
    late = Sampling(0, logit_bias={7: 100})  # its first token is the one that breaks it
    options = {"stop_ids": (0,), "top_logprobs": 2}
    rows = generate(
        model, params, [sound, bad, sound, sound], 20, sampling=[WARM, WARM, late, WARM], **options
    )
    (alone,) = generate(model, params, [sound] * 4, 20, sampling=[WARM] * 4, **options)[:1]
    assert rows[0] == rows[3] == alone
    assert alone.error is None
    assert (rows[1].tokens, rows[1].logprobs, rows[1].finish_reason) == ([], [], "error")
    assert (rows[2].tokens, rows[2].finish_reason) == ([7], "error")
    for row in rows[1:3]:
        assert "float16" in row.error
        assert "--dtype bfloat16" in row.error
        assert "\n" not in row.error
    assert np.isfinite([*rows[2].logprobs, *rows[2].top_logprobs[0].values()]).all()
    tokens = stream_tokens(model, params, sound, 20, sampling=late, **options)
    assert next(tokens).id == 7
    with pytest.raises(ValueError, match="not finite"):
        next(tokens)


def test_rows_without_a_distribution_fail_and_others_do_not(mistral):
    inf, nan = np.inf, np.nan
    logits = np.zeros((5, 53), np.float32)
    logits[0, 3], logits[1, 52], logits[2], logits[3, 1:] = nan, inf, -inf, -inf
    sampling = RowSampling.stack([WARM] * 5, range(5), [[1]] * 5, 53)
    state = decode.start((), [1, 1, 1, 1, 0], [9] * 5, sampling, [()] * 5, [True] * 5, 53)
    state, made = decode.first_step(mistral[0], state, logits)
    assert np.asarray(made.left).tolist() == [-1, -1, -1, 8, 0]
    assert np.asarray(made.tokens)[:, 0].tolist() == [-1, -1, -1, 0, -1]
    assert float(made.logprobs[3, 0]) == 0
    # What cannot be has no log-probability.
    assert list(Token.of(made, 3, 0, 2).top_logprobs.values()) == [0, None]


def test_fields_of_the_sampling_may_be_keywords(mistral):
    expected = generate(*mistral, PROMPTS, 9, sampling=WARM, stop_ids=())
    fields = {"temperature": 1, "top_p": 0.98, "seed": 5}
    assert generate(*mistral, PROMPTS, 9, stop_ids=(), **fields) == expected
    other = [Sampling(3, seed=5)] * 3
    found = generate(*mistral, PROMPTS, 9, sampling=other, stop_ids=(), temperature=1, top_p=0.98)
    assert [row.tokens for row in found] == [
        row.tokens for row in generate(*mistral, PROMPTS, 9, sampling=[WARM] * 3, stop_ids=())
    ]
    (one,) = generate(*mistral, [[5]], 9, stop_ids=(), **fields)
    tokens = stream_tokens(*mistral, [5], 9, stop_ids=(), **fields)
    assert [token.id for token in tokens] == one.tokens


@pytest.mark.parametrize(
    "prompts",
    [
        np.array([[1, 5, 9], [1, 7, 9]]),
        jnp.array([[1, 5, 9], [1, 7, 9]]),
        [np.array([1, 5, 9], np.int64), jnp.array([1, 7, 9], jnp.int8)],
        ((1, np.int32(5), jnp.int32(9)), range(1, 10, 6)),
    ],
    ids=["numpy", "jax", "rows", "numbers"],
)
def test_arrays_of_ids_are_ids(mistral, prompts):
    expected = generate(*mistral, [[1, 5, 9], [int(x) for x in prompts[1]]], 3, sampling=GREEDY)
    assert generate(*mistral, prompts, 3, sampling=GREEDY) == expected


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decoding_reads_its_weights_and_copies_none(dtype, rows):
    """Seen in the memory of the compiled loop; a copy costs more than all that is done with it."""
    config = ModelConfig(
        vocab_size=96,
        num_layers=1,
        embed_dim=256,
        mlp_dim=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=1e4,
        sliding_window=8,
    )
    model = Transformer(config, dtype)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(Transformer(config))
    )
    sampling = RowSampling.stack([WARM] * rows, range(rows), [[1]] * rows, config.vocab_size)
    cache = init_cache(config, rows, 8, dtype)
    ones, size = [1] * rows, config.vocab_size
    state = decode.start(cache, ones, ones, sampling, [()] * rows, [False] * rows, size)
    lowered = decode.decode.lower(model, params, state, np.int32(9), np.zeros(rows, bool))
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    smallest = params["layers_0"]["attn"]["q_proj"]["kernel"]
    assert temporary < smallest.size * smallest.dtype.itemsize


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 is empty; expected at least the BOS token"),
        ([[1], [3, 53]], {}, "prompt 1 has 53; expected token ids from 0 to 52"),
        ([[-1]], {}, "prompt 0 has -1; expected token ids from 0 to 52"),
        ([[1.5]], {}, "prompt 0 has 1.5; expected token ids"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer above 0"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected an integer above 0"),
        ([[1]], {"stop_ids": [99]}, "stop_ids has 99; expected token ids from 0 to 52"),
        ([[1]], {"top_logprobs": 54}, "top_logprobs is 54; expected an integer from 0 to 20"),
        ([[1]], {"top_logprobs": -1}, "top_logprobs is -1; expected an integer from 0 to 20"),
        ([[1]], {"top_logprobs": 21}, "top_logprobs is 21; expected an integer from 0 to 20"),
        ([[1]], {"sampling": [WARM] * 2}, "there are 2 samplings for 1 prompts"),
        ([[1]], {"sampling": {"seed": 1}}, "sampling is {'seed': 1}; expected a Sampling, or a"),
        ([[1]], {"sampling": [{"seed": 1}]}, "sampling is [{'seed': 1}]; expected a Sampling"),
        ([[1]], {"temprature": 1}, "there is no keyword 'temprature'; the nearest field of"),
        ([[1]], {"temperature": "1"}, "temperature is '1'; expected a number from 0 to 100"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1; expected an integer above 0"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens is True; expected an integer above 0"),
        ([[1]], {"max_new_tokens": 2**70}, "prompt 0 has 1 tokens, which with 1180591620717411303"),
        ([[1]], {"stop_ids": 2}, "stop_ids is 2; expected a sequence of token ids"),
        ([[1]], {"stop_ids": "a"}, "stop_ids is 'a'; expected a sequence of token ids"),
        (
            [[1]],
            {"logit_bias": dict.fromkeys(range(53), -np.inf)},
            "logit_bias bans every token; leave at least one",
        ),
        ([1, 5, 6], {}, "prompts is [1, 5, 6], a flat sequence of ids; expected one sequence a"),
        (np.array([1, 5]), {}, "prompts is [1, 5], a flat sequence of ids; expected one sequence"),
        ("text", {}, "prompts is 'text'; expected token ids, one sequence a row, such as"),
        (7, {}, "prompts is 7; expected token ids, one sequence a row"),
        (None, {}, "prompts is None; expected token ids, one sequence a row"),
        (["text"], {}, "prompt 0 is 'text'; expected a sequence of token ids"),
        ([[1], 5], {}, "prompt 1 is 5; expected a sequence of token ids"),
        ([[[1]]], {}, "prompt 0 has [1]; expected token ids from 0 to 52"),
        (np.array([[1.0]]), {}, "prompt 0 has 1.0; expected token ids from 0 to 52"),
        ([[True]], {}, "prompt 0 has True; expected token ids from 0 to 52"),
        (
            [[1], [1] * 32_768],
            {"max_new_tokens": 1},
            "prompt 1 has 32768 tokens, which with 1 new ones exceed the model's 32768 positions",
        ),
    ],
)
def test_requests_that_make_no_sense_are_refused(mistral, prompts, options, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        generate(*mistral, prompts, **options)
    assert str(refusal.value).startswith(message)
