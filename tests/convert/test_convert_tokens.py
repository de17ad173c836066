"""Laws of a model's tokens: one set of ends for all uses, and rows without a piece."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import sources
import tokenizer_samples as samples
from mistral_jax.convert.inspect import inspect
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch
from sources import Heard

import mistral_jax
from mistral_jax.checkpoint import checkpoint, manifest
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.run import train

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A tokenizer of 400 pieces whose end is token 2."""
    return samples.train_small_mistral(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def write(tmp_path, tokenizer_file):
    """Writes a source whose config, generation_config and tokenizer_config name some ends."""

    def write(config=..., tokenizer=True, size=403, **files):
        tensors = sources.tensors(vocab_size=size)
        source = tmp_path / "s"
        sources.write(source, "hf-safetensors", tensors, vocab_size=size, eos_token_id=config)
        if tokenizer:
            (source / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        for name, content in files.items():
            (source / f"{name}.json").write_text(json.dumps(content))
        return source

    return write


def convert(source, target):
    """Converts a source; returns the config, and what was said."""
    heard = Heard()
    to_orbax(source, target, overwrite=True, progress=heard)
    return manifest.read(target)[0], heard.said


def check_ends(path, ends):
    """Generation stops at each end and at no other token, and training teaches the first."""
    model, params, tokenizer = checkpoint.load(path)
    assert model.config.eos_ids == ends
    tokens = (*ends, 3, 400)
    prefer = [mistral_jax.Sampling(temperature=0.0, logit_bias={token: 100}) for token in tokens]
    rows = mistral_jax.generate(model, params, [[1, 4]] * len(tokens), 2, sampling=prefer)
    for token, row in zip(tokens, rows, strict=True):
        found = (row.finish_reason, row.tokens)
        assert found == (("stop", []) if token in ends else ("length", [token, token]))
    if tokenizer is not None:
        taught, _ = tokenizer.encode_lesson(HI)
        asked = tokenizer.encode_chat([*HI, HI[0]])
        assert {taught[-1], asked[len(taught) - 1], tokenizer.encode("a", eos=True)[-1]} == {
            ends[0]
        }
        tokenizer.decode(range(model.config.vocab_size))


# Tokens that end an answer

DECODER = {"7": {"content": "<end>"}, "2": {"content": "</s>"}}


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("config", [..., None, 2, 401, [401], [401, 2], [2, 9, 9]])
@pytest.mark.parametrize("generation", [..., None, 2, 402, [9, 402], []])
def test_every_file_s_ends_are_ends(write, tmp_path, config, generation, tokenizer):
    files = {"generation_config": {} if generation is ... else {"eos_token_id": generation}}
    found, said = convert(write(config, tokenizer, **files), tmp_path / "x")
    lists = [[2] if tokenizer else [], config, generation]
    named = [x if isinstance(x, list) else [x] for x in lists]
    ends = dict.fromkeys(x for x in itertools.chain(*named) if x not in (None, ...))
    assert found.eos_ids == (tuple(ends) or (2,))
    assert len(said) == (len(ends) > 1)
    for sentence in said:
        assert all(str(token) in sentence for token in ends)
        assert sentence.endswith(f"generation stops at each, training teaches {found.eos_id}")


@pytest.mark.slow
def test_training_and_generation_have_the_same_ends(write, tmp_path):
    source = write(401, generation_config={"eos_token_id": [9, 402]})
    _, said = convert(source, tmp_path / "x")
    assert said == [
        "an answer ends with token 2 (tokenizer.model) or 401 (config.json) or 9 "
        "(generation_config.json) or 402 (generation_config.json): generation stops at each, "
        "training teaches 2"
    ]
    assert said == [text for label, text in inspect(source) if label == "note"]
    check_ends(tmp_path / "x", (2, 401, 9, 402))


def test_checkpoints_of_earlier_versions_have_the_tokenizer_s_end_too(write, tmp_path):
    convert(write(401), tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    contents = json.loads(file.read_text())
    contents["model"]["eos_id"] = 401
    for name in ("other_eos_ids", "unnamed_tokens"):
        del contents["model"][name]
    file.write_text(json.dumps(contents))
    assert manifest.read(tmp_path / "x")[0].eos_ids == (401,)
    check_ends(tmp_path / "x", (2, 401))
    to_torch(tmp_path / "x", tmp_path / "y")
    assert json.loads((tmp_path / "y" / "config.json").read_text())["eos_token_id"] == [2, 401]


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"tokenizer_config": {"eos_token": "<end>", "added_tokens_decoder": DECODER}}, 7),
        (
            {"tokenizer_config": {"eos_token": {"content": "<end>"}}, "added_tokens": {"<end>": 7}},
            7,
        ),
        ({"tokenizer_config": {"eos_token": "<end>"}, "added_tokens": {"<end>": "7"}}, None),
        ({"tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": DECODER}}, None),
        ({"tokenizer_config": {"eos_token": None, "added_tokens_decoder": {"7": "a"}}}, None),
        ({"tokenizer_config": {"eos_token": "<end>"}}, None),
        ({"added_tokens": {"<end>": 7}}, None),
    ],
)
def test_the_end_that_tokenizer_config_names_counts_where_a_file_numbers_it(
    write, tmp_path, files, end
):
    config, said = convert(write(2, **files), tmp_path / "x")
    assert config.eos_ids == ((2,) if end is None else (2, end))
    assert len(said) == (end is not None)


@pytest.mark.parametrize("token", [-1, 403, 10**9])
def test_an_end_that_the_model_has_not_is_left_out_and_said(write, tmp_path, token):
    source = write(2, generation_config={"eos_token_id": [2, token]})
    config, said = convert(source, tmp_path / "x")
    assert config.eos_ids == (2,)
    assert said == [
        f"generation_config.json ends an answer with token {token}, which is ignored: the model "
        "has 403 tokens"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config", {"eos_token_id": "2"}),
        ("generation_config", {"eos_token_id": True}),
        ("generation_config", {"eos_token_id": 2.0}),
        ("generation_config", {"eos_token_id": [[2]]}),
        ("generation_config", {"eos_token_id": {"a": 2}}),
        ("generation_config", {"eos_token_id": list(range(10**5))}),
        ("generation_config", {"eos_token_id": 2**70}),
        ("generation_config", []),
        ("tokenizer_config", {"eos_token": 2}),
        ("tokenizer_config", {"eos_token": "a", "added_tokens_decoder": ["a"]}),
        ("tokenizer_config", {"eos_token": "a", "added_tokens_decoder": {"7": 7}}),
        ("added_tokens", "a"),
    ],
)
def test_ends_in_no_known_way_are_refused_in_a_sentence(write, tmp_path, name, content):
    source = write(2, **{name: content})
    with pytest.raises(ValueError, match=rf"{name}\.json (has|holds a JSON) .*; expected "):
        to_orbax(source, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "value", ["2", True, 2.5, [2, "3"], [None], [[2]], 403, [2, 403], {"a": 2}]
)
def test_ends_of_a_config_are_token_ids(write, tmp_path, value):
    with pytest.raises(
        ValueError,
        match=r"config\.json(: (other_)?eos_ids? is| has eos_token_id) .*; expected .*id",
    ):
        to_orbax(write(value), tmp_path / "x")


def test_ends_of_other_files_are_read_of_hugging_face_s_format_alone(write, tmp_path):
    source = write(401, tokenizer=False, generation_config={"eos_token_id": 9})
    sources.write(source, "official-safetensors")
    to_orbax(source, tmp_path / "x", format="official")
    assert manifest.read(tmp_path / "x")[0].eos_ids == (2,)


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("format", ["hf", "official"])
def test_an_export_has_the_same_ends(write, tmp_path, format, tokenizer):
    source = write([401, 9], tokenizer, generation_config={"eos_token_id": 402})
    config, _ = convert(source, tmp_path / "x")
    to_torch(tmp_path / "x", tmp_path / "y", format=format)
    again, _ = convert(tmp_path / "y", tmp_path / "z")
    assert again == dataclasses.replace(config, max_positions=again.max_positions)
    expected, found = (checkpoint.load(tmp_path / name)[1] for name in "xz")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if format == "hf":
        ends = list(config.eos_ids)
        for name in ("config.json", "generation_config.json"):
            contents = json.loads((tmp_path / "y" / name).read_text())
            assert (contents["bos_token_id"], contents["eos_token_id"]) == (1, ends)


# Tokens without a piece


@pytest.mark.parametrize("unnamed", [255, 256, 400])
def test_a_table_padded_by_many_rows_is_converted_and_saved(write, tmp_path, unnamed):
    size = 400 + unnamed
    config, said = convert(write(size - 1, size=size), tmp_path / "x")
    assert config.eos_ids == (2, size - 1)
    assert config.unnamed_tokens == (unnamed if unnamed > 255 else 0)
    sentence = f"tokenizer.model has 400 of the model's {size} tokens, and the other {unnamed}"
    assert [text.startswith(sentence) for text in said] == [True, False][-len(said) :]
    assert len(said) == 1 + (unnamed > 255)
    model, params, tokenizer = checkpoint.load(tmp_path / "x")
    assert tokenizer.decode([size - 2, size - 1]) == ""
    checkpoint.save(tmp_path / "again", model.config, params, tmp_path / "x" / "tokenizer.model")
    assert checkpoint.load(tmp_path / "again")[0].config == model.config
    to_torch(tmp_path / "again", tmp_path / "y")
    assert convert(tmp_path / "y", tmp_path / "z")[0] == model.config


def test_a_token_without_a_piece_is_sampled_as_no_text(write, tmp_path):
    convert(write(size=660), tmp_path / "x")
    loaded = checkpoint.load(tmp_path / "x")
    prefer = mistral_jax.Sampling(temperature=0.0, logit_bias={659: 100})
    assert mistral_jax.complete(*loaded, "hi", 3, sampling=prefer) == ""
    assert "".join(mistral_jax.stream(*loaded, HI[:1], 3, sampling=prefer)) == ""


@pytest.mark.slow
def test_a_model_trained_further_has_the_same_tokens(write, tmp_path):
    """With the ends of a checkpoint that an earlier version converted, and rows without a piece."""
    config, _ = convert(write(700, size=701), tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    contents = json.loads(file.read_text())
    contents["model"] |= {"eos_id": 700, "other_eos_ids": []}
    file.write_text(json.dumps(contents))
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": HI}) + "\n")
    recipe = Recipe.from_dict(
        {
            "checkpoint": str(tmp_path / "x"),
            "data": {"train": [str(tmp_path / "data.jsonl")]},
            **{"context": 32, "rows": 1, "steps": 1, "learning_rate": 1e-3, "sample_every": 0},
        }
    )
    train(recipe, tmp_path / "run", lambda entry: None)
    assert manifest.read(tmp_path / "run" / "checkpoint")[0] == config
    assert checkpoint.load(tmp_path / "run" / "checkpoint")[0].config == config


def test_a_tokenizer_that_lacks_most_of_the_tokens_is_another_model_s(write, tmp_path):
    with pytest.raises(ValueError, match=r"has 400 tokens; expected 801, as the model has"):
        to_orbax(write(size=801), tmp_path / "x")


def test_a_tokenizer_of_another_size_than_the_converted_one_is_refused(
    write, tmp_path, tokenizer_file
):
    convert(write(size=700), tmp_path / "x")
    other = sources.write_tokenizer(tmp_path / "x" / "tokenizer.model", 50)
    with pytest.raises(ValueError, match=r"has 50 tokens; expected 700"):
        checkpoint.load(other.parent)
