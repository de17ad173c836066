"""Generation from token ids to token ids: `generate` and `stream_tokens`.

Both run their rows with a `Scheduler` of their own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mistral_jax.engine.admission import Row
from mistral_jax.engine.completion import Completion, Token
from mistral_jax.engine.prefill import NOT_FINITE, Params, slots
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.engine.request import Request, check
from mistral_jax.engine.sampling import DEFAULT, Sampling, settle
from mistral_jax.engine.scheduler import Scheduler
from mistral_jax.model.transformer import Transformer

# `patience` of the scheduler, in seconds: for a reader who follows the tokens, and for a program
# that waits for all of them. Each return from the device to the host costs about a millisecond.
_PATIENCE, _LONG_PATIENCE = 0.05, 0.5

# Default maximum number of new tokens.
NEW_TOKENS = 256

# Maximum number of rows that run at a time, maximum number of cache slots of all rows together, and
# the number of rows that may run even if they exceed that.
MOST_SLOTS, MOST_PLACES, FEWEST_SLOTS = 32, 32 * 4096, 8


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
    prefixes: Prefixes | None = None,
    **fields: Any,
) -> list[Completion]:
    """Continues prompts of token ids.

    Any number of prompts run in a bounded number of slots. When a row ends, its slot is given to
    the next prompt.

    Args:
      model: the model.
      params: its parameters; the work runs on the devices that hold them.
      prompts: token ids, one sequence or array a row, of any lengths; the first is usually BOS.
      max_new_tokens: maximum number of tokens to add to a row.
      sampling: how to choose tokens. With one `Sampling` for all rows, row i draws from (seed, i),
        so equal prompts get different answers. With a list of one for each row, each row draws as
        it would alone.
      stop_ids: tokens that end a row; None = the config's `eos_ids`, () = none.
      top_logprobs: number of likeliest tokens to report at each position, 0 to 20.
      until: called for each token with the row's index and the token; if it returns True, the row
        ends after this token.
      prefixes: store of keys and values of earlier calls, which are reused for prompts that begin
        with the same tokens; None = every prompt is read whole.
      **fields: fields of `Sampling` by name, such as temperature=0.2; they replace those of
        `sampling`.

    Returns:
      One completion a prompt, in order. A row whose logits are not finite ends with the
      `finish_reason` "error" and the tokens chosen so far; the other rows go on.

    Raises:
      ValueError: an argument is of the wrong type or out of range, or a prompt and its new tokens
        exceed the model's `max_positions`.
    """
    began = time.perf_counter()
    sampling = settle(sampling, fields)
    request = check(model.config, prompts, max_new_tokens, sampling, stop_ids, top_logprobs)
    patience = _LONG_PATIENCE if until is None else _PATIENCE
    scheduler, rows = _begin(model, params, request, patience, prefixes)
    numbers = {row: number for number, row in enumerate(rows)}
    tokens: list[list[Token]] = [[] for _ in rows]
    seconds: list[list[float]] = [[] for _ in rows]
    while scheduler.busy:
        for row, token in scheduler.step():
            if token is None:
                continue
            number = numbers[row]
            tokens[number].append(token)
            seconds[number].append(time.perf_counter() - began)
            if until is not None and until(number, token.id):
                scheduler.end(row, "stop")
    found = zip(tokens, rows, seconds, strict=True)
    return [Completion.of(own, row.finish_reason, times) for own, row, times in found]


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
    """Continues one prompt of token ids, and yields the tokens of `generate` one by one.

    The arguments and errors are those of `generate`. The call itself checks the arguments and reads
    the prompt. A row that `generate` would end with "error" raises a ValueError.
    """
    request = check(
        model.config, [prompt], max_new_tokens, settle(sampling, fields), stop_ids, top_logprobs
    )
    scheduler, (row,) = _begin(model, params, request, _PATIENCE)
    scheduler.read()

    def tokens():
        while scheduler.busy:
            for _, token in scheduler.step():
                if token is not None:
                    yield token
        if row.finish_reason == "error":
            raise ValueError(NOT_FINITE)

    return tokens()


def _begin(
    model: Transformer,
    params: Params,
    request: Request,
    patience: float,
    prefixes: Prefixes | None = None,
) -> tuple[Scheduler, list[Row]]:
    """Makes a scheduler for a request, and adds its rows; returns both."""
    length = max(map(len, request.prompts)) + request.new_tokens
    most = max(FEWEST_SLOTS, min(MOST_SLOTS, MOST_PLACES // slots(model, length)))
    count = min(most, len(request.prompts))
    scheduler = Scheduler(model, params, count, length, patience, prefixes=prefixes)
    each = zip(request.prompts, request.samplings, request.draws, strict=True)
    rows = [
        Row(tuple(prompt), request.new_tokens, sampling, draw, request.stop_ids, request.top)
        for prompt, sampling, draw in each
    ]
    for row in rows:
        scheduler.add(row)
    return scheduler, rows
