"""The loss: right against float64, blind where nothing is to be learnt."""

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.training.loss import IGNORED, cross_entropy

LOGITS = jax.random.normal(jax.random.key(0), (2, 5, 11)) * 4
TARGETS = jnp.array([[3, 0, 10, IGNORED, 2], [IGNORED, 7, 7, 1, IGNORED]], jnp.int32)


def test_equals_a_float64_reference():
    logits = np.asarray(LOGITS, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -sum(
        np.log(probabilities[row, column, target])
        for (row, column), target in np.ndenumerate(TARGETS)
        if target != IGNORED
    )
    total, count = cross_entropy(LOGITS, TARGETS)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert count == 7


def test_ignored_places_have_no_say_and_no_gradient():
    places = (TARGETS == IGNORED)[..., None]
    other = jnp.where(places, 100 * LOGITS[:, ::-1], LOGITS)
    assert cross_entropy(other, TARGETS)[0] == cross_entropy(LOGITS, TARGETS)[0]
    gradient = jax.grad(lambda logits: cross_entropy(logits, TARGETS)[0])(LOGITS)
    assert bool(jnp.all(jnp.where(places, gradient, 0) == 0))
    assert bool(jnp.all(jnp.any(gradient != 0, axis=-1) == ~places[..., 0]))


def test_nothing_to_learn_is_zero_of_zero():
    total, count = cross_entropy(LOGITS, jnp.full((2, 5), IGNORED, jnp.int32))
    assert (total, count) == (0, 0)


def test_sums_add_up_over_rows():
    halves = [cross_entropy(LOGITS[i : i + 1], TARGETS[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS), np.sum(halves, axis=0), rtol=1e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    total, _ = cross_entropy(logits, jnp.array([[1]], jnp.int32))
    assert total == 2e4
