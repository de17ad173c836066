"""What generation gives back: `Token` and `Completion`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from mistral_jax.engine.decode import Made
from mistral_jax.engine.prefill import NOT_FINITE


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
