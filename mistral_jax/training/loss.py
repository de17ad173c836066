"""The losses: cross-entropy of the next token, and the preference of one answer to another.

In sums, because only they add up: over microbatches, rows and devices of unequal length alike. It
averages nothing and knows no model.
"""

import jax
import jax.numpy as jnp

IGNORED = -1  # the target of a place that is not to be learnt


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
