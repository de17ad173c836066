import dataclasses
import json
import re

import numpy as np
import pytest
import sources
from bounds import bounded
from mistral_jax.convert import architecture
from tiny import OFFICIAL

from mistral_jax.config import ModelConfig

V01 = {  # as the official file of 7B v0.1 is: no rope_theta
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
V03_HF = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}


@pytest.fixture
def read(tmp_path):
    """Reads the architecture of a file with these fields; `...` takes one out."""

    def read(fields, by_hand=None, **changes):
        fields = {k: v for k, v in (fields | changes).items() if v is not ...}
        file = tmp_path / ("params.json" if "dim" in fields else "config.json")
        file.write_text(json.dumps(fields))
        return architecture.read(file, by_hand)

    return read


def test_v01_official_gets_the_base_that_its_file_leaves_out(read):
    found = read(V01)
    assert found.config == ModelConfig.from_name("mistral-7b-v0.1")
    assert "v0.1" in found.theta_origin
    assert any("rope_theta is 10000" in note for note in found.notes)


@pytest.mark.parametrize("change", [{"sliding_window": ...}, {"vocab_size": 32768}, {"dim": 5120}])
def test_any_other_official_file_without_a_base_is_refused(read, change):
    with pytest.raises(ValueError, match=r"params\.json has no rope_theta; .*--rope-theta"):
        read(V01, **change)
    assert read(V01, by_hand=1e6, **change).config.rope_theta == 1e6


def test_v02_and_v03(read):
    later = V01 | {"sliding_window": ..., "rope_theta": 1e6}
    assert read(later).config == ModelConfig.from_name("mistral-7b-v0.2")
    assert read(later).notes == ()
    assert read(later, vocab_size=32768).config == ModelConfig.from_name("mistral-7b-v0.3")
    found = read(V03_HF)
    assert found.config == ModelConfig.from_name("mistral-7b-v0.3")
    assert found.theta_origin == "config.json"
    assert "has no head_dim: 128" in found.notes[0]


@pytest.mark.parametrize("head_dim", [..., None])
def test_an_absent_head_dim_is_derived_only_if_the_heads_divide(read, head_dim):
    assert read(V03_HF, head_dim=head_dim).config.head_dim == 128
    with pytest.raises(ValueError, match=r"no head_dim, and its 28 heads do not divide 4096"):
        read(V03_HF, head_dim=head_dim, num_attention_heads=28)


def test_a_head_dim_in_the_file_is_not_derived(read):
    nemo = read(V03_HF, hidden_size=5120, head_dim=128)
    assert nemo.config.head_dim == 128
    assert nemo.notes == ()


def test_theta_lies_flat_or_nested(read):
    nested = {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert read(V03_HF, **nested).config.rope_theta == 5e5
    with pytest.raises(ValueError, match=r"config\.json has no rope_theta"):
        read(V03_HF, rope_theta=...)
    with pytest.raises(ValueError, match=r"config\.json has no rope_theta"):
        read(V03_HF | {"rope_theta": None})


def test_theta_by_hand_is_said(read):
    found = read(V03_HF, by_hand=1e4)
    assert found.config.rope_theta == 1e4
    assert "--rope-theta" in found.theta_origin


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"factor": 4.0}),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e6}),
        ("rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
    ],
)
def test_scaled_rotations_are_refused(read, key, value):
    with pytest.raises(
        ValueError, match=rf"config\.json.* {key}.*; (only plain rotation|expected)"
    ):
        read(V03_HF, **{key: value})
    assert read(V03_HF, rope_scaling=None).config.rope_theta == 1e6
    for plain in ({"type": "default"}, {"rope_theta": 1e6, "factor": 1.0}, {}):
        assert read(V03_HF, rope_scaling=plain).config.rope_theta == 1e6


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (7, 7),
        (None, None),
        (..., None),
        ("7", 7),
        ("null", None),
        ([None, 7], (None, 7, None, 7)),
        ([None, 7, 7, 7], (None, 7, 7, 7)),
        ([7], 7),
    ],
)
@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_official_windows(read, window, expected, key):
    """A list repeats over the layers; the key with a line before it is another name."""
    fields = OFFICIAL | {"n_layers": 4, "sliding_window": ..., key: window}
    assert read(fields).config.sliding_window == expected


def test_hf_windows(read):
    kinds = ["full_attention", "sliding_attention"]
    config = read(sources.HF_CONFIG, layer_types=kinds, sliding_window=3).config
    assert config.sliding_window == (None, 3)
    assert read(sources.HF_CONFIG, model_type="ministral").config.sliding_window == 5
    assert read(sources.HF_CONFIG, sliding_window=None).config.sliding_window is None
    with pytest.raises(ValueError, match=r"config\.json has no sliding_window; .* null"):
        read(sources.HF_CONFIG, sliding_window=...)
    for wrong in (kinds[:1], ["full_attention", "chunked_attention"]):
        with pytest.raises(ValueError, match=r"has layer_types .*; expected full_attention or"):
            read(sources.HF_CONFIG, layer_types=wrong)


@pytest.mark.parametrize("window", [0, -1, 2.5, "many", True, [None, 0], [], [1, 2, 3]])
def test_windows_that_are_none(read, window):
    with pytest.raises(ValueError, match=r"params\.json.*sliding_window"):
        read(OFFICIAL, sliding_window=window)
    with pytest.raises(ValueError, match=r"config\.json.*sliding_window"):
        read(sources.HF_CONFIG, sliding_window=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model type 'llama'; expected mistral or ministral"),
        ({"model_type": "gpt2"}, "model type 'gpt2'; expected mistral or ministral"),
        ({"model_type": ...}, "model type None; expected mistral"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias True; expected False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .*; expected none"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3; expected a divisor of num_heads"),
        ({"num_hidden_layers": ...}, "config.json has no num_hidden_layers"),
        ({"rms_norm_eps": ...}, "config.json has no rms_norm_eps"),
        ({"hidden_size": "wide"}, "has hidden_size 'wide'; expected an integer"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number"),
    ],
)
def test_hugging_face_configs_that_are_refused(read, change, message):
    with pytest.raises(ValueError, match=rf"config\.json.*{message}|{message}"):
        read(sources.HF_CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"num_experts": 8}}, "moe has no num_experts_per_tok; expected a number above 0"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 9}}, "experts_per_token is 9; expected"),
        (
            {"moe": {"num_experts": 8, "num_experts_per_tok": "2"}},
            "moe has num_experts_per_tok '2'; expected",
        ),
        ({"moe": [8, 2]}, "moe is .*; expected a table"),
        ({"model_type": "mamba"}, "model type 'mamba'; expected transformer"),
        ({"quantization": {"qformat_weight": "fp8"}}, "has quantization"),
        ({"n_kv_heads": ...}, "params.json has no n_kv_heads"),
        ({"n_kv_heads": 3}, "num_kv_heads is 3; expected a divisor"),
    ],
)
def test_official_configs_that_are_refused(read, change, message):
    with pytest.raises(ValueError, match=message):
        read(OFFICIAL, **change)


def test_files_that_are_no_config(tmp_path):
    file = tmp_path / "config.json"
    for content in (b"{", b"", b"\xff\xfe", b"[]", b"null"):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"config\.json (is empty|is not valid JSON|holds a JSON)"
        ):
            architecture.read(file)


def test_ids_and_positions(read):
    config = read(sources.HF_CONFIG, bos_token_id=3, eos_token_id=[4, 5]).config
    assert (config.bos_id, config.eos_id, config.max_positions) == (3, 4, 4096)
    absent = {"bos_token_id": None, "eos_token_id": ..., "max_position_embeddings": ...}
    config = read(sources.HF_CONFIG, **absent).config
    assert (config.bos_id, config.eos_id, config.max_positions) == (1, 2, 32768)


@pytest.mark.parametrize("window", [5, None, (None, 5), (5, 5)])
@pytest.mark.parametrize("tied", [False, True])
def test_written_configs_read_the_same(read, window, tied):
    fields = sources.HF_CONFIG | {"tie_word_embeddings": tied}
    config = ModelConfig.from_dict(read(fields).config.to_dict() | {"sliding_window": window})
    assert read(architecture.to_hf(config)).config == config
    official = read(architecture.to_official(config))
    assert official.config == config
    assert official.notes == ()


@pytest.mark.parametrize("write", [architecture.to_hf, architecture.to_official])
def test_no_format_of_pytorch_has_a_dilated_window(write):
    config = ModelConfig.from_name("mistral-7b-v0.1")
    with pytest.raises(ValueError, match=r"dilation is 2, and PyTorch's formats have no dilated"):
        write(dataclasses.replace(config, dilation=2))


def test_two_windows_need_the_official_format():
    config = ModelConfig.from_name("mistral-7b-v0.1").to_dict() | {"sliding_window": [4, 8] * 16}
    config = ModelConfig.from_dict(config)
    assert architecture.to_official(config)["sliding_window"] == [4, 8] * 16
    with pytest.raises(ValueError, match=r"this model has \[4, 8\]: export it as official"):
        architecture.to_hf(config)


WRONG = [True, 2.5, -1, 2**63, 2**40, "x" * 1000, [1], [[]], {}, {"a": 1}, float("nan"), 10**400]


@pytest.mark.parametrize("fields", [OFFICIAL, sources.HF_CONFIG])
def test_every_value_that_is_read_is_checked_before_it_is_used(read, fields, tmp_path):
    """Whatever it is, it is taken or refused by name: at once, in a sentence, in little memory."""
    extra = [
        *(
            "layer_types",
            "rope_parameters",
            "rope_scaling",
            "lora",
            "head_dim",
            "moe",
            "hidden_act",
        ),
        *("sliding_window", "_sliding_window", "tied_embeddings", "attention_bias", "quantization"),
        *("model_type", "max_position_embeddings", "eos_token_id", "bos_token_id", "rope_theta"),
    ]
    extra += ["yarn", "llama_4_scaling", "multiple_of", "ffn_dim_multiplier", "text_config"]
    extra += ["quantization_config", "use_scaled_rope", "original_max_position_embeddings"]
    table = {"rope_theta": 1e4, "factor": 2, "original_max_position_embeddings": 8}
    yarn = {"rope_parameters": table | {"type": "yarn"}, "yarn": table | {"beta": 1}}
    del yarn["yarn"]["rope_theta"]
    nested = [
        *(
            {"rope_parameters": {"rope_theta": 1e4, key: x}}
            for key in ("factor", "type", "rope_theta")
            for x in WRONG
        ),
        *(
            {"model_type": kind, name: yarn[name] | {key: x}}
            for name, kind in (("rope_parameters", "ministral3"), ("yarn", "transformer"))
            for key in (*yarn[name], "beta_fast", "mscale", "llama_4_scaling_beta")
            for x in WRONG
        ),
        *({"model_type": "mistral3", "text_config": {"hidden_size": x}} for x in WRONG),
    ]
    flat = [{key: x} for key in {*fields, *extra} for x in [*WRONG, []]]
    for change in flat + nested:
        refusal = ""
        with bounded(5, 1 << 27):
            try:
                config = read(fields, **change).config
            except ValueError as error:
                refusal = str(error)
        if refusal:
            assert re.search(r"(config|params)\.json", refusal), change
            assert len(refusal) < 600 + len(str(tmp_path)), change
        else:
            assert all(map(np.isfinite, (config.rope_theta, config.norm_eps))), change


def test_numbers_are_not_computed_with_before_they_are_checked(read):
    for fields, change, message in (
        (OFFICIAL, {"n_layers": 2**40, "sliding_window": [5]}, "n_layers 1099511627776; expected"),
        (OFFICIAL, {"n_layers": 10**6, "sliding_window": [5]}, "n_layers 1000000; expected"),
        (OFFICIAL, {"n_heads": 2**63, "head_dim": ...}, "n_heads 9223372036854775808; expected"),
        (OFFICIAL, {"sliding_window": "[" * 1000}, r"sliding_window '\[+\.*\[*' is nested|is not"),
        (OFFICIAL, {"sliding_window": [None] * 10**5}, r"sliding_window \[None, .*expected"),
        (
            sources.HF_CONFIG,
            {"layer_types": ["full_attention"] * 10**5},
            "has layer_types .*expecte",
        ),
        (sources.HF_CONFIG, {"eos_token_id": []}, r"has eos_token_id \[\]; expected"),
    ):
        with bounded(5, 1 << 27), pytest.raises(ValueError, match=message):
            read(fields, **change)


@pytest.mark.parametrize("name", ["params.json", "config.json"])
def test_a_large_config_is_not_read(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 30)
    with bounded(5, 1 << 27), pytest.raises(ValueError, match=r"has 1\.1 GB; expected at most 4"):
        architecture.read(tmp_path / name)
