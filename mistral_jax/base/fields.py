"""Checks values from outside by a table of types and ranges, before anything is computed of them.

A table of `Rule`s describes a foreign file (`check_table`); a dataclass describes our own (`build`,
`check`).
"""

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

LARGEST_INT = 2**31 - 1
_SHOWN = 80  # characters of a value in a message


class Rule(NamedTuple):
    """What a value may be.

    Attributes:
      expected: what a message calls it.
      accepts: whether a value is so; it takes any.
    """

    expected: str
    accepts: Callable[[Any], bool]


def integer(least: int, most: int = LARGEST_INT) -> Rule:
    """Returns the rule of a whole number; true and false are none."""
    return Rule(
        f"an integer of at least {least} and at most {most}",
        lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most,
    )


def number(least: float, most: float, above: bool = False) -> Rule:
    """Returns the rule of a finite number; with `above` it must not be `least` itself."""
    beginning = "above" if above else "of at least"
    return Rule(
        f"a finite number {beginning} {least:g} and at most {most:g}",
        # A NaN is in no range, and an integer may be too large for a float.
        lambda x: (
            isinstance(x, int | float)
            and not isinstance(x, bool)
            and least <= x <= most
            and not (above and x == least)
        ),
    )


def boolean() -> Rule:
    """Returns the rule of true or false."""
    return Rule("true or false", lambda x: isinstance(x, bool))


def string(*known: str) -> Rule:
    """Returns the rule of a string, or of one of `known`."""
    if not known:
        return Rule("a string", lambda x: isinstance(x, str))
    return Rule(f"one of {', '.join(known)}", lambda x: isinstance(x, str) and x in known)


def list_of(item: Rule, most: int = LARGEST_INT) -> Rule:
    """Returns the rule of a list, with its items' rule and the number of them."""
    limit = "" if most == LARGEST_INT else f" of at most {most} items"
    return Rule(
        f"a list{limit}, each {item.expected}",
        lambda x: isinstance(x, list) and len(x) <= most and all(map(item.accepts, x)),
    )


def table_of(value: Rule | None = None) -> Rule:
    """Returns the rule of an object (a table in TOML), with the rule of its values."""
    of = f", each value {value.expected}" if value else ""
    return Rule(
        f"an object{of}",
        lambda x: isinstance(x, dict) and (not value or all(map(value.accepts, x.values()))),
    )


def either(*rules: Rule) -> Rule:
    """Returns the rule of a value that one of `rules` accepts."""
    return Rule(
        ", or ".join(rule.expected for rule in rules),
        lambda x: any(rule.accepts(x) for rule in rules),
    )


def optional(rule: Rule) -> Rule:
    """Returns the rule of a value that may be null."""
    return either(rule, Rule("null", lambda x: x is None))


def check_table(values: Mapping[str, Any], rules: Mapping[str, Rule], source: str) -> None:
    """Checks the values that have a rule; a missing one is for the caller to miss.

    Raises:
      ValueError: a value is of another type or out of range; `source` is named.
    """
    for name, rule in rules.items():
        if name in values and not rule.accepts(values[name]):
            raise ValueError(f"{source} has {name} {show(values[name])}; expected {rule.expected}")


def show(value: Any) -> str:
    """Returns a value for a message: its `repr`, shortened in the middle."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = _SHOWN
    shortener.maxlevel, shortener.maxtuple, shortener.maxlist, shortener.maxdict = 3, 8, 8, 8
    text = shortener.repr(value)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}...{text[-_SHOWN:]}"


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
            near = difflib.get_close_matches(str(name)[:_SHOWN], known, 1, 0)[0]
            raise ValueError(
                f"{source}: unknown key {prefix + str(name)!r}; the nearest known one is "
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


def check(made: Any, prefix: str = "", rules: Mapping[str, Rule] = MappingProxyType({})) -> None:
    """Checks the values of a dataclass, as its `__post_init__`.

    Args:
      made: the dataclass; by their types, whole numbers must be at least 1, and others finite and
        at least 0.
      prefix: what stands before names in messages.
      rules: what fields must be that have a rule of their own.

    Raises:
      ValueError: a value is not of its field's type, or out of range.
    """
    hints = typing.get_type_hints(type(made))
    for field in dataclasses.fields(made):
        value, choices = getattr(made, field.name), _choices(hints[field.name])
        if value is None and type(None) in choices:
            continue
        rule = rules.get(field.name) or _rule(choices[0])
        if not rule.accepts(value):
            raise ValueError(f"{prefix}{field.name} is {show(value)}; expected {rule.expected}")


def _rule(kind: Any) -> Rule:
    """Returns the rule of a field that has none of its own."""
    if kind in _RULES:
        return _RULES[kind]
    if typing.get_origin(kind) is tuple:
        return Rule(
            "a list of strings",
            lambda x: isinstance(x, tuple) and all(isinstance(item, str) for item in x),
        )
    inner = kind if dataclasses.is_dataclass(kind) else Mapping
    return Rule("a table", lambda x: isinstance(x, inner))


_RULES = {
    int: integer(1),
    float: number(0, 1e9),
    bool: boolean(),
    str: string(),
}


def _choices(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, in their order, or the one type."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
