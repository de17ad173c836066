"""The TPU's kernel normalises rows as XLA's operations do: interpreted, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_splash import RULES, on_mesh

from mistral_jax.ops import norm
from mistral_jax.ops.backend import PLAIN, Backend

TPU = Backend("tpu", alone=True, kernels=("flash",))
EPS = 1e-5


def example(dtype, width=256, length=128, rows=2):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, length, width)) * rng.uniform(0.01, 100, (rows, length, 1))
    x[0, 3] = 0
    return jnp.asarray(x, dtype), jnp.asarray(rng.uniform(0.5, 2, width), dtype)


def kernel(x, scale, rules=()):
    return norm._normalize_rows(x, scale, EPS, rules, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_rounds_as_xla_s_operations_do(dtype):
    x, scale = example(dtype)
    found = jax.jit(kernel)(x, scale)
    expected = jax.jit(functools.partial(norm.normalize, eps=EPS, dtype=scale.dtype))(x, scale)
    assert found.dtype == expected.dtype
    # Sums of another order may round to the neighbour of a number, before the scale and after it.
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), rtol=2 * step, atol=0
    )
    assert not np.asarray(found[0, 3], jnp.float32).any()


def test_its_gradient_is_that_of_xla_s_operations():
    x, scale = example("float32")

    def loss(run, *arguments):
        return jnp.sum(jnp.sin(run(*arguments)))

    plain = functools.partial(norm.normalize, eps=EPS, dtype=jnp.float32)
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))(x, scale)
        for run in (kernel, plain)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_on_a_mesh_each_device_normalises_its_rows():
    x, scale = example("float32", rows=4)
    expected = jax.jit(kernel)(x, scale)
    with on_mesh(2, 2, 2):
        split = jax.device_put(x, PartitionSpec("data"))
        assert norm.fits(x, RULES, TPU)
        assert not norm.fits(x, (*RULES, ("residual", "kv")), TPU)
        run = jax.jit(functools.partial(kernel, rules=RULES))
        found, program = run(split, scale), run.lower(split, scale).compile().as_text()
    np.testing.assert_array_equal(found, expected)
    assert "all-" not in program


@pytest.mark.parametrize(
    ("shape", "backend", "fits"),
    [
        ((1, 2048, 4096), TPU, True),
        ((8, 512, 4096), TPU, True),
        ((1, 64, 4096), TPU, False),
        ((8, 1, 4096), TPU, False),
        ((1, 2048, 100), TPU, False),
        ((1, 2048, 4096), Backend("tpu", kernels=("flash",)), False),
        ((1, 2048, 4096), PLAIN, False),
    ],
)
def test_it_takes_prompts_on_one_tpu_or_on_a_mesh(shape, backend, fits):
    assert norm.fits(jax.ShapeDtypeStruct(shape, jnp.bfloat16), (), backend) is fits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chunk_of_7b_lowers_for_a_tpu(dtype):
    run = jax.jit(lambda x, scale: norm.normalize(x, scale, EPS, scale.dtype, TPU))
    x, scale = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 2048, 4096), (4096,)))
    exported = jax.export.export(run, platforms=["tpu"])(x, scale)
    assert norm.NAME in exported.mlir_module()
