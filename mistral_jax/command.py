"""What all commands share: errors in one line, a status for each end, the options of a layout.

A command may be one of several processes: then the first alone prints, and none waits for the dead.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable

# Seconds that a first process which fails leaves to the others for saying why they do too.
_GRACE = 2


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others of a command."""

    def error(self, message: str):
        """Ends the program."""
        self.exit(2, f"error: {message} (--help shows all options)\n")


def add_model(group: argparse._ActionsContainer) -> None:
    """Adds the options that name a model to use."""
    add = group.add_argument
    add("--checkpoint", metavar="DIR", help="its folder [the bundled model]")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        metavar="TYPE",
        help="float32, bfloat16 or float16 [as stored; float32 on a CPU that has the memory]",
    )
    add("--lora", metavar="DIR", help="adapters to use with it: PEFT's folder or Mistral's file")
    add(
        "--quantize",
        choices=("int8",),
        help="round its matrices to 8 bits as they are read, for a quarter of the memory",
    )


def add_cache(group: argparse._ActionsContainer) -> None:
    """Adds the option that does without programs compiled earlier."""
    group.add_argument(
        "--no-compilation-cache",
        dest="compilation_cache",
        action="store_false",
        help="compile anew, and keep nothing in the user's cache folder",
    )


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


def count(text: str) -> int:
    """Reads how many, the type of such an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _mesh(text: str) -> dict[str, int]:
    try:
        return {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of mesh axes and their sizes, such as tensor=4,data=2"
        ) from None


def run(
    task: Callable[[], int | None], interrupted: str = "", unread: int = 0, pods: bool = True
) -> int:
    """Does what a command is for, together with the other processes of the program, if any.

    Args:
      task: does it; returns an exit status, None = 0. Its ValueErrors and OSErrors are for the user
        to mend, and are shown in one line.
      interrupted: what Ctrl-C says.
      unread: the exit status where nobody reads the output any more; not 0 if that leaves work
        undone.
      pods: whether it is one program on all hosts of a pod; see `distributed.initialize`.

    Returns:
      The exit status: the task's own, `unread`, 2 after an error, or 130 after Ctrl-C.
    """
    from mistral_jax import distributed

    name, failed, errors = "", True, sys.stderr
    try:
        distributed.initialize(pods)
        if distributed.count() > 1:
            name = _leave_output_to_first()
        status = task() or 0
        sys.stdout.flush()
        distributed.sync()
        failed = False
    except BrokenPipeError:  # The reader has enough: what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = unread
    except (ValueError, OSError) as error:
        print(f"error: {name}{error}", file=errors)
        status = 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        status = 130
    except Exception:
        if not name:
            raise
        traceback.print_exc(file=errors)
        print(f"error: {name}it cannot go on; has another process ended?", file=errors)
        status = 1
    if name and failed:
        # The way out that JAX offers waits for the other processes, which wait for this one.
        errors.flush()
        time.sleep(_GRACE if distributed.is_first() else 0)
        os._exit(status)
    return status


def _leave_output_to_first() -> str:
    """Silences this process unless it is the first; returns its name for its errors.

    The file descriptor of the standard output is another from now on: the runtime's libraries write
    lines of their own to it.
    """
    import jax

    index = jax.process_index()
    sys.stdout.flush()
    if index == 0:
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
    else:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return f"process {index} of {jax.process_count()}: "
