"""The conversion command, `python -m mistral_jax.convert`: `to-orbax`, `to-torch` and `inspect`."""

import argparse
import sys
import warnings
from collections.abc import Callable

from mistral_jax.base import DTYPES, VERSION
from mistral_jax.base.output import one_line
from mistral_jax.cli.command import Parser, add_chat_form, called, count, interruptible, run

FORMATS = ("hf", "official")
FILES = ("safetensors", "torch")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)

    def task():
        work = arguments.run(arguments)
        try:
            with interruptible():
                work()
        except KeyboardInterrupt:
            # Python warns that coroutines of the interrupted Orbax save were never awaited.
            warnings.simplefilter("ignore")
            raise

    def once():
        from mistral_jax.base import machine
        from mistral_jax.parallel import distributed

        machine.open_devices()
        distributed.from_first(task)  # A launcher may have started the command on every host.

    said = "interrupted: nothing was written"
    return run(once, said, pods=False, show_traceback="traceback" in arguments)


def _to_orbax(arguments: argparse.Namespace) -> Callable[[], None]:
    from mistral_jax.base.output import Screen

    from .to_orbax import to_orbax

    return lambda: to_orbax(
        arguments.source,
        arguments.target,
        format=arguments.format,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        rope_theta=arguments.rope_theta,
        overwrite=arguments.overwrite,
        chat_form=arguments.chat_form,
        progress=Screen(),
    )


def _to_torch(arguments: argparse.Namespace) -> Callable[[], None]:
    from mistral_jax.base.output import Screen

    from .to_torch import to_torch

    return lambda: to_torch(
        arguments.checkpoint,
        arguments.target,
        format=arguments.format,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        progress=Screen(),
    )


def _inspect(arguments: argparse.Namespace) -> Callable[[], None]:
    from .inspect import inspect

    options = arguments.format, arguments.lengths, arguments.rope_theta, arguments.verify

    def show():
        lines = list(inspect(arguments.folder, *options))
        print("\n".join(f"{label:<16}{one_line(value)}" for label, value in lines))

    return show


def _parser() -> Parser:
    parser = Parser(
        prog=called("convert"),
        description="Converts checkpoints of Mistral between PyTorch and Orbax, without PyTorch.",
    )
    parser.add_argument("--version", action="version", version=f"mistral_jax {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "to-orbax",
        help="PyTorch to Orbax",
        description="Converts a PyTorch checkpoint to a checkpoint folder of this program.",
    )
    command.set_defaults(run=_to_orbax)
    command.add_argument(
        "source", metavar="SOURCE", help="folder of the PyTorch checkpoint, or GGUF file"
    )
    command.add_argument("target", metavar="TARGET", help="folder to make")
    _add_format(command)
    _add_output(command)
    command.add_argument(
        "--quantize",
        choices=("int8",),
        help="round weights to 8 bits; the checkpoint has half the size of one in bfloat16",
    )
    _add_theta(command)
    add_chat_form(command)

    command = commands.add_parser(
        "to-torch",
        help="Orbax to PyTorch",
        description="Converts a checkpoint folder to the official or the Hugging Face format.",
    )
    command.set_defaults(run=_to_torch)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder to read")
    command.add_argument("target", metavar="TARGET", help="folder to make")
    command.add_argument(
        "--format", choices=FORMATS, default="hf", help="format to write (default: hf)"
    )
    _add_output(command)

    command = commands.add_parser(
        "inspect",
        help="describe a checkpoint",
        description="Describes a PyTorch or Orbax checkpoint, and what it needs to run.",
    )
    command.set_defaults(run=_inspect)
    command.add_argument("folder", metavar="FOLDER")
    _add_format(command)
    _add_theta(command)
    command.add_argument(
        "--lengths",
        type=count,
        nargs="+",
        default=(4096, 32768),
        metavar="TOKENS",
        help="text lengths to show the cache size for (default: 4096 32768)",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="read all files of a checkpoint and compare them with their checksums",
    )
    return parser


def _add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--format",
        choices=(*FORMATS, *(f"{names}-{files}" for names in FORMATS for files in FILES), "gguf"),
        metavar="FORMAT",
        help="checkpoint to read if a folder holds several: hf or official, optionally followed by "
        "-safetensors or -torch, or gguf",
    )


def _add_theta(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rope-theta",
        type=float,
        metavar="BASE",
        help="base of the rotary embedding, if the source lacks it (v0.1: 1e4, later: 1e6)",
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the arrays written (default: unchanged)"
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a TARGET that this program wrote, after the new one is complete",
    )


if __name__ == "__main__":
    sys.exit(main())
