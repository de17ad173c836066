"""Validates external values against declared types and ranges before they are used.

A table of rules (`Rule`) describes the values of a foreign file (`check_table`). A dataclass
describes a file of this project's own format (`build`, `check`).
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
    """A condition on a value, and its description.

    Attributes:
      expected: description of valid values for an error message.
      accepts: returns whether a value is valid; takes a value of any type.
      schema: the condition as a JSON schema, for the description of an API.
    """

    expected: str
    accepts: Callable[[Any], bool]
    schema: Mapping[str, Any] = MappingProxyType({})


def integer(least: int, most: int = LARGEST_INT) -> Rule:
    """Returns a rule for an integer from `least` to `most`; booleans are not accepted."""
    return Rule(
        f"an integer of at least {least} and at most {most}",
        lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most,
        {"type": "integer", "minimum": least, "maximum": most},
    )


def number(least: float, most: float, above: bool = False) -> Rule:
    """Returns a rule for a finite number from `least` to `most`; `above` excludes `least`."""
    beginning = "above" if above else "of at least"
    return Rule(
        f"a finite number {beginning} {least:g} and at most {most:g}",
        # Comparisons are false for NaN. No conversion: an integer may be too large for a float.
        lambda x: (
            isinstance(x, int | float)
            and not isinstance(x, bool)
            and least <= x <= most
            and not (above and x == least)
        ),
        {"type": "number", "exclusiveMinimum" if above else "minimum": least, "maximum": most},
    )


def boolean() -> Rule:
    """Returns a rule for a boolean."""
    return Rule("true or false", lambda x: isinstance(x, bool), {"type": "boolean"})


def string(*known: str) -> Rule:
    """Returns a rule for a string: any, or one of `known`."""
    if not known:
        return Rule("a string", lambda x: isinstance(x, str), {"type": "string"})
    expected = f"one of {', '.join(known)}"
    return Rule(expected, lambda x: isinstance(x, str) and x in known, {"enum": list(known)})


def list_of(item: Rule, most: int = LARGEST_INT, least: int = 0) -> Rule:
    """Returns a rule for a list of `least` to `most` items that `item` accepts."""
    bounds = [f"at least {least}"] * (least > 0) + [f"at most {most}"] * (most < LARGEST_INT)
    limit = f" of {' and '.join(bounds)} items" if bounds else ""
    return Rule(
        f"a list{limit}, each {item.expected}",
        lambda x: isinstance(x, list) and least <= len(x) <= most and all(map(item.accepts, x)),
        {"type": "array", "items": item.schema, "minItems": least, "maxItems": most},
    )


def table_of(value: Rule | None = None) -> Rule:
    """Returns a rule for a JSON object or TOML table whose values `value` accepts."""
    of = f", each value {value.expected}" if value else ""
    return Rule(
        f"an object{of}",
        lambda x: isinstance(x, dict) and (not value or all(map(value.accepts, x.values()))),
        {"type": "object", "additionalProperties": value.schema if value else True},
    )


def either(*rules: Rule) -> Rule:
    """Returns a rule for a value that at least one of `rules` accepts."""
    return Rule(
        ", or ".join(rule.expected for rule in rules),
        lambda x: any(rule.accepts(x) for rule in rules),
        {"anyOf": [rule.schema for rule in rules]},
    )


def optional(rule: Rule) -> Rule:
    """Returns a rule for a value that `rule` accepts, or null."""
    return either(rule, Rule("null", lambda x: x is None, {"type": "null"}))


def check_table(values: Mapping[str, Any], rules: Mapping[str, Rule], source: str) -> None:
    """Checks the values that have a rule. Missing values are not an error.

    Args:
      values: values by name.
      rules: rules by name.
      source: name of the file or table for error messages.

    Raises:
      ValueError: a value has the wrong type or is out of range.
    """
    for name, rule in rules.items():
        if name in values and not rule.accepts(values[name]):
            raise ValueError(f"{source} has {name} {show(values[name])}; expected {rule.expected}")


def show(value: Any) -> str:
    """Returns the `repr` of a value for an error message, shortened in the middle if it is long."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = _SHOWN
    shortener.maxlevel, shortener.maxtuple, shortener.maxlist, shortener.maxdict = 3, 8, 8, 8
    text = shortener.repr(value)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}...{text[-_SHOWN:]}"


def build(cls: type[T], fields: Mapping[str, Any], source: str, prefix: str = "") -> T:
    """Builds a dataclass, and the dataclasses nested in it, from nested tables.

    Args:
      cls: the dataclass.
      fields: values by field name; a list is converted for a field that is a tuple.
      source: name of the file or table for error messages.
      prefix: names of the enclosing tables, each followed by a dot.

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
    """Checks the values of a dataclass; called from its `__post_init__`.

    A field without a rule is checked by its type: an integer must be at least 1, a float finite and
    at least 0.

    Args:
      made: the dataclass instance.
      prefix: text in front of field names in error messages.
      rules: rules by field name.

    Raises:
      ValueError: a value has the wrong type for its field, or is out of range.
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
    """Returns the default rule for a field of the type `kind`."""
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
    """Returns the member types of a union in order, or a single type as a tuple of one."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
