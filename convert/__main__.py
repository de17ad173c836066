"""The command line of the conversion: `to-orbax`, `to-torch`, `inspect`."""

import argparse
import contextlib
import sys
import threading
from typing import Any, TextIO

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    with contextlib.redirect_stderr(_OwnThreads(sys.stderr)):
        try:
            arguments.run(arguments)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
    return 0


class _OwnThreads:
    """A stream without what threads print that are not Python's: Orbax raises that as well."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("Dummy-"):
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_orbax(arguments: argparse.Namespace) -> None:
    from .progress import Screen
    from .to_orbax import to_orbax

    to_orbax(
        arguments.source,
        arguments.target,
        format=arguments.format,
        dtype=arguments.dtype,
        rope_theta=arguments.rope_theta,
        overwrite=arguments.overwrite,
        progress=Screen(),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mistral_jax.convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("to-orbax", help="PyTorch checkpoint to Orbax")
    command.set_defaults(run=_to_orbax)
    command.add_argument("source")
    command.add_argument("target")
    command.add_argument("--format")
    command.add_argument("--dtype", choices=DTYPES)
    command.add_argument("--rope-theta", type=float)
    command.add_argument("--overwrite", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
