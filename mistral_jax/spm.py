"""Reads the fields of a SentencePiece file that its own library does not tell. It encodes nothing.

The file is a protocol buffer; its messages are described in SentencePiece's own
`sentencepiece_model.proto`. Reading them takes no library for protocol buffers.
"""

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_MOST_FIELDS = 1 << 20
_ALGORITHMS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}


class Kind(enum.IntEnum):
    """What a piece stands for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece of the vocabulary; its id is its place.

    Attributes:
      text: its spelling.
      score: the higher, the earlier it is merged.
      kind: what it stands for.
    """

    text: str
    score: float
    kind: Kind


class Normalizer(NamedTuple):
    """What is done to a text before it is divided.

    Attributes:
      is_identity: whether characters stay as they are, but for spaces, which become U+2581.
      prefix: whether a space is put in front.
    """

    is_identity: bool
    prefix: bool


def algorithm(data: bytes) -> str:
    """Returns how a vocabulary divides a text: "unigram", "BPE", "word" or "character".

    Raises:
      ValueError: `data` is no protocol buffer, or has more pieces than any vocabulary.
    """
    kind = 1
    for count, (number, value) in enumerate(_fields(data)):
        if count == _MOST_FIELDS:
            raise ValueError(f"it has more than {_MOST_FIELDS} pieces")
        if number == _TRAINER and isinstance(value, bytes):
            kind = dict(_fields(value)).get(3, kind)
    return _ALGORITHMS.get(kind, f"unknown ({kind})")


def pieces(data: bytes) -> list[Piece]:
    """Returns the pieces of a file that SentencePiece has read."""
    found = []
    for number, value in _fields(data):
        if number == _PIECE:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            found.append(Piece(piece[1].decode(), score, Kind(piece.get(3, Kind.NORMAL))))
    return found


def normalizer(data: bytes) -> Normalizer:
    """Returns what a file that SentencePiece has read says of a text's characters and spaces."""
    fields, suffix = {}, 0
    for number, value in _fields(data):
        if number == _NORMALIZER:
            fields |= dict(_fields(value))
        if number == _TRAINER:
            suffix = dict(_fields(value)).get(24, suffix)
    charsmap, prefix, strips, escapes = (
        fields.get(key, default) for key, default in ((2, b""), (3, 1), (4, 1), (5, 1))
    )
    return Normalizer(not charsmap and not strips and bool(escapes) and not suffix, bool(prefix))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the number and the value of each field of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > len(data):
            raise ValueError("a field is cut short or of an unknown kind")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Reads an integer of seven bits a byte; returns it and the place behind it."""
    value = 0
    for shift in range(0, 64, 7):
        if at == len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an integer is cut short or too long")
