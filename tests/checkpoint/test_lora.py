"""Adapters: nothing at first, equal merged and unmerged, in any projection; and who gets one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from mistral_jax.checkpoint.lora import Lora, adapter_shardings, attach, init_adapters, merge
from mistral_jax.parallel.sharding import abstract_params, read_layout

MODEL, PARAMS = tiny.build(sliding_window=None)
TEXT = np.arange(11) % 53
SOME = Lora(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "o_proj", "down_proj", "lm_head"))


def random_adapters(lora=SOME, params=PARAMS):
    """Returns adapters that change a lot, but do not blow up the last bit of a weight."""

    @jax.jit
    def draw(key):
        adapters = init_adapters(lora, params, key)
        return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), adapters)

    return draw(jax.random.key(7))


def test_new_adapters_change_nothing_at_all():
    adapters = init_adapters(SOME, PARAMS, jax.random.key(0))
    plain = tiny.alone(MODEL, PARAMS, TEXT)
    np.testing.assert_array_equal(tiny.alone(MODEL, attach(PARAMS, adapters, 2.0), TEXT), plain)
    chex.assert_trees_all_equal(merge(PARAMS, adapters, 2.0), PARAMS)
    for path, array in flatten_dict(adapters).items():
        assert array.dtype == jnp.float32
        assert (path[-1] == "lora_b") == (not array.any())


@pytest.mark.parametrize("lora", [SOME, Lora(rank=1), Lora(rank=9, alpha=6.0, rslora=True)])
def test_merged_equals_unmerged(lora):
    adapters = random_adapters(lora)
    plain = tiny.alone(MODEL, PARAMS, TEXT)
    beside = tiny.alone(MODEL, attach(PARAMS, adapters, lora.scale), TEXT)
    merged = tiny.alone(MODEL, merge(PARAMS, adapters, lora.scale), TEXT)
    assert np.abs(beside - plain).max() > 0.1 * np.abs(plain).max()
    np.testing.assert_allclose(merged, beside, atol=1e-5 * np.abs(beside).max())


def test_the_product_is_the_papers():
    """W + alpha / R * B A, by NumPy, with heads unfolded."""
    adapters = random_adapters()
    merged = merge(PARAMS, adapters, SOME.scale)["layers_1"]["attn"]["o_proj"]["kernel"]
    own = adapters["layers_1"]["attn"]["o_proj"]
    product = np.asarray(own["lora_b"]) @ np.asarray(own["lora_a"]).reshape(3, -1)
    kernel = np.asarray(PARAMS["layers_1"]["attn"]["o_proj"]["kernel"]).reshape(32, -1)
    expected = kernel + 5 / 3 * product
    np.testing.assert_allclose(merged.reshape(32, -1), expected, rtol=1e-5, atol=1e-6)


def test_only_what_is_named_gets_an_adapter():
    found = {path[-2] for path in flatten_dict(random_adapters())}
    assert found == set(SOME.targets)
    shapes = {path[-2:]: x.shape for path, x in flatten_dict(random_adapters()).items()}
    assert shapes["q_proj", "lora_a"] == (3, 32)
    assert shapes["q_proj", "lora_b"] == (4, 8, 3)
    assert shapes["o_proj", "lora_a"] == (3, 4, 8)


def test_dropout_drops_inputs_of_adapters_only_where_there_is_an_rng():
    model = MODEL.clone(dropout=0.5)
    params = attach(PARAMS, random_adapters(), 1.0)
    tokens, positions = tiny.ragged([TEXT])

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, params, *seed):
        rngs = {"dropout": jax.random.key(*seed)} if seed else None
        return model.apply({"params": params}, tokens, positions, rngs=rngs)[0]

    np.testing.assert_array_equal(logits(model, params), logits(MODEL, params))
    np.testing.assert_array_equal(logits(model, PARAMS, 1), logits(MODEL, PARAMS))
    np.testing.assert_array_equal(logits(model, params, 1), logits(model, params, 1))
    assert np.abs(logits(model, params, 1) - logits(model, params, 2)).max() > 0.1
    # On average nothing changes, to first order: kept inputs are as much larger.
    small = attach(PARAMS, random_adapters(Lora(4, targets=("lm_head",))), 1.0)
    seeds = jnp.arange(400)
    mean = jnp.mean(jax.lax.map(lambda seed: logits(model, small, seed), seeds), axis=0)
    exact = logits(MODEL, small)
    assert np.abs(mean - exact).max() < 0.2 * np.abs(exact - logits(MODEL, PARAMS)).max()


def test_adapters_lie_as_their_kernels_do():
    model, _ = tiny.build(vocab_size=64)
    layout = read_layout("fsdp_tensor", model.config, mesh={"fsdp": 2, "tensor": 2})
    params = abstract_params(model, layout)
    adapters = jax.eval_shape(lambda key: init_adapters(Lora(4), params, key), jax.random.key(0))
    places = adapter_shardings(params, adapters)["layers_0"]["attn"]
    kernel = params["layers_0"]["attn"]["q_proj"]["kernel"].sharding.spec
    assert places["q_proj"]["lora_a"].spec == P(None, kernel[2])
    assert places["q_proj"]["lora_b"].spec == P(*kernel[:2], None)
    kernel = params["layers_0"]["attn"]["o_proj"]["kernel"].sharding.spec
    assert places["o_proj"]["lora_a"].spec == P(None, *kernel[1:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("wq",)}, "targets has 'wq'; expected some of q_proj, k_proj"),
        ({"targets": ()}, "targets is empty"),
        ({"rank": 0}, "rank is 0; expected an integer of at least 1"),
        ({"dropout": 1.0}, r"dropout is 1\.0; expected less than 1"),
        ({"alpha": 0.0}, r"alpha is 0\.0"),
    ],
)
def test_refuses_what_makes_no_adapter(fields, message):
    with pytest.raises(ValueError, match=message):
        Lora(**fields)


def test_refuses_adapters_of_another_model():
    _, params = tiny.build(tied=True)
    with pytest.raises(ValueError, match="no projection 'lm_head'"):
        init_adapters(Lora(targets=("lm_head",)), params, jax.random.key(0))
    deeper, _ = tiny.build(n_layers=3)
    adapters = init_adapters(Lora(), abstract_params(deeper), jax.random.key(0))
    with pytest.raises(ValueError, match=r"layers_2/attn/.*which the model does not have"):
        attach(PARAMS, adapters)
