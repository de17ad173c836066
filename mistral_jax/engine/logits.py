"""The choice of a token: `choose`, and `filter_logits`, which shows what it may choose from.

It runs no model. The order is the usual one (Transformers' and vLLM's): logit bias, penalties,
temperature, top-k, top-p, min-p. Tokens that tie for the last place all stay.
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

    A row draws from its own key, folded with the position: what its neighbours do changes nothing.

    Args:
      logits: the model's, [B, V] float32.
      sampling: how to choose, one entry a row.
      positions: place in its text of the token to be chosen, [B] int32.
      counts: how often each token stands in the row's answer, [B, V] int32; None = leave biases and
        penalties out.

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
    # By argmax it would take a CPU five times as long.
    likeliest = _first(~(logits < jnp.max(logits, axis=-1, keepdims=True)))

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
    """Divides by the temperature and sets to -inf what top-k, top-p and min-p exclude.

    It asks of each token what `choose` asks of those alone that it draws, so its work grows with
    the square of V: it is there to be looked at.

    Args:
      logits: [B, V] float32.
      sampling: how to choose; a row of temperature 0 is treated as of the smallest above 0.

    Returns:
      Logits of the distribution that tokens are drawn from, [B, V] float32; the largest is 0.
    """
    logits = _scale(logits, sampling)
    keeps = _keeper(logits, jnp.exp(logits), sampling)
    return jnp.where(jax.lax.map(keeps, logits.T).T, logits, -jnp.inf)


def _draw(logits: jax.Array, sampling: RowSampling, keys: jax.Array) -> jax.Array:
    """Draws, from all tokens, until the filters keep what is drawn.

    They keep whatever is likelier than what they keep. So it is enough to draw next from what is
    likelier than what was refused: it leaves the odds of those that are kept among each other as
    they are, and takes few tries, of some passes over the vocabulary each, where to find what is
    kept takes a sort, or a pass for each bit of a number.

    Args:
      logits: [B, V] float32.
      sampling: how to choose.
      keys: one a row, [B] random keys.

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
    """Divides by the temperature and keeps what top-k does; the largest becomes 0."""
    # It becomes 0 beforehand: even the smallest temperature then gives no NaN.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = shifted / jnp.maximum(sampling.temperature, _TINY)[:, None]
    # Conditional, since over a large vocabulary it costs as much as the rest together.
    return jax.lax.cond(
        jnp.any(sampling.top_k > 0), _keep_top_k, lambda x, _: x, logits, sampling.top_k
    )


def _keeper(logits, weights, sampling):
    """Returns what says whether top-p and min-p keep tokens of such scaled logits [B]."""
    total = jnp.sum(weights, axis=-1)
    # With a top_p of 0 the likeliest token stays.
    enough = jnp.where(sampling.top_p < 1, jnp.maximum(sampling.top_p * total, _TINY), jnp.inf)

    def keeps(level):
        likelier = jnp.sum(jnp.where(logits > level[:, None], weights, 0), axis=-1)
        refused = (likelier >= enough) | (level < jnp.log(sampling.min_p))
        # What has no odds is drawn only if nothing has: then no try would end the row's.
        return ~(refused & (level > -jnp.inf))

    return keeps


def _keep_top_k(logits, top_k):
    """Keeps each row's `top_k` [B] likeliest tokens, with all that tie for the last; 0 = all.

    Bisects the integers in 32 passes: for 32k tokens on a CPU some 30 times faster than a sort.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    # Unsigned integers in the order of the numbers: negatives reversed, below positives.
    sign = jnp.uint32(1 << 31)
    ranks = jnp.where(bits >= sign, ~bits, bits | sign)

    def halve(_, bounds):
        low, high = bounds
        middle = high - (high - low) // jnp.uint32(2)
        enough = jnp.sum(ranks >= middle[:, None], axis=-1, dtype=jnp.int32) >= top_k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - jnp.uint32(1))

    low = jnp.zeros(top_k.shape, jnp.uint32)
    least = jax.lax.fori_loop(0, 32, halve, (low, ~low))[0]
    return jnp.where((ranks >= least[:, None]) | (top_k == 0)[:, None], logits, -jnp.inf)


def _find(weights: jax.Array, numbers: jax.Array) -> jax.Array:
    """Finds the first of `weights` [B, V] up to which they reach the share `numbers` [B] of all.

    It is none that is 0, whatever the rounding, unless all are.
    """
    # In parts of about the root of their number: first which part, then which of its members.
    count = weights.shape[-1]
    size = 1 << (count.bit_length() - 1) // 2
    parts = jnp.pad(weights, ((0, 0), (0, -count % size))).reshape(len(weights), -1, size)
    sums = jnp.sum(parts, axis=-1)
    enough = numbers * jnp.sum(sums, axis=-1)
    part, before = _reach(sums, enough)
    members = jnp.take_along_axis(parts, part[:, None, None], axis=1)[:, 0]
    return part * size + _reach(members, enough - before)[0]


def _reach(weights, enough):
    """Finds where `weights` [B, n] add up to `enough` [B], or to all; and what is before."""
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    # Not by cumsum: each sum is of the same order, so it grows where there is a weight, and only
    # there.
    sums = jnp.sum(jnp.where(places[None] <= places[:, None], weights[:, None], 0), axis=-1)
    enough = jnp.clip(enough, _TINY, sums[:, -1])
    found = _first(sums >= enough[:, None])
    before = jnp.where(places[None] < found[:, None], weights, 0)
    return found, jnp.sum(before, axis=-1)


def _first(found: jax.Array) -> jax.Array:
    """Returns the first place of each row [B, n] that is true; the last if none is."""
    last = found.shape[-1] - 1
    places = jnp.arange(last + 1, dtype=jnp.int32)[None]
    return jnp.min(jnp.where(found, places, last), axis=-1)
