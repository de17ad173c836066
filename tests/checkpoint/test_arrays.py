"""Laws of arrays on disk: what is written is read, by Orbax too, and nothing else is there."""

import json
import logging
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mistral_jax.base import memory
from mistral_jax.checkpoint import arrays, zarr


def tree():
    rng = np.random.default_rng(0)
    return {
        "a": {"x": rng.standard_normal((8, 6)).astype(np.float32)},
        "b": {"y": rng.standard_normal((4, 2, 3)).astype(ml_dtypes.bfloat16)},
        "b2": {"z": np.arange(5).astype(np.float16)},
    }


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def write(path, tree):
    zarr.lay_out(path, [tuple(name.split("/")) for name in flat(tree)], arrays.HANDLER)
    for name, array in flat(tree).items():
        zarr.write(path, name, array)
    return path


def abstract(tree, sharding=None, dtype=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=sharding), tree
    )


@pytest.fixture
def written(tmp_path):
    return write(tmp_path / "t", tree())


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_written_one_by_one_is_read_whole(written):
    equal(arrays.read(written, abstract(tree())), tree())


def test_a_whole_tree_with_scalars_is_read_again(tmp_path):
    state = {"step": jnp.int32(7), **tree()}
    arrays.save_in_background(tmp_path / "t", state)()
    equal(arrays.read(tmp_path / "t", abstract(state)), state)


def test_no_file_names_the_folder_that_it_was_made_in(written):
    for file in written.rglob("*"):
        assert file.is_dir() or str(written.parent).encode() not in file.read_bytes(), file


def test_the_files_are_those_that_orbax_writes(written, tmp_path):
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    with context:
        ocp.save(tmp_path / "orbax", tree())
    ours, theirs = (
        {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for path in (written, tmp_path / "orbax")
    )
    assert ours.keys() == theirs.keys() - {Path("commit_success.txt")}  # it names the folder
    for name, content in ours.items():
        if name.parts[0] == "state":  # outside it, Orbax notes the time
            assert content == theirs[name], name
    handlers, expected = (
        json.loads(files[Path("_CHECKPOINT_METADATA")])["item_handlers"] for files in (ours, theirs)
    )
    assert handlers.items() <= expected.items()


@pytest.mark.parametrize("shape", [(10, 4), (7, 4), (1, 40), (11,), (3, 2, 4), (16, 1)])
@pytest.mark.parametrize("chunk", [1, 16, 48, 1000])
def test_chunks_of_any_size(tmp_path, monkeypatch, shape, chunk):
    monkeypatch.setattr(zarr, "_CHUNK_BYTES", chunk)
    expected = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
    path = write(tmp_path / "t", expected)
    equal(arrays.read(path, abstract(expected)), expected)
    sizes = {file.stat().st_size for file in (path / "state" / "x").glob("[0-9]*")}
    assert len(sizes) == 1
    assert sizes.pop() <= max(chunk, 4)


@pytest.mark.parametrize(
    "shape",
    [(4096, 14336), (32, 128, 4096), (4096, 32, 128), (32768, 4096), (1, 256, 16384), (4194304,)],
)
def test_chunks_of_a_large_array_halve_every_axis(shape):
    """A host that needs half of an array, along any axis, reads that half alone."""
    chunk = zarr.chunk_shape(shape, 2)
    for size, part in zip(shape, chunk, strict=True):
        assert size == 1 or size % (2 * part) == 0
    assert zarr._CHUNK_BYTES / 2 < 2 * math.prod(chunk) <= zarr._CHUNK_BYTES


def test_arrays_in_another_order(tmp_path):
    expected = {"x": np.arange(12, dtype=np.float32).reshape(3, 4).T}
    equal(arrays.read(write(tmp_path / "t", expected), abstract(expected)), expected)


def test_shapes_and_dtypes_without_reading(written):
    found = arrays.stored(written)
    assert jax.tree.structure(found) == jax.tree.structure(tree())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree()), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_part_is_read_alone(written):
    equal(arrays.read(written, {"b": abstract(tree())["b"]}), {"b": tree()["b"]})


def test_reading_casts(written):
    expected = jax.tree.map(lambda a: np.asarray(a).astype(np.float32), tree())
    equal(arrays.read(written, abstract(tree(), dtype=jnp.dtype(jnp.float32))), expected)


def test_reading_puts_arrays_where_they_belong(written):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec("x"))
    wanted = {"a": {"x": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=rows)}}
    found = arrays.read(written, wanted)
    assert found["a"]["x"].sharding == rows
    equal(found, {"a": tree()["a"]})


def test_an_array_larger_than_all_others_together(tmp_path):
    """The bound on what is read at a time has room for any single array."""
    expected = {"large": np.ones((300, 1000), np.float32), "small": np.ones(1, np.float32)}
    equal(arrays.read(write(tmp_path / "t", expected), abstract(expected)), expected)


def test_orbax_is_quiet_and_its_logger_is_left_as_it_was(written, capfd):
    level = logging.getLogger("absl").level
    arrays.read(written, abstract(tree()))
    arrays.stored(written)
    assert logging.getLogger("absl").level == level
    assert capfd.readouterr() == ("", "")


def test_what_orbax_cannot_read_is_one_sentence(written, monkeypatch):
    def load(*arguments):
        raise KeyError("no\nsuch", "array")

    monkeypatch.setattr(ocp, "load", load)
    with pytest.raises(ValueError, match=r"t cannot be read: [^\n]*array[^\n]*$"):
        arrays.read(written, abstract(tree()))


def test_trees_of_the_first_versions_are_described_and_read(tmp_path):
    """Until it wrote arrays one by one, this program left their format to Orbax: Zarr 3."""
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_compression = False
    with context:
        ocp.save(tmp_path / "t", tree())
    assert zarr.is_other(tmp_path / "t")
    found = arrays.stored(tmp_path / "t")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree()
    )
    equal(arrays.read(tmp_path / "t", abstract(tree())), tree())


def test_what_is_on_its_way_takes_two_of_the_largest_array_or_one(monkeypatch):
    one = abstract({"large": np.ones((300, 10), np.float32), "small": np.ones(3, np.float32)})
    least, size = arrays.least_in_flight(one), 4 * 3003
    assert least == 1 + 4 * 3000
    for free, expected in (
        (None, 2 * least),
        (10**9, 2 * least),
        (size + 2 * least, 2 * least),
        (size + least + 7, least + 7),
        (size + least, least),
        (0, least),
    ):
        monkeypatch.setattr(memory, "host_free", lambda free=free: free)
        assert arrays.bytes_in_flight(one) == expected
