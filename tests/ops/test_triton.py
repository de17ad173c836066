"""Decoding's kernel of an NVIDIA GPU, interpreted, and when it is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_splash import RULES, by_rules, on_mesh

from mistral_jax.model.attention import attend
from mistral_jax.ops import triton
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8

SLOTS = 160  # Five blocks of 32.
H100 = Backend("gpu", "9.0", True, ("cudnn", "triton"))
# Positions of the rows: few slots are filled, all but one, all, all several times over, none.
OWN = (5, 158, 159, 1000, -1)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    taken, kernel = [], triton.attend
    monkeypatch.setattr(
        triton, "attend", lambda *a: taken.append(a[1].shape) or kernel(*a, interpret=True)
    )
    return taken


def ring(own, slots=SLOTS):
    """Positions [1] of the query and [S] of the keys of a row that has reached position `own`."""
    found = np.full(slots, -1, np.int32)
    past = np.arange(max(0, own - slots + 1), own + 1, dtype=np.int32)
    found[past % slots] = past
    return np.array([own], np.int32), found


def rows(dtype=jnp.bfloat16, slots=SLOTS, head_dim=16, heads=8, kv_heads=2, own=OWN):
    rng = np.random.default_rng(0)
    shapes = ((1, heads), (slots, kv_heads), (slots, kv_heads))
    arrays = [jnp.asarray(rng.standard_normal((len(own), *s, head_dim)), dtype) for s in shapes]
    return arrays, [jnp.asarray(x) for x in map(np.stack, zip(*map(ring, own), strict=True))]


def in_8_bits(x):
    return QuantizedMatrix(*to_int8(x.astype(jnp.float32), 3, jnp))


def wide(x):
    return x if isinstance(x, QuantizedMatrix) else x.astype(jnp.float32)


@pytest.mark.parametrize(
    ("dtype", "kept", "window", "programs"),
    [  # 1, 2 or 5 programs for each head
        ("float32", "float32", None, 16),
        ("float32", "int8", 40, 256),
        ("bfloat16", "bfloat16", 40, 1),
        ("bfloat16", "bfloat16", None, 256),
        ("bfloat16", "int8", None, 16),
    ],
)
def test_it_attends_to_what_the_mask_shows(monkeypatch, interpreted, dtype, kept, window, programs):
    monkeypatch.setattr(triton, "PROGRAMS", programs)
    (q, k, v), places = rows(jnp.dtype(dtype))
    if kept == "int8":
        k, v = in_8_bits(k), in_8_bits(v)
    expected = attend(wide(q), wide(k), wide(v), *places, window)
    found = attend(q, k, v, *places, window, backend=H100)
    assert interpreted
    assert found.dtype == q.dtype
    found = np.asarray(found, np.float32)
    assert np.isfinite(found).all()
    # In bfloat16, weights and the result have 8 bits.
    bound = (1e-6 if dtype == "float32" else 2.0**-7) * np.abs(expected).max()
    np.testing.assert_allclose(found[:-1], expected[:-1], atol=bound)


def test_a_window_may_skip_keys(interpreted):
    (q, k, v), places = rows(jnp.float32)
    expected = attend(q, k, v, *places, 40, 3)
    found = attend(q, k, v, *places, 40, 3, backend=H100)
    assert interpreted
    np.testing.assert_allclose(found[:-1], expected[:-1], atol=2e-6)


def test_it_reads_no_empty_slot():
    """NaN in a slot past the filled blocks would spread."""
    (q, k, v), places = rows(own=(5, 31, 32))
    for row, blocks in ((0, 1), (1, 1), (2, 2)):
        k, v = (x.at[row, 32 * blocks :].set(jnp.nan) for x in (k, v))
    found = attend(q, k, v, *places, None, backend=H100)
    assert np.isfinite(np.asarray(found, np.float32)).all()


@pytest.mark.parametrize("sizes", [(5, 1, 1), (1, 2, 2), (1, 2, 4)])
def test_on_a_mesh_each_device_attends_for_its_rows_and_heads(sizes):
    arrays, places = rows()
    expected = attend(*arrays, *places, 40, backend=H100)
    with on_mesh(*sizes):
        split = by_rules(arrays)
        run = jax.jit(functools.partial(attend, window=40, rules=RULES, backend=H100))
        found, program = run(*split, *places), run.lower(*split, *places).compile().as_text()
    np.testing.assert_array_equal(found, expected)
    assert "all-gather" not in program
    assert "all-to-all" not in program


def test_its_gradient_is_that_of_the_plain_path():
    (q, k, v), places = rows(own=(5, 1000))

    def total(backend, q, k, v):
        return jnp.sum(attend(q, k, v, *places, 40, backend=backend).astype(jnp.float32) ** 2)

    plain, kernel = (
        jax.jit(jax.grad(functools.partial(total, backend), (0, 1, 2)))(q, k, v)
        for backend in (Backend(), H100)
    )
    for one, other in zip(plain, kernel, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=2.0**-5 * np.abs(one).max())


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, True),
        ({"dtype": jnp.float16}, True),
        ({"dtype": jnp.float32}, True),
        ({"head_dim": 128}, True),
        ({"head_dim": 24}, False),
        ({"slots": 256}, True),
        ({"slots": 100}, False),
    ],
)
def test_it_says_which_arrays_it_takes(fields, taken):
    (q, k, _), _ = rows(own=(5,), **fields)
    assert triton.fits(q, k, ()) == taken
    assert triton.fits(q, in_8_bits(k), ()) == taken
    assert not triton.fits(jnp.concatenate([q, q], axis=1), k, ())
    other = jnp.float16 if q.dtype == jnp.float32 else jnp.float32
    assert not triton.fits(q.astype(other), k, ())


def test_it_is_tried_before_it_is_taken(monkeypatch, interpreted):
    """While a program is traced, too. It does not run on a CPU, unless it is interpreted."""
    triton.runs.cache_clear()
    found = []
    jax.jit(lambda x: found.append(triton.runs()) or x)(1.0)
    monkeypatch.undo()
    triton.runs.cache_clear()
    found.append(triton.runs())
    triton.runs.cache_clear()
    assert found == [True, False]
