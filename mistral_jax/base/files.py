"""Reads external text, JSON, JSON Lines and TOML files by one set of rules.

Every reader accepts regular files only (some also a pipe), limits the size, removes a byte order
mark and expects UTF-8.
"""

import gzip
import json
import os
import re
import stat
import tomllib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.filesize import decimal

MARK = b"\xef\xbb\xbf"  # UTF-8 byte order mark, which Windows programs write

# Size limits in bytes.
MOST_TOML = 1 << 20
MOST_JSON = 64 << 20
MOST_TEXT = 64 << 20
MOST_LINE = 16 << 20
# First bytes of the pointer that git leaves in place of a file until `git lfs pull` fetches it.
_POINTER = b"version https://git-lfs.github.com/spec/"
# Nesting depth of objects, lists and tables: code that walks a value recurses at most this deep.
MOST_NESTED = 64


def check_regular(path: Path | str, limit: int = 1 << 62, pipe: bool = False) -> None:
    """Checks, before a file is opened, that it can be read.

    Opening a pipe or a device could block, and reading one might never end.

    Args:
      path: the file.
      limit: maximum size in bytes.
      pipe: whether to accept a pipe too, whose size is not known.

    Raises:
      ValueError: the file does not exist, is a folder, a device or a pipe, or is too large.
      OSError: the file system cannot be queried.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no file {path}; name one that exists") from None
    if pipe and stat.S_ISFIFO(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "no regular file")
        remedy = ": save its output in one first" if stat.S_ISFIFO(status.st_mode) else ""
        raise ValueError(f"{path} is {kind}; expected a regular file{remedy}")
    if status.st_size > limit:
        raise ValueError(_too_large(path, status.st_size, limit))


def check_content(path: Path | str, expected: str) -> None:
    """Checks that a file is neither empty nor a Git LFS pointer, before another library opens it.

    Args:
      path: a file of any size.
      expected: name of the content for error messages, for instance "the weights".

    Raises:
      ValueError: the file does not exist, is not a regular file, is empty, or is a Git LFS pointer.
      OSError: the file cannot be read.
    """
    check_regular(path, 1 << 62)
    with open(path, "rb") as file:
        start = file.read(len(_POINTER))
    if not start:
        raise ValueError(f"{path} is empty; expected {expected}: fetch it again")
    _check_pointer(start, path, expected)


def read_bytes(path: Path | str, limit: int = MOST_TEXT, pipe: bool = False) -> bytes:
    """Reads a whole file.

    Args:
      path: the file.
      limit: maximum size in bytes.
      pipe: whether to accept a pipe too.

    Raises:
      ValueError: as `check_regular`; or the file is a Git LFS pointer.
      OSError: the file cannot be read.
    """
    check_regular(path, limit, pipe)
    with open(path, "rb") as file:
        data = read_stream(file, str(path), limit)
    _check_pointer(data, path, "the file itself")
    return data


def read_stream(file: BinaryIO, source: str, limit: int = MOST_TEXT) -> bytes:
    """Reads an open file to its end.

    Raises:
      ValueError: the file has more than `limit` bytes; the message names `source`.
    """
    data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{source} has more than {decimal(limit)}; expected less")
    return data


def read_text(path: Path | str, limit: int = MOST_TEXT, pipe: bool = False) -> str:
    """Reads a text in UTF-8 without converting line endings.

    Arguments and errors are those of `read_bytes`; text that is not UTF-8 also raises ValueError.
    """
    return decode(read_bytes(path, limit, pipe), str(path))


def decode(data: bytes, source: str, kind: str = "UTF-8") -> str:
    """Decodes UTF-8 and removes a byte order mark.

    Args:
      data: the bytes.
      source: name of their source for error messages.
      kind: name of the expected content for error messages.

    Raises:
      ValueError: a byte is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `error` counts bytes from the end of the byte order mark.
        start = error.start + len(data) - len(error.object)
        raise ValueError(
            f"{source} is not {kind}: byte 0x{data[start]:02x} at offset {start}; convert it to "
            "UTF-8 first"
        ) from None


def split_lines(text: str) -> list[str]:
    r"""Splits a text at "\n" and "\r\n" only.

    `str.splitlines` also splits at a form feed, at U+0085 and at U+2028.
    """
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_json(path: Path | str, limit: int = MOST_JSON) -> dict[str, Any]:
    """Reads a JSON file whose top-level value is an object.

    Raises:
      ValueError: the file does not exist, is too large, is not JSON or holds another value.
      OSError: the file cannot be read.
    """
    data = read_bytes(path, limit)
    if not data.strip():
        raise ValueError(f"{path} is empty; expected a JSON object")
    value = parse_json(decode(data, str(path), "valid JSON"), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def parse_json(text: str, source: str) -> Any:
    """Parses JSON.

    Raises:
      ValueError: the text is not valid JSON or is nested too deeply; the message names `source`.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply") from None
    except ValueError:
        raise ValueError(f"{source} has an integer of too many digits") from None
    _check_depth(value, source)
    return value


def read_toml(path: Path | str) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
      ValueError: the file does not exist, is too large, is not valid TOML (the message gives line
        and column), or is nested too deeply.
      OSError: the file cannot be read.
    """
    text = decode(read_bytes(path, MOST_TOML), str(path), "valid TOML")
    # tomllib takes time quadratic in the number of parts of a dotted key.
    bare = re.sub(r"#[^\n]*", "", re.sub(r'"[^"\n]*"|\'[^\'\n]*\'', "", text))
    keys = re.split(r"[,={}\[\]\n]", bare)
    if any(key.count(".") >= MOST_NESTED for key in keys):
        raise ValueError(f"{path} is nested too deeply: expected at most {MOST_NESTED} levels")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    _check_depth(table, str(path))
    return table


def read_lines(path: Path | str) -> Iterator[tuple[str, bytes]]:
    """Yields the lines of a file that are not blank, in bounded memory.

    Args:
      path: a regular file of any size; it is decompressed if its name ends with ".gz".

    Yields:
      The location of a line ("data.jsonl, line 7", counted from 1) and its bytes.

    Raises:
      ValueError: the file does not exist, is not a regular file or not a complete gzip file, or a
        line is longer than `MOST_LINE` bytes.
      OSError: the file cannot be read.
    """
    check_regular(path)
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            number = 0
            while line := file.readline(MOST_LINE + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > MOST_LINE:
                    raise ValueError(f"{where} has more than {decimal(MOST_LINE)}; expected less")
                if number == 1:
                    line = line.removeprefix(MARK)
                if line.strip():
                    yield where, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def read_records(
    path: Path | str,
    skip: Callable[[str], None] | None = None,
    is_log: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a JSON Lines file in bounded memory.

    Args:
      path: as for `read_lines`.
      skip: called with an error message for each line that is not a JSON object, which is then
        skipped; None = such a line raises ValueError.
      is_log: whether to ignore a last line without a line feed, which a crash may have cut off.

    Yields:
      The location of an object ("data.jsonl, line 7") and the object.

    Raises:
      ValueError: as `read_lines`; or a line is not a JSON object in UTF-8.
      OSError: the file cannot be read.
    """
    for where, line in read_lines(path):
        if is_log and not line.endswith(b"\n"):
            return
        try:
            record = _parse_record(line)
        except ValueError as error:
            if skip is None:
                raise ValueError(f"{where}: {error}") from None
            skip(f"{where}: {error}")
        else:
            yield where, record


def _parse_record(line: bytes) -> dict[str, Any]:
    """Returns the JSON object of a line; the caller adds the location to a ValueError."""
    if line.lstrip().startswith(b"["):
        raise ValueError("it begins a JSON list; expected JSON Lines: one object per line")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} (0x{line[error.start]:02x})"
        raise ValueError(f"{where} is not UTF-8; expected a JSON object") from None
    try:
        record = json.loads(text)
        _check_depth(record, "it")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"character {error.colno} is not JSON ({error.msg}); expected a JSON object"
        ) from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"it is a JSON {type(record).__name__}; expected an object")
    return record


def _check_depth(value: Any, source: str) -> None:
    level = [value]  # level by level, because recursion could overflow the stack
    for _ in range(MOST_NESTED):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"{source} is nested too deeply: expected at most {MOST_NESTED} levels")


def _check_pointer(data: bytes, path: Path | str, expected: str) -> None:
    if data.startswith(_POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer, not {expected}: run `git lfs pull` in "
            f"{Path(path).parent}"
        )


def _too_large(path: Path | str, size: int, limit: int) -> str:
    return f"{path} has {decimal(size)}; expected at most {decimal(limit)}"
