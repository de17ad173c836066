"""The results of generation: `Token` and `Completion`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from mistral_jax.engine.decode import Made
from mistral_jax.engine.prefill import NOT_FINITE


class Token(NamedTuple):
    """A generated token.

    Attributes:
      id: token id.
      logprob: natural log of its probability under the model's own distribution, before bias,
        penalties, temperature and filters; None if the probability is 0.
      top_logprobs: log-probabilities of the likeliest tokens by id, likeliest first.
    """

    id: int
    logprob: float | None
    top_logprobs: dict[int, float | None]

    @classmethod
    def of(cls, made: Made, row: int, column: int, top: int) -> "Token":
        """Reads the token of a row and column of `made`, with the `top` likeliest."""
        place = row, column
        ids, odds = made.top_tokens[place][:top].tolist(), made.top_logprobs[place].tolist()
        likeliest = zip(ids, map(_finite, odds), strict=False)
        return cls(int(made.tokens[place]), _finite(float(made.logprobs[place])), dict(likeliest))


def _finite(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None


@dataclasses.dataclass(frozen=True)
class Completion:
    """The tokens that were generated after a prompt.

    Attributes:
      tokens: token ids, without the stop token.
      logprobs: log-probability of each token; see `Token`.
      finish_reason: "stop" (by a stop token, a stop string, or `until`), "length" (the maximum
        number of tokens), "error" (see `error`), or "cancelled" (`Answer.cancel`).
      top_logprobs: log-probabilities of the likeliest tokens at each position; see `Token`.
      text: the tokens as text, without the stop string; None if only ids were requested.
      first_seconds: seconds from the request to the first token, compilation included.
      seconds: seconds from the request to the last token.
      error: a sentence that says why the row failed; None if it did not fail.
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
        """Builds a completion from tokens and their times, in seconds since the request."""
        return cls(
            tokens=[token.id for token in tokens],
            logprobs=[token.logprob for token in tokens],
            finish_reason=finish_reason,
            top_logprobs=[token.top_logprobs for token in tokens],
            error=NOT_FINITE if finish_reason == "error" else None,
            first_seconds=min(times, default=0.0),
            seconds=max(times, default=0.0),
        )
