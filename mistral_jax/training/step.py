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
LossFn = Callable[[Params, Params, "Batch"], tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class Batch:
    """Rows of text and what should follow each token.

    Attributes:
      tokens: token ids, [B, T] int32.
      positions: place of each token in its row, [B, T] int32; -1 = padding.
      targets: the token after each, [B, T] int32; -1 = not to be learnt.
    """

    tokens: jax.Array
    positions: jax.Array
    targets: jax.Array


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

    @classmethod
    def create(
        cls,
        optimizer: optax.GradientTransformation,
        trainable: Params,
        frozen: Params | None = None,
    ) -> "TrainState":
        """Builds the state before the first step."""
        opt_state = optimizer.init(trainable)
        return cls(trainable, {} if frozen is None else frozen, opt_state, jnp.zeros((), jnp.int32))


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """Builds AdamW (arXiv 1711.05101) after clipping by the global norm; only matrices decay."""

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, mask=matrices),
    )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    places: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the jitted training step; it consumes the state that it is given.

    Args:
      loss_fn: `(trainable, frozen, batch)` to the summed loss and the number of targets in the sum.
      optimizer: turns gradients of the mean loss into updates.
      microbatches: parts that a batch is computed in, one after another; they must divide B. The
        result is that of one large batch, for the activations' memory of a part.
      places: shardings of the new state's arrays, those of the old one's as a rule; None = left to
        the compiler.

    Returns:
      `train_step(state, batch) -> (state, metrics)`; the metrics are float32 scalars: `loss`, the
      mean in nats a target, `targets`, how many there were, and `grad_norm` before clipping.
    """
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(state: TrainState, batch: Batch):
        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)

        def accumulate(sums, part):
            (loss, count), grads = differentiate(state.trainable, state.frozen, part)
            return jax.tree.map(jnp.add, sums, (loss, count, grads)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), jnp.float32(0), state.trainable))
        (loss, count, grads), _ = jax.lax.scan(accumulate, zeros, parts)
        # A batch without a single target changes nothing by its loss, instead of dividing by zero.
        count_or_one = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / count_or_one, grads)
        # Optax mixes Python and array scalars, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": loss / count_or_one,
            "targets": count,
            "grad_norm": optax.tree.norm(grads),
        }
        return state.replace(trainable=trainable, opt_state=opt_state, step=state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))
