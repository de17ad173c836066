"""Lock files, which work on file systems with and without `flock`.

The file names its owner, which updates the file's time every few seconds. This tells a running
owner from a dead one where `flock` is missing (Lustre, FUSE) or works on one host only (NFS).
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Errors of system calls that a file system does not support.
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)

# An owner updates its file this often; one on another host counts as dead after the second time.
_BEAT_SECONDS, _DEAD_SECONDS = 10.0, 120.0
# Without flock, two processes may take a file at once: each reads it again after this time.
_SETTLE_SECONDS = 0.5

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(file: Path) -> Iterator[str | None]:
    """Holds a lock file while the block runs, and removes it at the end.

    Args:
      file: the file to make; its folder must exist.

    Yields:
      None if this process holds the lock, or else the name of the owner, for a message.

    Raises:
      OSError: the file cannot be made.
    """
    token = secrets.token_hex(8)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        owner = _take(file, descriptor, token)
        if owner is None and not _is(file, descriptor):  # The last owner has just removed it.
            os.close(descriptor)
            continue
        break
    if owner is not None:
        os.close(descriptor)
        yield owner
        return
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, done), daemon=True)
    beat.start()
    try:
        yield None
    finally:
        done.set()
        beat.join()
        with contextlib.suppress(OSError):
            if _is(file, descriptor):
                file.unlink()
        os.close(descriptor)


def warn(path: Path, what: str) -> None:
    """Warns once that the file system of `path` lacks a feature, with the consequence."""
    if what not in _said:
        _said.add(what)
        _log.warning("the file system of %s %s", path, what)


_said: set[str] = set()


def _take(file: Path, descriptor: int, token: str) -> str | None:
    """Makes this process the owner of an open file, or returns the name of its owner."""
    locks = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _name(_owner(descriptor))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        locks = False
        warn(file.parent, "does not lock files: do not start two programs there at the same moment")
    owner = _owner(descriptor)
    if owner and owner["token"] != token and _is_alive(owner, file, descriptor):
        return _name(owner)
    record = {**_self(), "token": token}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    if not locks:
        time.sleep(_SETTLE_SECONDS)
        now = _owner(descriptor)
        if now and now["token"] != token:
            return _name(now)
    return None


def _self() -> dict[str, Any]:
    """Returns a description that identifies this process on all hosts, and after a restart."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else "",
        "space": os.readlink(space) if space.is_symlink() else "",
        "process": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(process: int) -> str | None:
    """Returns the start time of a running process on this host.

    Returns:
      The time as the system states it; "" if it does not; None if there is no such process.
    """
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").is_file():
            return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def _owner(descriptor: int) -> dict[str, Any] | None:
    """Reads the owner's description from an open lock file; None if it is empty or damaged."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        kinds = {"host": str, "boot": str, "space": str, "process": int, "token": str}
        good = all(type(record[name]) is kind for name, kind in kinds.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if good else None


def _name(owner: dict[str, Any] | None) -> str:
    return f"process {owner['process']} on {owner['host']}" if owner else "another process"


def _is_alive(owner: dict[str, Any], file: Path, descriptor: int) -> bool:
    own = _self()
    if all(owner[name] == own[name] for name in ("host", "boot", "space")):
        return 0 < owner["process"] < 1 << 31 and _started(owner["process"]) == owner.get("started")
    # The clocks of two hosts differ, so the file's age is measured with the file system's clock.
    with tempfile.TemporaryFile(dir=file.parent) as probe:
        now = os.fstat(probe.fileno()).st_mtime
    return now - os.fstat(descriptor).st_mtime < _DEAD_SECONDS


def _is(file: Path, descriptor: int) -> bool:
    """Tells whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except OSError:
        return False


def _beat(descriptor: int, done: threading.Event) -> None:
    while not done.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(descriptor)
