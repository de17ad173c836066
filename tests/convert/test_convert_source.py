import json
import os
import re

import pytest
import sources
from bounds import bounded
from mistral_jax.convert import source


@pytest.mark.parametrize("format", sources.FORMATS)
@pytest.mark.parametrize("parts", [1, 2])
def test_each_format_is_recognised(tmp_path, format, parts):
    tensors = sources.tensors(vocab_size=52)
    sources.write(tmp_path, format, tensors, parts)
    found = source.find(tmp_path)
    assert found.format == format
    assert found.official == format.startswith("official")
    assert len(found.weight_files) == parts
    assert found.other_formats == ()
    assert found.tokenizer_file is None
    places = found.tensors()
    assert len(places) == len(tensors)
    copies = parts if format == "official-torch" else 1
    assert all(len(place) == copies for place in places.values())


def test_of_several_formats_the_first_is_taken_unless_told(tmp_path):
    for format in sources.FORMATS:
        sources.write(tmp_path, format)
    found = source.find(tmp_path)
    assert found.format == "hf-safetensors"
    assert found.other_formats == sources.FORMATS[1:]
    for format in sources.FORMATS:
        assert source.find(tmp_path, format).format == format
    assert source.find(tmp_path, "official").format == "official-safetensors"


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path):
    sources.write(tmp_path, "hf-safetensors", parts=2)
    sources.write(tmp_path, "hf-safetensors")
    assert [f.name for f in source.find(tmp_path).weight_files] == ["model.safetensors"]


def test_other_safetensors_files_are_left_alone(tmp_path):
    sources.write(tmp_path, "hf-safetensors")
    (tmp_path / "adapter.safetensors").write_bytes(b"not one")
    assert len(source.find(tmp_path).weight_files) == 1


@pytest.mark.parametrize("format", sources.FORMATS)
def test_what_systems_leave_is_left_alone(tmp_path, format):
    sources.write(tmp_path, format, sources.tensors(vocab_size=52), parts=2, vocab_size=52)
    before = source.find(tmp_path)
    for file in list(tmp_path.iterdir()):
        (tmp_path / f"._{file.name}").write_bytes(b"x")
    for name in (".DS_Store", "desktop.ini", "Thumbs.db", ".nfs0000000000001", "@eaDir"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    assert source.find(tmp_path) == before
    assert len(before.tensors()) == len(sources.tensors())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["tokenizer.model"], "tokenizer.model"),
        (["tokenizer.model.v3"], "tokenizer.model.v3"),
        (["tokenizer.model.v3", "tokenizer.model"], "tokenizer.model"),
        (["tokenizer.json"], None),
    ],
)
def test_the_tokenizer_file(tmp_path, names, expected):
    sources.write(tmp_path, "official-safetensors")
    for name in names:
        (tmp_path / name).touch()
    file = source.find(tmp_path).tokenizer_file
    assert (file and file.name) == expected


def refused(folder, message, format=None):
    with pytest.raises(ValueError, match=message) as error:
        source.find(folder, format)
    assert str(folder) in str(error.value)


def test_folders_that_hold_none(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"holds no checkpoint to convert; expected .*model\.safetensors")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file; name the folder that it is in")
    sources.write(tmp_path / "hf", "hf-safetensors")
    refused(tmp_path / "hf", r"expected consolidated\.\S+ with params\.json", "official")


@pytest.mark.parametrize("format", sources.FORMATS)
def test_tensors_without_their_config(tmp_path, format):
    sources.write(tmp_path, format)
    config = "config.json" if format.startswith("hf") else "params.json"
    (tmp_path / config).unlink()
    refused(tmp_path, rf"but no {config}; expected both")


@pytest.mark.parametrize("format", ["hf-safetensors", "hf-torch", "official-safetensors"])
def test_an_index_that_names_a_missing_file(tmp_path, format):
    sources.write(tmp_path, format, parts=3)
    missing = next(tmp_path.glob("*-00002-of-00003.*"))
    missing.unlink()
    refused(tmp_path, rf"has no {re.escape(missing.name)}, which its index names$")
    sources.write(tmp_path, "official-torch")
    if format == "official-safetensors":
        return
    refused(tmp_path, rf"has no {re.escape(missing.name)}, .*also holds official-torch")
    assert source.find(tmp_path, "official").other_formats == ()


def test_a_missing_part(tmp_path):
    sources.write(tmp_path, "official-torch", sources.tensors(vocab_size=52), parts=4)
    (tmp_path / "consolidated.01.pth").unlink()
    refused(tmp_path, r"has no consolidated\.01\.pth, but later parts")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "{", "[]"])
def test_an_index_that_is_none(tmp_path, content):
    sources.write(tmp_path, "hf-safetensors", parts=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, r"index\.json (has (no )?weight_map|is not valid JSON|holds a JSON list)")


@pytest.mark.parametrize(
    "places", ["[]", '"x"', "3", '{"x": 3}', '{"x": null}', '{"x": ["model.safetensors"]}', "true"]
)
def test_what_an_index_says_is_checked(tmp_path, places):
    sources.write(tmp_path, "hf-torch", parts=2)
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {places}}}')
    refused(tmp_path, r"index\.json has weight_map .*; expected an object, each value a string")


def test_a_large_index_is_not_read(tmp_path):
    sources.write(tmp_path, "hf-torch", parts=2)
    os.truncate(tmp_path / "pytorch_model.bin.index.json", 1 << 30)
    with bounded(5, 1 << 27):
        refused(tmp_path, r"has 1\.1 GB; expected at most 8\.4 MB")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    os.mkfifo(tmp_path / "pytorch_model.bin.index.json")
    with bounded(5, 1 << 27):
        refused(tmp_path, "is a pipe; expected a regular file")


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    sources.write(tmp_path / "a", "hf-safetensors", parts=2)
    index = {"weight_map": {"x": "../b/model.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "a", r"names the file '\.\./b/model\.safetensors'; expected one in the same")


def test_a_tensor_in_two_files(tmp_path):
    tensors = sources.tensors()
    sources.write(tmp_path, "hf-safetensors", tensors, parts=2)
    second = {sources.hf_name(name): tensor for name, tensor in tensors.items()}
    sources.save_safetensors(tmp_path / "model-00002-of-00002.safetensors", second)
    with pytest.raises(ValueError, match=r"tensor \S+ is in model-00001\S+ and model-00002"):
        source.find(tmp_path).tensors()


def test_a_checkpoint_is_no_source(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "params").mkdir()
    refused(tmp_path, "is a checkpoint of this program already")
