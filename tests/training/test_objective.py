"""The objectives: weights weigh, dropout is drawn from the key, DPO is the paper's equation 7."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.checkpoint.lora import Lora, attach, init_adapters
from mistral_jax.training.loss import (
    IGNORED,
    everything,
    make_loss_fn,
    make_preference_loss_fn,
    preference,
)
from mistral_jax.training.step import Batch

MODEL, PARAMS = tiny.build()
LORA = Lora(rank=3)
PAIRS = [([1, 5, 9, 2], [1, 5, 7, 7, 8, 2]), ([1, 3, 2], [1, 4, 6, 2])]


def pair_batch(pairs, rows=None, length=8):
    """Lays pairs out as a batch [B, 2, T]; all but a first token is an answer."""
    tokens = np.zeros((rows or len(pairs), 2, length), np.int32)
    positions, targets = np.full_like(tokens, -1), np.full_like(tokens, IGNORED)
    for row, pair in enumerate(pairs):
        for side, ids in enumerate(pair):
            count = len(ids) - 1
            tokens[row, side, :count] = ids[:-1]
            positions[row, side, :count] = range(count)
            targets[row, side, :count] = ids[1:]
    return Batch(tokens, positions, targets)


def random_adapters():
    @jax.jit
    def draw(key):
        adapters = init_adapters(LORA, PARAMS, key)
        return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), adapters)

    return draw(jax.random.key(3))


def beside(trainable, frozen):
    return attach(frozen, trainable, LORA.scale)


def logprob(params, ids):
    logits = tiny.alone(MODEL, params, ids[:-1])
    return np.asarray(jax.nn.log_softmax(logits))[range(len(ids) - 1), ids[1:]].sum()


def preference_loss(beta=0.5, label_smoothing=0.0):
    return jax.jit(make_preference_loss_fn(MODEL, beside, beta, label_smoothing))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_is_equation_7_over_pairs(label_smoothing):
    adapters = random_adapters()
    policy = beside(adapters, PARAMS)
    expected, margins = [], []
    for chosen, rejected in PAIRS:
        better, worse = (logprob(policy, x) - logprob(PARAMS, x) for x in (chosen, rejected))
        margin = 0.5 * (better - worse)
        right, wrong = -np.logaddexp(0, -margin), -np.logaddexp(0, margin)
        expected.append(-(1 - label_smoothing) * right - label_smoothing * wrong)
        margins.append(margin)
    batch = pair_batch(PAIRS, rows=3)  # and one pair of padding
    loss, sums = preference_loss(0.5, label_smoothing)(adapters, PARAMS, batch, None)
    np.testing.assert_allclose(loss, sum(expected), rtol=1e-4)
    np.testing.assert_allclose(sums["margin"], sum(margins), rtol=1e-3)
    assert sums["targets"] == 2
    assert float(sums["accuracy"]) == sum(margin > 0 for margin in margins)


def test_dpo_begins_at_log_two_and_moves_adapters():
    """A new adapter is the reference: no pair is preferred yet."""
    adapters = init_adapters(LORA, PARAMS, jax.random.key(0))
    batch = pair_batch(PAIRS)
    loss, sums = preference_loss()(adapters, PARAMS, batch, None)
    np.testing.assert_allclose(loss, 2 * np.log(2), rtol=1e-6)
    assert sums["accuracy"] == sums["margin"] == 0
    grads = jax.grad(lambda adapters: preference_loss()(adapters, PARAMS, batch, None)[0])(adapters)
    assert any(leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_dpo_does_not_differentiate_its_reference():
    rewards = jax.grad(lambda model: preference(model, jnp.zeros((1, 2)), 0.1)[0].sum())
    np.testing.assert_allclose(rewards(jnp.zeros((1, 2))), [[-0.05, 0.05]], rtol=1e-6)
    # With everything trained and the reference a copy, the gradient is that of the policy alone.
    loss_fn = make_preference_loss_fn(MODEL, everything, 0.1)
    grads = jax.grad(lambda p: loss_fn(p, p, pair_batch(PAIRS), None)[0])(PARAMS)
    assert any(jnp.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads))


def test_a_weight_of_two_is_the_target_twice():
    loss_fn = jax.jit(make_loss_fn(MODEL))
    tokens, positions = tiny.ragged([[1, 5, 9, 3, 7]])
    targets = np.array([[5, IGNORED, 3, 7, 2]], np.int32)
    weights = np.array([[1.0, 5.0, 0.0, 2.0, 0.5]], np.float32)
    loss, sums = loss_fn(PARAMS, {}, Batch(tokens, positions, targets, weights), None)
    logprobs = jax.nn.log_softmax(tiny.alone(MODEL, PARAMS, [1, 5, 9, 3, 7]))
    expected = -(logprobs[0, 5] + 2 * logprobs[3, 7] + 0.5 * logprobs[4, 2])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert sums["targets"] == 3.5
    alike = Batch(tokens, positions, targets, np.ones_like(weights))
    chex.assert_trees_all_equal(
        loss_fn(PARAMS, {}, alike, None), loss_fn(PARAMS, {}, alike.replace(weights=None), None)
    )


def test_dropout_is_drawn_from_the_key():
    loss_fn = jax.jit(make_loss_fn(MODEL.clone(dropout=0.5), beside))
    tokens, positions = tiny.ragged([[1, 5, 9, 3, 7]])
    batch = Batch(tokens, positions, tokens)
    adapters = random_adapters()
    first, again, other, whole = (
        float(loss_fn(adapters, PARAMS, batch, key)[0])
        for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2), None)
    )
    assert first == again
    assert len({first, other, whole}) == 3
