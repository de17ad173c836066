"""Fields of a dataclass from a table of values: each is checked by its type. It knows no recipe."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")


def build(cls: type[T], fields: Mapping[str, Any], source: str, prefix: str = "") -> T:
    """Builds a dataclass, and those within it, from nested tables.

    Args:
      cls: the dataclass.
      fields: its values by name; lists stand for tuples.
      source: what messages call their place.
      prefix: names of the tables around it.

    Raises:
      ValueError: a name is unknown or missing, or a value is invalid.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise ValueError(
                f"{source}: unknown key {prefix + name!r}; the nearest known one is "
                f"{prefix + near!r}"
            )
    missing = [
        prefix + name
        for name, field in known.items()
        if name not in fields
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{source}: missing {', '.join(missing)}")
    values = {}
    for name, value in fields.items():
        inner = next(filter(dataclasses.is_dataclass, _choices(hints[name])), None)
        if inner is not None and isinstance(value, Mapping):
            value = build(inner, value, source, f"{prefix}{name}.")
        is_list = isinstance(value, list) and typing.get_origin(_choices(hints[name])[0]) is tuple
        values[name] = tuple(value) if is_list else value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def check(
    made: Any,
    prefix: str = "",
    zero: Collection[str] = (),
    among: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Checks the values of a dataclass by their types, as its `__post_init__`.

    Args:
      made: the dataclass; whole numbers must be at least 1, others finite and at least 0.
      prefix: what stands before names in messages.
      zero: names of whole numbers that may be 0.
      among: the known values of some fields.

    Raises:
      ValueError: a value is not of its field's type, out of range, or not known.
    """
    hints = typing.get_type_hints(type(made))
    for field in dataclasses.fields(made):
        value, choices = getattr(made, field.name), _choices(hints[field.name])
        if value is None and type(None) in choices:
            continue
        kind = choices[0]
        if kind is int:
            least = 0 if field.name in zero else 1
            good = isinstance(value, int) and not isinstance(value, bool) and value >= least
            expected = f"an integer of at least {least}"
        elif kind is float:
            good = isinstance(value, int | float) and not isinstance(value, bool)
            good = good and 0 <= value < math.inf
            expected = "a finite number of at least 0"
        elif kind is bool:
            good, expected = isinstance(value, bool), "true or false"
        elif kind is str:
            good, expected = isinstance(value, str), "a string"
        elif typing.get_origin(kind) is tuple:
            good = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
            expected = "a list of strings"
        elif dataclasses.is_dataclass(kind):
            good, expected = isinstance(value, kind), "a table"
        else:
            good, expected = isinstance(value, Mapping), "a table"
        if not good:
            raise ValueError(f"{prefix}{field.name} is {value!r}; expected {expected}")
    for name, known in among.items():
        if getattr(made, name) not in known:
            raise ValueError(
                f"{prefix}{name} is {getattr(made, name)!r}; expected one of {', '.join(known)}"
            )


def _choices(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, in their order, or the one type."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
