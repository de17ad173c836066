"""Losses: cross-entropy of the next token, and direct preference optimization (DPO).

A mixture of experts adds its load-balancing loss to either, times a coefficient.

A loss is a sum, because only sums add up over microbatches, rows and devices with unequal numbers
of targets. `assemble` builds the model's parameters from the trainable and the frozen ones.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mistral_jax.model.experts import BALANCE, balance_loss
from mistral_jax.model.transformer import Transformer
from mistral_jax.training.step import Batch, LossFn, Params

IGNORED = -1  # target of a position where nothing is learnt

# Maps (trainable, frozen) to the parameters of the model.
Assemble = Callable[[Params, Params], Params]


def logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the log-probability of each target, [B, T] float32; 0 where there is no target.

    Args:
      logits: logits of every token, [B, T, V] float32.
      targets: target token ids, [B, T] int32; -1 = no target.
    """
    counted = targets != IGNORED
    chosen = _pick(logits, jnp.where(counted, targets, 0))
    return jnp.where(counted, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)


@jax.custom_vjp
def _pick(logits, index):
    """Returns `logits[..., index]`. Its gradient is a mask.

    JAX's own gradient of an index is a scatter, for which a TPU copies all logits several times.
    """
    return jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]


def _put_back(kept, grad):
    logits, index = kept
    columns = jax.lax.broadcasted_iota(index.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(columns == index[..., None], grad[..., None], 0), None


_pick.defvjp(lambda *given: (_pick(*given), given), _put_back)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sums the negative log-probability of the targets.

    Args:
      logits: logits of every token, [B, T, V] float32.
      targets: target token ids, [B, T] int32; -1 = no target.
      weights: weight of each target, [B, T] float32; None = 1 for all.

    Returns:
      The sum in nats, and the sum of the targets' weights: two float32 scalars.
    """
    counted = (targets != IGNORED).astype(jnp.float32)
    weights = counted if weights is None else counted * weights
    return -jnp.sum(weights * logprobs(logits, targets)), jnp.sum(weights)


def preference(
    model: jax.Array, reference: jax.Array, beta: float, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Computes the DPO loss of pairs of answers (arXiv 2305.18290, equation 7).

    Args:
      model: log-probabilities of the answers under the trained model, [B, 2] float32; the preferred
        answer comes first.
      reference: the same under the reference, which is the model before training.
      beta: how strongly the model is held to the reference.
      label_smoothing: assumed share of pairs whose answers are swapped (conservative DPO).

    Returns:
      The loss of each pair in nats, and its margin: beta times the increase, through training, of
      the difference between the log-probabilities of its two answers. Both are [B] float32.
    """
    rewards = beta * (model - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong, margin


def everything(trainable: Params, frozen: Params) -> Params:
    """Returns the model's parameters where all of them are trained."""
    del frozen
    return trainable


def make_loss_fn(
    model: Transformer, assemble: Assemble = everything, router_loss: float = 0.0
) -> LossFn:
    """Builds the next-token loss of a model.

    Args:
      model: the model.
      assemble: builds the model's parameters.
      router_loss: coefficient of the load-balancing loss of a mixture of experts.

    Returns:
      The loss function. Its sums are "targets" and, for a mixture of experts, those of `_balanced`.
    """

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, key: jax.Array):
        params = assemble(trainable, frozen)
        logits, balance = _logits(model, params, batch.tokens, batch.positions, key)
        loss, count = cross_entropy(logits, batch.targets, batch.weights)
        return _balanced(loss, {"targets": count}, balance, router_loss)

    return loss_fn


def make_preference_loss_fn(
    model: Transformer,
    assemble: Assemble,
    beta: float,
    label_smoothing: float = 0.0,
    router_loss: float = 0.0,
) -> LossFn:
    """Builds the DPO loss of a model on batches of pairs.

    Args:
      model: the model.
      assemble: builds the model's parameters. The reference uses the frozen parameters alone.
      beta: how strongly the model is held to the reference.
      label_smoothing: see `preference`.
      router_loss: coefficient of the load-balancing loss of a mixture of experts.

    Returns:
      The loss function. Its sums are "targets" (the number of pairs), "accuracy" (the number of
      pairs with a positive margin), "margin" and, for a mixture of experts, those of `_balanced`.
    """

    def answers(params, batch, key=None):
        def flat(x):
            return x.reshape(-1, x.shape[-1])

        flat_batch = jax.tree.map(flat, batch)
        logits, balance = _logits(model, params, flat_batch.tokens, flat_batch.positions, key)
        each = logprobs(logits, flat_batch.targets)
        if batch.weights is not None:
            each *= flat_batch.weights
        return jnp.sum(each, axis=-1).reshape(-1, 2), balance

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, key: jax.Array):
        before = jax.lax.stop_gradient(answers(frozen, batch)[0])
        after, balance = answers(assemble(trainable, frozen), batch, key)
        losses, margin = preference(after, before, beta, label_smoothing)
        # A pair without a target is padding of the batch.
        counts = jnp.any(batch.targets >= 0, axis=(1, 2)).astype(jnp.float32)
        sums = {
            "targets": counts,
            "accuracy": jnp.where(margin > 0, counts, 0),
            "margin": counts * margin,
        }
        loss, sums = jnp.sum(counts * losses), jax.tree.map(jnp.sum, sums)
        return _balanced(loss, sums, balance, router_loss)

    return loss_fn


def _logits(model, params, tokens, positions, key):
    """Returns the logits, and the load-balancing loss of a mixture of experts or None."""
    rngs, variables = None if key is None else {"dropout": key}, {"params": params}
    if not model.config.num_experts:
        return model.apply(variables, tokens, positions, rngs=rngs)[0], None
    (logits, _), sown = model.apply(variables, tokens, positions, rngs=rngs, mutable=BALANCE[:1])
    # Each layer has its own sums, or a scan has stacked them.
    sums = [x.reshape(-1, *x.shape[-2:]) for x in jax.tree.leaves(sown)]
    return logits, balance_loss(jnp.concatenate(sums))


def _balanced(loss, sums, balance, router_loss):
    """Adds the load-balancing loss to a loss.

    Returns:
      The sum to minimise, and the sums with two more: "loss", which is reported and has no
      load-balancing loss, and "router_loss", that loss without its coefficient.
    """
    if balance is None:
        return loss, sums
    balance *= sums["targets"]
    return loss + router_loss * balance, sums | {"loss": loss, "router_loss": balance}
