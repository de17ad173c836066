"""Laws of the files of Llama, of later Mistral models, and of models that read images too."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import reference
import sources
import tiny
from mistral_jax.convert import architecture
from mistral_jax.convert.inspect import inspect
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch
from safetensors.numpy import load_file

import mistral_jax

LLAMA = {"dim": 32, "multiple_of": 4, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-6}
SIZES = {  # what Llama's official file leaves out, as the reference needs it
    "head_dim": 8,
    "hidden_dim": 88,
    "n_kv_heads": 4,
    "vocab_size": 52,
    "rope_theta": 1e4,
    "sliding_window": None,
}
REMOVED = dict.fromkeys((*SIZES, "sliding_window"), ...)
LLAMA_HF = {
    "model_type": "llama",
    "sliding_window": ...,
    "num_key_value_heads": ...,
    "head_dim": ...,
    "rope_theta": ...,
    "hidden_dim": 88,
    "vocab_size": 52,
    "norm_eps": 1e-6,
    "tie_word_embeddings": ...,
}
YARN = {
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta": 32.0,
    "alpha": 1.0,
    "apply_scale": False,
}
QUERIES = {"original_max_position_embeddings": 16384, "beta": 0.1}
HF_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def convert(source, target):
    heard = sources.Heard()
    to_orbax(source, target, overwrite=True, progress=heard)
    return mistral_jax.load(target, dtype="float32")[:2], heard.said


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.fixture(scope="module")
def llama():
    config = LLAMA | SIZES
    return config, reference.random_tensors(config, 4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_official_llama_of_several_parts(tmp_path, llama, parts):
    """The file states neither vocabulary nor base, and the tensors decide."""
    config, tensors = llama
    expected = tiny.from_official(config, tensors)[1]
    rope = {
        "rope.freqs": np.ones(4, np.float32),
        "layers.0.attention.inner_attention.rope.freqs": np.ones(4, np.float32),
    }
    fields = REMOVED | LLAMA | {"vocab_size": -1}
    source = sources.write(tmp_path / "s", "official-torch", tensors, parts, **fields)
    for file in sorted(source.glob("*.pth")):
        held = {name: places[0].array for name, places in tensors_of(source, file).items()}
        sources.save_torch(file, held | rope)
    (ours, params), said = convert(source, tmp_path / "x")
    assert_same(params, expected)
    assert (ours.config.rope_theta, ours.config.norm_eps) == (1e4, 1e-6)
    assert (ours.config.mlp_dim, ours.config.vocab_size) == (88, 52)
    assert ours.config.windows == (None, None)
    assert any("no vocab_size: 52, as tok_embeddings.weight has" in note for note in said)
    assert any("rope_theta is 10000 (params.json leaves it out" in note for note in said)
    hf = sources.write(tmp_path / "hf", "hf-safetensors", tensors, **LLAMA_HF)
    (theirs, params), _ = convert(hf, tmp_path / "y")
    assert_same(params, expected)
    for name in ("vocab_size", "mlp_dim", "num_kv_heads", "head_dim", "rope_theta", "norm_eps"):
        assert getattr(theirs.config, name) == getattr(ours.config, name)


def tensors_of(source, file):
    from mistral_jax.convert.source import Source

    return Source(source, "official-torch", (file,), None, (), ()).tensors()


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        ({"dim": 4096, "n_heads": 32, "multiple_of": 256}, 11008),
        ({"dim": 5120, "n_heads": 40, "multiple_of": 256}, 13824),
        ({"dim": 6656, "n_heads": 52, "multiple_of": 256}, 17920),
        ({"dim": 8192, "n_heads": 64, "multiple_of": 256}, 22016),
        ({"dim": 8192, "n_heads": 64, "multiple_of": 256, "ffn_dim_multiplier": 1.0}, 22016),
        ({"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
    ],
)
def test_the_width_of_an_official_llamas_mlp(tmp_path, fields, width):
    file = tmp_path / "params.json"
    file.write_text(json.dumps(LLAMA | {"vocab_size": 32000} | fields))
    found = architecture.read(file)
    assert found.config.mlp_dim == width
    assert found.model_type == "llama"
    assert found.config.num_kv_heads == fields["n_heads"]


def test_an_official_llama_without_any_rule_takes_the_width_of_its_tensors(tmp_path, llama):
    config, tensors = llama
    fields = REMOVED | LLAMA | {"multiple_of": ..., "rope_theta": 1e6, "n_kv_heads": 4}
    source = sources.write(tmp_path / "s", "official-torch", tensors, 2, **fields)
    (model, _), said = convert(source, tmp_path / "x")
    assert model.config.mlp_dim == config["hidden_dim"]
    assert model.config.max_positions == 16384
    assert any("no mlp_dim: 88" in note for note in said)
    tensors = {name: x for name, x in tensors.items() if "layers.0.feed_forward.w1" not in name}
    source = sources.write(tmp_path / "t", "official-torch", tensors, **fields)
    with pytest.raises(ValueError, match=r"params\.json has no hidden_dim"):
        to_orbax(source, tmp_path / "y")
    wrong = fields | {"multiple_of": 64}
    source = sources.write(tmp_path / "u", "official-torch", llama[1], **wrong)
    with pytest.raises(ValueError, match=r"no tensor layers\.0\.feed_forward\.w1|\(88, 32\)"):
        to_orbax(source, tmp_path / "y")


@pytest.mark.parametrize("format", ["hf", "official"])
def test_a_llama_is_exported_as_a_llama(tmp_path, llama, format):
    _, tensors = llama
    source = sources.write(tmp_path / "s", "hf-safetensors", tensors, **LLAMA_HF)
    to_orbax(source, tmp_path / "x")
    to_torch(tmp_path / "x", tmp_path / "back", format=format)
    if format == "hf":
        fields = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (fields["model_type"], fields["architectures"]) == ("llama", ["LlamaForCausalLM"])
        assert "sliding_window" not in fields
        again, first = (load_file(x / "model.safetensors") for x in (tmp_path / "back", source))
    else:
        again, first = load_file(tmp_path / "back" / "consolidated.safetensors"), tensors
    assert again.keys() == first.keys()
    assert all(again[name].tobytes() == first[name].tobytes() for name in first)


def read(tmp_path, fields, name="config.json"):
    file = tmp_path / name
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    return architecture.read(file)


MINISTRAL3 = sources.HF_CONFIG | {
    "model_type": "ministral3",
    "sliding_window": ...,
    "rope_theta": ...,
    "rope_parameters": HF_YARN,
}


def test_yarn_is_the_same_in_each_spelling(tmp_path):
    official = tiny.OFFICIAL | {
        "sliding_window": ...,
        "rope_theta": 1e6,
        "yarn": YARN,
        "llama_4_scaling": QUERIES,
        "max_position_embeddings": 4096,
    }
    theirs = read(tmp_path, official, "params.json")
    assert theirs.model_type == "ministral3"
    scaling = theirs.config.rope_scaling
    assert (scaling.factor, scaling.original_positions, scaling.attention_factor) == (16, 16384, 1)
    assert theirs.config.query_scaling.beta == 0.1
    flat = {k: v for k, v in HF_YARN.items() if k != "rope_theta"}
    outside = {k: v for k, v in flat.items() if k != "original_max_position_embeddings"}
    for change in (
        {},
        {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": flat},
        {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": flat | {"rope_type": None}}
        | {"rope_scaling": {"type": "yarn"} | {k: v for k, v in flat.items() if k != "rope_type"}},
        {"rope_parameters": outside, "rope_theta": 1e6}
        | {"original_max_position_embeddings": 16384},
        {"rope_parameters": HF_YARN | {"type": "yarn", "max_position_embeddings": 4096}},
        {"rope_parameters": HF_YARN | {"mscale": None, "mscale_all_dim": None}}
        | {"rope_parameters": HF_YARN | {"attention_factor": 1.0}},
        {"rope_parameters": {k: v for k, v in HF_YARN.items() if not k.startswith("beta")}},
    ):
        assert read(tmp_path, MINISTRAL3 | change).config == theirs.config


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, 1.4158883),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({}, 1.4158883),
        ({"mscale": 0.5, "mscale_all_dim": 1.0}, 1.2079442 / 1.4158883),
        ({"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.25),
    ],
)
def test_the_attention_factor_of_yarn(tmp_path, fields, factor):
    table = {k: v for k, v in HF_YARN.items() if not k.startswith("mscale")} | {"factor": 64.0}
    config = read(tmp_path, MINISTRAL3 | {"rope_parameters": table | fields}).config
    assert config.rope_scaling.attention_factor == pytest.approx(factor, rel=1e-7)
    applied = {"yarn": YARN | {"factor": 64.0, "apply_scale": True}, "rope_theta": 1e6}
    applied = read(tmp_path, tiny.OFFICIAL | applied, "params.json").config.rope_scaling
    assert applied.attention_factor == pytest.approx(1.4158883, rel=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original_max_position_embeddings": None}, "without original_max_position_embeddings"),
        ({"factor": None}, "without factor"),
        ({"rope_type": "dynamic"}, "expected the type 'default' or 'yarn'"),
        ({"rope_type": "longrope"}, "expected the type 'default' or 'yarn'"),
        ({"rope_type": "linear"}, "expected the type 'default' or 'yarn'"),
        ({"type": "dynamic"}, "expected the type 'default' or 'yarn'"),
        ({"truncate": False}, "expected no 'truncate'"),
        ({"short_factor": [1.0]}, "expected no 'short_factor'"),
        ({"partial_rotary_factor": 0.5}, "expected no 'partial_rotary_factor'"),
        ({"factor": -1}, "has factor -1; expected"),
        ({"beta_fast": "many"}, "has beta_fast 'many'; expected"),
        ({"llama_4_scaling_beta": -0.1}, "has llama_4_scaling_beta -0.1; expected"),
    ],
)
def test_rotations_that_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"config\.json.*rope_parameters.*{message}"):
        read(tmp_path, MINISTRAL3 | {"rope_parameters": HF_YARN | change})


@pytest.mark.parametrize("kind", ["yarn", "llama_4_scaling"])
@pytest.mark.parametrize("missing", ["original_max_position_embeddings", "factor", "beta"])
def test_official_rotations_that_are_refused(tmp_path, kind, missing):
    tables = {"yarn": YARN, "llama_4_scaling": QUERIES}
    if missing not in tables[kind] or (kind, missing) == ("yarn", "beta"):
        return
    tables[kind] = {k: v for k, v in tables[kind].items() if k != missing}
    with pytest.raises(ValueError, match=rf"params\.json has {kind} .* without {missing}; exp"):
        read(tmp_path, tiny.OFFICIAL | tables, "params.json")
    tables[kind] = {"yarn": YARN, "llama_4_scaling": QUERIES}[kind] | {"gamma": 3}
    with pytest.raises(ValueError, match=rf"params\.json has {kind} .* with 'gamma'; expected"):
        read(tmp_path, tiny.OFFICIAL | tables, "params.json")


def test_what_only_other_types_have_is_refused(tmp_path):
    for fields, message in (
        (MINISTRAL3 | {"rope_parameters": ...}, "has no rope_parameters"),
        (MINISTRAL3 | {"model_type": "mistral", "sliding_window": None}, "llama_4_scaling_beta"),
        (MINISTRAL3 | {"rope_scaling": {"rope_type": "default"}}, "the same values in both"),
        (sources.HF_CONFIG | {"model_type": "mistral4"}, "multi-head latent attention"),
        (sources.HF_CONFIG | {"model_type": "mistral_large4"}, "multi-head latent attention"),
        (sources.HF_CONFIG | {"kv_lora_rank": 4}, "has kv_lora_rank 4: it uses multi-head latent"),
        (sources.HF_CONFIG | {"model_type": "mistral3"}, "has no text_config"),
    ):
        with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
            read(tmp_path, fields)
    for fields in ({"q_lora_rank": 8}, {"kv_lora_rank": 8}):
        with pytest.raises(ValueError, match=r"params\.json has .*multi-head latent attention"):
            read(tmp_path, tiny.OFFICIAL | fields, "params.json")


@pytest.mark.parametrize("change", [{}, {"llama_4_scaling_beta": 0.0}, {"mscale_all_dim": 0.0}])
def test_written_rotations_read_the_same(tmp_path, change):
    found = read(tmp_path, MINISTRAL3 | {"rope_parameters": HF_YARN | change})
    again = read(tmp_path, architecture.to_hf(found.config, found.model_type))
    assert (again.config, again.model_type) == (found.config, "ministral3")
    assert read(tmp_path, architecture.to_official(found.config), "params.json").config == (
        found.config
    )


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("table", [LLAMA3, {"type": "linear", "factor": 2.0}])
def test_llamas_rotations(tmp_path, table):
    fields = sources.HF_CONFIG | {"model_type": "llama", "sliding_window": ...}
    found = read(tmp_path, fields | {"rope_scaling": table})
    assert found.config.rope_scaling.factor == table["factor"]
    assert read(tmp_path, architecture.to_hf(found.config)).config == found.config
    with pytest.raises(ValueError, match="which the official format does not have; export it as h"):
        architecture.to_official(found.config)
    for name in set(table) - {"type", "rope_type"}:
        with pytest.raises(ValueError, match=rf"without {name}; expected"):
            read(tmp_path, fields | {"rope_scaling": table | {name: None}})


def both(folder, tensors, prefix, head, **fields):
    """Writes a model that reads images too, with the text model under a prefix."""
    text = sources.HF_CONFIG | fields.pop("text", {})
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {}} | fields
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    named = {}
    for name, tensor in tensors.items():
        hf = sources.hf_name(name)
        name_in_file = head if hf.startswith("lm_head") else prefix + hf.removeprefix("model.")
        named[name_in_file] = sources.hf_layout(name, tensor)
    images = {
        f"{'model.' if prefix == 'model.language_model.' else ''}{name}": np.ones(3, np.float32)
        for name in ("vision_tower.ln_pre.weight", "multi_modal_projector.norm.weight")
    }
    sources.save_safetensors(folder / "model.safetensors", named | images)
    return folder


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_the_text_part_of_a_model_that_reads_images(tmp_path, prefix, head):
    tensors = sources.tensors()
    expected = tiny.from_official(tiny.OFFICIAL, tensors)[1]
    source = both(tmp_path / "s", tensors, prefix, head)
    (model, params), said = convert(source, tmp_path / "x")
    assert_same(params, expected)
    assert model.config.sliding_window == 5
    assert any("the 2 tensors that read images, 24 bytes, are left out" in note for note in said)
    assert ("note", next(n for n in said if "images" in n)) in [*inspect(source)]


def test_the_text_model_or_its_output_decides_whether_it_is_tied(tmp_path):
    tied = sources.tensors(tied=True)
    names = "language_model.model.", "language_model.lm_head.weight"
    for i, (tensors, top, text, expected) in enumerate(
        (
            (tied, True, False, True),  # as Transformers 5 writes it
            (tied, ..., ..., True),
            (tied, False, True, True),
            (sources.tensors(), True, False, False),
            (sources.tensors(), ..., ..., False),
        )
    ):
        fields = {"tie_word_embeddings": top, "text": {"tie_word_embeddings": text}}
        fields = {k: v for k, v in fields.items() if v is not ...}
        fields["text"] = {k: v for k, v in fields["text"].items() if v is not ...}
        source = both(tmp_path / f"s{i}", tensors, *names, **fields)
        config = json.loads((source / "config.json").read_text())
        if text is ...:
            del config["text_config"]["tie_word_embeddings"]
            (source / "config.json").write_text(json.dumps(config))
        (model, _), _ = convert(source, tmp_path / "x")
        assert model.config.tie_embeddings == expected, i
    fields = {"tie_word_embeddings": False, "text": {"tie_word_embeddings": False}}
    source = both(tmp_path / "none", tied, *names, **fields)
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight"):
        convert(source, tmp_path / "x")


def test_the_text_part_of_official_files(tmp_path):
    tensors = sources.tensors()
    images = {
        name: np.ones(2, np.float32)
        for name in (
            "vision_encoder.ln_pre.weight",
            "vision_language_adapter.w_in.weight",
            "patch_merger.merging_layer.weight",
            "pre_mm_projector_norm.weight",
        )
    }
    source = sources.write(
        tmp_path / "s", "official-safetensors", tensors | images, vision_encoder={"hidden_size": 4}
    )
    (_, params), said = convert(source, tmp_path / "x")
    assert_same(params, tiny.from_official(tiny.OFFICIAL, tensors)[1])
    assert any("the 4 tensors that read images" in note for note in said)


FP8 = ml_dtypes.float8_e4m3fn
FP8_HF = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
    "modules_to_not_convert": ["lm_head"],
}
FP8_OFFICIAL = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}


def in_fp8(tensors, official):
    """Rounds the projections; returns the files' tensors, and the values that they stand for."""
    rng, stored, values = np.random.default_rng(0), {}, {}
    for name, tensor in tensors.items():
        if ".attention.w" not in name and ".feed_forward." not in name:
            stored[name] = values[name] = tensor.astype(ml_dtypes.bfloat16)
            continue
        scale = np.float32(rng.uniform(0.001, 0.01))
        small = (tensor / scale).astype(FP8)
        wide = small.astype(np.float32) * scale
        stored[name], values[name] = small, wide.astype(ml_dtypes.bfloat16)
        stem = name.removesuffix("weight")
        stored[stem + ("qscale_weight" if official else "weight_scale_inv")] = scale
        stored[stem + ("qscale_act" if official else "activation_scale")] = np.float32(0.5)
        if official:
            stored[stem + "fake_quantizer.scale"] = np.ones(1, np.float32)
    return stored, values


@pytest.mark.parametrize("official", [True, False])
def test_fp8_becomes_bfloat16(tmp_path, official):
    stored, values = in_fp8(sources.tensors(), official)
    format = "official-safetensors" if official else "hf-safetensors"
    if official:
        source = sources.write(tmp_path / "s", format, stored, quantization=FP8_OFFICIAL)
    else:
        source = sources.write(tmp_path / "s", format, quantization_config=FP8_HF)
        named = {sources.hf_name(n): hf_layout(n, t) for n, t in stored.items()}
        sources.save_safetensors(source / "model.safetensors", named)
    said = convert(source, tmp_path / "x")[1]
    assert any("14 matrices in FP8 become bfloat16" in note for note in said)
    params = mistral_jax.load(tmp_path / "x")[1]
    wide = {name: tensor.astype(np.float32) for name, tensor in values.items()}
    expected = tiny.from_official(tiny.OFFICIAL, wide)[1]
    assert_same(params, tiny_cast(expected))
    (_, params), _ = convert(source, tmp_path / "x")
    assert_same(params, expected)


def hf_layout(name, tensor):
    return sources.hf_layout(name, tensor) if name.endswith(".weight") else tensor


def tiny_cast(tree):
    return jax.tree.map(lambda x: x.astype("bfloat16"), tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, name: s.pop(name), r"is float8_e4m3fn without its scale; expected \S+inv"),
        (
            lambda s, name: s.update({name: np.ones((2, 2), np.float32)}),
            r"is float32 \(2, 2\), for a tensor \(32, 32\); expected one number",
        ),
        (
            lambda s, name: s.update({name: np.float32(np.nan)}),
            "is nan; expected a finite number above 0",
        ),
    ],
)
def test_fp8_without_one_scale_is_refused(tmp_path, change, message):
    stored, _ = in_fp8(sources.tensors(), False)
    named = {sources.hf_name(n): t for n, t in stored.items()}
    change(named, "model.layers.1.self_attn.q_proj.weight_scale_inv")
    source = sources.write(tmp_path / "s", "hf-safetensors")
    sources.save_safetensors(source / "model.safetensors", named)
    with pytest.raises(ValueError, match=message):
        to_orbax(source, tmp_path / "x")
    assert message.split("(")[0][:6] in dict(inspect(source))["problem"]


@pytest.mark.parametrize(
    "change",
    [
        {"weight_block_size": [128, 128]},
        {"activation_scheme": "dynamic"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "awq"},
    ],
)
def test_other_quantizations_are_refused(tmp_path, change):
    fields = sources.HF_CONFIG | {"quantization_config": FP8_HF | change}
    with pytest.raises(ValueError, match=r"has quantization_config .*; expected none, or FP8 with"):
        read(tmp_path, fields)
    fields = tiny.OFFICIAL | {"quantization": FP8_OFFICIAL | {"qscheme_act": "BLOCK"}}
    with pytest.raises(ValueError, match=r"has quantization .*; expected none, or FP8 with one"):
        read(tmp_path, fields, "params.json")


def test_inspect_describes_a_changed_rotation(tmp_path):
    source = sources.write(tmp_path / "s", "official-safetensors", yarn=YARN)
    found = dict(inspect(source))
    assert found["rope scaling"] == (
        "kind yarn, factor 16, original positions 16384, beta fast 32, beta slow 1, "
        "attention factor 1"
    )
    assert "query scaling" not in found
    source = sources.write(
        tmp_path / "t", "official-safetensors", yarn=YARN, llama_4_scaling=QUERIES
    )
    assert dict(inspect(source))["query scaling"] == "beta 0.1, original positions 16384"
