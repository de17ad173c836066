"""Answers to many prompts in one continuous batch."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mistral_jax.engine.completion import Completion
from mistral_jax.engine.engine import Engine
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.text import completions
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel import distributed
from mistral_jax.tokens.tokenizer import Tokenizer

_MOMENT = 0.2  # seconds between two looks at all answers


class Prompt(NamedTuple):
    """A text to continue.

    Attributes:
      ids: token ids.
      new_tokens: maximum number of tokens to add.
      stop: strings that end the answer.
      sampling: how to choose tokens; answer number i to the prompt draws from (seed, i).
    """

    ids: tuple[int, ...]
    new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


def draws_of(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Prompt, Mapping[int, int]]],
    slots: int,
) -> Iterator[tuple[int, str]]:
    """Answers prompts, each once or several times; when an answer ends, the next takes its slot.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      asked: prompts, each with the answers to give: a name of the caller's by the number i of the
        answer. Numbers may be missing, because a journal has these answers.
      slots: number of answers that are generated at a time.

    Yields:
      The name of an answer and its text, as soon as it is done.

    Raises:
      ValueError: a prompt is too long, or the model's logits are not finite.
    """
    # The longest prompts come first, so that a lack of memory shows at once.
    asked = sorted(asked, key=lambda own: -len(own[0].ids))
    if distributed.count() > 1:
        return _in_turn(model, params, tokenizer, asked)
    return _together(model, params, tokenizer, asked, slots)


def _together(model, params, tokenizer, asked, slots) -> Iterator[tuple[int, str]]:
    counts = [1 + max(names) for _, names in asked]
    with Engine(
        *(model, params, tokenizer),
        slots=min(slots, sum(counts)),
        length=max(2, *(len(own.ids) + own.new_tokens for own, _ in asked)),
        most_waiting=sum(counts),
    ) as engine:
        waiting = {}
        for (own, names), count in zip(asked, counts, strict=True):
            options = {"sampling": own.sampling, "stop": own.stop, "is_new": True}
            answers = engine.submit(own.ids, own.new_tokens, n=count, **options)
            for number, answer in enumerate(answers):
                if number in names:
                    waiting[names[number]] = answer
                else:
                    answer.cancel()
        while waiting:
            with contextlib.suppress(TimeoutError):
                next(iter(waiting.values())).result(_MOMENT)
            for name in [name for name, answer in waiting.items() if answer.done]:
                yield name, _text(waiting.pop(name).result())


def _in_turn(model, params, tokenizer, asked) -> Iterator[tuple[int, str]]:
    """Does the same one prompt at a time in several processes, for which there is no `Engine`."""
    for own, names in asked:
        found = completions(
            *(model, params, tokenizer),
            [own.ids] * (1 + max(names)),
            own.new_tokens,
            sampling=own.sampling,
            stop=own.stop,
            is_new=True,
        )
        yield from ((name, _text(found[number])) for number, name in names.items())


def _text(completion: Completion) -> str:
    if completion.error is not None:
        raise ValueError(completion.error)
    return completion.text
