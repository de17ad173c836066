"""Laws of the config: every value is checked, and a round trip through JSON keeps all of them."""

import dataclasses
import json
import re

import pytest

from mistral_jax.base.files import read_json, read_toml
from mistral_jax.config import CONFIG_DIR, ModelConfig

FIELDS = {
    "vocab_size": 53,
    "num_layers": 3,
    "embed_dim": 32,
    "mlp_dim": 44,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 10,
    "rope_theta": 1e4,
    "sliding_window": 5,
}
RELEASED = ("mistral-7b-v0.1", "mistral-7b-v0.2", "mistral-7b-v0.3")


def make(**fields):
    return ModelConfig.from_dict(FIELDS | fields)


@pytest.mark.parametrize("dilation", [1, 2, [1, 2, 4]])
@pytest.mark.parametrize("window", [None, 5, [None, 5, 5], [7, 6, 5]])
def test_a_config_survives_json(window, dilation):
    config = make(
        sliding_window=window, dilation=dilation, tie_embeddings=True, eos_id=7, norm_eps=1e-6
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_the_trained_eos_id_is_the_first_of_all_eos_ids():
    assert make().eos_ids == (2,)
    config = make(eos_id=7, other_eos_ids=[9, 7, 9, 2])
    assert config.eos_ids == (7, 9, 2)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config == make(eos_id=7, other_eos_ids=(9, 2))
    assert config.taught_to_end_with(2).eos_ids == (2, 7, 9)
    assert config.taught_to_end_with(7) == config
    assert config.taught_to_end_with(5).eos_ids == (5, 7, 9, 2)


def test_windows_has_one_entry_a_layer():
    assert make(sliding_window=None).windows == (None, None, None)
    assert make(sliding_window=4).windows == (4, 4, 4)
    assert make(sliding_window=[None, 4, 4]).windows == (None, 4, 4)
    assert make(sliding_window=[4, 4, 4]) == make(sliding_window=4)
    assert make(sliding_window="none") == make(sliding_window=None)
    assert make(sliding_window=["none", 4, 4]) == make(sliding_window=[None, 4, 4])


def test_a_dilated_window_spans_its_keys_and_the_gaps_between_them():
    assert make().dilations == (1, 1, 1)
    assert make(dilation=[2, 2, 2]) == make(dilation=2)
    assert make(sliding_window=5).spans == (5, 5, 5)
    assert make(sliding_window=[None, 5, 1], dilation=[2, 3, 4]).spans == (None, 13, 1)


YARN = {
    "kind": "yarn",
    "factor": 16,
    "original_positions": 16384,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 1,
}
LLAMA3 = {
    "kind": "llama3",
    "factor": 8,
    "original_positions": 8192,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
}
QUERIES = {"beta": 0.1, "original_positions": 16384}


@pytest.mark.parametrize("scaling", [YARN, LLAMA3, {"kind": "linear", "factor": 2}])
def test_scalings_survive_json_and_are_part_of_the_hash(scaling):
    config = make(rope_scaling=scaling, query_scaling=QUERIES)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["rope_scaling"] == scaling
    assert hash(config) == hash(make(rope_scaling=scaling, query_scaling=QUERIES))
    assert config != make(rope_scaling=scaling) != make()


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (YARN | {"original_positions": None}, "rope_scaling.original_positions is None; expected"),
        ({k: v for k, v in YARN.items() if k != "attention_factor"}, "attention_factor is None"),
        (YARN | {"factor": 0}, "rope_scaling.factor is 0; expected a finite number above 0"),
        (YARN | {"kind": "dynamic"}, "kind is 'dynamic'; expected one of linear, llama3, yarn"),
        (YARN | {"low_freq_factor": 1}, "low_freq_factor is 1; expected none, because kind is"),
        (YARN | {"beta": 1}, "unknown key 'rope_scaling.beta'"),
        (LLAMA3 | {"high_freq_factor": 1}, "expected a number above low_freq_factor (1)"),
        ({"kind": "linear"}, "missing rope_scaling.factor"),
        ("yarn", "rope_scaling is 'yarn'; expected null, or a table with the fields of Rope"),
    ],
)
def test_a_scaling_has_exactly_the_values_of_its_kind(scaling, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(rope_scaling=scaling)


def test_a_scaling_of_queries_has_both_values():
    for wrong in (QUERIES | {"beta": 0}, QUERIES | {"original_positions": 1.5}, {"beta": 0.1}):
        with pytest.raises(ValueError, match=r"query_scaling\.(beta|original_positions)"):
            make(query_scaling=wrong)
    with pytest.raises(ValueError, match="rope_theta is 1; expected a number above 1 in a model"):
        make(rope_scaling=YARN, rope_theta=1)


def test_integers_are_accepted_for_floats():
    assert make(rope_theta=10000) == make(rope_theta=1e4)
    assert isinstance(make(rope_theta=10000).rope_theta, float)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 0}, "sliding_window is 0; expected null for all keys, or an integer"),
        ({"sliding_window": -1}, "sliding_window is -1; expected"),
        ({"sliding_window": True}, "sliding_window is True; expected"),
        ({"sliding_window": "4096"}, "sliding_window is '4096'; expected"),
        ({"sliding_window": [5, 0, 5]}, "sliding_window is (5, 0, 5); expected"),
        ({"sliding_window": [5, [5], 5]}, "sliding_window is (5, [5], 5); expected"),
        ({"sliding_window": [5, 5]}, "expected one entry for each of the 3 layers"),
        (
            {"dilation": 0},
            "dilation is 0; expected an integer above 0 (1 for windows without gaps)",
        ),
        ({"dilation": None}, "dilation is None; expected an integer above 0"),
        ({"dilation": True}, "dilation is True; expected"),
        ({"dilation": [1, 2.0, 1]}, "dilation is (1, 2.0, 1); expected an integer above 0"),
        ({"dilation": [1, 2]}, "dilation is (1, 2); expected one entry for each of the 3 layers"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; expected a divisor of num_heads (4)"),
        ({"num_layers": 0}, "num_layers is 0; expected an integer above 0"),
        ({"embed_dim": 32.0}, "embed_dim is 32.0; expected an integer above 0"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"head_dim": None}, "head_dim is None; expected"),
        ({"rope_theta": 0}, "rope_theta is 0; expected a finite number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; expected"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; expected"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'; expected"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05; expected"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1; expected true or false"),
        ({"eos_id": 53}, "eos_id is 53; expected a token id below vocab_size (53)"),
        ({"bos_id": -1}, "bos_id is -1; expected a token id"),
        ({"other_eos_ids": [3, 53]}, "other_eos_ids is [3, 53]; expected at most 64 token ids"),
        ({"other_eos_ids": 3}, "other_eos_ids is 3; expected"),
        ({"other_eos_ids": None}, "other_eos_ids is None; expected"),
        ({"other_eos_ids": [[3]]}, "other_eos_ids is [[3]]; expected"),
        ({"other_eos_ids": [True]}, "other_eos_ids is [True]; expected"),
        ({"other_eos_ids": [3] * 65}, "expected at most 64 token ids below vocab_size (53)"),
        ({"num_experts": -1}, "num_experts is -1; expected"),
        ({"num_experts": 4}, "experts_per_token is 0; expected 1 to 4, because num_experts is 4"),
        ({"experts_per_token": 2}, "experts_per_token is 2; expected 0 to 0, because num_experts"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token is 5; expected 1 to 4"),
        ({"num_experts": 4, "experts_per_token": 2.0}, "experts_per_token is 2.0; expected"),
        ({"unnamed_tokens": -1}, "unnamed_tokens is -1; expected an integer of at least 0"),
        ({"rope_tehta": 1e6}, "unknown key 'rope_tehta'; the nearest known one is 'rope_theta'"),
    ],
)
def test_a_bad_value_raises_an_error_that_names_it_and_the_expected_values(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ModelConfig.from_dict(FIELDS | fields, "somewhere.json")
    assert str(caught.value).startswith("somewhere.json: ")


@pytest.mark.parametrize("name", ["head_dim", "rope_theta", "sliding_window", "num_kv_heads"])
def test_fields_that_differ_between_models_have_no_default(name):
    fields = {key: value for key, value in FIELDS.items() if key != name}
    with pytest.raises(ValueError, match=f"missing {name}"):
        ModelConfig.from_dict(fields)


def test_released_models_differ_only_in_window_rope_theta_and_vocabulary():
    configs = [ModelConfig.from_name(name) for name in RELEASED]
    assert [(c.sliding_window, c.rope_theta, c.vocab_size) for c in configs] == [
        (4096, 1e4, 32000),
        (None, 1e6, 32000),
        (None, 1e6, 32768),
    ]
    same = {"sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768}
    assert {dataclasses.replace(c, **same) for c in configs} == {configs[2]}
    assert (configs[2].head_dim, configs[2].norm_eps, configs[2].mlp_dim) == (128, 1e-5, 14336)


def test_every_model_file_is_read_by_name_and_a_wrong_name_lists_them():
    names = [path.stem for path in (CONFIG_DIR / "models").glob("*.toml")]
    assert {*RELEASED, "nano"} <= {*names}
    for name in names:
        ModelConfig.from_name(name)
    with pytest.raises(ValueError, match="no model config named 'mistral-8b'") as caught:
        ModelConfig.from_name("mistral-8b")
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1, 2]", b""])
def test_the_error_names_a_file_that_is_not_a_json_object(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"config\.json (is empty|is not valid JSON|holds a JSON list)"
    ):
        read_json(path)


def test_the_error_of_a_toml_mistake_names_file_and_line(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text("vocab_size = 3\nhead_dim =\n")
    with pytest.raises(ValueError, match=r"tiny\.toml is not valid TOML: .*line 2"):
        read_toml(path)
