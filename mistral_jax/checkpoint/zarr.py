"""The files of a tree of arrays in Orbax's layout of Zarr 2: write, describe and verify them.

Files are verified in small blocks, so no array is read into memory. `arrays.py` reads arrays onto
devices.
"""

import itertools
import json
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mistral_jax.base import fields
from mistral_jax.base.fields import Rule, check_table, show
from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import checksums, folder
from mistral_jax.checkpoint.checksums import Checksums

# The most bytes of a file. Of larger files a host would read more than its own part; smaller ones
# take longer to read.
_CHUNK_BYTES = 2 << 20
# Bytes that each of a few threads verifies at a time.
_BLOCK_BYTES = 128 << 10
_MOST_METADATA = 64 << 20

_MARKER, _HANDLERS = "orbax.checkpoint", "_CHECKPOINT_METADATA"
_TREE, _ARRAY = "_METADATA", ".zarray"

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "<f2": np.dtype(np.float16),
    "<f4": np.dtype(np.float32),
    "|i1": np.dtype(np.int8),
}
_AXES = fields.list_of(fields.integer(1, 1 << 40), 8)
_ARRAY_RULES = {
    "chunks": _AXES,
    "compressor": Rule("null", lambda x: x is None),
    "dimension_separator": Rule('"."', lambda x: x == "."),
    "dtype": fields.string(),
    "fill_value": Rule("null", lambda x: x is None),
    "filters": Rule("null", lambda x: x is None),
    "order": Rule('"C"', lambda x: x == "C"),
    "shape": _AXES,
    "zarr_format": fields.integer(2, 2),
}
_NO = Rule("false", lambda x: x is False)
_TREE_RULES = {
    "tree_metadata": fields.table_of(fields.table_of()),
    "use_ocdbt": _NO,
    "use_zarr3": _NO,
    "store_array_data_equal_to_fill_value": fields.boolean(),
}


class Array(NamedTuple):
    """An array on disk.

    Attributes:
      shape: the shape of the array.
      dtype: the dtype of the array.
      chunk: the shape of each file; the last file along an axis is padded.
      place: the folder of the files.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    place: Path

    @property
    def file_bytes(self) -> int:
        """The size of each file in bytes."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def files(self) -> Iterator[str]:
        """The names of the files."""
        counts = [-(-n // part) for n, part in zip(self.shape, self.chunk, strict=True)]
        # A generator: a damaged description may have an enormous number of files.
        for number in range(math.prod(counts)):
            places = []
            for count in reversed(counts):
                number, place = divmod(number, count)
                places.append(str(place))
            yield ".".join(reversed(places)) or "0"


def lay_out(path: Path, names: Iterable[tuple[str, ...]], handler: str) -> Checksums:
    """Makes a folder for the arrays of a tree, which `write` then writes one by one.

    Args:
      path: the folder to make.
      names: the keys on the path to each leaf of the tree.
      handler: full name of the Orbax class that reads the tree.

    Returns:
      The checksums of the files that it made, for `verify`.
    """
    about = {"value_type": "np.ndarray", "skip_deserialize": False}
    described = {
        str(keys): {"key_metadata": _key_metadata(keys), "value_metadata": about}
        for keys in sorted(names)
    }
    metadata = {
        "tree_metadata": described,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (path / "state").mkdir(parents=True)
    contents = {
        _MARKER: "",
        _HANDLERS: json.dumps({"item_handlers": {"state": handler}}),
        f"state/{_TREE}": json.dumps(metadata),
    }
    return {name: _write_text(path / name, text) for name, text in contents.items()}


def write(
    path: Path, name: str, array: np.ndarray, entry: tuple[int, int] | None = None
) -> Checksums:
    """Writes an array, or one entry of it, into files as Orbax makes them.

    Orbax would need the whole tree in memory, or would take 1.5 times as long to write it in parts.

    Args:
      path: a folder made by `lay_out`.
      name: the keys on the path to the leaf, joined by slashes.
      array: the array to write, with at least one axis.
      entry: index of `array` in a larger array, whose entries are written one by one into files of
        their own, and the number of entries; None = it is the whole array.

    Returns:
      The checksums of the files that it made, for `verify`.
    """
    if entry is not None:
        array = array[None]
    shape = array.shape if entry is None else (entry[1], *array.shape[1:])
    chunk = chunk_shape(shape, array.itemsize)
    if entry is not None:
        chunk[0] = 1
    about = {
        "chunks": chunk,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": array.dtype.name if array.dtype.kind == "V" else array.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }
    key = f"state/{name.replace('/', '.')}"
    place = path / key
    place.mkdir(exist_ok=entry is not None)
    sums = {
        f"{key}/{_ARRAY}": _write_text(place / _ARRAY, json.dumps(about, separators=(",", ":")))
    }
    counts = (math.ceil(size / part) for size, part in zip(array.shape, chunk, strict=True))
    for number in itertools.product(*map(range, counts)):
        block = array[tuple(slice(n * c, (n + 1) * c) for n, c in zip(number, chunk, strict=True))]
        # The last chunk along an axis is padded to the size of the others.
        missing = [(0, c - size) for c, size in zip(chunk, block.shape, strict=True)]
        block = np.ascontiguousarray(np.pad(block, missing) if np.any(missing) else block)
        first = number[0] + (entry[0] if entry else 0)
        file = ".".join(map(str, (first, *number[1:])))
        with open(place / file, "wb") as stream:
            folder.write_array(stream, block)
        sums[f"{key}/{file}"] = checksums.of_bytes(block.reshape(-1).view(np.uint8).data)
    return sums


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Returns the shape of an array's files.

    The axes of a large array are halved in turn, the longest first, until a chunk is small enough.
    Each axis is halved at least once: whichever axis is partitioned over hosts, each host then
    reads little more than its own part.
    """
    parts, chunk = [1] * len(shape), list(shape)
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if math.prod(shape) * itemsize <= _CHUNK_BYTES:
        return chunk
    while any(parts[axis] == 1 for axis in axes) or math.prod(chunk) * itemsize > _CHUNK_BYTES:
        axis = min(axes, key=lambda axis: (chunk[axis] == 1, parts[axis], -shape[axis]))
        if chunk[axis] == 1:
            break
        parts[axis] *= 2
        chunk[axis] = math.ceil(shape[axis] / parts[axis])
    return chunk


def is_other(path: Path) -> bool:
    """Tells whether a tree is in Zarr 3, which the first versions of this program wrote."""
    return any((path / "state").glob("*/zarr.json"))


def stored(path: Path) -> dict[str, Array]:
    """Describes the arrays of a tree, and checks that all of their files are there.

    Returns:
      The description of each array, by the keys on the path to it, joined by slashes.

    Raises:
      ValueError: a file is missing, has the wrong size, is malformed, or does not belong to the
        tree. The message names the file and its array.
    """
    _check_names(path, {_MARKER, _HANDLERS, "state", "commit_success.txt"}, (_HANDLERS, "state"))
    handlers = _read_json(path / _HANDLERS, _MOST_METADATA)
    if not isinstance(handlers.get("item_handlers"), dict):
        handlers["item_handlers"] = None
    check_table(
        handlers,
        {"item_handlers": Rule("an object with state", _names_state)},
        str(path / _HANDLERS),
    )
    file = path / "state" / _TREE
    metadata = _read_json(file, _MOST_METADATA)
    for name in _TREE_RULES:
        metadata.setdefault(name, None)
    check_table(metadata, _TREE_RULES, str(file))
    names = {_keys(about, str(file)): key for key, about in metadata["tree_metadata"].items()}
    for keys, key in names.items():
        if key != str(keys):
            raise ValueError(f"{file} has {show(key)} for array {'/'.join(keys)}; copy it again")
    folders = {".".join(keys) for keys in names}
    _check_names(path / "state", {_TREE, *folders}, folders)
    return {"/".join(keys): describe(path / "state" / ".".join(keys)) for keys in sorted(names)}


def describe(place: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> Array:
    """Describes the array in a folder, and checks that all of its files are there.

    Args:
      place: the folder.
      dtypes: the dtypes that it may have, by their names in Zarr.

    Raises:
      ValueError: a file is missing, has the wrong size, is malformed, or does not belong to the
        array. The message names the file and the array.
    """
    name, file = place.name.replace(".", "/"), place / _ARRAY
    if not os.path.lexists(file):
        raise ValueError(f"array {name} has no file {file}: copy it again")
    about = _read_json(file, 1 << 16, f"array {name}: ")
    for key in {**_ARRAY_RULES, **about}:
        if key not in about or key not in _ARRAY_RULES:
            what = "no" if key not in about else "the unknown key"
            raise ValueError(f"array {name}: {file} has {what} {show(key)}: copy it again")
    check_table(about, _ARRAY_RULES | {"dtype": fields.string(*dtypes)}, f"array {name}: {file}")
    shape, chunk = tuple(about["shape"]), tuple(about["chunks"])
    if len(shape) != len(chunk) or any(c > n for n, c in zip(shape, chunk, strict=True)):
        raise ValueError(
            f"array {name}: {file} has chunks {show(list(chunk))}; expected parts of its shape "
            f"{show(list(shape))}"
        )
    array = Array(shape, dtypes[about["dtype"]], chunk, place)
    with os.scandir(place) as entries:
        found = {entry.name: entry for entry in entries if not folder.is_stray(entry.name)}
    found.pop(_ARRAY)
    left = dict(found)
    for part in array.files:
        entry = left.pop(part, None)
        if entry is None:
            raise ValueError(f"array {name} has no file {place / part}: copy it again")
        try:
            status = entry.stat()
        except OSError as error:
            said = error.strerror
            raise ValueError(f"array {name}: {entry.path} cannot be read: {said}") from None
        if not stat.S_ISREG(status.st_mode) or status.st_size != array.file_bytes:
            raise ValueError(
                f"array {name}: {entry.path} has {status.st_size} bytes; expected "
                f"{array.file_bytes} in a regular file: copy it again"
            )
    if left:
        raise ValueError(f"array {name}: {place / min(left)} is no part of it: remove it")
    return array


def verify(
    path: Path,
    sums: Mapping[str, str],
    names: Mapping[str, Array],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Reads the files of arrays, compares their checksums, and looks for numbers not finite.

    Args:
      path: the folder of the tree.
      sums: the checksums that `lay_out` and `write` returned; empty = compare none.
      names: the arrays, as `stored` describes them.
      advance: called with the size of each file in bytes, once it is read.

    Raises:
      ValueError: a file has changed, or holds a number that is not finite. The message names the
        file and its array.
    """

    def compare(found: str, file: Path, what: str = "") -> None:
        checksums.compare(found, sums.get(file.relative_to(path).as_posix()), file, what)

    def look(task: tuple[str, Array, str]) -> None:
        name, array, part = task
        file = array.place / part
        total, finite = 0, True
        with open(file, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                total = zlib.crc32(block, total)
                finite = finite and _finite(block, array.dtype)
        if sums:
            compare(checksums.to_text(total), file, f"array {name}: ")
        if not finite:
            raise ValueError(
                f"array {name} has numbers that are not finite, in {file}: convert it again, from "
                "whole files"
            )
        advance(array.file_bytes)

    if sums:
        for name in (_HANDLERS, f"state/{_TREE}"):
            compare(checksums.of_file(path / name), path / name)
        for name, array in names.items():
            file = array.place / _ARRAY
            compare(checksums.of_file(file), file, f"array {name}: ")
    tasks = [(name, array, part) for name, array in names.items() for part in array.files]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(look, task) for task in tasks]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _finite(block: bytes, dtype: np.dtype) -> bool:
    """Tells whether a block of numbers has no infinities and no NaNs."""
    if dtype == np.int8:
        return True
    # Without the sign bit, the bits of infinity and NaN are those of infinity or larger.
    bits = np.dtype(f"i{dtype.itemsize}")
    infinity = np.array(np.inf, dtype).view(bits)
    return (np.frombuffer(block, bits) & np.iinfo(bits).max).max() < infinity


def _write_text(file: Path, text: str) -> str:
    data = text.encode()
    file.write_bytes(data)
    return checksums.of_bytes(data)


def _read_json(file: Path, limit: int, what: str = "") -> dict[str, Any]:
    try:
        return read_json(file, limit)
    except ValueError as error:
        raise ValueError(f"{what}{error}: copy it again") from None


def _key_metadata(keys: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"key": key, "key_type": 2} for key in keys]


def _keys(about: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """Returns the keys on the path to a leaf, from Orbax's metadata of it."""
    described, value = about.get("key_metadata"), about.get("value_metadata")
    if isinstance(described, list) and all(isinstance(x, dict) for x in described):
        keys = tuple(x.get("key") for x in described)
        good = all(isinstance(key, str) and key and not set(key) & set("./\0") for key in keys)
        kind = value.get("value_type") if isinstance(value, dict) else None
        read = kind in ("np.ndarray", "jax.Array") and value.get("skip_deserialize") is False
        if keys and good and read and described == _key_metadata(keys):
            return keys
    raise ValueError(f"{source} has {show(about)} for an array; copy it again")


def _names_state(handlers: Any) -> bool:
    return isinstance(handlers, dict) and isinstance(handlers.get("state"), str)


def _check_names(path: Path, known: set[str], needed: Iterable[str]) -> None:
    """Checks that a folder has the files it needs, and no unknown ones."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; expected the arrays of a checkpoint")
    found = {name for name in os.listdir(path) if not folder.is_stray(name)}
    for name in sorted(needed):
        if name not in found:
            raise ValueError(f"{path} has no {name}: copy the checkpoint again")
    if unknown := found - known:
        raise ValueError(f"{path / min(unknown)} is no part of a checkpoint: remove it")
