"""Interprets the pickle of a state dict without executing code from it.

Python's unpickler can call any function, allocates the sizes that opcodes name, and hashes nested
objects. This interpreter supports only the opcodes of a state dict, calls no function that a pickle
names, and takes time and memory at most linear in the length of the pickle.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mistral_jax.base.fields import show

MakeStorage = Callable[[str, str, int], np.ndarray]
MakeTensor = Callable[[np.ndarray, int, tuple[int, ...], tuple[int, ...]], np.ndarray]


class Unknown(ValueError):
    """A pickle names a function or class that a state dict does not need."""


class _Name(NamedTuple):
    """The name of a function or class, never the object itself; `_call` does what it would do."""

    module: str
    name: str


_DICT = _Name("collections", "OrderedDict")
_TENSOR = _Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETERS = (
    _Name("torch._utils", "_rebuild_parameter"),
    _Name("torch._utils", "_rebuild_parameter_with_state"),
)
_TENSOR_WITH_STATE = _Name("torch._tensor", "_rebuild_from_type_v2")
_TYPES = (_Name("torch", "Tensor"), _Name("torch.nn.parameter", "Parameter"))
STORAGES = {
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
_KNOWN = {
    *(_DICT, _TENSOR, *_PARAMETERS, _TENSOR_WITH_STATE, *_TYPES),
    *(_Name("torch", name) for name in STORAGES),
}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def load(data: bytes, storage: MakeStorage, tensor: MakeTensor) -> Any:
    """Returns the object of a pickle: numbers, strings, tuples, lists, dicts and tensors.

    Args:
      data: the pickle.
      storage: returns the storage for a class name ("FloatStorage"), a key and a number of
        elements.
      tensor: returns the tensor for a storage, an offset, a shape and strides, all in elements.

    Raises:
      Unknown: the pickle names a function or class that a state dict does not need.
      Exception: the pickle is damaged. The type varies: IndexError, for instance, if the stack is
        empty.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
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
            stack.append(_known(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            if not isinstance(last, str) or not isinstance(module, str):
                raise ValueError("a name that is not a string")
            stack.append(_known(module, last))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storage))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments, tensor))
        elif name == "BUILD":
            stack.pop()  # the metadata of a state dict
            if not isinstance(stack[-1], dict):
                raise ValueError("a state for an object that is not a dict")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the opcode {name}, which a state dict does not need")
    raise ValueError("it does not end")


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("a tuple of more items than there are")
    return stack[-count:]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("items for an object that is not a list")
    return value


def _put(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items for an object that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Integers and strings only: hashing nested tuples can take exponential time.
        if not isinstance(key, str | int | None):
            raise ValueError(f"a {type(key).__name__} as a key")
        target[key] = value


def _known(module: str, name: str) -> _Name:
    found = _Name(module, name)
    if found not in _KNOWN:
        raise Unknown(f"{module}.{name}")
    return found


def _storage(pid: Any, make: MakeStorage) -> np.ndarray:
    """Returns the storage for a persistent id, a tuple."""
    if not isinstance(pid, tuple) or len(pid) != 5:
        raise ValueError("a storage without a name")
    _, kind, key, _, count = pid
    if not isinstance(kind, _Name) or kind.name not in STORAGES or not isinstance(key, str):
        raise ValueError("a storage without a type and a name")
    return make(kind.name, key, _integer(count))


def _call(function: Any, arguments: Any, tensor: MakeTensor) -> Any:
    """Returns the result that the named function would return in PyTorch."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of an object that is not a function")
    if function == _DICT and not arguments:
        return {}
    if function == _TENSOR:
        return _tensor(arguments, tensor)
    if function in _PARAMETERS and isinstance(arguments[0], np.ndarray):
        return arguments[0]
    if function == _TENSOR_WITH_STATE:
        inner, kind, own, *_ = arguments
        names = isinstance(inner, _Name) and isinstance(kind, _Name)
        if names and inner == _TENSOR and kind in _TYPES:
            return _tensor(own, tensor)
    raise ValueError(f"a call of {function.name} with arguments that no state dict has")


def _tensor(arguments: Any, make: MakeTensor) -> np.ndarray:
    storage, offset, *shape_and_strides = arguments[:4] if isinstance(arguments, tuple) else ()
    if not isinstance(storage, np.ndarray):
        raise ValueError("a tensor without a storage")
    shape, strides = shape_and_strides
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor without a shape")
    return make(
        storage, _integer(offset), tuple(map(_integer, shape)), tuple(map(_integer, strides))
    )


def _integer(value: Any) -> int:
    if type(value) is not int or abs(value) >= 1 << 60:
        raise ValueError(f"{show(value)} as a size")
    return value
