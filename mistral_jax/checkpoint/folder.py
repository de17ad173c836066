"""Folders that appear whole or not at all, however the program ends."""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.filesize import decimal

from mistral_jax.checkpoint import locks

# Returns the reason why a folder may not be replaced, such as "has notes.txt, ...", or None.
Kept = Callable[[Path], str | None]

# Files and folders that operating systems and file browsers leave behind.
_STRAY = re.compile(
    r"\._.*|\.DS_Store|\.localized|\.nfs[0-9a-f]+|\.fuse_hidden.*|\.directory"
    r"|desktop\.ini|(eh)?thumbs\.db|@eaDir|__MACOSX",
    re.IGNORECASE,
)


@contextlib.contextmanager
def whole(target: Path | str, kept: Kept | None = None) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends, or is removed if it fails.

    The folder is made beside its target, with a lock file as long as this process runs. A later run
    for the same target can so remove the folders of killed processes, and leave those of running
    ones.

    Args:
      target: the folder to make. Anything that exists there is an error, except an empty folder, or
        a folder that may be replaced.
      kept: returns the reason why the folder at `target` may not be replaced, or None if it may.
        The old folder stays until the new one is complete. None = never replace a folder.

    Raises:
      ValueError: `target` exists and may not be replaced, or no folder can be made there.
      OSError: the block raised it, for instance on a full disk.
    """
    check_target(target, kept)
    target = _place(target)
    with _error_names(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
    part = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}"
    with _error_names(target), locks.held(_lock_file(part)):
        try:
            part.mkdir()
            yield part
            with ThreadPoolExecutor(8) as pool:  # A disk syncs several files at once faster.
                list(pool.map(_sync, (*part.rglob("*"), part)))
            check_target(target, kept)
            if target.is_dir() and any(target.iterdir()):
                _exchange(part, target)
                _remove(part)
            else:
                part.replace(target)
            _sync(target.parent)
        except BaseException:
            _remove(part)
            raise


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Locks a folder against other processes that lock it too.

    Args:
      path: the folder, which holds a file `.lock` meanwhile.
      busy: the message if it is locked; `{owner}` stands for the process that holds the lock.

    Raises:
      ValueError: another process holds the lock.
    """
    with locks.held(path / ".lock") as owner:
        if owner is not None:
            raise ValueError(busy.replace("{owner}", owner))
        yield


def check_free(
    target: Path | str, remedy: str = "; name another folder, or replace it with --overwrite"
) -> None:
    """Raises a ValueError if there is anything but an empty folder at `target`."""
    if not _is_free(Path(os.path.abspath(target))):
        raise ValueError(f"{target} exists{remedy}")


def check_target(target: Path | str, kept: Kept | None = None) -> None:
    """Raises the ValueError that `whole` would raise, before any work is done."""
    place = _place(target)
    if kept is None:
        check_free(target)
    if not _is_free(place):
        reason = "is no folder"
        if place.is_symlink():
            reason = "is a symbolic link"
        elif place.is_dir():
            reason = kept(place)
        if reason is not None:
            raise ValueError(f"{target} {reason}; it is left as it is: name another folder")
    if place.is_dir() and _is_mounted(place):
        raise ValueError(
            f"{target} is a mount point, which no new folder can replace; name a folder in it, "
            f"such as {place / 'new'}"
        )
    above = place.parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{above} is no folder, so {target} cannot be made; name another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"{above} cannot be written to, and {place.relative_to(above)} is made there; name a "
            "folder in another place"
        )


def foreign(path: Path, files: re.Pattern[str]) -> str | None:
    """Looks for anything in a folder that this program did not write.

    Args:
      path: the folder.
      files: matches the relative paths of the files that this program writes.

    Returns:
      A reason not to replace the folder, which names the first other file, empty folder or symbolic
      link; None if there is none. Files that operating systems leave are ignored.
    """
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not is_stray(name))
        place = Path(folder)
        links = [name for name in (*inner, *names) if (place / name).is_symlink()]
        empty = [] if inner or names or place == path else [""]
        for name in sorted({*links, *names, *empty}):
            found = (place / name).relative_to(path).as_posix()
            if name in links or not name or not (is_stray(name) or files.fullmatch(found)):
                return f"has {found}, which this program did not write"
    return None


def is_stray(name: str) -> bool:
    """Tells whether operating systems leave files of this name, such as .DS_Store and ._x."""
    return _STRAY.fullmatch(name) is not None


def check_space(target: Path | str, size: int) -> None:
    """Raises a ValueError if the disk of `target` has less than `size` bytes free."""
    place = Path(os.path.abspath(target)).parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise ValueError(f"{target} needs {decimal(size)}, but its disk has {decimal(free)} free")


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Writes the bytes of an array in small blocks, which is faster in virtual machines.

    For a large write Linux allocates large pages. If the virtual machine had returned these to its
    host, the host must provide them again, which took up to eight times as long as the write.
    """
    block, data = 128 << 10, memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    for start in range(0, len(data), block):
        file.write(data[start : start + block])


def _place(target: Path | str) -> Path:
    """Returns the absolute path of a target; a symbolic link to a free place is resolved."""
    target = Path(os.path.abspath(target))
    return target.resolve() if target.is_symlink() and _is_free(target) else target


def _is_free(place: Path) -> bool:
    if not os.path.lexists(place):
        return True
    return place.is_dir() and all(is_stray(entry.name) for entry in place.iterdir())


def _is_mounted(place: Path) -> bool:
    """Tells whether a file system, or a part of one, is mounted on a folder."""
    if os.path.ismount(place):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # The table escapes blanks and backslashes of a path in octal.
    escaped = re.sub(r"[ \t\n\\]", lambda x: f"\\{ord(x[0]):03o}", str(place.resolve()))
    return any(line.split()[4:5] == [escaped] for line in mounts.splitlines())


@contextlib.contextmanager
def _error_names(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{target} could not be made: {error.strerror or error}") from error


def _clean(target: Path) -> None:
    """Removes folders of killed processes, and restores a target that one had moved aside."""
    names = {path.name for path in target.parent.iterdir()}
    found = {name for name in names if name.startswith(_prefix(target))}
    for name in sorted({name.removesuffix(".lock").removesuffix(_OLD) for name in found}):
        part = target.with_name(name)
        with locks.held(_lock_file(part)) as owner:
            if owner is None:
                old = part.with_name(f"{name}{_OLD}")
                if old.is_dir() and not os.path.lexists(target):
                    old.replace(target)
                _remove(old)
                _remove(part)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _lock_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.lock")


def _remove(folder: Path) -> None:
    for _ in range(50):  # A thread that writes may run on for a moment after an interrupt.
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in locks.UNSUPPORTED:
            raise
        locks.warn(path, "does not flush to the disk: after a power cut, check what was written")
    finally:
        os.close(descriptor)


_OLD = "-old"


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders, atomically if the system can, so that `old` always exists."""
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2:
        if not renameat2(at_cwd, bytes(new), at_cwd, bytes(old), exchange):
            return
        number = ctypes.get_errno()
        if number not in locks.UNSUPPORTED:
            raise OSError(number, os.strerror(number))
    locks.warn(new.parent, f"does not swap folders: for a moment, {old.name} has another name")
    aside = new.with_name(f"{new.name}{_OLD}")
    old.replace(aside)
    try:
        new.replace(old)
    except OSError:
        aside.replace(old)
        raise
    _remove(aside)
