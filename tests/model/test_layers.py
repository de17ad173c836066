"""Laws of the layers that the whole model's do not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.model.layers import RMSNorm
from mistral_jax.ops.products import multiply


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("equation", "sizes", "kernel", "outputs"),
    [
        ("BTD,VD->BTV", (200,), (5, 200), 1),
        ("BTD,NHD->BTNH", (200,), (3, 4, 200), 2),
        ("BTNH,DNH->BTD", (10, 20), (5, 10, 20), 1),
    ],
)
def test_products_sum_in_float32_for_a_lone_token_as_for_many(
    dtype, equation, sizes, kernel, outputs
):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((2, 3, *sizes), kernel))
    for batch, length in ((1, 1), (1, 3), (2, 1), (2, 3)):
        part = x[:batch, :length]
        ours = multiply(part, kernel, outputs, dtype)
        assert ours.dtype == jnp.float32
        exact = np.einsum(equation, np.asarray(part, np.float64), np.asarray(kernel, np.float64))
        np.testing.assert_allclose(ours, exact, atol=200 * 2.0**-24 * np.abs(exact).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rms_norm_squares_and_averages_in_float32(dtype):
    x = jnp.full((1, 1, 300), 300.0, dtype)  # whose square is infinite in float16
    normal = RMSNorm(1e-5, dtype).apply({"params": {"scale": jnp.full(300, 2.0)}}, x)
    assert normal.dtype == dtype
    assert (normal == 2).all()


def test_rms_norm_scales_after_the_cast():
    """As in the references: the other order rounds a 16-bit model differently."""
    x = jax.random.normal(jax.random.key(0), (1, 1, 300), jnp.bfloat16)
    scale = jax.random.normal(jax.random.key(1), (300,), jnp.bfloat16)
    plain = RMSNorm(1e-5, jnp.bfloat16).apply({"params": {"scale": jnp.ones(300)}}, x)
    scaled = RMSNorm(1e-5, jnp.bfloat16).apply({"params": {"scale": scale}}, x)
    np.testing.assert_array_equal(scaled, plain * scale[None, None])
