"""`Answer`: the handle of a request, which an `Engine` fills as tokens are generated."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mistral_jax.engine.admission import Row
from mistral_jax.engine.completion import Completion, Token
from mistral_jax.engine.text import RowText


class Piece(NamedTuple):
    """A token of an answer, with the text that became certain by it.

    Attributes:
      text: text that continues the previous pieces; "" while a character or a stop string may be
        incomplete; None without a tokenizer.
      token: token id; None in a last piece that only holds the rest of the text.
      logprob: see `Token`.
      top_logprobs: see `Token`.
    """

    text: str | None
    token: int | None
    logprob: float | None
    top_logprobs: dict[int, float | None]


class Answer:
    """The answer to a request that an `Engine` has accepted.

    Iterating over it yields each `Piece` as soon as it is generated. Any number of threads may
    iterate; each gets all pieces from the first on.

    Attributes:
      row: the row that the scheduler runs.
      is_cancelled: whether `cancel` was called.
    """

    def __init__(self, row: Row, text: RowText | None, engine: object):
        self.row, self.is_cancelled = row, False
        # This reference keeps an engine alive that nobody else refers to, until the answer ends.
        self._text, self._engine = text, engine
        self._began = time.perf_counter()
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._tokens: list[Token] = []
        self._times: list[float] = []
        self._completion: Completion | None = None
        self._failure: BaseException | None = None
        self._listener: Callable[[], None] = _ignore
        self._error: str | None = None

    def __iter__(self) -> Iterator[Piece]:
        """Yields pieces; raises what `result` raises, or a ValueError if the row failed."""
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
        """Whether the answer has ended."""
        return self._completion is not None or self._failure is not None

    def result(self, timeout: float | None = None) -> Completion:
        """Waits until the answer ends, and returns it.

        Args:
          timeout: maximum number of seconds to wait; None = no limit.

        Returns:
          The completion. Its `finish_reason` is "cancelled" if `cancel` ended it.

        Raises:
          TimeoutError: the answer has not ended in time.
          RuntimeError: the engine failed, or was closed before the answer ended.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} s")
        if self._failure is not None:
            raise RuntimeError(f"the engine ended: {self._failure}") from self._failure
        return self._completion

    @property
    def cached_tokens(self) -> int:
        """Number of tokens of the prompt that were restored from earlier texts, not read."""
        return self.row.cached

    def pieces(self, start: int = 0) -> list[Piece]:
        """Returns the pieces from index `start` on, without waiting."""
        with self._changed:
            return self._pieces[start:]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls a function now, and whenever pieces were added or the answer has ended.

        Args:
          listener: called from the engine's thread, so it must return at once, as
            `loop.call_soon_threadsafe` does. An exception of it is ignored.
        """
        with self._changed:
            self._listener = listener
        self._tell()

    def cancel(self) -> None:
        """Ends the answer after the engine's current turn; the tokens generated so far stay."""
        self.is_cancelled = True

    def push(self, token: Token) -> bool:
        """Appends a token; returns whether it completes a stop string.

        Only the engine's thread calls this.
        """
        text = None if self._text is None else self._text.push(token.id)
        with self._changed:
            self._tokens.append(token)
            self._times.append(time.perf_counter() - self._began)
            self._pieces.append(Piece(text, *token))
            self._changed.notify_all()
        self._tell()
        return self._text is not None and self._text.ended

    def fail(self, error: Exception) -> None:
        """Keeps what went wrong with this answer alone; its row ends as "error"."""
        self._text, self._error = None, f"the answer failed: {type(error).__name__}: {error}"

    def end(self, failure: BaseException | None = None) -> None:
        """Ends the answer with its row's finish reason, or with a failure of the engine.

        Only the engine's thread calls this.
        """
        with self._changed:
            self._failure = failure
            if failure is None:
                try:
                    self._completion = self._complete()
                except Exception as error:  # It must not end the answers of others.
                    self.fail(error)
                    self._completion = self._complete()
            self._engine = None
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(Exception):
            self._listener()

    def _complete(self) -> Completion:
        made = Completion.of(self._tokens, self.row.finish_reason, self._times)
        problem = self._error or self.row.problem
        if problem is not None:
            return dataclasses.replace(made, error=problem)
        if self._text is None:
            return made
        if rest := self._text.flush():
            self._pieces.append(Piece(rest, None, None, {}))
        return dataclasses.replace(made, text="".join(piece.text for piece in self._pieces))


def _ignore() -> None:
    """Does nothing."""
