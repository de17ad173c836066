"""Exported programs hold no call of this process's C++ kernels, for whatever platform they are."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.checkpoint import quantization
from mistral_jax.model.cache import init_cache
from mistral_jax.ops.backend import PLAIN, default

PLATFORMS = ["cpu", "tpu", "cuda"]


@functools.cache
def program(kind, backend=None):
    """Returns a function that reads a prompt or a token, and what it is given."""
    # Numbers of 8 bits beside float32: what rounds to another of them is then 1 off, no more.
    model, params = tiny.build(dtype=jnp.float32 if kind == "int8" else jnp.bfloat16)
    model = model.clone(backend=backend or model.backend)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    if kind == "int8":
        params = quantization.quantize(params, "int8", quantization.matrices(params, output=True))
    cache = init_cache(model.config, 2, 8, jnp.int8 if kind == "int8" else jnp.bfloat16)
    prompt, places = jnp.array([[3, 1, 4], [1, 5, 9]]), jnp.arange(3)[None].repeat(2, 0)

    def apply(params, tokens, positions, cache):
        return model.apply({"params": params}, tokens, positions, cache)

    if kind == "prompt":
        return apply, (params, prompt, places, cache)
    _, cache = jax.jit(apply)(params, prompt, places, cache)
    return apply, (params, prompt[:, :1], places[:, -1:] + 1, cache)


def exported(apply, given, platforms):
    """Exports a function of leaves: JAX writes no tree of ours unless it is told how."""
    leaves, tree = jax.tree.flatten(given)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(apply(*jax.tree.unflatten(tree, leaves))))
    made = jax.export.export(flat, platforms=platforms)(*leaves)
    assert "mistral_jax_" not in made.mlir_module()
    return made


@pytest.mark.parametrize("kind", ["prompt", "token", "int8"])
def test_an_exported_model_computes_what_xla_alone_does(kind):
    apply, given = program(kind)
    if default().has_native and kind != "prompt":
        assert "mistral_jax_" in jax.jit(apply).lower(*given).as_text()
    found = exported(apply, given, PLATFORMS).call(*jax.tree.leaves(given))
    plain = jax.tree.leaves(jax.jit(program(kind, PLAIN)[0])(*given))
    for one, other in zip(found, plain, strict=True):
        eight_bits = one.dtype == jnp.int8
        one, other = (np.asarray(x.astype(jnp.float32)) for x in (one, other))
        bound = (1e-5 if kind == "int8" else 2e-2) * np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=1 if eight_bits else bound)


def test_a_written_program_computes_the_same():
    pytest.importorskip("flatbuffers", reason="JAX writes programs by it")
    made, leaves = exported(*(case := program("token")), PLATFORMS), jax.tree.leaves(case[1])
    read = jax.export.deserialize(made.serialize())
    for one, other in zip(read.call(*leaves), made.call(*leaves), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kind", ["prompt", "token", "int8"])
def test_a_model_is_exported_for_one_platform(kind, platform):
    apply, given = program(kind)
    assert exported(apply, given, [platform]).platforms == (platform,)
