"""A model laid out by any rule file computes, and writes, what it does on one device."""

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny
from jax.sharding import AxisType

from mistral_jax.checkpoint import checkpoint
from mistral_jax.config import CONFIG_DIR, ModelConfig
from mistral_jax.engine import decode, prefill
from mistral_jax.engine.generate import generate
from mistral_jax.engine.prefill import pad_rows
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.score import score
from mistral_jax.model.cache import init_cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel import rules
from mistral_jax.parallel.sharding import abstract_params, mesh_of, read_layout

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
PROMPTS = [[1, 7, 9], [1, *range(10, 50)], [5]]
SAMPLINGS = [Sampling(0), Sampling(1, seed=5), Sampling(0.8, repetition_penalty=1.2, seed=6)]
NAMES = {path.stem for path in (CONFIG_DIR / "sharding").glob("*.toml")} - {"single"}


@pytest.fixture(scope="module")
def whole():
    """Tokens, positions, parameters and logits on one device."""
    tokens = jax.random.randint(jax.random.key(0), (4, 30), 0, CONFIG.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(30), tokens.shape)
    model = Transformer(CONFIG)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens, positions)["params"])
    return tokens, positions, params, tiny.forward(model, params, tokens, positions)[0]


@pytest.mark.parametrize(
    ("name", "mesh_is_set"), [("tensor", False), *((name, True) for name in sorted(NAMES))]
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


def made(layout):
    """Generates from three rows, and scores a text, through chunks and the ring."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    model = Transformer(config, rules=layout.rules if layout else ())
    token = jnp.zeros((1, 1), jnp.int32)
    places = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout)) if layout else None
    params = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), token, token))["params"]
    params = jax.device_put(params, places)
    programs = decode.decode._cache_size()
    rows = generate(model, params, PROMPTS, 10, sampling=SAMPLINGS, stop_ids=())
    assert decode.decode._cache_size() == programs + 1  # no array moves on the way
    ids = SimpleNamespace(encode=lambda text, bos: [1, *(byte % 96 for byte in text.encode())])
    cache, _ = prefill.prefill(model, params, pad_rows(model, params, PROMPTS, ()), 60)
    return rows, score(model, params, ids, "a text that is longer than one chunk"), cache[0]


@pytest.fixture(scope="module")
def made_on_one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "CHUNK", 16)
        yield made(None)


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        pytest.param("tensor", (3, 8, 1, 10), marks=pytest.mark.slow),
        pytest.param("fsdp", (1, 8, 2, 10), marks=pytest.mark.slow),
        ("fsdp_tensor", (1, 8, 1, 10)),
        pytest.param("data_tensor", (1, 8, 1, 10), marks=pytest.mark.slow),
        pytest.param("long", (3, 8, 2, 10), marks=pytest.mark.slow),
    ],
)
def test_every_layout_makes_the_same_text_and_score(made_on_one_device, name, shard):
    """Three rows, which no mesh divides; one of them outgrows its window and a chunk."""
    expected, expected_score, _ = made_on_one_device
    rows, scored, cache = made(read_layout(name, CONFIG))
    assert [row.tokens for row in rows] == [row.tokens for row in expected]
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row.logprobs, other.logprobs, atol=1e-5)
    assert scored.logprob == pytest.approx(expected_score.logprob, rel=1e-5)
    assert cache.k.sharding.shard_shape(cache.k.shape) == shard  # rows and heads lie apart


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


@pytest.mark.slow
def test_eight_key_value_heads_on_sixteen_devices(tmp_path):
    """Mistral 7B's K on more devices than that: two share each, and compute what one would."""
    model, params = tiny.build(n_kv_heads=8, n_heads=32, hidden_dim=48, vocab_size=96)
    checkpoint.save(tmp_path / "x", model.config, params)
    expected = processes.work(tmp_path / "x", tmp_path / "y", None, "null")
    arguments = "work", tmp_path / "x", tmp_path / "z", "tensor", "{}"
    (end,) = processes.together(processes.__file__, *arguments, count=1, devices=16)
    assert end.status == 0, end.err
    found = json.loads(end.out)
    assert found["tokens"] == expected["tokens"]
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "message", "fits"),
    [
        (
            "tensor",
            {"mlp_dim": 50},
            r"mlp \(50\) of layers_\*/mlp/\w+_proj/kernel .*'tensor' \(8",
            2,
        ),
        ("tensor", {"vocab_size": 98}, r"vocab \(98\) of embed/embedding to mesh axis 'tensor'", 2),
        ("tensor", {"num_heads": 6}, r"heads \(6\) of layers_\*/attn/[oq]_proj/kernel to mesh", 6),
        ("fsdp", {"embed_dim": 34}, r"embed \(34\) of .* to mesh axis 'fsdp' \(8 devices\)", 2),
    ],
)
def test_what_does_not_divide_is_refused_with_a_remedy_that_works(name, fields, message, fits):
    config = dataclasses.replace(CONFIG, **fields)
    with pytest.raises(ValueError, match=message) as error:
        read_layout(name, config)
    assert f"use a {name} axis of {fits} (--mesh {name}={fits}) or leave" in str(error.value)
    assert math.prod(read_layout(name, config, mesh={name: fits}).mesh.shape.values()) == fits


def test_axes_over_the_same_devices_collide_within_an_array_alone(tmp_path):
    def read(lines):
        path = tmp_path / "layout.toml"
        path.write_text("[mesh]\na = 2\nb = 2\n[rules]\n" + lines)
        return read_layout(path, CONFIG)

    read('heads = "a"\nmlp = "a"\nembed = "b"\nbatch = "b"\n')
    for lines, message in [
        (
            'heads = "a"\nembed = "a"\n',
            r"both embed \(32\) and heads \(8\) of layers_\*/attn/o_proj",
        ),
        (
            'mlp = ["a", "b"]\nembed = "b"\n',
            r"embed \(32\) and mlp \(48\) of .* to mesh axis 'b' \(2",
        ),
        ('batch = "a"\nvocab = "a"\n', "both batch and vocab of the logits to mesh axis 'a'"),
        ('heads = ["a", "a"]\n', r"both heads \(8\) and heads \(8\) of"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(lines)


def test_the_activations_that_rules_are_checked_for_are_those_of_the_model(monkeypatch):
    named = set()

    def constrain(x, axes, **_):
        named.add(tuple(axes))
        return x

    monkeypatch.setattr(nn, "with_logical_constraint", constrain)
    token = jnp.zeros((1, 1), jnp.int32)
    jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), token, token)
    # The lookup's result lies as the table does, and gives way where rows or lengths do too.
    assert named == {*rules.ACTIVATIONS.values(), ("batch", "length", "embed")}


@pytest.mark.parametrize("to", [None, (), "a", ("a",)])
def test_rules_in_every_form_that_flax_takes(whole, to):
    tokens, positions, params, expected = whole
    model = Transformer(CONFIG, rules=(("length", to), ("embed", None)))
    mesh = jax.make_mesh((2,), ("a",), (AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = jax.jit(model.apply)({"params": jax.device_get(params)}, tokens, positions)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_mesh_of_one_device_is_none():
    assert read_layout("single", CONFIG) is None
    assert read_layout("fsdp_tensor", CONFIG, mesh={"fsdp": 1, "tensor": 1}) is None
    assert read_layout(None, CONFIG) is None
    with pytest.raises(ValueError, match=r"mesh is \{'tensor': 4\} without a sharding; name one"):
        read_layout(None, CONFIG, mesh={"tensor": 4})


def test_a_mesh_that_does_not_follow_the_network_is_laid_all_the_same(monkeypatch):
    """JAX refuses 2 x 8 on a TPU slice of 4 x 4, whose axes would have to be split."""

    def refuse(*_, **__):
        raise NotImplementedError

    expected = read_layout("data_tensor", CONFIG)
    monkeypatch.setattr(jax, "make_mesh", refuse)
    found = read_layout("data_tensor", CONFIG)
    assert dict(found.mesh.shape) == {"data": 4, "tensor": 2}
    assert found == expected


def test_mesh_sizes_by_hand():
    assert read_layout("data_tensor", CONFIG, mesh={"tensor": 4}).mesh.shape["data"] == 2
    layout = read_layout("data_tensor", CONFIG, mesh={"tensor": 2, "data": 1})
    assert dict(layout.mesh.shape) == {"data": 1, "tensor": 2}
    with pytest.raises(ValueError, match=r"has no mesh axis 'fsdp'; it has \['data', 'tensor'\]"):
        read_layout("data_tensor", CONFIG, mesh={"fsdp": 2})


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
        ("mesh = 3\nrules = 4\n", r"has 3 as mesh; expected a table, \[mesh\]"),
        ("[mesh]\na = 2\n[rules]\nheads = 3\n", "maps heads to 3; expected a mesh axis, or a list"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "layout.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_layout(path, CONFIG)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"data_tensor, expert, .*fsdp, .*, long, single, tensor"):
        read_layout("tensors", CONFIG)
