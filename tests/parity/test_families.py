"""Live parity of every dense family: random models of Transformers, in each of its spellings.

Bounds are those of `test_live.py`. Lengths exceed the window, and the original length of YaRN.
"""

import json

import hf_reference
import numpy as np
import pytest
import reference
import safetensors.torch
import test_live
import tiny
import torch
import transformers

import mistral_jax
from convert import architecture
from convert.to_orbax import to_orbax
from convert.to_torch import to_torch
from mistral_jax.model.cache import init_cache

TINY = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
FAMILIES = {  # name: class in Transformers, and what differs from TINY
    "llama": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "llama_gqa_codellama": ("Llama", {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}),
    "llama_smoothed_tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR, "head_dim": 10}),
    "nemo": ("Mistral", {"rope_parameters": PLAIN, "head_dim": 12, "sliding_window": None}),
    "ministral": (
        "Ministral",
        {"rope_parameters": PLAIN, "head_dim": 8, "sliding_window": 5, "layer_types": KINDS},
    ),
    "ministral3": ("Ministral3", {"rope_parameters": YARN, "head_dim": 16}),
    "ministral3_tied": (
        "Ministral3",
        {"rope_parameters": YARN, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "devstral2": (
        "Ministral3",
        {
            "rope_parameters": YARN | {"llama_4_scaling_beta": 0.0, "mscale_all_dim": 0.0},
            "head_dim": 16,
        },
    ),
    "ministral3_window": (
        "Ministral3",
        {"rope_parameters": YARN, "head_dim": 16, "sliding_window": 6},
    ),
    "mistral_yarn": (
        "Mistral",
        {
            "rope_parameters": {
                k: v for k, v in YARN.items() if k not in ("llama_4_scaling_beta", "mscale", "type")
            },
            "sliding_window": 7,
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, seed, tmp_path_factory):
    """A saved random model, and its folder."""
    kind, fields = FAMILIES[request.param]
    config = getattr(transformers, f"{kind}Config")(**TINY | fields)
    return build(kind, config, seed, tmp_path_factory.mktemp(request.param))


def build(kind, config, seed, folder, head="CausalLM"):
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}For{head}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.5 * torch.rand_like(parameter))
            elif "embed_tokens" not in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, folder


def load(folder, target):
    to_orbax(folder, target, overwrite=True)
    return mistral_jax.load(target, dtype="float32")[:2]


def assert_same_text(model, params, theirs, rng):
    """Ragged greedy batches, longer than the windows and than the original length of YaRN."""
    size = model.config.vocab_size
    prompts = [rng.integers(size, size=length).tolist() for length in (1, 7, 19)]
    greedy = mistral_jax.Sampling(temperature=0.0)
    ours = mistral_jax.generate(model, params, prompts, 32, sampling=greedy, stop_ids=())
    for completion, prompt in zip(ours, prompts, strict=True):
        expected = hf_reference.greedy(theirs, prompt, 32)
        logits = hf_reference.logits(theirs, [*prompt, *expected])[len(prompt) - 1 : -1]
        second, first = np.sort(logits, axis=-1)[:, -2:].T
        tied = first - second < 2 * test_live.TOLERANCE * np.abs(logits).max()
        certain = int(np.argmax(tied)) if tied.any() else 32
        assert completion.tokens[:certain] == expected[:certain]


def assert_same_logits(model, params, theirs, rng):
    prompts = [rng.integers(model.config.vocab_size, size=n) for n in (1, 6, 8, 9, 40, 70)]
    rows = tiny.forward(model, params, *tiny.ragged(prompts))[0]
    for row, prompt in zip(rows, prompts, strict=True):
        expected = hf_reference.logits(theirs, prompt)
        error = np.abs(row[: len(prompt)] - expected).max()
        assert error <= test_live.TOLERANCE * np.abs(expected).max(), f"{len(prompt)} tokens"
    # The longest again, in chunks through a cache.
    cache = init_cache(model.config, 1, len(prompt))
    for start in range(0, len(prompt), 14):
        places = np.arange(start, start + 14)
        chunk = np.int32(prompt[places])[None], np.int32(places)[None]
        logits, cache = tiny.forward(model, params, *chunk, cache)
        error = np.abs(logits[0] - expected[places]).max()
        assert error <= test_live.TOLERANCE * np.abs(expected).max(), f"a chunk from {start}"


def older(config):
    """Spells a config of Transformers 5 as 4 does."""
    config = dict(config)
    table = dict(config.pop("rope_parameters"))
    config["rope_theta"] = table.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype", "float32")
    if table.pop("rope_type") != "default":
        kind = FIRST_SPELLING.get(config["model_type"], "rope_type")
        config["rope_scaling"] = table | {kind: FAMILY_KIND[config["model_type"]](table)}
    else:
        config["rope_scaling"] = None
    return config


FIRST_SPELLING = {"llama": "type"}
FAMILY_KIND = {
    "llama": lambda table: "llama3" if "low_freq_factor" in table else "linear",
    "mistral": lambda table: "yarn",
    "ministral3": lambda table: "yarn",
}


def test_the_logits_and_the_greedy_text_are_those_of_transformers(family, seed, tmp_path):
    theirs, folder = family
    model, params = load(folder, tmp_path / "ours")
    rng = np.random.default_rng(seed)
    assert_same_logits(model, params, theirs, rng)
    assert_same_text(model, params, theirs, rng)


def test_other_spellings_are_the_same_model(family, tmp_path):
    _, folder = family
    raw = json.loads((folder / "config.json").read_text())
    file = tmp_path / "config.json"

    def read(config):
        file.write_text(json.dumps(config))
        return architecture.read(file).config

    expected = read(raw)
    spelled = [older(raw)]
    if raw["num_attention_heads"] == raw["num_key_value_heads"]:
        heads = {"num_key_value_heads": None}
        spelled.append(raw | heads)
        spelled.append({k: v for k, v in older(raw).items() if k not in heads})
    if raw["head_dim"] * raw["num_attention_heads"] == raw["hidden_size"]:
        spelled += [raw | {"head_dim": None}]
        spelled += [{k: v for k, v in older(raw).items() if k != "head_dim"}]
    for config in spelled:
        assert read(config) == expected


def test_an_export_is_the_model_that_was_converted(family, seed, tmp_path):
    theirs, folder = family
    to_orbax(folder, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    back = hf_reference.load(tmp_path / "back")
    assert type(back) is type(theirs)
    prompt = np.random.default_rng(seed).integers(53, size=40)
    np.testing.assert_array_equal(
        hf_reference.logits(back, prompt), hf_reference.logits(theirs, prompt)
    )
    stored, again = (
        safetensors.torch.load_file(f / "model.safetensors") for f in (folder, tmp_path / "back")
    )
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    to_orbax(tmp_path / "back", tmp_path / "again")
    config, tree = (mistral_jax.load(tmp_path / "ours")[i] for i in (0, 1))
    config2, tree2 = (mistral_jax.load(tmp_path / "again")[i] for i in (0, 1))
    assert config.config == config2.config
    test_live.assert_same_trees(tree, tree2)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["nemo", "ministral3"])
def test_the_text_part_of_a_model_that_reads_images(name, tied, seed, tmp_path):
    kind, fields = FAMILIES[name]
    text = {k: v for k, v in (TINY | fields).items() if k != "attn_implementation"}
    text |= {"model_type": kind.lower(), "tie_word_embeddings": tied}
    config = transformers.Mistral3Config(
        text_config=text, vision_config=VISION, tie_word_embeddings=tied
    )
    config._attn_implementation = "eager"
    both, folder = build("Mistral3", config, seed, tmp_path / "s", "ConditionalGeneration")
    model, params = load(folder, tmp_path / "ours")
    assert model.config.tie_embeddings == tied
    rng = np.random.default_rng(seed)
    assert_same_logits(model, params, both, rng)
    to_torch(tmp_path / "ours", tmp_path / "text")
    text_alone = hf_reference.load(tmp_path / "text")
    assert type(text_alone).__name__ == f"{kind}ForCausalLM"
    assert_same_logits(model, params, text_alone, rng)

    # In memory, Transformers 5 has other names.
    state = {k: v.contiguous() for k, v in both.state_dict().items()}
    assert any(name.startswith("model.language_model.") for name in state)
    if tied:
        del state["lm_head.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors")
    test_live.assert_same_trees(load(folder, tmp_path / "again")[1], params)


@pytest.mark.parametrize("case", ["llama", "yarn"])
def test_official_files_are_the_model_of_transformers(case, seed, tmp_path):
    """Llama in four parts with what its file leaves out, and Ministral 3 in one."""
    config = tiny.OFFICIAL | {"sliding_window": None, "vocab_size": 52, "head_dim": 8}
    if case == "llama":
        config |= {"n_kv_heads": 4, "hidden_dim": 88, "norm_eps": 1e-6}
        params = {"dim": 32, "multiple_of": 4, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-6}
        params |= {"vocab_size": -1}
    else:
        config |= {"head_dim": 16, "yarn": tiny.YARN, "llama_4_scaling": tiny.QUERIES}
        params = config
    tensors = reference.random_tensors(config, seed)
    theirs = hf_reference.build(config, tensors)
    parts = 4 if case == "llama" else 1
    source = test_live.official_folder(tmp_path / "s", params, tensors, parts)
    model, tree = load(source, tmp_path / "ours")
    rng = np.random.default_rng(seed)
    assert_same_logits(model, tree, theirs, rng)
    assert_same_text(model, tree, theirs, rng)
    to_torch(tmp_path / "ours", tmp_path / "back")
    back = hf_reference.load(tmp_path / "back")
    assert type(back).__name__ == ("LlamaForCausalLM" if case == "llama" else type(theirs).__name__)
    assert_same_logits(model, tree, back, rng)
    to_torch(tmp_path / "ours", tmp_path / "official", format="official")
    state = safetensors.torch.load_file(tmp_path / "official" / "consolidated.safetensors")
    assert state.keys() == tensors.keys()
    assert all(np.array_equal(state[name].numpy(), tensors[name]) for name in tensors)
    test_live.assert_same_trees(load(tmp_path / "official", tmp_path / "again")[1], tree)


def test_fp8_that_pytorch_wrote_is_the_model_of_its_values(seed, tmp_path):
    """Each matrix is e4m3 with a scale; the product rounds to bfloat16."""
    kind, fields = FAMILIES["ministral3"]
    config = getattr(transformers, f"{kind}Config")(**TINY | fields)
    theirs, folder = build(kind, config, seed, tmp_path / "s")
    state, stored = theirs.state_dict(), {}
    for name, tensor in list(state.items()):
        if "_proj." in name:
            scale = tensor.abs().max() / 448
            small = (tensor / scale).to(torch.float8_e4m3fn)
            stored |= {name: small, f"{name}_scale_inv": scale}
            stored[name.replace("weight", "activation_scale")] = torch.tensor(0.5)
            state[name] = (small.float() * scale).bfloat16().float()
        else:
            stored[name] = tensor.bfloat16()
            state[name] = stored[name].float()
    theirs.load_state_dict(state)
    safetensors.torch.save_file(stored, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    raw["quantization_config"] = quantization | {"weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(raw))
    model, params = load(folder, tmp_path / "ours")
    assert_same_logits(model, params, theirs, np.random.default_rng(seed))
