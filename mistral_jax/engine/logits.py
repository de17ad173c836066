"""Sampling: `choose` draws the next token of each row from its logits.

The steps have the order of Transformers and vLLM: logit bias, penalties, temperature, top-k, top-p,
min-p. Filters keep all tokens that tie with the last token kept.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.engine.sampling import Penalties, RowSampling

_TINY = np.finfo(np.float32).tiny


def choose(
    logits: jax.Array, sampling: RowSampling, positions: jax.Array, counts: jax.Array | None
) -> jax.Array:
    """Chooses one token a row.

    Each row draws with its own key, folded with the position, so other rows do not affect it.

    Args:
      logits: logits of the model, [B, V] float32.
      sampling: how each row chooses.
      positions: position in the row's text of the token to be chosen, [B] int32.
      counts: number of times that each token occurs in the row's answer, [B, V] int32; None = apply
        no biases and penalties.

    Returns:
      Token ids, [B] int32.
    """
    if counts is not None:
        logits = jax.lax.cond(
            jnp.any(sampling.penalties.apply),
            penalize,
            lambda logits, *_: logits,
            *(logits, sampling.penalties, counts),
        )
    likeliest = first_true(~(logits < jnp.max(logits, axis=-1, keepdims=True)))

    def drawn_or_likeliest():
        def fold(words, position):
            return jax.random.fold_in(
                jax.random.wrap_key_data(words, impl="threefry2x32"), position
            )

        drawn = _draw(logits, sampling, jax.vmap(fold)(sampling.key, positions))
        return jnp.where(sampling.temperature > 0, drawn, likeliest)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn_or_likeliest, lambda: likeliest)


def penalize(logits: jax.Array, penalties: Penalties, counts: jax.Array) -> jax.Array:
    """Adds the logit bias and applies the penalties; see `Sampling` for their definitions."""
    logits = logits + penalties.bias
    factor = penalties.repetition[:, None]
    shrunk = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(penalties.in_prompt | (counts > 0), shrunk, logits)
    presence = penalties.presence[:, None] * (counts > 0).astype(jnp.float32)
    return logits - presence - penalties.frequency[:, None] * counts.astype(jnp.float32)


def filter_logits(logits: jax.Array, sampling: RowSampling) -> jax.Array:
    """Divides logits by the temperature and sets tokens that the filters exclude to -inf.

    This shows the distribution that `choose` draws from. It tests every token, where `choose` only
    tests the tokens that it draws, so its cost grows with V squared.

    Args:
      logits: logits after bias and penalties, [B, V] float32.
      sampling: how each row chooses; a temperature of 0 is treated as the smallest above 0.

    Returns:
      Logits of the distribution that tokens are drawn from, [B, V] float32; the largest is 0.
    """
    logits = _scale(logits, sampling)
    keeps = _keeper(logits, jnp.exp(logits), sampling)
    return jnp.where(jax.lax.map(keeps, logits.T).T, logits, -jnp.inf)


def _draw(logits: jax.Array, sampling: RowSampling, keys: jax.Array) -> jax.Array:
    """Draws from all tokens, again and again until the filters keep the token drawn.

    The filters always keep a prefix of the tokens sorted by probability. So after a rejection it
    suffices to draw from the tokens likelier than the rejected one; the kept tokens' relative
    probabilities stay the same. A few attempts cost less than a sort that finds the prefix.

    Args:
      logits: logits after bias and penalties, [B, V] float32.
      sampling: how each row chooses.
      keys: random keys, [B].

    Returns:
      Token ids, [B] int32.
    """
    logits = _scale(logits, sampling)
    weights = jnp.exp(logits)
    keeps = _keeper(logits, weights, sampling)
    uniform = functools.partial(jax.random.uniform, dtype=jnp.float32)

    def draw(state):
        tokens, refused, going, tries = state
        numbers = jax.vmap(lambda key: uniform(jax.random.fold_in(key, tries)))(keys)
        drawn = _find(jnp.where(logits > refused[:, None], weights, 0), numbers)
        level = jnp.take_along_axis(logits, drawn[:, None], axis=1)[:, 0]
        tokens = jnp.where(going, drawn, tokens)
        return tokens, level, going & ~keeps(level), tries + 1

    rows = logits.shape[:1]
    start = (
        jnp.zeros(rows, jnp.int32),
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.ones(rows, bool),
    )
    return jax.lax.while_loop(lambda state: jnp.any(state[2]), draw, (*start, np.uint32(0)))[0]


def _scale(logits, sampling):
    """Shifts the largest logit to 0, divides by the temperature, and applies top-k."""
    # The shift comes first, so that dividing by the smallest temperature gives no NaN.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = shifted / jnp.maximum(sampling.temperature, _TINY)[:, None]
    # For a large vocabulary, top-k costs as much as all other steps together.
    return jax.lax.cond(
        jnp.any(sampling.top_k > 0), _keep_top_k, lambda x, _: x, logits, sampling.top_k
    )


def _keeper(logits, weights, sampling):
    """Returns a function of scaled logits [B] that says whether top-p and min-p keep the tokens."""
    total = jnp.sum(weights, axis=-1)
    # With a top_p of 0, only the likeliest token is kept.
    enough = jnp.where(sampling.top_p < 1, jnp.maximum(sampling.top_p * total, _TINY), jnp.inf)

    def keeps(level):
        likelier = jnp.sum(jnp.where(logits > level[:, None], weights, 0), axis=-1)
        refused = (likelier >= enough) | (level < jnp.log(sampling.min_p))
        # A token of probability 0 is drawn only if all have probability 0. It is kept, or the loop
        # would never end.
        return ~(refused & (level > -jnp.inf))

    return keeps


def _keep_top_k(logits, top_k):
    """Keeps each row's `top_k` [B] likeliest tokens, and those that tie with the last; 0 = all.

    It bisects for the bits of the smallest logit to keep, in 32 passes. For 32k tokens on a CPU
    this is about 30 times faster than a sort.
    """
    # Map unsigned integers to floats of the same order: negatives reversed, below positives.
    sign = jnp.uint32(1 << 31)

    def level(rank):
        bits = jnp.where(rank >= sign, rank ^ sign, ~rank)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def halve(_, bounds):
        low, high = bounds
        middle = high - (high - low) // jnp.uint32(2)
        enough = jnp.sum(logits >= level(middle), axis=-1, dtype=jnp.int32) >= top_k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - jnp.uint32(1))

    # The lowest and the highest of the ranks that are numbers: -inf and inf.
    infinity = jnp.uint32(0x7F800000)
    low, high = (
        jnp.full(top_k.shape, x, jnp.uint32) for x in (~(infinity | sign), infinity | sign)
    )
    least = jax.lax.fori_loop(0, 32, halve, (low, high))[0]
    return jnp.where((logits >= level(least)) | (top_k == 0)[:, None], logits, -jnp.inf)


def _find(weights: jax.Array, numbers: jax.Array) -> jax.Array:
    """Finds the first index at which the cumulative sum of `weights` reaches a share of the total.

    The weight at this index is never 0, despite rounding, unless all weights are 0.

    Args:
      weights: [B, V] float32.
      numbers: the share of each row, [B] float32 from 0 to 1.
    """
    # Search in two levels: first among about sqrt(V) parts, then within the part.
    count = weights.shape[-1]
    size = 1 << (count.bit_length() - 1) // 2
    parts = jnp.pad(weights, ((0, 0), (0, -count % size))).reshape(len(weights), -1, size)
    sums = jnp.sum(parts, axis=-1)
    enough = numbers * jnp.sum(sums, axis=-1)
    part, before = _reach(sums, enough)
    members = jnp.take_along_axis(parts, part[:, None, None], axis=1)[:, 0]
    return part * size + _reach(members, enough - before)[0]


def _reach(weights, enough):
    """Finds the first index at which the cumulative sum of `weights` [B, n] reaches `enough` [B].

    Returns:
      The index, and the sum of the weights before it, both [B].
    """
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    # Not by cumsum, which may round partial sums differently: here all are added in the same order,
    # so they grow exactly where a weight is not 0.
    sums = jnp.sum(jnp.where(places[None] <= places[:, None], weights[:, None], 0), axis=-1)
    enough = jnp.clip(enough, _TINY, sums[:, -1])
    found = first_true(sums >= enough[:, None])
    before = jnp.where(places[None] < found[:, None], weights, 0)
    return found, jnp.sum(before, axis=-1)


def first_true(found: jax.Array) -> jax.Array:
    """Returns the first index of each row [..., n] that is true; the last index if none is.

    On a CPU, XLA's argmax takes five times as long.
    """
    last = found.shape[-1] - 1
    places = jax.lax.broadcasted_iota(jnp.int32, found.shape, found.ndim - 1)
    return jnp.min(jnp.where(found, places, last), axis=-1)
