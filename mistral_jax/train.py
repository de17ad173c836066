"""The command line of training, `python -m mistral_jax.train`: it parses, calls and prints."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mistral_jax import command

DESCRIPTION = """\
Trains a small Mistral from nothing on the Python source that is installed here: gathers the corpus,
makes the vocabulary, trains, and saves a checkpoint. All of it lies in one folder; a run that was
stopped goes on where it was when the same command is given again.
"""
EPILOG = """\
for instance:
  python -m mistral_jax.train configs/training/nano.toml
  python -m mistral_jax.sample --checkpoint runs/nano/checkpoint "def main("
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return command.run(lambda: _run(arguments), unread=2)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m mistral_jax.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="TOML file, such as configs/training/nano.toml")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="folder of the run (default: runs/<recipe's name>)",
    )
    parser.add_argument(
        "--plot",
        action="store_true",
        help="draw the curve as <run>/curve.png at the end (matplotlib)",
    )
    command.add_layout(parser)
    parser.add_argument(
        "--no-compilation-cache",
        dest="compilation_cache",
        action="store_false",
        help="compile anew, and keep nothing in the user's cache folder",
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from mistral_jax.training.recipe import Recipe

    recipe = Recipe.from_file(arguments.recipe)
    path = arguments.run or Path("runs") / arguments.recipe.stem
    from mistral_jax import machine
    from mistral_jax.training import curve, run

    if arguments.compilation_cache:
        machine.use_compilation_cache()
    if arguments.plot:
        curve.check_plot()
    print(f"training {recipe.model} in {path}", flush=True)
    with _progress(recipe.steps) as report:
        complete = run.train(recipe, path, report, arguments.sharding, arguments.mesh)
    if arguments.plot:
        curve.plot(path / "curve.jsonl", path / "curve.png")
    if complete:
        print(f"the model is in {path / 'checkpoint'}")
        return 0
    print(
        f"stopped and saved; the same command goes on: {' '.join(sys.orig_argv)}", file=sys.stderr
    )
    return 130


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yields what shows an entry of the curve: a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda entry: print(_line(entry), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = [
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}"),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps, line="preparing")

        def show(entry):
            line = _line(entry)
            bar.update(task, completed=entry["step"], line=line)
            if "validation_loss" in entry:
                bar.console.print(line)

        yield show


def _line(entry: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in entry.items())


if __name__ == "__main__":
    sys.exit(main())
