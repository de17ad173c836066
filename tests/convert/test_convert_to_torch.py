import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import sources
import tiny
from mistral_jax.convert import source as source_module
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch

from mistral_jax.checkpoint import checkpoint


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def held(folder):
    """Returns the tensors of a folder, by name."""
    found = source_module.find(folder).tensors()
    return {name: place.array for name, (place,) in found.items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The checkpoint of a source in bfloat16 with a tokenizer, and the source's tensors."""
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in sources.tensors().items()}
    path = tmp_path_factory.mktemp("converted")
    sources.write(path / "s", "official-safetensors", tensors)
    sources.write_tokenizer(path / "s" / "tokenizer.model.v3")
    to_orbax(path / "s", path / "x")
    return path / "x", tensors


@pytest.mark.parametrize("format", sources.FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_source_to_orbax_to_source_is_equal_byte_for_byte(tmp_path, format, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in sources.tensors().items()}
    tensors["norm.weight"] = sources.tensors()["norm.weight"]
    source = sources.write(tmp_path / "s", format, tensors)
    to_orbax(source, tmp_path / "x")
    to_torch(tmp_path / "x", tmp_path / "back", format=format.split("-")[0])
    found, expected = held(tmp_path / "back"), held(source)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name


def test_the_official_format(converted, tmp_path):
    to_torch(converted[0], tmp_path / "y", format="official")
    tokenizer = "tokenizer.model.v3"  # the official program tells its version by the file's name
    assert names(tmp_path / "y") == ["consolidated.safetensors", "params.json", tokenizer]
    assert json.loads((tmp_path / "y" / "params.json").read_text()) == tiny.OFFICIAL
    original = converted[0].parent / "s" / tokenizer
    assert (tmp_path / "y" / tokenizer).read_bytes() == original.read_bytes()


def test_the_hugging_face_format(converted, tmp_path):
    to_torch(converted[0], tmp_path / "y")
    assert names(tmp_path / "y") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    fields = json.loads((tmp_path / "y" / "config.json").read_text())
    expected = sources.HF_CONFIG | {"max_position_embeddings": 32768, "torch_dtype": "bfloat16"}
    assert fields == expected | {"attention_dropout": 0.0}
    expected = {sources.hf_name(k): sources.hf_layout(k, v) for k, v in converted[1].items()}
    found = safetensors.numpy.load_file(tmp_path / "y" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("shard_bytes", [1, 5000, 20000])
def test_shards_and_their_index(converted, tmp_path, shard_bytes):
    to_torch(converted[0], tmp_path / "y", shard_bytes=shard_bytes)
    index = json.loads((tmp_path / "y" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "y").glob("model-*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    size = 0
    for file in files:
        tensors = safetensors.numpy.load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        bytes_ = sum(tensor.nbytes for tensor in tensors.values())
        assert bytes_ <= shard_bytes or len(tensors) == 1
        size += bytes_
    assert index["metadata"]["total_size"] == size
    to_orbax(tmp_path / "y", tmp_path / "again")
    for a, b in zip(
        jax.tree.leaves(checkpoint.load(tmp_path / "again")[1]),
        jax.tree.leaves(checkpoint.load(converted[0])[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("format", ["hf", "official"])
@pytest.mark.parametrize("fields", [{"tied": True}, {"sliding_window": [None, 3]}])
def test_tied_models_and_windows_by_layer(tmp_path, format, fields):
    model, params = tiny.build(**fields)
    checkpoint.save(tmp_path / "x", model.config, params)
    to_torch(tmp_path / "x", tmp_path / "y", format=format)
    to_orbax(tmp_path / "y", tmp_path / "again")
    found, loaded, _ = checkpoint.load(tmp_path / "again")
    assert found.config == model.config
    tokens = np.arange(9)
    np.testing.assert_array_equal(
        tiny.alone(found, loaded, tokens), tiny.alone(model, params, tokens)
    )


def test_casting(converted, tmp_path):
    to_torch(converted[0], tmp_path / "y", dtype="float32")
    assert {tensor.dtype for tensor in held(tmp_path / "y").values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "y" / "config.json").read_text())["torch_dtype"] == "float32"


def test_what_a_dtype_cannot_hold(tmp_path):
    model, params = tiny.build()
    params["final_norm"]["scale"] = params["final_norm"]["scale"] + 1e5
    checkpoint.save(tmp_path / "x", model.config, params)
    with pytest.raises(ValueError, match=r"final_norm/scale of \S+ as float16 has 32 values"):
        to_torch(tmp_path / "x", tmp_path / "y", dtype="float16")
    assert names(tmp_path) == ["x"]


def test_targets(converted, tmp_path):
    to_torch(converted[0], tmp_path / "y")
    with pytest.raises(ValueError, match="exists"):
        to_torch(converted[0], tmp_path / "y", format="official")
    to_torch(converted[0], tmp_path / "y", format="official", overwrite=True)
    assert "params.json" in names(tmp_path / "y")
    for target in (converted[0], converted[0].parent):
        with pytest.raises(ValueError, match="left as it is"):
            to_torch(converted[0], target, overwrite=True)
    assert checkpoint.load(converted[0])


@pytest.mark.parametrize("format", ["hf", "official"])
def test_only_what_it_has_made_is_overwritten(converted, tmp_path, format):
    path = tmp_path / "y"
    to_torch(converted[0], path, format=format)
    for name in ("notes.txt", "src/a.py", "optimizer.pt"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).touch()
        with pytest.raises(ValueError, match=rf"y has {name}, .*; it is left as it is"):
            to_torch(converted[0], path, overwrite=True)
        (path / name).unlink()
    (path / "src").rmdir()
    (path / "._notes").touch()
    (file,) = path.glob("*.safetensors")
    # As earlier versions wrote it: without a mark, in the order of the forward pass.
    data = file.read_bytes()
    mark = b',"writer":"mistral_jax"'
    size = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + size].replace(mark, b"") + b" " * len(mark)
    file.write_bytes(data[:8] + head + data[8 + size :])
    assert safetensors.safe_open(file, "np").metadata() == {"format": "pt"}
    to_torch(converted[0], path, format=format, overwrite=True)
    # As all others write it: sorted by name.
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"y has {file.name}, which this program did not write"):
        to_torch(converted[0], path, overwrite=True)


def test_damage_is_found(converted, tmp_path):
    shutil.copytree(converted[0], tmp_path / "x")
    chunk = tmp_path / "x" / "params" / "state" / "layers_1.mlp.up_proj.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(ValueError, match=rf"array layers_1/mlp/up_proj/kernel: {chunk} is not the"):
        to_torch(tmp_path / "x", tmp_path / "y")
    assert names(tmp_path) == ["x"]


def test_a_config_of_another_shape(converted, tmp_path):
    shutil.copytree(converted[0], tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    file.write_text(file.read_text().replace('"mlp_dim": 44', '"mlp_dim": 40'))
    with pytest.raises(ValueError, match=r"has \(44, 32\) as \S+; expected \(40, 32\)"):
        to_torch(tmp_path / "x", tmp_path / "y")


def test_a_source_is_no_checkpoint(converted, tmp_path):
    with pytest.raises(ValueError, match="to-orbax"):
        to_torch(converted[0].parent / "s", tmp_path / "y")
    assert names(tmp_path) == []
