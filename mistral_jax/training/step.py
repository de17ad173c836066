"""The training step: one pure function `(state, batch) -> (state, metrics)`.

The trainable and the frozen parameters are two trees, so the same step trains a whole model, with
nothing frozen, or a few adapters beside frozen weights.
"""

from collections.abc import Callable, Mapping
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
    """Rows of token ids and the target of each token.

    A packed row holds several texts, one after another. Pairs of a preferred and a rejected answer
    have one more axis: [B, 2, T].

    Attributes:
      tokens: token ids, [B, T] int32.
      positions: position of each token in its text, [B, T] int32; -1 = padding.
      targets: the next token of each, [B, T] int32; -1 = not learnt.
      weights: weight of each target in the loss, [B, T] float32; None = 1 for all.
    """

    tokens: jax.Array
    positions: jax.Array
    targets: jax.Array
    weights: jax.Array | None = None


@flax.struct.dataclass
class TrainState:
    """The values that training carries from one step to the next.

    Attributes:
      trainable: parameters that the optimizer updates, float32.
      frozen: all other parameters; an empty dict if there are none.
      opt_state: state of the optimizer for `trainable`.
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
    options: Mapping[str, str] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the jitted training step, which donates the state that it is given.

    A step whose loss or gradients are not finite changes only the number of steps.

    Args:
      loss_fn: maps `(trainable, frozen, batch, key)` to the summed loss and other sums; all are
        divided by the sum "targets". A sum "loss" is reported in place of the loss. The key is for
        dropout.
      optimizer: turns gradients of the mean loss into updates.
      microbatches: number of parts of a batch, computed in sequence; divides B. The result equals
        that of the whole batch, with the activation memory of one part.
      places: shardings of the new state, usually those of the old one; None = the compiler
        chooses.
      seed: seed of the keys.
      options: options of XLA's compiler, such as `Backend.training_options`.

    Returns:
      `train_step(state, batch) -> (state, metrics)`. The metrics are scalars: `loss`, the mean in
      nats per target; `targets`, the sum of their weights; `tokens`, the number of tokens read;
      `grad_norm`, before clipping; `skipped`, 1 if the step was skipped; and the means of the
      other sums.
    """
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, batch: Batch):
        # Part i holds rows i, i + microbatches, ..., so each device has rows of every part.
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
        # A batch without a target has a loss of 0, instead of 0 / 0.
        count_or_one = jnp.where(count > 0, count, 1)
        loss, sums, grads = jax.tree.map(lambda x: x / count_or_one, (loss, sums, grads))
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update(trainable, opt_state):
            # Optax mixes Python and array scalars, which strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(
                    grads, opt_state, trainable, grad_norm=grad_norm
                )
                return optax.apply_updates(trainable, updates), opt_state

        # `jnp.where` would hold the old and the new arrays in memory at once.
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

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(places, None),
        compiler_options=dict(options or {}),
    )
