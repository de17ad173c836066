"""Runs untrusted Python programs, such as those that a model writes, and reports their outcome.

Each program runs in a fresh interpreter that has confined itself (`jail.py`): it has no network,
starts no process and no thread, reads little but Python's library, and writes in a folder that is
removed afterwards. Only the standard library can be imported.

The tests run in the same interpreter as the code that they test. Code that redefines what a test
compares, such as `__eq__`, can still pass it, as in other harnesses.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mistral_jax.base.output import one_line

_JAIL = Path(__file__).with_name("jail.py")
_START = 60.0  # seconds that an interpreter may need to start
_BLOCKS = 10.0  # seconds between a message of a process and its next call, on a busy machine
_TICK = 0.05  # seconds between looks at the folder
_MOST_FILES = 1000
_MESSAGE = 4096  # bytes of a report
_SLACK = 4096  # bytes by which the stacks of two equal calls may differ


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
      passed: whether it ran to its end without an error.
      reason: "passed", "failed: ..." with the error, "timed out", "out of memory", or "killed: ..."
        with the signal.
    """

    passed: bool
    reason: str


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
      seconds: seconds of processor time.
      clock: seconds that it may take, which on a busy machine are more.
      memory: bytes of its address space.
      file_bytes: bytes that it may write to files in all.
    """

    seconds: float = 10.0
    clock: float = 60.0
    memory: int = 1 << 30
    file_bytes: int = 16 << 20


class _Ended(Exception):
    """The program has ended, or must end; the message says how."""


def check() -> None:
    """Checks that this machine can confine programs.

    Raises:
      ValueError: it cannot; the message says what is missing.
    """
    run("")


def run_all(
    programs: Sequence[str],
    limits: Limits = Limits(),  # noqa: B008 - immutable
    workers: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Outcome]:
    """Runs programs, several at a time.

    Args:
      programs: source code of each.
      limits: what each may use.
      workers: number of programs at a time; None = one for each processor.
      report: called with the number of programs that have ended, and their number in all.

    Returns:
      The outcome of each program.

    Raises:
      ValueError: as `run`.
    """
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    outcomes = []
    try:
        for outcome in pool.map(functools.partial(run, limits=limits), programs):
            outcomes.append(outcome)
            report(len(outcomes), len(programs))
    finally:
        pool.shutdown(cancel_futures=True)
    return outcomes


def run(program: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008 - immutable
    """Runs a program to its end, or to a limit.

    The program passes if it returns from its last line. Neither its exit code nor its output
    counts: `sys.exit(0)` and `os._exit(0)` before its tests have ended are failures.

    Args:
      program: source code, which ends with tests that raise an exception if they fail.
      limits: what it may use.

    Raises:
      ValueError: this machine cannot confine a program; the message says what is missing.
    """
    if sys.platform != "linux":
        raise ValueError(_refusal(f"it needs seccomp and Landlock, and this is {sys.platform}"))
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        request = dict(limits._asdict(), program=program, folder=folder)
        with _Process(folder, request) as process:
            try:
                _watch(process, limits)
            except _Ended as ended:
                return Outcome(False, str(ended))
    return Outcome(True, "passed")


def _watch(process: "_Process", limits: Limits) -> None:
    """Returns when the program has passed; raises `_Ended` if it has not."""
    try:
        kind, text = process.message(time.monotonic() + _START)
    except _Ended as ended:
        kind, text = "refused", f"its interpreter does not start ({ended})"
    if kind != "ready":
        raise ValueError(_refusal(text))
    before = process.stack()
    if before is None:
        raise ValueError(_refusal("the kernel does not show it /proc/PID/syscall of a child"))
    process.go_on()
    kind, text = process.message(time.monotonic() + limits.clock, limits.file_bytes)
    if kind == "memory":
        raise _Ended("out of memory")
    if kind != "ended":
        raise _Ended(f"failed: {text}")
    after = process.stack()
    # A program that writes "ended" itself waits below many calls of `jail.nested`, if at all.
    if after is None or after[0] != before[0] or after[1] < before[1] - _SLACK:
        raise _Ended("failed: it reports that it has passed before its tests have ended")


class _Process:
    """An interpreter that runs one program; it cannot start others."""

    def __init__(self, folder: str, request: dict[str, Any]):
        self._folder = Path(folder)
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_TICK)
        with theirs, tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            json.dump(request, file)
            file.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_JAIL)],
                stdin=file,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
            )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def message(self, until: float, most_bytes: int | None = None) -> tuple[str, str]:
        """Returns the next message of the process: its kind and its text.

        Args:
          until: when it must have come, as `time.monotonic`.
          most_bytes: bytes that its files may have.

        Raises:
          _Ended: the process ended, took too long, or wrote too much.
        """
        line = b""
        while b"\n" not in line:
            if time.monotonic() > until:
                raise _Ended("timed out")
            if most_bytes is not None:
                self._check_files(most_bytes)
            try:
                more = self._socket.recv(_MESSAGE)
            except TimeoutError:
                continue
            except ConnectionError:
                more = b""
            if not more:
                raise _Ended(self._end(until))
            line += more
            if len(line) > _MESSAGE:
                raise _Ended("failed: its report is too long")
        kind, _, text = line.decode("utf-8", "replace").partition("\n")[0].partition(" ")
        return kind, one_line(text)

    def go_on(self) -> None:
        """Ends the wait of the process."""
        with contextlib.suppress(OSError):
            self._socket.send(b".")

    def stack(self) -> tuple[list[str], int] | None:
        """Returns where the process waits: the call and its file, and the stack pointer.

        None = it does not wait, or this process may not know.
        """
        until = time.monotonic() + _BLOCKS
        while time.monotonic() < until:
            try:
                fields = Path(f"/proc/{self._process.pid}/syscall").read_text("ascii").split()
            except OSError:
                return None
            if len(fields) == 9:  # call, six arguments, stack pointer, program counter
                return fields[:2], int(fields[7], 16)
            time.sleep(0.001)
        return None

    def _check_files(self, most_bytes: int) -> None:
        files = [entry.stat(follow_symlinks=False) for entry in os.scandir(self._folder)]
        if len(files) > _MOST_FILES or sum(file.st_size for file in files) > most_bytes:
            raise _Ended(f"failed: it writes more than {most_bytes:,} bytes of files")

    def _end(self, until: float) -> str:
        """Returns why the process ended without a report."""
        try:
            code = self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "timed out"
        if code == -signal.SIGXCPU:
            return "timed out"
        if code < 0:
            return f"killed: {_name(-code)}"
        return f"failed: it exits with code {code} before its tests have ended"


def _environment(folder: str) -> dict[str, str]:
    """Returns the variables of a program: none of the user's, but for where libraries are."""
    made = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PATH": os.defpath}
    searched = os.environ.get("LD_LIBRARY_PATH")
    return made | ({"LD_LIBRARY_PATH": searched} if searched else {})


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _refusal(why: str) -> str:
    return f"this machine cannot confine a program: {why}; use one that can, or leave the task out"
