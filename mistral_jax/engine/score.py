"""Scoring: the log-probabilities of given token ids (`likelihoods`) or of a text (`score`)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.engine.prefill import (
    NOT_FINITE,
    Params,
    Reading,
    chunk_width,
    chunks,
    cut,
    pad_rows,
    replicate,
    slots,
    start_reading,
)
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import ModelJit
from mistral_jax.parallel.sharding import on_mesh
from mistral_jax.tokens.tokenizer import Tokenizer

# Chunk widths, where they are below C. They are finer than those of prefill, because most rows are
# a single chunk, and a width costs few programs: all batches have one number of rows.
_WIDTHS = (16, 32, 64, 128, 256, 512, 1024)


class Likelihoods(NamedTuple):
    """The probability of each token of a row, given the tokens before it.

    Attributes:
      logprobs: natural logs of the probabilities of all tokens except the first, [T - 1] float32.
      greedy: whether each of these tokens is the likeliest, [T - 1] bool.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
    """The probability of a text under a model.

    Attributes:
      logprob: natural log of the text's probability, given BOS.
      tokens: number of tokens of the text, without BOS.
      bytes: length of the text in UTF-8.
      bits_per_byte: -logprob / ln 2 / bytes; lower is better.
    """

    logprob: float
    tokens: int
    bytes: int
    bits_per_byte: float


def score(model: Transformer, params: Params, tokenizer: Tokenizer, text: str) -> Score:
    """Scores a text of any length, in chunks that are read into a cache.

    The text may be longer than the model's `max_positions`. With a window in every layer, memory
    does not grow with its length.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      text: the text.

    Returns:
      Its log-probability, length, and bits per byte.

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
    """Scores rows of token ids of any lengths, in batches of rows of similar length.

    Only one chunk's logits are in memory at a time. With a window in every layer, the cache does
    not grow with the rows' length.

    Args:
      model: the model.
      params: its parameters; the work runs on the devices that hold them.
      rows: token ids; the first token of a row, usually BOS, is given, and the others are scored.
      batch: number of rows of a batch. A batch has this many rows, padded with empty ones, or one
        row, so that few programs are compiled.
      report: called after each chunk with the number of tokens scored so far, and the total.

    Returns:
      One entry a row, in order.

    Raises:
      ValueError: `batch` is less than 1, a row is empty, or a log-probability is not finite.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    if not all(map(len, rows)):
        raise ValueError("a row of token ids is empty; expected at least one token")
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


def endings(
    model: Transformer,
    params: Params,
    context: Sequence[int],
    rows: Sequence[Sequence[int]],
    prefixes: Prefixes | None = None,
) -> list[float]:
    """Scores several endings of one text. The model reads the text once.

    Args:
      model: the model.
      params: its parameters; the work runs on the devices that hold them.
      context: token ids of the text, at least one.
      rows: token ids of the endings, of any lengths above 0.
      prefixes: store of keys and values of earlier texts; None = the whole text is read.

    Returns:
      The log-probability of each ending, given the text: the sum over its tokens, in nats.

    Raises:
      ValueError: the text or an ending is empty, or a log-probability is not finite.
    """
    if not len(context) or not rows or not all(map(len, rows)):
        raise ValueError("the text or an ending is empty; expected at least one token of each")
    # The last token of the text is read with the endings: its logits score their first tokens.
    head, last = list(context[:-1]), list(context[-1:])
    whole = pad_rows(model, params, [[*head, *last, *row] for row in rows], ())
    longest = max(map(len, whole))
    heads = pad_rows(model, params, [head], head)
    reading = Reading(model, params, heads, slots(model, longest), prefixes)
    while reading.rest > 0:
        reading.read()
    found, start = [], len(head)
    with on_mesh(params):
        cache = _repeat(model, reading.cache, len(whole))
        while start < longest - 1:
            rest = longest - 1 - start
            width = chunk_width(len(whole), rest, model.backend, _WIDTHS)
            tokens, positions = cut([row[:-1] for row in whole], [start] * len(whole), width)
            following, _ = cut([row[1:] for row in whole], [start] * len(whole), width)
            cache, made = _score_chunk(model, params, tokens, positions, following, cache)
            found.append(jax.device_get(made[0]))
            start += width
    logprobs = np.concatenate(found, axis=1)
    sums = [math.fsum(own[: len(row)].tolist()) for own, row in zip(logprobs, rows, strict=False)]
    if not all(map(math.isfinite, sums)):
        raise ValueError(NOT_FINITE)
    return sums


@functools.partial(jax.jit, static_argnames=("model", "rows"))
def _repeat(model: Transformer, cache: Cache, rows: int) -> Cache:
    """Copies the first row of a cache to `rows` rows."""

    def copy(x, axes):
        x = jnp.broadcast_to(x[:1], (rows, *x.shape[1:]))
        return nn.with_logical_constraint(x, axes, rules=model.rules)

    return tuple(jax.tree.map(copy, layer, layer.logical_axes()) for layer in cache)


def _batches(lengths: Sequence[int], batch: int) -> Iterator[tuple[list[int], int]]:
    """Yields the indices of rows that are scored together, and the number of rows of their arrays.

    A row that is so long that more than half of its batch would be padding gets a batch of its own.
    """
    # The longest rows come first, so that a lack of memory shows at once.
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
    """Scores rows together; the arrays of all rows have the length of the longest, or more."""
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
        if len(parts) > 1:  # A single chunk needs no cache.
            cache, _ = start_reading(model, params, len(rows), slots(model, longest))
        for (tokens, positions), (following, _) in parts:
            cache, made = _score_chunk(model, params, tokens, positions, following, cache)
            # The device computes this chunk while the host waits for the previous one.
            if waiting is not None:
                take()
            waiting = positions, made
    take()
    logprobs, greedy = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return list(zip(logprobs, greedy, strict=True))


@functools.partial(ModelJit, static_argnames="model", donate_argnames="cache")
def _score_chunk(model, params, tokens, positions, targets, cache):
    """Reads a chunk; returns each target's log-probability and whether it is the likeliest."""
    logits, cache = model.apply({"params": params}, tokens, positions, cache)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    greedy = jax.lax.argmax(logits, 2, jnp.int32) == targets
    return cache, replicate((logprobs, greedy))
