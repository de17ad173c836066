"""Laws of the rolling-buffer cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.config import ModelConfig
from mistral_jax.model.cache import LayerCache, init_cache, write
from mistral_jax.ops.backend import PLAIN, Backend


def cache_bytes(config, batch_size, length, dtype=jnp.bfloat16):
    cache = jax.eval_shape(lambda: init_cache(config, batch_size, length, dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def test_a_windowed_cache_stops_growing_at_its_window():
    config = ModelConfig.from_name("mistral-7b-v0.1")
    slot = config.num_layers * (2 * 2 * config.num_kv_heads * config.head_dim + 4)
    for length in (1, 10, 4095, 4096):
        assert cache_bytes(config, 1, length) == length * slot
    for length in (4097, 32768, 10**9):
        assert cache_bytes(config, 1, length) == 4096 * slot


def test_a_short_request_on_a_long_model_is_small():
    config = ModelConfig.from_name("mistral-7b-v0.3")
    assert config.max_positions == 32768
    assert cache_bytes(config, 1, 10) * 3276 < cache_bytes(config, 1, 32768)
    assert cache_bytes(config, 1, 10) == 10 * (128 * 1024 + 32 * 4)  # 128 KiB and places


def test_each_layer_has_its_own_slots_and_starts_empty():
    fields = {"sliding_window": [None, 4, 30, 4, 4], "dilation": [2, 1, 1, 3, 9]}
    config = tiny.build(n_layers=5, **fields)[0].config
    cache = init_cache(config, 2, 20, jnp.bfloat16)
    assert [layer.k.shape for layer in cache] == [(2, s, 2, 8) for s in (20, 4, 20, 10, 20)]
    for layer in cache:
        assert layer.k.dtype == layer.v.dtype == jnp.bfloat16
        assert (layer.positions == -1).all()
        assert not layer.k.any()
        assert not layer.v.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_no_two_arrays_share_a_buffer(dtype):
    """The arrays of an empty cache can be donated to a step, each in its own place."""
    cache = init_cache(tiny.build()[0].config, 1, 20, dtype)
    count = jax.jit(lambda cache: jax.tree.map(lambda x: x + 1, cache), donate_argnums=0)
    for layer in count(cache):
        for x in jax.tree.leaves((layer.k, layer.v)):
            assert (x == 1).all()


@pytest.mark.parametrize(
    ("by_heads", "backend"), [(False, PLAIN), (True, PLAIN), (True, Backend("gpu"))]
)
@pytest.mark.parametrize("slots", [1, 4])
def test_write_keeps_the_last_tokens_of_each_row_however_the_text_is_cut(slots, by_heads, backend):
    rng = np.random.default_rng(slots)
    lengths = (0, 3, 23)
    write_part = jax.jit(functools.partial(write, backend=backend))
    texts = rng.standard_normal((2, len(lengths), 23, 2, 4)).astype(np.float32)
    for chunk in (1, slots + 1, 3 * slots, 23):
        cache = LayerCache(
            k=jnp.zeros((3, slots, 2, 4)),
            v=jnp.zeros((3, slots, 2, 4)),
            positions=jnp.full((3, slots), -1),
        )
        if by_heads:
            cache = cache.replace(by_heads=True).ordered(cache.k, cache.v, cache.positions)
        for start in range(0, 23, chunk):
            places = np.arange(start, min(start + chunk, 23))
            positions = np.where(places < np.array(lengths)[:, None], places, -1)
            cache = write_part(cache, *texts[:, :, start : start + chunk], positions)
        cache = jax.device_get(cache)
        k, v = (x.swapaxes(1, 2) if by_heads else x for x in (cache.k, cache.v))
        for row, length in enumerate(lengths):
            for slot in range(slots):
                last = max((p for p in range(length) if p % slots == slot), default=-1)
                last = last if last >= length - slots else -1
                assert cache.positions[row, slot] == last
                expected = texts[:, row, last] if last >= 0 else np.zeros((2, 2, 4))
                np.testing.assert_array_equal([k[row, slot], v[row, slot]], expected)


def test_the_later_of_two_tokens_for_a_slot_wins_wherever_it_stands():
    """A scatter has no order: only one of them may be written at all."""
    cache = LayerCache(
        k=jnp.zeros((1, 3, 1, 1)), v=jnp.zeros((1, 3, 1, 1)), positions=jnp.full((1, 3), -1)
    )
    positions = jnp.array([[7, 2, 6, 4, 3, 5]])
    values = positions[:, :, None, None].astype(jnp.float32)
    np.testing.assert_array_equal(write(cache, values, values, positions).positions, [[6, 7, 5]])


def test_write_casts_to_the_dtype_of_the_cache():
    config = tiny.build()[0].config
    layer = init_cache(config, 1, 4, jnp.bfloat16)[0]
    new = write(layer, jnp.ones((1, 1, 2, 8)), jnp.ones((1, 1, 2, 8)), jnp.zeros((1, 1), jnp.int32))
    assert new.k.dtype == new.v.dtype == jnp.bfloat16
    assert new.k[0, 0].all()
