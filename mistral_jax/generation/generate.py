"""Token ids in, token ids out: the two drivers `generate` and `stream_tokens`. It knows no text.

Both drive the loop of `decode.py`; what differs is only who waits for its tokens.
"""

import dataclasses
import functools
import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mistral_jax.distributed import from_first
from mistral_jax.generation.decode import MOST_STEPS, Made, State, decode, first_step, start
from mistral_jax.generation.prefill import Params, pad_rows, prefill
from mistral_jax.generation.sampling import DEFAULT, RowSampling, Sampling
from mistral_jax.model.transformer import Transformer
from mistral_jax.sharding import on_mesh

# Seconds for which a reader of a stream waits without noticing, and those for which a program does
# that waits for all. Each return from the device takes a millisecond.
_PATIENCE, _LONG_PATIENCE = 0.05, 0.5


class Token(NamedTuple):
    """A token that was chosen.

    Attributes:
      id: the token.
      logprob: natural log of its probability under the model's own distribution, before bias,
        penalties, temperature and filters.
      top_logprobs: the same of the likeliest tokens, by id, likeliest first.
    """

    id: int
    logprob: float
    top_logprobs: dict[int, float]

    @classmethod
    def of(cls, made: Made, row: int, column: int) -> "Token":
        """Takes a token out of what the device made."""
        top = zip(
            made.top_tokens[row, column].tolist(),
            made.top_logprobs[row, column].tolist(),
            strict=True,
        )
        place = row, column
        return cls(int(made.tokens[place]), float(made.logprobs[place]), dict(top))


@dataclasses.dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    Attributes:
      tokens: ids, up to but without the stop token.
      logprobs: of each token; see `Token`.
      finish_reason: "stop" (a stop token or string, or `until` said so) or "length".
      top_logprobs: of each token; see `Token`.
      text: the tokens as text, up to but without a stop string; None where only ids were asked for.
      first_seconds: time from the request to the first token, compilation included.
      seconds: time from the request to the last token.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[dict[int, float]]
    text: str | None = None
    first_seconds: float = dataclasses.field(default=0.0, compare=False)
    seconds: float = dataclasses.field(default=0.0, compare=False)

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
            first_seconds=min(times, default=0.0),
            seconds=max(times, default=0.0),
        )


def generate(
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    stop_ids: Sequence[int] | None = None,
    top_logprobs: int = 0,
    until: Callable[[int, int], bool] | None = None,
) -> list[Completion]:
    """Continues token ids.

    Args:
      model: the model.
      params: its parameters; the work is spread over the devices that they are spread over.
      prompts: token ids, one sequence a row, of any lengths; the first is BOS as a rule.
      max_new_tokens: most tokens to add to a row.
      sampling: how to choose tokens. One for all rows: then row i draws from (seed, i), and equal
        prompts get different answers. Or one a row: then each row draws as it would alone.
      stop_ids: tokens that end a row; None = the config's `eos_ids`, () = none.
      top_logprobs: number of likeliest tokens whose log-probabilities are wanted at each place.
      until: called with the row and the token for each token in turn; True ends the row after it.

    Returns:
      One completion a prompt, in order.

    Raises:
      ValueError: an argument is out of range, or a row could outgrow the model's `max_positions`.
    """
    began = time.perf_counter()
    state = _begin(model, params, prompts, max_new_tokens, sampling, stop_ids, top_logprobs)
    rows: list[list[Token]] = [[] for _ in prompts]
    seconds = [[] for _ in prompts]
    ended = np.zeros(len(prompts), bool)
    patience = _LONG_PATIENCE if until is None else _PATIENCE
    for row, token in _tokens(model, params, *state, ended, patience):
        rows[row].append(token)
        seconds[row].append(time.perf_counter() - began)
        ended[row] = until is not None and until(row, token.id)
    return [
        Completion.of(
            tokens, "length" if len(tokens) == max_new_tokens and not end else "stop", times
        )
        for tokens, end, times in zip(rows, ended, seconds, strict=True)
    ]


def stream_tokens(
    model: Transformer,
    params: Params,
    prompt: Sequence[int],
    max_new_tokens: int = 64,
    *,
    sampling: Sampling = DEFAULT,
    stop_ids: Sequence[int] | None = None,
    top_logprobs: int = 0,
) -> Iterator[Token]:
    """Continues one row of token ids, token by token: the same tokens as `generate` makes of it.

    Arguments and errors are those of `generate`; they are checked, and the prompt is read, before
    the first token is asked for.
    """
    state = _begin(model, params, [prompt], max_new_tokens, sampling, stop_ids, top_logprobs)
    tokens = _tokens(model, params, *state, np.zeros(1, bool), _PATIENCE)
    return (token for _, token in tokens)


def _begin(
    model, params, prompts, max_new_tokens, sampling, stop_ids, top_logprobs
) -> tuple[State, jax.Array]:
    """Checks a request, reads its prompts; returns the state and the logits of the first tokens."""
    config = model.config
    stop_ids = config.eos_ids if stop_ids is None else tuple(stop_ids)
    _check_request(config, prompts, max_new_tokens, stop_ids, top_logprobs)
    if isinstance(sampling, Sampling):
        samplings, draws = [sampling] * len(prompts), range(len(prompts))
    else:
        samplings, draws = list(sampling), [0] * len(prompts)
    if len(samplings) != len(prompts):
        raise ValueError(
            f"there are {len(samplings)} samplings for {len(prompts)} prompts; expected one, or one"
            " for each"
        )
    # Empty rows, which end at once, fill the parts of a batch that is split over devices.
    prompts = pad_rows(model, params, prompts, ())
    samplings = pad_rows(model, params, samplings, DEFAULT)
    draws = pad_rows(model, params, draws, 0)
    rows = RowSampling.stack(samplings, draws, prompts, config.vocab_size)
    lengths = [len(prompt) for prompt in prompts]
    cache, logits = prefill(model, params, prompts, max(lengths) + max_new_tokens)
    state = start(cache, lengths, max_new_tokens, rows, stop_ids, top_logprobs, config.vocab_size)
    return state, logits


def _tokens(model, params, state, logits, ended, patience) -> Iterator[tuple[int, Token]]:
    """Yields (row, token) as they are made, until all rows end; the caller may set `ended` [B].

    They come one, then two, then four at a time, while that takes fewer seconds than `patience`.
    """
    limit = 1
    padded = np.zeros(state.left.shape, bool)
    with on_mesh(params):
        state = first_step(model, state, logits)
    while True:
        made = jax.device_get(state.made)
        for row, column in np.argwhere(made.tokens[: len(ended)] >= 0):
            if not ended[row]:
                yield int(row), Token.of(made, row, column)
        padded[: len(ended)] = ended
        if not np.any(np.asarray(state.left)[~padded]):
            return
        began = time.perf_counter()
        with on_mesh(params):
            state = jax.block_until_ready(decode(model, params, state, np.int32(limit), padded))
        # By one clock: of two processes that take different numbers of steps, one waits forever.
        if limit < MOST_STEPS and from_first(functools.partial(_is_quick, began, patience)):
            limit = min(2 * limit, MOST_STEPS)


def _is_quick(began: float, patience: float) -> bool:
    return time.perf_counter() - began < patience


def _check_request(config, prompts, max_new_tokens, stop_ids, top_logprobs) -> None:
    if not _is_count(max_new_tokens, 1):
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected an integer above 0")
    if not _is_count(top_logprobs, 0) or top_logprobs > config.vocab_size:
        raise ValueError(
            f"top_logprobs is {top_logprobs!r}; expected an integer from 0 to {config.vocab_size}"
        )
    if len(prompts) == 0:
        raise ValueError("there are no prompts; expected at least one")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty; expected at least the BOS token")
        if len(prompt) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which with {max_new_tokens} new ones exceed "
                f"the model's {config.max_positions} positions; shorten it, ask for fewer, or "
                "raise max_positions of the model's config (--max-positions on the command line)"
            )
    for name, ids in [("stop_ids", stop_ids), *((f"prompt {i}", p) for i, p in enumerate(prompts))]:
        for token in ids:
            if not _is_count(token, 0) or token >= config.vocab_size:
                raise ValueError(
                    f"{name} has {token!r}; expected token ids from 0 to {config.vocab_size - 1}"
                )


def _is_count(value, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least
