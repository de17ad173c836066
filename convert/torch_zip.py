"""A `.pth` or `.bin` file: a zip of raw storages, and a pickle that shapes them into tensors.

PyTorch isn't needed. A pickle may name any function of the machine to be run; this one may name
those of a state dict, and is refused by name for anything else. Old files that are no zip are not
read.
"""

import collections
import mmap
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401 - NumPy then knows the name bfloat16.
import numpy as np

_DTYPES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Refused(ValueError):
    """What is wrong with a file, in a sentence that names it."""


def read(file: Path) -> dict[str, np.ndarray]:
    """Maps the tensors of a file that `torch.save` wrote from a state dict.

    Returns:
      Views of the mapped file by name; nothing is read before it is used.

    Raises:
      ValueError: the file is damaged, of an old or foreign format, or its pickle names something
        that a state dict does not need.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise _Refused(f"{file} has {len(pickles)} members data.pkl; expected one")
            root = pickles[0].removesuffix("data.pkl")
            order = root + "byteorder"
            if order in members and archive.read(order) != b"little":
                raise _Refused(f"{file} is of a big-endian machine; only little-endian is read")
            with archive.open(pickles[0]) as stream:
                unpickler = _StateDictUnpickler(stream, _Storages(file, root, members))
                tensors = unpickler.load()
    except zipfile.BadZipFile as error:
        raise ValueError(_why_no_zip(file, error)) from None
    except _Refused:
        raise
    except Exception as error:  # A damaged pickle can fail in any way.
        raise ValueError(f"the pickle in {file} is damaged: {error!r}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds a {type(tensors).__name__}; expected a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            kind = type(tensor).__name__
            raise ValueError(
                f"{file} holds a {kind} under {name!r}; expected a tensor and its name"
            )
    return tensors


class _Storages:
    """The raw members of the zip, mapped into memory."""

    def __init__(self, file: Path, root: str, members: dict[str, zipfile.ZipInfo]):
        self.file, self._root, self._members = file, root, members
        with open(file, "rb") as stream:
            self._mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def get(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        """Returns `count` elements of the storage that the pickle calls `key`."""
        name = f"{self._root}data/{key}"
        info = self._members.get(name)
        if info is None:
            raise _Refused(f"{self.file} has no member {name}, which its pickle names")
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"member {name} of {self.file} is compressed; expected raw bytes")
        if not 0 <= count * dtype.itemsize <= info.file_size:
            raise _Refused(
                f"member {name} of {self.file} has {info.file_size} bytes; expected "
                f"{count} x {dtype.itemsize}"
            )
        # The name and extra field of the local header may differ from the directory's in length.
        header = self._mapped[info.header_offset : info.header_offset + 30]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return np.frombuffer(self._mapped, dtype, count, info.header_offset + 30 + lengths)


class _StateDictUnpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, storages: _Storages):
        super().__init__(stream)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]  # A string: a pickle can alter an object, but not that.
        raise _Refused(
            f"the pickle in {self._storages.file} names {module}.{name}, which is not run; "
            "expected a state dict"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, count = pid
        return self._storages.get(key, np.dtype(dtype), count)


def _rebuild(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """Does what `torch._utils._rebuild_tensor_v2` does, within the storage's bounds."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, 0, *size, *stride) < 0 or (0 not in size and last >= len(storage)):
        raise _Refused(
            f"a tensor of shape {size}, strides {stride} and offset {offset} leaves its storage of "
            f"{len(storage)}"
        )
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _why_no_zip(file: Path, error: Exception) -> str:
    with open(file, "rb") as stream:
        start = stream.read(2)
    if start == b"PK":
        return f"{file} is cut short or damaged: {error}"
    return (
        f"{file} is not a zip, as torch.save writes since PyTorch 1.6; load and save it again with "
        "a newer PyTorch"
    )
