"""Suites of benchmarks (`--suite NAME`) and reports on their results (`--report NAME`).

A suite is a function of the parsed arguments that returns an exit status. It loads the models
itself, because it may run several checkpoints. Its module is imported when it is used.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

Handler = Callable[[argparse.Namespace], int]

RESULTS = Path("results")


def _paper(arguments: argparse.Namespace) -> int:
    from mistral_jax.cli import paper

    return paper.run(arguments)


def _table(arguments: argparse.Namespace) -> int:
    from mistral_jax.cli import paper

    return paper.report(arguments)


SUITES: dict[str, Handler] = {"paper": _paper}
REPORTS: dict[str, Handler] = {"table": _table}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of suites and reports."""
    add = parser.add_argument_group("suites of benchmarks").add_argument
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
        "--allow-code-execution",
        action="store_true",
        help="run the programs that the model writes for HumanEval and MBPP",
    )


def check(arguments: argparse.Namespace) -> None:
    """Checks options that are for suites and reports only, or that these do not take.

    Raises:
      ValueError: an option is given without a suite or report, or one that they do not take.
    """
    if arguments.suite and arguments.report:
        raise ValueError("--suite and --report are two commands; give one of them")
    what = f"--suite {arguments.suite}" if arguments.suite else f"--report {arguments.report}"
    chosen = bool(arguments.suite or arguments.report)
    own = "results", "table", "allow_code_execution"
    others = "files", "choices", "positions", "circle", "plot", "num_fewshot"
    for name in own if not chosen else ():
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is for --suite and --report; name one")
    for name in others if chosen else ():
        if value := getattr(arguments, name):
            given = f"the file {value[0]}" if name == "files" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{what} does not take {given}; leave it out")


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite or the report that the arguments name; returns the exit status."""
    handlers = SUITES if arguments.suite else REPORTS
    return handlers[arguments.suite or arguments.report](arguments)
