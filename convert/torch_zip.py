"""Maps the tensors of a `.pth` or `.bin` file, which is a zip of raw storages and a pickle.

It needs no PyTorch and calls no function that a file names (see `state_pickle.py`). Files of
PyTorch before 1.6 are not zips and are refused.
"""

import io
import math
import mmap
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers the dtype bfloat16 with NumPy
import numpy as np
from rich.filesize import decimal

from mistral_jax.base.fields import show
from mistral_jax.base.files import check_content

from . import state_pickle

# Maximum bytes of the zip's central directory and of the pickle; for 1,000 tensors both take about
# 200,000.
_MOST_TABLE, _MOST_PICKLE = 8 << 20, 2 << 20
_MOST_TENSORS = 1 << 16
_MOST_AXES = 8
# First bytes of files of PyTorch before 1.6: the pickle of a magic number.
_BEFORE_1_6 = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Refused(ValueError):
    """A file cannot be read; the message names the file."""


def read(file: Path, say: Callable[[str], None] = lambda note: None) -> dict[str, np.ndarray]:
    """Maps the tensors of a state dict that `torch.save` wrote.

    Args:
      file: the file.
      say: called with a message if the state dict is nested in another dict.

    Returns:
      Views of the memory-mapped file by name; values are read when they are used.

    Raises:
      ValueError: the file is damaged or has an unsupported format, or its pickle names a function
        or class that a state dict does not need.
      OSError: the file cannot be read.
    """
    check_content(file, "the weights")
    members = _Members(file)
    try:
        root = members.root()
        order = root + "byteorder"
        if order in members and bytes(members.get(order, 16)) != b"little":
            raise _Refused(f"{file} was written on a big-endian machine; expected little-endian")
        tensors = _Tensors(members, root)
        pickled = bytes(members.get(root + "data.pkl", _MOST_PICKLE))
        held = state_pickle.load(pickled, tensors.storage, tensors.tensor)
    except (_Refused, MemoryError):
        raise
    except state_pickle.Unknown as error:
        raise ValueError(
            f"the pickle in {file} names {error}, which is not run; expected a state dict"
        ) from None
    except Exception as error:  # A damaged pickle can fail in any way.
        kind = type(error).__name__
        raise ValueError(f"the pickle in {file} is damaged ({kind}: {error})") from None
    if not isinstance(held, dict):
        raise ValueError(f"{file} holds a {type(held).__name__}; expected a dict of tensors")
    within = [name for name, value in held.items() if _is_state_dict(value)]
    if within and not any(isinstance(value, np.ndarray) for value in held.values()):
        if len(within) > 1:
            several = " and ".join(map(show, within[:3]))
            raise ValueError(
                f"{file} holds several state dicts, under {several}; expected one: save it alone"
            )
        say(f"{file} holds a dict; its tensors are those under {show(within[0])}")
        return held[within[0]]
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            kind = type(tensor).__name__
            raise ValueError(
                f"{file} holds a {kind} under {show(name)}; expected a tensor and its name"
            )
    return held


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and all(isinstance(tensor, np.ndarray) for tensor in value.values())
    )


class _Bounded(io.FileIO):
    """A file that limits single reads, so that a forged zip directory cannot exhaust memory."""

    def read(self, size: int = -1) -> bytes:
        data = super().read(_MOST_TABLE + 1 if size < 0 else min(size, _MOST_TABLE + 1))
        if len(data) > _MOST_TABLE:
            raise _Refused(f"{self.name} has a table of more than {decimal(_MOST_TABLE)}")
        return data


class _Members:
    """The memory-mapped members of a zip."""

    def __init__(self, file: Path):
        self.file = file
        with _Bounded(str(file)) as stream:
            self._mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                with zipfile.ZipFile(stream) as archive:
                    self._infos = {info.filename: info for info in archive.infolist()}
            except (_Refused, MemoryError):
                raise
            except Exception as error:  # zipfile raises errors of many types for a damaged file
                raise _Refused(_why_no_zip(file, self._mapped[:16], error)) from None

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def root(self) -> str:
        """Returns the common prefix of the names of all members."""
        pickles = [name for name in self._infos if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise _Refused(f"{self.file} has {len(pickles)} members data.pkl; expected one")
        return pickles[0].removesuffix("data.pkl")

    def get(self, name: str, limit: int | None = None) -> memoryview:
        """Returns the bytes of a member.

        Args:
          name: name of the member.
          limit: maximum size in bytes, which also enables the check of the CRC; None = neither.
        """
        info = self._infos.get(name)
        if info is None:
            raise _Refused(f"{self.file} has no member {name}, which its pickle names")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _Refused(f"member {name} of {self.file} is compressed; expected raw bytes")
        if limit is not None and info.file_size > limit:
            raise _Refused(
                f"member {name} of {self.file} has {info.file_size} bytes; expected at most {limit}"
            )
        # The name and the extra field of the local header can have other lengths than those in the
        # central directory.
        header = self._mapped[info.header_offset : info.header_offset + 30]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + lengths
        data = memoryview(self._mapped)[start : start + info.file_size]
        if header[:4] != b"PK\x03\x04" or len(data) != info.file_size:
            raise _Refused(f"{self.file} is cut short or damaged at its member {name}")
        # PyTorch writes 0 if it was told to compute no CRC.
        if limit is not None and info.CRC and zlib.crc32(data) != info.CRC:
            raise _Refused(f"{self.file} is damaged: its member {name} has another CRC-32")
        return data


class _Tensors:
    """Makes the storages and tensors that a pickle describes."""

    def __init__(self, members: _Members, root: str):
        self._members, self._root, self._count = members, root, 0
        self.file = members.file

    def storage(self, kind: str, key: str, count: int) -> np.ndarray:
        """Returns the storage `key` as an array of one axis."""
        dtype, name = np.dtype(state_pickle.STORAGES[kind]), f"{self._root}data/{key}"
        data = self._members.get(name)
        if not 0 <= count * dtype.itemsize <= len(data):
            raise _Refused(
                f"member {name} of {self.file} has {len(data)} bytes; expected {count} x "
                f"{dtype.itemsize}"
            )
        return np.frombuffer(data, dtype, count)

    def tensor(
        self, storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> np.ndarray:
        """Does the work of `torch._utils._rebuild_tensor_v2` and checks the storage's bounds."""
        self._count += 1
        if self._count > _MOST_TENSORS or len(shape) > _MOST_AXES:
            raise _Refused(
                f"{self.file} has more than {_MOST_TENSORS} tensors, or one of more than "
                f"{_MOST_AXES} axes"
            )
        steps = zip(shape, strides, strict=True)
        last = offset + sum((n - 1) * step for n, step in steps)
        outside = min(offset, 0, *shape, *strides) < 0 or (0 not in shape and last >= len(storage))
        if outside or math.prod(shape) >= 1 << 60:
            raise _Refused(
                f"a tensor of shape {shape}, strides {strides} and offset {offset} in {self.file} "
                f"leaves its storage of {len(storage)}"
            )
        if 0 in shape:
            return storage[:0].reshape(shape)
        strides = [step * storage.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)


def _why_no_zip(file: Path, start: bytes, error: Exception) -> str:
    if start.startswith(b"PK"):
        return f"{file} is cut short or damaged: {error}"
    if _BEFORE_1_6 in start:
        return (
            f"{file} is not a zip, as torch.save writes since PyTorch 1.6; load and save it again "
            "with a newer PyTorch"
        )
    return (
        f"{file} is not a zip, as torch.save writes it; it begins with {start!r}: fetch it again, "
        "or save it with PyTorch"
    )
