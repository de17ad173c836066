"""Tokenizers of Hugging Face, in a `tokenizer.json`: byte-level BPE and others."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.base.files import parse_json
from mistral_jax.tokens import hf_file, libraries
from mistral_jax.tokens.hf_file import Contents
from mistral_jax.tokens.tokenizer import Tokenizer, version_of

_BYTE = re.compile("<0x([0-9A-F]{2})>")


class HuggingFace(Tokenizer):
    """A tokenizer that the tokenizers library runs.

    Control tokens are the special ones among the added tokens, the tokens that are named as special
    ones, and added tokens of the form `<|...|>`. Other added tokens are text.
    """

    kind = "tokenizer.json"

    def __init__(self, contents: Contents, source: str, ids: int = 0):
        self._contents = contents
        self._hf = _load(contents.described, source)
        for hidden, spelling, token in contents.added:
            if (found := self._hf.token_to_id(hidden)) != token:
                raise ValueError(
                    f"{source} has the added token {show(spelling)} with id {token}; expected "
                    f"{found}, which the tokenizers library gives it"
                )
        self._continuing = self._without_prefix(source)
        ends = (contents.bos_id, contents.eos_id)
        self._text = set(contents.pieces) - set(contents.control.values())
        if contents.unk_id is not None and contents.unk_id not in ends:
            self._text.add(contents.unk_id)
        self._added = {token: spelling.encode() for _, spelling, token in contents.added}
        self._spelled: dict[tuple[int, bool], bytes] = {}
        self._anchor = next(
            (i for i in sorted(self._text) if self._hf.decode([i], False).strip().isalnum()), None
        )
        others = set(contents.control) - {"<s>", "</s>", "<unk>", "<pad>"}
        is_mistral = "[INST]" in others or (not others and {"<s>", "</s>"} <= set(contents.control))
        super().__init__(
            max(contents.pieces, default=-1) + 1,
            ids,
            bos_id=contents.bos_id,
            eos_id=contents.eos_id,
            unk_id=contents.unk_id,
            version=version_of(contents.control) if is_mistral else None,
        )
        self.adds_bos = contents.adds_bos

    @classmethod
    def parse(
        cls,
        described: Mapping[str, Any],
        path: Path,
        ids: int = 0,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> "HuggingFace":
        """Reads the JSON value of a file, and the files beside it; see `Tokenizer.from_file`."""
        names = hf_file.read_names(path.parent)
        return cls(hf_file.read(described, str(path), names, bos_id, eos_id), str(path), ids)

    @classmethod
    def from_json(
        cls,
        text: str,
        ids: int = 0,
        *,
        names: Mapping[str, Any] | None = None,
        source: str = "tokenizer.json",
    ) -> "HuggingFace":
        """Reads the contents of a `tokenizer.json` that is not a file.

        Args:
          text: the contents.
          ids: number of tokens of the model (V), if it has more.
          names: what a `tokenizer_config.json` may say: "bos_token", "eos_token" (spellings),
            "bos_token_id", "eos_token_id", "add_bos_token".
          source: name for error messages.

        Raises:
          ValueError: as `Tokenizer.from_file`.
        """
        described = parse_json(text, source)
        if not isinstance(described, dict):
            raise ValueError(
                f"{source} holds a JSON {type(described).__name__}; expected an object"
            )
        described.setdefault("model", None)
        return cls(hf_file.read(described, source, names or {}), source, ids)

    def piece(self, token: int) -> str:
        """Returns the spelling of a token; see `Tokenizer.piece`."""
        token = self._checked(token)
        return self._contents.pieces.get(token, f"<{token}>")

    def is_control(self, token: int) -> bool:
        """Returns whether a token has no text; see `Tokenizer.is_control`."""
        return self._checked(token) not in self._text

    @property
    def controls(self) -> Mapping[str, int]:
        """The ids of control tokens; see `Tokenizer.controls`."""
        return self._contents.control

    def _encode(self, text: str, continues: bool) -> list[int]:
        encoder = self._continuing if continues else self._hf
        problem = "the tokenizers library cannot encode the text"
        return libraries.call(problem, encoder.encode, text, add_special_tokens=False).ids

    def _spell(self, token: int, before: int | None) -> bytes | None:
        if token == self.unk_id:
            return None
        key = token, before is None
        if key not in self._spelled:
            self._spelled[key] = self._spell_anew(*key)
        return self._spelled[key]

    def _spell_anew(self, token: int, is_first: bool) -> bytes:
        piece, decoders = self._contents.pieces[token], self._contents.decoders
        if "ByteLevel" in decoders:
            return self._added.get(token) or _bytes(piece)
        byte = _BYTE.fullmatch(piece) if "ByteFallback" in decoders else None
        if byte and int(byte[1], 16) > 0x7F:
            return bytes.fromhex(byte[1])
        if is_first or self._anchor is None:
            return self._hf.decode([token], False).encode()
        start = len(self._hf.decode([self._anchor], False))
        return self._hf.decode([self._anchor, token], False)[start:].encode()

    def _without_prefix(self, source: str):
        """Returns the tokenizer that puts no space before a text; it shares the vocabulary."""
        described = hf_file.without_prefix(self._contents.described)
        if described is None:
            return self._hf
        model = {"type": "BPE", "vocab": {}, "merges": []}
        other = _load({**described, "model": model, "added_tokens": []}, source)
        other.model = self._hf.model
        # In the order of their ids, so that they get the same ones.
        for _, token in sorted(self._hf.get_added_tokens_decoder().items()):
            (other.add_special_tokens if token.special else other.add_tokens)([token])
        return other


def _load(described: Mapping[str, Any], source: str):
    library = libraries.load("tokenizers", "tokenizer-json", "tokenizer.json")
    problem = f"{source} is not a tokenizer.json that the tokenizers library reads"
    return libraries.call(problem, library.Tokenizer.from_str, json.dumps(described))


def _alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves, and the next ones from U+0100 on for the
    other bytes in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_ALPHABET = _alphabet()


def _bytes(piece: str) -> bytes:
    """Returns the bytes of a piece of a byte-level vocabulary."""
    found = [_ALPHABET.get(character) for character in piece]
    return piece.encode() if None in found else bytes(found)
