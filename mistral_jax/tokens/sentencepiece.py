"""SentencePiece tokenizers, the `tokenizer.model` of Llama and of Mistral's first models."""

from collections.abc import Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from mistral_jax.tokens import hf_file, spm
from mistral_jax.tokens.tokenizer import Tokenizer, version_of

# A character that is in no vocabulary, so that no piece joins it to the text that follows.
_ANCHOR = "\U0010ffff".encode()

# Pieces of CodeLlama that mark what is to be filled in. A text that spells them is a text.
_INFILLING = frozenset(("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))


class SentencePiece(Tokenizer):
    """A tokenizer that the sentencepiece library runs.

    Fine-tunes add tokens to a model and not to its `tokenizer.model`. The files of Hugging Face
    beside it name them. They are control tokens, whose text nobody can type.
    """

    kind = "sentencepiece"

    def __init__(
        self, model: SentencePieceProcessor, ids: int = 0, added: Mapping[int, str] | None = None
    ):
        self._model = model
        size = model.vocab_size()
        self._control = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
        super().__init__(
            size,
            ids,
            bos_id=model.bos_id(),
            eos_id=model.eos_id(),
            unk_id=model.unk_id(),
            version=version_of(self._control),
        )
        self._added = {i: text for i, text in (added or {}).items() if size <= i < self._ids}
        self._control = {text: i for i, text in self._added.items()} | self._control
        self._anchor_length = len(model.encode(_ANCHOR))

    @classmethod
    def parse(cls, data: bytes, path: Path, ids: int = 0) -> "SentencePiece":
        """Reads the contents of a file; see `Tokenizer.from_file`.

        Raises:
          ValueError: `data` is not a SentencePiece model of type BPE, or has no BOS or EOS token.
        """
        try:
            algorithm = spm.algorithm(data)
            data = spm.with_control(data, _INFILLING)
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
        return cls(model, ids, hf_file.added_names(path.parent))

    def decode(self, ids):
        """Decodes token ids; see `Tokenizer.decode`."""
        checked = map(self._checked, self._iterable(ids))
        # A token without a piece ends an incomplete character, as a control token does.
        return self._model.decode([i if i < self.vocab_size else self.eos_id for i in checked])

    def piece(self, token: int) -> str:
        """Returns the spelling of a token; see `Tokenizer.piece`."""
        token = self._checked(token)
        if token < self.vocab_size:
            return self._model.id_to_piece(token)
        return self._added.get(token, f"<{token}>")

    def is_control(self, token: int) -> bool:
        """Returns whether a token has no text; see `Tokenizer.is_control`."""
        token = self._checked(token)
        return token >= self.vocab_size or self._model.is_control(token)

    @property
    def controls(self) -> Mapping[str, int]:
        """The ids of control tokens; see `Tokenizer.controls`."""
        return self._control

    def _encode(self, text: str, continues: bool) -> list[int]:
        data = text.encode()
        if continues:
            return self._model.encode(_ANCHOR + data)[self._anchor_length :]
        return self._model.encode(data)

    def _spell(self, token: int, before: int | None) -> bytes:
        if self._model.is_byte(token):
            return bytes.fromhex(self.piece(token)[3:5])
        if before is None:
            return self.decode([token]).encode()
        return self.decode([before, token])[len(self.decode([before])) :].encode()
