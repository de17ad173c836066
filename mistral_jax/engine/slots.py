"""The rows of a running state, one by one: `insert`, `extract` and `erase`, and the empty state.

A slot holds one row. Each of these is one compiled program for a state, whatever the row asks for,
and leaves the other slots as they are, to the bit.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mistral_jax.engine.decode import (
    Made,
    State,
    advance,
    cache_axes,
    nothing,
    put_rows,
    release,
    turn,
)
from mistral_jax.engine.prefill import Params, empty_cache, replicate
from mistral_jax.engine.sampling import Penalties, RowSampling
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.partition import mesh_axes


@functools.partial(jax.jit, static_argnames=("model", "slots", "length"), keep_unused=True)
def empty_state(model: Transformer, params: Params, slots: int, length: int) -> State:
    """Makes a state without rows.

    Args:
      model: the model.
      params: its parameters, next to which JAX lays the state; they are not used otherwise.
      slots: B.
      length: cache slots of a row (S) where no window is shorter.
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
            cache=turn(model, empty_cache(model, slots, length)),
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
) -> tuple[State, Made]:
    """Puts a row whose prompt has been read into a slot, and chooses its first token.

    Args:
      model: the model.
      state: the rows; its buffers are consumed.
      slot: where to put the row.
      new: the row's fields without a cache (`()`), as `decode.start` gives them for one row.
      cache: what prompts of [R] rows left, with at most as many slots as the state's.
      logits: of the token after each of them, [R, V] float32.
      row: which of them it is.

    Returns:
      The new state, and the row's first token, [1, 1].
    """
    own = jax.lax.dynamic_slice_in_dim(logits, row, 1)
    # One row is not shared out: every device that holds a part of the batch makes the same choice.
    new, made = replicate((new, nothing(1, logits.shape[1], 1)))
    new, made = advance(new, made, jnp.int32(0), replicate(own), ())

    def put(old, one):
        return put_rows(old, one.astype(old.dtype), slot)

    fields = jax.tree.map(put, state.replace(cache=()), new)
    cache = turn(model, cache)
    copy = _by_device(_put_row, model, (state.cache, cache), state.cache)
    return release(fields.replace(cache=copy(state.cache, cache, slot, row))), replicate(made)


@functools.partial(jax.jit, static_argnames="model")
def extract(model: Transformer, state: State, slot: np.int32) -> Cache:
    """Copies the keys and values of one row, [1, S, K, H], whole to all that share a batch."""
    copy = _by_device(_take_row, model, (state.cache,), None)
    return turn(model, copy(state.cache, slot))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def erase(model: Transformer, state: State, rows: np.ndarray) -> State:
    """Ends rows [B] bool and forgets their keys; what it leaves in memory no row sees."""

    def forget(layer):
        positions = jnp.where(rows[:, None], -1, layer.positions)
        axes = ("batch", None)
        return layer.replace(
            positions=nn.with_logical_constraint(positions, axes, rules=model.rules)
        )

    left = jnp.where(rows, 0, state.left)
    return release(state.replace(left=left, cache=tuple(map(forget, state.cache))))


def _take_row(cache, row, axes):
    """Returns one row of a cache; of devices that hold different rows, to each of them."""
    part = _part(axes)

    def take(x):
        at = row - part * x.shape[0]
        one = jax.lax.dynamic_slice_in_dim(x, jnp.clip(at, 0, x.shape[0] - 1), 1)
        if not axes:
            return one
        mine = (at >= 0) & (at < x.shape[0])
        small = jnp.issubdtype(one.dtype, jnp.integer)
        one = jnp.where(mine, one, jnp.zeros_like(one))
        wide = one.astype(jnp.int32) if small else one
        return jax.lax.psum(wide, axes).astype(x.dtype)

    return jax.tree.map(take, cache)


def _put_row(state, cache, slot, row, axes):
    """Copies one row of a cache over one of a state's, and empties the slots that it lacks.

    Their values become 0: a key that no query sees has the weight 0, but 0 times NaN is NaN, and
    the row before may have failed.
    """
    part = _part(axes)

    def put(old, new):
        at = slot - part * old.shape[0]
        mine = (at >= 0) & (at < old.shape[0])
        at = jnp.clip(at, 0, old.shape[0] - 1)
        lacking = [(0, size - given) for size, given in zip(old.shape, new.shape, strict=True)][1:]
        empty = -1 if new.ndim == 2 else 0  # Positions have two axes.
        new = jnp.pad(new, [(0, 0), *lacking], constant_values=jnp.array(empty, new.dtype))
        if axes:
            starts = (at, *[jnp.int32(0)] * (old.ndim - 1))
            new = jnp.where(mine, new, jax.lax.dynamic_slice(old, starts, new.shape))
        return put_rows(old, new, at)

    return jax.tree.map(put, state, _take_row(cache, row, axes))


def _part(axes):
    """Returns the number of this device's part of a batch."""
    return jax.lax.axis_index(axes) if axes else jnp.int32(0)


def _by_device(
    move: Callable[..., Cache], model: Transformer, caches: tuple[Cache, ...], like
) -> Callable:
    """Lets each device of the mesh in use move what it holds of rows.

    XLA would gather the rows of all devices, as it cannot know which row will be asked for.

    Args:
      move: takes caches, numbers of rows, and the mesh axes of a batch.
      model: the model that the caches are of.
      caches: what it will be given.
      like: the cache that its result is laid out as; None = as the first, but one row, on all parts
        of a batch.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return functools.partial(move, axes=())

    def specs(cache, batch="batch"):
        return jax.tree.map(
            lambda x: nn.logical_to_mesh_axes((batch, *cache_axes(model, x.ndim)[1:]), model.rules),
            cache,
        )

    numbers = (PartitionSpec(),) * (len(caches))
    return jax.shard_map(
        functools.partial(move, axes=mesh_axes(model.rules, "batch")),
        in_specs=(*map(specs, caches), *numbers),
        out_specs=specs(caches[0], None) if like is None else specs(like),
        check_vma=False,
    )
