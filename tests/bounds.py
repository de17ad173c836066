"""Bounds on time and memory, for readers of files that are made to have none."""

import contextlib
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path


class TooLong(BaseException):
    """What no handler of damage takes for damage."""


@contextlib.contextmanager
def bounded(seconds: float, size: int) -> Iterator[None]:
    """Fails if the block takes longer than `seconds`, or `size` bytes more than there are now.

    Files that are mapped into memory do not count: the system takes their pages back.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _held() + size
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    handler = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _too_long(*_):
    raise TooLong


def _held() -> int:
    """Returns the bytes of this process's private memory that it may write."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmData:\s+(\d+) kB", status)[1]) << 10
