"""A folder that appears whole or not at all, however the program ends. It knows no file formats."""

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.filesize import decimal

Replaceable = Callable[[Path], bool] | None


@contextlib.contextmanager
def whole(target: Path | str, replaceable: Replaceable = None) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends, or vanishes if it fails.

    It lies beside its target, locked while this process lives: so a later run for the same target
    can tell those of killed processes, which it removes, from those of running ones.

    Args:
      target: what to make. Nothing that exists is touched, but for an empty folder, unless
      replaceable: tells whether the folder at `target` may be replaced; it stays until the new one
        is whole. None = it may not.

    Raises:
      ValueError: `target` exists and may not be replaced.
      OSError: the block raised one, for instance on a full disk.
    """
    target = Path(os.path.abspath(target))
    check_target(target, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    part, lock = _make(target)
    try:
        yield part
        with ThreadPoolExecutor(8) as pool:  # A disk is faster at several.
            list(pool.map(_sync, (*part.rglob("*"), part)))
        check_target(target, replaceable)
        if target.is_dir() and any(target.iterdir()):
            _exchange(part, target)
            _remove(part)
        else:
            part.replace(target)
        _sync(target.parent)
    except OSError as error:
        _remove(part)
        raise OSError(f"{target} could not be made: {error.strerror or error}") from error
    except BaseException:
        _remove(part)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Keeps a folder from all other processes that ask for it in this way.

    Raises:
      ValueError: another has it; the message is `busy`.
    """
    lock = _lock(path)
    if lock is None:
        raise ValueError(busy)
    try:
        yield
    finally:
        os.close(lock)


def check_target(
    target: Path | str,
    replaceable: Replaceable = None,
    remedy: str = "; name another folder, or replace it with --overwrite",
) -> None:
    """Raises what `whole` would, before any work is done for it; `remedy` is for what exists."""
    target = Path(os.path.abspath(target))
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if replaceable is None:
        raise ValueError(f"{target} exists{remedy}")
    if target.is_symlink() or not target.is_dir() or not replaceable(target):
        raise ValueError(f"{target} is not such a folder as would replace it; it is left as it is")


def check_space(target: Path | str, size: int) -> None:
    """Raises a ValueError if the disk of `target` has no room for `size` more bytes."""
    place = Path(os.path.abspath(target)).parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise ValueError(f"{target} needs {decimal(size)}, but its disk has {decimal(free)} free")


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Writes the bytes of an array, fast in virtual machines too.

    For a large write Linux takes large pages, and those that a virtual machine has freed its host
    must provide again: this was measured to take up to eight times as long as all the rest.
    """
    block, data = 128 << 10, memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    for start in range(0, len(data), block):
        file.write(data[start : start + block])


def _make(target: Path) -> tuple[Path, int]:
    while True:
        part = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}"
        part.mkdir()
        lock = _lock(part)
        if lock is not None and part.exists():  # Else another run took it for a leftover.
            return part, lock


def _clean(target: Path) -> None:
    for path in target.parent.iterdir():
        if path.name.startswith(_prefix(target)) and (lock := _lock(path)) is not None:
            _remove(path)
            os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _lock(folder: Path) -> int | None:
    """Locks a folder until the returned descriptor is closed; None = it is gone, or locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(folder: Path) -> None:
    for _ in range(50):  # A writer's thread may outlive its interrupted caller for a moment.
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders in one step where the system can, so that no moment is without `old`."""
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and not renameat2(at_cwd, bytes(new), at_cwd, bytes(old), exchange):
        return
    aside = new.with_name(f"{new.name}-old")
    old.replace(aside)
    new.replace(old)
    aside.replace(new)
