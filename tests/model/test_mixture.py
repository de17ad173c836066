"""Laws of a model with a mixture of experts: those of a dense model, and of its router."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.checkpoint.lora import Lora, attach, init_adapters, merge
from mistral_jax.checkpoint.quantization import matrices, quantize
from mistral_jax.config import ModelConfig
from mistral_jax.engine.generate import generate
from mistral_jax.engine.sampling import Sampling
from mistral_jax.model.cache import init_cache
from mistral_jax.model.experts import balance_loss
from mistral_jax.model.transformer import Transformer, stack_layers, unstack_layers
from mistral_jax.ops.quantized import QuantizedMatrix
from mistral_jax.training.loss import make_loss_fn
from mistral_jax.training.step import Batch

CONFIG = ModelConfig(
    vocab_size=53,
    num_layers=2,
    embed_dim=32,
    mlp_dim=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    sliding_window=5,
    num_experts=4,
    experts_per_token=2,
)
MODEL = Transformer(CONFIG)
TEXTS = [[1, 5, 9, 30, 2, 41, 17], [1], [7, 8, 9, 10] * 4]
BOUND = 1e-5


@pytest.fixture(scope="module")
def params():
    tokens, positions = tiny.ragged(TEXTS[:1])
    return nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), tokens, positions)["params"])


@pytest.fixture(scope="module")
def batch():
    tokens, positions = tiny.ragged(TEXTS)
    return Batch(tokens, positions, jnp.where(positions >= 0, jnp.roll(tokens, -1, 1), -1))


def differentiate(model, params, batch):
    """Returns the loss, its sums and its gradients."""
    loss_fn = make_loss_fn(model, router_loss=0.3)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, {}, batch, jax.random.key(0))


@pytest.fixture(scope="module")
def loop(params, batch):
    """The loss, sums and gradients of a loop over layers that keeps everything."""
    return differentiate(MODEL, params, batch)


def close(found, expected, bound=BOUND):
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())


def test_parameters_have_an_axis_of_experts(params):
    shapes = {name: x["kernel"].shape for name, x in params["layers_1"]["moe"].items()}
    assert shapes == {
        "router": (4, 32),
        "gate_proj": (4, 20, 32),
        "up_proj": (4, 20, 32),
        "down_proj": (4, 32, 20),
    }
    assert "mlp" not in params["layers_1"]


def test_a_ragged_row_is_that_row_alone(params):
    rows = tiny.forward(MODEL, params, *tiny.ragged(TEXTS))[0]
    for row, text in zip(rows, TEXTS, strict=True):
        close(row[: len(text)], tiny.alone(MODEL, params, text))


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunks_and_decoding_are_the_whole_pass(params, chunk):
    tokens, positions = tiny.ragged(TEXTS[2:])
    expected = tiny.forward(MODEL, params, tokens, positions)[0]
    cache, found = init_cache(CONFIG, 1, tokens.shape[1]), []
    for i in range(0, tokens.shape[1], chunk):
        part = slice(i, i + chunk)
        logits, cache = tiny.forward(MODEL, params, tokens[:, part], positions[:, part], cache)
        found.append(logits)
    close(jnp.concatenate(found, axis=1), expected)


def test_a_text_does_not_depend_on_its_neighbours(params):
    """There is no capacity: rows that choose the same experts do not displace each other."""
    one = functools.partial(generate, MODEL, params, max_new_tokens=8, stop_ids=())
    samplings = [Sampling(1, seed=seed) for seed in range(9)]
    prompts = [*TEXTS, *[[1, 5]] * 6]
    together = one(prompts, sampling=samplings)
    for prompt, sampling, text in zip(prompts[:3], samplings, together, strict=False):
        assert one([prompt], sampling=[sampling])[0].tokens == text.tokens


@pytest.mark.parametrize("remat", [None, "nothing_saveable", "save_products"])
def test_a_scan_and_every_policy_have_the_same_loss_and_gradients(params, batch, loop, remat):
    (expected, sums), grads = loop
    result, stacked = differentiate(
        MODEL.clone(scan=True, remat=remat), stack_layers(params), batch
    )
    others = [(result, unstack_layers(stacked))]
    if remat is not None:
        others.append(differentiate(MODEL.clone(remat=remat), params, batch))
    for (loss, found), own in others:
        close(loss, expected)
        close(found["router_loss"], sums["router_loss"])
        jax.tree.map(functools.partial(close, bound=1e-4), own, grads)


def test_the_balance_loss_is_one_of_all_layers():
    """The smallest value, k, is that of experts that are chosen equally often."""
    even = jnp.stack([jnp.full((3, 4), x) for x in (10.0, 30.0)]).at[:, 0].mul(0.5)
    even = even.at[:, 1].mul(0.25)
    close(balance_loss(even), 2)
    first = jnp.asarray([[[20.0, 20, 0, 0], [10, 10, 0, 0], [20, 20, 20, 20]]])
    assert float(balance_loss(first)) == 4
    # Layers that prefer different experts balance each other.
    close(balance_loss(jnp.concatenate([first, first[..., ::-1]])), 2)


def test_padding_does_not_count_in_the_balance(params):
    @jax.jit
    def loss(tokens, positions):
        targets = jnp.where(positions >= 0, tokens, -1)
        batch = Batch(tokens, positions, targets)
        _, sums = make_loss_fn(MODEL)(params, {}, batch, jax.random.key(0))
        return sums["router_loss"] / sums["targets"]

    tokens, positions = tiny.ragged(TEXTS[:1])
    padded = [jnp.pad(x, ((0, 2), (0, 9)), constant_values=-1) for x in (tokens, positions)]
    close(loss(jnp.maximum(padded[0], 0), padded[1]), loss(tokens, positions))


def test_adapters_beside_experts_are_their_merged_matrices(params):
    lora = Lora(rank=3, alpha=6.0, targets=("gate_proj", "up_proj", "down_proj", "router"))
    adapters = init_adapters(lora, params, jax.random.key(1))
    own = adapters["layers_0"]["moe"]
    assert own["gate_proj"]["lora_a"].shape == (4, 3, 32)
    assert own["down_proj"]["lora_b"].shape == (4, 32, 3)
    assert own["router"]["lora_b"].shape == (4, 3)
    adapters = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 4, adapters
    )
    tokens, positions = tiny.ragged(TEXTS)
    beside = tiny.forward(MODEL, attach(params, adapters, lora.scale), tokens, positions)[0]
    merged = tiny.forward(MODEL, merge(params, adapters, lora.scale), tokens, positions)[0]
    read = np.asarray(positions) >= 0
    close(beside[read], merged[read], 1e-4)
    assert np.abs(np.asarray(beside - tiny.forward(MODEL, params, tokens, positions)[0])).max() > 1


def test_dropout_changes_only_the_adapters(params):
    lora = Lora(rank=2, alpha=4.0, dropout=0.5)
    adapters = init_adapters(lora, params, jax.random.key(1))
    tokens, positions = tiny.ragged(TEXTS)
    model = MODEL.clone(dropout=0.5)

    @jax.jit
    def apply(adapters, seed):
        both = {"params": attach(params, adapters, lora.scale)}
        return model.apply(both, tokens, positions, rngs={"dropout": jax.random.key(seed)})[0]

    read = np.asarray(positions) >= 0
    expected = tiny.forward(MODEL, params, tokens, positions)[0]
    close(apply(adapters, 0)[read], expected[read])  # `lora_b` is 0.
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    first, second = apply(adapters, 0)[read], apply(adapters, 1)[read]
    assert np.isfinite(first).all()
    assert np.abs(np.asarray(first - second)).max() > 1e-3


def test_int8_has_a_scale_for_each_output_of_each_expert_and_leaves_the_router(params):
    copy = jax.tree.map(jnp.array, params)
    small = quantize(copy, "int8", matrices(copy, output=True))
    own = small["layers_0"]["moe"]
    assert not isinstance(own["router"]["kernel"], QuantizedMatrix)
    assert own["gate_proj"]["kernel"].scale.shape == (4, 20, 1)
    assert own["down_proj"]["kernel"].scale.shape == (4, 32, 1)
    wide = jax.tree.map(
        lambda x: x.dequantize(jnp.float32) if isinstance(x, QuantizedMatrix) else x,
        small,
        is_leaf=lambda x: isinstance(x, QuantizedMatrix),
    )
    tokens, positions = tiny.ragged(TEXTS)
    read = np.asarray(positions) >= 0
    found = tiny.forward(MODEL, small, tokens, positions)[0][read]
    close(found, tiny.forward(MODEL, wide, tokens, positions)[0][read], 2e-5)
