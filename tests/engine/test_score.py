"""Rows of token ids of any lengths are scored as each is alone, by the full pass."""

import jax
import numpy as np
import pytest
import tiny

from mistral_jax.engine import prefill, score
from mistral_jax.engine.generate import generate
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.score import likelihoods
from mistral_jax.parallel.sharding import abstract_params, read_layout

# Of float32 sums in another order; see test_generate.
TOLERANCE = 1e-5
LENGTHS = [17, 1, 40, 3, 16]


@pytest.fixture(scope="module")
def mistral():
    return tiny.build(
        sliding_window=[5, None],
        dilation=[3, 1],
        n_heads=8,
        n_kv_heads=2,
        hidden_dim=48,
        vocab_size=56,
    )


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [rng.integers(56, size=length).tolist() for length in LENGTHS]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK", 16)


@pytest.fixture(scope="module")
def expected(mistral, rows):
    """The log-probabilities [T, V] of a full pass over each row, without its last place."""
    logits = tiny.forward(*mistral, *tiny.ragged(rows))[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    return [own[: len(row) - 1] for own, row in zip(logprobs, rows, strict=True)]


def assert_likelihoods(rows, expected, found):
    assert len(found) == len(rows)
    for row, own, (logprobs, greedy) in zip(rows, expected, found, strict=True):
        assert logprobs.shape == greedy.shape == (len(row) - 1,)
        chosen = own[range(len(row) - 1), row[1:]]
        np.testing.assert_allclose(logprobs, chosen, rtol=0, atol=TOLERANCE)
        # Two tokens may be as likely, to rounding.
        gap = own.max(axis=-1, initial=-np.inf) - chosen
        assert not greedy[gap > 2 * TOLERANCE].any()
        assert greedy[gap == 0].all()


@pytest.mark.parametrize("batch", [2, 20])
def test_rows_are_scored_as_by_the_full_pass(mistral, rows, expected, batch):
    assert_likelihoods(rows, expected, likelihoods(*mistral, rows, batch))


def test_the_models_own_choices_are_greedy(mistral):
    own = generate(*mistral, [[7]], 8, sampling=Sampling(0), stop_ids=())[0].tokens
    rows = [7, *own], [7, *own[:-1], (own[-1] + 1) % 56]
    found = likelihoods(*mistral, rows, 2)
    assert found[0].greedy.tolist() == [True] * 8
    assert found[1].greedy.tolist() == [True] * 7 + [False]


@pytest.mark.parametrize("name", ["tensor", "data_tensor"])
def test_layouts_find_the_same(mistral, rows, expected, name):
    """Also where rows, or tokens of the vocabulary, are of different devices."""
    model, params = mistral
    layout = read_layout(name, model.config)
    places = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout))
    laid = model.clone(rules=layout.rules), jax.device_put(params, places)
    assert_likelihoods(rows, expected, likelihoods(*laid, rows, 3))


def test_a_long_row_costs_short_ones_nothing(mistral, monkeypatch):
    seen, score_chunk = [], score._score_chunk

    def looked_at(model, params, tokens, *rest):
        seen.append(tokens.shape)
        return score_chunk(model, params, tokens, *rest)

    monkeypatch.setattr(score, "_score_chunk", looked_at)
    rows = [[7] * 161, *[[7] * 11] * 7]
    together = likelihoods(*mistral, rows, 8)
    assert sum(count * width for count, width in seen) <= 160 + 8 * 16
    for row, own in zip(rows, together, strict=True):
        np.testing.assert_allclose(
            own.logprobs, likelihoods(*mistral, [row], 1)[0].logprobs, rtol=0, atol=TOLERANCE
        )


def test_few_programs_serve_rows_of_all_lengths():
    """With windows alone, one for each width of a chunk."""
    model, params = tiny.build(sliding_window=4, n_layers=1)
    before = score._score_chunk._cache_size()
    for length in (20, 35, 70, 129, 300, 700):
        likelihoods(model, params, [[1] * length, [2] * (length // 2)], 2)
    assert score._score_chunk._cache_size() - before == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_whose_logits_are_not_finite_has_no_score(mistral, value):
    model, params = mistral
    table = params["embed"]["embedding"].at[7].set(value)
    params = params | {"embed": {"embedding": table}}
    assert np.isfinite(likelihoods(model, params, [[1, 2], [1, 2, 7]], 2)[1].logprobs).all()
    # Within a chunk an unseen value of NaN counts as 0 * NaN, so earlier tokens have none, either.
    message = "token 1 of row 1 has a log-probability of nan: the model's logits are not finite"
    with pytest.raises(ValueError, match=message):
        likelihoods(model, params, [[1, 2], [1, 2, 7, 3]], 2)


def test_progress_counts_tokens_up_to_all(mistral, rows):
    seen = []
    likelihoods(*mistral, rows, 2, lambda done, total: seen.append((done, total)))
    total = sum(LENGTHS) - len(LENGTHS)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {all_ for _, all_ in seen} == {total}
    assert seen[-1] == (total, total)
    assert len(seen) > len(LENGTHS) / 2  # chunk by chunk


def test_what_cannot_be_scored_is_refused(mistral):
    assert likelihoods(*mistral, [], 1) == []
    with pytest.raises(ValueError, match="a row of token ids is empty"):
        likelihoods(*mistral, [[1, 2], []], 1)
    with pytest.raises(ValueError, match="batch is 0; expected at least 1"):
        likelihoods(*mistral, [[1, 2]], 0)
