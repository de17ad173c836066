"""A cache in 8 bits: that cuts and neighbours do not matter, its size, and how far off it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from mistral_jax.engine import prefill
from mistral_jax.engine.generate import generate
from mistral_jax.model.cache import init_cache
from mistral_jax.ops.backend import PLAIN
from mistral_jax.parallel.sharding import abstract_params, read_layout

TEXT = np.arange(23) * 7 % 53
FIELDS = [
    {"n_layers": 1, "sliding_window": None},
    {"n_layers": 1, "sliding_window": 5},
    pytest.param({"sliding_window": 3, "dilation": 2}, marks=pytest.mark.slow),
]


def build(**fields):
    model, params = tiny.build(**fields)
    return model.clone(kv_cache_dtype="int8"), params


def read(model, params, cuts, rows=1):
    """Returns the logits of a text that is read in parts of so many tokens, and the cache."""
    cache, start, found = init_cache(model.config, rows, 30, jnp.int8), 0, []
    for size in cuts:
        part = np.tile(TEXT[start : start + size], (rows, 1))
        places = np.tile(np.arange(start, start + size, dtype=np.int32), (rows, 1))
        logits, cache = tiny.forward(model, params, part, places, cache)
        found.append(logits[-1])
        start += size
    return np.concatenate(found), cache


def assert_near(found, expected):
    """A number in the middle between two of 8 bits may be rounded either way, and then tells."""
    off = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    assert np.median(off) < 1e-5
    assert off.max() < 1e-2


@pytest.mark.parametrize(
    "fields", [FIELDS[0], pytest.param(FIELDS[1], marks=pytest.mark.slow), FIELDS[2]]
)
@pytest.mark.parametrize("kernel", [True, False])
def test_logits_do_not_depend_on_how_the_text_is_cut(fields, kernel):
    model, params = build(**fields)
    if not kernel:
        model = model.clone(backend=PLAIN)
    whole, _ = read(model, params, [23])
    for cuts in ([1] * 23, [4, 4, 11, 4], [11, 1, 11]):  # of few sizes: each is a program
        for rows in (1, 3):
            found, _ = read(model, params, cuts, rows)
            assert_near(found, whole)


@pytest.mark.parametrize("fields", FIELDS)
def test_they_are_those_of_keys_and_values_rounded_one_by_one(fields, monkeypatch):
    """By the plain reference, whose keys and values are rounded as the definition says."""

    def rounded(x):
        scale = np.abs(x).max(-1, keepdims=True) / 127.5
        return np.clip(np.round(x / scale), -127, 127) * scale

    config = tiny.OFFICIAL | fields
    tensors = reference.random_tensors(config, 0)
    model, params = build(**fields)
    found, _ = read(model, params, [23])
    attention, rotate = reference.attention, reference.rotate

    def attend(config, layer, x, i):
        # Keys are rotated last, and values are what is left of the layer's products.
        turned = iter((rotate, lambda x, *turns: rounded(rotate(x, *turns))))
        monkeypatch.setattr(reference, "rotate", lambda x, *turns: next(turned)(x, *turns))
        heads = config["n_kv_heads"], config["head_dim"]
        v = (x @ layer["attention.wv.weight"].T).reshape(len(x), *heads)
        # The least-squares weights that make these values of x: exact, for x has full row rank.
        wanted = rounded(v).reshape(len(x), -1)
        weight = np.linalg.lstsq(x, wanted, rcond=None)[0].T
        np.testing.assert_allclose(x @ weight.T, wanted, atol=1e-9)
        return attention(config, layer | {"attention.wv.weight": weight}, x, i)

    monkeypatch.setattr(reference, "attention", attend)
    expected = reference.forward(config, tensors, TEXT)
    assert_near(found, expected)


def test_it_is_near_what_it_rounds_and_takes_a_quarter():
    model, params = build(sliding_window=8)
    exact, rough = tiny.alone(model, params, TEXT), read(model, params, [23])[0]
    difference = np.abs(rough - exact).max() / np.abs(exact).max()
    assert 1e-5 < difference < 3e-2
    shapes = [
        jax.eval_shape(lambda dtype=dtype: init_cache(model.config, 2, 30, dtype))
        for dtype in (jnp.float32, jnp.int8)
    ]
    wide, small = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim == 4)
        for cache in shapes
    )
    assert small == wide // 4 + wide // (4 * model.config.head_dim) * 4


@pytest.mark.parametrize("name", ["tensor", "data_tensor", "fsdp", "long"])
def test_devices_hold_their_part_of_it_and_compute_what_one_does(name):
    model, params = build(n_heads=8, hidden_dim=48, vocab_size=96, sliding_window=8)
    rows = [np.roll(TEXT, i).tolist() for i in range(8)]
    _, expected = prefill.prefill(model, params, rows, 40)
    layout = read_layout(name, model.config)
    split = model.clone(rules=layout.rules)
    places = jax.tree.map(lambda x: x.sharding, abstract_params(split, layout))
    with jax.set_mesh(layout.mesh):
        cache, found = prefill.prefill(split, jax.device_put(params, places), rows, 40)
    assert_near(np.asarray(found), np.asarray(expected))
    for part in (cache[0].k, cache[0].v):
        for x in (part.values, part.scale):
            own = x.shape[0] // layout.parts("batch"), 8, 2 // layout.parts("kv_heads")
            assert x.sharding.shard_shape(x.shape)[:3] == own


def test_rows_of_different_lengths_do_not_disturb_each_other():
    model, params = build(sliding_window=5)
    prompts = [TEXT[:9].tolist(), TEXT[:2].tolist(), TEXT[3:20].tolist()]
    together = generate(model, params, prompts, 12, stop_ids=())
    for i, prompt in enumerate(prompts):
        filler = [prompt if j == i else [5] for j in range(3)]
        alone = generate(model, params, filler, 12, stop_ids=())[i]
        assert together[i].tokens == alone.tokens
