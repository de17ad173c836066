"""Laws of prefix reuse: a row that was copied goes on as the row that was read."""

import functools
import operator
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.config import ModelConfig
from mistral_jax.engine import blocks
from mistral_jax.engine.prefill import empty_cache
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.model.cache import LayerCache, init_cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8
from mistral_jax.parallel.sharding import abstract_params, on_mesh, read_layout

CHUNK, BLOCK, ROOM = 8, 4, 64
PLENTY = 1 << 30
MODELS = {
    "windowed": {"n_layers": 2, "sliding_window": [3, 1], "dilation": [2, 1]},
    "full": {"n_layers": 1, "sliding_window": None},
    "mixed": {"n_layers": 2, "sliding_window": [6, None]},
}
PROGRAMS = blocks._take, blocks._merge, blocks._blend, blocks._write, blocks._clear


@functools.cache
def built(name, kept=None):
    """A model and its params."""
    model, params = tiny.build(**MODELS[name])
    return model.clone(kv_cache_dtype=kept), params


def text(seed, length):
    return np.random.default_rng(seed).integers(3, 50, length).tolist()


def read(model, params, cache, row, ids, start=0, after=lambda end, cache: None):
    """Reads ids[start:] into a row, in chunks that begin at `start`; returns the last logits."""
    rows, logits = cache[0].positions.shape[0], None
    for begin in range(start, len(ids), CHUNK):
        part = ids[begin : begin + CHUNK]
        tokens, positions = np.zeros((rows, CHUNK), np.int32), np.full((rows, CHUNK), -1, np.int32)
        tokens[row, : len(part)] = part
        positions[row, : len(part)] = range(begin, begin + len(part))
        logits, cache = tiny.forward(model, params, tokens, positions, cache)
        after(begin + len(part), cache)
        logits = logits[row, len(part) - 1]
    return logits, cache


def seen(model, cache, row, tokens):
    """What the token at position `tokens` sees in a row: positions, keys and values by slot."""
    found = []
    for span, layer in zip(model.config.spans, cache, strict=True):
        first = 0 if span is None else max(0, tokens - span + 1)
        arrays = jax.tree.map(lambda x: np.asarray(x[row]), layer)
        slots = np.flatnonzero((arrays.positions >= first) & (arrays.positions < tokens))
        assert sorted(arrays.positions[slots]) == list(range(first, tokens))
        found.append(jax.tree.map(operator.itemgetter(slots), arrays))
    return found


same = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def place(layout, caches):
    """Splits caches over devices, as the model does."""
    axes = "batch", "length", "kv_heads", "head_dim"
    shardings = jax.tree.map(lambda x: layout.sharding(*axes[: x.ndim]), caches)
    return jax.lax.with_sharding_constraint(caches, shardings)


def reusing(model, params, most_bytes=PLENTY, **options):
    return Prefixes(model, params, most_bytes, **{"block": BLOCK, "least": 1} | options)


def kept(prefixes):
    """What is really kept: bytes, and nodes; all pieces can be reached."""
    nodes, pieces = [prefixes._root], []
    for node in nodes:
        nodes += node.children.values()
        pieces += node.pieces.values()
    assert len(pieces) == len(prefixes._recent) == prefixes.stats().pieces
    return sum(x.nbytes for piece in pieces for x in jax.tree.leaves(piece.block)), len(nodes) - 1


def longest(spans, shared, saves):
    """Returns the longest prefix that can be had of texts that were saved at these lengths."""

    def needed(span, tokens):
        return set(range(max(0, tokens - span + 1) if span else 0, tokens))

    there = {span: set().union(*(needed(span, tokens) for tokens in saves)) for span in spans}
    return max(m for m in range(shared + 1) if all(needed(s, m) <= there[s] for s in spans))


@pytest.mark.parametrize(("name", "dtype"), [("windowed", None), ("full", None), ("mixed", "int8")])
def test_what_is_copied_is_what_was_read_to_the_bit(name, dtype):
    """At hits of any length, in a row that was used, among others that do not change."""
    model, params = built(name, dtype)
    prefixes, whole, saved = reusing(model, params), text(1, 53), {}

    def save(end, cache):
        saved[end] = cache
        prefixes.save("a", whole[:end], cache, 1)

    fresh = empty_cache(model, 3, ROOM)
    read(model, params, fresh, 1, whole, after=save)
    _, used = read(model, params, fresh, 1, text(2, 40))
    _, used = read(model, params, used, 0, text(3, 30))
    for shared in (1, 3, 8, 10, 15, 17, 24, 39, 41, 48, 53):
        prompt = whole[:shared] + text(4, 7)
        hit = prefixes.find("a", prompt)
        tokens = longest(model.config.spans, shared, saved)
        assert tokens == (hit.tokens if hit else 0)
        assert tokens == shared or name != "full"
        if not hit:
            continue
        # The row that was read ends in the same chunk, without the tokens that are not shared.
        before = tokens // CHUNK * CHUNK
        cache = saved[before] if before else fresh
        if before < tokens:
            _, cache = read(model, params, cache, 1, whole[:tokens], before)
        copied = prefixes.restore(hit, jax.tree.map(jnp.copy, used), 1)
        same(seen(model, copied, 1, tokens), seen(model, cache, 1, tokens))
        for layer, held in zip(copied, seen(model, copied, 1, tokens), strict=True):
            assert np.sum(layer.positions[1] >= 0) == len(held.positions)  # nothing else
        expected, cache = read(model, params, cache, 1, prompt, tokens)
        logits, copied = read(model, params, copied, 1, prompt, tokens)
        same(logits, expected)
        same(seen(model, copied, 1, len(prompt)), seen(model, cache, 1, len(prompt)))
        same(seen(model, copied, 0, 30), seen(model, used, 0, 30))


@pytest.mark.parametrize("exact", [True, False])
def test_conversations_are_answered_as_if_they_were_read_from_the_start(exact):
    """To the bit where whole chunks alone are saved and copied; without a program more."""
    model, params = built("mixed")
    bound = 30 * BLOCK * 2 * 2 * 8 * 4  # tokens, keys and values, heads, width, bytes
    prefixes, rng = reusing(model, params, bound), random.Random(0)
    fresh = empty_cache(model, 3, ROOM)
    cache = prefixes.warm(jax.tree.map(jnp.copy, fresh))
    texts, programs = [("a", [])], [program._cache_size() for program in PROGRAMS]
    for step in range(30):
        key, base = rng.choice(texts[-4:])
        ids = base[: rng.randint(0, 40)] + text(step, rng.randint(1, 20))
        key = rng.choice([key, key, key, "b"])
        row = rng.randrange(3)
        hit = prefixes.find(key, ids, CHUNK if exact else 1)
        if hit:
            cache = prefixes.restore(hit, cache, row)

        def save(end, cache):
            if end % CHUNK == 0 or not exact:
                prefixes.save(key, ids[:end], cache, row)  # noqa: B023
            assert kept(prefixes)[0] == prefixes.stats().nbytes <= bound

        logits, cache = read(model, params, cache, row, ids, hit.tokens if hit else 0, save)
        expected, _ = read(model, params, fresh, row, ids)
        if exact:
            same(logits, expected)
        np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)
        texts.append((key, ids))
        if step % 9 == 8:
            prefixes.shrink(rng.randrange(bound))
    stats = prefixes.stats()
    assert stats.hits >= 8
    assert stats.tokens >= 8 * stats.hits
    assert stats.evictions > 20
    assert [program._cache_size() for program in PROGRAMS] == programs
    prefixes.shrink(0)
    assert kept(prefixes) == (0, 0)


# What follows needs no model: keys and values are random, and differ from token to token.


def config(window, heads=2):
    return ModelConfig(
        vocab_size=96,
        num_layers=2,
        embed_dim=8,
        mlp_dim=8,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=4,
        rope_theta=1e4,
        sliding_window=window,
    )


def holding(model, ids, row=0, rows=1, room=ROOM):
    """A cache whose `row` has read so many tokens, each with keys and values of its own."""
    kept = jnp.dtype(model.kv_cache_dtype or model.dtype)
    random = np.random.default_rng(0).standard_normal

    def fill(span):
        slots = min(span or room, room)
        shape = rows, slots, model.config.num_kv_heads, model.config.head_dim
        positions = np.full((rows, slots), -1, np.int32)
        for position in range(len(ids)):
            positions[row, position % slots] = position

        def values():
            x = random((room, *shape[2:]), np.float32)[np.maximum(positions, 0)]
            return QuantizedMatrix(*to_int8(x, 3)) if kept == jnp.int8 else x.astype(kept)

        return LayerCache(values(), values(), positions)

    return jax.device_put(tuple(map(fill, model.config.spans)))


PIECE = BLOCK * 2 * 2 * 2 * 4 * 4  # tokens, layers, keys and values, heads, width, bytes


def found(prefixes, ids, key="a"):
    hit = prefixes.find(key, [*ids, 1])
    return hit.tokens if hit else 0


def test_what_was_not_used_for_longest_goes_first():
    model = Transformer(config(None))
    prefixes = reusing(model, {"x": 0}, 6 * PIECE)
    a, b, long = text(1, 16), text(2, 12), text(3, 40)
    prefixes.save("a", a, holding(model, a), 0)
    assert prefixes.stats().nbytes == 4 * PIECE
    prefixes.save("a", b, holding(model, b), 0)
    # The end of a text goes first: without its beginning it would be useless.
    assert (found(prefixes, b), found(prefixes, a)) == (12, 12)
    prefixes.save("a", b[:8] + a[:4], holding(model, b[:12]), 0)
    assert (found(prefixes, a), found(prefixes, b), found(prefixes, b[:8] + a[:4])) == (12, 8, 12)
    prefixes.save("a", long, holding(model, long), 0)
    assert found(prefixes, long) == 24  # what there is room for
    assert kept(prefixes) == (6 * PIECE, 1 + 6)
    prefixes.shrink(2 * PIECE)
    assert found(prefixes, long) == 8
    assert prefixes.stats().most_bytes == 6 * PIECE


def test_a_window_needs_the_blocks_that_it_reaches_alone():
    model = Transformer(config(6))
    prefixes, ids = reusing(model, {"x": 0}, 3 * PIECE), text(1, 60)
    for end in range(2, 61, 2):
        prefixes.save("a", ids[:end], holding(model, ids[:end]), 0)
    assert found(prefixes, ids) == 60
    assert found(prefixes, ids[:40]) == 0
    assert kept(prefixes)[0] <= 3 * PIECE
    # A text makes room by evicting what follows it.
    prefixes = reusing(model, {"x": 0}, 2 * PIECE)
    for end in (20, 12):
        prefixes.save("a", ids[:end], holding(model, ids[:end]), 0)
        assert found(prefixes, ids) == end
    assert kept(prefixes) == (2 * PIECE, 1 + 3)


def test_a_block_keeps_what_a_ring_has_lost_since():
    model, ids = Transformer(config(6)), text(1, 16)
    prefixes = reusing(model, {"x": 0}, block=16)
    for end in (6, 10, 14):
        prefixes.save("a", ids[:end], holding(model, ids[:end]), 0)
    for end in (1, 5, 6, 8, 11, 14):
        cache = init_cache(model.config, 1, ROOM)
        hit = prefixes.find("a", ids[: end + 1])
        assert (hit.tokens if hit else 0) == (end if end > 5 else 0)
        if hit:
            copied = prefixes.restore(hit, cache, 0)
            same(seen(model, copied, 0, end), seen(model, holding(model, ids[:end]), 0, end))


def test_a_text_that_grows_has_one_node_a_block():
    model = Transformer(config(None))
    prefixes, ids = reusing(model, {"x": 0}), text(1, 12)
    for end in range(1, 13):
        prefixes.save("a", ids[:end], holding(model, ids[:end]), 0)
    assert kept(prefixes) == (3 * PIECE, 1 + 3)
    prefixes.save("a", ids[:6], holding(model, ids[:6]), 0)
    prefixes.save("a", [], holding(model, ids[:1]), 0)
    assert kept(prefixes) == (3 * PIECE, 1 + 3)
    for end in range(13):
        assert found(prefixes, ids[:end]) == end
    assert [prefixes.find("a", [*ids[:11], 1], n).tokens for n in (1, 3, 8)] == [11, 9, 8]
    assert prefixes.find("a", []) is prefixes.find("a", ids[:1]) is None
    assert reusing(model, {"x": 0}, least=16).find("a", ids) is None


def test_keys_and_ids_are_compared_whole():
    class Key:
        __hash__ = lambda self: 0  # noqa: E731

    model, one, other, ids = Transformer(config(None)), Key(), Key(), text(1, 8)
    prefixes = reusing(model, {"x": 0})
    prefixes.save(one, ids, holding(model, ids), 0)
    assert found(prefixes, ids, one) == 8
    assert found(prefixes, ids, other) == found(prefixes, [9 + 2**8, *ids[1:]], one) == 0
    assert found(prefixes, [*ids[:5], 77, *ids[6:]], one) == 5


def test_what_a_row_wrote_past_a_text_is_not_saved_with_it():
    model, ids = Transformer(config(6)), text(1, 23)
    cache = holding(model, ids)  # its rings have the last six
    for written, tokens in ((20, 20), (21, 20), (22, 0), (23, 0)):
        prefixes = reusing(model, {"x": 0})
        prefixes.save("a", ids[:20], cache, 0, written=written)
        assert found(prefixes, ids[:20]) == tokens


def test_a_cache_that_is_too_short_is_refused():
    model, ids = Transformer(config([6, None])), text(1, 20)
    prefixes = reusing(model, {"x": 0})
    prefixes.save("a", ids, holding(model, ids), 0)
    with pytest.raises(ValueError, match="19 slots for 20 tokens"):
        prefixes.restore(prefixes.find("a", [*ids, 1]), init_cache(model.config, 1, 19), 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_keys_and_values_may_lie_by_heads(dtype):
    model, ids = Transformer(config(6), kv_cache_dtype=dtype), text(1, 21)

    def swap(cache):
        def swapped(layer):
            turned = layer.replace(by_heads=True).ordered(layer.k, layer.v, layer.positions)
            return turned.replace(by_heads=not layer.by_heads)

        return tuple(map(swapped, cache))

    prefixes, cache = reusing(model, {"x": 0}), holding(model, ids, row=1, rows=2)
    prefixes.save("a", ids, swap(cache), 1)
    hit = prefixes.find("a", [*ids, 1])
    empty = init_cache(model.config, 2, 32, jnp.dtype(dtype), by_heads=True)
    copied = prefixes.restore(hit, empty, 1)
    same(seen(model, swap(copied), 1, 21), seen(model, cache, 1, 21))


@pytest.mark.parametrize(("name", "dtype"), [("data_tensor", "bfloat16"), ("tensor", "int8")])
def test_each_device_copies_its_rows_and_heads(name, dtype):
    shape = config(6, heads=4)
    layout = read_layout(name, shape, mesh={"tensor": 2, **({"data": 2} if "data" in name else {})})
    model, ids = Transformer(shape, rules=layout.rules, kv_cache_dtype=dtype), text(1, 21)
    params = abstract_params(model, layout)
    prefixes = reusing(model, params)
    caches = holding(model, ids, row=2, rows=4), empty_cache(model, 4, ROOM)
    with on_mesh(params):
        cache, empty = jax.jit(functools.partial(place, layout))(caches)
    prefixes.save("a", ids, cache, 2)
    hit = prefixes.find("a", [*ids, 1])
    assert prefixes.stats().nbytes == sum(
        shard.data.nbytes
        for part in hit.parts
        for x in jax.tree.leaves(part[1])
        for shard in x.addressable_shards
    )
    before = jax.tree.map(lambda x: x.sharding, empty)
    copied = prefixes.restore(hit, empty, 1)
    same(seen(model, copied, 1, 21), seen(model, cache, 2, 21))
    assert np.all(np.asarray(copied[0].positions)[[0, 2, 3]] == -1)
    assert jax.tree.map(lambda x: x.sharding, copied) == before
    with on_mesh(params):
        lowered = blocks._take.lower(cache, np.zeros(2, np.int32), BLOCK, model.rules)
        assert "all-gather" not in lowered.compile().as_text()
