"""Equivalent sizes: how large a model of a family would be with the score of another model.

The curve of the family's scores is linear in the logarithm of the size between two neighbours. The
least-squares line through all of them is a second estimate.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from mistral_jax.base.files import read_toml
from mistral_jax.config import CONFIG_DIR

T = TypeVar("T", "Point", "Scores")

PUBLISHED = CONFIG_DIR / "equivalent-sizes.toml"


class Point(NamedTuple):
    """The score of a model.

    Attributes:
      name: name of the model.
      size: number of parameters, in billions.
      score: its score in a category, in percent.
      stderr: standard error of the score; None = not known.
    """

    name: str
    size: float
    score: float
    stderr: float | None = None


class Scores(NamedTuple):
    """The scores of a model in all columns.

    Attributes:
      name: name of the model.
      size: number of parameters, in billions.
      columns: score in percent and its standard error, if that is known, by name of the column.
    """

    name: str
    size: float
    columns: Mapping[str, tuple[float, float | None]]


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """The sizes at which a family has a given score, in billions of parameters.

    A size is `math.inf` if the score is above the family's, and 0 if it is below it.

    Attributes:
      size: the size on the curve; the smallest one if there are several.
      line: the size on the least-squares line; None if the line does not rise.
      low: the smallest of all estimates: curve, line, and the curve at the score plus or minus its
        standard error.
      high: the largest of them.
      monotonic: whether the family's scores rise with the size.
    """

    size: float
    line: float | None
    low: float
    high: float
    monotonic: bool


def equivalent(family: Sequence[Point], model: Point) -> Equivalent:
    """Computes the size at which a family would have the score of a model.

    Nothing is extrapolated. Where the scores of the family do not rise with the size, the curve may
    reach the score several times: `size` is the first, and `low` and `high` include all of them.

    Args:
      family: the models of the family, in any order.
      model: the other model.

    Raises:
      ValueError: the family has fewer than two sizes or two models of one size, or a number is not
        finite.
    """
    family = check(family)
    for point in [*family, model]:
        if not math.isfinite(point.score):
            raise ValueError(f"the score of {point.name} is {point.score}; expected a number")
    scores = [point.score for point in family]
    error = math.hypot(model.stderr or 0.0, max(point.stderr or 0.0 for point in family))
    found = crossings(family, model.score)
    line = _on_line(family, model.score)
    near = [size for sign in (-1, 1) for size in crossings(family, model.score + sign * error)]
    estimates = [*found, *near, *([] if line is None else [line])]
    rises = all(a < b for a, b in itertools.pairwise(scores))
    return Equivalent(found[0], line, min(estimates), max(estimates), rises)


def check(family: Sequence[T]) -> list[T]:
    """Returns the models of a family by size; raises a ValueError if they make no curve."""
    family = sorted(family, key=lambda model: model.size)
    for model in family:
        if not (math.isfinite(model.size) and model.size > 0):
            raise ValueError(f"the size of {model.name} is {model.size}; expected a number above 0")
    if len(family) < 2:
        raise ValueError(
            f"the family has {len(family)} models; expected at least two, of different sizes"
        )
    for one, other in itertools.pairwise(family):
        if one.size == other.size:
            raise ValueError(
                f"{one.name} and {other.name} both have {one.size:g} billion parameters; expected "
                "models of different sizes"
            )
    return family


def crossings(family: Sequence[Point], score: float) -> list[float]:
    """Returns all sizes at which the curve through a family, by size, has a score.

    There is at least one: infinity if all scores are lower, 0 if all are higher.
    """
    found = set()
    for a, b in itertools.pairwise(family):
        if not min(a.score, b.score) <= score <= max(a.score, b.score):
            continue
        if a.score == b.score:
            found |= {a.size, b.size}
            continue
        share = (score - a.score) / (b.score - a.score)
        # The ends are exact: rounding would give one size twice.
        exact = {0.0: a.size, 1.0: b.size}
        found.add(exact.get(share, a.size * (b.size / a.size) ** share))
    if found:
        return sorted(found)
    return [math.inf if score > max(point.score for point in family) else 0.0]


def score_at(family: Sequence[Point], size: float) -> float | None:
    """Returns the score of the curve at a size; None if the size is beyond the family's."""
    family = check(family)
    if not family[0].size <= size <= family[-1].size:
        return None
    logs = [math.log(point.size) for point in family]
    return float(np.interp(math.log(size), logs, [point.score for point in family]))


def _on_line(family: Sequence[Point], score: float) -> float | None:
    """Returns the size at which the least-squares line has a score, if it rises."""
    slope, offset = fit(family)
    if slope <= 0:
        return None
    sizes = [point.size for point in family]
    first, last = min(sizes), max(sizes)
    power = (score - offset) / slope
    # The ends belong to the family, but for rounding.
    if power > math.log(last) + 1e-9:
        return math.inf
    return 0.0 if power < math.log(first) - 1e-9 else min(max(math.exp(power), first), last)


def fit(family: Sequence[Point]) -> tuple[float, float]:
    """Returns slope and offset of the least-squares line of score against ln(size)."""
    logs = np.log([point.size for point in family])
    scores = np.array([point.score for point in family])
    logs_mean, mean = logs.mean(), scores.mean()
    slope = ((logs - logs_mean) @ (scores - mean)) / ((logs - logs_mean) @ (logs - logs_mean))
    return float(slope), float(mean - slope * logs_mean)


def name_size(size: float | None, family: Sequence[Point]) -> str:
    """Returns a size as text: "22.1B", "above 70B" or "below 7B"; "-" for None."""
    if size is None:
        return "-"
    if size == math.inf:
        return f"above {max(point.size for point in family):.3g}B"
    return f"{size:.3g}B" if size else f"below {min(point.size for point in family):.3g}B"


class Category(NamedTuple):
    """The scores of a family and of a model in one category.

    Attributes:
      name: name of the category.
      family: scores of the family, by size; empty if they cannot be compared.
      model: score of the model; None if it cannot be compared.
      columns: names of the columns that the scores are averages of.
      missing: names of further columns of the category.
      paper: the size that the paper states, in billions; None = the category or model is another.
      note: where the scores come from, and what is missing.
    """

    name: str
    family: list[Point]
    model: Point | None
    columns: list[str]
    missing: list[str]
    paper: float | None = None
    note: str = ""


def published() -> list[Category]:
    """Returns the published scores of Mistral 7B and of Llama 2 7B, 13B and 70B."""
    table = read_toml(PUBLISHED)
    sizes = table["sizes"]
    found = []
    for each in table["categories"]:
        points = {
            name: Point(name, sizes[name], math.fsum(scores) / len(scores))
            for name, scores in each["scores"].items()
        }
        model = points.pop(table["model"])
        columns = each["published"]
        missing = [column for column in each["columns"] if column not in columns]
        about = each["paper"], each["note"]
        found.append(
            Category(each["name"], check([*points.values()]), model, columns, missing, *about)
        )
    return found


def compare(
    family: Sequence[Scores], model: Scores, categories: Mapping[str, Sequence[str]]
) -> list[Category]:
    """Averages the columns that all models have, by category.

    Args:
      family: the models of the family.
      model: the other model.
      categories: names of the columns of each category.

    Returns:
      The categories. One has no model if the models have no column of it in common.

    Raises:
      ValueError: the family has fewer than two sizes, or two models of one size.
    """
    family = check(family)
    found = []
    for name, columns in categories.items():
        common = [x for x in columns if all(x in own.columns for own in [model, *family])]
        missing = [x for x in columns if x not in common]
        points = [average(own, common) for own in family] if common else []
        found.append(Category(name, points, average(model, common), common, missing))
    return found


def average(own: Scores, columns: Sequence[str]) -> Point | None:
    """Returns the mean of columns, with its standard error if the errors are known.

    Without columns it returns None.
    """
    if not columns:
        return None
    values, errors = zip(*(own.columns[name] for name in columns), strict=True)
    known = all(error is not None for error in errors)
    error = math.hypot(*errors) / len(errors) if known else None
    return Point(own.name, own.size, math.fsum(values) / len(values), error)


def draw(categories: Sequence[Category]):
    """Draws a panel for each category: the family's curve, the model, and its equivalent size.

    Args:
      categories: from `published` or `compare`.

    Returns:
      A figure of matplotlib; `savefig` writes it to a file.

    Raises:
      ValueError: no category has scores.
    """
    from matplotlib.figure import Figure

    shown = [each for each in categories if each.model is not None]
    if not shown:
        raise ValueError("there is nothing to draw; expected a category with scores")
    across = min(len(shown), 2)
    down = -(-len(shown) // across)
    figure = Figure(figsize=(5 * across, 3.6 * down), layout="constrained")
    panels = [*figure.subplots(down, across, squeeze=False).flat]
    for axes, each in zip(panels, shown, strict=False):
        _panel(axes, each)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return figure


def _panel(axes, category: Category) -> None:
    family, model = category.family, category.model
    found = equivalent(family, model)
    sizes, scores = [p.size for p in family], [p.score for p in family]
    axes.plot(sizes, scores, "o-", color="C0", label="the family")
    slope, offset = fit(family)
    line = [slope * math.log(size) + offset for size in sizes[:: len(sizes) - 1]]
    axes.plot(sizes[:: len(sizes) - 1], line, ":", color="C0", label="least-squares line")
    axes.plot([model.size], [model.score], "*", color="C3", markersize=13, label=model.name)
    reached = found.size if 0 < found.size < math.inf else max([*sizes, model.size])
    if found.size:
        axes.plot([model.size, reached], [model.score] * 2, "--", color="C3")
    if 0 < found.size < math.inf:
        axes.axvline(found.size, color="0.6", linewidth=0.8)
    if category.paper:
        label = f"the paper: {category.paper:.3g}B"
        axes.plot([category.paper], [model.score], "x", color="black", label=label)
    axes.set_xscale("log")
    ticks = sorted({*sizes, model.size})
    axes.set_xticks(ticks, [f"{size:.3g}B" for size in ticks])
    axes.minorticks_off()
    said = name_size(found.size, family)
    ratio = f", {found.size / model.size:.1f}x" if 0 < found.size < math.inf else ""
    axes.set(title=f"{category.name}: {said}{ratio}", ylabel="%", xlabel="parameters")
    axes.legend(fontsize="small", loc="lower right")
    axes.grid(alpha=0.3)
