"""Rows of token ids of any lengths are scored as each is alone, by the full pass."""

import jax
import numpy as np
import pytest
import tiny

from mistral_jax.engine import batches, prefill, score, shared
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


def rows_in_common(rng):
    """Questions of two tasks with examples of their own, and choices of one token and of several.

    Returns rows, and the number of tokens before the choice of each.
    """
    rows, given = [], []

    def tokens(count):
        return rng.integers(56, size=count).tolist()

    for examples in (tokens(40), tokens(21)):
        for length in (3, 25, 30, 17):
            question = examples + tokens(length)
            for choice in ([5], [6], [7, 8], [7, 8, 9, *tokens(20)], [7, 8, 9, *tokens(3)]):
                rows.append(question + choice)
                given.append(len(question))
    rows += [rows[0], rows[0][:-1], rows[0][:20], tokens(4), [3], [3, 4]]
    given += [given[0], 1, 20, 4, 1, 1]
    return rows, given


@pytest.mark.parametrize(
    ("window", "batch", "pooled"), [(5, 8, 4096), (24, 1, 1), (128, 2, 300), (None, 3, 4096)]
)
def test_rows_that_share_prefixes_are_scored_as_alone(window, batch, pooled, monkeypatch):
    """A window may be shorter than the examples or longer than all rows, and a chunk longer."""
    monkeypatch.setattr(batches, "_POOLED", pooled)
    model, params = tiny.build(sliding_window=window, vocab_size=56, n_layers=1)
    rows, given = rows_in_common(np.random.default_rng(1))
    found = likelihoods(model, params, rows, batch, given=given)
    for row, count, own in zip(rows, given, found, strict=True):
        (alone,) = likelihoods(model, params, [row], 1)
        assert own.logprobs.shape == own.greedy.shape == (len(row) - count,)
        expected = alone.logprobs[count - 1 :]
        np.testing.assert_allclose(own.logprobs, expected, rtol=0, atol=TOLERANCE)
        assert own.greedy.tolist() == alone.greedy[count - 1 :].tolist()


def test_layouts_share_prefixes_too(mistral):
    model, params = mistral
    rows, given = (own[:10] for own in rows_in_common(np.random.default_rng(2)))
    expected = likelihoods(model, params, rows, 3, given=given)
    layout = read_layout("data_tensor", model.config)
    places = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout))
    laid = model.clone(rules=layout.rules), jax.device_put(params, places)
    for own, other in zip(expected, likelihoods(*laid, rows, 3, given=given), strict=True):
        np.testing.assert_allclose(own.logprobs, other.logprobs, rtol=0, atol=TOLERANCE)


def test_common_tokens_are_read_once(mistral):
    """Examples once a task, a question once, and no token for a choice of one token."""
    examples, seen = list(range(40)), []
    questions = [examples + [40 + i] * 16 for i in range(10)]
    rows = [[*question, choice] for question in questions for choice in (1, 2, 3, 4)]
    found = likelihoods(*mistral, rows, 4, lambda *done: seen.append(done), [56] * len(rows))
    assert seen[-1] == (40 + 10 * 16, 40 + 10 * 16)
    assert {own.logprobs.shape for own in found} == {(1,)}
    assert sum(own.greedy[0] for own in found) <= 10
    seen.clear()
    rows = [question + [choice] * 9 for question in questions for choice in (1, 2, 3, 4)]
    likelihoods(*mistral, rows, 4, lambda *done: seen.append(done), [56] * len(rows))
    assert seen[-1][1] == 40 + 10 * 16 + 40 * 8


def test_texts_that_grow_do_not_keep_many_caches(mistral):
    """As the turns of a conversation do; only the ancestors of a segment are in memory."""
    rows = [[7] * length for length in range(1, 150, 17)]

    def depth(segment):
        return 1 + max(map(depth, segment.children), default=0)

    roots = shared.plan(rows, [1] * len(rows))
    assert max(map(depth, roots)) == shared.MOST_DEPTH
    found = likelihoods(*mistral, rows, 4)
    (longest,) = likelihoods(*mistral, rows[-1:], 1)
    for row, own in zip(rows, found, strict=True):
        expected = longest.logprobs[: len(row) - 1]
        np.testing.assert_allclose(own.logprobs, expected, rtol=0, atol=TOLERANCE)


def test_rows_are_yielded_as_soon_as_they_are_done(mistral):
    """So that a caller can keep what is done when a later row fails."""
    rows = [[1, 2, 3], [4] * 100, [5, 6] * 20]
    found = score.each_likelihood(*mistral, rows, 1)
    assert next(found)[0] == 1
    assert sorted(row for row, _ in found) == [0, 2]


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
    with pytest.raises(ValueError, match="3 tokens of row 1 are given; expected at least 1"):
        likelihoods(*mistral, [[1], [1, 2]], 1, given=[1, 3])
