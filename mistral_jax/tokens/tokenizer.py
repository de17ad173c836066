"""A SentencePiece tokenizer: encodes texts and conversations, decodes token ids and streams.

It is independent of the model, and only reads tokenizer files.
"""

import codecs
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from mistral_jax.base.fields import show
from mistral_jax.base.files import read_bytes
from mistral_jax.tokens import spm
from mistral_jax.tokens.chat import Chat

# Maximum size of a file in bytes: a vocabulary of 262,144 pieces takes less than 5 MB.
MOST_BYTES = 16 << 20

# SentencePiece decodes every invalid byte to one U+FFFD. Python's "replace" decodes several invalid
# bytes to one.
_EACH_BYTE = "mistral_jax.each_byte"
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd", error.start + 1))

# A character that is in no vocabulary, so that no piece joins it to the text that follows.
_ANCHOR = "\U0010ffff".encode()


class Tokenizer(Chat):
    """Converts text to token ids and back with the vocabulary of a SentencePiece file.

    A model may have more tokens than its tokenizer has pieces: tokens that were added to it, or
    that pad its embedding table. Like control tokens, these tokens have no text.

    Attributes:
      vocab_size: number of pieces.
      bos_id: token that begins a text.
      eos_id: token that ends an answer.
      unk_id: token for text that the vocabulary cannot spell.
      version: Mistral's name for the set of control tokens, detected from the control tokens in
        the file: "v1" (no [INST]), "v2" ([INST] and [/INST]), "v3" (also [PREFIX]) or "v7" (also
        [SYSTEM_PROMPT]). The `tokenizer.model.v3` of 7B v0.3 on
        the Hugging Face Hub is a v2 file; chat without tools is the same in both versions.
    """

    kind = "sentencepiece"

    def __init__(self, model: SentencePieceProcessor, ids: int = 0):
        self._model = model
        self.vocab_size: int = model.vocab_size()
        self._ids = max(ids, self.vocab_size)
        self.bos_id: int = model.bos_id()
        self.eos_id: int = model.eos_id()
        self.unk_id: int = model.unk_id()
        self.version = "v1"
        for version, piece in (("v2", "[INST]"), ("v3", "[PREFIX]"), ("v7", "[SYSTEM_PROMPT]")):
            if not model.is_control(model.piece_to_id(piece)):
                break
            self.version = version
        control = [i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)]
        self.controls: dict[str, int] = {model.id_to_piece(i): i for i in control}
        self._anchor_length = len(model.encode(_ANCHOR))

    @classmethod
    def from_file(cls, path: str | Path, ids: int = 0) -> "Tokenizer":
        """Reads a SentencePiece file, such as a checkpoint's `tokenizer.model`.

        Args:
          path: the file.
          ids: number of tokens of the model (V), if it has more than the file.

        Raises:
          ValueError: the file does not exist, is not a SentencePiece model of type BPE, or has no
            BOS or EOS token.
          OSError: the file cannot be read.
        """
        if not Path(path).exists():
            raise ValueError(f"there is no tokenizer file {path}; expected a SentencePiece model")
        data = read_bytes(path, MOST_BYTES)
        try:
            algorithm = spm.algorithm(data)
            model = SentencePieceProcessor(model_proto=data) if data else None
            if model is None or not all(map(model.id_to_piece, range(model.vocab_size()))):
                raise ValueError("it has a piece without a spelling")
        except (RuntimeError, ValueError):  # pieces that are not UTF-8, among others
            raise ValueError(
                f"{path} is not a SentencePiece model, or is damaged; expected a tokenizer.model"
            ) from None
        if algorithm != "BPE":
            raise ValueError(
                f"{path} is a SentencePiece model of kind {algorithm}; expected BPE, which "
                "Mistral's tokenizers are"
            )
        if model.bos_id() < 0 or model.eos_id() < 0:
            raise ValueError(
                f"{path} has bos id {model.bos_id()} and eos id {model.eos_id()}; expected a "
                "tokenizer with both tokens"
            )
        return cls(model, ids)

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, continues: bool = False
    ) -> list[int]:
        """Encodes a text without interpreting any part of it as a control token.

        Args:
          text: any text; "<s>" or "[INST]" in it are encoded as ordinary characters.
          bos: whether to put `bos_id` in front.
          eos: whether to put `eos_id` at the end.
          continues: whether the text continues another one that is encoded separately. No space is
            then put before the first word, so that the concatenated ids decode to both texts.

        Returns:
          Token ids.

        Raises:
          ValueError: the text is not a string, or contains a lone surrogate (half a character).
        """
        if not isinstance(text, str):
            raise ValueError(f"the text is {show(text)}; expected a string")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
                f"{error.start}; expected valid Unicode"
            ) from None
        if continues:
            ids = self._model.encode(_ANCHOR + data)[self._anchor_length :]
        else:
            ids = self._model.encode(data)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def control(self, spelling: str) -> int | None:
        """Returns the id of a control token by its spelling; None = there is no such token."""
        token = self.lookup(spelling)
        return token if token is not None and self._model.is_control(token) else None

    def lookup(self, spelling: str) -> int | None:
        """Returns the id of any token by its spelling; None = there is no such token."""
        token = self._model.piece_to_id(spelling)
        return token if self._model.id_to_piece(token) == spelling else None

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes token ids; skips control tokens and replaces each invalid byte by U+FFFD.

        Raises:
          ValueError: an id is outside the vocabulary, or not an integer.
        """
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise ValueError(f"the ids are {show(ids)}; expected a list of token ids")
        checked = map(self._checked, ids)
        # A token without a piece ends an incomplete character, as a control token does.
        return self._model.decode([i if i < self.vocab_size else self.eos_id for i in checked])

    def piece(self, token: int) -> str:
        """Returns the spelling of a token in the vocabulary: "▁the", "<0xE4>" or "[INST]".

        The spelling of a token without a piece is its id in angle brackets: "<8193>".

        Raises:
          ValueError: the id is outside the vocabulary.
        """
        token = self._checked(token)
        return self._model.id_to_piece(token) if token < self.vocab_size else f"<{token}>"

    def is_control(self, token: int) -> bool:
        """Returns whether a token has no text: BOS, EOS, [INST] and tokens without a piece.

        Raises:
          ValueError: the id is outside the vocabulary.
        """
        token = self._checked(token)
        return token >= self.vocab_size or self._model.is_control(token)

    def stream(self, prompt: Sequence[int] = ()) -> "StreamDecoder":
        """Returns a decoder for tokens that arrive one by one.

        Args:
          prompt: the ids that the tokens continue; their text is not returned again. A word after
            a prompt keeps its leading space, which the first word of a text does not have. If the
            prompt ends with the first bytes of a character, the decoder completes it.
        """
        return StreamDecoder(self, prompt)

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
        # One token with text. Decoding after it keeps the leading space of the next word.
        self._context: list[int] = []
        self._context_length = 0
        # Only two properties of a prompt matter: whether it has text, and the bytes of an
        # incomplete character at its end, of which there are at most three.
        for token in prompt:
            self.push(token)
            if self._context_length:
                break
        for token in prompt[-3:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Adds the next token and returns the text that is now certain, often its own.

        Raises:
          ValueError: the id is outside the vocabulary.
        """
        if self._tokenizer.is_control(token):
            return self.flush()
        piece = self._tokenizer.piece(token)
        if self._tokenizer._model.is_byte(token):
            text = self._utf8.decode(bytes.fromhex(piece[3:5]))
        else:
            decoded = self._tokenizer.decode([*self._context, token])
            text = self.flush() + decoded[self._context_length :]
        if not self._context_length:
            self._context = [token]
            self._context_length = len(self._tokenizer.decode(self._context))
        return text

    def flush(self) -> str:
        """Returns the text that was held back: U+FFFD for each byte of an incomplete character."""
        return self._utf8.decode(b"", final=True)
