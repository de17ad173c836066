"""Token ids in, token ids out: `generate` and `stream_tokens`. They know no text.

Both are clients of a `Scheduler`; what differs is only who waits for its tokens.
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

# Seconds for which a reader of a stream waits without noticing, and those for which a program does
# that waits for all. Each return from the device takes a millisecond.
_PATIENCE, _LONG_PATIENCE = 0.05, 0.5

# Most tokens to make, unless a caller says otherwise.
NEW_TOKENS = 256

# Rows that run at a time: at most so many, fewer where their caches would hold more tokens in all
# than this, but never less than the last.
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
    """Continues token ids.

    Any number of prompts run in a bounded number of slots: a row that ends makes room for the next.

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
      prefixes: what earlier calls have read, for prompts that begin with the same tokens; None =
        each prompt is read.
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
    """Continues one row of token ids, token by token: the same tokens as `generate` makes of it.

    Arguments and errors are those of `generate`; they are checked, and the prompt is read, before
    the first token is asked for. Where `generate` ends a row as "error", it raises ValueError.
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
    """Returns what will run a request, and its rows."""
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
