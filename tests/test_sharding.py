"""A model laid out by any rule file computes what it computes on one device."""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.config import CONFIG_DIR, ModelConfig
from mistral_jax.model.cache import init_cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.sharding import abstract_params, mesh_of, read_layout

CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=32,
    mlp_dim=48,
    num_heads=8,
    num_kv_heads=2,
    head_dim=10,
    rope_theta=1e4,
    sliding_window=8,
)
NAMES = sorted(path.stem for path in (CONFIG_DIR / "sharding").glob("*.toml"))


@pytest.fixture(scope="module")
def whole():
    """Tokens, positions, parameters and logits on one device."""
    tokens = jax.random.randint(jax.random.key(0), (4, 30), 0, CONFIG.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(30), tokens.shape)
    model = Transformer(CONFIG)
    params = nn.unbox(model.init(jax.random.key(1), tokens, positions)["params"])
    return tokens, positions, params, model.apply({"params": params}, tokens, positions)[0]


@pytest.mark.parametrize(
    ("name", "mesh_is_set"), [("tensor", False), *((name, True) for name in NAMES)]
)
def test_sharded_equals_single_device(whole, name, mesh_is_set):
    tokens, positions, params, expected = whole
    layout = read_layout(name, CONFIG)
    model = Transformer(CONFIG, rules=layout.rules)
    places = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout))
    params = jax.device_put(params, places)
    assert mesh_of(params) == layout.mesh

    def both(params, tokens, positions):
        cache = init_cache(CONFIG, *tokens.shape)
        full, _ = model.apply({"params": params}, tokens, positions)
        _, cache = model.apply({"params": params}, tokens[:, :20], positions[:, :20], cache)
        return full, model.apply({"params": params}, tokens[:, 20:], positions[:, 20:], cache)[0]

    with jax.set_mesh(layout.mesh) if mesh_is_set else contextlib.nullcontext():
        full, late = jax.jit(both)(params, tokens, positions)
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(full, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(late, expected[:, 20:], rtol=0, atol=bound)


def test_more_devices_than_key_value_heads(whole):
    """K = 2 on 8 devices: kv heads lie on 2 of them, query heads on all, next to their kv head."""
    layout = read_layout("tensor", CONFIG)
    params = abstract_params(Transformer(CONFIG), layout)["layers_0"]["attn"]
    assert params["k_proj"]["kernel"].sharding.shard_shape((2, 10, 32)) == (1, 10, 32)
    assert params["q_proj"]["kernel"].sharding.shard_shape((8, 10, 32)) == (1, 10, 32)
    groups = CONFIG.group_size
    held = {}
    for name, heads in (("q_proj", 8), ("k_proj", 2)):
        shards = params[name]["kernel"].sharding.devices_indices_map((heads, 10, 32))
        held[name] = {device: index[0].start or 0 for device, index in shards.items()}
    for device, query_head in held["q_proj"].items():
        assert held["k_proj"][device] == query_head // groups


def test_tensor_parallel_decode_reduces_twice_a_layer(whole):
    _, _, params, _ = whole
    layout = read_layout("tensor", CONFIG)
    model = Transformer(CONFIG, rules=layout.rules)
    places = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout))
    token = jnp.zeros((1, 1), jnp.int32)
    params = jax.device_put(params, places)
    with jax.set_mesh(layout.mesh):
        step = jax.jit(model.apply)
        _, cache = step({"params": params}, token, token, init_cache(CONFIG, 1, 8))
        assert cache[0].k.sharding.shard_shape((1, 8, 2, 10)) == (1, 8, 1, 10)
        hlo = step.lower({"params": params}, token, token, cache).compile().as_text()
    assert hlo.count(" all-reduce(") == 2 * CONFIG.num_layers + 1  # the embedding's lookup is one
    assert " all-gather(" not in hlo


def test_axis_that_does_not_divide_is_refused_with_a_remedy():
    config = dataclasses.replace(CONFIG, mlp_dim=50)
    with pytest.raises(ValueError, match=r"mlp_dim = 50.*tensor.*8 devices.*use 2 or leave mlp"):
        read_layout("tensor", config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mesh]\na = 3\nb = -1\n[rules]\n", "multiple of 3 devices; there are 8"),
        ("[mesh]\na = -1\nb = -1\n[rules]\n", "at most one"),
        ("[mesh]\na = 0\n[rules]\n", "expected a count of devices"),
        ('[mesh]\na = 2\n[rules]\nhead = "a"\n', "nearest is 'heads'"),
        ('[mesh]\na = 2\n[rules]\nheads = "b"\n', r"maps heads to 'b'; its mesh has \['a'\]"),
        ("[mesh]\na = 2\n", r"expected \[mesh\] and \[rules\]"),
        ("[mesh\n", "not valid TOML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "layout.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_layout(path, CONFIG)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="data_tensor, fsdp, fsdp_tensor, single, tensor"):
        read_layout("tensors", CONFIG)
