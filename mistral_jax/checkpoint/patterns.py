"""Patterns of module names: a subset of regular expressions, matched in linear time.

Files from others contain such patterns. `re` tries the ways to match one after another, and their
number can be exponential. Here all ways are followed at once, as the set of places in the name that
they have reached (Thompson's algorithm).
"""

import re
from collections.abc import Callable

_LONGEST, _DEEPEST = 1000, 10
_CLASSES = {"d": "09", "w": "azAZ09__", "s": "\t\r  "}  # First and last characters of ranges.

# Maps a name and the places where a match may begin to the places where it may end.
Matcher = Callable[[str, set[int]], set[int]]


def suffix(pattern: str) -> Callable[[str], bool]:
    r"""Returns a function that tells whether a pattern matches a name, or its end after a dot.

    Args:
      pattern: a sequence of literal characters, ".", "[a-z]", "[^a-z]", "\d", "\w", "\s" and
        escaped characters, each optionally followed by "*", "+" or "?"; of "^" and "$"; and of
        groups of alternatives, such as "(q|o)_proj".

    Raises:
      ValueError: the pattern is malformed, too long, or uses other syntax.
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern)} characters; expected at most {_LONGEST}")
    parser = _Parser(pattern)
    matches = parser.alternatives(0)
    if parser.rest():
        raise ValueError("it has a ')' without a '('")

    # Every match ends with this text. To compare it first saves most of the work when each module
    # has its own pattern.
    tail = "" if "|" in pattern else re.search(r"(?:(?<!\\)\w)*\Z", pattern)[0]

    def match(name: str) -> bool:
        if not name.endswith(tail):
            return False
        starts = {0, *(i + 1 for i, letter in enumerate(name) if letter == ".")}
        return len(name) in matches(name, starts)

    return match


class _Parser:
    """A recursive-descent parser, which turns a pattern into a `Matcher`."""

    def __init__(self, pattern: str):
        self._pattern, self._at = pattern, 0

    def rest(self) -> str:
        """Returns the part of the pattern that is not read yet."""
        return self._pattern[self._at :]

    def alternatives(self, depth: int) -> Matcher:
        """Reads sequences with "|" between them."""
        if depth > _DEEPEST:
            raise ValueError("its groups are nested too deeply")
        choices = [self._sequence(depth)]
        while self._take("|"):
            choices.append(self._sequence(depth))
        return lambda name, places: set().union(*(one(name, places) for one in choices))

    def _sequence(self, depth: int) -> Matcher:
        parts = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            parts.append(self._part(depth))

        def matches(name, places):
            for part in parts:
                if not places:
                    break
                places = part(name, places)
            return places

        return matches

    def _part(self, depth: int) -> Matcher:
        if self._take("^"):
            return lambda name, places: places & {0}
        if self._take("$"):
            return lambda name, places: places & {len(name)}
        if self._take("("):
            self._take("?:")
            group = self.alternatives(depth + 1)
            if not self._take(")"):
                raise ValueError("it has a '(' without a ')'")
            if self.rest()[:1] in ("*", "+", "?", "{"):
                raise ValueError("it repeats a group")
            return group
        accepts = self._letter()
        sign = next(filter(self._take, ("*", "+", "?")), "")
        if sign:
            self._take("?")  # A lazy match: only whether there is a match matters here.
        return _repeated(accepts, sign)

    def _letter(self) -> Callable[[str], bool]:
        letter = self._next()
        if letter in "*+?{}":
            raise ValueError(f"it has {letter!r} where there is nothing to repeat")
        if letter == ".":
            return lambda x: x != "\n"
        if letter == "[":
            return self._set()
        return _within(self._escaped() if letter == "\\" else letter * 2)

    def _escaped(self) -> str:
        letter = self._next()
        if letter not in _CLASSES and letter.isalnum():
            raise ValueError(f"it has '\\{letter}', which is not known")
        return _CLASSES.get(letter, letter * 2)

    def _set(self) -> Callable[[str], bool]:
        inverted, ranges = self._take("^"), ""
        while not (ranges and self._take("]")):
            first = self._next()
            pair = self._escaped() if first == "\\" else first * 2
            if self.rest()[:1] == "-" and self.rest()[1:2] != "]":
                self._take("-")
                last = self._next()
                if pair != pair[0] * 2 or last == "\\" or last < pair[0]:
                    raise ValueError(f"it has a range to {last!r} that has no letters")
                pair = pair[0] + last
            ranges += pair
        inside = _within(ranges)
        return (lambda x: not inside(x)) if inverted else inside

    def _next(self) -> str:
        if self._at == len(self._pattern):
            raise ValueError("it ends too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) * found
        return found


def _within(ranges: str) -> Callable[[str], bool]:
    pairs = list(zip(ranges[::2], ranges[1::2], strict=True))
    return lambda x: any(first <= x <= last for first, last in pairs)


def _repeated(accepts: Callable[[str], bool], sign: str) -> Matcher:
    def once(name, places):
        return {i + 1 for i in places if i < len(name) and accepts(name[i])}

    def often(name, places):
        found, edge = set(places), places
        while edge := once(name, edge) - found:
            found |= edge
        return found

    if sign == "*":
        return often
    if sign == "+":
        return lambda name, places: often(name, once(name, places))
    if sign == "?":
        return lambda name, places: places | once(name, places)
    return once
