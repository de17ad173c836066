import json

import jax
import pytest
import sources
import tiny
from mistral_jax.convert import architecture
from mistral_jax.convert.inspect import inspect
from mistral_jax.convert.to_orbax import to_orbax

import mistral_jax
from mistral_jax.config import ModelConfig
from mistral_jax.model.cache import init_cache


def described(*arguments, **options):
    lines = list(inspect(*arguments, **options))
    assert len(lines) <= 22, "a screenful"
    assert all(len(label) < 16 for label, _ in lines)
    return dict(lines)


@pytest.mark.parametrize("format", sources.FORMATS)
def test_a_source(tmp_path, format):
    found = described(sources.write(tmp_path, format))
    assert found["format"] == format
    assert found["layers"] == "2, width 32, MLP 44"
    assert found["attention"] == "4 query and 2 key-value heads of 8"
    assert found["window"] == "5 keys"
    assert found["rope theta"] in ("10000 (config.json)", "10000 (params.json)")
    assert found["vocabulary"] == "53 tokens"
    count = sum(tensor.size for tensor in sources.tensors().values())
    assert found["parameters"] == f"{count:,}"
    assert found["stored"] == f"{4 * count / 1000:.1f} kB of float32"
    assert f"{2 * count / 1000:.1f} kB as bfloat16" in found["to load"]
    assert found["tokenizer"] == "none (no SentencePiece file)"
    assert "problem" not in found


def test_a_source_that_does_not_say_its_base(tmp_path):
    source = sources.write(tmp_path, "official-safetensors")
    fields = json.loads((source / "params.json").read_text())
    del fields["rope_theta"]
    (source / "params.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="has no rope_theta; name it with --rope-theta"):
        described(source)
    assert described(source, rope_theta=1e6)["rope theta"] == "1e+06 (--rope-theta)"


def test_a_checkpoint_with_dilated_windows(tmp_path):
    model, params = tiny.build(dilation=[1, 3])
    mistral_jax.save(tmp_path / "x", model.config, params)
    found = described(tmp_path / "x")
    assert found["window"] == "5 keys in 1 layers, 5 keys 3 tokens apart in 1 layers"
    assert mistral_jax.load(tmp_path / "x")[0].config == model.config


def test_a_checkpoint(tmp_path):
    tensors = sources.tensors(tied=True)
    fields = {"tie_word_embeddings": True, "layer_types": ["full_attention", "sliding_attention"]}
    source = sources.write(tmp_path / "s", "hf-torch", tensors, **fields)
    sources.write_tokenizer(source / "tokenizer.model")
    to_orbax(source, tmp_path / "x", dtype="bfloat16", rope_theta=500)
    found = described(tmp_path / "x")
    assert found["format"] == "checkpoint of mistral_jax (Orbax)"
    assert found["source format"] == "hf-torch"
    assert found["window"] == "all keys in 1 layers, 5 keys in 1 layers"
    assert found["rope theta"] == "500 (--rope-theta)"
    assert found["vocabulary"] == "53 tokens (input and output tied)"
    assert found["stored"].endswith("kB of bfloat16")
    assert found["tokenizer"] == "v1, 53 tokens (tokenizer.model)"


def test_verifying(tmp_path):
    model, params = tiny.build()
    mistral_jax.save(tmp_path / "x", model.config, params)
    assert "verified" not in described(tmp_path / "x")
    found = described(tmp_path / "x", verify=True)["verified"]
    assert found == "21 arrays in 45 files are as they were written"
    chunk = tmp_path / "x" / "params" / "state" / "final_norm.scale" / "0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[::-1])
    with pytest.raises(ValueError, match=rf"array final_norm/scale: {chunk} is not the file that"):
        described(tmp_path / "x", verify=True)
    chunk.write_bytes(data)
    config = tmp_path / "x" / "config.json"
    fields = json.loads(config.read_text())
    del fields["checksums"]
    config.write_text(json.dumps(fields))
    (tmp_path / "x" / "checksums.json").unlink()
    found = described(tmp_path / "x", verify=True)["verified"]
    assert found == "21 arrays have finite numbers; it was written without checksums"
    with pytest.raises(
        ValueError, match="s is no checkpoint; only checkpoints have checksums to verify"
    ):
        described(sources.write(tmp_path / "s", "hf-safetensors"), verify=True)


def test_a_checkpoint_in_int8_takes_what_it_is_loaded_as(tmp_path):
    model, params = tiny.build(dim=128, hidden_dim=96)
    mistral_jax.save(tmp_path / "float", model.config, params)
    _, params, _ = mistral_jax.load(tmp_path / "float", quantize="int8")
    mistral_jax.save(tmp_path / "x", model.config, params)
    found, plain = described(tmp_path / "x"), described(tmp_path / "float")
    assert found["parameters"] == plain["parameters"]
    for dtype in ("bfloat16", "float16", "float32"):
        loaded = mistral_jax.load(tmp_path / "x", dtype=dtype)[1]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
        assert f"{size / 1000:.1f} kB as {dtype}" in found["to load"]
        assert f"{size / 1000:.1f} kB as {dtype}" not in plain["to load"]
    assert "as float32, its matrices in int8" in found["to load"]
    assert "int8" not in plain["to load"]


def test_caches(tmp_path):
    sources.write(tmp_path, "hf-safetensors")
    lines = list(inspect(tmp_path, lengths=(3, 100)))
    cache = init_cache(tiny.build()[0].config, 1, 3, "bfloat16")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    found = [value for label, value in lines if label == "cache"]
    assert found[0] == f"{size} bytes for a text of 3 tokens, in bfloat16"
    assert found[1] == f"{size * 5 // 3} bytes for a text of 100 tokens, in bfloat16"


def test_released_models_are_known_by_name(tmp_path):
    for name in ("mistral-7b-v0.1", "mistral-7b-v0.2", "mistral-7b-v0.3"):
        fields = architecture.to_official(ModelConfig.from_name(name))
        fields = {"sliding_window": None} | fields
        source = sources.write(tmp_path / name, "official-safetensors", **fields)
        found = described(source)
        assert found["model"] == name
        assert found["to load"].startswith("14.5 GB as bfloat16")
        assert "is (53, 32); expected (32" in found["problem"]


def test_a_folder_of_several_formats(tmp_path):
    for format in sources.FORMATS:
        sources.write(tmp_path, format)
    assert described(tmp_path)["format"].startswith("hf-safetensors; also official-safetensors")
    assert described(tmp_path, "official-torch")["format"].startswith("official-torch; also hf-")


def test_what_is_wrong_is_said(tmp_path):
    tensors = sources.tensors()
    del tensors["norm.weight"]
    source = sources.write(tmp_path, "official-torch", tensors)
    assert "has no tensor norm.weight" in described(source)["problem"]
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK")
    assert "cut short" in described(source)["problem"]


def test_neither(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint to convert"):
        list(inspect(tmp_path))
