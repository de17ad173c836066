"""A journal of computed answers, from which a run that was killed goes on."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mistral_jax.base.files import check_regular
from mistral_jax.parallel import distributed


class Journal:
    """Answers by key, in a file of JSON Lines that only grows.

    A line that is not complete, because the process was killed while it wrote, is dropped. In a run
    of several processes, the first one reads and writes the file, and all have its entries.

    Args:
      path: the file; it is made if it does not exist. None = entries are kept in memory only.
      identity: what answers depend on beside the request: the checkpoint and how it is loaded.
    """

    def __init__(self, path: Path | None = None, identity: str = ""):
        """Opens the file.

        Raises:
          ValueError: another run is using the file, or it is not a regular file.
          OSError: the file cannot be read or written.
        """
        self._identity = identity
        self._file: BinaryIO | None = None
        self._entries: dict[str, Any] = {}
        if path is not None:
            self._entries = distributed.from_first(lambda: self._open(path))

    def key(self, kind: str, arguments: Any, draw: int = 0) -> str:
        """Returns the key of a request.

        Args:
          kind: what is computed.
          arguments: the request, JSON values.
          draw: number of the answer, if several are drawn at random.
        """
        whole = json.dumps([self._identity, kind, arguments, draw], sort_keys=True)
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: str, value: Any) -> None:
        """Adds an entry, and appends it to the file at once.

        Raises:
          OSError: the file cannot be written.
        """
        self._entries[key] = value
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")

    def close(self) -> None:
        """Closes the file, and releases its lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self, path: Path) -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_regular(path)
        # Without a buffer, a line is in the file as soon as it is written.
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(
                f"{path} is in use by another run; wait for its end, or name another --results"
            ) from None
        file.seek(0)
        entries, end = {}, 0
        with open(path, "rb") as reader:
            for line in reader:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                entry = _parse(line)
                if entry is not None:
                    entries[entry["key"]] = entry["value"]
        os.ftruncate(file.fileno(), end)
        self._file = file
        return entries


def _parse(line: bytes) -> Mapping[str, Any] | None:
    """Returns the entry of a line; None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    good = isinstance(entry, dict) and entry.keys() == {"key", "value"}
    return entry if good and isinstance(entry["key"], str) else None
