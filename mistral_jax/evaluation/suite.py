"""Suites of benchmarks, as `configs/suites/*.toml` describes them, with published figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mistral_jax.base.fields import boolean, build, check, check_table, integer, number, table_of
from mistral_jax.base.files import read_toml
from mistral_jax.config import find

_SCORES = table_of(number(0, 100))
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A column of a suite; the TOML file explains the fields."""

    task: str
    metric: str
    shots: int
    filter: str = "none"
    in_table: bool = True
    executes: bool = False
    note: str = ""

    def __post_init__(self):
        check(self, rules={"shots": integer(0), "in_table": boolean(), "executes": boolean()})


@dataclasses.dataclass(frozen=True)
class Category:
    """A group of columns whose mean is compared with a family of models.

    Attributes:
      columns: names of the columns.
      equivalent: number of parameters of the family's model that is as good as the paper's, as the
        paper says; None = it does not say.
    """

    columns: tuple[str, ...]
    equivalent: float | None = None


@dataclasses.dataclass(frozen=True)
class Published:
    """Published figures of a model.

    Attributes:
      model: name of the model.
      parameters: its size, as the paper names it.
      source: where the figures were published.
      scores: scores by the name of the column, in percent.
    """

    model: str
    parameters: float
    source: str
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A table of benchmarks.

    Attributes:
      name: name of the suite.
      title: title of the table.
      reference: the published model that the differences of the table refer to.
      columns: benchmarks by name, in order.
      categories: groups of columns by name.
      published: published figures, in order.
    """

    name: str
    title: str
    reference: str
    columns: Mapping[str, Benchmark]
    categories: Mapping[str, Category]
    published: tuple[Published, ...]

    def model(self, name: str) -> Published:
        """Returns the published figures of a model."""
        return next(own for own in self.published if own.model == name)

    def choose(self, words: Sequence[str]) -> list[str]:
        """Returns the names of the columns that `words` name: by name, or by task.

        Upper and lower case are the same. Without words, these are the columns of the table.

        Raises:
          ValueError: the suite has no such column.
        """
        if not words:
            return [name for name, own in self.columns.items() if own.in_table]
        known = {}
        for name, own in self.columns.items():
            for word in (name, own.task, own.task.removeprefix(f"{self.name}_")):
                known.setdefault(word.lower(), name)
        for word in words:
            if word.lower() not in known:
                raise ValueError(
                    f"the suite {self.name!r} has no column {word!r}; "
                    f"it has {', '.join(self.columns)}"
                )
        chosen = {known[word.lower()] for word in words}
        return [name for name in self.columns if name in chosen]


def read(name: str | Path) -> Suite:
    """Reads a suite: `configs/suites/NAME.toml`, or another file.

    Raises:
      ValueError: there is no such file, or a value is invalid.
    """
    path = find("suites", name, "suite")
    fields, where = read_toml(path), str(path)
    check_table(
        fields, {"columns": table_of(table_of()), "categories": table_of(table_of())}, where
    )
    columns = _each(Benchmark, fields.pop("columns", {}), where, "columns")
    categories = _each(Category, fields.pop("categories", {}), where, "categories")
    published = tuple(
        build(Published, own, where, "published.") for own in fields.pop("published", [])
    )
    for own in published:
        check_table({"scores": own.scores}, {"scores": _SCORES}, f"{where}, {own.model}")
    given = {"columns": columns, "categories": categories, "published": published}
    suite = build(Suite, fields | given | {"name": path.stem}, where)
    _check_names(suite, where)
    return suite


def _each(kind: type[T], tables: Mapping[str, Any], where: str, of: str) -> dict[str, T]:
    return {name: build(kind, own, where, f"{of}.{name}.") for name, own in tables.items()}


def _check_names(suite: Suite, where: str) -> None:
    """Raises a ValueError if a category, figure or reference names what the suite does not have."""
    lists = [(f"categories.{name}", own.columns) for name, own in suite.categories.items()]
    lists += [(f"the scores of {own.model}", own.scores) for own in suite.published]
    for what, names in lists:
        for name in names:
            if name not in suite.columns:
                raise ValueError(f"{where}: {what} names {name!r}; expected a column of the suite")
    if suite.reference not in [own.model for own in suite.published]:
        raise ValueError(f"{where}: reference is {suite.reference!r}; expected a published model")
