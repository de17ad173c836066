"""Documents: the texts that files hold, and the records of JSON Lines. It tokenises nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def texts(path: Path) -> list[str]:
    """Reads the texts of a file: one, or the "text" of each record of a .jsonl file.

    Args:
      path: a UTF-8 file.

    Returns:
      At least one text; none is empty.

    Raises:
      ValueError: the file or a text is empty, it is not UTF-8, or a record has no text.
      OSError: it cannot be read.
    """
    if path.suffix != ".jsonl":
        found = {str(path): read(path)}
    else:
        found = {where: record.get("text") for where, record in records(path)}
        for where, text in found.items():
            if not isinstance(text, str):
                raise ValueError(f'{where}: "text" is {text!r}; expected a string')
    for where, text in found.items():
        if not text:
            raise ValueError(f"{where} is empty; expected a text of at least one character")
    return list(found.values())


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the records of a file of JSON Lines, and the place of each; skips empty lines.

    Raises:
      ValueError: the file has no record, it is not UTF-8, or a line is no JSON object.
      OSError: it cannot be read.
    """
    lines = [(i, line) for i, line in enumerate(read(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; expected JSON objects, one a line")
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {line.strip():.40}; expected a JSON object")
        yield where, record


def read(path: Path) -> str:
    """Reads a file as it is, its line ends too.

    Raises:
      ValueError: there is none, or it is not UTF-8.
      OSError: it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"there is no file {path}; expected a text in UTF-8")
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it to UTF-8 first"
        ) from None
