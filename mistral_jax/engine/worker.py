"""The thread of an `Engine`: `Worker` passes requests to the scheduler, and tokens to answers."""

import threading
import time
from collections.abc import Callable
from concurrent import futures

from mistral_jax.engine.admission import Row
from mistral_jax.engine.answer import Answer
from mistral_jax.engine.completion import Token
from mistral_jax.engine.scheduler import Scheduler

_TOTALS = ("finished", "cancelled", "failed", "prompt_tokens", "new_tokens")


class Busy(RuntimeError):
    """Raised when the engine has as many requests as it accepts."""


class Worker:
    """The state that the engine's thread shares with callers.

    It has no reference to the engine, so that the thread does not keep a dropped engine alive.
    """

    def __init__(self, scheduler: Scheduler, most: int, most_tokens: int):
        """Makes a worker whose thread has not been started.

        Args:
          scheduler: runs the rows.
          most: number of requests that are accepted at a time.
          most_tokens: number of tokens of prompts that may wait.
        """
        self._scheduler, self._most, self._most_tokens = scheduler, most, most_tokens
        self._changed = threading.Condition()
        self._accepted: list[Answer] = []
        self._live: dict[Row, Answer] = {}
        self._tasks: list[tuple[Callable[[], None], futures.Future]] = []
        self._closed = ""
        self._stopping = False
        self._failure: BaseException | None = None
        self._totals = dict.fromkeys(_TOTALS, 0)
        self._last_turn = time.perf_counter()

    def accept(self, answers: list[Answer]) -> None:
        """Appends answers to those that wait."""
        with self._changed:
            self._check()
            count = len(self._accepted) + len(self._live)
            if len(answers) > self._most:
                raise ValueError(
                    f"n is {len(answers)}, and the engine accepts {self._most} requests at a "
                    "time; ask for fewer, or make it with a larger most_waiting"
                )
            self._check_tokens(answers[0].row)
            if count + len(answers) > self._most:
                raise Busy(
                    f"the engine has {count} requests, and accepts {self._most}; try again later, "
                    "or make it with a larger most_waiting"
                )
            self._accepted += answers
            self._changed.notify_all()

    def call(self, task: Callable[[], None]) -> None:
        """Runs a task in the engine's thread once no request is left, and waits for its end."""
        future = futures.Future()
        with self._changed:
            self._check()
            self._tasks.append((task, future))
            self._changed.notify_all()
        future.result()

    def drain(self, timeout: float | None) -> bool:
        """Accepts no more answers, and waits for the end of all others; see `Engine.drain`."""
        with self._changed:
            self._closed = self._closed or "it is being drained"
            self._changed.wait_for(lambda: not (self._accepted or self._live), timeout)
            return not (self._accepted or self._live)

    def stop(self) -> None:
        """Lets the thread end after its current turn."""
        with self._changed:
            self._closed, self._stopping = "it was closed", True
            self._changed.notify_all()

    @property
    def failure(self) -> str | None:
        """Why the thread has ended; None = it has not, or `stop` was called."""
        return None if self._failure is None else f"the engine ended: {self._failure}"

    def stats(self) -> dict[str, int | float]:
        """Returns the entries of `Engine.stats` that change with requests."""
        with self._changed:
            count = len(self._accepted) + len(self._live)
            running = min(self._scheduler.running, count)
            since = time.perf_counter() - self._last_turn if count else 0.0
            now = {"running": running, "waiting": count - running}
            return now | self._totals | {"seconds_since_step": since}

    def run(self) -> None:
        """Takes turns until `stop` is called or an error occurs; runs in the engine's thread."""
        try:
            while self._next():
                self._turn()
            error: BaseException = RuntimeError("it was closed before the end")
        except BaseException as caught:
            error = caught
        with self._changed:
            if not self._stopping:
                self._failure = error
            left = [*self._live.values(), *self._accepted]
            tasks, self._tasks = self._tasks, []
            self._live.clear()
            self._accepted.clear()
            self._totals["failed"] += len(left)
            self._changed.notify_all()
        for answer in left:
            answer.end(error)
        for _, future in tasks:
            future.set_exception(error)

    def _check_tokens(self, row: Row) -> None:
        """Raises `Busy` if too many tokens of prompts would wait together with a row."""
        rows = (*self._live, *(answer.row for answer in self._accepted))
        # All answers of a request have one prompt, which is read once.
        waiting = sum(len(own.prompt) for own in rows if own.chosen == own.draw == 0)
        if waiting and waiting + len(row.prompt) > self._most_tokens:
            raise Busy(
                f"{waiting} tokens of prompts wait, and the engine accepts {self._most_tokens}; "
                "try again later, or make it with a larger most_waiting_tokens"
            )

    def _check(self) -> None:
        """Raises a RuntimeError if the engine accepts no more requests."""
        if self._failure is not None:
            raise RuntimeError(f"the engine ended: {self._failure}") from self._failure
        if self._closed:
            raise RuntimeError(f"the engine takes no requests: {self._closed}; make another")

    def _next(self) -> bool:
        """Waits for work, and runs a task, if any; returns whether the thread goes on."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._accepted or self._tasks or self._live
            )
            for answer in self._accepted:
                self._live[answer.row] = answer
                self._scheduler.add(answer.row)
            self._accepted.clear()
            task = self._tasks.pop(0) if self._tasks and not self._live else None
            stopping = self._stopping
        if task is not None and not stopping:
            work, future = task
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
                raise
        return not stopping

    def _turn(self) -> None:
        """Takes a turn of the scheduler, and passes its tokens to the answers."""
        for row, answer in self._live.items():
            if answer.is_cancelled:
                self._scheduler.end(row, "cancelled")
        self._sweep()
        for row, token in self._scheduler.step():
            if token is None:
                self._sweep()
            elif reason := self._push(self._live[row], token):
                self._scheduler.end(row, reason)
        self._sweep()
        self._last_turn = time.perf_counter()

    @staticmethod
    def _push(answer: Answer, token: Token) -> str | None:
        """Passes a token to an answer; returns why the answer ends with it, or None."""
        try:
            return "stop" if answer.push(token) else None
        except Exception as error:  # It must not end the answers of others.
            answer.fail(error)
            return "error"

    def _sweep(self) -> None:
        """Ends the answers whose rows have ended."""
        ended = [answer for row, answer in self._live.items() if row.finish_reason is not None]
        for answer in ended:
            answer.end()
            row = answer.row
            kinds = {"cancelled": "cancelled", "error": "failed"}
            with self._changed:
                del self._live[row]
                self._totals[kinds.get(row.finish_reason, "finished")] += 1
                self._totals["prompt_tokens"] += len(row.prompt)
                self._totals["new_tokens"] += len(row.tokens)
                self._changed.notify_all()
