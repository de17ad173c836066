"""The TPU's kernel for prompts attends as the plain path does: interpreted, and lowered."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from test_splash import RULES, on_mesh

from mistral_jax.model.attention import attend
from mistral_jax.model.cache import LayerCache, init_cache, line_up, round_for, write
from mistral_jax.ops import flash, norm, rotation
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.quantized import QuantizedMatrix

TPU = Backend("tpu", alone=True, kernels=("flash",))
LENGTH, SLOTS = 70, 200
# Tokens before the chunk, padding before the chunk's tokens, and their number: a row whose ring is
# overwritten, a row with padding, a row that begins, and a row without tokens.
ROWS = ((330, 0, 70), (90, 5, 60), (0, 0, 40), (0, 0, 0))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "QUERIES", 32)
    monkeypatch.setattr(flash, "KEYS", 128)


def chunk_positions(rows=ROWS):
    positions = np.full((len(rows), LENGTH), -1, np.int32)
    for row, (start, column, count) in zip(positions, rows, strict=True):
        row[column : column + count] = np.arange(start, start + count)
    return jnp.asarray(positions)


def example(slots=SLOTS, dtype=jnp.float32, kept=None, heads=4, kv_heads=2, head_dim=8, rows=ROWS):
    """Makes queries, a chunk's keys and values [B, T, K, H], and a cache after earlier tokens.

    The slots that no token fills have NaN, and so have those that the cache's values hold.
    """
    rng = np.random.default_rng(slots)

    def draw(length, heads):
        shape = (len(rows), length, heads, head_dim)
        return jnp.asarray(rng.standard_normal(shape), dtype)

    cache = LayerCache(
        *[jnp.zeros((len(rows), kv_heads, slots, head_dim), kept or dtype)] * 2,
        jnp.full((len(rows), slots), -1, jnp.int32),
        by_heads=True,
    )
    if kept == jnp.int8:
        scale = jnp.zeros(cache.k.shape[:3], jnp.float32)
        cache = cache.replace(k=QuantizedMatrix(cache.k, scale), v=QuantizedMatrix(cache.v, scale))
    before = max(start for start, *_ in rows)
    places = jnp.arange(before, dtype=jnp.int32)[None]
    places = jnp.where(places < jnp.array([[start] for start, *_ in rows]), places, -1)
    k, v = (round_for(cache, draw(before, kv_heads)) for _ in range(2))
    cache = write(cache, k, v, places)

    def spoil(axis, x):
        empty = (cache.positions < 0)[:, None, :, None]
        if x.ndim == 2 or x.dtype == jnp.int8:
            return x
        return jnp.where(empty if x.ndim == 4 else empty[..., 0], jnp.nan, x)

    k, v = (round_for(cache, draw(LENGTH, kv_heads)) for _ in range(2))
    return draw(LENGTH, heads), k, v, cache.map(spoil), chunk_positions(rows)


def plain(q, k, v, cache, positions, window):
    """Attends to all keys side by side, in XLA's operations."""
    sound = cache.map(lambda axis, x: jnp.nan_to_num(x))
    seen, _ = line_up(sound, k, v, positions)
    return attend(q, seen.k, seen.v, positions, seen.positions, window, by_heads=True)


def kernel(q, k, v, cache, positions, window, rules=(), **options):
    chunk = cache.ordered(k, v, positions)
    return flash.attend(q, chunk, cache, window, rules, interpret=True, **options)


def compare(arrays, window, atol):
    found = jax.jit(functools.partial(kernel, window=window))(*arrays)
    assert np.isfinite(found.astype(jnp.float32)).all()
    tokens = np.asarray(arrays[-1] >= 0)
    expected = plain(*arrays, window)
    assert found.dtype == expected.dtype
    error = np.abs(found.astype(jnp.float32) - expected.astype(jnp.float32))[tokens]
    assert error.max() <= atol


@pytest.mark.parametrize(
    ("window", "slots"),
    [
        (200, 200),
        (1, 200),
        (150, 200),  # a ring with slots for drafts
        (None, 400),
        *(pytest.param(w, s, marks=pytest.mark.slow) for w, s in ((64, 64), (40, 256), (300, 400))),
    ],
)
def test_it_attends_to_the_cache_and_to_the_chunk(window, slots):
    compare(example(slots), window, 2e-6)


@pytest.mark.parametrize("kept", [None, pytest.param(jnp.int8, marks=pytest.mark.slow)])
def test_queries_may_be_multiplied_by_the_factor_of_scores_before(kept):
    q, *rest = example(kept=kept, heads=6)  # Three heads for each key.
    scaled = q * np.float32(flash.factor(q.shape[-1]))
    found = jax.jit(functools.partial(kernel, window=200, scaled=True))(scaled, *rest)
    expected = plain(q, *rest, 200)
    tokens = np.asarray(rest[-1] >= 0)
    np.testing.assert_allclose(found[tokens], expected[tokens], rtol=0, atol=4e-6)


@pytest.mark.parametrize("window", [pytest.param(200, marks=pytest.mark.slow), None])
def test_keys_of_8_bits_keep_their_scales_in_float32(window):
    compare(example(SLOTS if window else 400, kept=jnp.int8), window, 4e-6)


def test_low_precision_operands_still_score_and_sum_in_float32():
    arrays = example(dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
    expected = plain(*wide, 200)
    found = jax.jit(functools.partial(kernel, window=200))(*arrays)
    tokens = np.asarray(arrays[-1] >= 0)
    error = np.abs(found.astype(jnp.float32) - expected)[tokens]
    # Weights and the result are rounded to 8 bits.
    assert error.max() <= 2.0**-8 * np.abs(wide[2]).max()


def test_a_slot_that_does_not_hold_the_token_of_its_place_is_not_seen():
    """For instance a draft that was taken back, or a text that begins at a later position."""
    q, k, v, cache, positions = example()
    stale = cache.positions.at[:, 40:60].set(-1).at[0, 7].set(400).at[1, 130:].set(95)
    compare((q, k, v, cache.replace(positions=stale), positions), 200, 2e-6)


@pytest.mark.parametrize("window", [None, 200, 50])
def test_it_visits_only_blocks_of_keys_that_a_query_sees(window):
    *_, cache, positions = example(400 if window is None else SLOTS)
    expected, own = flash._by_block(cache.positions), flash._by_block(positions)
    expected, own = (jnp.where(x < 0, flash.HIDDEN, x) for x in (expected, own))
    queries = flash._fill(positions, 1, 32, -1).reshape(len(ROWS), -1, 32)
    counts, steps = map(np.asarray, flash._schedule(queries, expected, own, window))
    keys = np.concatenate([np.asarray(x)[:, :, 0] for x in (expected, own)], axis=1)
    for row, block in np.ndindex(*counts.shape):
        asked = np.asarray(queries[row, block])
        asked = asked[asked >= 0]
        distance = asked[:, None, None] - keys[row].astype(np.int64)
        seen = (distance >= 0) & (distance < (window or 10**6))
        needed = [place for place in range(len(keys[row])) if seen[:, place].any()]
        assert counts[row, block] == len(needed)
        assert [step >> 1 for step in steps[row, block, : len(needed)]] == needed
        for step in steps[row, block, : len(needed)]:
            assert step & 1 == seen[:, step >> 1].all()
    assert not counts[3].any()
    assert counts[2].max() < counts[0].max()


def test_a_model_with_all_kernels_of_prompts_reads_chunks_as_the_plain_model_does(monkeypatch):
    for module, name in ((flash, "_run_kernel"), (norm, "_run_kernel"), (rotation, "_run_kernel")):
        run = getattr(module, name)

        def interpreted(*arguments, run=run, **options):
            return run(*arguments, **(options | {"interpret": True}))

        monkeypatch.setattr(module, name, interpreted)
    sizes = {"n_layers": 1, "dim": 128, "n_heads": 2, "n_kv_heads": 1, "head_dim": 128}
    model, params = tiny.build(**sizes, sliding_window=150)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (1, 256)), jnp.int32)
    places = jnp.arange(256, dtype=jnp.int32)[None]
    logits = []
    for backend in (PLAIN, TPU):
        # 150 slots are no whole lanes, so that XLA writes the cache.
        cache = init_cache(model.config, 1, 256, by_heads=True)
        apply = jax.jit(model.clone(backend=backend).apply)
        for start in (0, 128):
            part = slice(start, start + 128)
            found, cache = apply({"params": params}, tokens[:, part], places[:, part], cache)
            logits.append(found)
    np.testing.assert_allclose(logits[2], logits[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[3], logits[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((4, 1, 1), marks=pytest.mark.slow)])
def test_on_a_mesh_each_device_attends_for_its_rows_and_heads(sizes):
    arrays = example()
    cache = arrays[3]
    run = jax.jit(functools.partial(kernel, window=200))
    expected = run(*arrays)
    with on_mesh(*sizes):
        by_heads = PartitionSpec("data", "kv")
        rows, keys = PartitionSpec("data"), PartitionSpec("data", None, "kv")
        places = PartitionSpec("data", None, ("kv", "group")), keys, keys
        places += (cache.map(lambda axis, x: rows if x.ndim == 2 else by_heads), rows)
        split = jax.tree.map(jax.device_put, arrays, places)
        assert (
            flash.fits(split[0].astype(jnp.float32), cache.k, RULES, TPU) is False
        )  # narrow heads
        run = jax.jit(functools.partial(kernel, window=200, rules=RULES))
        found, program = run(*split), run.lower(*split).compile().as_text()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert not re.findall(r"all-\w+|collective-permute|reduce-scatter", program)


@pytest.mark.parametrize(
    ("dtype", "kept", "window", "slots"),
    [
        ("bfloat16", None, 4096, 4096),
        ("bfloat16", "int8", None, 32768),
        ("float32", None, None, 512),
    ],
)
def test_a_layer_of_7b_lowers_for_a_tpu_and_holds_no_scores(
    monkeypatch, dtype, kept, window, slots
):
    monkeypatch.setattr(flash, "QUERIES", 512)
    monkeypatch.setattr(flash, "KEYS", 1024)
    describe = jax.ShapeDtypeStruct

    def keys(length):
        values = describe((1, 8, length, 128), kept or dtype)
        if kept:
            values = QuantizedMatrix(values, describe((1, 8, length), jnp.float32))
        return LayerCache(values, values, describe((1, length), jnp.int32), by_heads=True)

    q = describe((1, 1024, 32, 128), dtype)
    run = jax.jit(lambda q, chunk, cache: flash.attend(q, chunk, cache, window))
    exported = jax.export.export(run, platforms=["tpu"])(q, keys(1024), keys(slots))
    text = exported.mlir_module()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 1
    assert "cost_estimate" in text
    arrays = {tuple(map(int, shape.split("x"))) for shape in re.findall(r"<([\dx]+)x\w", text)}
    assert max(map(math.prod, arrays)) == max(32 * 1024, 8 * slots) * 128


def test_it_says_which_arrays_it_takes():
    q, _, _, cache, _ = example(head_dim=128)
    fits = functools.partial(flash.fits, rules=(), backend=TPU)
    assert fits(q, cache.k)
    assert fits(q, example(head_dim=128, kept=jnp.int8)[3].k)
    assert fits(*(x.astype(jnp.bfloat16) for x in (q, cache.k)))
    assert not fits(*(x.astype(jnp.float16) for x in (q, cache.k)))
    assert not fits(q, cache.k.astype(jnp.bfloat16))
    assert not fits(q, cache.k, backend=PLAIN)
    assert not fits(q, cache.k, backend=Backend("tpu", kernels=("flash",)))
    assert not fits(*(x[..., :64] for x in (q, cache.k)))
    with on_mesh(2, 2, 2):
        assert fits(q, cache.k, rules=RULES)
        assert not fits(q, cache.k)
    with on_mesh(8, 1, 1):  # 4 rows on 8 devices
        assert not fits(q, cache.k, rules=RULES)
