"""Laws of the rotary embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.config import ModelConfig, QueryScaling, RopeScaling
from mistral_jax.model.rope import frequencies, rotary_angles, rotate, scale_queries
from mistral_jax.ops.backend import Backend

HEAD_DIM, THETA = 10, 1e4


def rotated(x, positions):
    return rotate(x, rotary_angles(positions, HEAD_DIM, THETA))


@pytest.fixture
def x():
    values = np.random.default_rng(0).standard_normal((2, 6, 3, HEAD_DIM))
    return jnp.asarray(values, jnp.float32)


def test_it_turns_pair_j_by_position_times_theta_to_the_minus_2j_over_h(x):
    positions = np.array([[0, 1, 2, 3, 4, 5], [7, 900, 4095, 4096, 20000, 32767]])
    halves = np.split(np.asarray(x, np.float64), 2, axis=-1)
    angles = positions[..., None] * THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    turned = (halves[0] + 1j * halves[1]) * np.exp(1j * angles)[:, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    error = np.abs(rotated(x, jnp.asarray(positions)) - expected).max(axis=(2, 3))
    # An angle of p radians, the product of two float32 roundings, is off by p * 2**-23 at most.
    assert (error <= np.abs(expected).max() * (positions * 2.0**-23 + 1e-6)).all()


def test_scores_depend_on_distance_alone(x):
    positions = jnp.arange(6)[None].repeat(2, 0)
    near = np.einsum("bthd,bshd->bhts", rotated(x, positions), rotated(x, positions))
    far = np.einsum("bthd,bshd->bhts", rotated(x, positions + 100), rotated(x, positions + 100))
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert np.abs(near - np.einsum("bthd,bshd->bhts", x, x)).max() > 1


def test_each_row_has_its_own_positions(x):
    positions = jnp.array([[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, -1, -1]])
    both = rotated(x, positions)
    for row in (0, 1):
        np.testing.assert_array_equal(
            both[row], rotated(x[row : row + 1], positions[row : row + 1])[0]
        )
    assert jnp.isfinite(both).all()


def test_it_keeps_the_dtype_and_turns_in_float32(x):
    narrow = x.astype(jnp.bfloat16)
    positions = jnp.full((2, 6), 4000)
    assert rotated(narrow, positions).dtype == jnp.bfloat16
    exact = rotated(narrow.astype(jnp.float32), positions)
    np.testing.assert_array_equal(rotated(narrow, positions), exact.astype(jnp.bfloat16))


def test_a_product_exchanges_halves_for_a_tpu_without_rounding():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 3, 16)), jnp.bfloat16)
    angles = rotary_angles(jnp.arange(6)[None].repeat(2, 0), 16, THETA)

    def with_gradient(backend):
        result, back = jax.vjp(lambda x: rotate(x, angles, backend), x)
        return result, *back(result[::-1])

    # XLA may contract a product and a sum into one rounding.
    for ours, plain in zip(*map(with_gradient, (Backend("tpu"), Backend())), strict=True):
        np.testing.assert_allclose(ours.astype("float32"), plain.astype("float32"), rtol=2.0**-7)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("ministral-3-3b", 20, 37),
        ("ministral-3-8b", 20, 37),
        ("ministral-3-14b", 13, 25),
        ("devstral-small-2", 12, 25),
        ("devstral-2-123b", 23, 31),
    ],
)
def test_yarn_divides_the_slow_pairs_and_ramps_in_between(name, first, last):
    config = ModelConfig.from_name(name)
    scaling, pairs = config.rope_scaling, np.arange(64)
    plain = config.rope_theta ** (-pairs / 64)
    share = (plain - frequencies(128, config.rope_theta, scaling)) / (
        plain - plain / scaling.factor
    )
    np.testing.assert_allclose(share, np.clip((pairs - first) / (last - first), 0, 1), atol=1e-12)


def test_yarns_ramp_may_be_a_step():
    table = {"original_positions": 16, "beta_fast": 1.0, "beta_slow": 1.0, "attention_factor": 1.0}
    pair = 8 * np.log(16 / (2 * np.pi)) / (2 * np.log(10))  # between two whole numbers
    scaling = RopeScaling("yarn", 4, **table | {"beta_fast": 16 / (2 * np.pi), "beta_slow": 4.0})
    assert 1 < pair < 2
    changed = frequencies(8, 10.0, scaling) * 10 ** (np.arange(4) / 4)
    np.testing.assert_allclose(changed, [1, 0.25, 0.25, 0.25])


def test_the_attention_factor_lengthens_cosines_and_sines():
    table = {"original_positions": 8, "beta_fast": 4.0, "beta_slow": 1.0}
    positions = jnp.arange(20)[None]
    one, more = (
        rotary_angles(
            positions, 8, 1e3, scaling=RopeScaling("yarn", 4, **table, attention_factor=factor)
        )
        for factor in (1.0, 1.5)
    )
    for a, b in zip(one, more, strict=True):
        np.testing.assert_allclose(a * 1.5, b, rtol=1e-6)
    np.testing.assert_allclose(one[0] ** 2 + one[1] ** 2, 1, rtol=1e-6)


def test_llamas_scalings_divide_all_frequencies_or_the_slow_ones():
    plain = frequencies(16, 1e4)
    np.testing.assert_array_equal(frequencies(16, 1e4, RopeScaling("linear", 4)), plain / 4)
    scaling = RopeScaling(
        "llama3", 8, original_positions=1000, low_freq_factor=1.0, high_freq_factor=4.0
    )
    turns = 1000 * plain / (2 * np.pi)
    divided = plain / frequencies(16, 1e4, scaling)
    assert (divided[turns >= 4] == 1).all()
    np.testing.assert_allclose(divided[turns <= 1], 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    smooth = (turns[between] - 1) / 3
    np.testing.assert_allclose(divided[between], 1 / ((1 - smooth) / 8 + smooth))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_queries_grow_with_their_position_beyond_the_original_length(dtype):
    scaling = QueryScaling(beta=0.1, original_positions=16384)
    places = [-1, 0, 16383, 16384, 32767, 32768, 262143, 2**30]
    q = np.random.default_rng(0).standard_normal((1, len(places), 3, 4)).astype(dtype)
    scaled = scale_queries(jnp.asarray(q), jnp.array([places]), scaling)
    assert scaled.dtype == dtype
    factor = 1 + 0.1 * np.log(1 + np.maximum(places, 0) // 16384)
    expected = (q.astype(np.float32) * factor[:, None, None].astype(np.float32)).astype(dtype)
    rounding = {"float32": 2.0**-22, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(np.float32(scaled), np.float32(expected), rtol=rounding)
    np.testing.assert_array_equal(np.asarray(scaled)[:, :3], q[:, :3])
    assert scale_queries(q, None, None) is q
