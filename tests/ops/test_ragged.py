"""The TPU's decode kernel attends as the plain path does, and reads filled slots only."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mistral_jax.config import ModelConfig
from mistral_jax.model.attention import attend, visible
from mistral_jax.ops import ragged
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8
from mistral_jax.ops.rows import swap_heads
from mistral_jax.parallel.sharding import Layout
from mistral_jax.planning import forecast, programs

RULES = (("batch", "data"), ("heads", ("kv", "group")), ("kv_heads", ("kv",)))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(ragged, "LANES", 8)
    monkeypatch.setattr(ragged, "BLOCK", 16)
    monkeypatch.setattr(ragged, "ROWS", 2)


def rings(lengths, slots):
    """Positions of rows of these lengths, [B, 1], and of the keys in their slots, [B, S]."""
    held = np.full((len(lengths), slots), -1, np.int32)
    for row, length in zip(held, lengths, strict=True):
        places = np.arange(max(0, length - slots), length)
        row[places % slots] = places
    return jnp.asarray(lengths, jnp.int32)[:, None] - 1, jnp.asarray(held)


def arrays(lengths, slots, heads, kv_heads=2, dtype="float32", head_dim=8):
    """Random queries, keys and values by heads, with NaN in all slots that are not filled."""
    rng = np.random.default_rng(slots)
    batch = len(lengths)
    q = jnp.asarray(rng.standard_normal((batch, 1, heads, head_dim)), dtype)
    empty = np.arange(slots) >= np.array(lengths)[:, None]

    def kept():
        x = rng.standard_normal((batch, kv_heads, slots, head_dim)).astype(np.float32)
        x[np.broadcast_to(empty[:, None], x.shape[:3])] = np.nan
        return jnp.asarray(x, dtype)

    return q, kept(), kept()


def kernel(window=None, dilation=1, rules=()):
    def mask(q_positions, kv_positions):
        return visible(q_positions, kv_positions, window, dilation)

    return jax.jit(functools.partial(ragged.attend, mask, rules=rules, interpret=True))


@functools.partial(jax.jit, static_argnames=("window", "dilation"))
def plain(q, k, v, *positions, window=None, dilation=1):
    """The plain path in float32; it gets zeros in place of NaN."""
    q, k, v = (jnp.nan_to_num(x.astype(jnp.float32)) for x in (q, k, v))
    return attend(q, k, v, *positions, window, dilation, by_heads=True)


@pytest.mark.parametrize(
    ("slots", "heads", "seen"),
    [
        (48, 8, {}),  # three blocks
        (40, 2, {"window": 30}),  # blocks of 8, because 16 does not divide 40; G = 1
        (32, 16, {"window": 32}),
        (40, 4, {"window": 20, "dilation": 2}),
    ],
)
def test_results_equal_the_plain_path(slots, heads, seen):
    # An empty row first and last, one token, a part of a block, full, and rings of several laps.
    lengths = [0, 1, 13, slots, slots + 5, 7 * slots + 9, 16, 0]
    given, positions = arrays(lengths, slots, heads), rings(lengths, slots)
    found, expected = kernel(**seen)(*given, *positions), plain(*given, *positions, **seen)
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.isfinite(found).all()
    tokens = np.array(lengths) > 0
    np.testing.assert_allclose(found[tokens], expected[tokens], rtol=0, atol=2e-6)
    assert not found[~tokens].any()


def test_low_precision_operands_still_score_and_sum_in_float32():
    lengths = [20, 50]
    given, positions = arrays(lengths, 32, 8, dtype="bfloat16"), rings(lengths, 32)
    found, expected = kernel()(*given, *positions), plain(*given, *positions)
    assert found.dtype == jnp.bfloat16
    # A weight and the result are rounded to 8 bits each.
    error = np.abs(found.astype(jnp.float32) - expected).max()
    assert error <= 2 * 2.0**-9 * np.nanmax(np.abs(given[2].astype(np.float32)))


def test_int8_numbers_equal_what_they_stand_for():
    lengths = [20, 50]
    (q, *kept), positions = arrays(lengths, 32, 4), rings(lengths, 32)
    small = [QuantizedMatrix(*to_int8(jnp.nan_to_num(x), 3, jnp)) for x in kept]
    wide = [x.dequantize(jnp.float32) for x in small]
    small = [
        QuantizedMatrix(x.values, jnp.where(jnp.isnan(y[..., 0]), jnp.nan, x.scale[..., 0]))
        for x, y in zip(small, kept, strict=True)
    ]
    expected = plain(q, *wide, *positions)
    np.testing.assert_allclose(kernel()(q, *small, *positions), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 1)])
def test_on_a_mesh_each_device_attends_for_its_rows_and_heads(sizes):
    lengths = [13, 0, 32, 50]
    given, positions = arrays(lengths, 32, 4), rings(lengths, 32)
    expected = kernel()(*given, *positions)
    axes = ("data", None, ("kv", "group")), ("data", "kv"), ("data", "kv")
    with jax.set_mesh(jax.make_mesh(sizes, ("data", "kv", "group"), (AxisType.Auto,) * 3)):
        split = [jax.device_put(x, PartitionSpec(*y)) for x, y in zip(given, axes, strict=True)]
        assert ragged.partition.fits(*split[:2], RULES, by_heads=True)
        run = kernel(rules=RULES).lower(*split, *positions).compile()
        found = run(*split, *positions)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert not re.findall(r"all-\w+|collective-permute|reduce-scatter", run.as_text())


def layer(heads=32, kv_heads=8, slots=4096, dtype="bfloat16", kept=None, head_dim=128, rows=1):
    q = jax.ShapeDtypeStruct((rows, 1, heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((rows, kv_heads, slots, head_dim), kept or dtype)
    if kept == "int8":
        k = QuantizedMatrix(k, jax.ShapeDtypeStruct(k.shape[:3], "float32"))
    return q, k, k


def test_it_says_which_arrays_it_takes(monkeypatch):
    monkeypatch.setattr(ragged, "LANES", 128)
    fits = functools.partial(ragged.fits, rules=(), alone=True)
    assert fits(*layer())
    assert fits(*layer(dtype="float32", slots=256, heads=8))
    assert fits(*layer(kept="int8"))
    assert not ragged.fits(*layer(), (), alone=False)  # without a mesh XLA may have to split q
    assert not fits(*layer(dtype="float16"))
    assert not fits(*layer(dtype="float32", kept="bfloat16"))
    assert not fits(*layer(head_dim=64))
    assert not fits(*layer(slots=4000))
    chunk = jax.ShapeDtypeStruct((1, 2, 32, 128), "bfloat16")
    assert not fits(chunk, *layer()[1:])


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
def test_a_layer_of_7b_lowers_for_a_tpu_and_states_its_cost(monkeypatch, kept):
    monkeypatch.setattr(ragged, "LANES", 128)
    monkeypatch.setattr(ragged, "BLOCK", 512)
    wide = "float32" if kept == "float32" else "bfloat16"
    rows, slots = 3, 1024
    q, k, v = layer(dtype=wide, kept=kept, rows=rows, slots=slots)
    positions = [jax.ShapeDtypeStruct((rows, n), jnp.int32) for n in (1, slots)]
    run = functools.partial(ragged.attend, functools.partial(visible, window=slots, dilation=2))
    lowered = jax.export.export(jax.jit(run), platforms=["tpu"])(q, k, v, *positions)
    text = lowered.mlir_module()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 1
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves((q, q, k, v, positions[1]))]
    moved = re.search(r"bytes_accessed\\22:\s*(\d+)", text)
    assert int(moved[1]) == sum(sizes)


def test_attention_picks_the_kernel_on_a_tpu_alone(monkeypatch):
    monkeypatch.setattr(ragged, "LANES", 128)
    taken = []

    def attend_instead(mask, q, *arrays):
        taken.append(len(arrays))
        return q

    monkeypatch.setattr(ragged, "attend", attend_instead)
    tpus = [SimpleNamespace(platform="tpu")] * 2
    tpu, several = Backend.of(tpus[:1]), Backend.of(tpus)
    q, k, v = (jnp.zeros(x.shape, x.dtype) for x in layer(slots=128))
    positions = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 128), jnp.int32)

    def look(backend=tpu, by_heads=True):
        given = (q, k, v) if by_heads else (q, swap_heads(k), swap_heads(v))
        jax.eval_shape(
            lambda *given: attend(*given, *positions, None, by_heads=by_heads, backend=backend),
            *given,
        )

    look(several)
    look(Backend("gpu"))
    look(by_heads=False)
    assert not taken
    look()
    assert taken == [5]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [None, "int8"])
def test_a_step_on_a_tpu_copies_no_cache(monkeypatch, kept):
    """Compiled by the TPU's own compiler, for a TPU that need not exist."""
    monkeypatch.setattr(ragged, "LANES", 128)
    monkeypatch.setattr(ragged, "BLOCK", 512)
    monkeypatch.setattr(ragged, "ROWS", 8)
    try:
        devices = forecast.tpu_devices("v5e", "1x1")
    except ValueError as error:
        pytest.skip(str(error))
    config = dataclasses.replace(ModelConfig.from_name("mistral-7b-v0.1"), num_layers=2)
    mesh = jax.make_mesh((1,), ("device",), (AxisType.Auto,), devices=list(devices))
    layout = Layout(mesh, ())
    of = programs.shapes(layout, 12, 2048, "bfloat16", kv_cache_dtype=kept)
    model = programs.model(config, layout, of)
    compiled = programs.lower("decode", model, layout, of).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == config.num_layers
    whole = re.compile(r"= \w+\[12,8,2048\S* (?:copy|transpose|reshape|convert)\(")
    assert not whole.findall(text)
    assert compiled.memory_analysis().temp_size_in_bytes < 20e6
