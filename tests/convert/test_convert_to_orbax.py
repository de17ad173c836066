import hashlib
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import sources
import tiny
from mistral_jax.convert.source import find
from mistral_jax.convert.to_orbax import to_orbax

from mistral_jax.base.output import Progress
from mistral_jax.checkpoint import arrays, checkpoint, manifest


class Heard(Progress):
    """A listener that remembers."""

    def __init__(self):
        self.said, self.size, self.done = [], None, 0

    def say(self, sentence):
        self.said.append(sentence)

    def task(self, size):
        self.size = size
        return super().task(size)


def load(path):
    """Returns the config of a checkpoint and its arrays, as they are stored."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one),
        arrays.stored(path / "params"),
    )
    return manifest.read(path)[0], arrays.read(path / "params", abstract)


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("format", sources.FORMATS)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_format_gives_the_same_model(tmp_path, format, parts):
    fields = {"vocab_size": 52}
    tensors = sources.tensors(**fields)
    model, expected = tiny.from_official(tiny.OFFICIAL | fields, tensors)
    source = sources.write(tmp_path / "source", format, tensors, parts, **fields)
    to_orbax(source, tmp_path / "x")
    config, found = load(tmp_path / "x")
    assert config.to_dict() | {"max_positions": 32768} == model.config.to_dict()
    equal(found, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "x"]


@pytest.mark.parametrize("format", sources.FORMATS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_source_s_dtype_is_kept_bit_for_bit(tmp_path, format, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in sources.tensors().items()}
    tensors["norm.weight"] = sources.tensors()["norm.weight"]  # a file may mix them
    to_orbax(sources.write(tmp_path / "source", format, tensors), tmp_path / "x")
    _, expected = tiny.from_official(tiny.OFFICIAL, tensors)
    equal(load(tmp_path / "x")[1], expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_casting(tmp_path, dtype):
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in sources.tensors().items()}
    source = sources.write(tmp_path / "source", "official-torch", tensors)
    to_orbax(source, tmp_path / "x", dtype=dtype)
    cast = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    equal(load(tmp_path / "x")[1], tiny.from_official(tiny.OFFICIAL, cast)[1])


def test_a_tied_model(tmp_path):
    tensors = sources.tensors(tied=True)
    source = sources.write(tmp_path / "s", "hf-torch", tensors, tie_word_embeddings=True)
    to_orbax(source, tmp_path / "x")
    config, found = load(tmp_path / "x")
    assert config.tie_embeddings
    equal(found, tiny.from_official(tiny.OFFICIAL, tensors)[1])


def test_windows_by_layer(tmp_path):
    source = sources.write(tmp_path / "s", "official-torch", sliding_window=[None, 3])
    to_orbax(source, tmp_path / "x")
    assert load(tmp_path / "x")[0].sliding_window == (None, 3)


def test_provenance(tmp_path):
    source = sources.write(tmp_path / "source", "hf-safetensors", parts=2)
    tokenizer = sources.write_tokenizer(source / "tokenizer.model")
    (source / "README.md").write_text("not read")
    to_orbax(source, tmp_path / "x")
    found = manifest.read(tmp_path / "x")[1]
    assert found.pop("program").startswith("mistral_jax ")
    assert found.pop("source_stamps") == find(source).stamps()
    names = [
        "config.json",
        "tokenizer.model",
        *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    ]
    assert found == {
        "source": "source",
        "source_format": "hf-safetensors",
        "rope_theta_from": "config.json",
        "tokenizer": "tokenizer.model",
        "source_sha256": {
            name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in names
        },
    }
    assert (tmp_path / "x" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_a_user_hears_what_was_chosen_and_how_far_it_is(tmp_path):
    for format in ("hf-safetensors", "official-torch"):
        sources.write(tmp_path / "source", format, head_dim=8)
    heard = Heard()
    to_orbax(tmp_path / "source", tmp_path / "x", progress=heard, rope_theta=1e6)
    assert len(heard.said) == 2
    assert "is read as hf-safetensors; it also holds official-torch" in heard.said[0]
    assert heard.said[1] == "rope_theta is 1e+06 (--rope-theta)"
    assert heard.size == 4 * sum(tensor.size for tensor in sources.tensors().values())
    assert load(tmp_path / "x")[0].rope_theta == 1e6


def refused(tmp_path, source, message, **options):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        to_orbax(source, tmp_path / "x", **options)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before, "something was left behind"


@pytest.mark.parametrize("format", sources.FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite(tmp_path, format, value):
    tensors = sources.tensors()
    tensors["layers.1.feed_forward.w2.weight"][3, 5] = value
    source = sources.write(tmp_path / "s", format, tensors)
    message = r"tensor \S+ in \S+ has 1 values that are not finite, first -?(nan|inf) at \(3, 5\)"
    refused(tmp_path, source, message)


def test_what_a_dtype_cannot_hold(tmp_path):
    tensors = sources.tensors()
    tensors["norm.weight"][7] = 1e5
    source = sources.write(tmp_path / "s", "official-torch", tensors)
    message = r"tensor norm\.weight in \S+ as float16 has 1 values .* first inf at \(7,\)"
    refused(tmp_path, source, message, dtype="float16")
    to_orbax(source, tmp_path / "x", dtype="bfloat16")


@pytest.mark.parametrize("format", sources.FORMATS)
def test_a_truncated_file(tmp_path, format):
    source = sources.write(tmp_path / "s", format)
    largest = max(source.iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    refused(tmp_path, source, rf"{largest.name} is cut short")


def test_a_tokenizer_of_another_model(tmp_path):
    source = sources.write(tmp_path / "s", "hf-safetensors")
    sources.write_tokenizer(source / "tokenizer.model", 54)
    refused(tmp_path, source, r"tokenizer\.model has 54 tokens; expected 53, as the model has")
    (source / "tokenizer.model").write_bytes(b"junk")
    refused(tmp_path, source, r"tokenizer\.model is not a SentencePiece model")


def test_a_target_that_is_taken(tmp_path):
    source = sources.write(tmp_path / "s", "hf-safetensors")
    to_orbax(source, tmp_path / "x")
    other = sources.write(tmp_path / "other", "hf-safetensors", rope_theta=5.0)
    refused(tmp_path, other, "exists; .* --overwrite")
    assert load(tmp_path / "x")[0].rope_theta == 1e4
    to_orbax(other, tmp_path / "x", overwrite=True)
    assert load(tmp_path / "x")[0].rope_theta == 5
    with pytest.raises(ValueError, match="left as it is"):
        to_orbax(other, source, overwrite=True)
    assert json.loads((source / "config.json").read_text())["rope_theta"] == 1e4


def test_a_failed_replacement_leaves_the_old_one(tmp_path):
    source = sources.write(tmp_path / "s", "hf-safetensors")
    to_orbax(source, tmp_path / "x")
    tensors = sources.tensors()
    tensors["output.weight"][0, 0] = np.nan  # found last, when all else is written
    bad = sources.write(tmp_path / "bad", "hf-safetensors", tensors)
    refused(tmp_path, bad, "not finite", overwrite=True)
    equal(load(tmp_path / "x")[1], tiny.from_official(tiny.OFFICIAL, sources.tensors())[1])


def test_a_disk_too_small_is_refused_before_the_work(tmp_path, monkeypatch):
    from mistral_jax.checkpoint import folder

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    source = sources.write(tmp_path / "s", "hf-safetensors")
    refused(tmp_path, source, r"x needs \S+ kB, but its disk has 1\.0 kB free")


def test_the_converted_model_loads_and_runs(tmp_path):
    source = sources.write(tmp_path / "s", "official-torch")
    to_orbax(source, tmp_path / "x")
    model, params, _ = checkpoint.load(tmp_path / "x")
    expected_model, expected = tiny.build()
    tokens = np.arange(9)
    np.testing.assert_array_equal(
        tiny.alone(model, params, tokens), tiny.alone(expected_model, expected, tokens)
    )
