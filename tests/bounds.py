"""Bounds on time and memory, for tests of readers with files made to exhaust them."""

import contextlib
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path


class TooLong(BaseException):
    """The time limit has passed. Handlers of `Exception` do not catch this."""


@contextlib.contextmanager
def bounded(seconds: float, size: int) -> Iterator[None]:
    """Fails if the block takes more than `seconds`, or allocates more than `size` bytes.

    Memory-mapped files do not count, because the system can evict their pages.
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
    """Returns the bytes of this process's private writable memory."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmData:\s+(\d+) kB", status)[1]) << 10
