"""The training step: accumulation is exact, only what is trainable moves, AdamW is AdamW."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.parallel.sharding import read_layout
from mistral_jax.training.data import batches
from mistral_jax.training.loss import IGNORED, make_loss_fn
from mistral_jax.training.optimizers import make_optimizer
from mistral_jax.training.states import create_state
from mistral_jax.training.step import Batch, make_train_step

MODEL, PARAMS = tiny.build()
TARGET = np.array([[0.0, 1.0], [1.0, 3.0]], np.float32)
VALUES = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}


loss_fn = make_loss_fn(MODEL, lambda trainable, frozen: trainable | frozen)


def quadratic(trainable, frozen, batch, key):
    return 0.5 * jnp.sum((trainable["w"] - TARGET) ** 2), {"targets": jnp.float32(1)}


def some_batch(rows=4, length=12, seed=0):
    ids = np.random.default_rng(seed).integers(0, MODEL.config.vocab_size, (rows, length + 1))
    targets = ids[:, 1:].astype(np.int32)
    targets[0, 2:] = IGNORED  # rows that count for less than others
    targets[rows // 2, ::3] = IGNORED
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(tokens=ids[:, :-1].astype(np.int32), positions=positions, targets=targets)


def new_state(optimizer, params=PARAMS, frozen=None):
    return create_state(optimizer, jax.tree.map(jnp.copy, params), frozen)


def test_accumulation_is_one_large_batch():
    optimizer, batch = make_optimizer("adamw", 1e-3, **VALUES), some_batch()
    whole, whole_metrics = make_train_step(loss_fn, optimizer)(new_state(optimizer), batch)
    for microbatches in (2, 4):
        step = make_train_step(loss_fn, optimizer, microbatches)
        parts, parts_metrics = step(new_state(optimizer), batch)
        chex.assert_trees_all_close(parts_metrics, whole_metrics, rtol=1e-5)
        # Gradients, not parameters: AdamW's first step turns their every rounding into +-1.
        chex.assert_trees_all_close(
            parts.opt_state[1][0].mu, whole.opt_state[1][0].mu, rtol=1e-4, atol=1e-7
        )


def test_metrics_are_of_the_mean_before_the_step():
    optimizer, batch = make_optimizer("adamw", 1e-3, **VALUES), some_batch()
    differentiate = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (total, sums), gradient = differentiate(PARAMS, {}, batch, None)
    count = sums["targets"]
    squares = sum(float(jnp.sum(g.astype(jnp.float32) ** 2)) for g in jax.tree.leaves(gradient))
    _, metrics = make_train_step(loss_fn, optimizer)(new_state(optimizer), batch)
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], squares**0.5 / count, rtol=1e-4)
    assert metrics["targets"] == count


def test_frozen_parameters_stay_and_cost_no_optimizer_state():
    optimizer = make_optimizer("adamw", 1e-2, **VALUES)
    trainable = {"final_norm": PARAMS["final_norm"]}
    frozen = {name: value for name, value in PARAMS.items() if name != "final_norm"}
    state = new_state(optimizer, trainable, jax.tree.map(jnp.copy, frozen))
    assert jax.tree.structure(state.opt_state[1][0].mu) == jax.tree.structure(trainable)
    state, _ = make_train_step(loss_fn, optimizer)(state, some_batch())
    chex.assert_trees_all_equal(state.frozen, frozen)
    assert not np.array_equal(
        state.trainable["final_norm"]["scale"], trainable["final_norm"]["scale"]
    )


def test_learns_one_batch_by_heart_with_one_compilation():
    chex.clear_trace_counter()
    optimizer, batch = make_optimizer("adamw", 1e-2, **VALUES), some_batch()
    step = make_train_step(chex.assert_max_traces(loss_fn, 1), optimizer)
    state, losses = new_state(optimizer), []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]
    assert state.step == 40


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(bad):
    """Though one microbatch of two is sound; and the next step is what it would have been."""

    def sometimes(trainable, frozen, batch, key):
        loss, sums = quadratic(trainable, frozen, batch, key)
        return jnp.where(batch.tokens[0, 0] == 7, bad, 1.0) * loss, sums

    optimizer = make_optimizer("adamw", 1e-2, **VALUES)
    step = make_train_step(sometimes, optimizer, microbatches=2)
    batch = some_batch()
    batch.tokens[:, 0] = 1
    spoilt = batch.replace(tokens=np.where(np.arange(12) == 0, [[1], [7], [1], [1]], batch.tokens))

    def run(*batches):
        state = create_state(optimizer, {"w": jnp.asarray(TARGET) + 1})
        skipped = []
        for each in batches:
            state, metrics = step(state, each)
            skipped.append(float(metrics["skipped"]))
        return state, skipped

    state, skipped = run(batch, spoilt, batch)
    expected, _ = run(batch, batch)
    assert skipped == [0, 1, 0]
    assert state.step == 3
    chex.assert_trees_all_equal(state.replace(step=expected.step), expected)


def test_every_step_and_part_has_a_key_of_its_own_and_the_seed_decides_them():
    def draw(trainable, frozen, batch, key):
        number = jax.random.uniform(key)
        return 0.0 * jnp.sum(trainable["w"]), {"targets": jnp.float32(1), "number": number}

    optimizer = make_optimizer("sgd", 1e-2)

    def numbers(seed, microbatches):
        state = create_state(optimizer, {"w": jnp.ones(2)})
        step = make_train_step(draw, optimizer, microbatches, seed=seed)
        found = []
        for _ in range(3):
            state, metrics = step(state, some_batch())
            found.append(float(metrics["number"]))
        return found

    assert numbers(0, 1) == numbers(0, 1)
    assert len({*numbers(0, 1), *numbers(1, 1), *numbers(0, 2)}) == 9


def test_consumes_its_state():
    optimizer = make_optimizer("adamw", 1e-3, **VALUES)
    state = create_state(optimizer, {"w": jnp.ones((2, 2))})
    make_train_step(quadratic, optimizer)(state, some_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))


def test_the_compiler_gets_the_options():
    optimizer = make_optimizer("adamw", 1e-3, **VALUES)
    state = create_state(optimizer, {"w": jnp.ones((2, 2))})
    step = make_train_step(quadratic, optimizer, options={"no_such_option": "true"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        step(state, some_batch())


def test_without_a_target_only_matrices_decay():
    def nothing(trainable, frozen, batch, key):
        return 0.0 * jnp.sum(trainable["matrix"]), {"targets": jnp.float32(0)}

    optimizer = make_optimizer("adamw", 1e-2, **VALUES)
    state = create_state(optimizer, {"matrix": jnp.ones((2, 2)), "scale": jnp.ones(2)})
    state, metrics = make_train_step(nothing, optimizer)(state, some_batch())
    np.testing.assert_allclose(state.trainable["matrix"], 1 - 1e-2 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(state.trainable["scale"], 1)
    assert metrics["loss"] == 0


def test_adamw_is_the_papers():
    rate, beta1, beta2, decay, clip = 0.1, 0.9, 0.95, 0.2, 1.0
    weights = np.array([[1.0, -2.0], [0.5, 3.0]])
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    optimizer = make_optimizer(
        "adamw", rate, b1=beta1, b2=beta2, weight_decay=decay, clip_norm=clip
    )
    step = make_train_step(quadratic, optimizer)
    state = create_state(optimizer, {"w": jnp.asarray(weights, jnp.float32)})
    for t in range(1, 4):
        gradient = weights - TARGET
        gradient /= max(1.0, np.linalg.norm(gradient) / clip)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        direction = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
        weights = weights - rate * (direction + decay * weights)
        state, _ = step(state, some_batch(1))
        np.testing.assert_allclose(state.trainable["w"], weights, rtol=1e-5)


def test_every_microbatch_has_rows_of_every_device():
    """On 4 devices, 8 rows in 2 parts: none is padding alone, on any of them."""
    layout = read_layout("fsdp", tiny.build(vocab_size=64)[0].config, mesh={"fsdp": 4})

    def counted(trainable, frozen, batch, key):
        full = jnp.all(batch.positions[:, 0] >= 0)
        return jnp.where(full, 0.0, jnp.nan) * jnp.sum(trainable["w"]), {"targets": jnp.float32(1)}

    optimizer = make_optimizer("sgd", 1e-2)
    state = create_state(optimizer, {"w": jnp.ones(2)})
    batch = batches.spread(some_batch(8), layout, microbatches=2)
    with jax.set_mesh(layout.mesh):
        _, metrics = make_train_step(counted, optimizer, microbatches=2)(state, batch)
    assert metrics["skipped"] == 0
    assert batches.own_rows(layout, 7, 2) == list(range(7))
