"""Calls libraries that are written in Rust, whose panics are no exceptions of Python."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any


def load(name: str, extra: str, file: str) -> ModuleType:
    """Imports an optional library.

    Raises:
      ValueError: it is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{name} is needed to read a {file}: pip install 'mistral-jax-flax[{extra}]'"
        ) from None


def call(problem: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls a function of such a library.

    Raises:
      ValueError: it refuses its arguments or panics. The message is `problem` and the reason.
    """
    try:
        return function(*args, **options)
    except BaseException as error:
        # A panic derives from BaseException, as the signals do, and its class has no public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{problem} ({reason})") from None
