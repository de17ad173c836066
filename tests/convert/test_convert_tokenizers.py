"""Every kind of tokenizer through a conversion, a load, a save and an export."""

import json

import pytest
import sources
import tekken_samples

import mistral_jax as mj
from convert.inspect import inspect
from convert.to_orbax import to_orbax
from convert.to_torch import to_torch
from mistral_jax.checkpoint import checkpoint, manifest

TEXT = "The thing, 日本 👍 </s> [INST] "


def _source(folder, name, size, format="hf-safetensors"):
    tensors = sources.tensors(vocab_size=size)
    sources.write(folder, format, tensors, vocab_size=size)
    return folder / name


@pytest.fixture(params=["tekken.json"])
def source(request, tmp_path):
    """A source whose tokenizer has the kind of this file, with four tokens that pad the table."""
    made = tekken_samples.described("v7")
    path = _source(tmp_path / "s", request.param, made["config"]["default_vocab_size"] + 4)
    path.write_text(json.dumps(made))
    return path


def test_a_tokenizer_stays_as_it_is_from_source_to_export(source, tmp_path):
    to_orbax(source.parent, tmp_path / "x")
    model, params, tokenizer = mj.load(tmp_path / "x")
    assert f"{tokenizer.kind}.json".startswith(source.stem)
    assert tokenizer.vocab_size == model.config.vocab_size - 4
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert isinstance(mj.complete(model, params, tokenizer, "the", max_new_tokens=2), str)
    with pytest.raises(ValueError, match="is outside the tokenizer's vocabulary"):
        tokenizer.decode([model.config.vocab_size])

    file = tmp_path / "x" / source.name
    mj.save(tmp_path / "y", model.config, params, file)
    for format in ("hf", "official"):
        to_torch(tmp_path / "y", tmp_path / format, format=format)
        assert (tmp_path / format / source.name).read_bytes() == source.read_bytes()
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
