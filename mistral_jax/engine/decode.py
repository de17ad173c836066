"""Decoding on the device: its `State`, one step, and the loop of steps. It reads nothing back.

The loop makes up to `limit` tokens a row before the host looks, and fewer where rows end.
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
from mistral_jax.ops.partition import Rules, by_rows

# Most tokens a row that the loop makes before the host looks.
MOST_STEPS = 64


@flax.struct.dataclass
class Made:
    """What one call of the loop made, for the host to read.

    Attributes:
      tokens: ids, [B, T] int32; -1 = none.
      logprobs: their log-probabilities, [B, T] float32.
      top_tokens: the `MOST_TOP` likeliest tokens' ids, [B, T, n] int32; 0 if not wanted.
      top_logprobs: their log-probabilities, [B, T, n] float32.
      left: tokens that each row may still make, [B] int32; 0 = it has ended, -1 = it has ended
        since its logits were not finite.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    left: jax.Array


@flax.struct.dataclass
class State:
    """All that decoding carries from one step to the next. Every field has one entry a row.

    Attributes:
      cache: the keys and values of all tokens but the last; see `by_heads`.
      tokens: the last token of each row, [B] int32.
      positions: its place in the row's text, [B] int32.
      left: tokens that the row may still make, [B] int32; 0 or less = it has ended, as in `Made`.
      counts: how often each token stands in the answer, [B, V] int32.
      sampling: how each row chooses.
      wants_top: whether the likeliest tokens are wanted, too, [B] bool.
      stops: whether a token ends the row, [B, V] bool.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array
    left: jax.Array
    counts: jax.Array
    sampling: RowSampling
    wants_top: jax.Array
    stops: jax.Array


def start(
    cache: Cache,
    lengths: Sequence[int],
    left: Sequence[int],
    sampling: RowSampling,
    stop_ids: Sequence[Sequence[int]],
    wants_top: Sequence[bool],
    vocab_size: int,
) -> State:
    """Builds the state after `prefill`, in which no token is chosen yet; all but the cache on host.

    Args:
      cache: what the prompts left; by heads, if `by_heads`.
      lengths: tokens of each prompt, one a row (B); 0 for a row that is to stay empty.
      left: tokens that each row may make.
      sampling: how each row chooses.
      stop_ids: tokens that end each row, any number of them.
      wants_top: whether each row's likeliest tokens are wanted, too.
      vocab_size: V.
    """
    lengths = np.array(lengths, np.int32)
    stops = np.zeros((len(lengths), vocab_size), bool)
    for row, ids in enumerate(stop_ids):
        stops[row, list(ids)] = True
    return State(
        cache=cache,
        tokens=np.zeros_like(lengths),
        positions=lengths - 1,
        left=np.where(lengths > 0, np.array(left, np.int32), np.int32(0)),
        counts=np.zeros((len(lengths), vocab_size), np.int32),
        sampling=sampling,
        wants_top=np.array(wants_top, bool),
        stops=stops,
    )


def by_heads(model: Transformer) -> bool:
    """Whether decoding keeps keys and values by heads, [B, K, S, H]: as a GPU's products want them.

    XLA would else turn them before each loop of steps and back behind it, and need room for both.
    """
    return model.backend.platform == "gpu"


def cache_axes(model: Transformer, ndim: int) -> tuple[str | None, ...]:
    """Returns the logical axes of an array of a state's cache with so many axes."""
    heads = ("kv_heads", None) if by_heads(model) else (None, "kv_heads")
    return ("batch", *heads, "head_dim") if ndim == 4 else ("batch", None)


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


def decode_step(
    model: Transformer, params: Params, state: State, made: Made, step: jax.Array
) -> tuple[State, Made]:
    """Runs the model on each row's last token and chooses the next; ended rows do not change."""
    if not jax.sharding.get_abstract_mesh().empty:
        # Else weights that are split are gathered before the loop of steps, and held whole in it.
        params, tokens = jax.lax.optimization_barrier((params, state.tokens))
        state = state.replace(tokens=tokens)
    positions = jnp.where(state.left > 0, state.positions, -1)
    logits, cache = model.apply(
        {"params": params}, state.tokens[:, None], positions[:, None], state.cache
    )
    logits = whole_rows(model, logits[:, 0])
    return advance(state.replace(cache=cache), made, step, logits, model.rules)


def first_step(model: Transformer, state: State, logits: jax.Array) -> tuple[State, Made]:
    """Chooses each row's first token by the logits [B, V] of `prefill`."""
    # The cache stays out of it: the program is then one for caches of all sizes.
    new, made = _first_step(model, state.replace(cache=()), logits)
    return new.replace(cache=state.cache), made


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _first_step(model, state, logits):
    state, made = replicate(state), nothing(*logits.shape, 1)
    return replicate(advance(state, made, jnp.int32(0), logits, model.rules))


def nothing(rows: int, vocab_size: int, steps: int) -> Made:
    """Returns what no step of `steps` has made yet."""
    shape, top = (rows, steps), (rows, steps, min(MOST_TOP, vocab_size))
    return Made(
        tokens=jnp.full(shape, -1, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        top_tokens=jnp.zeros(top, jnp.int32),
        top_logprobs=jnp.zeros(top, jnp.float32),
        left=jnp.zeros(rows, jnp.int32),
    )


def advance(
    state: State, made: Made, step: jax.Array, logits: jax.Array, rules: Rules
) -> tuple[State, Made]:
    """Appends a token, chosen by `logits` [B, V], to each row that has not ended.

    Args:
      state: the rows.
      made: receives the tokens, in column `step`.
      step: column of `made`, int32.
      logits: the model's, [B, V] float32.
      rules: mesh axes of the logical axes: devices choose for the rows that they hold.
    """
    positions, alive = state.positions + 1, state.left > 0
    # Else devices would wait for each other at every try to draw any row's token.
    weigh = by_rows(_choose, rules)
    sampling, wants_top = state.sampling.only(alive), state.wants_top & alive
    tokens, *odds = weigh(logits, sampling, positions, state.counts, wants_top)
    stopped = jnp.take_along_axis(state.stops, tokens[:, None], axis=1)[:, 0]
    # A NaN, an infinity, or nothing but its negative makes NaN of all log-probabilities.
    failed = alive & jnp.isnan(odds[0])
    going = alive & ~stopped & ~failed
    ended = jnp.where(failed, -1, jnp.minimum(state.left, 0))
    left = jnp.where(going, state.left - 1, ended)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=1)
    new = (jnp.where(going, tokens, -1), *odds)
    old = made.tokens, made.logprobs, made.top_tokens, made.top_logprobs
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    state = state.replace(
        tokens=tokens,
        positions=positions,
        left=left,
        counts=state.counts.at[rows, tokens].add(going.astype(jnp.int32)),
    )
    return state, Made(*map(put, old, new), left)


def _choose(logits, sampling, positions, counts, wants_top):
    """Chooses tokens; returns them, and the rest of `Made` for them and the likeliest."""
    tokens = choose(logits, sampling, positions, counts)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1) - largest - total
    shape = len(tokens), min(MOST_TOP, logits.shape[-1])

    def find():
        values, likeliest = jax.lax.top_k(logits, shape[1])
        return likeliest, values - largest - total

    def spare():
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return tokens, chosen[:, 0], *jax.lax.cond(jnp.any(wants_top), find, spare)


@functools.partial(jax.jit, static_argnames=("model", "rows"), donate_argnames="state")
def decode(
    model: Transformer,
    params: Params,
    state: State,
    limit: np.int32,
    watched: np.ndarray,
    rows: int | None = None,
) -> tuple[State, Made]:
    """Takes up to `limit` steps, fewer if all rows end, or one that is watched.

    Args:
      model: the model.
      params: its parameters.
      state: where to begin; its buffers are consumed.
      limit: at most `MOST_STEPS`.
      watched: rows [B] bool whose places others are to take: the first of them that ends, or has
        ended, ends the loop. None of them = all rows go on until they end.
      rows: run only so many, the first; None = all.

    Returns:
      The new state, and what these steps made of the rows that they ran.
    """

    watched = watched[: rows or len(watched)]
    is_watched = jnp.any(watched)

    def goes_on(carry):
        state, _, step = carry
        # One question of each device to the others, whichever it is.
        found = jnp.where(is_watched, watched & (state.left <= 0), state.left > 0)
        return (step < limit) & (jnp.any(found) != is_watched)

    def take_step(carry):
        state, made, step = carry
        return *decode_step(model, params, state, made, step), step + 1

    whole = state
    if rows is not None:
        state = jax.tree.map(lambda x: from_bits(as_bits(x)[:rows], x.dtype), state)
    made = nothing(*state.counts.shape, MOST_STEPS).replace(left=state.left)
    state = state.replace(cache=turn(model, state.cache))
    state, made, _ = jax.lax.while_loop(goes_on, take_step, (state, made, jnp.int32(0)))
    if rows is not None:
        state = jax.tree.map(lambda old, new: put_rows(old, new, jnp.int32(0)), whole, state)
    return release(state.replace(cache=turn(model, state.cache))), replicate(made)


def shrinks(model: Transformer) -> bool:
    """Whether steps of fewer rows take less time, with the time to copy their caches."""
    return model.backend.is_one_cpu


def put_rows(old: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """Writes `new` [R, ...] over rows of `old` [B, ...], from the row `first` on."""
    starts = (first, *[jnp.int32(0)] * (old.ndim - 1))
    return from_bits(jax.lax.dynamic_update_slice(as_bits(old), as_bits(new), starts), old.dtype)


def as_bits(x: jax.Array) -> jax.Array:
    """Returns numbers of 16 bits as integers: XLA's CPU backend would move them as float32."""
    if x.dtype.itemsize != 2:
        return x
    return jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(x, jnp.uint16))


def from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Undoes `as_bits`."""
    if x.dtype == dtype:
        return x
    return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(x), dtype)


def release(state: State) -> State:
    """Keeps all but the cache whole on every device, for the host to read, and for one layout."""
    return replicate(state.replace(cache=())).replace(cache=state.cache)
