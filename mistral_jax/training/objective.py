"""What training minimises: the loss of a model on a batch, as `step.py` asks for it.

How the parameters are put together from what is trained and what is frozen is the caller's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mistral_jax.model.transformer import Transformer
from mistral_jax.training.loss import cross_entropy, logprobs, preference
from mistral_jax.training.step import Batch, LossFn, Params

# (trainable, frozen) to the parameters of the model.
Assemble = Callable[[Params, Params], Params]


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
      label_smoothing: see `loss.preference`.

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
