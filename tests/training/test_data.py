"""The data: every batch a pure function of the step; an epoch reads everything once."""

import chex
import numpy as np
import pytest

from mistral_jax.training.data import batches as data
from mistral_jax.training.data import corpus, vocabulary

CONTEXT, ROWS = 8, 3
SHAPE = {"context": CONTEXT, "rows": ROWS}
TOKENS = np.arange(203, dtype=np.uint16)  # token i stands at place i
WINDOWS = 24  # whole windows that every offset leaves room for


class Letters:
    """A tokenizer with one id a character."""

    vocab_size = 128

    def encode(self, text, bos, eos):
        return [1] * bos + [ord(character) for character in text] + [2] * eos


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    first = [data.window_batch(step, TOKENS, **SHAPE, seed=5) for step in range(12)]
    again = [data.window_batch(step, TOKENS, **SHAPE, seed=5) for step in reversed(range(12))]
    chex.assert_trees_all_equal(first, again[::-1])
    other = data.window_batch(0, TOKENS, **SHAPE, seed=6)
    assert not np.array_equal(other.tokens, first[0].tokens)


def test_targets_are_the_tokens_that_follow():
    batch = data.window_batch(4, TOKENS, **SHAPE, seed=0)
    np.testing.assert_array_equal(batch.targets, batch.tokens + 1)  # as TOKENS[i] == i
    np.testing.assert_array_equal(batch.positions, [range(CONTEXT)] * ROWS)
    chex.assert_type([batch.tokens, batch.positions, batch.targets], np.int32)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_reads_every_window_once_and_its_own_way(epoch):
    steps = range(epoch * WINDOWS // ROWS, (epoch + 1) * WINDOWS // ROWS)
    starts = [
        int(start)
        for step in steps
        for start in data.window_batch(step, TOKENS, **SHAPE, seed=0).tokens[:, 0]
    ]
    offset = min(starts)
    assert sorted(starts) == [offset + CONTEXT * window for window in range(WINDOWS)]
    assert 0 <= offset < CONTEXT
    assert starts != sorted(starts)
    earlier = data.window_batch(0, TOKENS, **SHAPE, seed=0).tokens[:, 0].tolist()
    assert (starts[:ROWS] == earlier) == (epoch == 0)


def test_steps_may_straddle_epochs():
    rows = 5  # does not divide the windows of an epoch
    starts = np.concatenate(
        [
            data.window_batch(s, TOKENS, context=CONTEXT, rows=rows, seed=0).tokens[:, 0]
            for s in range(5)
        ]
    )
    by_three = np.concatenate(
        [data.window_batch(s, TOKENS, **SHAPE, seed=0).tokens[:, 0] for s in range(9)]
    )
    np.testing.assert_array_equal(starts, by_three[:25])


@pytest.mark.parametrize("length", [0, 1, 2 * CONTEXT])
def test_too_short_a_text_is_refused(length):
    with pytest.raises(ValueError, match=rf"{length} tokens; expected at least {2 * CONTEXT + 1}"):
        data.window_batch(0, TOKENS[:length], **SHAPE, seed=0)


def test_the_shortest_text_is_read_wherever_its_window_begins():
    for seed in range(20):
        data.window_batch(0, TOKENS[: 2 * CONTEXT + 1], **SHAPE, seed=seed)


def test_validation_reads_every_window_once_in_order():
    batches = list(data.windows_in_order(TOKENS[:50], context=CONTEXT, rows=4))
    np.testing.assert_array_equal(np.concatenate([b.tokens.ravel() for b in batches]), range(48))
    np.testing.assert_array_equal(
        np.concatenate([b.targets.ravel() for b in batches]), range(1, 49)
    )


def test_documents_stand_between_bos_and_eos():
    tokens = vocabulary.tokenize(["ab", "", "c"], Letters())
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [1, 97, 98, 2, 1, 2, 1, 99, 2]
    assert vocabulary.tokenize([], Letters()).size == 0


def test_the_split_goes_by_name_alone():
    documents = {f"file{i}.py": str(i) for i in range(4000)}
    train, validation = corpus.split("package", documents)
    assert sorted(train + validation, key=int) == list(documents.values())
    assert 5 <= len(validation) <= 50  # one in 200
    fewer = dict(list(documents.items())[::2])
    assert set(corpus.split("package", fewer)[1]) == set(validation) & set(fewer.values())
