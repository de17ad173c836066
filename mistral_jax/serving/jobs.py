"""Requests that run: their answers, as whole responses and as events of a stream."""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from mistral_jax.base import VERSION
from mistral_jax.engine.answer import Answer, Piece
from mistral_jax.serving import logprobs
from mistral_jax.serving.deltas import Delta, Deltas, join
from mistral_jax.serving.requests import Fields, Prompt
from mistral_jax.tokens.tokenizer import Tokenizer

# llama.cpp's clients expect a "b" in front.
FINGERPRINT = f"b-mistral-jax-{VERSION}"


class Failed(RuntimeError):
    """Raised when an answer ended with an error of its own."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What the answers of a request have in common.

    Attributes:
      tokenizer: the model's tokenizer.
      model: name of the model.
      fields: the checked fields of the request.
      prompts: its prompts.
      answers: its answers, the same number for each prompt, prompt by prompt.
    """

    tokenizer: Tokenizer
    model: str
    fields: Fields
    prompts: Sequence[Prompt]
    answers: Sequence[Answer]


class Job:
    """A request whose answers are being generated; a subclass for each form of response.

    Attributes:
      id: name of the request in responses and logs.
      top_field: the field that asks for the likeliest tokens at each position.
      new_tokens: maximum number of tokens of an answer whose request states none; None = all that
        fit. OpenAI's is 16 for completions.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    top_field = "logprobs"
    new_tokens: int | None = 16

    def __init__(self, context: Context):
        self.context = context
        self.id = f"{self.prefix}-{uuid.uuid4().hex[:24]}"
        self._created = int(time.time())
        self._writers = [self._writer(i) for i in range(len(context.answers))]

    def prompt(self, i: int) -> Prompt:
        """Returns the prompt of answer i."""
        each = len(self.context.answers) // len(self.context.prompts)
        return self.context.prompts[i // each]

    async def wait(self) -> None:
        """Waits until all answers have ended; raises `Failed` if one failed."""
        async for _ in self._pieces():
            pass
        for answer in self.context.answers:
            error = answer.result().error
            if error is not None:
                raise Failed(error)

    def cancel(self) -> None:
        """Ends the answers that have not ended."""
        for answer in self.context.answers:
            if not answer.done:
                answer.cancel()

    def response(self) -> dict[str, Any]:
        """Returns the whole response, once all answers have ended."""
        choices = []
        for i, answer in enumerate(self.context.answers):
            choices.append(self._writers[i].choice(answer.pieces(0), answer.result().finish_reason))
        return self._envelope(self.kind) | {"choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[Any]:
        """Yields the events of a stream, JSON values; raises `Failed` after an answer's error."""
        asked = self.context.fields.get("stream_options", {})
        for i in range(len(self._writers)):
            if (first := self._writers[i].first()) is not None:
                yield self._chunk(first)
        async for i, pieces, reason in self._pieces():
            for choice in self._writers[i].chunks(pieces, reason):
                event = self._chunk(choice)
                if asked.get("continuous_usage_stats"):
                    event["usage"] = self.usage()
                yield event
            if reason is not None and (error := self.context.answers[i].result().error):
                raise Failed(error)
        if asked.get("include_usage"):
            yield self._chunk(None) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Returns the number of tokens so far; a prompt counts once, whatever its answers."""
        answers = self.context.answers
        each = len(answers) // len(self.context.prompts)
        prompt = sum(len(one.ids) for one in self.context.prompts)
        new = sum(len(answer.row.tokens) for answer in answers)
        cached = sum(answer.cached_tokens for answer in answers[::each])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def times(self) -> list[tuple[str, float, float, int]]:
        """Returns of each answer: why it ended, seconds to the first and last token, tokens."""
        found = []
        for answer in self.context.answers:
            reason, first, seconds = "cancelled", 0.0, 0.0
            if answer.done:
                with contextlib.suppress(RuntimeError):  # The engine has ended.
                    made = answer.result()
                    reason, first, seconds = made.finish_reason, made.first_seconds, made.seconds
            found.append((reason, first, seconds, len(answer.row.tokens)))
        return found

    def _writer(self, i: int) -> "_Writer":
        return _CompletionWriter(self, i)

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.context.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _chunk(self, choice: Any) -> dict[str, Any]:
        return self._envelope(self.chunk_kind) | {"choices": [] if choice is None else [choice]}

    async def _pieces(self) -> AsyncIterator[tuple[int, list[Piece], str | None]]:
        """Yields (index of an answer, its new pieces, its finish reason or None) as they come."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # The loop may be closed before the engine's last token.
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        answers = self.context.answers
        for answer in answers:
            answer.on_change(wake)
        counts, running = [0] * len(answers), set(range(len(answers)))
        while running:
            changed.clear()
            for i in sorted(running):
                done = answers[i].done
                pieces = answers[i].pieces(counts[i])
                counts[i] += len(pieces)
                reason = answers[i].result().finish_reason if done else None
                if done:
                    running.discard(i)
                if pieces or done:
                    yield i, pieces, reason
            if running:
                await changed.wait()


class ChatJob(Job):
    """An answer to a conversation."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    top_field = "top_logprobs"
    new_tokens = None

    def _writer(self, i: int) -> "_Writer":
        return _ChatWriter(self, i)


class _Writer:
    """Writes one answer: `choice` as a whole, or `first` and `chunks` as it is generated."""

    def __init__(self, job: Job, i: int):
        self._job, self._i = job, i
        self._fields, self._tokenizer = job.context.fields, job.context.tokenizer
        prompt = job.prompt(i)
        context = () if prompt.is_new else prompt.ids
        self._texts = logprobs.TokenTexts(self._tokenizer, context)

    def first(self) -> dict[str, Any] | None:
        """Returns the choice of the first event, before any token; None = there is none."""
        return None

    def chunks(self, pieces: Sequence[Piece], reason: str | None) -> Iterable[dict[str, Any]]:
        """Returns the choices of the events of new pieces; `reason` is not None at the end."""
        raise NotImplementedError

    def choice(self, pieces: Sequence[Piece], reason: str) -> dict[str, Any]:
        """Returns the choice of the whole response."""
        raise NotImplementedError


class _CompletionWriter(_Writer):
    """Writes a continuation of a text."""

    def __init__(self, job: Job, i: int):
        super().__init__(job, i)
        top = self._fields.get("logprobs")
        self._echo = self._fields.get("echo", False)
        if self._echo:
            self._texts = logprobs.TokenTexts(self._tokenizer, ())
        self._odds = None if top is None else logprobs.Completion(self._texts, top)

    def first(self):
        return self._echoed() if self._echo else None

    def chunks(self, pieces, reason):
        text = "".join(piece.text for piece in pieces)
        if text or reason is None:
            odds = self._odds.push(pieces) if self._odds else None
            yield self._made(text, odds, None)
        if reason is not None:
            yield self._made("", None, reason)

    def choice(self, pieces, reason):
        text = "".join(piece.text for piece in pieces)
        before = self._echoed() if self._echo else None
        odds = self._odds.push(pieces) if self._odds else None
        if before is not None:
            text = before["text"] + text
            if odds is not None:
                odds = {name: before["logprobs"][name] + odds[name] for name in odds}
        return self._made(text, odds, reason)

    def _echoed(self):
        """Returns the choice that repeats the prompt."""
        known = self._tokenizer.vocab_size
        prompt = self._job.prompt(self._i)
        text = self._tokenizer.decode([token for token in prompt.ids if token < known])
        odds = self._odds.prompt(prompt.ids, prompt.odds) if self._odds else None
        return self._made(text, odds, None)

    def _made(self, text, odds, reason):
        return {"index": self._i, "text": text, "logprobs": odds, "finish_reason": reason}


class _ChatWriter(_Writer):
    """Writes an answer of an assistant."""

    def __init__(self, job: Job, i: int):
        super().__init__(job, i)
        calls = bool(self._fields.get("tools")) and self._fields.get("tool_choice") != "none"
        self._deltas = Deltas(self._tokenizer, f"{job.id} {i}", calls)
        self._top = self._fields.get("top_logprobs", 0) if self._fields.get("logprobs") else None

    def first(self):
        return self._made({"role": "assistant", "content": None}, None, None)

    def chunks(self, pieces, reason):
        deltas = self._take(pieces, reason)
        odds = self._odds(pieces)
        if odds and odds["content"] and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield self._made(delta, odds, None)
            odds = self._odds([])
        if reason is not None:
            yield self._made({}, None, self._reason(reason))

    def choice(self, pieces, reason):
        message = join(self._take(pieces, reason))
        made = self._made(None, self._odds(pieces), self._reason(reason))
        del made["delta"]
        return made | {"message": message | {"refusal": None}}

    def _take(self, pieces: Sequence[Piece], reason: str | None) -> list[Delta]:
        deltas = [delta for piece in pieces for delta in self._deltas.push(piece)]
        deltas += self._deltas.flush() if reason is not None else []
        return list(_merged(deltas))

    def _odds(self, pieces):
        return None if self._top is None else logprobs.chat(self._texts, pieces, self._top)

    def _reason(self, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self._deltas.has_calls else reason

    def _made(self, delta, odds, reason):
        return {"index": self._i, "delta": delta, "logprobs": odds, "finish_reason": reason}


def _merged(deltas: Iterable[Delta]) -> Iterable[Delta]:
    """Joins texts of one kind that follow each other."""
    last: Delta | None = None
    for delta in deltas:
        (name, value), *_ = delta.items()
        if last is not None and isinstance(value, str) and name in last:
            last = {name: last[name] + value}
            continue
        if last is not None:
            yield last
        last = delta
    if last is not None:
        yield last
