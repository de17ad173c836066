"""`Engine`: continuous batching for requests of many threads.

An engine is a `Scheduler` in a thread of its own, with a queue of requests and their texts.
"""

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.engine.admission import Row
from mistral_jax.engine.answer import Answer
from mistral_jax.engine.completion import Token
from mistral_jax.engine.generate import NEW_TOKENS
from mistral_jax.engine.grammar import Grammar, Grammars
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.engine.prompt_logprobs import prompt_logprobs
from mistral_jax.engine.request import check, listed, whole
from mistral_jax.engine.sampling import DEFAULT, Sampling
from mistral_jax.engine.scheduler import Scheduler
from mistral_jax.engine.text import RowText, conversation, encode_prompt, settle_text
from mistral_jax.engine.worker import Worker
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel import distributed
from mistral_jax.tokens.tokenizer import Tokenizer

# `patience` and `stall` of the scheduler, in seconds.
_PATIENCE, _STALL = 0.05, 0.1
# Default `length` for models in which a layer has no window.
_LENGTH = 4096


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
        most_waiting_tokens: int = 2**20,
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
          most_waiting_tokens: number of tokens of prompts that may wait, unless one waits alone.
          prefix_bytes: maximum number of bytes of keys and values of earlier prompts and answers
            that are stored, to be reused for prompts that begin with the same tokens; 0 = none.

        Raises:
          ValueError: an argument is out of range, or there are several processes.
        """
        counts = {"slots": slots, "most_waiting": most_waiting}
        counts["most_waiting_tokens"] = most_waiting_tokens
        for name, value in counts.items():
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
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._length = length
        self._grammars = None
        if tokenizer is not None:
            config = model.config
            self._grammars = Grammars(tokenizer, config.vocab_size, config.eos_ids)
        self._prefixes = Prefixes(model, params, prefix_bytes) if prefix_bytes else None
        options = {"stall": _STALL, "prefixes": self._prefixes}
        scheduler = Scheduler(model, params, slots, length, _PATIENCE, **options)
        self._slots, self._warm_up = slots, scheduler.warm_up
        self._worker = Worker(scheduler, slots + most_waiting, most_waiting_tokens)
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
        owner: str = "",
        grammar: Grammar | None = None,
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
          owner: whose request it is; while requests of several owners wait, the owners take turns.
          grammar: the texts that the answer may be; None = all. The answer ends where its grammar
            does. `Token.logprob` does not depend on it.
          **fields: fields of `Sampling` by name, such as temperature=0.2; they replace those of
            `sampling`.

        Returns:
          The answer, which fills as tokens are generated; a list of `n` answers if `n` is given.

        Raises:
          ValueError: an argument is of the wrong type or out of range, or the request could never
            run: the prompt and its new tokens exceed the engine's `length`, or `n` is larger than
            the number of requests that it accepts.
          Busy: the engine has as many requests, or tokens that wait, as it accepts.
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
        if grammar is not None and self._grammars is None:
            raise ValueError("grammar is for texts, and the engine has no tokenizer")
        answers = []
        for draw in range(n or 1):
            matcher = grammar and self._grammars.start(grammar, not context)
            row = Row(
                *(tuple(ids), asked.new_tokens, sampling, draw, asked.stop_ids, asked.top),
                *(owner, matcher),
            )
            text = None if self._tokenizer is None else RowText(self._tokenizer, context, stop)
            answers.append(Answer(row, text, self))
        self._worker.accept(answers)
        return answers[0] if n is None else answers

    def prompt_logprobs(self, ids: Sequence[int], top: int = 0) -> list[Token | None]:
        """Returns the log-probabilities of a prompt's tokens; see `engine.prompt_logprobs`.

        It reads the prompt beside the running requests, and compiles programs at its first uses.
        """
        return prompt_logprobs(self._model, self._params, ids, top)

    @property
    def length(self) -> int:
        """Maximum number of tokens of a request, prompt and answer together."""
        return self._length

    @property
    def failure(self) -> str | None:
        """Why the engine has ended; None = it has not, or it was closed."""
        return self._worker.failure

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


def _stop(worker: Worker, thread: threading.Thread) -> None:
    worker.stop()
    if thread is not threading.current_thread():
        thread.join()
