"""The losses: cross-entropy of the next token, and the preference of one answer to another.

They are sums, because only sums add up over microbatches, rows and devices of unequal length. Each
is made into the loss of a model on a batch, as `step.py` asks for it; how the parameters are put
together from what is trained and what is frozen is the caller's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mistral_jax.model.transformer import Transformer
from mistral_jax.training.step import Batch, LossFn, Params

IGNORED = -1  # the target of a place that is not to be learnt

# (trainable, frozen) to the parameters of the model.
Assemble = Callable[[Params, Params], Params]


def logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the log-probability of each target, [B, T] float32; 0 where there is none.

    Args:
      logits: scores of every token, [B, T, V] float32.
      targets: the tokens that were to be predicted, [B, T] int32; -1 = none.
    """
    counted = targets != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)
    return jnp.where(counted, chosen[..., 0] - jax.nn.logsumexp(logits, axis=-1), 0.0)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sums the negative log-probability of the targets.

    Args:
      logits: scores of every token, [B, T, V] float32.
      targets: the tokens that were to be predicted, [B, T] int32; -1 = counts for nothing.
      weights: how much each counts, [B, T] float32; None = all the same.

    Returns:
      The sum in nats, and how much the targets count in all: two float32 scalars.
    """
    counted = (targets != IGNORED).astype(jnp.float32)
    weights = counted if weights is None else counted * weights
    return -jnp.sum(weights * logprobs(logits, targets)), jnp.sum(weights)


def preference(
    model: jax.Array, reference: jax.Array, beta: float, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of direct preference optimization, DPO (arXiv 2305.18290, equation 7).

    Args:
      model: log-probability of each answer under the model, [B, 2] float32, the preferred first.
      reference: the same under the model that it began as.
      beta: how strongly the model is held to the reference.
      label_smoothing: share of pairs that are taken to be the wrong way around (conservative DPO).

    Returns:
      The loss of each pair in nats, and its margin, beta times the difference that training has
      made between the two answers' log-probabilities: [B] float32 both.
    """
    rewards = beta * (model - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong, margin


def everything(trainable: Params, frozen: Params) -> Params:
    """Puts the parameters together where all of them are trained."""
    del frozen
    return trainable


def make_loss_fn(model: Transformer, assemble: Assemble = everything) -> LossFn:
    """Builds the loss of predicting each next token."""

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, key: jax.Array):
        params = assemble(trainable, frozen)
        logits = _logits(model, params, batch.tokens, batch.positions, key)
        loss, count = cross_entropy(logits, batch.targets, batch.weights)
        return loss, {"targets": count}

    return loss_fn


def make_preference_loss_fn(
    model: Transformer,
    assemble: Assemble,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossFn:
    """Builds the loss of preferring one answer to another (DPO) on batches of pairs.

    Args:
      model: the model.
      assemble: puts the parameters together. The frozen ones alone are the reference's: the
        model's, as it began.
      beta: how strongly the model is held to the reference.
      label_smoothing: see `preference`.

    Returns:
      The loss; "targets" are pairs, and its other sums are the "accuracy", whether training has
      made the preferred answer likelier than the other, and the "margin" between the two.
    """

    def answers(params, batch, key=None):
        def flat(x):
            return x.reshape(-1, x.shape[-1])

        flat_batch = jax.tree.map(flat, batch)
        logits = _logits(model, params, flat_batch.tokens, flat_batch.positions, key)
        each = logprobs(logits, flat_batch.targets)
        if batch.weights is not None:
            each *= flat_batch.weights
        return jnp.sum(each, axis=-1).reshape(-1, 2)

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, key: jax.Array):
        before = jax.lax.stop_gradient(answers(frozen, batch))
        after = answers(assemble(trainable, frozen), batch, key)
        losses, margin = preference(after, before, beta, label_smoothing)
        # A pair without a target was added to fill the batch up.
        counts = jnp.any(batch.targets >= 0, axis=(1, 2)).astype(jnp.float32)
        sums = {
            "targets": counts,
            "accuracy": jnp.where(margin > 0, counts, 0),
            "margin": counts * margin,
        }
        return jnp.sum(counts * losses), jax.tree.map(jnp.sum, sums)

    return loss_fn


def _logits(model, params, tokens, positions, key):
    rngs = None if key is None else {"dropout": key}
    return model.apply({"params": params}, tokens, positions, rngs=rngs)[0]
