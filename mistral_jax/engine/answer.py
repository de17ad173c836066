"""`Answer`: what an `Engine` gives back at once, and fills as tokens are made."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from mistral_jax.engine.admission import Row
from mistral_jax.engine.completion import Completion, Token
from mistral_jax.engine.text import RowText


class Piece(NamedTuple):
    """A token of an answer, and the text that is certain since it came.

    Attributes:
      text: what follows the pieces before; "" while a character or a stop string may be unfinished,
        None without a tokenizer.
      token: its id; None in a last piece, which brings what was held back.
      logprob: see `Token`.
      top_logprobs: see `Token`.
    """

    text: str | None
    token: int | None
    logprob: float | None
    top_logprobs: dict[int, float | None]


class Answer:
    """The answer to a request that an `Engine` has accepted.

    Iterating over it yields each `Piece` as it comes, from the first on, in any number of threads.

    Attributes:
      row: what the scheduler knows of it.
      is_cancelled: whether its reader does not want it any more.
    """

    def __init__(self, row: Row, text: RowText | None, engine: object):
        self.row, self.is_cancelled = row, False
        # An engine that nobody else refers to still ends what it has accepted.
        self._text, self._engine = text, engine
        self._began = time.perf_counter()
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._tokens: list[Token] = []
        self._times: list[float] = []
        self._completion: Completion | None = None
        self._failure: BaseException | None = None

    def __iter__(self) -> Iterator[Piece]:
        """Yields pieces; raises as `result` does, and a ValueError for a row that failed."""
        count = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._pieces) > count or self.done)  # noqa: B023
                pieces = self._pieces[count:]
            yield from pieces
            count += len(pieces)
            if self.done and count == len(self._pieces):
                error = self.result().error
                if error is not None:
                    raise ValueError(error)
                return

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._completion is not None or self._failure is not None

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end.

        Args:
          timeout: seconds to wait at most; None = as long as it takes.

        Returns:
          The completion. Its `finish_reason` is "cancelled" where `cancel` ended it.

        Raises:
          TimeoutError: it has not ended in time.
          RuntimeError: the engine has failed, or was closed before the end.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} s")
        if self._failure is not None:
            raise RuntimeError(f"the engine ended: {self._failure}") from self._failure
        return self._completion

    def cancel(self) -> None:
        """Ends it as soon as the engine's present step is done; what was made stays."""
        self.is_cancelled = True

    def push(self, token: Token) -> bool:
        """Takes a token, in the engine's thread; returns whether a stop string has come."""
        text = None if self._text is None else self._text.push(token.id)
        with self._changed:
            self._tokens.append(token)
            self._times.append(time.perf_counter() - self._began)
            self._pieces.append(Piece(text, *token))
            self._changed.notify_all()
        return self._text is not None and self._text.ended

    def end(self, failure: BaseException | None = None) -> None:
        """Ends it, in the engine's thread: as its row has, or by a failure of the engine."""
        with self._changed:
            self._failure = failure
            if failure is None:
                self._completion = self._complete()
            self._engine = None
            self._changed.notify_all()

    def _complete(self) -> Completion:
        text = None
        if self._text is not None:
            if rest := self._text.flush():
                self._pieces.append(Piece(rest, None, None, {}))
            text = "".join(piece.text for piece in self._pieces)
        made = Completion.of(self._tokens, self.row.finish_reason, self._times)
        return dataclasses.replace(made, text=text)
