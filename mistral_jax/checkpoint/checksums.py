"""Checksums of a folder: `checksums.json` holds the CRC-32 of each file as it was written.

They later show which file is missing, truncated or changed.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from mistral_jax.base.fields import Rule, check_table, integer, list_of, show, string, table_of
from mistral_jax.base.files import check_regular, read_json

NAME = "checksums.json"
# Runs of earlier versions have this file instead, with the size and CRC-32 of each file in decimal.
EARLIER_NAME = "sums.json"

REMEDY = "copy the checkpoint again, or convert it again"
_BLOCK = 1 << 20
_NUMBERS = list_of(integer(0, 1 << 62))
_RULES = {"files": table_of(string())}
_EARLIER_RULES = {
    "files": table_of(
        Rule("a size and a CRC-32", lambda x: _NUMBERS.accepts(x) and len(x) == 2),
    )
}

Checksums = dict[str, str]  # The CRC-32 of each file in hexadecimal, by its path in the folder.


def of_bytes(data: bytes | memoryview) -> str:
    """Returns the checksum of bytes."""
    return to_text(zlib.crc32(data))


def of_file(file: Path) -> str:
    """Returns the checksum of a file, read in blocks.

    Raises:
      ValueError: the file does not exist, or is not a regular file.
    """
    check_regular(file)
    total = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total = zlib.crc32(block, total)
    return to_text(total)


def to_text(total: int) -> str:
    """Returns a CRC-32 in hexadecimal, as `checksums.json` holds it."""
    return f"{total:08x}"


def write(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes the checksums of all files in a folder and its subfolders.

    Args:
      folder: the folder, with all of its files.
      known: checksums of some of the files, which are then not read.
    """
    known = known or {}
    sums = {name: known.get(name) or of_file(file) for name, file in _files(folder).items()}
    (folder / NAME).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Checksums:
    """Reads the checksums of a folder, of this version or an earlier one.

    Returns:
      The checksums; empty if the folder has none.

    Raises:
      ValueError: the file of checksums is damaged.
    """
    file, earlier = folder / NAME, folder / EARLIER_NAME
    if not file.exists() and earlier.exists():
        table = {"files": None} | read_json(earlier)
        check_table(table, _EARLIER_RULES, str(earlier))
        return {name: to_text(total) for name, (_, total) in table["files"].items()}
    sums = read_json(file) if file.exists() else {}
    check_table({"files": sums}, _RULES, str(file))
    return sums


def check(folder: Path, remedy: str) -> None:
    """Compares the files of a folder with its checksums, if it has any.

    Args:
      folder: the folder.
      remedy: what the message advises.

    Raises:
      ValueError: a file is missing or differs; the message names it.
    """
    for name, total in read(folder).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: {remedy}")
        check_file(folder / name, total, remedy=remedy)


def check_file(file: Path, expected: str | None, what: str = "", remedy: str = REMEDY) -> None:
    """Raises a ValueError unless a file has the expected checksum; see `compare`."""
    compare(of_file(file), expected, file, what, remedy)


def compare(
    found: str, expected: str | None, file: Path, what: str = "", remedy: str = REMEDY
) -> None:
    """Raises a ValueError unless a checksum is the expected one.

    Args:
      found: the checksum of the file as it is.
      expected: its checksum when it was written; None = the file was not written.
      file: the file, for the message.
      what: the beginning of the message.
      remedy: the end of the message.
    """
    if found != expected:
        raise ValueError(
            f"{what}{file} is not the file that was written: its CRC-32 is {found}, expected "
            f"{show(expected)}: {remedy}"
        )


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths if path.name != NAME}
