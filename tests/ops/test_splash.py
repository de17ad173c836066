"""The TPU's kernel attends as the plain path does: interpreted on a CPU, and lowered for a TPU."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mistral_jax.model.attention import attend
from mistral_jax.ops import splash
from mistral_jax.ops.backend import PLAIN, Backend

LENGTH = 300
# Of one key, of less than a block, a block, and more than there are queries.
WINDOWS = (None, 1, 100, 128, 320)
# Heads on two axes of a mesh: those of one key-value head on "group".
RULES = (("batch", "data"), ("heads", ("kv", "group")), ("kv_heads", ("kv",)), ("mlp", "kv"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 128)


def rows(*texts, width):
    """Positions [B, width] of rows given as (start, first position, tokens) of each text."""
    positions = np.full((len(texts), width), -1, np.int32)
    for row, parts in zip(positions, texts, strict=True):
        for start, first, tokens in parts:
            row[start : start + tokens] = np.arange(first, first + tokens)
    return jnp.asarray(positions)


# Whole texts: one; several, with padding between; padding on both sides; none.
ALONE = rows(
    [(0, 0, LENGTH)], [(0, 0, 40), (40, 0, 150), (200, 0, 90)], [(7, 0, 260)], [], width=LENGTH
)
# After 70 slots: full of a longer text, partly empty, empty before a padded chunk, empty.
CACHED = rows([(0, 430, 370)], [(50, 0, 320)], [(75, 0, 250)], [], width=LENGTH + 70)


def qkv(keys, dtype=jnp.float32, head_dim=8, batch=4, heads=4, kv_heads=2):
    rng = np.random.default_rng(keys)
    shapes = ((LENGTH, heads), (keys, kv_heads), (keys, kv_heads))
    return [jnp.asarray(rng.standard_normal((batch, *s, head_dim)), dtype) for s in shapes]


def kernel(positions, window, rules=(), interpret=True):
    """`splash.attend` as a function of q, k, v, whose queries are the last of `positions`."""

    def run(q, k, v):
        last = positions[:, -LENGTH:]
        return splash.attend(q, k, v, last, positions, window, rules, interpret=interpret)

    return run


def plain(positions, window):
    aligned = positions.shape[1] == LENGTH
    return lambda *qkv: attend(*qkv, positions[:, -LENGTH:], positions, window, aligned=aligned)


def with_gradients(function, positions):
    """Jits a function to its result and the gradient of a sum over tokens, padding left out."""
    factors = np.random.default_rng(1).standard_normal((LENGTH, 1, 1)).astype(np.float32)
    factors = jnp.where(positions[:, -LENGTH:, None, None] >= 0, factors[None], 0)

    def total(*qkv):
        result = function(*qkv)
        return (result.astype(jnp.float32) * factors).sum(), result

    @jax.jit
    def run(*qkv):
        gradients, result = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
        return result, *gradients

    return run


@pytest.mark.parametrize(
    ("positions", "window"),
    [
        *((CACHED, window) for window in WINDOWS),
        (ALONE, 100),
        *(pytest.param(ALONE, w, marks=pytest.mark.slow) for w in WINDOWS if w != 100),
    ],
    ids=lambda x: {id(ALONE): "alone", id(CACHED): "cached"}.get(id(x), str(x)),
)
def test_results_and_gradients_equal_the_plain_path(positions, window):
    arrays = qkv(positions.shape[1])
    expected = with_gradients(plain(positions, window), positions)(*arrays)
    found = with_gradients(kernel(positions, window), positions)(*arrays)
    assert all(np.isfinite(x).all() for x in found)
    tokens = np.asarray(positions[:, -LENGTH:] >= 0)
    np.testing.assert_allclose(found[0][tokens], expected[0][tokens], rtol=0, atol=2e-6)
    largest = max(np.abs(x).max() for x in expected[1:])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("head_dim", [8, 16])  # whose roots are inexact, and a power of two
def test_low_precision_operands_still_score_and_sum_in_float32(head_dim):
    arrays = qkv(CACHED.shape[1], jnp.bfloat16, head_dim)
    q, k, v = (x.astype(jnp.float32) for x in arrays)
    scale = head_dim**-0.5
    q = (q * scale).astype(jnp.bfloat16).astype(jnp.float32) / scale
    expected = with_gradients(plain(CACHED, 100), CACHED)(q, k, v)
    found = with_gradients(kernel(CACHED, 100), CACHED)(*arrays)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    tokens = np.asarray(CACHED[:, -LENGTH:] >= 0)
    error = np.abs(found[0].astype(jnp.float32) - expected[0])[tokens]
    assert error.max() <= 2.0**-9 * np.abs(v).max()  # only the result is rounded, to 8 bits
    for ours, theirs in zip(found[1:], expected[1:], strict=True):  # factors of gradients are, too
        error = np.abs(ours.astype(jnp.float32) - theirs)
        assert error.max() <= 2.0**-6 * np.abs(theirs).max()


def test_large_scores_and_rows_without_tokens_give_finite_gradients():
    q, k, v = qkv(LENGTH)
    for x in with_gradients(kernel(ALONE, 2), ALONE)(1e4 * q, k, v):
        assert np.isfinite(x).all()


def looped(function):
    """Applies a function of q, k, v to its own result, in a loop that a gradient computes again."""

    def total(q, k, v):
        body = jax.checkpoint(lambda q, _: (function(q, k, v), None))
        return jax.lax.scan(body, q, None, length=2)[0].astype(jnp.float32).sum()

    return total


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_every_product_has_its_precision_in_the_gradient_too(dtype, precision):
    run = kernel(CACHED[:1], 100, interpret=False)
    arrays = qkv(CACHED.shape[1], jnp.dtype(dtype), batch=1)
    with jax.default_matmul_precision("tensorfloat32"):  # what a user may ask of other products
        program = str(jax.make_jaxpr(jax.grad(looped(run), argnums=(0, 1, 2)))(*arrays))
    products = re.findall(r"precision=\((\S+), (\S+)\)", program)
    assert len(products) == program.count("dot_general[") > 6
    assert {part for pair in products for part in pair} == {f"Precision.{precision}"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_of_7b_lowers_for_a_tpu_and_holds_no_scores(monkeypatch, dtype):
    monkeypatch.setattr(splash, "BLOCK", 512)
    length, keys = 1100, 4096 + 1100
    shapes = ((length, 32), (keys, 8), (keys, 8))
    qkv = [jax.ShapeDtypeStruct((1, *shape, 128), dtype) for shape in shapes]
    positions = jax.ShapeDtypeStruct((1, keys), jnp.int32)

    def run(q, k, v, positions):
        return splash.attend(q, k, v, positions[:, -length:], positions, 4096)

    def total(*arrays):
        return run(*arrays).astype(jnp.float32).sum()

    for function, kernels in ((run, 1), (jax.grad(total, argnums=(0, 1, 2)), 3)):
        lower = jax.export.export(jax.jit(function), platforms=["tpu"])
        text = lower(*qkv, positions).mlir_module()
        assert text.count("stablehlo.custom_call @tpu_custom_call") == kernels
        # Three blocks of 384 queries; with the keys of what fills them up, 11 of 512.
        arrays = {tuple(map(int, shape.split("x"))) for shape in re.findall(r"<([\dx]+)x\w", text)}
        sizes = set(map(math.prod, arrays))
        assert 32 * 1152 * 128 in sizes
        assert max(sizes) == 8 * (11 * 512) * 128


def on_mesh(data, kv, group, kind=AxisType.Auto):
    return jax.set_mesh(jax.make_mesh((data, kv, group), ("data", "kv", "group"), (kind,) * 3))


def by_rules(arrays):
    """Puts q, k, v on the mesh in use as `RULES` say."""
    return [
        jax.device_put(x, PartitionSpec("data", None, axes))
        for x, axes in zip(arrays, (("kv", "group"), "kv", "kv"), strict=True)
    ]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 1)])
def test_on_a_mesh_each_device_attends_for_its_rows_and_heads(sizes):
    arrays = qkv(CACHED.shape[1])
    expected = with_gradients(kernel(CACHED, 100), CACHED)(*arrays)
    run = kernel(CACHED, 100, RULES)
    with on_mesh(*sizes):
        split = by_rules(arrays)
        assert splash.fits(*split, RULES, alone=False)
        found = with_gradients(run, CACHED)(*split)
        program = jax.jit(run).lower(*split).compile().as_text()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
    assert not re.findall(r"all-\w+|collective-permute|reduce-scatter", program)


def test_it_says_which_arrays_it_takes():
    q, k, v = qkv(CACHED.shape[1])
    assert not splash.fits(q, k, v, (), alone=False)  # without a mesh XLA may have to split q
    fits = functools.partial(splash.fits, rules=(), alone=True)
    assert fits(q, k, v)
    assert fits(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert fits(q[:, :128], k, v)
    assert not fits(q[:, :127], k, v)
    assert not fits(q.astype(jnp.bfloat16), k, v)
    assert not fits(*(x.astype(jnp.float16) for x in (q, k, v)))


@pytest.mark.parametrize(
    ("sizes", "rules", "taken"),
    [
        ((2, 2, 2), RULES, True),
        ((2, 2, 2), (), False),  # nothing says where rows lie
        ((2, 2, 2), (*RULES[1:], ("batch", "fsdp")), False),  # rules of another mesh
        ((8, 1, 1), RULES, False),  # 4 rows on 8 devices
        ((1, 4, 1), RULES, False),  # 2 key-value heads on 4 devices
        ((1, 2, 4), RULES, False),  # 4 query heads on 8 devices
        ((1, 1, 2), RULES, False),  # query heads apart whose keys are not
        ((1, 2, 1), (("heads", "kv"),), False),
        ((1, 2, 1), (("kv_heads", "kv"),), False),
        ((4, 2, 1), (("batch", ("data",)),), True),  # each pair of devices does the same
    ],
)
def test_it_takes_a_mesh_that_gives_queries_their_keys(sizes, rules, taken):
    arrays = qkv(CACHED.shape[1])
    with on_mesh(*sizes):
        assert splash.fits(*arrays, rules, alone=False) == taken
    with on_mesh(*sizes, AxisType.Explicit):
        assert not splash.fits(*arrays, rules, alone=True)


@pytest.mark.slow
def test_attention_picks_the_kernel_on_a_tpu_alone(monkeypatch):
    taken = []
    monkeypatch.setattr(splash, "attend", lambda *arguments: taken.append(arguments[5]))
    tpus = [SimpleNamespace(platform="tpu")] * 2
    tpu, several = Backend.of(tpus[:1]), Backend.of(tpus)
    q, k, v = qkv(CACHED.shape[1])
    look = functools.partial(attend, q, k, v, CACHED[:, -LENGTH:], CACHED, backend=tpu)
    look(100, aligned=True, backend=PLAIN)
    look(100, aligned=True, backend=several)
    look(100)
    look(100, 2, aligned=True)
    look(100, aligned=True, sections=2)
    assert not taken
    look(100, aligned=True)
    assert taken == [100]
