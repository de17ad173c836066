"""Rows of a running state are inserted, extracted and erased; others stay as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.engine import decode, prefill, slots
from mistral_jax.engine.sampling import DEFAULT, RowSampling, Sampling

WARM = Sampling(1, top_p=0.98, seed=5, repetition_penalty=1.1)
PROMPTS = [[1, *range(10, 40)], [1, 7, 9]]
LENGTH = 256


@pytest.fixture(scope="module")
def mistral():
    return tiny.build(sliding_window=[5, None])


def read(model, params):
    """Returns the cache and logits of the prompts."""
    return prefill.prefill(model, params, PROMPTS, 40)


def fields(model, row, left=20, sampling=WARM):
    rows = RowSampling.stack([sampling], [0], [PROMPTS[row]], model.config.vocab_size)
    args = [len(PROMPTS[row])], [left], rows, [(2, 3)], [True], model.config.vocab_size
    return decode.start((), *args)


def put(model, state, slot, row, read, **options):
    new = fields(model, row, **options)
    return slots.insert(model, state, np.int32(slot), new, *read, np.int32(row))


def run(model, params, state, steps):
    return decode.decode(model, params, state, np.int32(steps), np.zeros(len(state.left), bool))


def of_row(state, slot):
    return jax.tree.map(lambda x: np.asarray(x[slot]), state)


def copied(state):
    return jax.tree.map(jnp.copy, state)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def running(mistral):
    """A state with the second prompt's row in slot 1 of 3, after some steps."""
    model, params = mistral
    state = slots.empty_state(model, params, 3, LENGTH)
    state, _ = put(model, state, 1, 1, read(model, params))
    return run(model, params, state, 4)[0]


def test_insert_and_erase_leave_other_slots_as_they_are(mistral, running):
    model, params = mistral
    before = [of_row(running, slot) for slot in range(3)]
    state, made = put(model, copied(running), 2, 0, read(model, params))
    assert made.tokens.shape == (1, 1)
    for slot in (0, 1):
        assert_equal(of_row(state, slot), before[slot])
    erased = slots.erase(model, state, np.array([False, False, True]))
    for slot in (0, 1):
        assert_equal(of_row(erased, slot), before[slot])
    assert erased.left[2] == 0
    assert all((layer.positions[2] == -1).all() for layer in erased.cache)


def test_extract_copies_a_row(mistral, running):
    model, _ = mistral
    found = slots.extract(model, running, np.int32(1))
    assert_equal(jax.tree.map(lambda x: np.asarray(x[0]), found), of_row(running.cache, 1))


def test_a_row_makes_the_same_whatever_its_neighbours_do(mistral, running):
    model, params = mistral
    alone, made_alone = run(model, params, copied(running), 9)
    state, _ = put(model, copied(running), 0, 0, read(model, params))
    beside, made_beside = run(model, params, state, 9)
    assert_equal(of_row(alone, 1), of_row(beside, 1))
    assert_equal(of_row(made_alone, 1), of_row(made_beside, 1))
    assert (np.asarray(made_beside.tokens)[0, :9] >= 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_first_rows_may_go_on_alone(mistral, dtype):
    model, params = mistral[0].clone(dtype=dtype), mistral[1]
    both, size = read(model, params), np.int32(9)
    states = []
    for count in (None, 2):
        state = slots.empty_state(model, params, 3, LENGTH)
        state, _ = put(model, state, 1, 1, both)
        before = of_row(state, 2)
        state, made = decode.decode(model, params, state, size, np.zeros(3, bool), count)
        assert made.tokens.shape[0] == (count or 3)
        if count:
            assert_equal(of_row(state, 2), before)
        states.append(state)
    whole, part = (of_row(state, 1) for state in states)
    assert_equal(whole.counts, part.counts)
    assert whole.tokens == part.tokens


def test_a_slot_that_was_used_needs_no_clearing(mistral):
    """The row before has gone through laps of the ring, and past where the new one will come."""
    model, params = mistral
    both = read(model, params)
    fresh, first = put(model, slots.empty_state(model, params, 2, LENGTH), 0, 1, both)
    used, _ = put(model, slots.empty_state(model, params, 2, LENGTH), 0, 0, both, left=100)
    for _ in range(2):
        used, _ = run(model, params, used, 30)
    stale = of_row(used.cache, 0)[1]
    used, second = put(model, used, 0, 1, both)
    assert_equal(jax.device_get(first), jax.device_get(second))
    assert (np.asarray(used.cache[1].k)[0, 70] == stale.k[70]).all()  # Nothing was cleared.
    for _ in range(2):
        fresh, first = run(model, params, fresh, 9)
        used, second = run(model, params, used, 9)
        assert_equal(of_row(first, 0), of_row(second, 0))


def test_the_loop_stops_where_a_row_ends_that_is_watched(mistral, running):
    model, params = mistral
    state, _ = put(model, copied(running), 0, 0, read(model, params), left=3)
    for watched, steps in (([False, True, False], 4), ([True, True, False], 2)):
        _, made = decode.decode(model, params, copied(state), np.int32(4), np.array(watched))
        assert np.asarray(made.tokens >= 0).sum(axis=1).tolist() == [2, steps, 0]
    # One that has ended before stops it at once.
    _, made = decode.decode(model, params, state, np.int32(4), np.array([True, True, True]))
    assert (np.asarray(made.tokens) == -1).all()


def test_any_number_of_tokens_may_end_a_row(mistral):
    model, params = mistral
    size = model.config.vocab_size
    both = read(model, params)
    state = slots.empty_state(model, params, 1, LENGTH)
    programs = slots.insert._cache_size()
    for count in (0, 9, size):
        rows = RowSampling.stack([DEFAULT], [0], [PROMPTS[0]], size)
        new = decode.start((), [31], [5], rows, [range(count)], [False], size)
        state, made = slots.insert(model, state, np.int32(0), new, *both, np.int32(0))
    assert slots.insert._cache_size() <= programs + 1
    assert made.left.tolist() == [0]
