"""Measures the private memory of a process: idle, and the peak while a function runs."""

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

_INTERVAL = 0.005  # seconds between two samples


def resting() -> int:
    """Returns this process's RssAnon after it returns free memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return private_bytes()


def peak(run: Callable[[], object]) -> int:
    """Runs a function; returns the largest RssAnon of this process meanwhile."""
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
    """Returns the RssAnon of a process, which excludes mapped files, or 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
