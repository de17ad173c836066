"""A folder that appears whole or not at all, however the program ends. It knows no file formats."""

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

# Says what keeps a folder from being replaced, such as "has notes.txt, ..."; None = nothing does.
Kept = Callable[[Path], str | None]

# Files and folders that operating systems and file browsers leave, and no user misses.
_STRAY = re.compile(
    r"\._.*|\.DS_Store|\.localized|\.nfs[0-9a-f]+|\.fuse_hidden.*|\.directory"
    r"|desktop\.ini|(eh)?thumbs\.db|@eaDir|__MACOSX",
    re.IGNORECASE,
)


@contextlib.contextmanager
def whole(target: Path | str, kept: Kept | None = None) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends, or vanishes if it fails.

    It lies beside its target, with a lock file while this process lives: so a later run for the
    same target can tell those of killed processes, which it removes, from those of running ones.

    Args:
      target: what to make. Nothing that exists is touched, but for an empty folder, or where
      kept: says that nothing keeps the folder at `target` from being replaced; it stays until the
        new one is whole. None = it may not be replaced.

    Raises:
      ValueError: `target` exists and may not be replaced, or no folder can appear there.
      OSError: the block raised one, for instance on a full disk.
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
            with ThreadPoolExecutor(8) as pool:  # A disk is faster at several.
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
    """Keeps a folder from all other processes that ask for it in this way.

    Args:
      path: the folder; a file `.lock` lies in it meanwhile.
      busy: a sentence for whoever finds it locked, with `{owner}` for the process that has it.

    Raises:
      ValueError: another has it.
    """
    with locks.held(path / ".lock") as owner:
        if owner is not None:
            raise ValueError(busy.replace("{owner}", owner))
        yield


def check_free(
    target: Path | str, remedy: str = "; name another folder, or replace it with --overwrite"
) -> None:
    """Raises a ValueError if there is something at `target`, an empty folder apart."""
    if not _is_free(Path(os.path.abspath(target))):
        raise ValueError(f"{target} exists{remedy}")


def check_target(target: Path | str, kept: Kept | None = None) -> None:
    """Raises what `whole` would, before any work is done for it."""
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
    """Finds something in a folder that a program did not put there.

    Args:
      path: the folder.
      files: the relative paths of what the program writes.

    Returns:
      What keeps the folder, for `whole`: it names the first other file, empty folder or symbolic
      link; None = there is none. What systems leave does not count.
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
    """Tells whether operating systems leave files of such a name, as .DS_Store and ._x."""
    return _STRAY.fullmatch(name) is not None


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


def _place(target: Path | str) -> Path:
    """Returns where a target is to be made: where a symbolic link leads, if that is free."""
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
    # Blanks and backslashes in a path are octal escapes.
    escaped = re.sub(r"[ \t\n\\]", lambda x: f"\\{ord(x[0]):03o}", str(place.resolve()))
    return any(line.split()[4:5] == [escaped] for line in mounts.splitlines())


@contextlib.contextmanager
def _error_names(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{target} could not be made: {error.strerror or error}") from error


def _clean(target: Path) -> None:
    """Removes what killed processes have left; gives a name back that one took in exchange."""
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
    for _ in range(50):  # A writer's thread may outlive its interrupted caller for a moment.
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
    """Swaps two folders in one step where the system can, so that no moment is without `old`."""
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
