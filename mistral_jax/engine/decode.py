"""Decoding on the device: the `State` of the running rows, one step, and the loop of steps.

A call of the loop takes several steps before the host reads the tokens, and ends early when rows
end.
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
from mistral_jax.ops.backend import Backend, ModelJit
from mistral_jax.ops.partition import Rules, by_rows
from mistral_jax.ops.rows import as_bits, from_bits

# Maximum number of steps of one call of the loop.
MOST_STEPS = 64


@flax.struct.dataclass
class Made:
    """The output of one call of the loop, one column a step.

    Attributes:
      tokens: token ids, [B, T] int32; -1 = none.
      logprobs: log-probabilities of the tokens, [B, T] float32.
      top_tokens: ids of the n = min(`MOST_TOP`, V) likeliest tokens, [B, T, n] int32; 0 if no row
        requests them.
      top_logprobs: their log-probabilities, [B, T, n] float32.
      left: number of tokens that each row may still add, [B] int32; 0 = the row has ended, -1 = it
        has ended because its logits were not finite.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    left: jax.Array


@flax.struct.dataclass
class State:
    """The values that decoding carries from one step to the next, one entry a row in each field.

    Attributes:
      cache: keys and values of all tokens except the last.
      tokens: the last token of each row, [B] int32.
      positions: position of that token in the row's text, [B] int32.
      left: number of tokens that the row may still add, [B] int32; 0 or less = the row has ended,
        as in `Made`.
      counts: number of times that each token occurs in the answer, [B, V] int32.
      sampling: how each row chooses its tokens.
      wants_top: whether the row requests the likeliest tokens too, [B] bool.
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
    """Builds the state of rows whose prompts have been read and that have no new token yet.

    Its arrays, except for the cache, are in host memory.

    Args:
      cache: keys and values of the prompts.
      lengths: number of tokens of each prompt (B entries); 0 for an empty row.
      left: maximum number of tokens to add to each row.
      sampling: how each row chooses its tokens.
      stop_ids: tokens that end each row.
      wants_top: whether each row requests the likeliest tokens too.
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


def decode_step(
    model: Transformer, params: Params, state: State, made: Made, step: jax.Array
) -> tuple[State, Made]:
    """Runs the model on each row's last token and chooses the next; skips rows that have ended."""
    state, logits = _read_last(model, params, state)
    return advance(state, made, step, logits, model.rules)


def _read_last(model, params, state):
    """Runs the model on each row's last token; returns the state and logits [B, V]."""
    if not jax.sharding.get_abstract_mesh().empty:
        # Without a barrier, XLA gathers partitioned weights before the loop and keeps them whole.
        params, tokens = jax.lax.optimization_barrier((params, state.tokens))
        state = state.replace(tokens=tokens)
    positions = jnp.where(state.left > 0, state.positions, -1)
    logits, cache = model.apply(
        {"params": params}, state.tokens[:, None], positions[:, None], state.cache
    )
    return state.replace(cache=cache), whole_rows(model, logits[:, 0])


@functools.partial(ModelJit, static_argnames="model", donate_argnames="state")
def forward(model: Transformer, params: Params, state: State) -> tuple[State, jax.Array]:
    """Takes the first half of a step: reads each row's last token.

    The host computes the masks of `choose_masked` meanwhile.

    Args:
      model: the model.
      params: its parameters.
      state: the rows; its buffers are donated.

    Returns:
      The new state, and the logits of the next token, [B, V] float32.
    """
    state, logits = _read_last(model, params, state)
    return release(state), logits


def choose_masked(
    model: Transformer, state: State, logits: jax.Array, masks: np.ndarray
) -> tuple[State, Made]:
    """Takes the second half of a step: chooses the next token of each row.

    Args:
      model: the model.
      state: the rows.
      logits: see `forward`.
      masks: for each row, one bit a token that may be chosen, [B, ceil(V / 32)] int32.

    Returns:
      The new state, and the tokens, in one column.
    """
    new, made = _choose_masked(model, state.replace(cache=()), logits, masks)
    return new.replace(cache=state.cache), made


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _choose_masked(model, state, logits, masks):
    made = nothing(*logits.shape, 1).replace(left=state.left)
    return replicate(advance(state, made, jnp.int32(0), logits, model.rules, masks))


def first_step(model: Transformer, state: State, logits: jax.Array) -> tuple[State, Made]:
    """Chooses each row's first token from the logits [B, V] of `prefill`."""
    # Without the cache as an argument, one program serves caches of all sizes.
    new, made = _first_step(model, state.replace(cache=()), logits)
    return new.replace(cache=state.cache), made


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _first_step(model, state, logits):
    state, made = replicate(state), nothing(*logits.shape, 1)
    return replicate(advance(state, made, jnp.int32(0), logits, model.rules))


def nothing(rows: int, vocab_size: int, steps: int) -> Made:
    """Returns an empty `Made` with `steps` columns."""
    shape, top = (rows, steps), (rows, steps, min(MOST_TOP, vocab_size))
    return Made(
        tokens=jnp.full(shape, -1, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        top_tokens=jnp.zeros(top, jnp.int32),
        top_logprobs=jnp.zeros(top, jnp.float32),
        left=jnp.zeros(rows, jnp.int32),
    )


def advance(
    state: State,
    made: Made,
    step: jax.Array,
    logits: jax.Array,
    rules: Rules,
    masks: jax.Array | None = None,
) -> tuple[State, Made]:
    """Chooses a token for each row that has not ended, and appends it.

    Args:
      state: the rows.
      made: the output, which receives the tokens in column `step`.
      step: index of the column, int32.
      logits: logits of the model, [B, V] float32.
      rules: mesh axes of the logical axes; each device chooses for the rows that it holds.
      masks: for each row, one bit a token that may be chosen, [B, ceil(V / 32)] int32; None = all.

    Returns:
      The new state, and the new output.
    """
    positions, alive = state.positions + 1, state.left > 0
    # Otherwise all devices would synchronize at every attempt to draw a token of any row.
    weigh = by_rows(_choose, rules)
    sampling, wants_top = state.sampling.only(alive), state.wants_top & alive
    tokens, *odds = weigh(logits, sampling, positions, state.counts, wants_top, masks)
    stopped = jnp.take_along_axis(state.stops, tokens[:, None], axis=1)[:, 0]
    # If any logit is NaN or +infinity, or all are -infinity, every log-probability is NaN.
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


def _choose(logits, sampling, positions, counts, wants_top, masks):
    """Chooses tokens; returns their ids and log-probabilities, and those of the likeliest."""
    allowed = logits
    if masks is not None:
        bits = masks[..., None] >> jnp.arange(32, dtype=jnp.int32)[None, None]
        bits = bits.reshape(len(masks), -1)[:, : logits.shape[-1]] & jnp.int32(1)
        allowed = jnp.where(bits > 0, logits, -jnp.inf)
    tokens = choose(allowed, sampling, positions, counts)
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


@functools.partial(ModelJit, static_argnames=("model", "rows"), donate_argnames="state")
def decode(
    model: Transformer,
    params: Params,
    state: State,
    limit: np.int32,
    watched: np.ndarray,
    rows: int | None = None,
) -> tuple[State, Made]:
    """Takes up to `limit` steps; ends early if all rows end, or any watched row.

    Args:
      model: the model.
      params: its parameters.
      state: the rows; its buffers are donated.
      limit: maximum number of steps, at most `MOST_STEPS`.
      watched: rows whose slots are needed for waiting rows, [B] bool: the loop ends as soon as one
        of them has ended. If no row is watched, the loop ends when all rows have ended.
      rows: number of slots to run, from the first on; None = all.

    Returns:
      The new state, and the tokens of the rows that ran.
    """

    watched = watched[: rows or len(watched)]
    is_watched = jnp.any(watched)

    def goes_on(carry):
        state, _, step = carry
        # Both conditions share one reduction over the devices.
        found = jnp.where(is_watched, watched & (state.left <= 0), state.left > 0)
        return (step < limit) & (jnp.any(found) != is_watched)

    def take_step(carry):
        state, made, step = carry
        return *decode_step(model, params, state, made, step), step + 1

    whole, backend = state, model.backend
    if rows is not None:
        state = jax.tree.map(lambda x: from_bits(as_bits(x, backend)[:rows], x.dtype), state)
    made = nothing(*state.counts.shape, MOST_STEPS).replace(left=state.left)
    state, made, _ = jax.lax.while_loop(goes_on, take_step, (state, made, jnp.int32(0)))
    if rows is not None:
        put = functools.partial(put_rows, first=jnp.int32(0), backend=backend)
        state = jax.tree.map(put, whole, state)
    return release(state), replicate(made)


def shrinks(model: Transformer) -> bool:
    """Returns whether steps of fewer rows save more time than copying the rows' caches takes."""
    return model.backend.is_one_cpu


def put_rows(old: jax.Array, new: jax.Array, first: jax.Array, backend: Backend) -> jax.Array:
    """Writes `new` [R, ...] over the rows of `old` [B, ...] from row `first` on."""
    starts = (first, *[jnp.int32(0)] * (old.ndim - 1))
    bits = (as_bits(x, backend) for x in (old, new))
    return from_bits(jax.lax.dynamic_update_slice(*bits, starts), old.dtype)


def release(state: State) -> State:
    """Replicates all fields except the cache over the mesh.

    The host can then read them, and every program gets the state in the same layout.
    """
    return replicate(state.replace(cache=())).replace(cache=state.cache)
