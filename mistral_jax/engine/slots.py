"""The slots of a running state: `insert`, `extract` and `erase` move single rows.

A slot holds one row. Each function is one compiled program for a state, whatever the row requests,
and does not change a bit of the other slots.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.engine.blocks import by_device
from mistral_jax.engine.decode import (
    Made,
    State,
    advance,
    nothing,
    put_rows,
    release,
)
from mistral_jax.engine.prefill import Params, empty_cache, replicate
from mistral_jax.engine.sampling import Penalties, RowSampling
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.partition import from_owner, local_row


@functools.partial(jax.jit, static_argnames=("model", "slots", "length"), keep_unused=True)
def empty_state(model: Transformer, params: Params, slots: int, length: int) -> State:
    """Makes a state in which all slots are empty.

    Args:
      model: the model.
      params: its parameters; only their devices are used: JAX allocates the state on them.
      slots: number of slots (B).
      length: cache slots of a row (S); a layer whose window is shorter has fewer.
    """
    vocab_size = model.config.vocab_size

    def zeros(dtype, *shape):
        return jnp.zeros((slots, *shape), dtype)

    ones = jnp.ones(slots, jnp.float32)
    whole, real, flags = jnp.int32, jnp.float32, bool
    penalties = Penalties(
        bias=zeros(real, vocab_size),
        in_prompt=zeros(flags, vocab_size),
        repetition=ones,
        presence=zeros(real),
        frequency=zeros(real),
        apply=zeros(flags),
    )
    sampling = RowSampling(
        zeros(real), zeros(whole), ones, zeros(real), zeros(jnp.uint32, 2), penalties
    )
    return release(
        State(
            cache=empty_cache(model, slots, length),
            tokens=zeros(whole),
            positions=zeros(whole),
            left=zeros(whole),
            counts=zeros(whole, vocab_size),
            sampling=sampling,
            wants_top=zeros(flags),
            stops=zeros(flags, vocab_size),
        )
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def insert(
    model: Transformer,
    state: State,
    slot: np.int32,
    new: State,
    cache: Cache,
    logits: jax.Array,
    row: np.int32,
    mask: np.ndarray | None = None,
) -> tuple[State, Made]:
    """Puts a row whose prompt has been read into a slot, and chooses its first token.

    Args:
      model: the model.
      state: the running rows; its buffers are donated.
      slot: number of the slot.
      new: the fields of the row, as `decode.start` returns them for one row and the cache `()`.
      cache: keys and values of R prompts that were read together; it has at most as many cache
        slots as the state's cache.
      logits: logits of the token after each of these prompts, [R, V] float32.
      row: index of the row's prompt among them.
      mask: one bit a token that may be chosen, [1, ceil(V / 32)] int32; None = all.

    Returns:
      The new state, and the row's first token, [1, 1].
    """
    own = jax.lax.dynamic_slice_in_dim(logits, row, 1)
    # A single row cannot be partitioned, so every device makes the same choice.
    new, made = replicate((new, nothing(1, logits.shape[1], 1)))
    new, made = advance(new, made, jnp.int32(0), replicate(own), (), mask)

    def put(old, one):
        return put_rows(old, one.astype(old.dtype), slot, model.backend)

    fields = jax.tree.map(put, state.replace(cache=()), new)
    copy = functools.partial(_put_row, rules=model.rules, backend=model.backend)
    cache = by_device(copy, model.rules, (state.cache, cache, slot, row), state.cache)
    return release(fields.replace(cache=cache)), replicate(made)


@functools.partial(jax.jit, static_argnames="model")
def extract(model: Transformer, state: State, slot: np.int32) -> Cache:
    """Copies the keys and values of one row to every device that holds rows: a cache with B = 1."""
    copy = functools.partial(_take_row, rules=model.rules)
    one = jax.tree.map(lambda x: x[:1], state.cache)
    return by_device(copy, model.rules, (state.cache, slot), one)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def erase(model: Transformer, state: State, rows: np.ndarray) -> State:
    """Ends the rows that are True in `rows` [B], and marks their cache slots as empty.

    Keys and values stay in memory, but no query sees an empty cache slot.
    """

    def forget(layer):
        positions = jnp.where(rows[:, None], -1, layer.positions)
        axes = ("batch", None)
        return layer.replace(
            positions=nn.with_logical_constraint(positions, axes, rules=model.rules)
        )

    left = jnp.where(rows, 0, state.left)
    return release(state.replace(left=left, cache=tuple(map(forget, state.cache))))


def _take_row(cache, row, rules):
    """Returns one row of a cache, on every device, whichever device holds it."""

    def take(x):
        at, mine = local_row(row, x.shape[0], rules)
        return from_owner(jax.lax.dynamic_slice_in_dim(x, at, 1), mine, rules)

    return jax.tree.map(take, cache)


def _put_row(state, cache, slot, row, rules, backend):
    """Copies one row of a cache into a slot of a state, and empties the slot's other cache slots.

    Their keys and values become 0. The previous row may have left NaN there, and the product of an
    invisible key's probability, which is 0, and NaN is NaN.
    """

    def put(old, new):
        at, mine = local_row(slot, old.shape[0], rules)
        lacking = [(0, size - given) for size, given in zip(old.shape, new.shape, strict=True)][1:]
        empty = -1 if new.ndim == 2 else 0  # Positions have two axes.
        new = jnp.pad(new, [(0, 0), *lacking], constant_values=jnp.array(empty, new.dtype))
        if mine is not True:
            starts = (at, *[jnp.int32(0)] * (old.ndim - 1))
            new = jnp.where(mine, new, jax.lax.dynamic_slice(old, starts, new.shape))
        return put_rows(old, new, at, backend)

    return jax.tree.map(put, state, _take_row(cache, row, rules))
