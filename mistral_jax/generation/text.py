"""Strings in, strings out: `complete`, `chat` and `stream`. It prints nothing.

`completions` is what they share, with everything that is known about an answer.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mistral_jax.generation.generate import Completion, Token, generate, stream_tokens
from mistral_jax.generation.prefill import Params
from mistral_jax.generation.sampling import DEFAULT, Sampling
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


def complete(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    max_new_tokens: int = 64,
    *,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    stop: str | Sequence[str] = (),
) -> str | list[str]:
    """Continues a text, or several as one batch.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      prompt: a text, or a sequence of texts; an empty one starts from BOS.
      max_new_tokens: most tokens to add.
      sampling: how to choose tokens, for all texts or for each; see `generate`.
      stop: strings that end a text; they do not become part of it. So does the model's EOS.

    Returns:
      What follows the prompt, without the prompt; a list if `prompt` was one.

    Raises:
      ValueError: an argument is out of range, or a text could outgrow the model's `max_positions`.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    prompts = [tokenizer.encode(text, bos=True) for text in texts]
    answers = completions(
        model, params, tokenizer, prompts, max_new_tokens, sampling=sampling, stop=stop
    )
    answers = [answer.text for answer in answers]
    return answers[0] if isinstance(prompt, str) else answers


def chat(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    messages: Messages,
    max_new_tokens: int = 512,
    *,
    sampling: Sampling = DEFAULT,
    stop: str | Sequence[str] = (),
) -> str:
    """Answers the last message of a conversation.

    Args:
      messages: dicts of "role" ("system", "user", "assistant") and "content", the last the user's;
        or the assistant's with `"prefix": True`, to be continued.

    The other arguments and errors are those of `complete`.

    Returns:
      The answer, or what follows its prefix.
    """
    prompt, is_new = encode_prompt(tokenizer, messages)
    (answer,) = completions(
        model,
        params,
        tokenizer,
        [prompt],
        max_new_tokens,
        sampling=sampling,
        stop=stop,
        is_new=is_new,
    )
    return answer.text


def stream(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    max_new_tokens: int = 512,
    *,
    sampling: Sampling = DEFAULT,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """Continues a text, or answers a conversation, piece by piece.

    Joined, the pieces are what `complete` or `chat` returns. No piece ends within a character, and
    none is part of a stop string.

    Args:
      prompt: a text as for `complete`, or messages as for `chat`.

    The other arguments and errors are those of `complete`.

    Yields:
      Pieces of text as soon as they are certain.
    """
    ids, is_new = encode_prompt(tokenizer, prompt)
    text = _Text(tokenizer, () if is_new else ids, stop)
    return _pieces(stream_tokens(model, params, ids, max_new_tokens, sampling=sampling), text)


def completions(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    stop: str | Sequence[str] = (),
    top_logprobs: int = 0,
    is_new: bool = False,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continues prompts of token ids, with their texts.

    Args:
      prompts: token ids, one sequence a row.
      top_logprobs: number of likeliest tokens whose log-probabilities are wanted at each place.
      is_new: whether a text begins with the first new token (an answer does), rather than follows
        its prompt's; a word that begins a text has no space in front.
      on_text: called with the row and each piece of its text, as soon as it is certain.

    The other arguments and errors are those of `complete`.

    Returns:
      One completion a prompt. Where a stop string ended it, `tokens` has all that were made, up to
      the one that completed the string.
    """
    texts = [_Text(tokenizer, () if is_new else prompt, stop) for prompt in prompts]
    pieces = [[] for _ in prompts]

    def add(row, piece):
        pieces[row].append(piece)
        if on_text is not None and piece:
            on_text(row, piece)

    def until(row, token):
        add(row, texts[row].push(token))
        return texts[row].ended

    # Without `until` the device comes back less often: where nobody waits, text is made at the end.
    urgent = on_text is not None or bool(stop)
    rows = generate(
        model,
        params,
        prompts,
        max_new_tokens,
        sampling=sampling,
        top_logprobs=top_logprobs,
        until=until if urgent else None,
    )
    for row, text in enumerate(texts):
        for token in () if urgent else rows[row].tokens:
            until(row, token)
        add(row, text.flush())
    return [
        dataclasses.replace(row, text="".join(own)) for row, own in zip(rows, pieces, strict=True)
    ]


def encode_prompt(tokenizer: Tokenizer, prompt: str | Messages) -> tuple[list[int], bool]:
    """Encodes a text or a conversation; also returns whether a new text begins after it."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, bos=True), False
    return tokenizer.encode_chat(prompt), not prompt[-1].get("prefix", False)


def _pieces(tokens: Iterator[Token], text: "_Text") -> Iterator[str]:
    for token in tokens:
        if piece := text.push(token.id):
            yield piece
        if text.ended:
            return
    if piece := text.flush():
        yield piece


class _Text:
    """The text of one row as its tokens come, up to a stop string.

    Attributes:
      ended: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: str | Sequence[str]):
        self.ended = False
        self._vocab_size = tokenizer.vocab_size
        self._decoder = tokenizer.stream(context)
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._held = ""
        for string in self._stop:
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop has {string!r}; expected strings that are not empty")

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is certain by now."""
        # A model may have a few more tokens than its tokenizer; they have no text.
        if token < self._vocab_size:
            self._held += self._decoder.push(token)
        return self._release(final=False)

    def flush(self) -> str:
        """Returns what was held back, after the last token."""
        self._held += self._decoder.flush()
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        if self.ended:
            return ""
        text = self._held
        found = [at for string in self._stop if (at := text.find(string)) >= 0]
        self.ended = bool(found)
        sure = min(found) if found else len(text) - (0 if final else self._doubtful())
        self._held = text[sure:]
        return text[:sure]

    def _doubtful(self) -> int:
        """Returns the length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0
