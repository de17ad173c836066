"""Generation from texts to texts: `complete`, `chat` and `stream`.

`completions` returns each `Completion` whole, with log-probabilities and its finish reason.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.engine.generate import (
    NEW_TOKENS,
    Completion,
    Token,
    generate,
    stream_tokens,
)
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.engine.request import listed
from mistral_jax.engine.sampling import ALL_BANNED, DEFAULT, Sampling, settle
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokens.answer import Piece, kinds
from mistral_jax.tokens.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


def complete(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    max_new_tokens: int = NEW_TOKENS,
    *,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    stop: str | Sequence[str] = (),
    **fields: Any,
) -> str | list[str]:
    """Continues a text, or each of several texts.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      prompt: a text, or a sequence of texts; an empty text starts from BOS alone.
      max_new_tokens: maximum number of tokens to add to a text.
      sampling: how to choose tokens, one for all texts or one for each; see `generate`.
      stop: strings that end a text, as the model's EOS does; they do not become part of it.
      **fields: fields of `Sampling` by name, such as temperature=0.2; they replace those of
        `sampling`.

    Returns:
      The new text, without the prompt; a list if `prompt` is a sequence of texts.

    Raises:
      ValueError: an argument is of the wrong type or out of range, a prompt and its new tokens
        exceed the model's `max_positions`, or the model's logits are not finite.
    """
    _check_tokenizer(tokenizer)
    alone = isinstance(prompt, str)
    texts = [prompt] if alone else listed(prompt)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"prompt is {show(prompt)}; expected a text, or a list of texts (`chat` takes "
            "messages, `generate` token ids)"
        )
    prompts = [tokenizer.encode(text, bos=tokenizer.adds_bos) for text in texts]
    options = {"sampling": sampling, "stop": stop, **fields}
    answers = _texts(model, params, tokenizer, prompts, max_new_tokens, options)
    return answers[0] if alone else answers


def chat(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    messages: str | Messages | Sequence[str | Messages],
    max_new_tokens: int = NEW_TOKENS,
    *,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    stop: str | Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    **fields: Any,
) -> str | list[str]:
    """Answers the last message of a conversation, or of each of several conversations.

    Args:
      messages: a conversation, or a list of conversations. A conversation is a list of dicts with
        "role" ("system", "user" or "assistant") and "content". The last message is the user's, or
        the assistant's with `"prefix": True`, which is then continued. A text is a conversation of
        one user message.
      tools: tools that the model may call, in OpenAI's form; see `parse_answer`.

    The other arguments and errors are those of `complete`.

    Returns:
      The answer, without the prefix, if any; a list for a list of conversations.
    """
    _check_tokenizer(tokenizer)
    conversations, alone = listed_conversations(messages)
    prompts = [encode_prompt(tokenizer, one, tools) for one in conversations]
    options = {"sampling": sampling, "stop": stop, "is_new": [new for _, new in prompts], **fields}
    prompts = [ids for ids, _ in prompts]
    answers = _texts(model, params, tokenizer, prompts, max_new_tokens, options)
    return answers[0] if alone else answers


def stream(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    max_new_tokens: int = NEW_TOKENS,
    *,
    sampling: Sampling = DEFAULT,
    stop: str | Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Iterator[str]:
    """Continues a text, or answers a conversation, piece by piece.

    The joined pieces are equal to the result of `complete` or `chat`. No piece ends within a
    character, and none contains a part of a stop string that ends the text.

    Args:
      prompt: a text as for `complete`, or messages as for `chat`.
      tools: as for `chat`.

    The other arguments and errors are those of `complete`.

    Yields:
      Pieces of text as soon as they are certain. The `kind` of a piece of an answer is "thinking"
      between [THINK] and [/THINK], "tool_calls" after [TOOL_CALLS], and "text" otherwise.
    """
    _check_tokenizer(tokenizer)
    if not isinstance(prompt, str):
        (prompt, *others), alone = listed_conversations(prompt)
        if others or not alone:
            raise ValueError("prompt is a batch; expected one text or conversation to stream")
    ids, is_new = encode_prompt(tokenizer, prompt, tools)
    text = RowText(tokenizer, () if is_new else ids, stop)
    sampling = settle_text(tokenizer, sampling, fields)
    return _pieces(stream_tokens(model, params, ids, max_new_tokens, sampling=sampling), text)


def completions(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = NEW_TOKENS,
    *,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    stop: str | Sequence[str] = (),
    top_logprobs: int = 0,
    is_new: bool | Sequence[bool] = False,
    on_text: Callable[[int, str], None] | None = None,
    prefixes: Prefixes | None = None,
    **fields: Any,
) -> list[Completion]:
    """Continues prompts of token ids, and decodes the new tokens to texts.

    Args:
      prompts: token ids, one sequence a row.
      top_logprobs: number of likeliest tokens to report at each position, 0 to 20.
      is_new: whether the new tokens begin a text, as an answer does, or continue the prompt's text;
        one for all rows, or one for each. The first word of a text has no space in front.
      on_text: called with the row's index and each piece of its text, as soon as it is certain.
      prefixes: see `generate`.

    The other arguments and errors are those of `complete`.

    Returns:
      One completion a prompt. If a stop string ended it, `tokens` includes the token that completed
      the string. If its logits are not finite, its `finish_reason` is "error".
    """
    _check_tokenizer(tokenizer)
    sampling = settle_text(tokenizer, sampling, fields)
    news = [is_new] * len(prompts) if isinstance(is_new, bool) else is_new
    texts = [
        RowText(tokenizer, () if new else prompt, stop)
        for prompt, new in zip(prompts, news, strict=True)
    ]
    pieces = [[] for _ in prompts]

    def add(row, piece):
        pieces[row].append(piece)
        if on_text is not None and piece:
            on_text(row, piece)

    def until(row, token):
        add(row, texts[row].push(token))
        return texts[row].ended

    # Without `until`, the device returns to the host less often, and texts are decoded at the end.
    urgent = on_text is not None or bool(stop)
    rows = generate(
        model,
        params,
        prompts,
        max_new_tokens,
        sampling=sampling,
        top_logprobs=top_logprobs,
        until=until if urgent else None,
        prefixes=prefixes,
    )
    for row, text in enumerate(texts):
        for token in () if urgent else rows[row].tokens:
            until(row, token)
        add(row, text.flush())
    return [
        dataclasses.replace(row, text="".join(own)) for row, own in zip(rows, pieces, strict=True)
    ]


def _texts(model, params, tokenizer, prompts, max_new_tokens, options) -> list[str]:
    """Returns the texts of `completions`; raises a ValueError if a row ended as "error"."""
    found = completions(model, params, tokenizer, prompts, max_new_tokens, **options)
    for row, completion in enumerate(found):
        if completion.error is not None:
            where = f"prompt {row}: " if len(found) > 1 else ""
            raise ValueError(f"{where}{completion.error}")
    return [completion.text for completion in found]


def settle_text(
    tokenizer: Tokenizer | None,
    sampling: Sampling | Sequence[Sampling],
    fields: Mapping[str, Any],
) -> Sampling | list[Sampling]:
    """Calls `settle`; raises a ValueError if the bias bans all tokens that the tokenizer knows."""
    sampling = settle(sampling, fields)
    for one in [sampling] if isinstance(sampling, Sampling) else sampling:
        if tokenizer is not None and one.bans_all(tokenizer.vocab_size):
            raise ValueError(ALL_BANNED)
    return sampling


def _check_tokenizer(tokenizer):
    if not hasattr(tokenizer, "encode"):
        raise ValueError(
            f"tokenizer is {show(tokenizer)}; expected a Tokenizer, the third value that `load` "
            "returns, which is None if the checkpoint has no tokenizer's file"
        )


def listed_conversations(messages) -> tuple[list[Messages], bool]:
    """Returns a list of conversations, and whether `messages` is a single one."""
    items = None if isinstance(messages, str) else listed(messages)
    alone = items is None or all(isinstance(item, Mapping) for item in items)
    found = [messages] if alone else items
    return [conversation(one, messages) for one in found], alone


def conversation(one: Any, messages: Any) -> Messages:
    """Converts a text or a sequence of messages to a list of messages.

    Args:
      one: the conversation.
      messages: the caller's argument that contains it, for the error message.

    Raises:
      ValueError: it is neither a text nor a sequence of messages.
    """
    if isinstance(one, str):
        return [{"role": "user", "content": one}]
    items = listed(one)
    if not items or not all(isinstance(item, Mapping) for item in items):
        raise ValueError(
            f"messages is {show(messages)}; expected a text, a list of messages such as "
            '{"role": "user", "content": "Hello"}, or a list of such conversations'
        )
    return items


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], bool]:
    """Encodes a text or a conversation; returns the ids, and whether a new text follows them."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, bos=tokenizer.adds_bos), False
    return tokenizer.encode_chat(prompt, tools=tools), not prompt[-1].get("prefix", False)


def _pieces(tokens: Iterator[Token], text: "RowText") -> Iterator[str]:
    failure = None
    try:
        for token in tokens:
            if piece := text.push(token.id):
                yield piece
            if text.ended:
                return
    except ValueError as error:
        failure = error
    if piece := text.flush():
        yield piece
    if failure is not None:
        raise failure


class RowText:
    """Decodes the tokens of one row as they are generated, up to a stop string.

    Attributes:
      ended: whether the text has reached a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: str | Sequence[str]):
        self.ended = False
        self._vocab_size = tokenizer.vocab_size
        self._kind, self._kinds = "text", kinds(tokenizer)
        self._decoder = tokenizer.stream(context)
        self._held = ""
        self._stop = [stop] if isinstance(stop, str) else listed(stop)
        if self._stop is None:
            raise ValueError(f"stop is {show(stop)}; expected strings that are not empty")
        for string in self._stop:
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop has {show(string)}; expected strings that are not empty")

    def push(self, token: int) -> Piece:
        """Takes a token; returns the text that is certain by now."""
        self._kind = self._kinds.get(token, self._kind)
        # The model's vocabulary may be larger than the tokenizer's; such tokens have no text.
        if token < self._vocab_size:
            self._held += self._decoder.push(token)
        return Piece(self._release(final=False), self._kind)

    def flush(self) -> Piece:
        """Returns the rest of the text, after the last token."""
        self._held += self._decoder.flush()
        return Piece(self._release(final=True), self._kind)

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
        """Returns the length of the longest suffix of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0
