"""Laws of attention in pieces, over a ring or a cache that holds all, against loops in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_attention import PATTERNS, dense, qkv

from mistral_jax.model.attention import attend
from mistral_jax.model.cache import LayerCache, init_cache, line_up, write
from mistral_jax.ops import attention, cudnn, pieces
from mistral_jax.ops.backend import PLAIN, Backend

# Of each row: tokens already in the cache, and columns of padding before and after the chunk's.
ROWS = [(30, 0, 0), (3, 2, 1), (7, 99, 0), (0, 3, 0), (0, 0, 2), (1, 1, 0)]
END = 48
WAYS = {
    "pieces": Backend(alone=True),
    "blocks": PLAIN,
    "cudnn": Backend("gpu", "9.0", True, ("cudnn",)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes at which a few tokens take every path."""
    monkeypatch.setattr(pieces, "PIECE", 4)
    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "UNROLLED_BLOCKS", 2)
    monkeypatch.setattr(cudnn, "BLOCK", 4)


def rows_of(length):
    """Returns queries of a chunk, keys and values of whole texts, and the chunk's positions."""
    q, k, v = qkv(length, END, batch=len(ROWS))
    columns = np.arange(length)
    positions = [
        np.where((columns >= before) & (columns < length - after), start + columns - before, -1)
        for start, before, after in ROWS
    ]
    return q, k, v, np.stack(positions)


@functools.partial(jax.jit, static_argnums=2)
def held(k, v, slots):
    """Fills a cache with what each row has seen before the chunk."""
    empty = [jnp.zeros((len(ROWS), slots, *k.shape[2:])) for _ in "kv"]
    cache = LayerCache(*empty, jnp.full((len(ROWS), slots), -1, jnp.int32))
    places = np.arange(END)[None]
    seen = np.where(places < np.array(ROWS)[:, :1], places, -1)
    return write(cache, k, v, seen)


def chunk_of(x, positions):
    """Takes the chunk's own columns of whole texts."""
    return np.take_along_axis(np.asarray(x), np.maximum(positions, 0)[..., None, None], axis=1)


@pytest.mark.parametrize("way", ["pieces", "blocks", "cudnn"])
@pytest.mark.parametrize(
    "length",
    [2, 7, pytest.param(4, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)],
)
def test_a_chunk_sees_through_ring_and_cache_what_it_sees_in_the_whole_text(
    monkeypatch, length, way
):
    look = functools.partial(attend, backend=WAYS[way])
    # XLA's product takes the kernel's place, and float32.
    monkeypatch.setattr(cudnn, "fits", lambda *_: way == "cudnn")
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    q, k, v, positions = rows_of(length)
    new_k, new_v = chunk_of(k, positions), chunk_of(v, positions)

    @jax.jit
    def every_pattern(cache, rings):
        whole = write(cache, new_k, new_v, positions)
        origin = jnp.zeros(len(ROWS), jnp.int32)
        found = []
        for pattern, ring in zip(PATTERNS, rings, strict=True):
            in_place = whole.k, whole.v, positions, whole.positions
            found.append([look(q, *in_place, *pattern, origin=origin)])
            if ring is None:
                continue
            swapped = ring.replace(by_heads=True).ordered(ring.k, ring.v, ring.positions)
            for by_heads, held_in in ((False, ring), (True, swapped)):
                seen, origin_of_ring = line_up(held_in, new_k, new_v, positions)
                lined = seen.k, seen.v, positions, seen.positions
                given = {"aligned": True, "origin": origin_of_ring, "by_heads": by_heads}
                found[-1].append(look(q, *lined, *pattern, **given))
        return found

    spans = [None if window is None else (window - 1) * by + 1 for window, by in PATTERNS]
    rings = [None if span is None else held(k, v, span) for span in spans]
    places = np.tile(np.arange(END), (len(ROWS), 1))
    for pattern, found in zip(PATTERNS, every_pattern(held(k, v, 43), rings), strict=True):
        expected = dense(q, k, v, positions, places, *pattern)
        for ours in found:
            assert np.isfinite(ours).all()
            np.testing.assert_allclose(
                ours, np.where(np.isnan(expected), ours, expected), atol=2e-6
            )


def test_keys_that_nobody_can_see_are_not_read():
    """Before the window and after the chunk: they are no numbers, and would spoil the result."""
    q, k, v, positions = rows_of(8)
    whole = LayerCache(k, v, np.tile(np.arange(END), (len(ROWS), 1)))
    places, expected = np.arange(END), dense(q, k, v, positions, whole.positions, 5)
    for row, (start, before, after) in enumerate(ROWS[:2]):
        stop = start + 8 - before - after
        # A piece is of 4 keys, and begins with the first that the first query sees.
        near = (places >= max(0, start - 4)) & (places < stop + 3)
        spoilt = [jnp.where(near[None, :, None, None], x, np.nan) for x in (k, v)]
        origin = jnp.zeros(len(ROWS), jnp.int32)
        given = q, *spoilt, positions, whole.positions, 5
        ours = attend(*given, origin=origin, backend=WAYS["pieces"])[row]
        real = positions[row] >= 0
        np.testing.assert_allclose(ours[real], expected[row, real], atol=2e-6)


@pytest.mark.parametrize("slots", [1, 4, 6])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_ring_and_a_chunk_are_lined_up_by_their_places(slots, length):
    _, k, v, positions = rows_of(length)
    ring = held(k, v, slots)
    own_k, own_v = chunk_of(k, positions), chunk_of(v, positions)
    lined, origin = jax.device_get(jax.jit(line_up)(ring, own_k, own_v, positions))
    k, v = jax.device_get((k, v))
    for row, (start, *_) in enumerate(ROWS):
        own = positions[row][positions[row] >= 0]
        if len(own) == 0:
            assert (lined.positions[row] < 0).all()
            continue
        real = positions[row] >= 0
        np.testing.assert_array_equal(lined.positions[row, slots:][real], own)
        kept = range(max(0, start - slots), start)
        expected = {int(p): int(p - origin[row]) for p in (*kept, *own)}
        # Places before the text's first entry are out of reach of all windows of so many slots.
        expected = {p: entry for p, entry in expected.items() if entry >= 0}
        found = {int(p): i for i, p in enumerate(lined.positions[row]) if p >= 0}
        assert found == expected
        for place, entry in found.items():
            np.testing.assert_array_equal(lined.k[row, entry], k[row, place])
            np.testing.assert_array_equal(lined.v[row, entry], v[row, place])


@pytest.mark.parametrize("way", ["pieces", "blocks"])
def test_chunks_of_any_padding_with_rows_at_their_own_places_give_the_full_pass(way):
    fields = {"n_layers": 4, "sliding_window": [None, 5, 1, 3], "dilation": [1, 1, 1, 2]}
    model, params = tiny.build(**fields)
    model = model.clone(backend=WAYS[way])
    forward = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    rng = np.random.default_rng(0)
    texts = [rng.integers(53, size=size) for size in (31, 17, 40)]
    expected = [tiny.alone(model, params, text) for text in texts]
    cache, done = init_cache(model.config, 3, 40), np.zeros(3, int)
    while any(done < [31, 17, 40]):
        tokens, positions = np.zeros((3, 9), np.int32), np.full((3, 9), -1, np.int32)
        starts = done.copy()
        for row, text in enumerate(texts):
            count = min(rng.integers(10), len(text) - done[row])
            columns = rng.integers(10 - count) + np.arange(count)
            positions[row, columns] = done[row] + np.arange(count)
            tokens[row, columns] = text[done[row] :][:count]
            done[row] += count
        logits, cache = forward(tokens, positions, cache)
        logits = np.asarray(logits)
        assert np.isfinite(logits).all()
        for row, (start, stop) in enumerate(zip(starts, done, strict=True)):
            ours = logits[row][positions[row] >= 0]
            np.testing.assert_allclose(ours, expected[row][start:stop], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1024])
def test_a_chunk_of_4096_tokens_holds_no_scores_but_a_piece(monkeypatch, window):
    monkeypatch.setattr(pieces, "PIECE", 256)
    model, params = tiny.build(n_layers=1, sliding_window=window)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(model.config, 1, 8192))
    compiled = jax.jit(model.apply).lower({"params": params}, ids, ids, cache).compile()
    shapes = re.findall(r"\b(?:f32|pred)\[([\d,]+)\]", compiled.as_text())
    sizes = {np.prod([int(n) for n in shape.split(",")]) for shape in shapes}
    scores, logits = model.config.num_heads * 256 * 256, 4096 * model.config.vocab_size
    assert scores in sizes
    assert max(sizes) <= max(scores, logits, 8192 * 2 * 8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_is_moved_as_bits_has_its_gradient(dtype):
    cache = LayerCache(*(jnp.zeros((1, 4, 1, 2), dtype) for _ in "kv"), jnp.full((1, 4), -1))
    positions = jnp.array([[0, 1, -1]])

    def total(x, move):
        moved = move(cache, x, x, positions)
        moved = moved[0] if isinstance(moved, tuple) else moved
        return jnp.sum(3 * moved.k.astype(jnp.float32) + 2 * moved.v.astype(jnp.float32))

    x = jnp.ones((1, 3, 1, 2), dtype)
    gradient = jax.jit(jax.grad(total), static_argnums=1)
    np.testing.assert_array_equal(gradient(x, write)[0, :, 0, 0], [5, 5, 0])
    np.testing.assert_array_equal(gradient(x, line_up)[0, :, 0, 0], [5, 5, 5])
