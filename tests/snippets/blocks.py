"""A parser for Sybil of every fenced block of a page, and what running each kind means.

Console blocks run in bash, command by command; Python blocks of a page share one process. What
stands in for what a reader has and a test has not, and what cannot run, is said in `stand_ins.py`
and `rules.py`.
"""

import json
import re
import tomllib
import traceback
from pathlib import Path

from sybil import Region
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from snippets import rules, stand_ins
from snippets.page import Page

_NUMBER = r"\d(?:[\d.,:e+-]*\d)?"


def parse(document):
    """Yields a region for each fenced block, whatever its language."""
    lexer = FencedCodeBlockLexer(r"[^\n]*", mapping={"language": "language", "source": "source"})
    for region in lexer(document):
        yield Region(region.start, region.end, region.lexemes, _evaluate, region.lexemes)


def _evaluate(example) -> str | None:
    """Runs a block; returns what is wrong."""
    language, source = example.parsed["language"], example.parsed["source"]
    run = _KINDS.get(language)
    if run is None and not re.fullmatch(r"\{[a-z-]+\}.*", language):  # the site's own directives
        return f"a block of {language or 'no language'}; expected one of {', '.join(_KINDS)}"
    if "page" not in example.namespace:
        example.namespace["page"] = Page(Path(example.path), example.namespace["snippet_cache"])
    try:
        return run and run(example.namespace["page"], example, source)
    except Exception:  # Of some, Sybil cannot report where they were raised, and ends the session.
        return traceback.format_exc()


def close(namespace) -> None:
    """Closes the page of a document."""
    if "page" in namespace:
        namespace.pop("page").close()


def commands(source: str) -> list[tuple[str, list[str]]]:
    """Splits a console block into commands, each with the lines that are shown under it."""
    found: list[tuple[str, list[str]]] = []
    goes_on = False
    for line in source.splitlines():
        if goes_on:
            command, _ = found.pop()
            found.append((f"{command}\n{line}", []))
        elif line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
            continue
        else:
            raise ValueError(f"{line!r} stands before any command: begin it with '$ '")
        goes_on = line.endswith("\\")
    return found


def difference(shown: list[str], printed: str) -> str | None:
    """Returns the first line that is shown and was not printed, in this order.

    `...` stands for anything, and any number for any other.
    """
    lines = iter(line.rstrip() for line in printed.splitlines())
    for line in shown:
        if line.strip() in ("", "..."):
            continue
        pattern = re.sub(rf"(\.\.\.)|({_NUMBER})|( +)|(.)", _pattern, line.rstrip())
        if not any(re.fullmatch(pattern, each) for each in lines):
            return f"{line!r} is shown, but was not printed there:\n{printed}"
    return None


def _pattern(found: re.Match) -> str:
    anything, number, spaces, other = found.groups()
    return ".*" if anything else _NUMBER if number else " +" if spaces else re.escape(other)


def _console(page, example, source) -> str | None:
    for command, lines in commands(source):
        typed = [line[2:] for line in lines if line.startswith("> ")]
        shown = [line for line in lines if not line.startswith("> ")]
        if (check := rules.check_of(command)) is not None:
            if problem := check(page, command):
                return f"{command}: {problem}"
            continue
        stand_ins.prepare(page.folder, command)
        script, typed = rules.shorten(command), "".join(f"{line}\n" for line in typed)
        if re.match(rules.ONCE, command):
            status, printed = page.bash_once(script)
        else:
            status, printed = page.bash(script, typed)
        expected = 2 if any(line.startswith("error: ") for line in shown) else 0
        if status != expected:
            return f"{command}: status {status}, expected {expected}\n{printed}"
        if not rules.is_comparable(command):
            continue
        page.shown = printed, example.region.end
        if problem := difference(shown, printed):
            return f"{command}: {problem}"
    return None


def _bash(page, example, source) -> str | None:
    status, printed = page.bash(f"set -e\n{source}")
    page.shown = printed, example.region.end
    return f"status {status}\n{printed}" if status else None


def _python(page, example, source) -> str | None:
    stand_ins.prepare(page.folder, source)
    problem, printed = page.python(example.line, source)
    page.shown = printed, example.region.end
    return f"{problem}\n{printed}" if problem else None


def _text(page, example, source) -> str | None:
    printed, end = page.shown
    follows = end >= 0 and not example.document.text[end : example.region.start].strip()
    return difference(source.splitlines(), printed) if follows else None


def _json(page, example, source) -> None:
    try:
        json.loads(source)
    except json.JSONDecodeError:
        for line in source.splitlines():
            json.loads(line)


def _toml(page, example, source) -> None:
    rules.read_table(tomllib.loads(source), page.folder)


def _figure(page, example, source) -> None:
    pass


_KINDS = {
    "console": _console,
    "python": _python,
    "bash": _bash,
    "text": _text,
    "json": _json,
    "toml": _toml,
    "mermaid": _figure,
}
