"""Documents: the texts that files hold, and the records of JSON Lines. It tokenises nothing."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.base.files import parse_record, read_lines, read_text

_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


def texts(path: Path) -> list[str]:
    """Reads the texts of a file: one, or the "text" of each record of JSON Lines.

    Args:
      path: a UTF-8 file; JSON Lines if its name ends with .jsonl or .ndjson, or with .gz behind.

    Returns:
      At least one text; none is empty.

    Raises:
      ValueError: the file or a text is empty, it is not UTF-8, or a record has no text.
      OSError: it cannot be read.
    """
    if not path.name.endswith(_JSON_LINES):
        found = {str(path): read_text(path, pipe=True)}
    else:
        found = {where: record.get("text") for where, record in records(path)}
        for where, text in found.items():
            if not isinstance(text, str):
                raise ValueError(f'{where}: "text" is {show(text)}; expected a string')
    for where, text in found.items():
        if not text:
            raise ValueError(f"{where} is empty; expected a text of at least one character")
    return list(found.values())


def records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the records of a file of JSON Lines, and the place of each; skips empty lines.

    Raises:
      ValueError: the file has no record, it is not UTF-8, or a line is no JSON object.
      OSError: it cannot be read.
    """
    empty = True
    for where, line in read_lines(path):
        empty = False
        try:
            record = parse_record(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield where, record
    if empty:
        raise ValueError(f"{path} is empty; expected JSON objects, one a line")
