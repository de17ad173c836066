"""The results of a suite for one checkpoint, and the JSON file that holds them."""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import (
    build,
    check,
    check_table,
    integer,
    number,
    optional,
    string,
    table_of,
)
from mistral_jax.base.files import read_json

FORMAT = 1

_LARGEST = 1 << 60
_COLUMN_RULES = {
    "value": number(0, 100),
    "stderr": optional(number(0, 100)),
    "questions": integer(1),
    "shots": optional(integer(0)),
    "limit": optional(integer(1)),
    "seconds": number(0, 1e12),
}
_RULES = {
    "suite": string(),
    "model": string(),
    "checkpoint": string(),
    "parameters": integer(1, _LARGEST),
    "columns": table_of(table_of()),
    "not_run": table_of(string()),
    "identity": string(),
}


@dataclasses.dataclass(frozen=True)
class Column:
    """The result of one benchmark.

    Attributes:
      value: the score, in percent.
      stderr: its standard error, in percent; None = unknown.
      questions: number of questions.
      task: task of lm-evaluation-harness.
      metric: metric of the task.
      shots: examples before a question; None = unknown.
      limit: maximum number of questions of a task that were asked; None = all were.
      seconds: time that the benchmark took.
    """

    value: float
    stderr: float | None
    questions: int
    task: str
    metric: str
    shots: int | None
    limit: int | None
    seconds: float

    def __post_init__(self):
        check(self, rules=_COLUMN_RULES)


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a suite for one checkpoint.

    Attributes:
      suite: name of the suite.
      model: name of the checkpoint for tables.
      checkpoint: its path or name.
      parameters: number of parameters of the model.
      columns: results by the name of the column.
      not_run: reasons by the names of the columns without a result.
      identity: a hash of what the results depend on; see `journal.identity`.
    """

    suite: str
    model: str
    checkpoint: str
    parameters: int
    columns: Mapping[str, Column]
    not_run: Mapping[str, str] = dataclasses.field(default_factory=dict)
    identity: str = ""


def read(path: Path | str) -> Results:
    """Reads a file of results.

    Raises:
      ValueError: the file does not exist, or is not a file of results; the message names it.
      OSError: the file cannot be read.
    """
    fields = read_json(path)
    version = fields.pop("format", None)
    if version is None:
        raise ValueError(f"{path} has no format; expected the results of a suite, with format 1")
    if version != FORMAT or isinstance(version, bool):
        raise ValueError(
            f"{path} has format {version!r}; expected {FORMAT}, which this version writes"
        )
    check_table(fields, _RULES, str(path))
    found = build(Results, fields, str(path))
    columns = {
        name: build(Column, own, str(path), f"columns.{name}.")
        for name, own in found.columns.items()
    }
    if both := sorted(columns.keys() & found.not_run.keys()):
        raise ValueError(f"{path}: {both[0]!r} is in columns and in not_run; expected one of them")
    return dataclasses.replace(found, columns=columns)


def write(path: Path | str, results: Results) -> None:
    """Writes a file of results; replaces an earlier one whole or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    write_text(path, json.dumps(as_json(results), indent=1, allow_nan=False) + "\n")


def as_json(results: Results) -> dict[str, Any]:
    """Returns the results as the JSON object of their file."""
    return {"format": FORMAT} | dataclasses.asdict(results)


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file; replaces an earlier one whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
