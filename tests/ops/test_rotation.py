"""The TPU's kernel rotates heads as XLA's operations do: interpreted, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_splash import RULES, on_mesh

from mistral_jax.ops import rotation
from mistral_jax.ops.backend import PLAIN, Backend

TPU = Backend("tpu", alone=True, kernels=("flash",))


def example(dtype, heads=3, head_dim=128, length=128, rows=2):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, length, heads, head_dim)), dtype)
    angles = rng.uniform(0, 7, (rows, length, head_dim // 2))
    return x, tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))


def kernel(x, angles, rules=()):
    return rotation._rotate_heads(x, angles, rules, "heads", True)


@pytest.mark.parametrize(("dtype", "heads"), [("float32", 3), ("bfloat16", 16)])
def test_it_rotates_and_rounds_as_xla_s_operations_do(dtype, heads):
    x, angles = example(dtype, heads)
    found = jax.jit(kernel)(x, angles)
    expected = jax.jit(rotation.rotate_halves)(x, angles)
    assert found.dtype == expected.dtype
    # Multiplications and additions may be fused, so that results round to a neighbour.
    np.testing.assert_allclose(
        found.astype(jnp.float32),
        expected.astype(jnp.float32),
        rtol=float(jnp.finfo(dtype).eps),
        atol=1e-6,
    )


def test_heads_without_angles_stay_as_they_are():
    x, _ = example("bfloat16")
    np.testing.assert_array_equal(jax.jit(lambda x: kernel(x, None))(x), x)


def test_the_factor_is_applied_before_rounding():
    x, angles = example("bfloat16")
    found = rotation.rotate_halves(x, angles, factor=0.1275)
    wide = rotation.rotate_halves(x.astype(jnp.float32), angles) * np.float32(0.1275)
    error = np.abs(found.astype(jnp.float32) - wide)
    assert (error <= 2.0**-8 * np.abs(wide) + 1e-6).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_gradient_is_that_of_xla_s_operations(dtype):
    x, angles = example(dtype)

    def loss(run, x):
        return jnp.sum(jnp.sin(run(x, angles).astype(jnp.float32)))

    plain = functools.partial(rotation.rotate_halves, backend=Backend("tpu"))
    runs = (kernel, plain), (lambda x, _: kernel(x, None), lambda x, _: x)
    for pair in runs:
        found, expected = (jax.jit(jax.grad(functools.partial(loss, run)))(x) for run in pair)
        assert found.dtype == x.dtype
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-5, atol=1e-6
        )


def test_on_a_mesh_each_device_rotates_its_rows_and_heads():
    x, angles = example("float32", heads=8, rows=4)
    expected = jax.jit(kernel)(x, angles)
    with on_mesh(2, 2, 2):
        split = jax.device_put(x, PartitionSpec("data", None, ("kv", "group")))
        places = jax.device_put(angles, PartitionSpec("data"))
        assert rotation.fits(x, TPU, RULES, "heads")
        assert not rotation.fits(x, TPU, (*RULES, ("length", "kv")), "heads")
        assert not rotation.fits(x[:, :, :6], TPU, RULES, "heads")
        run = jax.jit(functools.partial(kernel, rules=RULES))
        found, program = run(split, places), run.lower(split, places).compile().as_text()
    np.testing.assert_array_equal(found, expected)
    assert "all-" not in program


@pytest.mark.parametrize(
    ("shape", "backend", "fits"),
    [
        ((1, 2048, 32, 128), TPU, True),
        ((8, 512, 8, 128), TPU, True),
        ((1, 64, 32, 128), TPU, False),
        ((1, 2048, 32, 64), TPU, False),
        ((1, 2048, 32, 128), Backend("tpu", kernels=("flash",)), False),
        ((1, 2048, 32, 128), PLAIN, False),
    ],
)
def test_it_takes_prompts_on_one_tpu_or_on_a_mesh(shape, backend, fits):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert rotation.fits(x, backend, (), "heads") is fits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chunk_of_7b_lowers_for_a_tpu(dtype):
    run = jax.jit(lambda x, *angles: rotation.rotate_halves(x, angles, TPU))
    shapes = ((1, 2048, 32, 128), dtype), *(((1, 2048, 64), "float32"),) * 2
    exported = jax.export.export(run, platforms=["tpu"])(
        *(jax.ShapeDtypeStruct(*s) for s in shapes)
    )
    assert rotation.NAME in exported.mlir_module()
