"""The private memory of this process: when it rests, and at most while something runs."""

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

_INTERVAL = 0.005  # seconds between two looks


def resting() -> int:
    """Returns RssAnon after what is free was given back; mapped files do not count."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _private_bytes()


def peak(run: Callable[[], object]) -> int:
    """Returns the largest RssAnon while something runs."""
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(_INTERVAL):
            most[0] = max(most[0], _private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(most[0], _private_bytes())


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
