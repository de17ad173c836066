"""The gate of an MLP, and its gradient, are the same on a TPU as on other backends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.gate import gate

TPU = Backend("tpu", "TPU v6 lite", alone=True)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("bfloat16", 2.0**-6)])
def test_a_tpu_s_gate_has_the_gradient_of_the_plain_one(dtype, close):
    keys = jax.random.split(jax.random.key(0), 3)
    opened, raised, grad = (3 * jax.random.normal(key, (1, 128, 6), dtype) for key in keys)
    opened = opened.at[0, 0].set(jnp.array([0, -0.0, 90, -90, 1e-30, -1e4], dtype))
    (found, pull), (expected, plain) = (
        jax.vjp(lambda *given, on=on: gate(*given, on), opened, raised) for on in (TPU, PLAIN)
    )
    np.testing.assert_array_equal(found, expected)
    for a, b in zip(pull(grad), plain(grad), strict=True):
        assert a.dtype == dtype
        assert np.isfinite(a).all()
        wide = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(*wide, rtol=close, atol=close)
