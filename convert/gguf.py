"""Reads GGUF files, the format of llama.cpp: metadata and tensors, with nothing but NumPy.

A file has a table of metadata, a table of tensors, and the tensors' data. Tensors are mapped into
memory, and quantised ones are dequantised when they are used (`gguf_blocks.py`). The layout is that
of `docs/gguf.md` of the ggml project.
"""

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.filesize import decimal

from mistral_jax.base.fields import show
from mistral_jax.base.files import check_content

from .gguf_blocks import KINDS, OTHERS, Kind

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
# Types of metadata by their numbers: the codes of `struct`; then strings and arrays.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# The most entries of a table, elements of an array of metadata, bytes of a string, and axes.
_MOST_ENTRIES, _MOST_ELEMENTS, _MOST_STRING, _MOST_AXES = 1 << 16, 1 << 21, 1 << 24, 4
_MOST_ALIGNMENT = 1 << 20
# Numbers that are dequantised at a time, so that intermediate results take little memory.
_AT_ONCE = 1 << 20
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """A tensor, and the file that it is in."""

    file: Path
    array: "np.ndarray | Quantized"


class Gguf(NamedTuple):
    """The contents of a file.

    Attributes:
      metadata: the values by key, such as "llama.block_count".
      tensors: the tensors by name, such as "blk.0.attn_q.weight", with output axes first.
    """

    metadata: dict[str, Any]
    tensors: "dict[str, np.ndarray | Quantized]"


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantised tensor of a mapped file; NumPy dequantises it where it needs an array.

    Attributes:
      kind: the type of its blocks.
      shape: its shape, output axes first.
      blocks: the mapped blocks, [n, bytes of a block] uint8.
    """

    kind: Kind
    shape: tuple[int, ...]
    blocks: np.ndarray

    dtype = np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """The bytes in the file."""
        return self.blocks.nbytes

    def __getitem__(self, index: int) -> "Quantized":
        """Returns an entry of the first axis."""
        count = len(self.blocks) // self.shape[0]
        part = self.blocks[index * count : (index + 1) * count]
        return Quantized(self.kind, self.shape[1:], part)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the numbers in float32."""
        numbers = np.empty((len(self.blocks), self.kind.numbers), np.float32)
        step = max(1, _AT_ONCE // self.kind.numbers)
        with np.errstate(over="ignore", invalid="ignore"):  # Damaged scales are reported later.
            for start in range(0, len(numbers), step):
                part = slice(start, start + step)
                numbers[part] = self.kind.widen(self.blocks[part])
        return numbers.reshape(self.shape).astype(dtype or np.float32, copy=False)


def read(file: Path) -> Gguf:
    """Maps a file.

    Raises:
      ValueError: the file is no GGUF file, is cut short or damaged, or has tensors of a type that
        is not supported.
      OSError: the file cannot be read.
    """
    check_content(file, "a GGUF file")
    with open(file, "rb") as stream:
        if (start := stream.read(4)) != _MAGIC:
            raise ValueError(f"{file} begins with {start!r}; expected a GGUF file, with {_MAGIC!r}")
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(file, data, 4)
    if (version := reader.number("I")) not in _VERSIONS:
        raise ValueError(
            f"{file} has GGUF version {version}; expected {' or '.join(map(str, _VERSIONS))}, "
            "little-endian: convert it again with a newer llama.cpp"
        )
    tensors, values = (reader.count("Q", _MOST_ENTRIES, what) for what in ("tensors", "values"))
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"{file} has the key {show(key)} twice; expected it once")
        metadata[key] = reader.value(reader.number("I"), key)
    described = list(_described(reader, tensors))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MOST_ALIGNMENT:
        raise ValueError(
            f"{file} has general.alignment {show(alignment)}; expected 1 to {_MOST_ALIGNMENT}"
        )
    begin = math.ceil(reader.at / alignment) * alignment
    found: dict[str, np.ndarray | Quantized] = {}
    for name, shape, kind, offset in described:
        if name in found:
            raise ValueError(f"{file} has tensor {show(name)} twice; expected it once")
        count = math.prod(shape) // kind.numbers
        end = begin + offset + count * kind.size
        if end > len(data):
            raise ValueError(
                f"{file} is cut short: tensor {show(name)} ends at byte {end}, and the file at "
                f"{len(data)}: fetch it again"
            )
        raw = np.frombuffer(data, np.uint8, count * kind.size, begin + offset)
        if kind.dtype is not None:
            found[name] = raw.view(kind.dtype).reshape(shape)
        else:
            found[name] = Quantized(kind, shape, raw.reshape(count, kind.size))
    return Gguf(metadata, found)


def parts(file: Path) -> list[Path]:
    """Returns the files that hold a model, given one of them: NAME-00001-of-00003.gguf and so on.

    Raises:
      ValueError: one of them is missing.
    """
    named = _PART.fullmatch(file.name)
    if named is None:
        return [file]
    count = int(named[3])
    files = [file.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := next((part for part in files if not part.is_file()), None):
        raise ValueError(f"there is no file {missing}; expected the {count} parts of {file.name}")
    return files


def read_all(files: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Maps the files of a model.

    Returns:
      The metadata of the first file, and the tensors of all by name.

    Raises:
      ValueError: as `read`; or two files hold the same tensor.
    """
    metadata: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for file in files:
        held = read(file)
        metadata = metadata or held.metadata
        for name, tensor in held.tensors.items():
            if name in tensors:
                others = f"{tensors[name].file} and {file}"
                raise ValueError(f"tensor {show(name)} is in {others}; expected it in one of them")
            tensors[name] = Tensor(file, tensor)
    return metadata, tensors


def _described(reader: "_Reader", count: int) -> Iterator[tuple[str, tuple[int, ...], Kind, int]]:
    """Yields the name, shape, type and offset of each tensor."""
    for _ in range(count):
        name = reader.string()
        axes = reader.count("I", _MOST_AXES, f"axes of tensor {show(name)}")
        shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
        number, offset = reader.number("I"), reader.number("Q")
        if number not in KINDS:
            known = ", ".join(kind.name for kind in KINDS.values())
            raise ValueError(
                f"{reader.file} has tensor {show(name)} of type {OTHERS.get(number, number)}; "
                f"expected one of {known}"
            )
        kind = KINDS[number]
        if not shape or 0 in shape or math.prod(shape) >= 1 << 48 or shape[-1] % kind.numbers:
            raise ValueError(
                f"{reader.file} has tensor {show(name)} of shape {shape} and type {kind.name}; "
                f"expected axes above 0, the last a multiple of {kind.numbers}"
            )
        yield name, shape, kind, offset


class _Reader:
    """Reads the tables of a mapped file from front to back."""

    def __init__(self, file: Path, data: mmap.mmap, at: int):
        self.file, self._data, self.at = file, data, at

    def number(self, code: str) -> Any:
        """Reads a number with a code of `struct`."""
        return self._numbers(code, 1)[0]

    def count(self, code: str, most: int, what: str) -> int:
        """Reads a number of things, of which there are at most `most`."""
        count = self.number(code)
        if count > most:
            raise ValueError(f"{self.file} has {count} {what}; expected at most {most}")
        return count

    def string(self) -> str:
        """Reads a string."""
        size = self.count("Q", _MOST_STRING, "bytes in a string")
        data = self._bytes(size)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"{self.file} has a string that is not UTF-8, {show(data)}: fetch it again"
            ) from None

    def value(self, kind: int, key: str) -> Any:
        """Reads a value of metadata: a number, a string or a list of some."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"{self.file} has {show(key)} of the unknown type {kind}")
        inner = self.number("I")
        count = self.count("Q", _MOST_ELEMENTS, f"elements in {show(key)}")
        if inner in _NUMBERS:
            return list(self._numbers(_NUMBERS[inner], count))
        if inner != _STRING:
            raise ValueError(
                f"{self.file} has {show(key)} as a list of type {inner}; expected numbers or "
                "strings"
            )
        return [self.string() for _ in range(count)]

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        form = f"<{count}{code}"
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _bytes(self, size: int) -> bytes:
        data = self._data[self.at : self.at + size]
        if len(data) < size:
            raise ValueError(
                f"{self.file} is cut short: its tables need more than its "
                f"{decimal(len(self._data))}: fetch it again"
            )
        self.at += size
        return data
