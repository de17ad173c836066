"""Any number of prompts run in a bounded number of slots, and pay for their own tokens alone."""

import jax
import numpy as np
import pytest
import tiny

from mistral_jax.engine import generate as generation
from mistral_jax.engine import prefill
from mistral_jax.engine.generate import generate
from mistral_jax.engine.sampling import Sampling
from mistral_jax.ops.backend import PLAIN

WARM = Sampling(temperature=1, top_p=0.98, seed=5)
# Logits near 1 through two layers, in float32.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def mistral():
    return tiny.build(sliding_window=[5, None])


@pytest.fixture
def few_slots(monkeypatch):
    monkeypatch.setattr(generation, "MOST_SLOTS", 3)
    monkeypatch.setattr(generation, "FEWEST_SLOTS", 3)
    monkeypatch.setattr(prefill, "CHUNK", 32)


@pytest.fixture
def places(monkeypatch):
    """Places of all chunks that are read: rows and widths."""
    seen, read = [], prefill.read_chunk

    def looked_at(model, params, tokens, *rest):
        seen.append(tokens.shape)
        return read(model, params, tokens, *rest)

    monkeypatch.setattr(prefill, "read_chunk", looked_at)
    return seen


def prompts_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(53, size=length).tolist() for length in lengths]


def test_many_prompts_get_what_each_would_alone(mistral, few_slots):
    prompts = prompts_of([3, 40, 7, 100, 1, 9, 40, 2, 5, 10])
    samplings = [Sampling(1, seed=i) if i % 3 else Sampling(0) for i in range(len(prompts))]
    heard = [[] for _ in prompts]

    def until(row, token):
        heard[row].append(token)
        return row == 5 and len(heard[5]) == 2

    options = {"stop_ids": range(5), "top_logprobs": 2}
    rows = generate(*mistral, prompts, 12, sampling=samplings, until=until, **options)
    assert heard == [row.tokens for row in rows]
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    for i, (prompt, sampling, row) in enumerate(zip(prompts, samplings, rows, strict=True)):
        alone = generate(*mistral, [prompt], 12, sampling=[sampling], **options)[0]
        count = 2 if i == 5 else len(alone.tokens)
        assert row.tokens == alone.tokens[:count]
        np.testing.assert_allclose(row.logprobs, alone.logprobs[:count], **CLOSE)


def test_rows_that_share_a_sampling_draw_by_their_numbers(mistral, few_slots):
    prompts = prompts_of([4] * 8)
    rows = generate(*mistral, prompts, 9, sampling=WARM, stop_ids=())
    again = generate(*mistral, [prompts[7]] * 8, 9, sampling=WARM, stop_ids=())
    assert again[7].tokens == rows[7].tokens
    assert len({tuple(row.tokens) for row in again}) == 8


def test_memory_does_not_grow_with_the_number_of_prompts(mistral, few_slots):
    config, peak = mistral[0].config, 0

    def held():
        return sum(x.nbytes for x in jax.live_arrays() if x.ndim == 4)

    def until(*_):
        nonlocal peak
        peak = max(peak, held() - before)
        return False

    before = held()
    prompts = prompts_of([3, 9, 30, 5, 14, 80] * 7)
    generate(*mistral, prompts, 4, sampling=WARM, stop_ids=(), until=until)
    a_slot = 2 * config.num_kv_heads * config.head_dim * 4 * (256 + 5)
    # Slots come in fours; those of prompts that are being read may hold 2,048 tokens in all.
    assert 4 * a_slot <= peak <= (4 + 2048 // 256) * a_slot


def test_a_long_prompt_costs_short_ones_nothing(mistral, places):
    prompts = prompts_of([2100, *[10] * 7])
    generate(*mistral, prompts, 2, sampling=WARM, stop_ids=())
    assert sum(rows * width for rows, width in places) <= 2 * 2100 + 8 * 16
    # And the short ones are read in one pass over the weights.
    assert [shape for shape in places if shape[0] > 1] == [(8, 16)]


def test_places_grow_with_tokens_whatever_the_lengths(mistral, places, monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK", 32)
    for seed in range(3):
        lengths = np.random.default_rng(seed).choice([1, 9, 17, 40, 90, 200], 12).tolist()
        places.clear()
        generate(*mistral, prompts_of(lengths), 1, sampling=WARM, stop_ids=())
        # At most half are padding to the longest of a group, and of a chunk to its width; and at
        # most half of the rows are empty.
        assert sum(rows * width for rows, width in places) <= 8 * sum(max(8, n) for n in lengths)


def test_a_prompt_of_many_samples_is_read_once(mistral, places):
    (prompt,) = prompts_of([20])
    rows = generate(*mistral, [prompt] * 5, 8, sampling=WARM, stop_ids=())
    assert places == [(1, 16), (1, 16)]
    alone = generate(*mistral, [prompt], 8, sampling=WARM, stop_ids=())
    assert rows[0].tokens == alone[0].tokens


@pytest.mark.parametrize("kept", [None, "int8"])
def test_a_row_that_failed_leaves_nothing_to_the_next_in_its_slot(few_slots, monkeypatch, kept):
    """A key that nobody sees has the weight 0, but 0 times NaN is NaN."""
    monkeypatch.setattr(generation, "MOST_SLOTS", 1)
    monkeypatch.setattr(generation, "FEWEST_SLOTS", 1)
    model, params = tiny.build(sliding_window=None)
    model = model.clone(kv_cache_dtype=kept, backend=PLAIN)
    table = params["embed"]["embedding"].at[7].set(np.nan)
    params = params | {"embed": {"embedding": table}}
    sound, options = [1, 5, 9], {"sampling": [WARM] * 2, "stop_ids": ()}
    (alone, _) = generate(model, params, [sound, [2]], 8, **options)
    first, second = generate(model, params, [[7] * 300, sound], 8, **options)
    assert (first.finish_reason, second) == ("error", alone)
