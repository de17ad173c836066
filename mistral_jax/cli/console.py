"""The console script `mistral-jax`, which runs a command by its name."""

import argparse
import difflib
import importlib
import sys

from mistral_jax.base import VERSION
from mistral_jax.cli import command

# The module of each command's `main`, and a summary of the command.
COMMANDS = {
    "sample": ("cli.sample", "continue prompts, or chat"),
    "train": ("cli.train", "train or fine-tune a model by a recipe"),
    "serve": ("cli.serve", "serve a model over HTTP, in OpenAI's protocol"),
    "evaluate": ("cli.evaluate", "measure perplexity, choices and benchmark tasks"),
    "plan": ("cli.plan", "estimate memory and time on devices that need not exist"),
    "convert": ("convert.__main__", "convert checkpoints from and to PyTorch, or inspect one"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit status.

    It prepares the process before the command's slow imports; with `python -m`, the package does
    this.
    """
    command.begin()
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    name = parser.parse_args(argv[:1]).command
    if name is None:
        parser.error(f"no command is given; expected one of {', '.join(COMMANDS)}")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name[:80], COMMANDS, 1, 0)[0]
        parser.error(f"there is no command {name!r}; the nearest is {near!r}")
    module, _ = COMMANDS[name]
    return importlib.import_module(f"mistral_jax.{module}").main(argv[1:])


def _parser() -> command.Parser:
    listed = "".join(f"  {name:<10}{summary}\n" for name, (_, summary) in COMMANDS.items())
    parser = command.Parser(
        prog="mistral-jax",
        usage="%(prog)s COMMAND [options]",
        description=f"Mistral 7B in JAX.\n\ncommands:\n{listed}",
        epilog="`%(prog)s COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_traceback=False,
    )
    version = f"mistral_jax {VERSION}"
    parser.add_argument("--version", action="version", version=version, help="print it and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser
