"""A `.pth` or `.bin` file: a zip of raw storages, and a pickle that shapes them into tensors.

PyTorch isn't needed. Python's own unpickler may call any function of the machine, so it isn't used:
`_load` knows the few opcodes of a state dict, and calls nothing that a file names. Old files that
are no zip are not read.
"""

import io
import math
import mmap
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - NumPy then knows the name bfloat16.
import numpy as np
from rich.filesize import decimal

from mistral_jax.fields import show
from mistral_jax.files import check_content

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

# Bytes of the zip's table and of its pickle; those of a model of 1,000 tensors have some 200,000.
_MOST_TABLE, _MOST_PICKLE = 8 << 20, 2 << 20
_MOST_TENSORS = 1 << 16
_MOST_AXES = 8
# How PyTorch before 1.6 began its files: a pickle of this number.
_BEFORE_1_6 = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Refused(ValueError):
    """What is wrong with a file, in a sentence that names it."""


class _Global(NamedTuple):
    """A name that a pickle may mention. It stands for a meaning in `_call`, and is no object."""

    module: str
    name: str


_ORDERED_DICT = _Global("collections", "OrderedDict")
_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_PARAMETER_WITH_STATE = _Global("torch._utils", "_rebuild_parameter_with_state")
_TENSOR_WITH_STATE = _Global("torch._tensor", "_rebuild_from_type_v2")
_TYPES = (_Global("torch", "Tensor"), _Global("torch.nn.parameter", "Parameter"))
_STORAGES = {_Global("torch", name): dtype for name, dtype in _DTYPES.items()}
_KNOWN = {
    _ORDERED_DICT,
    _TENSOR,
    _PARAMETER,
    _PARAMETER_WITH_STATE,
    _TENSOR_WITH_STATE,
    *_TYPES,
    *_STORAGES,
}


def read(file: Path, say: Callable[[str], None] = lambda note: None) -> dict[str, np.ndarray]:
    """Maps the tensors of a file that `torch.save` wrote from a state dict.

    Args:
      file: the file.
      say: is told what is not plain: that the state dict lies within another dict.

    Returns:
      Views of the mapped file by name; nothing is read before it is used.

    Raises:
      ValueError: the file is damaged, of an old or foreign format, or its pickle names something
        that a state dict does not need.
      OSError: it cannot be read.
    """
    check_content(file, "the weights")
    members = _Members(file)
    try:
        root = members.root()
        order = root + "byteorder"
        if order in members and bytes(members.get(order, 16)) != b"little":
            raise _Refused(f"{file} is of a big-endian machine; only little-endian is read")
        held = _load(bytes(members.get(root + "data.pkl", _MOST_PICKLE)), _Tensors(members, root))
    except (_Refused, MemoryError):
        raise
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
    """A file of which no more is read at once than a zip's table may have."""

    def read(self, size: int = -1) -> bytes:
        data = super().read(_MOST_TABLE + 1 if size < 0 else min(size, _MOST_TABLE + 1))
        if len(data) > _MOST_TABLE:
            raise _Refused(f"{self.name} has a table of more than {decimal(_MOST_TABLE)}")
        return data


class _Members:
    """The members of a zip, mapped into memory."""

    def __init__(self, file: Path):
        self.file = file
        with _Bounded(str(file)) as stream:
            self._mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                with zipfile.ZipFile(stream) as archive:
                    self._infos = {info.filename: info for info in archive.infolist()}
            except (_Refused, MemoryError):
                raise
            except Exception as error:  # A damaged table too.
                raise _Refused(_why_no_zip(file, self._mapped[:16], error)) from None

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def root(self) -> str:
        """Returns what the names of all members begin with."""
        pickles = [name for name in self._infos if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise _Refused(f"{self.file} has {len(pickles)} members data.pkl; expected one")
        return pickles[0].removesuffix("data.pkl")

    def get(self, name: str, limit: int | None = None) -> memoryview:
        """Returns the bytes of a member; those of one with a `limit` are checked by their CRC."""
        info = self._infos.get(name)
        if info is None:
            raise _Refused(f"{self.file} has no member {name}, which its pickle names")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _Refused(f"member {name} of {self.file} is compressed; expected raw bytes")
        if limit is not None and info.file_size > limit:
            raise _Refused(
                f"member {name} of {self.file} has {info.file_size} bytes; expected at most {limit}"
            )
        # The name and extra field of the local header may differ from the directory's in length.
        header = self._mapped[info.header_offset : info.header_offset + 30]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + lengths
        data = memoryview(self._mapped)[start : start + info.file_size]
        if header[:4] != b"PK\x03\x04" or len(data) != info.file_size:
            raise _Refused(f"{self.file} is cut short or damaged at its member {name}")
        # PyTorch can be told to make no sums, and writes 0 for them.
        if limit is not None and info.CRC and zlib.crc32(data) != info.CRC:
            raise _Refused(f"{self.file} is damaged: its member {name} has another CRC-32")
        return data


class _Tensors:
    """Makes the tensors of a pickle."""

    def __init__(self, members: _Members, root: str):
        self._members, self._root, self._count = members, root, 0
        self.file = members.file

    def storage(self, pid: Any) -> np.ndarray:
        """Returns the storage that the pickle calls `pid`."""
        _, kind, key, _, count = pid
        if not isinstance(kind, _Global) or not isinstance(key, str | int):
            raise ValueError("a storage without a type and a name")
        dtype, name = np.dtype(_STORAGES[kind]), f"{self._root}data/{key}"
        data = self._members.get(name)
        if not _is_size(count) or count * dtype.itemsize > len(data):
            raise _Refused(
                f"member {name} of {self.file} has {len(data)} bytes; expected {show(count)} x "
                f"{dtype.itemsize}"
            )
        return np.frombuffer(data, dtype, count)

    def tensor(self, storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any):
        """Does what `torch._utils._rebuild_tensor_v2` does, within the storage's bounds."""
        self._count += 1
        if not isinstance(storage, np.ndarray):
            raise ValueError("a tensor without a storage")
        if self._count > _MOST_TENSORS or len(size) > _MOST_AXES:
            raise _Refused(
                f"{self.file} has more than {_MOST_TENSORS} tensors, or one of more than "
                f"{_MOST_AXES} axes"
            )
        inside = all(map(_is_size, (offset, *size, *stride)))
        if inside and 0 not in size:
            steps = zip(size, stride, strict=True)
            inside = offset + sum((n - 1) * step for n, step in steps) < len(storage)
        elif inside:
            inside, stride, offset = len(size) == len(stride), (0,) * len(size), 0
        if not inside or math.prod(size) >= 1 << 60:
            raise _Refused(
                f"a tensor of shape {show(size)}, strides {show(stride)} and offset {show(offset)} "
                f"in {self.file} leaves its storage of {len(storage)}"
            )
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)

    def call(self, function: Any, arguments: tuple) -> Any:
        """Returns what a function of the pickle would."""
        if function == _ORDERED_DICT and not arguments:
            return {}
        if function == _TENSOR:
            return self.tensor(*arguments)
        if function in (_PARAMETER, _PARAMETER_WITH_STATE) and isinstance(arguments[0], np.ndarray):
            return arguments[0]
        if function == _TENSOR_WITH_STATE and arguments[0] == _TENSOR and arguments[1] in _TYPES:
            return self.tensor(*arguments[2])
        raise ValueError(f"a call of {show(function)}")

    def name(self, module: str, name: str) -> _Global:
        """Returns what a name stands for."""
        found = _Global(module, name)
        if found not in _KNOWN:
            raise _Refused(
                f"the pickle in {self.file} names {module}.{name}, which is not run; expected a "
                "state dict"
            )
        return found


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _load(data: bytes, tensors: _Tensors) -> Any:
    """Returns the object of a pickle: of numbers, texts, tuples, lists, dicts and tensors.

    Time and memory are at most linear in the length of `data`.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # The stacks below each mark.
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > 64:
                raise ValueError("an integer of too many digits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            items = _last(stack, _TUPLES[name])
            del stack[-len(items) :]
            stack.append(tuple(items))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name in ("TUPLE", "LIST", "DICT", "POP_MARK"):
            items, stack = stack, outer.pop()
            if name == "DICT":
                stack.append({})
                _put(stack[-1], items)
            elif name != "POP_MARK":
                stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("SETITEMS", "APPENDS"):
            items, stack = stack, outer.pop()
            if name == "SETITEMS":
                _put(stack[-1], items)
            else:
                _list(stack[-1]).extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _put(stack[-1], [key, value])
        elif name == "APPEND":
            value = stack.pop()
            _list(stack[-1]).append(value)
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(tensors.name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            if not isinstance(last, str) or not isinstance(module, str):
                raise ValueError("a name that is no text")
            stack.append(tensors.name(module, last))
        elif name == "BINPERSID":
            stack.append(tensors.storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(tensors.call(function, arguments))
        elif name == "BUILD":
            stack.pop()  # The metadata of a state dict.
            if not isinstance(stack[-1], dict):
                raise ValueError("a state for something that has none")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the opcode {name}, which a state dict does not need")
    raise ValueError("it does not end")


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("a tuple of more than there is")
    return stack[-count:]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("items for what is no list")
    return value


def _put(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items for what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Numbers and texts alone: the hash of nested tuples has no bound of time.
        if not isinstance(key, str | int | None):
            raise ValueError(f"a {type(key).__name__} as a key")
        target[key] = value


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
