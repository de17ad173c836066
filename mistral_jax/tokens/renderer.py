"""Starts the process that renders chat templates (`jinja.py`), and sends it requests."""

import atexit
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mistral_jax.tokens import jinja

EXTRA = "chat-templates"
# Limits of one rendering: seconds of computing, bytes of the process, characters of the result.
_SECONDS, _BYTES, _CHARACTERS = 5, 1 << 30, 1 << 24


class Rendered(NamedTuple):
    """A conversation as a template wrote it.

    Attributes:
      text: the text.
      marks: who wrote each character, see `jinja.py`.
    """

    text: str
    marks: bytes


class _Worker:
    """The process that renders; it starts at the first request, and again after a failure."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def render(self, request: Mapping[str, Any]) -> Rendered:
        """Renders a template.

        Raises:
          ValueError: jinja2 is not installed, or the template fails or needs too much.
        """
        try:
            line = json.dumps(request) + "\n"
        except (TypeError, ValueError, RecursionError):
            raise ValueError("a message has a value that JSON cannot express") from None
        with self._lock:
            process = self._started()
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # such as Ctrl-C: the answer would be taken for the next one
                self.stop()
                raise
            if not answer:
                code = self.stop()
                raise ValueError(f"the chat template {_cause(code)}")
        answer = json.loads(answer)
        if "error" in answer:
            raise ValueError(f"the chat template fails: {_line(answer['error'])}")
        if not answer["text"]:
            raise ValueError("the chat template writes nothing; expected the conversation")
        marks = b"".join(bytes([mark]) * count for count, mark in answer["runs"])
        return Rendered(answer["text"], marks)

    def _started(self) -> subprocess.Popen:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        if importlib.util.find_spec("jinja2") is None:
            raise ValueError(
                f"jinja2 is needed for chat templates: pip install 'mistral-jax-flax[{EXTRA}]'"
            )
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(jinja.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        limits = {"seconds": _SECONDS, "bytes": _BYTES, "characters": _CHARACTERS}
        self._process.stdin.write(json.dumps({"path": sys.path, **limits}) + "\n")
        return self._process

    def stop(self) -> int:
        """Ends the process; returns its exit code."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return 0
        with contextlib.suppress(OSError):
            process.stdin.close()
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        return process.wait()


def _cause(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"computes for more than {_SECONDS} seconds; expected one that ends"
    return f"ended its process (exit code {code}); expected one that works"


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."


WORKER = _Worker()
render = WORKER.render
atexit.register(WORKER.stop)
