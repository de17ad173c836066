"""Laws of the rotary embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.model.rope import rotary_angles, rotate
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
