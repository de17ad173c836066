"""Laws of the layers that the whole model's do not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from mistral_jax.checkpoint.lora import Lora, init_adapters
from mistral_jax.checkpoint.quantization import matrices
from mistral_jax.model.layers import MATRICES, RMSNorm
from mistral_jax.model.transformer import stack_layers
from mistral_jax.ops.products import multiply
from mistral_jax.parallel.sharding import abstract_params


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


@pytest.mark.parametrize("tied", [False, True])
def test_the_axes_of_every_matrix_are_those_that_the_model_declares(tied):
    """Scales and adapters follow them, and scales those of stacked layers too."""
    model, _ = tiny.build(tied=tied)
    shapes = abstract_params(model)
    flat = flatten_dict(shapes)
    for path, array in flat.items():
        if array.ndim > 1:
            outputs, inputs = MATRICES[path[-2]].divide(array.shape)
            assert (*outputs, *inputs) == MATRICES[path[-2]].shape(model.config) == array.shape
            assert len(outputs) == len(MATRICES[path[-2]].outputs)
    for tree in (shapes, jax.eval_shape(stack_layers, shapes)):
        for path, outputs in matrices(tree, output=True).items():
            assert outputs == len(MATRICES[path[-2]].outputs) + (path[0] == "layers")
    adapters = jax.eval_shape(lambda: init_adapters(Lora(rank=3), shapes, jax.random.key(0)))
    for path, adapter in flatten_dict(adapters).items():
        outputs, inputs = MATRICES[path[-2]].divide(flat[*path[:-1], "kernel"].shape)
        assert adapter.shape == ((3, *inputs) if path[-1] == "lora_a" else (*outputs, 3))
