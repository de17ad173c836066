"""Reads the fields of a SentencePiece file that the sentencepiece library does not expose.

The file is a protocol buffer, described in SentencePiece's `sentencepiece_model.proto`. This module
parses its wire format directly, so that the package does not depend on protobuf.
"""

import enum
import struct
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

# Wire types, and fields as (number, wire type). A known number with another type is ignored.
_INTEGER, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
_PIECE, _TRAINER, _NORMALIZER = (1, _BYTES), (2, _BYTES), (3, _BYTES)
_TEXT, _SCORE, _KIND = (1, _BYTES), (2, _FLOAT), (3, _INTEGER)  # of a piece
_MODEL_TYPE, _SUFFIX = (3, _INTEGER), (24, _INTEGER)  # of the trainer
_CHARSMAP, _PREFIX = (2, _BYTES), (3, _INTEGER)  # of the normalizer
_STRIPS, _ESCAPES = (4, _INTEGER), (5, _INTEGER)

_MOST_FIELDS = 1 << 20
_ALGORITHMS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}


class Kind(enum.IntEnum):
    """The type of a piece, as numbered in `sentencepiece_model.proto`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece of the vocabulary; its token id is its index in the file.

    Attributes:
      text: its spelling.
      score: merge priority; pieces with higher scores are merged first.
      kind: its type.
    """

    text: str
    score: float
    kind: Kind


class Normalizer(NamedTuple):
    """The normalization of a text before it is divided into pieces.

    Attributes:
      is_identity: whether characters are unchanged, except that spaces become U+2581.
      prefix: whether a space is put in front of the text.
    """

    is_identity: bool
    prefix: bool


def algorithm(data: bytes) -> str:
    """Returns the algorithm of a file: "unigram", "BPE", "word" or "character".

    Raises:
      ValueError: `data` is not a protocol buffer, or has more fields than any vocabulary needs.
    """
    return _ALGORITHMS.get(_merged(data, _TRAINER).get(_MODEL_TYPE), "unigram")


def pieces(data: bytes) -> list[Piece]:
    """Returns the pieces of a file in the order of their ids.

    Raises:
      ValueError: `data` is not a SentencePiece file.
    """
    found = []
    for field, value in _fields(data):
        if field == _PIECE:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(_SCORE, bytes(4)))
            kind = piece.get(_KIND, Kind.NORMAL)
            kind = Kind(kind) if kind in set(Kind) else Kind.NORMAL
            found.append(Piece(piece.get(_TEXT, b"").decode(), score, kind))
    return found


def with_control(data: bytes, spellings: Collection[str]) -> bytes:
    """Returns a file in which the pieces with these spellings are control pieces.

    Raises:
      ValueError: `data` is not a SentencePiece file.
    """
    found = [spelling for spelling in spellings if spelling.encode() in data]
    if not found:
        return data
    parts, at = [], 0
    for field, value, end in _spans(data):
        if field == _PIECE and dict(_fields(value)).get(_TEXT, b"").decode() in found:
            # The last value of a field is the one that counts.
            value += bytes((_KIND[0] << 3 | _KIND[1], Kind.CONTROL))
            parts.append(bytes((_PIECE[0] << 3 | _PIECE[1], *_to_varint(len(value)))) + value)
        else:
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def normalizer(data: bytes) -> Normalizer:
    """Returns the normalization that a file describes; raises as `pieces`."""
    says = _merged(data, _NORMALIZER)
    is_identity = (
        not says.get(_CHARSMAP)
        and not says.get(_STRIPS, True)
        and says.get(_ESCAPES, True)
        and not _merged(data, _TRAINER).get(_SUFFIX, False)
    )
    return Normalizer(bool(is_identity), bool(says.get(_PREFIX, True)))


def _merged(data: bytes, message: tuple[int, int]) -> dict[tuple[int, int], Any]:
    """Returns the fields of a submessage of the file; a later value replaces an earlier one."""
    fields = {}
    for field, value in _fields(data):
        if field == message:
            fields |= dict(_fields(value))
    return fields


def _fields(data: bytes) -> Iterator[tuple[tuple[int, int], Any]]:
    """Yields the fields of a message: (number, wire type) and value."""
    return ((field, value) for field, value, _ in _spans(data))


def _spans(data: bytes) -> Iterator[tuple[tuple[int, int], Any, int]]:
    """Yields the fields of a message as `_fields`, each with the offset of its end."""
    at, left = 0, _MOST_FIELDS
    while at < len(data):
        if not left:
            raise ValueError(f"a message has more than {_MOST_FIELDS} fields")
        left -= 1
        tag, at = _varint(data, at)
        field = tag >> 3, tag & 7
        if field[1] == _INTEGER:
            value, at = _varint(data, at)
            yield field, value, at
            continue
        if field[1] == _BYTES:
            size, at = _varint(data, at)
        else:
            size = {_FLOAT: 4, _DOUBLE: 8}.get(field[1], -1)
        if size < 0 or at + size > len(data):
            raise ValueError("a field is cut short or of an unknown kind")
        at += size
        yield field, data[at - size : at], at


def _to_varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Reads a varint, with seven bits in each byte; returns its value and the next offset."""
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
