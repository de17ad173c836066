"""The protocol of tokenizers: encodes texts and conversations, decodes token ids and streams.

`Tokenizer.from_file` reads three kinds of files and tells them apart by their content. Each kind is
a module of its own: `sentencepiece.py`, `tekken.py` and `hf.py`.
"""

import abc
import codecs
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mistral_jax.base.fields import show
from mistral_jax.tokens import storage
from mistral_jax.tokens.chat import Chat

# Control tokens by which Mistral's sets of control tokens are told apart.
_VERSIONS = (("v2", "[INST]"), ("v3", "[PREFIX]"), ("v7", "[SYSTEM_PROMPT]"))

# SentencePiece decodes every invalid byte to one U+FFFD. Python's "replace" decodes several invalid
# bytes to one.
_EACH_BYTE = "mistral_jax.each_byte"
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd", error.start + 1))


class Tokenizer(Chat, abc.ABC):
    """Converts text to token ids and back with the vocabulary of a file.

    A model may have more tokens than its tokenizer: tokens that were added to it, or that pad its
    embedding table. Like control tokens, these tokens have no text.

    Attributes:
      kind: "sentencepiece", "tekken" or "tokenizer.json".
      vocab_size: number of tokens of the file.
      bos_id: token that begins a text; None = the file names none.
      eos_id: token that ends an answer; None = the file names none.
      unk_id: token for text that the vocabulary cannot spell; None = the file names none.
      adds_bos: whether BOS begins every text of the model; some models use it in chats alone.
      version: Mistral's name for the set of control tokens. A `tekken.json` states it. Otherwise it
        is detected from the control tokens: "v1" (no [INST]), "v2" ([INST] and [/INST]), "v3" (also
        [PREFIX]) or "v7" (also [SYSTEM_PROMPT]). The `tokenizer.model.v3` of 7B v0.3 on the Hugging
        Face Hub is a v2 file; chat without tools is the same in both versions. None = the control
        tokens are not Mistral's.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        vocab_size: int,
        ids: int = 0,
        *,
        bos_id: int | None,
        eos_id: int | None,
        unk_id: int | None,
        version: str | None,
    ):
        self.vocab_size, self._ids = vocab_size, max(ids, vocab_size)
        self.adds_bos = bos_id is not None
        self.bos_id, self.eos_id, self.unk_id = bos_id, eos_id, unk_id
        self.version = version

    @property
    def first_id(self) -> int:
        """The token before a text that is scored: BOS, or EOS in place of a missing BOS.

        Raises:
          ValueError: the tokenizer has neither.
        """
        token = self.eos_id if self.bos_id is None else self.bos_id
        if token is None:
            raise ValueError(
                "the tokenizer has no BOS or EOS token; expected a file that names one"
            )
        return token

    @staticmethod
    def from_file(
        path: str | Path,
        ids: int = 0,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> "Tokenizer":
        """Reads a tokenizer's file: a `tokenizer.model`, a `tekken.json` or a `tokenizer.json`.

        The content decides which of them it is, not the name. A `tokenizer.json` does not say which
        tokens begin and end a text: `tokenizer_config.json`, `special_tokens_map.json` and
        `generation_config.json` are read if they are beside it.

        Args:
          path: the file.
          ids: number of tokens of the model (V), if it has more than the file.
          bos_id: the model's BOS token, for a `tokenizer.json` with no file beside it that names
            one.
          eos_id: the same for the EOS token.

        Raises:
          ValueError: the file does not exist, is damaged or not a tokenizer, is one of an
            algorithm that is not supported, or needs a package that is not installed.
          OSError: the file cannot be read.
        """
        from mistral_jax.tokens.hf import HuggingFace
        from mistral_jax.tokens.sentencepiece import SentencePiece
        from mistral_jax.tokens.tekken import Tekken

        path = Path(path)
        kind, content = storage.read(path)
        if kind == "tokenizer.json":
            return HuggingFace.parse(content, path, ids, bos_id=bos_id, eos_id=eos_id)
        return (Tekken if kind == "tekken" else SentencePiece).parse(content, path, ids)

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, continues: bool = False
    ) -> list[int]:
        """Encodes a text without interpreting any part of it as a control token.

        Args:
          text: any text; "<s>" or "[INST]" in it are encoded as ordinary characters.
          bos: whether to put BOS in front, or EOS in place of a missing BOS.
          eos: whether to put `eos_id` at the end.
          continues: whether the text continues another one that is encoded separately. No space is
            then put before the first word, so that the concatenated ids decode to both texts.

        Returns:
          Token ids.

        Raises:
          ValueError: the text is not a string, or contains a lone surrogate (half a character); or
            the tokenizer does not have the token that `bos` or `eos` asks for.
        """
        if not isinstance(text, str):
            raise ValueError(f"the text is {show(text)}; expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
                f"{error.start}; expected valid Unicode"
            ) from None
        if eos and self.eos_id is None:
            raise ValueError("the tokenizer has no EOS token; expected a file that names one")
        begin = [self.first_id] if bos else []
        return begin + self._encode(text, continues) + [self.eos_id] * bool(eos)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes token ids; skips control tokens and replaces each invalid byte by U+FFFD.

        Raises:
          ValueError: an id is outside the vocabulary, or not an integer.
        """
        decoder = self.stream()
        return "".join(map(decoder.push, self._iterable(ids))) + decoder.flush()

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """Returns the spelling of a token in the vocabulary: "▁the", "<0xE4>" or "[INST]".

        The spelling of a token without a piece is its id in angle brackets: "<8193>".

        Raises:
          ValueError: the id is outside the vocabulary.
        """

    @abc.abstractmethod
    def is_control(self, token: int) -> bool:
        """Returns whether a token has no text: BOS, EOS, [INST] and tokens without a piece.

        Raises:
          ValueError: the id is outside the vocabulary.
        """

    @property
    @abc.abstractmethod
    def controls(self) -> Mapping[str, int]:
        """The ids of all control tokens by their spellings, such as "[INST]"."""

    def control(self, spelling: str) -> int | None:
        """Returns the id of the control token with this spelling, or None."""
        return self.controls.get(spelling)

    def stream(self, prompt: Sequence[int] = ()) -> "StreamDecoder":
        """Returns a decoder for tokens that arrive one by one.

        Args:
          prompt: the ids that the tokens continue; their text is not returned again. A word after
            a prompt keeps its leading space, which the first word of a text does not have. If the
            prompt ends with the first bytes of a character, the decoder completes it.
        """
        return StreamDecoder(self, prompt)

    @abc.abstractmethod
    def _encode(self, text: str, continues: bool) -> list[int]:
        """Encodes valid Unicode without control tokens."""

    @abc.abstractmethod
    def _spell(self, token: int, before: int | None) -> bytes | None:
        """Returns the UTF-8 bytes of a token's text; None = it has none, as a control token.

        Args:
          token: a token that is not a control token.
          before: a token that precedes it; None = it is the first token of a text. Only the leading
            space of a word depends on it.
        """

    @staticmethod
    def _iterable(ids: Iterable[int]) -> Iterable[int]:
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise ValueError(f"the ids are {show(ids)}; expected a list of token ids")
        return ids

    def _checked(self, token: int) -> int:
        try:
            token = operator.index(token)
        except TypeError:
            raise ValueError(f"a token id is {show(token)}; expected an integer") from None
        if not 0 <= token < self._ids:
            raise ValueError(
                f"token id {token} is outside the tokenizer's vocabulary; expected 0 to "
                f"{self._ids - 1}: does this tokenizer belong to the model?"
            )
        return token


class StreamDecoder:
    """Decodes one token at a time, in constant time per token.

    The concatenated results equal `Tokenizer.decode` of all tokens. Text is returned as soon as no
    later token can change it: only the first bytes of a character that several tokens spell are
    held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_EACH_BYTE)
        # One token, with text if there has been one. Words after it keep their leading space.
        self._before: int | None = None
        self._has_text = False
        # Only two properties of a prompt matter: whether it has text, and the bytes of an
        # incomplete character at its end, of which there are at most three.
        for token in prompt:
            self.push(token)
            if self._has_text:
                break
        for token in prompt[-3:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Adds the next token and returns the text that is now certain, often its own.

        Raises:
          ValueError: the id is outside the vocabulary.
        """
        is_control = self._tokenizer.is_control(token)
        spelled = None if is_control else self._tokenizer._spell(token, self._before)
        if spelled is None:
            return self.flush()
        if not self._has_text:
            self._before = token
            self._has_text = bool(self._tokenizer._spell(token, None))
        return self._utf8.decode(spelled) if spelled else self.flush()

    def spell(self, token: int) -> bytes:
        """Returns the UTF-8 bytes of a token's text at this place, without adding the token."""
        if self._tokenizer.is_control(token):
            return b""
        return self._tokenizer._spell(token, self._before) or b""

    def flush(self) -> str:
        """Returns the text that was held back: U+FFFD for each byte of an incomplete character."""
        return self._utf8.decode(b"", final=True)


def version_of(control: Mapping[str, int]) -> str:
    """Returns Mistral's name for a set of control tokens, given by spelling."""
    found = "v1"
    for version, spelling in _VERSIONS:
        if spelling not in control:
            break
        found = version
    return found
