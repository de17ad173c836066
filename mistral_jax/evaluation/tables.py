"""Tables of a suite's results beside published figures, as Markdown, HTML or plain cells."""

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from mistral_jax.evaluation.results import Results
from mistral_jax.evaluation.suite import Published, Suite

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th { border-bottom: 2px solid #555; }
th:first-child, td:first-child { text-align: left; }
td.empty { color: #777; }
ol { font-size: 13px; color: #444; }
"""


class Table(NamedTuple):
    """A table of texts.

    Attributes:
      title: its title.
      header: names of the columns.
      rows: cells by row; a number in brackets at the end of a cell refers to a note.
      notes: footnotes, numbered from 1.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


class _Notes:
    """Footnotes, each of which appears once."""

    def __init__(self):
        self.texts: list[str] = []

    def mark(self, text: str, note: str) -> str:
        """Returns a text with the number of a note behind it."""
        if not note:
            return text
        if note not in self.texts:
            self.texts.append(note)
        return f"{text} [{self.texts.index(note) + 1}]"


def compare(suite: Suite, found: Sequence[Results]) -> Table:
    """Puts the results of each checkpoint beside the published figure of its model.

    The figures are those of the published model whose name the checkpoint's name begins with, else
    those of the suite's reference.
    """
    notes, header, rows = _Notes(), ["benchmark", "examples"], []
    references = [reference(suite, own.model) for own in found]
    for own, other in zip(found, references, strict=True):
        header += [own.model, f"published: {other.model}", "difference"]
    run = {name for own in found for name in (*own.columns, *own.not_run)}
    for name, benchmark in suite.columns.items():
        if not benchmark.in_table and name not in run:
            continue
        row = [notes.mark(name, benchmark.note), str(benchmark.shots)]
        for own, other in zip(found, references, strict=True):
            row += _cells(name, benchmark.shots, own, other, notes)
        rows.append(row)
    return Table(suite.title, header, rows, notes.texts)


def _cells(name: str, shots: int, own: Results, other: Published, notes: _Notes) -> list[str]:
    """Returns the cells of a column's result, of the published figure and of their difference."""
    column, published = own.columns.get(name), other.scores.get(name)
    figure = "" if published is None else f"{published:.1f}"
    if column is None:
        return [notes.mark("not run", own.not_run.get(name, "")), figure, ""]
    value = f"{column.value:.1f}"
    if column.stderr is not None:
        value += f" ± {column.stderr:.1f}"
    if column.limit is not None:
        note = f"Only the first questions of each task, at most {column.limit:,} of each."
        value = notes.mark(value, note)
    if column.shots != shots:
        value = notes.mark(value, f"With {column.shots} examples instead of {shots}.")
    difference = "" if published is None else f"{column.value - published:+.1f}"
    return [value, figure, difference]


def published(suite: Suite) -> Table:
    """Lists the published figures of a suite."""
    notes = _Notes()
    names = suite.choose([])
    rows = [
        [notes.mark(own.model, own.source), *(f"{own.scores[x]:.1f}" for x in names)]
        for own in suite.published
        if all(name in own.scores for name in names)
    ]
    return Table("Published figures", ["model", *names], rows, notes.texts)


def reference(suite: Suite, model: str) -> Published:
    """Returns the published figures to compare a checkpoint with, by its name."""
    name = _plain(model)
    alike = [own for own in suite.published if own.scores and name.startswith(_plain(own.model))]
    return max(alike, key=lambda own: len(own.model), default=suite.model(suite.reference))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def markdown(tables: Sequence[Table]) -> str:
    """Formats tables as Markdown."""
    return "\n".join(map(_markdown, tables))


def _markdown(table: Table) -> str:
    def line(cells):
        return f"| {' | '.join(_escaped(cell) for cell in cells)} |"

    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [f"## {_escaped(table.title)}", "", line(table.header), f"| {' | '.join(rule)} |"]
    lines += map(line, table.rows)
    lines += ["", *(f"{n}. {_escaped(note)}" for n, note in enumerate(table.notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _escaped(text: str) -> str:
    """Escapes what Markdown would read as a cell's end or as markup."""
    return re.sub(r"([\\`*_{}<>|#\[\]])", r"\\\1", " ".join(text.split()))


def to_html(tables: Sequence[Table]) -> str:
    """Formats tables as a page of HTML."""
    title = html.escape(tables[0].title)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>\n{_STYLE}</style></head><body>",
        *map(_html, tables),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _html(table: Table) -> str:
    def cells(kind, texts):
        marked = (_superscript(html.escape(text)) for text in texts)
        return "".join(
            f'<{kind} class="empty">{text}</{kind}>'
            if text.startswith("not run")
            else f"<{kind}>{text}</{kind}>"
            for text in marked
        )

    lines = [f"<h2>{html.escape(table.title)}</h2>", '<div class="wide"><table>']
    lines.append(f"<thead><tr>{cells('th', table.header)}</tr></thead><tbody>")
    lines += [f"<tr>{cells('td', row)}</tr>" for row in table.rows]
    lines += ["</tbody></table></div>", "<ol>"]
    lines += [f"<li>{html.escape(note)}</li>" for note in table.notes]
    return "\n".join([*lines, "</ol>"])


def _superscript(text: str) -> str:
    return re.sub(r" \[(\d+)\]", r"<sup>\1</sup>", text)
