import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import sources
from bounds import bounded
from mistral_jax.convert import torch_zip

GOLDEN = Path(__file__).parents[1] / "golden"


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
    """BUILD sets attributes, and its second dict any of them: only a state dict takes one."""
    attribute = b"}" + sources.text("__defaults__") + b"(" + sources.integer(1) + b"ts"
    for state in (attribute, b"N" + attribute + b"\x86"):
        for name in (
            ("torch", "FloatStorage"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("collections", "OrderedDict"),
        ):
            build = sources.name_of(*name) + state + b"b."
            sources.save_zip(tmp_path / "evil.pth", b"\x80\x02" + build, [])
            with pytest.raises(ValueError, match=r"pickle in .*evil\.pth is damaged"):
                torch_zip.read(tmp_path / "evil.pth")
        made = sources.name_of("collections", "OrderedDict") + b")R" + state + b"b."
        sources.save_zip(tmp_path / "evil.pth", b"\x80\x02" + made, [])
        assert torch_zip.read(tmp_path / "evil.pth") == {}


TENSOR = sources.name_of("torch._utils", "_rebuild_tensor_v2")
HUGE = sources.rebuilt("0", "float32", (1 << 30, 1 << 29), (0, 0), count=1)


def nested(depth):
    """Returns the opcodes of a tuple that holds the one before twice: 2**depth leaves."""
    return b")" + b"2\x86" * depth


@pytest.mark.parametrize(
    "opcodes",
    {
        "a place of the memo that would take 64 GB": b"Nr\xff\xff\xff\xff.",
        "a bytearray of 2**40 bytes": b"\x96" + (1 << 40).to_bytes(8, "little") + b".",
        "a deep key": b"}" + b")" + b"\x85" * 400_000 + b"Ns.",
        "a key whose hash takes for ever": b"}" + nested(60) + b"Ns.",
        "a key of a storage whose text takes for ever": b"(" + nested(60) * 5 + b"tQ.",
        "a name whose text takes for ever": nested(60) + nested(60) + b"\x93.",
        "a shape whose text takes for ever": TENSOR + b"(" + nested(60) * 4 + b"tR.",
        "a call of a tensor": HUGE + b")R.",
        "a call with a tensor": TENSOR + HUGE + b"R.",
        "a type that is a tensor": sources.name_of("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + HUGE * 4
        + b"tR.",
        "strides that are a tensor": TENSOR + b"(" + HUGE + b"K\x00)" + HUGE + b"tR.",
        "a storage that is a tensor": HUGE + b"Q.",
        "a list in itself": b"]q\x00h\x00a.",
        "marks without end": b"(" * 400_000 + b".",
        "copies of the stack": b"N" * 400_000 + b"\x85" * 400_000 + b".",
        "no end": b"N" * 1000,
        "an integer of 100,000 digits": b"L" + b"9" * 100_000 + b"L\n.",
        "an integer of 1,000,000 bits": b"\x8b"
        + (125_000).to_bytes(4, "little")
        + b"\x7f" * 125_000,
        "a pickle of 5 MB": b"N0" * 2_500_000 + b"}.",
        "a persistent name in text": b"Pname\n.",
        "an extension": b"\x82\x01.",
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_hostile_pickle_ends_soon_in_a_sentence(tmp_path, opcodes):
    sources.save_zip(tmp_path / "evil.pth", b"\x80\x02" + opcodes[1], [bytes(4)])
    with bounded(20, 1 << 29), pytest.raises(ValueError, match=r"evil\.pth"):
        torch_zip.read(tmp_path / "evil.pth")


def test_parameters_are_tensors_with_or_without_attributes():
    """As `state_dict(keep_vars=True)` and `named_parameters` give them."""
    found = torch_zip.read(GOLDEN / "torch_parameters.bin")
    assert list(found) == ["plain", "with attributes", "tensor with attributes"]
    for i, array in enumerate(found.values()):
        np.testing.assert_array_equal(array, np.arange(3, dtype=np.float32) + i)


def test_sums_may_be_left_out_but_not_wrong(tmp_path):
    """`torch.serialization.set_crc32_options(False)` writes 0 for them."""
    assert list(torch_zip.read(GOLDEN / "torch_no_sums.bin")) == ["a"]
    file, whole = tmp_path / "a.bin", (GOLDEN / "torch_module.bin").read_bytes()
    file.write_bytes(whole.replace(b"weight", b"height"))
    with pytest.raises(ValueError, match=r"a\.bin is damaged: its member \S+data\.pkl has another"):
        torch_zip.read(file)


def wrapped(*items):
    """Returns the opcodes of a dict."""
    return b"\x80\x02}" + b"".join(sources.text(key) + value + b"s" for key, value in items) + b"."


def test_a_state_dict_within_a_dict_is_taken_if_it_is_the_only_one(tmp_path):
    file, said = tmp_path / "a.pth", []
    tensor = sources.rebuilt("0", "float32", (4,), (1,))
    inner = b"}" + sources.text("x") + tensor + b"s"
    for key in ("state_dict", "model"):
        rest = [("step", sources.integer(3)), ("optimizer", b"}" + sources.text("lr") + b"Ns")]
        sources.save_zip(file, wrapped((key, inner), *rest), [bytes(16)])
        assert torch_zip.read(file, said.append)["x"].shape == (4,)
        assert said.pop() == f"{file} holds a dict; its tensors are those under {key!r}"
    for items in (
        [("model", inner), ("x", tensor)],
        [("model", b"}" + sources.text("a") + inner + b"s")],
    ):
        sources.save_zip(file, wrapped(*items), [bytes(16)])
        with pytest.raises(ValueError, match="holds a dict under 'model'; expected a tensor"):
            torch_zip.read(file, said.append)
    sources.save_zip(file, wrapped(("model", inner), ("ema", inner)), [bytes(16)])
    with pytest.raises(
        ValueError, match="several state dicts, under 'model' and 'ema'; expected o"
    ):
        torch_zip.read(file, said.append)
    assert not said


def test_what_is_no_weights_is_called_what_it_is(tmp_path):
    file = tmp_path / "a.bin"
    for content, message in (
        (b"", "is empty; expected the weights"),
        (sources.POINTER, r"is a Git LFS pointer, not the weights: run `git lfs pull` in "),
        (
            b"<!DOCTYPE html>\n<html>",
            r"is not a zip, as torch\.save writes it; it begins with b'<!D",
        ),
        (pickle.dumps({"a": 1}), r"is not a zip, as torch\.save writes it"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.bin {message}") as error:
            torch_zip.read(file)
        assert "1.6" not in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_nothing_is_unpacked(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", method) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 26))
    with bounded(20, 1 << 26), pytest.raises(ValueError, match=r"data\.pkl of .* is compressed"):
        torch_zip.read(tmp_path / "a.pth")


def test_a_zip_s_table_is_bounded(tmp_path):
    file = tmp_path / "a.pth"
    sources.save_zip(file, b"\x80\x02}.", [])
    data = file.read_bytes()
    table, end = data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    with open(file, "wb") as stream:  # A hole of 3 GB, all of it the table.
        stream.write(data[:table])
        stream.seek(3 << 30)
        size = stream.tell() - table
        stream.write(data[end : end + 12] + size.to_bytes(4, "little") + data[end + 16 :])
    with bounded(20, 1 << 29), pytest.raises(ValueError, match=r"has a table of more than"):
        torch_zip.read(file)


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
        with pytest.raises(ValueError, match=r"cut\.pth is (empty|cut short|not a zip)"):
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
