"""The command line of the conversion: `to-orbax`, `to-torch`, `inspect`."""

import argparse
import logging
import sys

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every error there too.
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _to_orbax(arguments: argparse.Namespace) -> None:
    from .to_orbax import to_orbax

    to_orbax(
        arguments.source,
        arguments.target,
        format=arguments.format,
        dtype=arguments.dtype,
        rope_theta=arguments.rope_theta,
        overwrite=arguments.overwrite,
        say=lambda sentence: print(sentence, file=sys.stderr),
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
