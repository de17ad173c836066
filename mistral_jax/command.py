"""What all commands share: errors in one line, a status for each end, the options of a layout."""

import argparse
import os
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others of a command."""

    def error(self, message: str):
        """Ends the program."""
        self.exit(2, f"error: {message} (--help shows all options)\n")


def add_layout(group: argparse._ActionsContainer) -> None:
    """Adds the options that spread a model over devices."""
    group.add_argument(
        "--sharding",
        metavar="NAME",
        help="spread it over all devices, as configs/sharding/NAME.toml says, or a file like it",
    )
    group.add_argument(
        "--mesh",
        type=_mesh,
        metavar="AXIS=N,...",
        help="sizes of its mesh axes, such as tensor=4,data=2 [as the file says]",
    )


def _mesh(text: str) -> dict[str, int]:
    try:
        return {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of mesh axes and their sizes, such as tensor=4,data=2"
        ) from None


def run(task: Callable[[], int | None], interrupted: str = "", unread: int = 0) -> int:
    """Does what a command is for.

    Args:
      task: does it; returns an exit status, None = 0. Its ValueErrors and OSErrors are for the user
        to mend, and are shown in one line.
      interrupted: what Ctrl-C says.
      unread: the exit status where nobody reads the output any more; not 0 if that leaves work
        undone.

    Returns:
      The exit status: the task's own, `unread`, 2 after an error, or 130 after Ctrl-C.
    """
    try:
        status = task()
        sys.stdout.flush()
    except BrokenPipeError:  # The reader has enough: what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return unread
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return status or 0
