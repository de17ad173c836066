"""Quantised kernels: how far off they may be, the paper's levels, and all else as it was."""

import dataclasses
import functools
import itertools
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import sources
import tiny
from flax.traverse_util import flatten_dict
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch

from mistral_jax.checkpoint import checkpoint, manifest, precision
from mistral_jax.checkpoint.lora import (
    PROJECTIONS,
    Lora,
    adapter_shardings,
    attach,
    init_adapters,
    merge,
)
from mistral_jax.checkpoint.quantization import KINDS, abstract, matrices, quantize
from mistral_jax.config import ModelConfig
from mistral_jax.engine.generate import generate
from mistral_jax.engine.sampling import Sampling
from mistral_jax.model.transformer import stack_layers
from mistral_jax.ops import backend
from mistral_jax.ops.products import multiply
from mistral_jax.ops.quantized import NF4_LEVELS, QuantizedMatrix
from mistral_jax.parallel.sharding import abstract_params, on_mesh

# Wide enough for several blocks of 64 in a row, and one axis (96) that has none.
MODEL, PARAMS = tiny.build(dim=128, hidden_dim=96, sliding_window=None)
TEXT = np.arange(11) * 7 % 53  # as long as prompt and answer below
LORA = Lora(rank=3, alpha=5.0, targets=("q_proj", "o_proj", "down_proj"))


@functools.cache
def quantized(kind):
    return quantize(jax.tree.map(jnp.copy, PARAMS), kind)


def is_quantized(x):
    return isinstance(x, QuantizedMatrix)


def dequantized(params, dtype=jnp.float32):
    """Returns params with float kernels again."""

    @jax.jit
    def widen(params):
        return jax.tree.map(
            lambda x: x.dequantize(dtype) if is_quantized(x) else x, params, is_leaf=is_quantized
        )

    return widen(params)


def random_adapters(params=PARAMS):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_adapters(LORA, params, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.2, size=x.shape), x.dtype), shapes)


def close(found, expected, tolerance):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_projections_of_layers_and_nothing_else(kind):
    flat, before = flatten_dict(quantized(kind)), flatten_dict(PARAMS)
    assert list(flat) == list(before)
    for path, found in flat.items():
        assert is_quantized(found) == (path[-2] in PROJECTIONS)
        assert found.shape == before[path].shape
        assert found.ndim == before[path].ndim
        if not is_quantized(found):
            np.testing.assert_array_equal(found, before[path])
    kernel = flat["layers_0", "attn", "q_proj", "kernel"]
    assert kernel.values.dtype == {"int8": jnp.int8, "nf4": jnp.uint4}[kind]
    assert kernel.scale.shape == {"int8": (4, 8, 1), "nf4": (4, 8, 2)}[kind]
    kernel = flat["layers_0", "mlp", "down_proj", "kernel"]
    assert kernel.scale.shape == {"int8": (128, 1), "nf4": (128, 2)}[kind]  # 96 is 2 x 48


def test_int8_is_within_half_a_step_of_each_output():
    before = flatten_dict(PARAMS)
    for path, kernel in flatten_dict(quantized("int8")).items():
        if is_quantized(kernel):
            error = np.abs(kernel.dequantize(jnp.float32) - before[path])
            # Up to the rounding of values that are 127 steps: 127 * 2 ** -23 of half a step.
            assert (error <= 0.5 * kernel.scale * (1 + 1e-4)).all()
            axes = tuple(i for i, size in enumerate(kernel.scale.shape) if size == 1)
            largest = np.abs(before[path]).max(axes, keepdims=True)
            np.testing.assert_allclose(kernel.scale, largest / 127.5, rtol=1e-6)


@pytest.mark.parametrize("outputs", [1, 2])
def test_int8_is_that_of_qwix_to_the_bit(outputs):
    kernel = np.random.default_rng(0).normal(size=(6, 5, 40)).astype(np.float32)
    kernel[0], kernel[1, 0, :2] = 0, (4, -4)
    path = ("a", "kernel")
    made = quantize({"a": {"kernel": jnp.asarray(kernel)}}, "int8", {path: outputs})["a"]["kernel"]
    theirs = qwix.quantize(jnp.asarray(kernel), qtype=jnp.int8, channelwise_axes=range(outputs))
    np.testing.assert_array_equal(made.values, theirs.qvalue)
    np.testing.assert_array_equal(made.scale, theirs.scale)


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        (None, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product((None, "tensor", "fsdp"), (True, False))
            if case != (None, False)
        ),
    ],
)
def test_loading_quantises_projections_and_the_output(tied, layout, tmp_path):
    fields = {"dim": 128, "hidden_dim": 96, "vocab_size": 56, "n_heads": 8, "n_layers": 1}
    model, params = tiny.build(tied=tied, **fields)
    checkpoint.save(tmp_path / "x", model.config, params)
    model, found, _ = checkpoint.load(tmp_path / "x", quantize="int8", sharding=layout)
    places = matrices(params, output=True)
    assert ("embed", "embedding") in places if tied else ("lm_head", "kernel") in places
    assert {path for path, x in flatten_dict(found).items() if is_quantized(x)} == set(places)
    expected = quantize(params, "int8", places)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    with on_mesh(found):
        logits = tiny.alone(model, found, TEXT)
    close(logits, tiny.alone(MODEL.clone(config=model.config), dequantized(expected), TEXT), 1e-5)
    (row,) = generate(model, found, [[1, 5, 9]], 8, sampling=Sampling(0), stop_ids=())
    (other,) = generate(
        model, dequantized(expected), [[1, 5, 9]], 8, sampling=Sampling(0), stop_ids=()
    )
    assert row.tokens == other.tokens


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_int8(tied, tmp_path):
    """As saved, and as converted a tensor at a time: the same bits, and they load everywhere."""
    tensors = sources.tensors(tied=tied)
    fields = {"tied_embeddings": True} if tied else {}
    source = sources.write(tmp_path / "s", "official-safetensors", tensors, **fields)
    to_orbax(source, tmp_path / "float")
    to_orbax(source, tmp_path / "converted", quantize="int8")
    model, params, _ = checkpoint.load(tmp_path / "float", quantize="int8")
    checkpoint.save(tmp_path / "saved", model.config, params)
    assert manifest.read(tmp_path / "converted")[1]["quantized"] == "int8"
    for name, options in [
        ("saved", {}),
        ("converted", {}),
        ("converted", {"quantize": "int8"}),
        ("converted", {"sharding": "fsdp"}),
    ]:
        _, found, _ = checkpoint.load(tmp_path / name, **options)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)
    half = checkpoint.load(tmp_path / "converted", dtype="bfloat16")[1]
    kernel = half["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert (kernel.values.dtype, kernel.scale.dtype) == (jnp.int8, jnp.float32)
    assert half["final_norm"]["scale"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="is rounded to 8 bits, which PyTorch's formats do not"):
        to_torch(tmp_path / "converted", tmp_path / "t")
    with pytest.raises(ValueError, match=r"layers_0/\S+ is quantised already: leave quantize out"):
        quantize(params, "nf4")


@pytest.mark.parametrize(("dtype", "gigabytes"), [("bfloat16", 7.4), ("float32", 7.7)])
def test_7b_takes_what_the_readme_says(dtype, gigabytes):
    shapes = abstract_params(MODEL.clone(config=ModelConfig.from_name("mistral-7b-v0.3")))
    small = precision.typed(abstract(shapes, matrices(shapes, output=True)), dtype)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(small))
    assert round(size / 1e9, 1) == gigabytes


def test_nf4_takes_the_nearest_of_its_levels_in_each_block():
    for path, kernel in flatten_dict(quantized("nf4")).items():
        if not is_quantized(kernel):
            continue
        blocks = kernel.scale.shape[-1]
        before = np.asarray(flatten_dict(PARAMS)[path]).reshape(*kernel.shape[:-1], blocks, -1)
        scale = np.abs(before).max(-1)
        np.testing.assert_allclose(kernel.scale, scale, rtol=1e-6)
        nearest = np.abs(before[..., None] / scale[..., None, None] - NF4_LEVELS).argmin(-1)
        expected = (NF4_LEVELS[nearest] * scale[..., None]).reshape(kernel.shape)
        np.testing.assert_allclose(kernel.dequantize(jnp.float32), expected, rtol=1e-6)


def test_the_levels_are_the_paper_s():
    """Quantiles of the normal distribution on either side of zero, the outermost at 1."""
    normal, outermost = statistics.NormalDist(), (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = [normal.inv_cdf(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0, *below]) / max(above)
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_qwix_sees_the_same_kernel(kind):
    kernel = quantized(kind)["layers_1"]["attn"]["o_proj"]["kernel"]
    qtype = "nf4" if kind == "nf4" else jnp.int8
    theirs = qwix.dequantize(qwix.QArray(kernel.values, kernel.scale, qtype=qtype))
    np.testing.assert_array_equal(kernel.dequantize(jnp.float32), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 40), (6, 5, 8), (6, 5, 80)])
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("compiler", [True, False])
def test_products_are_those_of_the_dequantised_kernel(kind, shape, rows, compiler):
    """With one block of nf4 in a row, or several; few rows of int8 go by kernels or integers."""
    here = backend.default()
    here = here if compiler else dataclasses.replace(here, kernels=())
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    path = ("a", "kernel")
    made = quantize({"a": {"kernel": kernel}}, kind, {path: 1})["a"]["kernel"]
    x = rng.normal(size=(1, rows, made.values[0].size)).astype(np.float32)
    expected = x.astype(np.float64) @ np.float64(made.dequantize(jnp.float32)).reshape(6, -1).T
    run = jax.jit(functools.partial(multiply, outputs=1, dtype=jnp.float32, backend=here))
    close(run(x, made), expected, 1e-6)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_product_in_integers_rounds_each_row_to_24_bits_and_no_more(rows):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 3, 40)) * 10.0 ** rng.integers(-9, 9, (rows, 3, 1))
    x[0, 0], x[0, 1, :2] = 0, (9e9, -9e9)  # nothing, and the largest numbers of either sign
    values = rng.integers(-127, 128, (30, 40)).astype(np.int8)
    values[0] = 127
    scale = rng.random((30, 1)).astype(np.float32)
    x, kernel = x.astype(np.float32), QuantizedMatrix(jnp.asarray(values), jnp.asarray(scale))
    found = jax.jit(functools.partial(kernel.product, in_integers=True))(x)
    exact = x.astype(np.float64) @ (values * scale.astype(np.float64)).T
    step = np.abs(x).max(-1, keepdims=True) / (127 << 16)
    bound = step / 2 * np.abs(values * scale).sum(-1)
    # Integers add up exactly; float32 rounds the sums of parts, and their products with scales.
    assert (np.abs(found - exact) <= bound + 2.0**-22 * np.abs(x) @ np.abs(values * scale).T).all()
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("nf4", 0.3)])
def test_logits_are_those_of_the_dequantised_model_and_close_to_the_first(kind, tolerance):
    params = quantized(kind)
    logits = tiny.alone(MODEL, params, TEXT)
    close(logits, tiny.alone(MODEL, dequantized(params), TEXT), 1e-6)
    plain = tiny.alone(MODEL, PARAMS, TEXT)
    close(logits, plain, tolerance)
    assert np.abs(logits - plain).max() > 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_beside_it_as_beside_the_same_kernels_in_float(kind):
    frozen, adapters = quantized(kind), random_adapters()
    tokens, positions = tiny.ragged([TEXT])

    @jax.jit
    def gradient(adapters, frozen):
        def loss(adapters):
            params = attach(frozen, adapters, LORA.scale)
            logits, _ = MODEL.apply({"params": params}, tokens, positions)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

        return jax.grad(loss)(adapters)

    found, expected = gradient(adapters, frozen), gradient(adapters, dequantized(frozen))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0
        close(a, b, 1e-5)


@pytest.mark.parametrize(("kind", "remat"), [("int8", None), ("nf4", "nothing_saveable")])
def test_layers_of_it_are_stacked_and_scanned(kind, remat):
    params = attach(quantized(kind), random_adapters(), LORA.scale)
    stacked = stack_layers(params)
    assert stacked["layers"]["attn"]["q_proj"]["kernel"].shape == (2, 4, 8, 128)
    scanned = MODEL.clone(scan=True, remat=remat)
    close(tiny.alone(scanned, stacked, TEXT), tiny.alone(MODEL, params, TEXT), 1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [("int8", jnp.float16), ("nf4", jnp.bfloat16)])
def test_models_in_16_bits(kind, dtype):
    """Scales are float32 whatever the kernels were, and products in the model's dtype."""
    half = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    params = quantize(half, kind)
    kernel = params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.scale.dtype == kernel.dtype == jnp.float32
    assert kernel.dequantize(dtype).dtype == dtype
    model = MODEL.clone(dtype=dtype)
    logits = tiny.alone(model, params, TEXT)
    close(logits, tiny.alone(model, dequantized(params, dtype), TEXT), 1e-2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("int8", "tensor"), pytest.param("nf4", "fsdp_tensor", marks=pytest.mark.slow)],
)
def test_it_lies_where_the_kernels_lay(kind, name, tmp_path):
    model, params = tiny.build(dim=128, hidden_dim=96, vocab_size=56, n_heads=8, n_layers=1)
    checkpoint.save(tmp_path / "x", model.config, params)
    model, params, _ = checkpoint.load(tmp_path / "x", sharding=name)
    places = {path: x.sharding for path, x in flatten_dict(params).items()}
    params = quantize(params, kind)
    expected = tiny.alone(model, dequantized(jax.device_get(params)), TEXT)
    for path, x in flatten_dict(params).items():
        assert x.sharding.is_equivalent_to(places[path], x.ndim)
    adapters = random_adapters(params)
    spread = jax.tree.map(jax.device_put, adapters, adapter_shardings(params, adapters))
    with on_mesh(params):
        close(tiny.alone(model, params, TEXT), expected, 1e-5)
        beside = tiny.alone(model, attach(params, spread, 1.0), TEXT)
    assert np.abs(beside - expected).max() > 1e-2
    # Nothing is gathered for being dequantised.
    kernel = params["layers_0"]["mlp"]["up_proj"]["kernel"]
    program = jax.jit(lambda x: x.dequantize(jnp.float32)).lower(kernel).compile().as_text()
    assert "all-gather" not in program


def test_text_is_made_with_it():
    params, prompt = quantized("nf4"), [1, 5, 9]
    (row,) = generate(MODEL, params, [prompt], 8, sampling=Sampling(0), stop_ids=())
    logits = tiny.alone(MODEL, params, prompt + row.tokens)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == row.tokens


def test_the_float_kernels_are_given_back():
    params = jax.tree.map(jnp.copy, PARAMS)
    made = quantize(params, "int8")
    for path, x in flatten_dict(params).items():
        assert x.is_deleted() == (path[-2] in PROJECTIONS)
    assert not any(x.is_deleted() for x in jax.tree.leaves(made))


def test_what_it_cannot_do_is_refused(tmp_path, monkeypatch):
    params = quantized("nf4")
    with pytest.raises(
        ValueError, match=r"layers_\d/\S+ is quantised, and takes no product; merge"
    ):
        merge(params, random_adapters())
    with pytest.raises(ValueError, match=r"params has layers_0/\S+ in 4 bits; save the model as"):
        checkpoint.save(tmp_path / "x", MODEL.config, params)
    with pytest.raises(ValueError, match="quantize is 'int4'; expected int8 or nf4"):
        quantize(PARAMS, "int4")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"by qwix: pip install 'mistral-jax-flax\[qlora\]'"):
        quantize(PARAMS, "nf4")
    with pytest.raises(ValueError, match="quantize is 'nf4'; expected None or 'int8'"):
        checkpoint.load(quantize="nf4")
