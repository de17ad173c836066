import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import sources
from mistral_jax.convert import torch_zip

GOLDEN = Path(__file__).parent / "golden"


def test_reads_what_torch_wrote():
    """The numbers are those of golden/make_torch_files.py."""
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "bfloat16": grid.astype(ml_dtypes.bfloat16),
        "float16": grid.astype(np.float16),
        "float32": grid,
        "int64": np.arange(3),
        "transposed": grid.T,
        "slice": grid[1:3, 2:5],
        "every_other": grid[:, ::2],
        "expanded": np.full(5, 7, np.float32),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    found = torch_zip.read(GOLDEN / "torch_state.pth")
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_reads_a_module_s_state_dict_with_its_metadata():
    found = torch_zip.read(GOLDEN / "torch_module.bin")
    np.testing.assert_array_equal(found["weight"], np.arange(6, dtype=np.float32).reshape(3, 2))


def test_tensors_are_views_of_the_file():
    found = torch_zip.read(GOLDEN / "torch_state.pth")
    assert np.shares_memory(found["float32"], found["transposed"])
    assert not any(array.flags.owndata or array.flags.writeable for array in found.values())


def test_a_whole_module_is_refused_by_name():
    with pytest.raises(ValueError, match=r"torch_whole_module\.pth names torch\.nn\..*Linear"):
        torch_zip.read(GOLDEN / "torch_whole_module.pth")


def test_a_file_of_before_zips_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"is not a zip, .* since PyTorch 1\.6; .* save it again"):
        torch_zip.read(GOLDEN / "torch_before_1_6.pth")


@pytest.mark.parametrize(
    "name",
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("torch", "load"),
        ("torch", "FloatStorage.__class__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "namedtuple"),
        ("collections", "OrderedDict.__init__"),
    ],
    ids=".".join,
)
def test_a_pickle_that_names_anything_else_is_not_run(tmp_path, name):
    marker = tmp_path / "ran"
    call = sources.name_of(*name) + b"(" + sources.text(f"touch {marker}") + b"tR."
    sources.save_zip(tmp_path / "evil.pth", b"\x80\x02" + call, [])
    with pytest.raises(ValueError, match=rf"evil\.pth names {'.'.join(name)}, which is not run"):
        torch_zip.read(tmp_path / "evil.pth")
    assert not marker.exists()


def test_a_pickle_of_python_s_own_making_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        sources.save_zip(tmp_path / "evil.pth", pickle.dumps({"a": Evil()}, protocol), [])
        with pytest.raises(ValueError, match=r"names (posix|nt|os)\.mkdir, which is not run"):
            torch_zip.read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_what_is_allowed_cannot_be_altered(tmp_path):
    """BUILD sets attributes: on none of the objects that a pickle can name may it change ours."""
    before = torch_zip._rebuild.__defaults__, vars(torch_zip._rebuild).copy()
    state = b"}" + sources.text("__defaults__") + b"(" + sources.integer(1) + b"ts"
    for name in (("torch", "FloatStorage"), ("collections", "OrderedDict")):
        build = sources.name_of(*name) + b"N" + state + b"\x86b."
        sources.save_zip(tmp_path / "evil.pth", b"\x80\x02" + build, [])
        with pytest.raises(ValueError, match=r"pickle in .*evil\.pth is damaged"):
            torch_zip.read(tmp_path / "evil.pth")
    assert (torch_zip._rebuild.__defaults__, vars(torch_zip._rebuild)) == before


def one_tensor(tmp_path, *arguments, storage=bytes(16), **named):
    file = tmp_path / "one.pth"
    opcodes = sources.rebuilt("0", "float32", *arguments, **named)
    sources.save_zip(file, b"\x80\x02}" + sources.text("a") + opcodes + b"s.", [storage])
    return torch_zip.read(file)["a"]


def test_a_tensor_stays_in_its_storage(tmp_path):
    assert one_tensor(tmp_path, (2, 2), (2, 1)).shape == (2, 2)
    assert one_tensor(tmp_path, (3,), (1,), offset=1, count=4).shape == (3,)
    for shape, strides, offset in (((2, 3), (3, 1), 0), ((3,), (1,), 2), ((3,), (2,), 0)):
        with pytest.raises(ValueError, match=r"leaves its storage of 4"):
            one_tensor(tmp_path, shape, strides, offset=offset, count=4)
    for shape, strides, offset in (((2,), (-1,), 2), ((2,), (1,), -1), ((-1,), (1,), 0)):
        with pytest.raises(ValueError, match=r"leaves its storage"):
            one_tensor(tmp_path, shape, strides, offset=offset, count=4)


def test_a_storage_stays_in_its_member(tmp_path):
    with pytest.raises(ValueError, match=r"data/0 of .* has 12 bytes; expected 4 x 4"):
        one_tensor(tmp_path, (4,), (1,), storage=bytes(12))
    with pytest.raises(ValueError, match=r"expected -4 x 4"):
        one_tensor(tmp_path, (4,), (1,), count=-4)


def test_damaged_files(tmp_path):
    whole = (GOLDEN / "torch_state.pth").read_bytes()
    file = tmp_path / "cut.pth"
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pth is (cut short|not a zip)"):
            torch_zip.read(file)
    for spoiled in (b"", b"\x80\x02", b"\x80\x02}(", b"\x80\x02K\x01K\x02R.", b"\xff\xff"):
        sources.save_zip(file, spoiled, [])
        with pytest.raises(ValueError, match=r"the pickle in .*cut\.pth is damaged"):
            torch_zip.read(file)


def test_what_is_not_a_state_dict(tmp_path):
    file = tmp_path / "odd.pth"
    sources.save_zip(file, b"\x80\x02].", [])
    with pytest.raises(ValueError, match=r"odd\.pth holds a list; expected a dict of tensors"):
        torch_zip.read(file)
    sources.save_zip(file, b"\x80\x02}" + sources.text("model") + b"}s.", [])
    with pytest.raises(ValueError, match=r"holds a dict under 'model'; expected a tensor"):
        torch_zip.read(file)
    sources.save_zip(file, b"\x80\x02}.", [], byteorder=b"big")
    with pytest.raises(ValueError, match=r"big-endian"):
        torch_zip.read(file)
    opcodes = sources.rebuilt("7", "float32", (1,), (1,))
    sources.save_zip(file, b"\x80\x02}" + sources.text("a") + opcodes + b"s.", [])
    with pytest.raises(ValueError, match=r"has no member archive/data/7"):
        torch_zip.read(file)


def test_a_zip_of_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"has 0 members data\.pkl; expected one"):
        torch_zip.read(tmp_path / "a.npz")
