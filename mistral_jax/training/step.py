"""The training step: one pure function `(state, batch) -> (state, metrics)`, without any file.

What is trained and what stays frozen are two trees, so that the same step trains a whole model
(nothing frozen) or a few adapters beside frozen weights.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

Params = Any
Sums = dict[str, jax.Array]
LossFn = Callable[[Params, Params, "Batch", jax.Array], tuple[jax.Array, Sums]]


@flax.struct.dataclass
class Batch:
    """Rows of text and what should follow each token.

    A row may hold several texts, one after another. Rows of pairs, an answer that is preferred and
    then one that is not, have an axis for the two: [B, 2, T].

    Attributes:
      tokens: token ids, [B, T] int32.
      positions: place of each token in its text, [B, T] int32; -1 = padding.
      targets: the token after each, [B, T] int32; -1 = not to be learnt.
      weights: how much each target counts, [B, T] float32; None = all the same.
    """

    tokens: jax.Array
    positions: jax.Array
    targets: jax.Array
    weights: jax.Array | None = None


@flax.struct.dataclass
class TrainState:
    """All that training carries from one step to the next.

    Attributes:
      trainable: parameters that the optimizer changes, float32.
      frozen: parameters that it does not; an empty dict if all are trained.
      opt_state: state of the optimizer, for `trainable` alone.
      step: number of steps taken, int32.
    """

    trainable: Params
    frozen: Params
    opt_state: optax.OptState
    step: jax.Array


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    places: TrainState | None = None,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the jitted training step; it consumes the state that it is given.

    A step whose loss or gradients are not finite changes nothing but the number of steps.

    Args:
      loss_fn: `(trainable, frozen, batch, key)` to the summed loss, and other sums; among them
        "targets", by which all are divided. The key is for what is random in the model.
      optimizer: turns gradients of the mean loss into updates.
      microbatches: parts that a batch is computed in, one after another; they must divide B. The
        result is that of one large batch, for the activations' memory of a part.
      places: shardings of the new state's arrays, those of the old one's as a rule; None = left to
        the compiler.
      seed: of the keys.

    Returns:
      `train_step(state, batch) -> (state, metrics)`; the metrics are float32 scalars: `loss`, the
      mean in nats a target, `targets`, how much they count in all, `tokens`, how many were read,
      `grad_norm` before clipping, `skipped`, 1 for a step that changed nothing, and the means of
      the other sums.
    """
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(state: TrainState, batch: Batch):
        # Every so many rows apart: each device then has rows of each part.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), microbatches)

        def accumulate(totals, part):
            (loss, sums), grads = differentiate(state.trainable, state.frozen, *part)
            return jax.tree.map(jnp.add, totals, (loss, grads)), sums

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.trainable))
        (loss, grads), sums = jax.lax.scan(accumulate, zeros, (parts, keys))
        sums = jax.tree.map(jnp.sum, sums)
        count = sums.pop("targets")
        # A batch without a single target changes nothing by its loss, instead of dividing by zero.
        count_or_one = jnp.where(count > 0, count, 1)
        loss, sums, grads = jax.tree.map(lambda x: x / count_or_one, (loss, sums, grads))
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update(trainable, opt_state):
            # Optax mixes Python and array scalars, which strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(grads, opt_state, trainable)
                return optax.apply_updates(trainable, updates), opt_state

        # Choosing between arrays, old and new, instead would hold both in memory.
        trainable, opt_state = jax.lax.cond(
            finite, update, lambda *old: old, state.trainable, state.opt_state
        )
        metrics = {
            "loss": loss,
            "targets": count,
            "tokens": jnp.sum(batch.positions >= 0, dtype=jnp.int32),
            "grad_norm": grad_norm,
            "skipped": 1 - finite.astype(jnp.float32),
            **sums,
        }
        return state.replace(trainable=trainable, opt_state=opt_state, step=state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))
