"""Laws of the mask and of blockwise grouped-query attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.model.attention import attend, visible
from mistral_jax.ops import attention

# Windows and their dilations.
PATTERNS = ((None, 1), (1, 1), (4, 1), (5, 1), (9, 1), (None, 2), (1, 3), (3, 2), (2, 5))


def dense(q, k, v, q_positions, kv_positions, window, dilation=1):
    """Attention by loops in float64; a query that sees nothing gives NaN."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.full(q.shape, np.nan)
    for b, t, n in np.ndindex(q.shape[:3]):
        distance = int(q_positions[b, t]) - np.asarray(kv_positions[b])
        seen = (np.asarray(kv_positions[b]) >= 0) & (distance >= 0)
        places = range(0, 100, dilation)[:window]
        seen &= np.isin(distance, places)
        if seen.any():
            scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def qkv(length, keys, batch=2, heads=6, kv_heads=2, head_dim=4):
    rng = np.random.default_rng(length)
    shapes = ((length, heads), (keys, kv_heads), (keys, kv_heads))
    return [jnp.asarray(rng.standard_normal((batch, *s, head_dim)), jnp.float32) for s in shapes]


def test_a_query_sees_its_own_key_and_the_window_minus_one_before():
    positions = jnp.arange(10)[None]
    for window in (1, 4, 10):
        distance = np.subtract.outer(np.arange(10), np.arange(10))
        expected = (distance >= 0) & (distance < window)
        np.testing.assert_array_equal(visible(positions, positions, window)[0], expected)
    np.testing.assert_array_equal(visible(positions, positions, None)[0], distance >= 0)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 4, 30, None])
def test_a_dilated_window_sees_as_many_keys_with_gaps_between_them(window, dilation):
    positions = jnp.arange(20)[None]
    mask = visible(positions, positions, window, dilation)[0]
    for position, row in enumerate(mask):
        expected = range(position, -1, -dilation)[:window]
        assert np.flatnonzero(row).tolist() == sorted(expected)


def test_the_mask_reads_positions_not_places_in_the_array():
    ring = jnp.array([[8, 9, 5, 6, 7], [-1, 0, -1, 1, -1]])
    seen = visible(jnp.array([[9], [1]]), ring, 3)
    np.testing.assert_array_equal(seen[:, 0], [[1, 1, 0, 0, 1], [0, 1, 0, 1, 0]])
    assert not visible(jnp.array([[-1], [-1]]), ring, None).any()
    dilated = visible(jnp.array([[9], [1]]), ring, 3, dilation=2)
    np.testing.assert_array_equal(dilated[:, 0], [[0, 1, 1, 0, 1], [0, 0, 0, 1, 0]])


@pytest.mark.parametrize(
    ("length", "keys"),
    [
        # Blocks are unrolled or mapped, whole or not, and see keys in pieces or not: in pairs.
        *((8, 3), (15, 3), (5, 8192), (12, 8192)),
        pytest.param(9, 3, marks=pytest.mark.slow),
        pytest.param(4, 8192, marks=pytest.mark.slow),
    ],
)
def test_blocks_equal_dense_attention_for_every_pattern_and_border(monkeypatch, length, keys):
    monkeypatch.setattr(attention, "KEYS", keys)
    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "UNROLLED_BLOCKS", 2)  # so lengths above 8 take the mapped body
    places = np.arange(length)
    # Row 1 is padded on both sides; the ring holds the 6 tokens before, out of order.
    positions = np.stack([places, np.where((places > 1) & (places < length - 2), places - 2, -1)])
    ring = np.array([[3, 4, 5, 0, 1, 2], [-1, -1, -1, -1, -1, -1]])
    later = np.where(positions < 0, -1, positions + np.array([[6], [0]]))
    q, k, v = qkv(length, length)
    _, ring_k, ring_v = qkv(length, 6)
    chunk = q, jnp.concatenate([ring_k, k], 1), jnp.concatenate([ring_v, v], 1)
    alone = (q, k, v, positions, positions)
    cached = (*chunk, later, np.concatenate([ring, later], 1))

    @jax.jit
    def every_pattern(alone, cached):
        return [
            (
                attend(*alone, *pattern, aligned=True),
                attend(*alone, *pattern, aligned=True, sections=3),
                attend(*cached, *pattern),
            )
            for pattern in PATTERNS
        ]

    for pattern, found in zip(PATTERNS, every_pattern(alone, cached), strict=True):
        for ours, arguments in zip(found, (alone, alone, cached), strict=True):
            expected = dense(*arguments, *pattern)
            assert np.isfinite(ours).all()
            expected = np.where(np.isnan(expected), ours, expected)
            np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("window", [None, 40])
def test_pieces_of_the_keys_have_the_gradient_of_all_without_their_scores(
    monkeypatch, window, aligned
):
    length, keys = 120, 7
    arrays = qkv(length, length)
    places = np.tile(np.arange(length), (2, 1)) - np.array([[0], [5]])
    places = np.where(places < 0, -1, places)

    @jax.jit
    def gradients(*arrays):
        def total(*arrays):
            mixed = attend(*arrays, places, places, window, aligned=aligned)
            return jnp.sum(jnp.sin(mixed[places >= 0]))

        return jax.value_and_grad(total, argnums=(0, 1, 2))(*arrays)

    expected = gradients(*arrays)
    monkeypatch.setattr(attention, "KEYS", keys)
    monkeypatch.setattr(attention, "BLOCK", 8)
    gradients.clear_cache()
    for ours, theirs in zip(gradients(*arrays)[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    # Scores are the only arrays with queries and keys of a row and a head among their axes.
    text = gradients.lower(*arrays).compile().as_text()
    shapes = [s.split(",") for s in re.findall(r"\bf32\[(2,2,3,\d+,\d+)\]", text)]
    assert max(int(t) * int(s) for *_, t, s in shapes) <= 8 * keys


def test_sharing_kv_heads_equals_repeating_them():
    q, k, v = qkv(7, 7)
    places = jnp.arange(7)[None].repeat(2, 0)
    repeated = attend(q, k.repeat(3, axis=2), v.repeat(3, axis=2), places, places, 4)
    np.testing.assert_allclose(attend(q, k, v, places, places, 4), repeated, atol=1e-6)


def test_large_scores_and_empty_rows_give_finite_outputs_and_gradients():
    q, k, v = qkv(5, 5)
    places = jnp.array([[0, 1, 2, -1, -1], [-1] * 5])

    def total(q, k, v):
        return attend(1e4 * q, k, v, places, places, 2).sum()

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    for value in jax.tree.leaves(gradient(q, k, v)):
        assert jnp.isfinite(value).all()


def test_low_precision_operands_still_score_and_sum_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(8, 8))
    q = 30 * q  # a score near 100, rounded to bfloat16, would be off by up to 0.25
    places = jnp.arange(8)[None].repeat(2, 0)
    ours = attend(q, k, v, places, places, None)
    assert ours.dtype == jnp.bfloat16
    # Weights that sum to 1, and the result, are each rounded to 8 bits: by 2**-8 at most.
    bound = 2 * 2.0**-8 * np.abs(np.asarray(v, np.float64)).max()
    error = ours.astype(jnp.float32) - dense(q, k, v, places, places, None)
    assert np.abs(error).max() <= bound
