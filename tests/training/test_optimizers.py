"""Optimizers by name, and their rates: what decays, what is refused, how a rate rises and falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.training import optimizers
from mistral_jax.training.optimizers import make_optimizer, make_schedule, parameters_of

PARAMS = {"attn": {"kernel": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones(3)}}
RATES = {"warmup_steps": 2, "learning_rate": 0.01, "final_learning_rate": 0.001}


def updated(optimizer, gradient=0.0, params=PARAMS):
    grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        return jax.tree.map(jnp.add, params, updates)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "adafactor", "sgd", "rmsprop", "lamb"])
def test_optimizers_of_optax_go_against_the_gradient(name):
    for leaf in jax.tree.leaves(updated(make_optimizer(name, 1e-2, clip_norm=1.0), 0.5)):
        assert jnp.all(leaf < 1)


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb"])
def test_only_matrices_decay_stacked_or_not(name):
    stacked = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    for params in (PARAMS, stacked):
        new = updated(make_optimizer(name, 1e-2, weight_decay=0.5), params=params)
        assert jnp.all(new["attn"]["kernel"] < 1)
        np.testing.assert_array_equal(new["norm"]["scale"], 1)


def test_gradients_are_clipped_by_their_global_norm():
    gradient = 3.0
    norm = gradient * np.sqrt(9)
    clipped = updated(make_optimizer("sgd", 1.0, clip_norm=0.5), gradient)
    np.testing.assert_allclose(clipped["norm"]["scale"], 1 - gradient * 0.5 / norm, rtol=1e-6)
    whole = updated(make_optimizer("sgd", 1.0), gradient)
    np.testing.assert_allclose(whole["norm"]["scale"], 1 - gradient, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [0, 0.005, 0.01, 0.0055, 0.001, 0.001]),
        ("linear", [0, 0.005, 0.01, 0.0055, 0.001, 0.001]),
        ("constant", [0, 0.005, 0.01, 0.01, 0.01, 0.01]),
    ],
)
def test_a_rate_rises_and_then_goes_as_its_name_says(name, expected):
    schedule = make_schedule(name, 102, **RATES)
    rates = [float(schedule(step)) for step in (0, 1, 2, 52, 102, 110)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_a_rate_without_a_rise_begins_at_its_peak():
    for name in ("cosine", "linear", "constant"):
        assert make_schedule(name, 9, **RATES | {"warmup_steps": 0})(0) == pytest.approx(0.01)


@pytest.mark.parametrize("name", optimizers._optimizers())
def test_every_optimizer_takes_a_schedule_without_a_warning(name):
    optimizers.check_optimizer(name, {"clip_norm": 1.0})


def test_refuses_what_optax_has_not():
    with pytest.raises(ValueError, match=r"no optimizer 'adamv'.*the nearest is 'adam'"):
        make_optimizer("adamv", 1e-3)
    with pytest.raises(ValueError, match="sgd has no option 'momentun'; the nearest is 'momentum'"):
        make_optimizer("sgd", 1e-3, momentun=0.9)
    for name in ("lbfgs", "chain", "scale_by_adam", "sm3", "rprop", "noisy_sgd"):
        with pytest.raises(ValueError, match="no optimizer"):
            parameters_of(name)
