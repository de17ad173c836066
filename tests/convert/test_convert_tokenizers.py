"""Every kind of tokenizer through a conversion, a load, a save and an export."""

import json

import hf_samples
import pytest
import sources
import tekken_samples

import mistral_jax as mj
from convert.inspect import inspect
from convert.to_orbax import to_orbax
from convert.to_torch import to_torch
from mistral_jax.checkpoint import checkpoint, manifest
from mistral_jax.engine.text import encode_prompt
from mistral_jax.tokens import storage

TEXT = "The thing, 日本 👍 </s> [INST] "


def _source(folder, size, format="hf-safetensors"):
    return sources.write(folder, format, sources.tensors(vocab_size=size), vocab_size=size)


@pytest.fixture(params=["tekken", "tokenizer.json"])
def source(request, tmp_path):
    """The tokenizer's file of a source that pads its table by four tokens."""
    if request.param == "tekken":
        made = tekken_samples.described("v7")
        folder = _source(tmp_path / "s", made["config"]["default_vocab_size"] + 4)
        (folder / "tekken.json").write_text(json.dumps(made))
        return folder / "tekken.json"
    return hf_samples.write(_source(tmp_path / "s", 408), "bytes")


def test_a_tokenizer_stays_as_it_is_from_source_to_export(source, tmp_path):
    to_orbax(source.parent, tmp_path / "x")
    model, params, tokenizer = mj.load(tmp_path / "x")
    assert tokenizer.kind in (source.name, source.stem)
    assert tokenizer.vocab_size == model.config.vocab_size - 4
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert isinstance(mj.complete(model, params, tokenizer, "the", max_new_tokens=2), str)
    assert mj.score(model, params, tokenizer, TEXT).bits_per_byte > 0
    assert encode_prompt(tokenizer, "the")[0] == tokenizer.encode(
        "the", bos=source.stem == "tekken"
    )
    with pytest.raises(ValueError, match="is outside the tokenizer's vocabulary"):
        tokenizer.decode([model.config.vocab_size])

    file = tmp_path / "x" / source.name
    mj.save(tmp_path / "y", model.config, params, file)
    for format in ("hf", "official"):
        to_torch(tmp_path / "y", tmp_path / format, format=format)
        for file in source.parent.glob("to*k*n*.json"):
            assert (tmp_path / format / file.name).read_bytes() == file.read_bytes()
    assert manifest.kept(tmp_path / "y") is None
    manifest.verify(tmp_path / "y")
    found = dict(inspect(tmp_path / "y"))
    assert found["tokenizer"].endswith(f"{tokenizer.vocab_size} tokens ({source.name})")


def test_a_tokenizer_of_another_size_is_refused(source, tmp_path):
    to_orbax(source.parent, tmp_path / "x")
    model, _, _ = mj.load(tmp_path / "x")
    for size in (model.config.vocab_size - 5, model.config.vocab_size + 300):
        config = mj.ModelConfig(**{**model.config.to_dict(), "vocab_size": size})
        with pytest.raises(ValueError, match=rf"{source.name} has .* tokens; expected {size}, as"):
            checkpoint.read_tokenizer(source, config)


def test_one_tokenizer_is_chosen_and_named(tmp_path):
    folder = hf_samples.write(_source(tmp_path / "s", 408), "bytes").parent
    sources.write_tokenizer(folder / "tokenizer.model", 54)
    heard = sources.Heard()
    made = tekken_samples.described("v3", special=408 - 281)
    (folder / "tekken.json").write_text(json.dumps(made))
    (folder / "tokenizer.model").unlink()
    to_orbax(folder, tmp_path / "x", progress=heard)
    assert [note for note in heard.said if "tekken.json" in note] == [
        "the tokenizer is tekken.json; tokenizer.json is left out"
    ]
    assert storage.find(tmp_path / "x").name == "tekken.json"
    assert not (tmp_path / "x" / "tokenizer.json").exists()


def test_a_model_without_its_config_of_tokens_still_ends_its_answers(tmp_path):
    """The ids of BOS and EOS come from config.json if nothing names their spellings."""
    folder = _source(tmp_path / "s", 408)
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 1, "eos_token_id": [2, 0]}
    (folder / "config.json").write_text(json.dumps(config))
    hf_samples.write(folder, "bytes", names=False)
    to_orbax(folder, tmp_path / "x")
    model, _, tokenizer = mj.load(tmp_path / "x")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert model.config.eos_ids == (2, 0)
