"""Products: how many rows reach each backend's XLA, and that none changes a product."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.checkpoint.lora import PROJECTIONS, Lora, attach, init_adapters
from mistral_jax.checkpoint.quantization import matrices, quantize
from mistral_jax.model.cache import init_cache
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.products import multiply
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8
from mistral_jax.planning import forecast

TPU = Backend("tpu", alone=True, kernels=("splash",))
GPU = Backend("gpu", "9.0", alone=True)


def products(function, *arguments):
    """Returns the number of rows of each product with a matrix that a function asks XLA for."""
    program = jax.jit(function).lower(*arguments).as_text()
    matrix = r"tensor<(\d+)x\d+x[a-z]+\d+>"  # Products of attention have more axes.
    found = re.findall(rf"dot_general .*: \({matrix}, {matrix}\)", program)
    return [int(rows) for rows, _ in found]


def arrays(kind, rows=1):
    rng = np.random.default_rng(rows)
    matrix = rng.normal(size=(6, 40)).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(rows, 1, 40)), jnp.float32)
    if kind == "int8":
        return x, QuantizedMatrix(*map(jnp.asarray, to_int8(matrix, 1)))
    return x, jnp.asarray(matrix, kind)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_tpu_multiplies_two_rows_in_place_of_one(kind, dtype, rows):
    x, matrix = arrays(kind, rows)

    def run(backend):
        return lambda x: multiply(x, matrix, 1, jnp.dtype(dtype), backend)

    assert products(run(TPU), x) == [2]
    assert products(run(GPU), x) == [rows]
    found, gradient = jax.vjp(run(TPU), x)
    expected, pull = jax.vjp(run(PLAIN), x)
    assert found.shape == (rows, 1, 6)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradient(found), pull(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_no_product_of_a_tpu_s_token_has_one_row(tied):
    """Neither that of a projection, of an adapter, nor of the output, in floats or in int8."""
    model, params = tiny.build(tied=tied, n_layers=1)
    lora = Lora(rank=3, alpha=5.0, targets=("q_proj", "down_proj"))
    adapters = init_adapters(lora, params, jax.random.key(0))
    half = quantize(jax.tree.map(jnp.copy, params), "int8", matrices(params, output=True))
    token = np.zeros((1, 1), np.int32)
    for backend, rows in ((TPU, 2), (GPU, 1)):
        tpu = model.clone(backend=backend)
        cache = init_cache(model.config, 1, 4, jnp.float32)
        for chosen in (params, half):
            held = {"params": attach(chosen, adapters, lora.scale)}
            found = products(tpu.apply, held, token, token, cache)
            assert found == [rows] * (7 + 2 * 2 + 1)


@pytest.mark.parametrize(
    ("targets", "widths"),
    [(PROJECTIONS, {9, 3, 6}), (("q_proj", "v_proj", "down_proj"), {6, 3})],
)
def test_a_tpu_trains_adapters_as_the_plain_backend_does(targets, widths):
    """It multiplies by the `lora_a` of all matrices with the same inputs at once."""
    lora = Lora(rank=3, alpha=5.0, targets=targets)
    model, params = tiny.build(n_layers=1)
    adapters = init_adapters(lora, params, jax.random.key(0))
    adapters = jax.tree.map(
        lambda x: x + jnp.linspace(-0.1, 0.1, x.size).reshape(x.shape), adapters
    )
    tokens = np.arange(128, dtype=np.int32)[None]

    def loss(adapters, backend):
        held = {"params": attach(params, adapters, lora.scale)}
        return jnp.mean(model.clone(backend=backend).apply(held, tokens % 53, tokens)[0] ** 2)

    programs = [
        jax.jit(jax.value_and_grad(functools.partial(loss, backend=backend)))
        for backend in (Backend("tpu", alone=True), PLAIN)
    ]
    found, expected = (jax.tree.leaves(program(adapters)) for program in programs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for program, chosen in zip(programs, (widths, {3}), strict=True):
        text = program.lower(adapters).as_text()
        made = re.findall(r"dot_general .*x128x\d+xf32>, .*-> tensor<1x128x(\d)xf32>", text)
        assert set(map(int, made)) == chosen


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_tpu_s_compiler_streams_a_matrix_through_the_matrix_unit(chip, kind, rows):
    """And writes no widened copy of an int8 matrix."""
    device = forecast.tpu_devices(chip, "1x1")[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def described(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    x, matrix = described((rows, 1, 4096), "bfloat16"), described((65536, 4096), kind)
    if kind == "int8":
        matrix = QuantizedMatrix(matrix, described((65536, 1), "float32"))
    run = jax.jit(lambda x, matrix: multiply(x, matrix, 1, jnp.bfloat16, TPU))
    compiled = run.lower(x, matrix).compile()
    program = compiled.as_text()
    assert "convolution(" in program
    assert "multiply_reduce" not in program
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    cycles = sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', program)))
    size = 65536 * 4096 * jnp.dtype(kind).itemsize
    clock, bandwidth = {"v5e": (1.5e9, 819e9), "v6e": (1.75e9, 1638e9)}[chip]
    assert size / bandwidth >= 0.4 * cycles / clock  # The vector unit reaches 0.2.


@pytest.mark.parametrize(("rows", "written"), [(1024, True), (512, False)])
def test_on_a_v6e_operands_of_many_rows_are_written_before_the_product(rows, written):
    v6e = Backend("tpu", "TPU v6 lite", alone=True)
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, rows, 8), (4, 8)))
    run = functools.partial(multiply, outputs=1, dtype=jnp.float32)
    np.testing.assert_array_equal(run(x, matrix, backend=v6e), run(x, matrix))
    for backend, expected in ((v6e, written), (Backend("tpu", "TPU v5 lite"), False)):
        program = str(jax.make_jaxpr(functools.partial(run, backend=backend))(x, matrix))
        assert ("optimization_barrier" in program) == expected


def test_a_tpu_rounds_a_matrix_as_a_conversion_does():
    """Its compiler is slow at a lone conversion; the gradient of the matrix is not rounded."""
    odd = [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 2.0**-133, -1e-40, 3.4e38, np.inf, -np.inf, np.nan]
    matrix = jnp.asarray([[value] for value in odd], jnp.float32)
    x = jnp.ones((2, 1, 1), jnp.float32)

    def run(matrix, backend):
        return multiply(x, matrix, 1, jnp.dtype("bfloat16"), backend)

    for function in (run, jax.grad(lambda *given: jnp.sum(run(*given)))):
        found, expected = (function(matrix, backend) for backend in (TPU, PLAIN))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected)
