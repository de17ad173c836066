import json

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

from mistral_jax import checkpoint


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


def test_a_source_is_no_checkpoint(converted, tmp_path):
    with pytest.raises(ValueError, match="to-orbax"):
        to_torch(converted[0].parent / "s", tmp_path / "y")
    assert names(tmp_path) == []
