"""The loss: cross-entropy of the next token, in sums. It averages nothing and knows no model.

Sums, because only they add up: over microbatches, rows and devices of unequal length alike.
"""

import jax
import jax.numpy as jnp

IGNORED = -1  # the target of a place that is not to be learnt


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums the negative log-probability of the targets.

    Args:
      logits: scores of every token, [B, T, V] float32.
      targets: the tokens that were to be predicted, [B, T] int32; -1 = counts for nothing.

    Returns:
      The sum in nats, and the number of targets that count: two float32 scalars.
    """
    counted = targets != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted, dtype=jnp.float32)
