"""The private memory of a process: when it rests, and at most while something runs."""

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
    return private_bytes()


def peak(run: Callable[[], object]) -> int:
    """Returns the largest RssAnon of this process while something runs."""
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(_INTERVAL):
            most[0] = max(most[0], private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(most[0], private_bytes())


def private_bytes(process: int | str = "self") -> int:
    """Returns RssAnon of a process, 0 if it has ended; files that are mapped do not count."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
