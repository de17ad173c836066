"""The shared parts of all commands: start and exit, errors of one line, common options.

If a command runs as several processes, only the first one prints, and no process waits for one that
failed. Slow imports are inside functions, so that `begin` can run before them.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from mistral_jax.base import DTYPES
from mistral_jax.base.output import one_line, tell

# Seconds that the first process waits after an error, so that the others can report theirs.
_GRACE = 2
# Seconds after which a command says that it is compiling.
_PATIENCE = 3
_told = threading.Event()  # Set once the user knows that programs are being compiled.

# Names of the standard streams that were closed when the program started.
closed: set[str] = set()


def begin() -> None:
    """Prepares the process of a command before its slow imports.

    From now on Ctrl-C exits at once and silently. A KeyboardInterrupt could be raised inside any
    library that is being imported, which may print or swallow it. Closed standard streams are
    connected to /dev/null; otherwise the next file that is opened takes their descriptor. Invalid
    values of COLUMNS and LINES are removed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _open_nothing(number)
            closed.add(name)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("0*[1-9][0-9]{0,3}", os.environ.get(name, "80")):
            del os.environ[name]
    # A shell lets its background jobs ignore SIGINT; keep that.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _open_nothing(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)


def _leave(number, frame) -> None:
    """Handles Ctrl-C: exits at once with status 130."""
    with contextlib.suppress(Exception):  # The signal may have interrupted a write.
        sys.stdout.flush()
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # shows the cursor, which a progress bar hides
    os._exit(130)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt in the context, for work that must clean up."""
    quiet = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is _leave
    )
    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if quiet:
            signal.signal(signal.SIGINT, _leave)


def called(name: str) -> str:
    """Returns what the user types to run a command: by the console script, or by its module."""
    script = os.path.basename(sys.argv[0]).startswith("mistral-jax")
    return f"mistral-jax {name}" if script else f"python -m mistral_jax.{name}"


class Parser(argparse.ArgumentParser):
    """An argument parser with errors of one line and the option --traceback."""

    def __init__(self, *args, add_traceback: bool = True, **options):
        super().__init__(*args, **options)
        if add_traceback:
            self.add_argument(
                "--traceback",
                action="store_true",
                default=argparse.SUPPRESS,
                help="show where in the program an error arose",
            )

    def error(self, message: str):
        """Prints the message and exits with status 2."""
        self.exit(2, f"error: {one_line(message)} (--help shows all options)\n")


def add_model(group: argparse._ActionsContainer, several: bool = False) -> None:
    """Adds the options that select and load a model, or several models.

    With `several`, the value of --checkpoint is a list of words for each time that it is given.
    """
    add = group.add_argument
    words = {"nargs": "+", "action": "append"} if several else {}
    add("--checkpoint", metavar="DIR", help="checkpoint folder [the bundled model]", **words)
    add(
        "--dtype",
        choices=DTYPES,
        metavar="TYPE",
        help="bfloat16, float16 or float32 [as stored; float32 on a CPU that has the memory]",
    )
    add("--lora", metavar="DIR", help="LoRA adapters to load: a PEFT folder or a file of Mistral's")
    add(
        "--quantize",
        choices=("int8",),
        help="round weights to 8 bits as they are loaded, a quarter of the memory of float32",
    )


def add_chat_form(group: argparse._ActionsContainer) -> None:
    """Adds the option that overrides the form of conversations."""
    from mistral_jax.tokens.chat import NAMES

    group.add_argument(
        "--chat-form",
        choices=NAMES,
        metavar="FORM",
        help=f"form of conversations: {', '.join(NAMES)} [the checkpoint's]",
    )


def add_cache(group: argparse._ActionsContainer) -> None:
    """Adds the option that disables the compilation cache."""
    group.add_argument(
        "--no-compilation-cache",
        dest="compilation_cache",
        action="store_false",
        help="compile all programs again, and store none in the user's cache folder",
    )


def add_layout(group: argparse._ActionsContainer) -> None:
    """Adds the options that partition a model over devices."""
    group.add_argument(
        "--sharding",
        metavar="NAME",
        help="partition the model over all devices by configs/sharding/NAME.toml or another file",
    )
    group.add_argument(
        "--mesh",
        type=_mesh,
        metavar="AXIS=N,...",
        help="sizes of the mesh axes, such as tensor=4,data=2 [from the sharding file]",
    )


def count(text: str) -> int:
    """Parses the value of an option that is a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def load_model(arguments: argparse.Namespace, given: str | None, **more: Any) -> tuple:
    """Loads a checkpoint with the options of `add_model`, `add_layout` and `add_cache`.

    Args:
      arguments: the parsed options.
      given: name or folder of the checkpoint; None = the bundled model.
      **more: further arguments of `load`.

    Returns:
      The model, its parameters and its tokenizer.

    Raises:
      ValueError: the checkpoint has no tokenizer, or does not suit the options.
    """
    from mistral_jax.base import machine
    from mistral_jax.base.output import Screen
    from mistral_jax.checkpoint import checkpoint
    from mistral_jax.tokens import storage

    if arguments.compilation_cache:
        machine.use_compilation_cache()
    if note := machine.unseen_accelerator():
        tell(note)
    with announced():
        loaded = checkpoint.load(
            given,
            sharding=arguments.sharding,
            mesh=arguments.mesh,
            dtype=arguments.dtype,
            lora=arguments.lora,
            quantize=arguments.quantize,
            progress=Screen(),
            **more,
        )
    if loaded[2] is None:
        raise ValueError(f"{given} has no {storage.EXPECTED}; copy the model's to this folder")
    return loaded


def _mesh(text: str) -> dict[str, int]:
    try:
        return {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of mesh axes and their sizes, such as tensor=4,data=2"
        ) from None


def run(
    task: Callable[[], int | None],
    interrupted: str = "",
    unread: int = 0,
    pods: bool = True,
    show_traceback: bool = False,
) -> int:
    """Runs the task of a command, together with the other processes of the program, if any.

    An exception becomes an error of one line and an exit status.

    Args:
      task: the function to run; returns an exit status, None = 0. It raises ValueError or OSError
        for errors that the user can correct.
      interrupted: message after Ctrl-C.
      unread: exit status if the reader of standard output closes it; not 0 if that leaves the task
        unfinished.
      pods: whether the command is one program on all hosts of a pod; see `distributed.initialize`.
      show_traceback: whether to print the traceback of an error too.

    Returns:
      The exit status: that of the task; `unread`; 2 after a ValueError or OSError; 1 after another
      error; 130 after Ctrl-C.
    """
    name, failed, errors = "", True, sys.stderr
    try:
        with _plain_warnings():
            from mistral_jax.parallel import distributed

            distributed.initialize(pods)
            if distributed.count() > 1:
                name = _leave_output_to_first()
            status = task() or 0
            sys.stdout.flush()
            distributed.sync()
        failed = False
    except BrokenPipeError:  # The reader closed the pipe; discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = unread
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        status = 130
    except Exception as error:
        if show_traceback:
            import traceback

            traceback.print_exc(file=errors)
        said, status = _explain(error)
        print(f"error: {name}{one_line(said)}", file=errors)
    if name and failed:
        # JAX's exit handler waits for the other processes, which wait for this one.
        errors.flush()
        time.sleep(_GRACE if distributed.is_first() else 0)
        os._exit(status)
    return status


def _explain(error: Exception) -> tuple[str, int]:
    """Returns the message for an error and the exit status."""
    import traceback  # Slow on Python 3.14, whose module colors its text.

    if isinstance(error, ValueError | OSError) and str(error):
        return str(error), 2
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
        what = f"there is not enough memory ({said or 'the system refused it'})"
    elif isinstance(error, RecursionError):
        what = "something is nested too deeply"
    else:
        what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    # The innermost line of this project's code is more useful than one inside a library.
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_ours(frame.filename)] or frames
    place = f"{os.path.basename(own[-1].filename)}, line {own[-1].lineno}"
    return f"{what}; in {place} (--traceback shows the rest)", 1


def _is_ours(file: str) -> bool:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    in_checkout = os.path.join(os.path.dirname(package), "convert")
    return file.startswith((package + os.sep, in_checkout + os.sep))


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows warnings and logged messages on one line each, without their place in the code."""
    import logging

    class Line(logging.Handler):
        def emit(self, record):
            tell(f"warning: {record.getMessage()}")

    logger, handler = logging.getLogger("mistral_jax"), Line(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest: tell(f"warning: {message}")
            yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


@contextlib.contextmanager
def announced() -> Iterator[Callable[[], None]]:
    """Tells the user that programs are being compiled, if that takes some seconds.

    A process says it once, however many of its parts compile.

    Yields:
      A function to call when the first output appears; the message is not shown after that.
    """
    import jax

    from mistral_jax.ops import library

    asked = []

    def note(event: str, **_) -> None:
        if event == "/jax/compilation_cache/compile_requests_use_cache":
            asked.append(event)
        elif event == "/jax/compilation_cache/cache_hits":
            asked.pop()

    def say() -> None:
        kernels = library.compiling.is_set()
        if jax.config.jax_compilation_cache_dir and (kernels or asked) and not _told.is_set():
            _told.set()
            what = "C++ kernels and programs" if kernels else "programs"
            tell(f"compiling {what} for this model and machine, once: later runs find them")

    jax.monitoring.register_event_listener(note)
    timer = threading.Timer(_PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()
        jax.monitoring.unregister_event_listener(note)


def _leave_output_to_first() -> str:
    """Silences this process unless it is the first; returns its name for error messages.

    In the first process, `sys.stdout` gets a new file descriptor and descriptor 1 becomes standard
    error, because the runtime's libraries write to descriptor 1.
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
