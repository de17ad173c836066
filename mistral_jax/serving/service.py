"""`Service`: the engine behind the server, from loading to draining, and its requests."""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping

from mistral_jax.engine.answer import Answer
from mistral_jax.engine.engine import Engine
from mistral_jax.engine.sampling import DEFAULT, Sampling
from mistral_jax.serving import native, requests
from mistral_jax.serving.jobs import ChatJob, Context, Job
from mistral_jax.serving.requests import Fields, Prompt, TooLong
from mistral_jax.tokens.tokenizer import Tokenizer

# Seconds without a step, while requests run, after which the server is not healthy.
_MOST_SILENCE = 60.0


class Unavailable(RuntimeError):
    """Raised while the server takes no requests; the message says why."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that is ready to serve.

    Attributes:
      engine: the engine that runs it.
      tokenizer: its tokenizer.
      eos_ids: tokens that end its answers.
      fim_end_ids: tokens that end a text that fills in.
      length: maximum number of tokens of prompt and answer together.
    """

    engine: Engine
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    fim_end_ids: tuple[int, ...]
    length: int


class Service:
    """The state of a server.

    Attributes:
      name: name of the model in requests and responses.
      started: time at which the service was made, in seconds since 1970.
      sampling: sampling of requests that state none.
    """

    def __init__(self, name: str, sampling: Sampling = DEFAULT):
        self.name, self.sampling, self.started = name, sampling, int(time.time())
        self._loaded: Loaded | None = None
        self._failure: BaseException | None = None
        self._draining = False
        self._ready = threading.Event()

    def load(self, build: Callable[[], Loaded]) -> None:
        """Loads the model; afterwards the service takes requests, or has failed.

        Args:
          build: loads the model and warms its engine up.
        """
        try:
            self._loaded = build()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._ready.set()

    @property
    def names(self) -> list[str]:
        """Names of the models that requests can choose."""
        return [self.name]

    @property
    def length(self) -> int | None:
        """Maximum number of tokens of prompt and answer; None while the model is being loaded."""
        return self._loaded and self._loaded.length

    @property
    def loaded(self) -> Loaded:
        """The loaded model; raises `Unavailable` while the server takes no requests."""
        if problem := self.problem():
            raise Unavailable(problem)
        return self._loaded

    def problem(self) -> str | None:
        """Returns why the server takes no requests; None = it does."""
        if self._failure is not None:
            return "the model could not be loaded"
        if self._loaded is None:
            return "the model is being loaded"
        if self._draining:
            return "the server is shutting down"
        silence = self._loaded.engine.stats()["seconds_since_step"]
        if silence > _MOST_SILENCE:
            return f"the engine has taken no step for {silence:.0f} s"
        return self._loaded.engine.failure

    def stats(self) -> Mapping[str, int | float]:
        """Returns the engine's counts; zeros while the model is being loaded."""
        return self._loaded.engine.stats() if self._loaded else {}

    def drain(self, timeout: float) -> bool:
        """Refuses new requests, and waits for the end of those that run.

        Args:
          timeout: maximum number of seconds to wait.

        Returns:
          Whether all requests have ended.
        """
        self._draining = True
        return self._loaded is None or self._loaded.engine.drain(timeout)

    def close(self) -> None:
        """Ends the engine; requests that have not ended fail."""
        self._draining = True
        if self._loaded is not None:
            self._loaded.engine.close()

    def complete(self, fields: Fields, owner: str) -> Job:
        """Begins to continue texts."""
        loaded = self.loaded
        prompts = requests.completion_prompts(loaded.tokenizer, fields)
        return self._submit(Job, loaded, fields, prompts, owner)

    def chat(self, fields: Fields, owner: str) -> Job:
        """Begins to answer a conversation."""
        loaded = self.loaded
        prompts = [requests.chat_prompt(loaded.tokenizer, fields)]
        if fields.get("top_logprobs") and not fields.get("logprobs"):
            raise ValueError("top_logprobs is part of logprobs; add logprobs: true")
        return self._submit(ChatJob, loaded, fields, prompts, owner)

    def native(self, fields: Fields, owner: str) -> Job:
        """Begins to continue texts, in llama.cpp's form."""
        loaded = self.loaded
        prompts = native.prompts(loaded.tokenizer, fields)
        return self._submit(native.NativeJob, loaded, native.settled(fields), prompts, owner)

    def infill(self, fields: Fields, owner: str) -> Job:
        """Begins to fill in the text between a prefix and a suffix, in llama.cpp's form."""
        loaded = self.loaded
        prompts = native.infill_prompts(loaded.tokenizer, fields)
        return self._submit(native.NativeJob, loaded, native.settled(fields), prompts, owner)

    def _submit(
        self, kind: type[Job], loaded: Loaded, fields: Fields, prompts: list[Prompt], owner: str
    ) -> Job:
        """Submits all prompts of a request to the engine, or none."""
        fills = "suffix" in fields or "input_suffix" in fields
        eos = loaded.fim_end_ids if fills else loaded.eos_ids
        top = fields.get(kind.top_field) or 0
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                room = loaded.length - len(prompt.ids)
                if room < 1:
                    raise TooLong(len(prompt.ids), loaded.length)
                options = requests.options(loaded.tokenizer, fields, self.sampling)
                options.setdefault("max_new_tokens", min(kind.new_tokens or room, room))
                answers += loaded.engine.submit(
                    prompt.ids,
                    stop_ids=requests.stop_ids(fields, eos),
                    top_logprobs=top,
                    n=fields.get("n", 1),
                    is_new=prompt.is_new,
                    owner=owner,
                    **options,
                )
            if fields.get("echo") and "logprobs" in fields:
                odds = [loaded.engine.prompt_logprobs(prompt.ids, top) for prompt in prompts]
                prompts = [
                    dataclasses.replace(prompt, odds=own)
                    for prompt, own in zip(prompts, odds, strict=True)
                ]
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return kind(Context(loaded.tokenizer, self.name, fields, prompts, answers))
