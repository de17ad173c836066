"""Laws of the files of a tree: whatever is changed in them is found, and named."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from test_folder import STRAY

from mistral_jax.checkpoint import arrays, checksums, zarr

TREE = {
    "a/x": np.arange(48, dtype=np.float32).reshape(8, 6),
    "b/y": np.ones((4, 2, 3), ml_dtypes.bfloat16),
    "b/z": np.ones((4, 2, 3), ml_dtypes.bfloat16) * 2,
    "c": np.arange(5).astype(np.float16),
    "d/values": np.full((3, 2), 127, np.int8),
}
CHUNK = "params/state/a.x/1.0"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder, and the checksums of its files."""
    monkeypatch.setattr(zarr, "_CHUNK_BYTES", 64)
    path = tmp_path / "params"
    sums = zarr.lay_out(path, [tuple(name.split("/")) for name in TREE], arrays.HANDLER)
    for name, array in TREE.items():
        sums |= zarr.write(path, name, array)
    return path, sums


def refused(tree, message):
    path, sums = tree
    with pytest.raises(ValueError, match=message) as error:
        zarr.verify(path, sums, zarr.stored(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_written_is_described_and_verified(tree):
    path, sums = tree
    found = zarr.stored(path)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in TREE.items()
    }
    read = []
    zarr.verify(path, sums, found, read.append)
    assert sum(read) == sum(x.nbytes for x in TREE.values())
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert sums.keys() == files
    assert {sums[name] for name in files} == {checksums.of_file(path / name) for name in files}


def test_what_systems_leave_is_no_damage(tree):
    path, sums = tree
    for place in (path, path / "state", path / "state" / "a.x"):
        for name in STRAY:
            (place / name).write_text("junk")
    zarr.verify(path, sums, zarr.stored(path))


@pytest.mark.parametrize("change", ["flip", "cut", "longer", "remove", "folder", "link"])
@pytest.mark.parametrize(
    "file",
    ["state/a.x/1.0", "state/a.x/.zarray", "state/_METADATA", "_CHECKPOINT_METADATA"],
)
def test_any_change_of_a_file_is_found_and_named(tree, file, change):
    path, _ = tree
    place = path / file
    data = place.read_bytes()
    if change in ("remove", "folder", "link"):
        place.unlink()
        if change == "folder":
            place.mkdir()
        if change == "link":
            place.symlink_to("/dev/zero")
    else:
        changed = bytes([data[0] ^ 1]) + data[1:]
        place.write_bytes({"flip": changed, "cut": data[:-1], "longer": data + b" "}[change])
    message = refused(tree, "params")
    assert place.name in message
    if "a.x" in file:
        assert "array a/x" in message
        assert str(place) in message


def test_exchanged_arrays_are_found(tree):
    path, _ = tree
    state = path / "state"
    shutil.move(state / "b.y", state / "y")
    shutil.move(state / "b.z", state / "b.y")
    shutil.move(state / "y", state / "b.z")
    assert zarr.stored(path)
    refused(tree, r"array b/y: .*b\.y/\d\.\d\.\d is not the file that was written")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fill_value", 0),
        ("fill_value", 7.0),
        ("order", "F"),
        ("dtype", "<f8"),
        ("dtype", ["<f4"]),
        ("dtype", "<f2"),
        ("compressor", {"id": "zstd"}),
        ("dimension_separator", "/"),
        ("shape", [6, 8]),
        ("shape", [1 << 40, 1 << 40]),
        ("shape", [1 << 62, 6]),
        ("shape", [8]),
        ("shape", []),
        ("shape", [8, True]),
        ("shape", None),
        ("chunks", [8, 6]),
        ("chunks", [0, 0]),
        ("chunks", [-1, 3]),
        ("chunks", [1 << 40, 1 << 40]),
        ("chunks", "ab"),
        ("zarr_format", 3),
        ("odd", 1),
    ],
)
def test_a_description_that_is_another_is_refused_without_checksums(tree, key, value):
    path, _ = tree
    file = path / "state" / "a.x" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=r"array a/x.*a\.x/") as error:
        zarr.stored(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"use_zarr3": True},
        {"use_ocdbt": 1},
        {"tree_metadata": None},
        {"tree_metadata": {}},
        {"tree_metadata": {"('e',)": {}}},
        {"tree_metadata": {"('e',)": {"key_metadata": [{"key": "../a", "key_type": 2}]}}},
    ],
)
def test_metadata_of_another_tree(tree, change):
    path, _ = tree
    file = path / "state" / "_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"_METADATA has|is no part of a checkpoint"):
        zarr.stored(path)


def test_foreign_files_are_named(tree):
    path, _ = tree
    for name in ("more", "state/more", "state/a.x/9.9"):
        (path / name).touch()
        with pytest.raises(ValueError, match=rf"{name} is no part of .*: remove it"):
            zarr.stored(path)
        (path / name).unlink()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a/x", "b/z", "c"])
def test_numbers_that_are_none_are_found_without_checksums(tree, name, bad):
    path, _ = tree
    array = TREE[name].copy()
    array.flat[-1] = bad
    shutil.rmtree(path / "state" / name.replace("/", "."))
    zarr.write(path, name, array)
    with pytest.raises(ValueError, match=rf"array {name} has numbers .* not finite, in .*\d:"):
        zarr.verify(path, {}, zarr.stored(path))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_numbers_are_finite(dtype):
    most = ml_dtypes.finfo(dtype).max
    assert zarr._finite(np.array([most, -most, 0], dtype).tobytes(), np.dtype(dtype))
