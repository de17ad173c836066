"""Laws of the choice of a token: filters against a naive oracle, and draws against their odds."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.engine import logits as logits_module
from mistral_jax.engine.logits import choose, filter_logits, penalize
from mistral_jax.engine.sampling import RowSampling, Sampling

RNG = np.random.default_rng(0)


def rows_of(samplings, vocab_size=31, prompts=None, draws=None):
    """Stacks samplings; row i is draw i of its seed unless said otherwise."""
    draws = range(len(samplings)) if draws is None else draws
    prompts = [()] * len(samplings) if prompts is None else prompts
    return RowSampling.stack(samplings, draws, prompts, vocab_size)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def naive_filter(logits, sampling):
    """Filters one row in float64 by sorting, one definition after the other."""
    scaled = logits.astype(np.float64) / sampling.temperature
    kept = np.ones(len(scaled), bool)
    descending = np.sort(scaled)[::-1]
    if sampling.top_k:
        kept &= scaled >= descending[min(sampling.top_k, len(scaled)) - 1]
    probabilities = softmax(np.where(kept, scaled, -np.inf))
    before = np.array([probabilities[scaled > x].sum() for x in scaled])
    kept &= (before < sampling.top_p) | (before == 0)
    probabilities = softmax(np.where(kept, scaled, -np.inf))
    kept &= probabilities >= sampling.min_p * probabilities.max()
    return np.where(kept, scaled - scaled.max(), -np.inf)


def test_numbers_of_64_bits_do_not_change_what_a_seed_draws():
    samplings = [Sampling(1, top_k=k, top_p=p, seed=s) for k, p, s in ((0, 1, 3), (5, 0.9, 4))] * 20
    logits = RNG.normal(0, 2, (40, 31)).astype(np.float32)
    rows, positions = rows_of(samplings), np.arange(40, dtype=np.int32)
    drawn = np.asarray(choose(logits, rows, positions, None))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = np.asarray(choose(logits, rows, positions, None))
    assert len(set(drawn.tolist())) > 9
    np.testing.assert_array_equal(wide, drawn)


def test_filters_agree_with_sorting():
    samplings = [
        Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
        for t in (0.3, 1, 2.5)
        for k in (0, 1, 4, 31, 99)
        for p in (0, 0.2, 0.85, 1)
        for m in (0, 0.07, 1)
    ]
    logits = RNG.normal(0, 2, (len(samplings), 31)).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # many ties
    logits[::5, :7] = -np.inf
    filtered = jax.jit(filter_logits)(logits, rows_of(samplings))
    for row, sampling in enumerate(samplings):
        expected = naive_filter(logits[row], sampling)
        np.testing.assert_allclose(filtered[row], expected, rtol=1e-5, atol=1e-5)


def test_a_filter_that_no_row_asks_for_changes_nothing():
    logits = RNG.normal(0, 2, (2, 31)).astype(np.float32)
    filtered = filter_logits(logits, rows_of([Sampling(temperature=1, top_p=1)] * 2))
    np.testing.assert_array_equal(filtered, logits - logits.max(axis=1, keepdims=True))


def test_penalties_follow_their_definitions():
    logits = np.array([[2.0, -2.0, 1.0, -1.0, 0.5]], np.float32)
    counts = np.array([[3, 0, 0, 1, 0]], np.int32)
    sampling = Sampling(
        repetition_penalty=2,
        presence_penalty=0.25,
        frequency_penalty=0.125,
        logit_bias={0: 1.0, 4: -math.inf},
    )
    rows = rows_of([sampling], 5, prompts=[[1, 1]])
    expected = [
        (2 + 1) / 2 - 0.25 - 3 * 0.125,  # biased; then three times in the answer
        -2.0 * 2,  # in the prompt only: the other penalties do not see it
        1.0,
        -1.0 * 2 - 0.25 - 0.125,
        -math.inf,
    ]
    np.testing.assert_array_equal(penalize(logits, rows.penalties, counts)[0], expected)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=100, top_k=1),
        Sampling(temperature=100, top_p=0),
        Sampling(temperature=100, top_p=1, min_p=1),
        Sampling(temperature=1e-30, top_p=1),
        Sampling(temperature=1e-300, top_p=1),
    ],
)
def test_all_ways_to_take_the_likeliest(sampling):
    logits = RNG.normal(0, 2, (40, 31)).astype(np.float32)
    logits[:, 5] = -np.inf
    neighbour = Sampling(temperature=1)  # so that rows are drawn at all
    rows = rows_of([neighbour, *[sampling] * 39])
    chosen = jax.jit(choose)(logits, rows, jnp.arange(40), None)
    np.testing.assert_array_equal(chosen[1:], logits[1:].argmax(axis=1))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1, top_p=1),
        Sampling(0.8, top_k=9, top_p=0.9, min_p=0.02),
        Sampling(temperature=3, top_p=0.3),
        Sampling(temperature=3, top_p=1, min_p=0.6),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling):
    draws, vocab_size = 20_000, 31
    logits = RNG.normal(0, 1.5, vocab_size).astype(np.float32)
    odds = softmax(naive_filter(logits, sampling))
    batch = np.tile(logits, (draws, 1))
    chosen = jax.jit(choose)(batch, rows_of([sampling] * draws), jnp.full(draws, 7), None)
    along_a_text = jax.jit(choose)(
        batch, rows_of([sampling] * draws, draws=[0] * draws), jnp.arange(draws), None
    )
    for tokens in (chosen, along_a_text):
        counts = np.bincount(tokens, minlength=vocab_size)
        possible = odds > 0
        assert counts[~possible].sum() == 0
        # Pearson's statistic has mean f and variance 2 f at f degrees of freedom. Six deviations.
        expected = draws * odds[possible]
        statistic = ((counts[possible] - expected) ** 2 / expected).sum()
        freedom = possible.sum() - 1
        assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def test_a_draw_depends_on_seed_draw_and_position_alone():
    logits = np.zeros((6, 1000), np.float32)
    samplings = [Sampling(1, top_p=1, seed=seed) for seed in (3, 3, 3, 4, 3, 2**32 - 1)]
    draws, positions = [0, 0, 1, 0, 0, 0], jnp.array([5, 5, 5, 5, 6, 5])
    chosen = jax.jit(choose)(logits, rows_of(samplings, 1000, draws=draws), positions, None)
    assert chosen[0] == chosen[1]
    assert len(set(chosen.tolist())) == 5
    alone = jax.jit(choose)(
        logits[2:3], rows_of(samplings[2:3], 1000, draws=[1]), positions[2:3], None
    )
    assert alone[0] == chosen[2]


def test_a_row_that_is_drawn_again_depends_on_no_other():
    logits = RNG.normal(0, 1, (64, 1000)).astype(np.float32)
    samplings = [Sampling(temperature=2, top_p=p, seed=4) for p in np.linspace(0, 1, 64)]
    rows, positions = rows_of(samplings, 1000), jnp.arange(64)
    together = jax.jit(choose)(logits, rows, positions, None)
    for i in range(0, 64, 9):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], (logits, rows, positions))
        assert jax.jit(choose)(*one, None)[0] == together[i]


@pytest.mark.parametrize("size", [1, 2, 3, 31, 64, 1000, 8192])
def test_a_share_of_the_weights_is_found_where_their_sum_reaches_it(size):
    weights = RNG.exponential(1, (50, size)) * RNG.integers(0, 2, (50, size))
    weights[:, RNG.integers(size)] += 1
    numbers = RNG.random(50)
    find = jax.jit(logits_module._find)
    found = np.asarray(find(weights.astype(np.float32), numbers.astype(np.float32)))
    sums = np.cumsum(weights, axis=1)
    before = np.take_along_axis(sums - weights, found[:, None], axis=1)[:, 0]
    after = np.take_along_axis(sums, found[:, None], axis=1)[:, 0]
    assert np.all(before <= numbers * sums[:, -1] * (1 + 1e-5))
    assert np.all(after >= numbers * sums[:, -1] * (1 - 1e-5))


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24, 1.0])
def test_rounding_never_chooses_what_was_filtered_out(number):
    weights = np.zeros((1, 1000), np.float32)
    weights[0, 3:997:2] = RNG.exponential(1, 497)
    chosen = jax.jit(logits_module._find)(weights, np.float32([number]))
    assert chosen[0] == (3 if number == 0 else 995)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_end_no_later_than_others(strange):
    logits = np.full((3, 31), strange, np.float32)
    logits[1, 1:] = RNG.normal(size=30)
    logits[2, :-1] = RNG.normal(size=30)
    rows = rows_of([Sampling(temperature=1, top_p=0.5, min_p=0.5)] * 3)
    chosen = jax.jit(choose)(logits, rows, jnp.arange(3), None)
    assert np.all((chosen >= 0) & (chosen < 31))


def test_other_values_run_the_same_program():
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(choose, n=1))
    logits = RNG.normal(size=(2, 31)).astype(np.float32)
    for sampling in (Sampling(0), Sampling(), Sampling(2, 5, 1, 0.1, seed=9), Sampling(top_p=0.5)):
        counted(logits, rows_of([sampling, Sampling()]), jnp.array([1, 2]), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected a number from 0 to 100"),
        ({"temperature": math.nan}, "temperature is nan; expected a number from 0 to 100"),
        ({"temperature": math.inf}, "temperature is inf; expected a number from 0 to 100"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number from 0 to 100"),
        ({"temperature": True}, "temperature is True; expected a number"),
        ({"top_k": -1}, "top_k is -1; expected an integer from 0"),
        ({"top_k": 2.5}, "top_k is 2.5; expected an integer from 0"),
        ({"top_k": None}, "top_k is None; expected an integer from 0"),
        ({"top_p": -1}, "top_p is -1; expected a number from 0 to 1"),
        ({"top_p": 1.1}, "top_p is 1.1; expected a number from 0 to 1"),
        ({"top_p": math.nan}, "top_p is nan; expected a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p is -0.1; expected a number from 0 to 1"),
        ({"min_p": math.nan}, "min_p is nan; expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number from 0.01 to 100"),
        ({"presence_penalty": 3}, "presence_penalty is 3; expected a number from -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan; expected a number from -2"),
        ({"seed": -1}, "seed is -1; expected an integer from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296; expected an integer from 0 to 4294967295"),
        ({"seed": 0.5}, "seed is 0.5; expected an integer"),
        ({"logit_bias": [1]}, "logit_bias is [1]; expected a dict of id: number"),
        ({"logit_bias": {1: math.nan}}, "logit_bias has 1: nan; expected a token id and a number"),
        ({"logit_bias": {1: math.inf}}, "logit_bias has 1: inf; expected a token id and a number"),
        ({"logit_bias": {"a": 1}}, "logit_bias has 'a': 1; expected a token id and a number"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Sampling(**fields)
    assert str(refusal.value).startswith(message)


def test_numpy_numbers_are_numbers():
    Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(1))


def test_a_bias_on_a_token_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="logit_bias names token 31; expected 0 to 30"):
        rows_of([Sampling(logit_bias={31: 1})])


def test_top_k_keeps_what_ties_with_the_last_token_among_zeros_and_infinities_too():
    rows = np.array(
        [
            [0.0, -0.0, -1e-30, -2.5, -3e30, -np.inf],
            [0.0, -7.0, -7.0, -7.0, -8.0, -np.inf],
            [-np.inf] * 6,
            [0.0, -np.inf, -np.inf, -1.0, -1e38, -np.inf],
        ],
        np.float32,
    )
    keep = jax.jit(logits_module._keep_top_k)
    for top_k in range(8):
        least = np.sort(rows, axis=1)[:, -min(top_k or 6, 6)]
        expected = np.where(rows >= least[:, None], rows, -np.inf)
        np.testing.assert_array_equal(keep(rows, np.full(4, top_k, np.int32)), expected)
