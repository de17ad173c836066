import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import sources
from bounds import bounded

from mistral_jax.checkpoint import safetensors_file


def arrays():
    rng = np.random.default_rng(0)
    return {
        "b": rng.standard_normal((3, 5)).astype(np.float32),
        "a": rng.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "c": rng.standard_normal((2, 2, 3)).astype(np.float16),
        "i": np.arange(3, dtype=np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_reads_what_the_library_writes_as_views_of_the_file(tmp_path):
    file = tmp_path / "a.safetensors"
    sources.save_safetensors(file, arrays())
    found = safetensors_file.read(file)
    same(found, arrays())
    assert not any(array.flags.owndata or array.flags.writeable for array in found.values())


def test_the_library_reads_what_is_written(tmp_path):
    file = tmp_path / "a.safetensors"
    heads = {name: (array.shape, array.dtype) for name, array in arrays().items()}
    safetensors_file.write(file, heads, iter(arrays().values()))
    same(safetensors.numpy.load_file(file), arrays())
    same(safetensors_file.read(file), arrays())
    header_size = int.from_bytes(file.read_bytes()[:8], "little")
    assert header_size % 8 == 0
    with safetensors.safe_open(file, "np") as handle:
        about = {"format": "pt", "writer": "mistral_jax"}  # Transformers wants a format.
        assert handle.metadata() == about


def test_writes_only_its_own_tensors_of_a_stream(tmp_path):
    stream = iter([np.zeros(2, np.float32), np.ones(2, np.float32)])
    for name in "ab":
        heads = {name: ((2,), np.dtype(np.float32))}
        safetensors_file.write(tmp_path / f"{name}.safetensors", heads, stream)
    assert safetensors_file.read(tmp_path / "b.safetensors")["b"].tolist() == [1, 1]


def test_writes_views_in_their_own_order(tmp_path):
    file, grid = tmp_path / "a.safetensors", np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors_file.write(file, {"t": ((3, 2), grid.dtype)}, iter([grid.T]))
    np.testing.assert_array_equal(safetensors_file.read(file)["t"], grid.T)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_file_that_is_cut_short(tmp_path, size):
    file = tmp_path / "a.safetensors"
    sources.save_safetensors(file, arrays())
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"a\.safetensors is (empty|cut short or no safetensors file)"
    ):
        safetensors_file.read(file)


def test_a_dtype_that_numpy_does_not_have(tmp_path):
    file = tmp_path / "a.safetensors"
    header = {"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(ValueError, match=r"tensor x in .* is F4; expected BF16, F16 or F32"):
        safetensors_file.read(file)


def test_what_is_no_weights_is_called_what_it_is(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(sources.POINTER)
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the weights: run `git lfs pul"):
        safetensors_file.read(file)
    os.mkfifo(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors is a pipe; expected a regular file"):
        safetensors_file.read(tmp_path / "b.safetensors")


def test_a_header_is_bounded(tmp_path):
    """The library would take a hundred million bytes, and a hundred times that of memory."""
    file = tmp_path / "a.safetensors"
    size = 90_000_000
    with open(file, "wb") as stream:
        stream.write(size.to_bytes(8, "little") + b'{"a":{"x":' + b"[" * 1000)
        stream.truncate(size + 1000)
    with bounded(20, 1 << 28), pytest.raises(ValueError, match=r"header would have 90\.0 MB; expe"):
        safetensors_file.read(file)


@pytest.mark.parametrize("shape", [[1] * 9, [1] * 1000, [2**60, 0], [0, 2**62, 2**62], [2**64, 0]])
def test_shapes_that_numpy_cannot_have_are_refused_by_name(tmp_path, shape):
    file = tmp_path / "a.safetensors"
    size = 0 if 0 in shape else 4
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(ValueError, match=r"a\.safetensors (has the shape|is cut short or no safe)"):
        safetensors_file.read(file)
