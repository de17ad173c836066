"""The training command, `python -m mistral_jax.train`."""

import argparse
import itertools
import shlex
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

from mistral_jax.cli import command

DESCRIPTION = """\
Trains a model by a recipe: fine-tunes a checkpoint on files of examples (all parameters, or LoRA
adapters), or trains a new small model on the Python source installed on this machine. One folder
holds everything that belongs to a run. The same command continues a run that was stopped.
"""
EPILOG = """\
Examples:
  %(prog)s lora --data train.jsonl --preview 3
  %(prog)s lora --checkpoint mistral-7b-v0.3 --data train.jsonl \\
      --validation valid.jsonl --set learning_rate=1e-4 --set lora.rank=32
  %(prog)s nano
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    return command.run(lambda: _run(arguments), unread=2, show_traceback="traceback" in arguments)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog=command.called("train"),
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", help="name of a file in configs/training, such as lora, or a path to a TOML file")
    add(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="folder of the run (default: runs/<recipe's name>)",
    )
    add("--checkpoint", metavar="DIR", help="model to fine-tune (default: the bundled model)")
    add(
        "--data",
        nargs="+",
        metavar="FILE",
        help="examples to train on: JSONL with text, prompt and completion, or chat messages",
    )
    add("--validation", nargs="+", metavar="FILE", help="examples to measure the loss on")
    command.add_chat_form(parser)
    add("--skip-bad", action="store_true", help="skip bad lines of the data and count them")
    add(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="override a value of the recipe, such as epochs=2 or lora.rank=32; may be repeated",
    )
    add(
        "--preview",
        type=command.count,
        metavar="N",
        help="print the first N examples with the tokens that are trained on, and do not train",
    )
    add(
        "--log",
        nargs="+",
        choices=("tensorboard", "wandb"),
        default=[],
        help="also log the curve there; <run>/curve.jsonl is always written",
    )
    add(
        "--plot",
        action="store_true",
        help="require matplotlib, which draws <run>/curve.png at the end (default: if installed)",
    )
    command.add_layout(parser)
    command.add_cache(parser)
    return parser


def _setting(text: str) -> tuple[list[str], Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as epochs=2")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except RecursionError:
        raise argparse.ArgumentTypeError(f"{name} is nested too deeply") from None
    except ValueError:
        parsed = value  # a string without its quotes
    return name.split("."), parsed


def _run(arguments: argparse.Namespace) -> int:
    from mistral_jax.training.recipe import Recipe, find_recipe, read_table

    file = find_recipe(arguments.recipe)
    recipe = Recipe.from_dict(_override(read_table(file), arguments), str(file))
    path = arguments.run or Path("runs") / file.stem
    if arguments.preview is not None:
        _preview(recipe, arguments.preview)
        return 0

    from mistral_jax.base import machine
    from mistral_jax.parallel import distributed
    from mistral_jax.training import curve, display, run, summary
    from mistral_jax.training.loggers import open_loggers

    if arguments.compilation_cache:
        machine.use_compilation_cache()
    if note := machine.unseen_accelerator():
        command.tell(note)
    if arguments.plot:
        curve.check_plot()
    what = recipe.model or recipe.checkpoint or "the bundled model"
    length = f"{recipe.steps:,} steps" if recipe.steps else f"epochs: {recipe.epochs:g}"
    print(f"training {what} in {path} ({length})", flush=True)
    loggers = arguments.log if distributed.is_first() else []
    with (
        display.show(recipe.steps) as show,
        open_loggers(loggers, path, recipe.to_dict()) as log,
    ):

        def report(entry):
            show(entry)
            log(entry)

        layout = arguments.sharding, arguments.mesh
        outcome = run.train(recipe, path, report, *layout, tell=command.tell)
    if outcome.stopped is not None:
        again = shlex.join(sys.orig_argv)
        print(f"stopped and saved; the same command goes on: {again}", file=sys.stderr)
        # SIGTERM comes from a scheduler that reclaims the machine: stopping is then a success.
        return 0 if outcome.stopped == signal.SIGTERM else 130
    if distributed.is_first():
        print(summary.write(path, recipe.to_dict(), outcome.result, outcome.step, outcome.command))
    return 0


def _override(table: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the table of a recipe with the values of the command line."""
    settings = list(arguments.set)
    for name, value in (
        (["checkpoint"], arguments.checkpoint),
        (["data", "train"], arguments.data),
        (["data", "validation"], arguments.validation),
        (["data", "chat_form"], arguments.chat_form),
        (["data", "skip_bad"], arguments.skip_bad or None),
    ):
        if value is not None:
            settings.append((name, value))
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if [name] in (names for names, _ in arguments.set):
            table.pop(other, None)
    for (*tables, name), value in settings:
        place = table
        for inner in tables:
            place = place.setdefault(inner, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {'.'.join((*tables, name))}: {inner} is no table")
        place[name] = value
    return table


def _preview(recipe, count: int) -> None:
    from rich.console import Console

    from mistral_jax.training.data import examples

    if recipe.data is None:
        raise ValueError("--preview shows examples, and this recipe trains on a corpus")
    tokenizer = examples.read_tokenizer(recipe)
    found = examples.read(recipe, recipe.data.train, tokenizer)
    examples.show(itertools.islice(found, count), tokenizer, Console())
