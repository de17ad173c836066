"""The likelihood of what is written: `likelihoods` of token ids, `score` of a text.

Both take texts of any length. They choose no tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.engine.prefill import (
    NOT_FINITE,
    Params,
    chunks,
    pad_rows,
    replicate,
    slots,
    start_reading,
)
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import on_mesh
from mistral_jax.tokens.tokenizer import Tokenizer

# Widths of chunks: all batches have one number of rows, and most rows are one chunk.
_WIDTHS = (16, 32, 64, 128, 256, 512, 1024)


class Likelihoods(NamedTuple):
    """How likely a model finds each token of a row, given those before it.

    Attributes:
      logprobs: natural logs of the probabilities of all tokens but the first, [T - 1] float32.
      greedy: whether each of them is the model's own first choice, [T - 1] bool.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


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
      ValueError: the text is empty, or the model's logits are not finite.
    """
    if not text:
        raise ValueError("the text is empty; expected at least one character to score")
    ids = tokenizer.encode(text, bos=True)
    (row,) = likelihoods(model, params, [ids], 1)
    logprob = math.fsum(row.logprobs.tolist())
    size = len(text.encode())
    return Score(logprob, len(ids) - 1, size, -logprob / math.log(2) / size)


def likelihoods(
    model: Transformer,
    params: Params,
    rows: Sequence[Sequence[int]],
    batch: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Likelihoods]:
    """Scores rows of token ids of any lengths, in batches of rows of like lengths.

    Logits are never held of more than one chunk, and the cache of a windowed model does not grow.

    Args:
      model: the model.
      params: its parameters; the work is spread over the devices that they are spread over.
      rows: token ids; the first of a row is given, BOS as a rule, and the others are scored.
      batch: rows at a time. All batches have as many, or one: few shapes are few programs to
        compile.
      report: called again and again with the number of tokens scored so far, and of all.

    Returns:
      One entry a row, in order.

    Raises:
      ValueError: `batch` is not above 0, a row is empty, or a log-probability is not finite.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    if not all(map(len, rows)):
        raise ValueError("a row of token ids is empty; expected at least the token that is given")
    found: list[Likelihoods] = [None] * len(rows)
    done, total = 0, sum(len(row) - 1 for row in rows)

    def count(tokens):
        nonlocal done
        done += tokens
        report(done, total)

    for indices, size in _batches(list(map(len, rows)), batch):
        together = [rows[i] for i in indices] + [()] * (size - len(indices))
        scored = _batch(model, params, pad_rows(model, params, together, ()), count)
        for i, (logprobs, greedy) in zip(indices, scored, strict=False):
            length = len(rows[i]) - 1
            finite = np.isfinite(logprobs[:length])
            if not finite.all():
                raise ValueError(
                    f"token {np.argmin(finite) + 1} of row {i} has a log-probability of "
                    f"{logprobs[np.argmin(finite)]}: {NOT_FINITE}"
                )
            found[i] = Likelihoods(logprobs[:length], greedy[:length])
    return found


def _batches(lengths: Sequence[int], batch: int) -> Iterator[tuple[list[int], int]]:
    """Yields indices of rows that are scored together, and the number of rows of their arrays.

    All batches have one size, or are of one row: one that is so long that most places of its batch
    would be padding pays for itself alone.
    """
    # The longest first: what memory cannot hold fails at once.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size, start = min(batch, len(lengths)), 0
    while start < len(order):
        indices = order[start : start + size]
        places = [-(-max(lengths[i] - 1, 1) // _WIDTHS[0]) for i in indices]
        if size * places[0] > 2 * sum(places):
            indices = indices[:1]
        yield indices, size if len(indices) > 1 else 1
        start += len(indices)


def _batch(model, params, rows, count) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores rows together; returns arrays that are longer than shorter rows."""
    inputs, targets = [row[:-1] for row in rows], [row[1:] for row in rows]
    longest = max(map(len, inputs))
    if not longest:
        return [(np.zeros(0, np.float32), np.zeros(0, bool))] * len(rows)
    cut = functools.partial(chunks, widths=_WIDTHS, backend=model.backend)
    parts = list(zip(cut(inputs), cut(targets), strict=True))
    cache, found, waiting = None, [], None

    def take():
        positions, made = waiting
        found.append(jax.device_get(made))
        count(int(np.count_nonzero(positions >= 0)))

    with on_mesh(params):
        if len(parts) > 1:  # What fits in one chunk is not remembered.
            cache, _ = start_reading(model, params, len(rows), slots(model, longest))
        for (tokens, positions), (following, _) in parts:
            cache, made = _score_chunk(model, params, tokens, positions, following, cache)
            # The device works on a chunk while the host waits for the one before, never longer.
            if waiting is not None:
                take()
            waiting = positions, made
    take()
    logprobs, greedy = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return list(zip(logprobs, greedy, strict=True))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _score_chunk(model, params, tokens, positions, targets, cache):
    """Reads one chunk; returns each target's log-probability and whether it is the likeliest."""
    logits, cache = model.apply({"params": params}, tokens, positions, cache)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    greedy = jax.lax.argmax(logits, 2, jnp.int32) == targets
    return cache, replicate((logprobs, greedy))
