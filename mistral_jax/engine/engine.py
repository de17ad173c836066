"""`Engine`: continuous batching for requests of many threads.

An engine is a `Scheduler` in a thread of its own, with a queue of requests and their texts.
"""

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.engine.admission import Row
from mistral_jax.engine.answer import Answer
from mistral_jax.engine.generate import NEW_TOKENS
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.engine.request import check, listed, whole
from mistral_jax.engine.sampling import DEFAULT, Sampling
from mistral_jax.engine.scheduler import Scheduler
from mistral_jax.engine.text import RowText, conversation, encode_prompt, settle_text
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel import distributed
from mistral_jax.tokens.tokenizer import Tokenizer

# `patience` and `stall` of the scheduler, in seconds.
_PATIENCE, _STALL = 0.05, 0.1
# Default `length` for models in which a layer has no window.
_LENGTH = 4096
_TOTALS = ("finished", "cancelled", "failed", "prompt_tokens", "new_tokens")


class Busy(RuntimeError):
    """Raised when the engine has as many requests as it accepts."""


class Engine:
    """Serves requests of many threads with one model, by continuous batching.

    The answer to a request does not depend on other requests. After `warm_up`, no request compiles
    a program.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        length: int | None = None,
        most_waiting: int = 1024,
        prefix_bytes: int = 2**28,
    ):
        """Starts the engine's thread.

        Args:
          model: the model.
          params: its parameters; the work runs on the devices that hold them.
          tokenizer: its tokenizer; without one, prompts are token ids, and answers have no text.
          slots: number of requests that run at a time; their caches stay allocated.
          length: maximum number of tokens of a request, prompt and answer together; None = the
            model's `max_positions`, at most 4096 if a layer has no window.
          most_waiting: number of requests that may wait for a slot.
          prefix_bytes: maximum number of bytes of keys and values of earlier prompts and answers
            that are stored, to be reused for prompts that begin with the same tokens; 0 = none.

        Raises:
          ValueError: an argument is out of range, or there are several processes.
        """
        for name, value in (("slots", slots), ("most_waiting", most_waiting)):
            if whole(value) is None or value < 1:
                raise ValueError(f"{name} is {show(value)}; expected an integer above 0")
        if whole(prefix_bytes) is None or prefix_bytes < 0:
            raise ValueError(f"prefix_bytes is {show(prefix_bytes)}; expected an integer from 0")
        most = model.config.max_positions
        if length is None:
            length = min(most, _LENGTH) if None in model.config.spans else most
        if whole(length) is None or not 2 <= length <= most:
            raise ValueError(
                f"length is {show(length)}; expected an integer from 2 to the model's {most} "
                "positions"
            )
        if distributed.count() > 1:
            raise ValueError(
                f"there are {distributed.count()} processes, whose requests would differ; an "
                "Engine is for one process (`generate` runs in several)"
            )
        self._model, self._tokenizer, self._length = model, tokenizer, length
        self._prefixes = Prefixes(model, params, prefix_bytes) if prefix_bytes else None
        options = {"stall": _STALL, "prefixes": self._prefixes}
        scheduler = Scheduler(model, params, slots, length, _PATIENCE, **options)
        self._slots, self._warm_up = slots, scheduler.warm_up
        self._worker = _Worker(scheduler, slots + most_waiting)
        thread = threading.Thread(target=self._worker.run, name="engine", daemon=True)
        thread.start()
        # Ends the thread of an engine that is garbage-collected, or still open at exit.
        self._stop = weakref.finalize(self, _stop, self._worker, thread)

    def submit(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
        max_new_tokens: int = NEW_TOKENS,
        *,
        sampling: Sampling = DEFAULT,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        top_logprobs: int = 0,
        n: int | None = None,
        is_new: bool | None = None,
        **fields: Any,
    ) -> Answer | list[Answer]:
        """Accepts a request and returns at once. Any thread may call it.

        Args:
          prompt: a text, as for `complete`; messages, as for `chat`; or token ids.
          max_new_tokens: maximum number of tokens to add.
          sampling: how to choose tokens.
          stop: strings that end the text; they do not become part of it.
          stop_ids: tokens that end the answer; None = the config's `eos_ids`, () = none.
          top_logprobs: number of likeliest tokens to report at each position, 0 to 20.
          n: number of answers to the prompt, which is read once; answer i draws from (seed, i).
            None = one answer, which is not in a list.
          is_new: whether the answer begins a text or continues the prompt's, as for `completions`;
            None = it begins one if the prompt is messages.
          **fields: fields of `Sampling` by name, such as temperature=0.2; they replace those of
            `sampling`.

        Returns:
          The answer, which fills as tokens are generated; a list of `n` answers if `n` is given.

        Raises:
          ValueError: an argument is of the wrong type or out of range, or the prompt and its new
            tokens exceed the engine's `length`.
          Busy: the engine has as many requests as it accepts.
          RuntimeError: the engine has failed, is being drained, or was closed.
        """
        if n is not None and (whole(n) is None or n < 1):
            raise ValueError(f"n is {show(n)}; expected an integer above 0")
        sampling = settle_text(self._tokenizer, sampling, fields)
        if not isinstance(sampling, Sampling):
            raise ValueError("sampling is a list; a request has one Sampling")
        ids, context = self._encode(prompt)
        context = () if is_new else context
        asked = check(self._model.config, [ids], max_new_tokens, sampling, stop_ids, top_logprobs)
        (ids,) = asked.prompts
        if len(ids) + asked.new_tokens > self._length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, which with {asked.new_tokens} new ones exceed "
                f"the engine's length of {self._length}; shorten it, ask for fewer, or make the "
                "engine with a larger length"
            )
        if self._tokenizer is None and stop not in ((), []):
            raise ValueError("stop is for texts, and the engine has no tokenizer; use stop_ids")
        answers = []
        for draw in range(n or 1):
            row = Row(tuple(ids), asked.new_tokens, sampling, draw, asked.stop_ids, asked.top)
            text = None if self._tokenizer is None else RowText(self._tokenizer, context, stop)
            answers.append(Answer(row, text, self))
        self._worker.accept(answers)
        return answers[0] if n is None else answers

    def warm_up(self) -> None:
        """Waits until no request runs, and compiles all programs that requests may need."""
        self._worker.call(self._warm_up)

    def drain(self, timeout: float | None = None) -> bool:
        """Accepts no more requests, and waits until all accepted ones have ended.

        Args:
          timeout: maximum number of seconds to wait; None = no limit.

        Returns:
          Whether all requests have ended.
        """
        return self._worker.drain(timeout)

    def close(self) -> None:
        """Ends the engine's thread; requests that have not ended fail with a RuntimeError."""
        self._stop()

    def stats(self) -> dict[str, int | float]:
        """Returns counts of requests and tokens.

        Returns:
          "slots": number of slots; "running" and "waiting": requests now; "finished", "cancelled"
          and "failed": requests that have ended; "prompt_tokens" and "new_tokens": tokens of all
          requests that have ended; "reused_tokens": prompt tokens that were restored instead of
          read; "prefix_bytes": bytes of stored keys and values now; "seconds_since_step": seconds
          since the engine's last turn, or 0 if it has no requests.
        """
        kept = self._prefixes and self._prefixes.stats()
        tokens, size = (kept.tokens, kept.nbytes) if kept else (0, 0)
        known = {"slots": self._slots, "reused_tokens": tokens, "prefix_bytes": size}
        return known | self._worker.stats()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind, *_) -> None:
        """Drains the engine, unless the block raised an exception, and closes it."""
        if kind is None:
            self.drain()
        self.close()

    def _encode(self, prompt) -> tuple[Sequence[int], Sequence[int]]:
        """Returns the prompt's token ids, and the ids whose text the answer continues."""
        items = None if isinstance(prompt, str) else listed(prompt)
        if items is not None and all(whole(item) is not None for item in items):
            if self._tokenizer is None:
                return items, ()
            # The model's vocabulary may be larger than the tokenizer's.
            return items, [item for item in items if item < self._tokenizer.vocab_size]
        if self._tokenizer is None:
            raise ValueError(
                f"prompt is {show(prompt)}, and the engine has no tokenizer; expected token ids"
            )
        if items is not None:
            prompt = conversation(items, prompt)
        elif not isinstance(prompt, str):
            raise ValueError(f"prompt is {show(prompt)}; expected a text, messages, or token ids")
        ids, is_new = encode_prompt(self._tokenizer, prompt)
        return ids, () if is_new else ids


class _Worker:
    """The state that the engine's thread shares with callers.

    It has no reference to the engine, so that the thread does not keep a dropped engine alive.
    """

    def __init__(self, scheduler: Scheduler, most: int):
        self._scheduler, self._most = scheduler, most
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
            elif self._live[row].push(token):
                self._scheduler.end(row, "stop")
        self._sweep()
        self._last_turn = time.perf_counter()

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


def _stop(worker: _Worker, thread: threading.Thread) -> None:
    worker.stop()
    if thread is not threading.current_thread():
        thread.join()
