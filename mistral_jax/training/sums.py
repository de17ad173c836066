"""Sums of the files in a folder of a run: they show later which is missing, cut or changed."""

import json
import zlib
from pathlib import Path

from mistral_jax.base.fields import Rule, check_table, integer, list_of, table_of
from mistral_jax.base.files import read_json

_NAME = "sums.json"
_NUMBERS = list_of(integer(0, 1 << 62))
_SUM = Rule("a size and a CRC-32", lambda x: _NUMBERS.accepts(x) and len(x) == 2)
_RULES = {"files": table_of(_SUM)}
_BLOCK = 1 << 20


def write(folder: Path) -> None:
    """Writes the size and the CRC-32 of each file in a folder, and in those in it, beside them."""
    files = {name: [path.stat().st_size, _crc32(path)] for name, path in _files(folder).items()}
    (folder / _NAME).write_text(json.dumps({"files": files}) + "\n", encoding="utf-8")


def check(folder: Path, remedy: str) -> None:
    """Compares the files of a folder with what `write` found; one without sums is not compared.

    Raises:
      ValueError: a file is missing or another; it is named, with the remedy.
    """
    sums = folder / _NAME
    if not sums.exists():
        return
    table = {"files": None} | read_json(sums)
    check_table(table, _RULES, str(sums))
    found = _files(folder)
    for name, (size, crc32) in table["files"].items():
        path = found.get(name)
        if path is None:
            raise ValueError(f"{folder / name} is missing: {remedy}")
        if path.stat().st_size != size:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes; expected the {size} that were written: "
                f"{remedy}"
            )
        if _crc32(path) != crc32:
            raise ValueError(f"{path} is damaged, not what was written: {remedy}")


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths if path.name != _NAME}


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total = zlib.crc32(block, total)
    return total
