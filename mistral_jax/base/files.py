"""Reads files that come from outside: text, JSON, JSON Lines and TOML, by one set of rules.

Each reader takes regular files only (or a pipe, where it reads once and says so), stops at a size
that such a file can sensibly have, drops a byte order mark, and expects UTF-8. It knows no formats.
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

MARK = b"\xef\xbb\xbf"  # Windows begins files with it.

# Bytes that a file of each kind may have.
MOST_TOML = 1 << 20
MOST_JSON = 64 << 20
MOST_TEXT = 64 << 20
MOST_LINE = 16 << 20
# What git leaves in place of a large file until `git lfs pull` fetches it.
_POINTER = b"version https://git-lfs.github.com/spec/"
# Objects, lists and tables within each other. Whoever walks a value may recurse that deep.
MOST_NESTED = 64


def check_regular(path: Path | str, limit: int = 1 << 62, pipe: bool = False) -> None:
    """Refuses what cannot be read, before it is opened.

    Args:
      path: the file.
      limit: bytes that it may have.
      pipe: whether a pipe will do: it is read once, up to `limit`.

    Raises:
      ValueError: there is no such file, it is a folder, a device or a pipe, or it is larger.
      OSError: the system does not tell.
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
    """Refuses a file without content of its own, before another library opens it.

    Args:
      path: a file of any size.
      expected: what a message calls the content: "the weights".

    Raises:
      ValueError: there is no such file, it is no regular file, it is empty, or it is a pointer of
        Git LFS.
      OSError: the system does not tell, or it cannot be read.
    """
    check_regular(path, 1 << 62)
    with open(path, "rb") as file:
        start = file.read(len(_POINTER))
    if not start:
        raise ValueError(f"{path} is empty; expected {expected}: fetch it again")
    _check_pointer(start, path, expected)


def read_bytes(path: Path | str, limit: int = MOST_TEXT, pipe: bool = False) -> bytes:
    """Reads a whole file; arguments and errors are those of `check_regular`.

    A ValueError also tells of a pointer of Git LFS in place of the file.
    """
    check_regular(path, limit, pipe)
    with open(path, "rb") as file:
        data = read_stream(file, str(path), limit)
    _check_pointer(data, path, "the file itself")
    return data


def read_stream(file: BinaryIO, source: str, limit: int = MOST_TEXT) -> bytes:
    """Reads an open file to its end; a ValueError names `source` if it has more than `limit`."""
    data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{source} has more than {decimal(limit)}; expected less")
    return data


def read_text(path: Path | str, limit: int = MOST_TEXT, pipe: bool = False) -> str:
    """Reads a text in UTF-8, its line ends as they are.

    Arguments and errors are those of `check_regular`; a ValueError also says what is not UTF-8.
    """
    return decode(read_bytes(path, limit, pipe), str(path))


def decode(data: bytes, source: str, kind: str = "UTF-8") -> str:
    """Decodes UTF-8 without its byte order mark; a ValueError names `source` and the bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the mark.
        start = error.start + len(data) - len(error.object)
        raise ValueError(
            f"{source} is not {kind}: byte 0x{data[start]:02x} at offset {start}; convert it to "
            "UTF-8 first"
        ) from None


def split_lines(text: str) -> list[str]:
    """Splits a text at line feeds alone, with or without a carriage return before them.

    `str.splitlines` would also split at a form feed, at U+0085 and at U+2028.
    """
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_json(path: Path | str, limit: int = MOST_JSON) -> dict[str, Any]:
    """Reads a JSON file that must hold an object.

    Raises:
      ValueError: there is no such file, it is too large, not JSON, or holds no object.
      OSError: it cannot be read.
    """
    data = read_bytes(path, limit)
    if not data.strip():
        raise ValueError(f"{path} is empty; expected a JSON object")
    value = parse_json(decode(data, str(path), "valid JSON"), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def parse_json(text: str, source: str) -> Any:
    """Parses JSON; a ValueError names `source` and the mistake."""
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
      ValueError: there is no such file, it is too large, or no TOML; it names the place.
      OSError: it cannot be read.
    """
    text = decode(read_bytes(path, MOST_TOML), str(path), "valid TOML")
    # The parser's time grows with the square of a key's parts.
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
    """Yields the lines of a file that hold something, and the place of each, in bounded memory.

    Args:
      path: a regular file of any size, unpacked on the way if its name ends with ".gz".

    Yields:
      Where a line stands ("data.jsonl, line 7", from 1 on), and its bytes.

    Raises:
      ValueError: there is no such file, it is no regular one, or is no whole gzip file, or a line
        is longer than `MOST_LINE`.
      OSError: it cannot be read.
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
    """Yields the objects of a file of JSON Lines, one a line, in bounded memory.

    Args:
      path: as for `read_lines`.
      skip: is given a sentence on each line that holds no object, which is left out; None = such a
        line is an error.
      is_log: whether a last line without an end, which a crash cut off, is left out.

    Yields:
      Where an object stands ("data.jsonl, line 7"), and the object.

    Raises:
      ValueError: as `read_lines`; or a line is not UTF-8, not JSON, or no object.
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
    """Returns the JSON object that a line holds; a ValueError does not name the place."""
    if line.lstrip().startswith(b"["):
        raise ValueError("it begins a JSON list; expected JSON Lines, which is an object a line")
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
    level = [value]
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
