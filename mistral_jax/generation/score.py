"""The likelihood of a text: `score`, of texts of any length. It chooses no tokens."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.generation.prefill import Params, chunks, empty_cache, pad_rows, replicate, room
from mistral_jax.model.transformer import Transformer
from mistral_jax.sharding import on_mesh
from mistral_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds a text.

    Attributes:
      logprob: natural log of the text's probability, given BOS.
      tokens: number of its tokens, without BOS.
      bytes: its length in UTF-8.
      bits_per_byte: length of its code under the model, -logprob / ln 2 / bytes; less is better.
    """

    logprob: float
    tokens: int
    bytes: int
    bits_per_byte: float


def score(model: Transformer, params: Params, tokenizer: Tokenizer, text: str) -> Score:
    """Scores a text of any length, in chunks through the cache.

    A text may be longer than the model's `max_positions`: with a window, its memory does not grow.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      text: what to score.

    Raises:
      ValueError: the text is empty.
    """
    if not text:
        raise ValueError("the text is empty; expected at least one character to score")
    ids = tokenizer.encode(text, bos=True)
    inputs, targets = (pad_rows(model, params, [row], ()) for row in (ids[:-1], ids[1:]))
    length = room(len(ids))
    cache, sums = None, []
    with on_mesh(params):
        for (tokens, positions), (following, _) in zip(
            chunks(inputs), chunks(targets), strict=True
        ):
            cache, logprob = _score_chunk(
                model, params, tokens, positions, following, cache, length
            )
            sums.append(logprob)
    logprob = math.fsum(np.concatenate(jax.device_get(sums)).tolist())
    size = len(text.encode())
    return Score(logprob, len(ids) - 1, size, -logprob / math.log(2) / size)


@functools.partial(jax.jit, static_argnames=("model", "length"), donate_argnames="cache")
def _score_chunk(model, params, tokens, positions, targets, cache, length):
    """Reads one chunk; returns the log-probability of each target of row 0, 0 for padding."""
    if cache is None:
        cache = empty_cache(model, tokens.shape[0], length)
    logits, cache = model.apply({"params": params}, tokens, positions, cache)
    chosen = jnp.take_along_axis(logits[0], targets[0, :, None], axis=1)[:, 0]
    logprob = jnp.where(positions[0] >= 0, chosen - jax.nn.logsumexp(logits[0], axis=-1), 0)
    return cache, replicate(logprob)
