"""Decoding on the device: its `State`, one step, and the loop of steps. It reads nothing back.

The loop serves batches and streams alike: it makes up to `limit` tokens a row before the host
looks, and stops when every row has ended.
"""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.engine.logits import choose
from mistral_jax.engine.prefill import Params, replicate, whole_rows
from mistral_jax.engine.sampling import MOST_TOP, RowSampling
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.partition import by_rows

# Most tokens a row that the loop makes before the host looks.
MOST_STEPS = 64


@flax.struct.dataclass
class Made:
    """The tokens that rows made since the host last looked; -1 = none.

    Attributes:
      tokens: ids, [B, T] int32.
      logprobs: their log-probabilities, [B, T] float32.
      top_tokens: the `MOST_TOP` likeliest tokens' ids, [B, T, n] int32; 0 if not wanted.
      top_logprobs: their log-probabilities, [B, T, n] float32.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


@flax.struct.dataclass
class State:
    """All that decoding carries from one step to the next.

    Attributes:
      cache: the keys and values of all tokens but the last; see `by_heads`.
      tokens: the last token of each row, [B] int32.
      positions: its place in the row's text, [B] int32.
      left: tokens that the row may still make, [B] int32; 0 = it has ended.
      failed: whether it ended since its logits were not finite, [B] bool.
      counts: how often each token stands in the answer, [B, V] int32.
      sampling: how each row chooses.
      wants_top: whether the likeliest tokens are wanted, too, [B] bool.
      stop_ids: tokens that end a row, [n] int32; -1 = none.
      made: what the host has not seen yet.
      steps: columns of `made` that are filled, int32.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array
    left: jax.Array
    failed: jax.Array
    counts: jax.Array
    sampling: RowSampling
    wants_top: jax.Array
    stop_ids: jax.Array
    made: Made
    steps: jax.Array


def start(
    cache: Cache,
    lengths: Sequence[int],
    left: int,
    sampling: RowSampling,
    stop_ids: Sequence[int],
    wants_top: bool,
    vocab_size: int,
) -> State:
    """Builds the state after `prefill`, in which no token is chosen yet.

    Args:
      cache: what the prompts left; by heads, if `by_heads`.
      lengths: tokens of each prompt, one a row (B); 0 for a row that is to stay empty.
      left: tokens that a row may make.
      sampling: how each row chooses.
      stop_ids: tokens that end a row.
      wants_top: whether the likeliest tokens are wanted, too.
      vocab_size: V.
    """
    lengths = np.array(lengths, np.int32)
    shape = (len(lengths), MOST_STEPS)
    top = (*shape, min(MOST_TOP, vocab_size))
    # A few more stop ids shall not change the shape.
    stops = np.full(-(-max(1, len(stop_ids)) // 8) * 8, -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    return State(
        cache=cache,
        tokens=np.zeros_like(lengths),
        positions=lengths - 1,
        left=np.where(lengths > 0, np.int32(left), np.int32(0)),
        failed=np.zeros(lengths.shape, bool),
        counts=np.zeros((len(lengths), vocab_size), np.int32),
        sampling=sampling,
        wants_top=np.full(lengths.shape, wants_top),
        stop_ids=stops,
        made=Made(
            tokens=np.full(shape, -1, np.int32),
            logprobs=np.zeros(shape, np.float32),
            top_tokens=np.zeros(top, np.int32),
            top_logprobs=np.zeros(top, np.float32),
        ),
        steps=np.int32(0),
    )


def by_heads(model: Transformer) -> bool:
    """Whether decoding keeps keys and values by heads, [B, K, S, H]: as a GPU's products want them.

    XLA would else turn them before each loop of steps and back behind it, and need room for both.
    """
    return model.backend.platform == "gpu"


def turn(model: Transformer, cache: Cache) -> Cache:
    """Swaps slots and heads of keys and values, if they are kept by heads."""
    return jax.tree.map(_swap, cache) if by_heads(model) else cache


def _swap(x):
    return jnp.swapaxes(x, 1, 2) if x.ndim == 4 else x


def hold(model: Transformer, cache: Cache) -> Cache:
    """Turns what `prefill` returns as `turn` does, array by array, to make room for the next."""

    def turned(x):
        new = _swap(x)
        if new is not x:
            x.delete()
        return new

    return jax.tree.map(turned, cache) if by_heads(model) else cache


def decode_step(model: Transformer, params: Params, state: State) -> State:
    """Runs the model on each row's last token and chooses the next; ended rows do not change."""
    if not jax.sharding.get_abstract_mesh().empty:
        # Else weights that are split are gathered before the loop of steps, and held whole in it.
        params, tokens = jax.lax.optimization_barrier((params, state.tokens))
        state = state.replace(tokens=tokens)
    positions = jnp.where(state.left > 0, state.positions, -1)
    logits, cache = model.apply(
        {"params": params}, state.tokens[:, None], positions[:, None], state.cache
    )
    return _advance(model, state.replace(cache=cache), whole_rows(model, logits[:, 0]))


def first_step(model: Transformer, state: State, logits: jax.Array) -> State:
    """Chooses each row's first token by the logits [B, V] of `prefill`."""
    # The cache stays out of it: the program is then one for caches of all sizes.
    return _first_step(model, state.replace(cache=()), logits).replace(cache=state.cache)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _first_step(model, state, logits):
    return replicate(_advance(model, replicate(state), logits))


def _advance(model: Transformer, state: State, logits: jax.Array) -> State:
    """Appends a token, chosen by `logits` [B, V], to each row that has not ended."""
    positions = state.positions + 1
    # Else devices would wait for each other at every try to draw any row's token.
    weigh = by_rows(_choose, model.rules)
    tokens, *odds = weigh(logits, state.sampling, positions, state.counts, state.wants_top)
    stopped = jnp.any(tokens[:, None] == state.stop_ids[None], axis=1)
    # A NaN, an infinity, or nothing but its negative makes NaN of all log-probabilities.
    failed = (state.left > 0) & jnp.isnan(odds[0])
    going = (state.left > 0) & ~stopped & ~failed
    new = Made(jnp.where(going, tokens, -1), *odds)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=state.steps, axis=1)
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    return state.replace(
        tokens=tokens,
        positions=positions,
        left=jnp.where(going, state.left - 1, 0),
        failed=state.failed | failed,
        counts=state.counts.at[rows, tokens].add(going.astype(jnp.int32)),
        made=jax.tree.map(put, state.made, new),
        steps=state.steps + 1,
    )


def _choose(logits, sampling, positions, counts, wants_top):
    """Chooses tokens; returns them, and the rest of `Made` for them and the likeliest."""
    tokens = choose(logits, sampling, positions, counts)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1) - largest - total
    shape = len(tokens), min(MOST_TOP, logits.shape[-1])

    def find():
        values, likeliest = jax.lax.top_k(logits, shape[1])
        return values - largest - total, likeliest

    def spare():
        return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)

    top_logprobs, top_tokens = jax.lax.cond(jnp.any(wants_top), find, spare)
    return tokens, chosen[:, 0], top_tokens, top_logprobs


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    model: Transformer, params: Params, state: State, limit: np.int32, ended: np.ndarray
) -> State:
    """Takes up to `limit` steps, fewer if all rows end.

    Args:
      model: the model.
      params: its parameters.
      state: where to begin; its buffers are consumed.
      limit: at most `MOST_STEPS`.
      ended: rows that the host has ended, [B] bool.

    Returns:
      The new state; its `made` holds what these steps made.
    """
    state = state.replace(
        left=jnp.where(ended, 0, state.left),
        made=state.made.replace(tokens=jnp.full_like(state.made.tokens, -1)),
        steps=jnp.zeros_like(state.steps),
    )
    state = jax.lax.while_loop(
        lambda state: (state.steps < limit) & jnp.any(state.left > 0),
        functools.partial(decode_step, model, params),
        state.replace(cache=turn(model, state.cache)),
    )
    return _replicate(state.replace(cache=turn(model, state.cache)))


def _replicate(state: State) -> State:
    """Keeps all but the cache whole on every device, for the host to read, and for one layout."""
    return replicate(state.replace(cache=())).replace(cache=state.cache)
