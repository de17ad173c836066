"""Writes log-probabilities of tokens as OpenAI's two routes do."""

from collections.abc import Sequence
from typing import Any

from mistral_jax.engine.answer import Piece
from mistral_jax.engine.completion import Token
from mistral_jax.tokens.tokenizer import Tokenizer

# JSON has no infinity; vLLM writes the same for a probability of 0.
_NEVER = -9999.0


class TokenTexts:
    """Spells the tokens of one answer, in their order."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]):
        """Starts an answer.

        Args:
          tokenizer: the model's tokenizer.
          context: token ids whose text the answer continues.
        """
        self._size = tokenizer.vocab_size
        self._decoder = tokenizer.stream([token for token in context if token < self._size])

    def push(self, token: int) -> str:
        """Takes the next token; returns its text. The texts add up to the text of the answer.

        Of tokens that share a character, the last one has its text.
        """
        return self._decoder.push(token) if token < self._size else ""

    def spell(self, token: int) -> bytes:
        """Returns the bytes of a token at this place, before it is taken."""
        return self._decoder.spell(token) if token < self._size else b""


def chat(texts: TokenTexts, pieces: Sequence[Piece], top: int) -> dict[str, Any]:
    """Returns the `logprobs` of a choice of the chat route.

    Args:
      texts: spells the tokens.
      pieces: the pieces of the answer since the last call.
      top: number of likeliest tokens to list at each position.
    """
    content = []
    for piece in pieces:
        if piece.token is None:
            continue
        likeliest = list((piece.top_logprobs or {}).items())[:top]
        listed = [_entry(texts.spell(token), odds) for token, odds in likeliest]
        entry = _entry(texts.spell(piece.token), piece.logprob)
        entry |= {"token": texts.push(piece.token), "top_logprobs": listed}
        content.append(entry)
    return {"content": content, "refusal": None}


def native(texts: TokenTexts, pieces: Sequence[Piece], top: int) -> list[dict[str, Any]]:
    """Returns `completion_probabilities` of llama.cpp's route; arguments are those of `chat`."""
    found = []
    for piece in pieces:
        if piece.token is not None:
            (entry,) = chat(texts, [piece], top)["content"]
            likeliest = list(piece.top_logprobs or {})[:top]
            named = zip(likeliest, entry["top_logprobs"], strict=True)
            entry["top_logprobs"] = [{"id": token, **fields} for token, fields in named]
            found.append({"id": piece.token, **entry})
    return found


class Completion:
    """The `logprobs` of a choice of the completions route: lists, with offsets in the text."""

    def __init__(self, texts: TokenTexts, top: int):
        self._texts, self._top, self._offset = texts, top, 0

    def push(self, pieces: Sequence[Piece]) -> dict[str, list[Any]]:
        """Returns the lists of the next pieces."""
        made = self._nothing()
        for piece in pieces:
            if piece.token is not None:
                self._add(made, piece.token, _number(piece.logprob), piece.top_logprobs)
        return made

    def prompt(self, ids: Sequence[int], odds: Sequence[Token | None]) -> dict[str, list[Any]]:
        """Returns the lists of a prompt, whose first token has no log-probability."""
        made = self._nothing()
        for token, found in zip(ids, odds, strict=True):
            if found is None:
                self._add(made, token, None, None)
            else:
                self._add(made, token, _number(found.logprob), found.top_logprobs)
        return made

    @staticmethod
    def _nothing() -> dict[str, list[Any]]:
        return {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}

    def _add(self, made, token, logprob, likeliest) -> None:
        top: dict[str, float] | None = {}
        for other, odds in list((likeliest or {}).items())[: self._top]:
            top.setdefault(_text(self._texts.spell(other)), _number(odds))
        text = _text(self._texts.spell(token))
        if logprob is None:
            top = None
        else:
            top.setdefault(text, logprob)  # OpenAI lists the chosen token, too.
        made["tokens"].append(text)
        made["token_logprobs"].append(logprob)
        made["top_logprobs"].append(top)
        made["text_offset"].append(self._offset)
        self._offset += len(self._texts.push(token))


def _entry(spelled: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(spelled), "logprob": _number(logprob), "bytes": list(spelled)}


def _text(spelled: bytes) -> str:
    return spelled.decode("utf-8", "replace")


def _number(logprob: float | None) -> float:
    # A probability of 1 may round to a logarithm just above 0.
    return _NEVER if logprob is None else min(logprob, 0.0)
