"""A line: a file's, or a row of a data set, and the JSON object in it. It knows no forms of those.

Files are read as streams, so that their size does not matter.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Raw = bytes | Mapping[str, Any]


def read_lines(path: Path) -> Iterator[tuple[str, Raw]]:
    """Reads a file's lines but the blank ones, or the rows of a folder that `datasets` saved.

    Args:
      path: a file, unpacked on the way if its name ends with ".gz", or a folder.

    Yields:
      Where it stands ("data.jsonl, line 7", from 1 on), and what stands there, for `parse`.

    Raises:
      ValueError: there is no such file or data set, or it is damaged.
    """
    return _rows(path) if path.is_dir() else _lines(path)


def parse(raw: Raw) -> Mapping[str, Any]:
    """Returns the object of a line.

    Raises:
      ValueError: the line is not UTF-8, not JSON, or no object.
    """
    if not isinstance(raw, bytes):
        return raw
    if raw.lstrip().startswith(b"["):
        raise ValueError("it begins a JSON list; expected JSON Lines, which is an object a line")
    try:
        record = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} (0x{raw[error.start]:02x})"
        raise ValueError(f"{where} is not UTF-8; expected a JSON object") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"character {error.colno} is not JSON ({error.msg}); expected a JSON object"
        ) from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"it is a JSON {type(record).__name__}; expected an object")
    return record


def _lines(path: Path) -> Iterator[tuple[str, Raw]]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected one with a JSON object a line")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                # Windows begins files with a mark, which JSON does not allow.
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield f"{path}, line {number}", text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, Raw]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(split.name for split in path.iterdir() if split.is_dir())
        raise ValueError(f"{path} has the parts {', '.join(splits)}; name one of these folders")
    if not (path / "state.json").is_file():
        raise ValueError(
            f"{path} is a folder, but none that `datasets` saved; name its files, or save it with "
            "save_to_disk"
        )
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path} is read by `datasets`: pip install 'mistral-jax-flax[datasets]'"
        ) from None
    for number, row in enumerate(datasets.load_from_disk(str(path)), start=1):
        yield f"{path}, row {number}", row
