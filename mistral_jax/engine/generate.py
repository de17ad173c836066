"""Token ids in, token ids out: the two drivers `generate` and `stream_tokens`. It knows no text.

Both drive the loop of `decode.py`; what differs is only who waits for its tokens.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mistral_jax.engine.decode import MOST_STEPS, Made, State, decode, first_step, hold, start
from mistral_jax.engine.prefill import NOT_FINITE, Params, pad_rows, prefill, row_count
from mistral_jax.engine.request import Request, check
from mistral_jax.engine.sampling import DEFAULT, RowSampling, Sampling, settle
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.distributed import from_first
from mistral_jax.parallel.sharding import on_mesh

# Seconds for which a reader of a stream waits without noticing, and those for which a program does
# that waits for all. Each return from the device takes a millisecond.
_PATIENCE, _LONG_PATIENCE = 0.05, 0.5

# Most tokens to make, unless a caller says otherwise.
NEW_TOKENS = 256


class Token(NamedTuple):
    """A token that was chosen.

    Attributes:
      id: the token.
      logprob: natural log of its probability under the model's own distribution, before bias,
        penalties, temperature and filters; None if that is 0.
      top_logprobs: the same of the likeliest tokens, by id, likeliest first.
    """

    id: int
    logprob: float | None
    top_logprobs: dict[int, float | None]

    @classmethod
    def of(cls, made: Made, row: int, column: int, top: int) -> "Token":
        """Takes a token out of what the device made, with the `top` likeliest."""
        place = row, column
        ids, odds = made.top_tokens[place][:top].tolist(), made.top_logprobs[place].tolist()
        likeliest = zip(ids, map(_finite, odds), strict=False)
        return cls(int(made.tokens[place]), _finite(float(made.logprobs[place])), dict(likeliest))


def _finite(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    Attributes:
      tokens: ids, up to but without the stop token.
      logprobs: of each token; see `Token`.
      finish_reason: "stop" (a stop token or string, or `until` said so), "length", or "error".
      top_logprobs: of each token; see `Token`.
      text: the tokens as text, up to but without a stop string; None where only ids were asked for.
      first_seconds: time from the request to the first token, compilation included.
      seconds: time from the request to the last token.
      error: why the row could not go on, in a sentence; None if it could.
    """

    tokens: list[int]
    logprobs: list[float | None]
    finish_reason: str
    top_logprobs: list[dict[int, float | None]]
    text: str | None = None
    first_seconds: float = dataclasses.field(default=0.0, compare=False)
    seconds: float = dataclasses.field(default=0.0, compare=False)
    error: str | None = None

    @classmethod
    def of(
        cls, tokens: Sequence[Token], finish_reason: str, times: Sequence[float]
    ) -> "Completion":
        """Gathers tokens and the times at which they came."""
        return cls(
            tokens=[token.id for token in tokens],
            logprobs=[token.logprob for token in tokens],
            finish_reason=finish_reason,
            top_logprobs=[token.top_logprobs for token in tokens],
            error=NOT_FINITE if finish_reason == "error" else None,
            first_seconds=min(times, default=0.0),
            seconds=max(times, default=0.0),
        )


def generate(
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = NEW_TOKENS,
    *,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    stop_ids: Sequence[int] | None = None,
    top_logprobs: int = 0,
    until: Callable[[int, int], bool] | None = None,
    **fields: Any,
) -> list[Completion]:
    """Continues token ids.

    Args:
      model: the model.
      params: its parameters; the work is spread over the devices that they are spread over.
      prompts: token ids, one sequence or array a row, of any lengths; the first is BOS as a rule.
      max_new_tokens: most tokens to add to a row.
      sampling: how to choose tokens. One for all rows: then row i draws from (seed, i), and equal
        prompts get different answers. Or one a row: then each row draws as it would alone.
      stop_ids: tokens that end a row; None = the config's `eos_ids`, () = none.
      top_logprobs: number of likeliest tokens whose log-probabilities are wanted at each place, 0
        to 20.
      until: called with the row and the token for each token in turn; True ends the row after it.
      **fields: fields of `Sampling` by name, such as temperature=0.2; they replace those of
        `sampling`.

    Returns:
      One completion a prompt, in order. A row whose logits are not finite ends with what it has, as
      "error"; the others go on.

    Raises:
      ValueError: an argument is out of range, or a row could outgrow the model's `max_positions`.
    """
    began = time.perf_counter()
    sampling = settle(sampling, fields)
    request = check(model.config, prompts, max_new_tokens, sampling, stop_ids, top_logprobs)
    state = _begin(model, params, request)
    count = len(request.prompts)
    rows: list[list[Token]] = [[] for _ in range(count)]
    seconds = [[] for _ in range(count)]
    ended, failed = np.zeros(count, bool), np.zeros(count, bool)
    patience = _LONG_PATIENCE if until is None else _PATIENCE
    for row, token in _tokens(model, params, *state, request.top, ended, failed, patience):
        rows[row].append(token)
        seconds[row].append(time.perf_counter() - began)
        ended[row] = until is not None and until(row, token.id)

    def reason(row):
        if failed[row]:
            return "error"
        return "length" if len(rows[row]) == request.new_tokens and not ended[row] else "stop"

    return [Completion.of(rows[row], reason(row), seconds[row]) for row in range(count)]


def stream_tokens(
    model: Transformer,
    params: Params,
    prompt: Sequence[int],
    max_new_tokens: int = NEW_TOKENS,
    *,
    sampling: Sampling = DEFAULT,
    stop_ids: Sequence[int] | None = None,
    top_logprobs: int = 0,
    **fields: Any,
) -> Iterator[Token]:
    """Continues one row of token ids, token by token: the same tokens as `generate` makes of it.

    Arguments and errors are those of `generate`; they are checked, and the prompt is read, before
    the first token is asked for. Where `generate` ends a row as "error", it raises ValueError.
    """
    request = check(
        model.config, [prompt], max_new_tokens, settle(sampling, fields), stop_ids, top_logprobs
    )
    state = _begin(model, params, request)

    def tokens():
        ended, failed = np.zeros(1, bool), np.zeros(1, bool)
        for _, token in _tokens(model, params, *state, request.top, ended, failed, _PATIENCE):
            yield token
        if failed[0]:
            raise ValueError(NOT_FINITE)

    return tokens()


def _begin(model: Transformer, params: Params, request: Request) -> tuple[State, jax.Array]:
    """Reads a request's prompts; returns the state and the logits of the first tokens."""

    def fill(rows, row):
        # Empty rows, which end at once, make few sizes of batches, and fill the parts of one that
        # is split over devices.
        return pad_rows(model, params, [*rows, *[row] * (row_count(len(rows)) - len(rows))], row)

    vocab_size = model.config.vocab_size
    prompts, samplings = fill(request.prompts, ()), fill(request.samplings, DEFAULT)
    rows = RowSampling.stack(samplings, fill(request.draws, 0), prompts, vocab_size)
    lengths = [len(prompt) for prompt in prompts]
    cache, logits = prefill(model, params, prompts, max(lengths) + request.new_tokens)
    cache, wants_top = hold(model, cache), request.top > 0
    state = start(cache, lengths, request.new_tokens, rows, request.stop_ids, wants_top, vocab_size)
    return state, logits


def _tokens(
    model, params, state, logits, top, ended, failed, patience
) -> Iterator[tuple[int, Token]]:
    """Yields (row, token) as they are made, until all rows end; the caller may set `ended` [B].

    They come one, then two, then four at a time, while that takes fewer seconds than `patience`. In
    the end `failed` [B] tells the rows whose logits were not finite.
    """
    limit = 1
    padded = np.zeros(state.left.shape, bool)
    with on_mesh(params):
        state = first_step(model, state, logits)
    while True:
        made, left, bad = jax.device_get((state.made, state.left, state.failed))
        for row, column in np.argwhere(made.tokens[: len(ended)] >= 0):
            if not ended[row]:
                yield int(row), Token.of(made, row, column, top)
        padded[: len(ended)] = ended
        if not np.any(left[~padded]):
            failed[:] = bad[: len(ended)] & ~ended
            return
        began = time.perf_counter()
        with on_mesh(params):
            state = jax.block_until_ready(decode(model, params, state, np.int32(limit), padded))
        # By one clock: of two processes that take different numbers of steps, one waits forever.
        if limit < MOST_STEPS and from_first(functools.partial(_is_quick, began, patience)):
            limit = min(2 * limit, MOST_STEPS)


def _is_quick(began: float, patience: float) -> bool:
    return time.perf_counter() - began < patience
