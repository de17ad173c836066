"""Checks of the arguments of generation: `check` turns them into a `Request` of known types."""

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from mistral_jax.base.fields import show
from mistral_jax.config import ModelConfig
from mistral_jax.engine.sampling import MOST_TOP, Sampling


class Request(NamedTuple):
    """The checked arguments of a call of `generate`.

    Attributes:
      prompts: token ids of each row.
      new_tokens: maximum number of tokens to add to a row.
      samplings: how to choose the tokens of each row.
      draws: index of each row among the rows that share its seed.
      stop_ids: tokens that end a row.
      top: number of likeliest tokens to report at each position, with their log-probabilities.
    """

    prompts: list[list[int]]
    new_tokens: int
    samplings: list[Sampling]
    draws: list[int]
    stop_ids: list[int]
    top: int


def check(
    config: ModelConfig,
    prompts: Any,
    new_tokens: Any,
    sampling: Sampling | Sequence[Sampling],
    stop_ids: Any,
    top: Any,
) -> Request:
    """Checks the arguments of `generate`.

    Args:
      config: the model's architecture.
      prompts: token ids of each row, in sequences or arrays of any library.
      new_tokens: maximum number of tokens to add to a row.
      sampling: what `sampling.settle` returns: one for all rows, or one for each.
      stop_ids: tokens that end a row; None = the config's `eos_ids`.
      top: number of likeliest tokens to report at each position.

    Raises:
      ValueError: an argument is of the wrong type or out of range, or a prompt and its new tokens
        exceed the model's `max_positions`.
    """
    size = config.vocab_size
    rows = _rows(prompts, size)
    count = whole(new_tokens)
    if count is None or count < 1:
        raise ValueError(f"max_new_tokens is {show(new_tokens)}; expected an integer above 0")
    for i, row in enumerate(rows):
        if len(row) + count > config.max_positions:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens, which with {count} new ones exceed "
                f"the model's {config.max_positions} positions; shorten it, ask for fewer, or "
                "raise max_positions of the model's config (--max-positions on the command line)"
            )
    most, likeliest = min(MOST_TOP, size), whole(top)
    if likeliest is None or not 0 <= likeliest <= most:
        raise ValueError(f"top_logprobs is {show(top)}; expected an integer from 0 to {most}")
    alike = isinstance(sampling, Sampling)
    samplings = [sampling] * len(rows) if alike else list(sampling)
    if len(samplings) != len(rows):
        raise ValueError(
            f"there are {len(samplings)} samplings for {len(rows)} prompts; expected one, or one"
            " for each"
        )
    for one in samplings:
        one.check(size)
    draws = list(range(len(rows))) if alike else [0] * len(rows)
    stops = list(config.eos_ids) if stop_ids is None else _ids(stop_ids, "stop_ids", size)
    return Request(rows, count, samplings, draws, stops, likeliest)


def whole(value: Any) -> int | None:
    """Converts an integer of any library to an int; returns None for any other value."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def listed(value: Any) -> list | None:
    """Converts a sequence, or an array of any library, to a list; returns None for other values."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        return None
    return list(value)


def _rows(prompts, vocab_size):
    rows = listed(prompts)
    if rows is None:
        raise ValueError(
            f"prompts is {show(prompts)}; expected token ids, one sequence a row, such as "
            "[[1, 5, 9]] (`complete` takes texts)"
        )
    if not rows:
        raise ValueError("there are no prompts; expected at least one")
    if all(whole(row) is not None for row in rows):
        raise ValueError(
            f"prompts is {show(rows)}, a flat sequence of ids; expected one sequence a row, such "
            "as [[1, 5, 9]]"
        )
    found = [_ids(row, f"prompt {i}", vocab_size) for i, row in enumerate(rows)]
    for i, row in enumerate(found):
        if not row:
            raise ValueError(f"prompt {i} is empty; expected at least the BOS token")
    return found


def _ids(value, name, vocab_size):
    items = listed(value)
    if items is None:
        raise ValueError(f"{name} is {show(value)}; expected a sequence of token ids")
    ids = [whole(item) for item in items]
    for item, token in zip(items, ids, strict=True):
        if token is None or not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} has {show(item)}; expected token ids from 0 to {vocab_size - 1}"
            )
    return ids
