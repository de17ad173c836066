"""A mixture of experts laid out by any rule file computes what it does on one device."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.checkpoint.lora import Lora, attach, init_adapters
from mistral_jax.checkpoint.quantization import matrices, quantize
from mistral_jax.config import CONFIG_DIR, ModelConfig
from mistral_jax.engine.generate import generate
from mistral_jax.engine.sampling import Sampling
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN
from mistral_jax.parallel.sharding import abstract_params, read_layout
from mistral_jax.training.loss import make_loss_fn
from mistral_jax.training.step import Batch

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
    num_experts=8,
    experts_per_token=2,
)
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)
NAMES = sorted({path.stem for path in (CONFIG_DIR / "sharding").glob("*.toml")} - {"single"})
TEXTS = [[1, 7, 9], [1, *range(10, 41)], [5], [3] * 20, [4] * 9, [6, 7] * 8, [2], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def whole():
    """Parameters, and a batch."""
    tokens, positions = tiny.ragged(TEXTS)
    init = jax.jit(Transformer(CONFIG).init)
    params = nn.unbox(init(jax.random.key(1), tokens, positions)["params"])
    return params, Batch(tokens, positions, jnp.where(positions >= 0, jnp.roll(tokens, -1, 1), -1))


@pytest.fixture(scope="module")
def on_one_device(whole):
    """The loss, sums and gradients on one device, by the number of layers."""
    params, batch = whole
    first = {name: x for name, x in params.items() if name != "layers_1"}
    return {
        1: (first, compute(Transformer(ONE_LAYER), first, batch)),
        2: (params, compute(Transformer(CONFIG), params, batch)),
    }


def compute(model, params, batch):
    differentiate = jax.value_and_grad(make_loss_fn(model, router_loss=0.1), has_aux=True)
    return jax.jit(differentiate)(params, {}, batch, jax.random.key(0))


def place(layout, params, config=CONFIG):
    model = Transformer(config, rules=layout.rules, backend=PLAIN)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout))
    return model, jax.device_put(params, shardings)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, 2 if "expert" in name else 1) for name in NAMES),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in NAMES if "expert" not in name),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(whole, on_one_device, name, layers):
    _, batch = whole
    params, expected = on_one_device[layers]
    layout = read_layout(name, CONFIG)
    model, placed = place(layout, params, CONFIG if layers == 2 else ONE_LAYER)
    rows = jax.device_put(batch, layout.sharding("batch", "length"))
    with jax.set_mesh(layout.mesh):
        found = compute(model, placed, rows)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("expert_tensor", "int8"), ("fsdp_expert", "lora"), ("expert", "lora")]
)
def test_text_is_that_of_one_device(whole, name, kind):
    """Also of int8 experts and of adapters; and of fewer rows than the mesh divides."""
    params = jax.tree.map(jnp.array, whole[0])
    lora = Lora(rank=2, alpha=4.0, targets=("gate_proj", "down_proj", "router"))

    def prepared(params):
        if kind == "int8":
            return quantize(params, kind, matrices(params, output=True))
        adapters = init_adapters(lora, params, jax.random.key(2))
        return attach(params, jax.tree.map(lambda x: x + 0.05, adapters))

    layout = read_layout(name, CONFIG)
    model, placed = place(layout, params)
    greedy = {"max_new_tokens": 6, "sampling": Sampling(0), "stop_ids": ()}
    expected = generate(Transformer(CONFIG), prepared(params), TEXTS[:3], **greedy)
    found = generate(model, prepared(placed), TEXTS[:3], **greedy)
    assert [x.tokens for x in found] == [x.tokens for x in expected]


def test_each_device_holds_its_experts():
    layout = read_layout("expert_tensor", CONFIG)
    shapes = abstract_params(Transformer(CONFIG), layout)["layers_0"]["moe"]
    held = {name: x["kernel"].sharding.shard_shape(x["kernel"].shape) for name, x in shapes.items()}
    assert held == {
        "router": (8, 32),
        "gate_proj": (2, 24, 32),
        "up_proj": (2, 24, 32),
        "down_proj": (2, 32, 24),
    }


def test_what_does_not_divide_is_refused_by_name(tmp_path):
    config = dataclasses.replace(CONFIG, num_experts=6)
    with pytest.raises(ValueError, match=r"maps expert \(6\) of layers_\*/moe/\w+_proj/kernel"):
        read_layout("expert", config)
    file = tmp_path / "both.toml"
    file.write_text('[mesh]\nx = -1\n[rules]\nexpert = "x"\nmlp = "x"\n')
    message = "maps both expert (8) and mlp (48) of layers_*/moe/down_proj/kernel to mesh axis 'x'"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_layout(file, CONFIG)
