"""Suites of benchmarks (`--suite NAME`) and reports on their results (`--report NAME`).

A suite is a function of the parsed arguments that returns an exit status. It loads the models
itself, because it may run several checkpoints. Its module is imported when it is used.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mistral_jax.cli import command

Handler = Callable[[argparse.Namespace], int]

RESULTS = Path("results")


def _paper(arguments: argparse.Namespace) -> int:
    from mistral_jax.cli import paper

    return paper.run(arguments)


def _table(arguments: argparse.Namespace) -> int:
    from mistral_jax.cli import paper

    return paper.report(arguments)


def _guardrails(arguments: argparse.Namespace) -> int:
    from mistral_jax.cli import guardrails

    return guardrails.run(arguments)


def _mt_bench(arguments: argparse.Namespace) -> int:
    from mistral_jax.cli import mt_bench

    return mt_bench.run(arguments)


def _sizes(arguments: argparse.Namespace) -> int:
    from mistral_jax.cli import sizes

    return sizes.report(arguments)


SUITES: dict[str, Handler] = {"paper": _paper, "guardrails": _guardrails, "mt-bench": _mt_bench}
REPORTS: dict[str, Handler] = {"table": _table, "equivalent-sizes": _sizes}

# Options of suites and reports only.
_OWN = ("results", "table", "published", "allow_code_execution", "chat_form", "max_tokens")
# Options that not every suite or report takes.
_MODEL = ("checkpoint", "dtype", "lora", "quantize", "sharding", "mesh")
_TASKS = ("tasks", "include_path", "data", "num_fewshot", "limit")
_OTHERS = ("files", "choices", "positions", "circle", "plot")
_TAKES = {
    "paper": {*_MODEL, *_TASKS, "results", "table", "allow_code_execution"} - {"num_fewshot"},
    "guardrails": {*_MODEL, "files", "limit", "results", "plot", "chat_form"},
    "mt-bench": {*_MODEL, "files", "limit", "results", "chat_form", "max_tokens"},
    "table": {"results", "table"},
    "equivalent-sizes": {"files", "results", "plot", "published"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of suites and reports."""
    group = parser.add_argument_group("suites of benchmarks")
    add = group.add_argument
    add("--suite", choices=SUITES, metavar="NAME", help=f"a suite to run: {', '.join(SUITES)}")
    add(
        "--report",
        choices=REPORTS,
        metavar="NAME",
        help=f"a report on the results of a suite: {', '.join(REPORTS)}",
    )
    add(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="folder of a suite's results, or the .json file of one checkpoint; a run that was "
        f"killed goes on from there [{RESULTS}]; a report reads several",
    )
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="write the table beside the published figures, as .md or .html",
    )
    add(
        "--published",
        action="store_true",
        help="equivalent-sizes: compare with the published scores of Llama 2",
    )
    add(
        "--allow-code-execution",
        action="store_true",
        help="run the programs that the model writes for HumanEval and MBPP",
    )
    command.add_chat_form(group)
    add(
        "--max-tokens", type=command.count, metavar="N", help="mt-bench: tokens of an answer [1024]"
    )


def check(arguments: argparse.Namespace) -> None:
    """Checks options that are for suites and reports only, or that these do not take.

    Raises:
      ValueError: an option is given without a suite or report, or one that they do not take.
    """
    if arguments.suite and arguments.report:
        raise ValueError("--suite and --report are two commands; give one of them")
    what = f"--suite {arguments.suite}" if arguments.suite else f"--report {arguments.report}"
    name = arguments.suite or arguments.report
    if name is None:
        for option in _OWN:
            if getattr(arguments, option):
                raise ValueError(
                    f"--{option.replace('_', '-')} is for --suite and --report; name one"
                )
        return
    for option in (*_OWN, *_MODEL, *_TASKS, *_OTHERS):
        value = getattr(arguments, option)
        is_given = value is not None and value is not False and value != []
        if is_given and option not in _TAKES[name]:
            given = f"the file {value[0]}" if option == "files" else f"--{option.replace('_', '-')}"
            raise ValueError(f"{what} does not take {given}; leave it out")


class Target(NamedTuple):
    """A checkpoint that a suite runs on.

    Attributes:
      name: a name of its own in tables and files.
      given: its name or path for `load`; None = the bundled model.
      folder: its folder.
      file: file of its results.
    """

    name: str
    given: str | None
    folder: Path
    file: Path


def targets(arguments: argparse.Namespace, form: str) -> list[Target]:
    """Returns the checkpoints of a suite.

    Args:
      arguments: the parsed options.
      form: path of a file of results in the folder of results, with NAME for the checkpoint's name.

    Raises:
      ValueError: a folder is no checkpoint, two have one name, or --results does not fit.
    """
    from mistral_jax.checkpoint import checkpoint

    given = arguments.checkpoint or [None]
    if len(arguments.results) > 1:
        raise ValueError("--suite writes its results to one place; give one path to --results")
    (place,) = arguments.results or [RESULTS]
    is_file = place.suffix == Path(form).suffix
    if is_file and len(given) > 1:
        raise ValueError(
            f"--results is the file {place}, and there are {len(given)} checkpoints; name a folder"
        )
    found: dict[str, Target] = {}
    for one in given:
        folder = checkpoint.find(one)
        name = Path(os.path.abspath(folder)).name
        if arguments.lora:
            name += f"+{Path(os.path.abspath(arguments.lora)).stem}"
        if arguments.quantize:
            name += f"-{arguments.quantize}"
        if name in found:
            raise ValueError(
                f"two checkpoints would have their results under the name {name}; run them one by "
                "one with other --results"
            )
        found[name] = Target(
            name, one, folder, place if is_file else place / form.replace("NAME", name)
        )
    return list(found.values())


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite or the report that the arguments name; returns the exit status."""
    handlers = SUITES if arguments.suite else REPORTS
    return handlers[arguments.suite or arguments.report](arguments)
