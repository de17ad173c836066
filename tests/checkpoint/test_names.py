import dataclasses

import jax
import numpy as np
import pytest
import reference
import sources
import tiny
from mistral_jax.convert import checks

from mistral_jax.checkpoint import names
from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import abstract_params

HEADS = {  # attention with groups, without, with one key-value head; heads wider than dim / heads
    heads: dict(zip(("n_heads", "n_kv_heads", "head_dim"), heads, strict=True))
    for heads in ((4, 2, 8), (4, 4, 8), (4, 1, 8), (6, 2, 10))
}


def config_of(fields):
    return tiny.from_official(fields, reference.random_tensors(fields, 0))[0].config


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_the_parameters_of_the_model(heads, tied):
    config = dataclasses.replace(config_of(tiny.OFFICIAL | HEADS[heads]), tie_embeddings=tied)
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(abstract_params(Transformer(config)))
    }
    assert {weight.path: weight.shape(config) for weight in names.weights(config)} == expected


def test_a_group_is_a_layer():
    config = config_of(tiny.OFFICIAL)
    prefixes = [{weight.path.split("/")[0] for weight in group} for group in names.groups(config)]
    assert prefixes == [{"embed"}, {"layers_0"}, {"layers_1"}, {"final_norm", "lm_head"}]


@pytest.mark.parametrize("heads", HEADS)
def test_either_format_gives_what_an_independent_map_does(heads):
    fields = tiny.OFFICIAL | HEADS[heads]
    official = reference.random_tensors(fields, 3)
    model, expected = tiny.from_official(fields, official)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(expected)
    }
    for weight in names.weights(model.config):
        tensor = official[weight.name(official=True)]
        ours = weight.from_file(tensor, model.config, official=True)
        np.testing.assert_array_equal(ours, flat[weight.path], err_msg=weight.path)
        if fields["head_dim"] == tiny.OFFICIAL["head_dim"]:
            tensor = sources.hf_layout(weight.name(official=True), tensor)
        else:
            tensor = weight.to_file(ours, model.config, official=False)
        ours = weight.from_file(tensor, model.config, official=False)
        np.testing.assert_array_equal(ours, flat[weight.path], err_msg=weight.path)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("official", [False, True])
def test_there_and_back_is_equal_byte_for_byte(heads, official):
    config = config_of(tiny.OFFICIAL | HEADS[heads])
    rng = np.random.default_rng(0)
    for weight in names.weights(config):
        tensor = rng.integers(256, size=(*weight.file_shape(config), 2), dtype=np.uint8)
        tensor = tensor.view(np.uint16)[..., 0]
        there = weight.from_file(tensor, config, official)
        assert there.shape == weight.shape(config)
        np.testing.assert_array_equal(weight.to_file(there, config, official), tensor)


def test_nothing_is_copied_where_nothing_moves():
    config = config_of(tiny.OFFICIAL)
    for weight in names.weights(config):
        tensor = np.zeros(weight.file_shape(config))
        assert np.shares_memory(tensor, weight.from_file(tensor, config, official=False))
        moved = weight.path.endswith(("q_proj/kernel", "k_proj/kernel"))
        assert np.shares_memory(tensor, weight.from_file(tensor, config, official=True)) != moved


PUBLISHED = {  # parameters of each model
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-7b-python": 6_738_415_616,
    "codellama-13b-python": 13_015_864_320,
    "mathstral-7b": 7_248_023_552,
    "codestral-22b": 22_247_282_688,
    "mistral-small-2409": 22_247_282_688,
    "mistral-large-2": 122_610_069_504,
    "mistral-nemo-12b": 12_247_782_400,
    "ministral-8b": 8_019_808_256,
    "mistral-small-3": 23_572_403_200,
    "mistral-small-3.1": 23_572_403_200,
    "devstral-small": 23_572_403_200,
    "magistral-small": 23_572_403_200,
    "ministral-3-3b": 3_429_006_336,
    "ministral-3-8b": 8_489_553_920,
    "ministral-3-14b": 13_506_073_600,
    "devstral-small-2": 23_572_403_200,
    "devstral-2-123b": 125_025_988_608,
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_each_model_has_the_published_number_of_parameters(model):
    config = ModelConfig.from_name(model)
    sizes = [np.prod(weight.shape(config), dtype=int) for weight in names.weights(config)]
    assert sum(sizes) == PUBLISHED[model]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("mixtral-8x22b", 140_630_071_296, 39_161_468_928),
        ("mixtral-8x22b-v0.1", 140_620_634_112, 39_152_031_744),
        ("mistral-7b-v0.1", 7_241_732_096, 7_241_732_096),
    ],
)
def test_a_mixture_has_the_published_number_of_parameters(name, total, active):
    config = ModelConfig.from_name(name)
    assert names.count_parameters(config) == total
    assert names.count_parameters(config, active=True) == active


@pytest.mark.parametrize(
    ("name", "ignorable"),
    [
        ("model.layers.31.self_attn.rotary_emb.inv_freq", True),
        ("rope.freqs", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq.weight", False),
        ("layers.0.attention.wq.lora_A.weight", False),
    ],
)
def test_what_may_be_ignored(name, ignorable):
    assert bool(checks.IGNORABLE.fullmatch(name)) == ignorable
