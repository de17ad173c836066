"""The compiled kernels: against float64, and in the model against XLA's operations."""

import dataclasses
import functools
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from mistral_jax.base import machine
from mistral_jax.checkpoint import quantization
from mistral_jax.model import attention
from mistral_jax.model.attention import visible
from mistral_jax.ops import backend, kernels, library, products
from mistral_jax.ops.backend import PLAIN
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8
from mistral_jax.ops.rows import look_up, once

# Without one, what stands in is tested here, and runs in all other tests.
COMPILER = pytest.mark.skipif(
    library.find_compiler() is None, reason="there is no C++ compiler: XLA multiplies"
)


NATIVE = backend.default()
attend = jax.jit(functools.partial(attention.attend, backend=NATIVE), static_argnums=5)


def case(dtype, rows, outputs, width):
    rng = np.random.default_rng(outputs)
    matrix = rng.normal(scale=40, size=(outputs, width)).astype(np.float32)
    matrix = matrix.clip(-128, 127) if dtype == "int8" else matrix
    x = rng.normal(size=(rows, width))
    x = x.astype(jnp.bfloat16 if dtype == "bfloat16" else np.float32)
    return jnp.asarray(x), jnp.asarray(matrix.astype(jnp.dtype(dtype)))


@jax.jit
def product(x, matrix):
    return kernels.products(x, [matrix])[0]


@jax.jit
def each_product(pairs):
    """Multiplies each pair by itself, in one program."""
    return [product(*pair) for pair in pairs]


def relative_error(found, x, matrix):
    """Returns how far off a product is, beside the sum of its terms' sizes."""
    found, x, matrix = (np.asarray(part, np.float64) for part in (found, x, matrix))
    return np.max(np.abs(found - x @ matrix.T) / (np.abs(x) @ np.abs(matrix.T)))


@COMPILER
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("rows", range(1, kernels.MOST_ROWS + 1))
def test_products_are_exact_to_the_rounding_of_float32(dtype, rows):
    """For widths and outputs that fill no vector, group or block, too."""
    assert NATIVE.has_native
    sizes = (1, 1), (5, 7), (97, 33), (64, 256), (4, 4097), (3, 9000)
    pairs = [case(dtype, rows, *size) for size in sizes]
    for (x, matrix), found in zip(pairs, each_product(pairs), strict=True):
        # The worst order of summing would be off by `width` roundings; lanes sum a 16th of it.
        bound = (matrix.shape[1] / 16 + 16) * np.finfo(np.float32).eps
        assert relative_error(found, x, matrix) < bound


@COMPILER
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("rows", [1, 8])
def test_several_matrices_give_the_products_that_each_gives_alone(dtype, rows):
    """Whatever their sizes: a part of the work may begin in one and end in another."""
    x, whole = case(dtype, rows, 3000, 150)
    matrices = jnp.split(whole, [1, 1200, 1210])
    for found, matrix in zip(jax.jit(kernels.products)(x, matrices), matrices, strict=True):
        np.testing.assert_array_equal(found, product(x, matrix))
    assert not kernels.suit(x, [*matrices, matrices[0].astype("float16")])


@COMPILER
@pytest.mark.parametrize("rows", [pytest.param(9, marks=pytest.mark.slow), 10, 131])
def test_many_rows_are_multiplied_by_bytes_where_the_processor_does(rows):
    """In groups, of which some stay near while they meet all outputs; the last may be smaller."""
    x, matrix = case("int8", rows, 6, 20)
    if kernels.suit(x, [matrix]):
        test_products_are_exact_to_the_rounding_of_float32("int8", rows)
        found = product(x.at[4, 3].set(jnp.nan), matrix)
        np.testing.assert_array_equal(np.isnan(found).all(axis=1), np.arange(rows) == 4)
    else:  # An older one leaves them to XLA.
        assert "avx512_vnni" not in machine.processor().split()
    for dtype in ("float32", "bfloat16"):
        x, matrix = case(dtype, rows, 6, 20)
        assert not kernels.suit(x, [matrix])


@COMPILER
@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        ((), ()),
        (("-mavx2", "-mfma"), ("avx2", "fma")),
        (("-march=skylake-avx512",), ("avx512vl",)),
        (("-march=cooperlake",), ("avx512_bf16", "avx512_vnni")),
    ],
)
@pytest.mark.slow
def test_another_processor_computes_the_same_by_other_instructions(flags, needed, monkeypatch):
    """In a process of its own: a library is loaded once. What does not run here is compiled."""
    if needed and platform.machine() != "x86_64":
        pytest.skip("the flags are those of x86-64, this is another processor")
    if not set(needed) <= set(machine.processor().split()):
        others = (flag for flag in library._FLAGS if flag != "-march=native")
        monkeypatch.setattr(library, "_FLAGS", (*others, *flags))
        assert library._open()
        return
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    code = f"""
import sys
sys.path[:0] = {folders}
from mistral_jax.ops import kernels, library

library._FLAGS = [flag for flag in library._FLAGS if flag != "-march=native"] + {list(flags)}
import test_kernels
for dtype in kernels.DTYPES:
    for rows in (1, 2, 3, 5, 8):
        test_kernels.test_products_are_exact_to_the_rounding_of_float32(dtype, rows)
    test_kernels.test_a_token_attends_as_by_the_definition(dtype, (3, 70, 2, 3, 20))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@COMPILER
def test_what_is_not_finite_stays_in_its_row_and_output():
    x, matrix = case("float32", 4, 6, 20)
    found = product(x.at[1, 3].set(jnp.nan), matrix.at[5, 19].set(jnp.inf))
    finite = np.isfinite(found)
    assert not finite[1].any()
    assert not finite[:, 5].any()
    assert finite[[0, 2, 3]][:, :5].all()
    x, matrix = case("int8", 4, 6, 20)
    found = product(x.at[1, 3].set(jnp.nan).at[2, 0].set(-jnp.inf), matrix)
    np.testing.assert_array_equal(np.isfinite(found).all(axis=1), [True, False, False, True])
    assert not np.isfinite(found[1:3]).any()


@COMPILER
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_it_batches_and_differentiates_as_the_plain_product(dtype):
    x, matrix = case(dtype, 3, 5, 40)
    stack = jnp.stack([x, 2 * x])
    batched = jax.vmap(product, (0, None))(stack, matrix)
    np.testing.assert_array_equal(batched[1], product(2 * x, matrix))

    def loss(products):
        return lambda x: jnp.sum(products(x, [matrix])[0] ** 2) / 1000

    found, expected = (jax.jit(jax.grad(loss(f)))(x) for f in (kernels.products, kernels._plain))
    found, expected = (np.asarray(gradient, np.float32) for gradient in (found, expected))
    bound = 1e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)


def seen(rng, rows, slots, kv_heads, group, dim, dtype):
    """Returns queries, keys, values, and the places of both: keys in any order, some missing."""
    q = rng.normal(scale=3, size=(rows, 1, kv_heads * group, dim))
    k, v = rng.normal(size=(2, rows, slots, kv_heads, dim))
    places = np.stack([rng.permutation(slots) for _ in range(rows)])
    places[rng.random(places.shape) < 0.2] = -1
    at = rng.integers(slots // 2, slots, (rows, 1))
    places[:, 0] = at[:, 0]
    if dtype == "int8":
        k, v = (QuantizedMatrix(*to_int8(jnp.asarray(x, jnp.float32), 3, jnp)) for x in (k, v))
    else:
        q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    return jnp.asarray(q), k, v, jnp.asarray(at), jnp.asarray(places)


@COMPILER
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1), (1, 5, 1, 1, 8), (3, 70, 2, 3, 20), (2, 200, 4, 4, 64), (2, 33, 2, 2, 130)],
)
def test_a_token_attends_as_by_the_definition(dtype, sizes):
    q, k, v, at, places = seen(np.random.default_rng(1), *sizes, dtype)
    found = attend(q, k, v, at, places, 40)
    mask = np.asarray(visible(at, places, 40))[:, 0]
    if dtype == "int8":
        k, v = k.dequantize(jnp.float32), v.dequantize(jnp.float32)
    found, q, k, v = (np.asarray(x, np.float64) for x in (found, q, k, v))
    for row in range(len(q)):
        for head in range(q.shape[2]):
            keys, values = (x[row, mask[row], head // sizes[3]] for x in (k, v))
            weights = scipy.special.softmax(keys @ q[row, 0, head] / sizes[4] ** 0.5)
            bound = 2**-8 if dtype == "bfloat16" else 1e-6
            np.testing.assert_allclose(found[row, 0, head], weights @ values, atol=4 * bound)


@COMPILER
def test_keys_that_are_not_seen_do_not_count_and_what_is_not_finite_shows():
    q, k, v, at, places = seen(np.random.default_rng(1), 2, 90, 2, 2, 16, "float32")
    hidden = ~np.asarray(visible(at, places, 9))[:, 0, :, None, None]
    found = attend(q, k, v, at, places, 9)
    other = attend(q, jnp.where(hidden, jnp.nan, k), jnp.where(hidden, jnp.inf, v), at, places, 9)
    np.testing.assert_array_equal(other, found)
    assert np.isnan(attend(q, k.at[1, 0, 0, 0].set(jnp.nan), v, at, places, 9)[1, :, :2]).all()
    assert not np.asarray(attend(q, k, v, at - 1000, places, 9)).any()  # padding: zeros


@COMPILER
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_attends_with_the_plain_gradient(dtype):
    *qkv, at, places = seen(np.random.default_rng(2), 2, 12, 2, 2, 8, dtype)

    def gradient(backend):
        def total(x):
            mixed = attention.attend(*x, at, places, 7, backend=backend)
            return jnp.sum(mixed.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(total))(qkv)

    for ours, plain in zip(gradient(NATIVE), gradient(PLAIN), strict=True):
        ours, plain = (np.asarray(x.astype(jnp.float32)) for x in (ours, plain))
        bound = 1e-5 if dtype == "float32" else 3e-2
        np.testing.assert_allclose(ours, plain, atol=bound * np.abs(plain).max())


@COMPILER
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 1000)])
def test_a_matrix_is_widened_as_it_is(dtype, shape):
    rng = np.random.default_rng(1)
    matrix = jnp.asarray(rng.normal(scale=40, size=shape), jnp.float32).astype(dtype)
    found = jax.jit(kernels.widen)(matrix, jnp.zeros(3))
    np.testing.assert_array_equal(found, matrix.astype(jnp.float32))


@COMPILER
def test_a_prompt_is_multiplied_in_float32_where_bfloat16_has_no_instructions(monkeypatch):
    """To the rounding of float32 sums; each matrix makes room for the next."""
    monkeypatch.setattr(kernels, "_constant", {"multiplies_bfloat16": 0}.get)
    x, matrix = case("bfloat16", 100, 60, 700)
    x = jnp.expand_dims(x, 0)
    quantized = QuantizedMatrix(*to_int8(matrix.astype(jnp.float32), 1, jnp))
    for kernel, exact in ((matrix, matrix), (quantized, quantized.dequantize(jnp.float32))):
        run = jax.jit(lambda x, kernel: products.multiply(x, kernel, 1, jnp.bfloat16, NATIVE))
        assert "mistral_jax_widen" in run.lower(x, kernel).as_text()
        assert relative_error(run(x, kernel)[0], x[0], exact) < 60 * np.finfo(np.float32).eps
    assert not kernels.should_widen(x[:, :9], matrix)
    assert not kernels.should_widen(x.astype(jnp.float32), matrix)
    monkeypatch.setattr(kernels, "_constant", {"multiplies_bfloat16": 1}.get)
    assert not kernels.should_widen(x, matrix)


@COMPILER
def test_one_matrix_after_another_is_widened_and_none_kept():
    def chain(x, matrices):
        for matrix in matrices:
            x = products._multiply_wide(x, matrix).astype(x.dtype)
        return x.astype(jnp.float32).sum()

    matrices = [jnp.ones((256, 256), jnp.bfloat16)] * 12
    x = jnp.ones((1, 256), jnp.bfloat16)
    compiled = jax.jit(chain).lower(x, matrices).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * 256 * 256
    kept = jax.tree.leaves(jax.vjp(chain, x, matrices)[1])
    assert sum(one.nbytes for one in kept) < 13 * 2 * 256 * 256


@COMPILER
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_product_in_float32_has_the_plain_gradient(dtype):
    x, matrix = case("bfloat16", 20, 30, 40)
    matrix = matrix.astype(dtype)

    def gradient(product):
        return jax.grad(lambda x: jnp.sum(product(x, matrix) ** 2))(x).astype(jnp.float32)

    expected = gradient(lambda x, matrix: kernels._plain(x, [matrix])[0])
    bound = 2e-2 * jnp.max(jnp.abs(expected))
    np.testing.assert_allclose(gradient(products._multiply_wide), expected, atol=bound)


@COMPILER
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
def test_rows_are_put_as_they_are_and_others_stay(dtype):
    table = jnp.arange(24).reshape(3, 4, 2).astype(dtype)
    rows, places = -jnp.ones((3, 1, 2), dtype), jnp.array([[2], [4], [-1]])
    expected = table.at[0, 2].set(-1)  # There is no place 4, nor one before the first.
    np.testing.assert_array_equal(jax.jit(kernels.put)(table, rows, places), expected)
    np.testing.assert_array_equal(kernels.put(table, rows, places), expected)
    np.testing.assert_array_equal(table.ravel(), np.arange(24))


@COMPILER
def test_decoding_does_not_copy_a_cache():
    table, rows = jnp.zeros((2, 5, 3, 7), jnp.bfloat16), jnp.ones((2, 1, 3, 7), jnp.bfloat16)

    def fill(table, rows):
        return jax.lax.fori_loop(
            0, 5, lambda i, table: kernels.put(table, rows, jnp.full((2, 1), i)), table
        )

    compiled = jax.jit(fill, donate_argnums=0).lower(table, rows).compile()
    assert not re.search(r"bf16\[2,5,3,7\]\S* copy", compiled.as_text())
    np.testing.assert_array_equal(compiled(table, rows), jnp.ones((2, 5, 3, 7), jnp.bfloat16))


@COMPILER
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_computes_the_same_with_and_without(dtype, quantize):
    model, params = tiny.build(dim=64)
    model = dataclasses.replace(model, dtype=jnp.dtype(dtype))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    if quantize:
        which = quantization.matrices(params, output=True)
        params = quantization.quantize(params, quantize, which)
    tokens = jnp.array([[3, 1, 4, 1]])

    def logits(backend):
        traced = model.clone(backend=backend)
        return jax.jit(lambda: traced.apply({"params": params}, tokens, jnp.arange(4)[None])[0])()

    with_kernels, without = logits(NATIVE), logits(PLAIN)
    # Roundings of activations to bfloat16 may fall the other way.
    bound = 1e-5 if dtype == "float32" else 2e-2
    assert jnp.max(jnp.abs(with_kernels - without)) < bound * jnp.max(jnp.abs(without))


@pytest.mark.parametrize("integers", ["int32", "uint8"])
def test_rows_are_named_by_integers_of_any_width(integers):
    table = jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2)
    tokens = jnp.array([[2, 0]]).astype(integers)
    np.testing.assert_array_equal(look_up(table, tokens, NATIVE), table[jnp.array([[2, 0]])])


def test_what_is_computed_once_keeps_its_bits_and_its_gradient():
    x = jnp.array([[[0.0, -0.0], [jnp.nan, jnp.inf]], [[1.5, 0.25], [3.0, -7.0]]])
    same = jax.jit(once, static_argnums=1)(x, NATIVE)
    np.testing.assert_array_equal(*(np.asarray(a).view(np.uint32) for a in (same, x)))
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(once(x, NATIVE) * same))(x), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_of_a_table_are_taken_as_they_are_with_their_gradient(dtype):
    table = jnp.arange(12, dtype=jnp.float32).reshape(4, 3).astype(dtype)
    tokens = jnp.array([[2, 0], [2, 9]])  # what is beyond the last is the last
    np.testing.assert_array_equal(
        look_up(table, tokens, NATIVE), table[jnp.array([[2, 0], [2, 3]])]
    )
    gradient = jax.grad(lambda table: look_up(table, tokens, NATIVE).sum().astype(jnp.float32))
    np.testing.assert_array_equal(gradient(table)[:, 0].astype(jnp.float32), [1, 0, 2, 1])
