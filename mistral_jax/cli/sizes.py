"""The report "equivalent-sizes": how large a model of a family has the scores of another model."""

import argparse
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

from mistral_jax.evaluation import results, sizes, suite
from mistral_jax.evaluation.results import Results
from mistral_jax.evaluation.sizes import Category, Scores

_SIZE = re.compile(r"[\s_-]*\b\d+(\.\d+)?\s*b(?![a-z0-9])", re.IGNORECASE)


def report(arguments: argparse.Namespace) -> int:
    """Prints the equivalent sizes of each category, and draws them; returns the exit status."""
    from mistral_jax.cli.evaluate import print_results
    from mistral_jax.evaluation.positions import check_plot

    if arguments.plot:
        check_plot()
    paths = [*arguments.files, *arguments.results]
    found = [results.read(path) for path in itertools.chain(*map(_files, paths))]
    if not found:
        categories = sizes.published()
    elif arguments.published:
        categories = [each for own in found for each in _against_published(own)]
    else:
        categories = _compared(found)
    if arguments.json:
        print_results([_record(each) for each in categories], as_json=True)
    else:
        print_results([_row(each) for each in categories], as_json=False)
        for line in _notes(categories):
            print(line)
    if arguments.plot:
        sizes.draw(categories).savefig(arguments.plot)
    return 0


def _files(path: Path) -> list[Path]:
    """Returns the files of a folder of results, or a single file."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.paper.json")) or sorted(path.glob("*.json"))
    if not found:
        raise ValueError(f"{path} has no .json file; expected the results of a suite")
    return found


def _compared(found: Sequence[Results]) -> list[Category]:
    family, models = split(found)
    categories = suite.read("paper").categories
    made = []
    for model in models:
        columns = {name: own.columns for name, own in categories.items()}
        for each in sizes.compare([*map(_scores, family)], _scores(model), columns):
            paper = categories[each.name].equivalent
            made.append(each._replace(paper=paper / 1e9 if paper else None))
    if all(each.model is None for each in made):
        raise ValueError("the results have no column in common; expected results of one suite")
    # A category that no file has is left out, but those of the paper stay.
    return [each for each in made if each.model is not None or each.paper]


def _against_published(own: Results) -> list[Category]:
    """Compares a model with the published scores of Llama 2, in the columns that are published."""
    scores, made = _scores(own), []
    for each in sizes.published():
        if all(name in scores.columns for name in each.columns):
            made.append(each._replace(model=sizes.average(scores, each.columns)))
        else:
            lacking = [name for name in each.columns if name not in scores.columns]
            made.append(each._replace(model=None, family=[], columns=[], missing=lacking, note=""))
    return made


def _scores(own: Results) -> Scores:
    columns = {name: (column.value, column.stderr) for name, column in own.columns.items()}
    return Scores(own.model, own.parameters / 1e9, columns)


def split(found: Sequence[Results]) -> tuple[list[Results], list[Results]]:
    """Tells the family from the other models by their names.

    Models whose names differ in the size alone, such as "Llama 2 7B" and "Llama 2 13B", are a
    family. If there are none or several such groups, the last model is compared with all others.

    Raises:
      ValueError: there are fewer than three models.
    """
    if len(found) < 3:
        raise ValueError(
            f"there are results of {len(found)} models; expected at least two of a family and one "
            "of another model, or --published to compare with the published scores of Llama 2"
        )
    groups: dict[str, list[Results]] = {}
    for own in found:
        groups.setdefault(_SIZE.sub("", Path(own.model).name.lower()), []).append(own)
    families = [group for group in groups.values() if len({own.parameters for own in group}) > 1]
    if len(families) == 1 and len(families[0]) < len(found):
        return families[0], [own for own in found if own not in families[0]]
    return list(found[:-1]), [found[-1]]


def _record(each: Category) -> dict:
    """Returns the JSON object of a category; sizes are in billions."""
    fields = {"category": each.name, "columns": ", ".join(each.columns)}
    fields |= {"missing": ", ".join(each.missing), "paper": each.paper, "note": each.note}
    if each.model is None:
        return fields | {"model": None, "score": None, "equivalent": None}
    found, model = sizes.equivalent(each.family, each.model), each.model
    beyond = not 0 < found.size < math.inf
    return fields | {
        "model": model.name,
        "score": model.score,
        "stderr": model.stderr,
        "parameters": model.size,
        "equivalent": None if beyond else found.size,
        "equivalent_text": sizes.name_size(found.size, each.family),
        "times": None if beyond else found.size / model.size,
        "low": found.low,
        "high": found.high,
        "line": found.line,
        "monotonic": found.monotonic,
        "difference": None if beyond or not each.paper else found.size / each.paper - 1,
        "at_paper": sizes.score_at(each.family, each.paper) if each.paper else None,
    }


def _row(each: Category) -> dict:
    """Returns the line of a category in the table."""
    empty = dict.fromkeys(("score", "equivalent", "times", "from", "to", "line"), "-")
    fields = {"category": each.name, "model": each.model.name if each.model else "-"} | empty
    paper = f"{each.paper:.3g}B" if each.paper else "-"
    if each.model is None:
        return fields | {"paper": paper, "difference": "-", "at_paper": "-"}
    record = _record(each)

    def name(size):
        return sizes.name_size(size, each.family)

    times, difference, at_paper = (record[x] for x in ("times", "difference", "at_paper"))
    return fields | {
        "score": f"{record['score']:.1f}",
        "equivalent": record["equivalent_text"],
        "times": f"{times:.1f}x" if times else "-",
        "from": name(record["low"]),
        "to": name(record["high"]),
        "line": name(record["line"]),
        "paper": paper,
        "difference": f"{difference:+.0%}" if difference is not None else "-",
        "at_paper": f"{at_paper:.1f}" if at_paper is not None else "-",
    }


def _notes(categories: Sequence[Category]) -> list[str]:
    """Returns the lines below the table: the method, and what each category averages."""
    lines = [
        "",
        "equivalent: on the curve through the family, linear in the logarithm of the size; nothing "
        "is extrapolated.",
        "line: on the least-squares line. from, to: all estimates, with the standard error of the "
        "scores.",
        "paper: Mistral 7B against Llama 2 in arXiv 2310.06825, which does not say how it "
        "interpolates. at paper: the score that the curve has there.",
    ]
    for each in categories:
        if each.model is None:
            lines.append(f"{each.name}: not compared, without {', '.join(each.missing)}.")
            continue
        missing = f", without {', '.join(each.missing)}" if each.missing else ""
        note = f"; {each.note}" if each.note else ""
        lines.append(f"{each.name}: mean of {', '.join(each.columns)}{missing}{note}.")
        if not sizes.equivalent(each.family, each.model).monotonic:
            lines.append(
                f"{each.name}: the family's scores do not rise with the size; the curve may have "
                "the score several times, and the equivalent size is the smallest."
            )
    return lines
