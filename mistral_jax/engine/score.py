"""Scoring: the log-probabilities of given token ids (`likelihoods`) or of a text (`score`)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.engine.batches import (
    Pool,
    alternatives,
    batches,
    count_tokens,
    ends_only,
    pick_rows,
)
from mistral_jax.engine.logits import first_true
from mistral_jax.engine.prefill import (
    NOT_FINITE,
    Params,
    chunk_width,
    cut,
    pad_rows,
    replicate,
    slots,
    start_reading,
)
from mistral_jax.engine.shared import Segment, plan
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import ModelJit
from mistral_jax.parallel.sharding import on_mesh
from mistral_jax.tokens.tokenizer import Tokenizer

# Chunk widths, where they are below C. They are finer than those of prefill, because most rows are
# a single chunk, and a width costs few programs: all batches have one number of rows.
_WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
# Widths of rows with shared tokens on a CPU, which computes padding as slowly as tokens. What
# follows a shared segment is often short, and then much of a coarse width would be padding.
_FINE_WIDTHS = (
    *range(8, 32, 4),
    *range(32, 64, 8),
    *(size * quarters // 4 for size in (64, 128, 256, 512) for quarters in (4, 5, 6, 7)),
    1024,
)


class Likelihoods(NamedTuple):
    """The probability of each token of a row, given the tokens before it.

    Attributes:
      logprobs: natural logs of the probabilities of the tokens that are not given, which are all
        except the first by default, [T - 1] float32.
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
    given: Sequence[int] | None = None,
) -> list[Likelihoods]:
    """Scores rows of token ids of any lengths, in batches of rows of similar length.

    Tokens that rows have in common at their beginning are read once; see `shared.plan`. Only one
    chunk's logits are in memory at a time. With a window in every layer, the cache does not grow
    with the rows' length.

    Args:
      model: the model.
      params: its parameters; the work runs on the devices that hold them.
      rows: token ids; the first tokens of a row are given, and the others are scored.
      batch: number of rows of a batch. A batch has this many rows, padded with empty ones, or one
        row, so that few programs are compiled.
      report: called after each chunk with the number of tokens read so far, and the total.
      given: number of tokens of each row that are given, at least 1; None = 1, which is usually
        BOS.

    Returns:
      One entry a row, in order.

    Raises:
      ValueError: `batch` is less than 1, a row is empty, `given` does not fit the rows, or a
        log-probability is not finite.
    """
    found: list[Likelihoods] = [None] * len(rows)
    for row, own in each_likelihood(model, params, rows, batch, report, given):
        found[row] = own
    return found


def each_likelihood(
    model: Transformer,
    params: Params,
    rows: Sequence[Sequence[int]],
    batch: int,
    report: Callable[[int, int], None] = lambda done, total: None,
    given: Sequence[int] | None = None,
) -> Iterator[tuple[int, Likelihoods]]:
    """Does what `likelihoods` does, and yields the index and scores of each row when it is done."""
    given = [1] * len(rows) if given is None else given
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    if not all(map(len, rows)):
        raise ValueError("a row of token ids is empty; expected at least one token")
    for row, (own, count) in enumerate(zip(rows, given, strict=True)):
        if not 1 <= count <= len(own):
            raise ValueError(
                f"{count} tokens of row {row} are given; expected at least 1 and at most all "
                f"{len(own)}"
            )
    return _Scoring(model, params, rows, given, batch, report).run()


class _Scoring:
    """The state of a call of `each_likelihood`."""

    def __init__(self, model, params, rows, given, batch, report):
        self._model, self._params, self._rows = model, params, rows
        self._given, self._report = given, report
        self._roots = plan(rows, given)
        is_fine = model.backend.platform == "cpu" and any(own.children for own in self._roots)
        self._widths = _FINE_WIDTHS if is_fine else _WIDTHS
        self._size = min(batch, len(rows))
        lengths = [len(row) - count for row, count in zip(rows, given, strict=True)]
        self._found = [Likelihoods(np.zeros(n, np.float32), np.zeros(n, bool)) for n in lengths]
        self._left = lengths
        self._done, self._total = 0, sum(map(count_tokens, self._roots))

    def run(self) -> Iterator[tuple[int, Likelihoods]]:
        """Yields rows and their scores."""
        for row, left in enumerate(self._left):
            if not left:
                yield row, self._found[row]
        waiting = None
        # The device computes a chunk while the host waits for the previous one.
        for call in self._read(self._roots, (), None):
            if waiting is not None:
                yield from self._take(*waiting)
            waiting = call
        if waiting is not None:
            yield from self._take(*waiting)

    def _read(self, segments, places, parents) -> Iterator[tuple]:
        """Dispatches all chunks of segments and their descendants.

        Args:
          segments: segments that begin at position 0 or follow rows of `parents`.
          places: for each segment, the row of its parent in `parents`.
          parents: a cache; None = the segments have no parent.
        """
        pool = Pool()
        for indices, size in self._divide(segments):
            some = [segments[i] for i in indices]
            count = len(pad_rows(self._model, self._params, [None] * size, None))
            cache = parents
            if parents is not None:
                chosen = np.zeros(count, np.int32)
                chosen[: len(some)] = [places[i] for i in indices]
                with on_mesh(self._params):
                    cache = pick_rows(self._model, parents, chosen)
            cache = yield from self._chunks(some, count, cache)
            below = [(child, row) for row, own in enumerate(some) for child in own.children]
            if below and not pool.takes(cache):
                yield from self._read(*pool.empty())
            if below:
                pool.add(cache, below)
            if pool.is_full:
                yield from self._read(*pool.empty())
        if pool.caches:
            yield from self._read(*pool.empty())

    def _divide(self, segments) -> Iterator[tuple[list[int], int]]:
        """Yields what `batches` does; a batch needs the logits of ends, or those of all tokens."""
        kinds = [ends_only(own) for own in segments]
        for kind in (True, False):
            alike = [i for i, own in enumerate(kinds) if own is kind]
            lengths = [segments[i].stop - segments[i].start for i in alike]
            for indices, size in batches(lengths, self._size):
                yield [alike[i] for i in indices], size

    def _chunks(self, some, count, cache) -> Iterator[tuple]:
        """Dispatches the chunks of a batch of segments; returns their cache."""
        padding = count - len(some)
        texts = [self._rows[own.row][: own.stop] for own in some] + [()] * padding
        following = [self._rows[own.row][1 : own.stop + 1] for own in some] + [()] * padding
        starts, ends = (
            [*(getattr(own, name) for own in some), *[0] * padding] for name in ("start", "stop")
        )
        rest = max(own.stop - own.start for own in some)
        width = self._width(count, rest)
        if cache is None and (width < rest or any(own.children for own in some)):
            length = self._slots(max(own.reach for own in some))
            with on_mesh(self._params):
                cache, _ = start_reading(self._model, self._params, count, length)
        # Targets of the last position of each segment, where rows may go on differently.
        lasts = [self._last_targets(own) for own in some]
        others = np.zeros((count, alternatives(max(map(len, lasts)))), np.int32)
        for row, last in enumerate(lasts):
            others[row, : len(last)] = list(last)
        by_ends = all(map(ends_only, some))
        while rest > 0:
            width = self._width(count, rest)
            tokens, positions = cut(texts, starts, width)
            at = np.subtract(ends, starts, dtype=np.int32) - np.int32(1)
            targets = None if by_ends else cut(following, starts, width)[0]
            with on_mesh(self._params):
                cache, made = _score_chunk(
                    *(self._model, self._params, tokens, positions),
                    *(targets, np.clip(at, 0, width - 1), others, cache),
                )
            yield made, some, lasts, starts, width, int(np.count_nonzero(positions >= 0))
            starts = [start + width for start in starts]
            rest -= width
        return cache

    def _width(self, count, rest) -> int:
        return chunk_width(count, rest, self._model.backend, self._widths)

    def _slots(self, reach) -> int:
        """Returns the slots of a cache for texts of up to `reach` tokens."""
        length = slots(self._model, reach)
        spans = set(self._model.config.spans)
        if self._model.backend.platform == "cpu" and spans == {length} and reach < length:
            # With a slot less than the window has keys, no token can overwrite another one, so
            # attention need not put the cache and the chunk in order.
            return length - 1
        return length

    def _last_targets(self, segment: Segment) -> dict[int, int]:
        """Returns the distinct tokens to score after a segment, with their places."""
        after = (self._rows[row][segment.stop] for row, _ in segment.asked)
        return {token: place for place, token in enumerate(dict.fromkeys(after))}

    def _take(self, made, some, lasts, starts, width, count) -> Iterator[tuple[int, Likelihoods]]:
        """Stores the scores of a chunk; yields the rows that are complete."""
        (logprobs, greedy), (last_logprobs, last_greedy) = jax.device_get(made)
        for place, (own, last, start) in enumerate(zip(some, lasts, starts, strict=False)):
            stop = min(start + width, own.stop)
            for row, first in own.asked:
                low, at = max(first, start), self._given[row] - 1
                if low >= stop:
                    continue
                kept, found = slice(low - at, stop - at), self._found[row]
                if stop == own.stop:
                    which = place, last[self._rows[row][stop]]
                    found.logprobs[stop - 1 - at] = last_logprobs[which]
                    found.greedy[stop - 1 - at] = last_greedy[which]
                    kept = slice(low - at, stop - 1 - at)
                inner = place, slice(low - start, low - start + kept.stop - kept.start)
                if kept.start < kept.stop:
                    found.logprobs[kept] = logprobs[inner]
                    found.greedy[kept] = greedy[inner]
                self._left[row] -= stop - low
                if not self._left[row]:
                    self._check(row)
                    yield row, found
        self._done += count
        self._report(self._done, self._total)

    def _check(self, row: int) -> None:
        logprobs = self._found[row].logprobs
        finite = np.isfinite(logprobs)
        if not finite.all():
            where = np.argmin(finite)
            raise ValueError(
                f"token {self._given[row] + where} of row {row} has a log-probability of "
                f"{logprobs[where]}: {NOT_FINITE}"
            )


@functools.partial(ModelJit, static_argnames="model", donate_argnames="cache")
def _score_chunk(model, params, tokens, positions, targets, at, others, cache):
    """Reads a chunk; returns log-probabilities of targets and whether they are the likeliest.

    Args:
      tokens, positions: the chunk, [B, T].
      targets: the token after each position, [B, T]; None = they are not scored.
      at: column of the last token of each row, [B].
      others: tokens that may follow it, [B, A].
      cache: the cache; None = the chunk is all that is read.
    """
    logits, cache = model.apply(
        {"params": params}, tokens, positions, cache, logits_at=at if targets is None else None
    )
    largest = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1)) + largest[..., 0]
    best = first_true(logits >= largest)
    column = jnp.zeros_like(at) if targets is None else at

    def pick(x):
        return jnp.take_along_axis(x, column.reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    chosen = jnp.take_along_axis(pick(logits)[:, 0], others, axis=-1)
    found = chosen - pick(total), others == pick(best)
    if targets is None:
        return cache, replicate((found, found))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return cache, replicate(((chosen - total, best == targets), found))
