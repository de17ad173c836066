"""Log-probabilities of the tokens of a prompt, with the likeliest tokens at each position."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.engine.completion import Token
from mistral_jax.engine.prefill import (
    NOT_FINITE,
    Params,
    chunks,
    pad_rows,
    replicate,
    slots,
    start_reading,
)
from mistral_jax.engine.sampling import MOST_TOP
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import ModelJit
from mistral_jax.parallel.sharding import on_mesh


def prompt_logprobs(
    model: Transformer, params: Params, ids: Sequence[int], top: int
) -> list[Token | None]:
    """Reads a prompt in chunks, in a cache of its own.

    Args:
      model: the model.
      params: its parameters; the work runs on the devices that hold them.
      ids: token ids of the prompt.
      top: number of likeliest tokens to report at each position, at most `MOST_TOP`.

    Returns:
      One entry a token: its log-probability given the tokens before it, and the likeliest tokens
      in its place; None for the first token.

    Raises:
      ValueError: the model's logits are not finite.
    """
    rows = pad_rows(model, params, [list(ids)], ())
    found: list[Token | None] = [None]
    with on_mesh(params):
        cache, _ = start_reading(model, params, len(rows), slots(model, len(ids)))
        inputs, targets = ([row[cut] for row in rows] for cut in (slice(-1), slice(1, None)))
        read = functools.partial(chunks, backend=model.backend)
        for (tokens, positions), (following, _) in zip(read(inputs), read(targets), strict=True):
            cache, made = _read(model, params, tokens, positions, following, cache)
            odds, top_ids, top_odds = (np.asarray(part)[0] for part in made)
            for column in np.flatnonzero(positions[0] >= 0):
                logprob = float(odds[column])
                if math.isnan(logprob):
                    raise ValueError(f"token {len(found)} of the prompt: {NOT_FINITE}")
                likeliest = zip(top_ids[column], top_odds[column], strict=True)
                listed = {int(token): float(value) for token, value in [*likeliest][:top]}
                found.append(Token(int(following[0, column]), logprob, listed))
    return found


@functools.partial(ModelJit, static_argnames="model", donate_argnames="cache")
def _read(model, params, tokens, positions, targets, cache):
    """Reads a chunk; returns log-probabilities of targets [B, T] and of the likeliest tokens."""
    logits, cache = model.apply({"params": params}, tokens, positions, cache)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    likeliest = jax.lax.top_k(logprobs, min(MOST_TOP, logits.shape[-1]))
    return cache, replicate((chosen, likeliest[1], likeliest[0]))
