"""When cuDNN's kernel attends to a prompt, and what it is given; XLA's product takes its place."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_splash import RULES, by_rules, on_mesh

from mistral_jax.model.attention import attend
from mistral_jax.ops import cudnn, triton
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.pieces import weigh
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8

LENGTH, KEYS = 16, 45  # Keys are filled up to 48.
H100 = Backend("gpu", "9.0", True, ("cudnn",))
H100_TRAINING = Backend("gpu", "9.0", True, ("cudnn", "cudnn-training"))


@pytest.fixture(autouse=True)
def product(monkeypatch):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    with jax.numpy_dtype_promotion("standard"):  # JAX's own product does not keep the strict rules.
        yield


def qkv(dtype=jnp.float32, batch=4, heads=4, kv_heads=2, head_dim=8):
    rng = np.random.default_rng(0)
    shapes = ((LENGTH, heads), (KEYS, kv_heads), (KEYS, kv_heads))
    return [jnp.asarray(rng.standard_normal((batch, *s, head_dim)), dtype) for s in shapes]


def some(batch=4):
    """A mask in which each row sees other keys: none, the last, all, and some of the first ten."""
    mask = np.random.default_rng(1).random((batch, LENGTH, KEYS)) < 0.5
    mask[0], mask[1], mask[2], mask[3, :, 10:] = False, np.arange(KEYS) == KEYS - 1, True, False
    return jnp.asarray(mask)


def plain(q, k, v, mask):
    _, total, mixed = weigh(q, k, v, mask)
    return jnp.moveaxis(mixed / total[..., None], 3, 1).reshape(q.shape)


def test_it_attends_by_any_mask_and_reads_no_further_than_it_shows(monkeypatch):
    arrays, mask = qkv(), some()
    given, product = [], jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, **b: given.append(b) or product(*a, **b)
    )
    found = cudnn.attend(*arrays, mask)
    np.testing.assert_array_equal(given[0]["key_value_seq_lengths"][:3], [1, KEYS, KEYS])
    assert 1 < given[0]["key_value_seq_lengths"][3] <= 10
    assert np.isfinite(found).all()
    seeing = np.asarray(mask.any(axis=2))
    np.testing.assert_allclose(found[seeing], plain(*arrays, mask)[seeing], atol=2e-6)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 1)])
def test_on_a_mesh_each_device_attends_for_its_rows_and_heads(sizes):
    arrays, mask = qkv(jnp.bfloat16), some()
    expected = cudnn.attend(*arrays, mask)
    with on_mesh(*sizes):
        split = by_rules(arrays)
        assert cudnn.fits(*split, RULES)
        assert not cudnn.fits(*split, ())
        run = jax.jit(functools.partial(cudnn.attend, rules=RULES))
        rows = jax.device_put(mask, PartitionSpec("data"))
        found, program = run(*split, rows), run.lower(*split, rows).compile().as_text()
    np.testing.assert_array_equal(found, expected)
    assert "all-gather" not in program
    assert "all-to-all" not in program


@pytest.mark.parametrize(
    ("platform", "capability", "taken"),
    [
        ("gpu", "9.0", True),
        ("gpu", "12.0", True),
        ("gpu", "7.5", False),  # a T4
        ("gpu", "gfx90a", False),  # of AMD
        ("gpu", None, False),
        ("cuda", "9.0", True),  # as a GPU that is described to its compiler calls itself
        ("cpu", "9.0", False),
        ("tpu", "9.0", False),
    ],
)
@pytest.mark.parametrize("kernel", ["cudnn", "cudnn-training", "triton"])
def test_a_gpu_has_a_kernel_if_it_may_be_planned_for_or_runs(
    monkeypatch, platform, capability, taken, kernel
):
    fields = {"platform": platform} | ({"compute_capability": capability} if capability else {})
    devices = [SimpleNamespace(**fields)]
    tried = {"cudnn": (cudnn, "runs"), "cudnn-training": (cudnn, "trains")}
    tried["triton"] = triton, "runs"
    for name, function in tried.items():
        monkeypatch.setattr(*function, lambda name=name: name == kernel)
    assert (kernel in Backend.of(devices).kernels) == taken
    assert not {*tried} - {kernel} & {*Backend.of(devices).kernels}
    assert (kernel in Backend.of(devices, planned=True).kernels) == taken


@pytest.mark.parametrize("name", ["runs", "trains"])
@pytest.mark.parametrize(("implementation", "works"), [("xla", True), ("cudnn", False)])
def test_it_is_tried_before_it_is_taken(monkeypatch, name, implementation, works):
    """While a program is traced, too; here cuDNN is missing."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", implementation)
    tries, found = getattr(cudnn, name), []
    tries.cache_clear()
    jax.jit(lambda x: found.append(tries()) or x)(1.0)
    tries.cache_clear()
    assert found == [works]


@pytest.mark.parametrize(
    ("dtype", "fields", "taken"),
    [
        ("bfloat16", {}, True),
        ("float16", {}, True),
        ("bfloat16", {"head_dim": 128}, True),
        ("float32", {}, False),
        ("bfloat16", {"head_dim": 12}, False),
        ("bfloat16", {"head_dim": 136}, False),
    ],
)
def test_it_says_which_arrays_it_takes(dtype, fields, taken):
    q, k, v = qkv(jnp.dtype(dtype), **fields)
    assert cudnn.fits(q, k, v, ()) == taken
    assert not cudnn.fits(q.astype(jnp.float32), k, v, ())


def test_prompts_and_training_are_its_own_if_it_has_a_gradient(monkeypatch):
    taken, kernel = [], cudnn.attend
    monkeypatch.setattr(cudnn, "attend", lambda *a: taken.append(a[0].shape) or kernel(*a))
    q, k, v = qkv(jnp.bfloat16)
    places = jnp.tile(jnp.arange(KEYS), (4, 1))
    origin = jnp.zeros(4, jnp.int32)
    own = q, k[:, :LENGTH], v[:, :LENGTH], places[:, :LENGTH], places[:, :LENGTH]
    chunk = q, k, v, places[:, -LENGTH:], places
    for backend, count in ((H100, 0), (H100_TRAINING, 1)):
        look, window = functools.partial(attend, backend=backend), 4 + count
        see = functools.partial(look, window=window, aligned=True)
        token = q[:, :1], k, v, places[:, -1:], places
        jax.eval_shape(functools.partial(look, window=None), *token)
        assert not taken
        jax.eval_shape(see, *own)
        assert len(taken) == count
        found = jax.jit(functools.partial(see, origin=origin))(*chunk)
        assert taken[count:] == [q.shape]
        taken.clear()
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    exact = jax.jit(functools.partial(attend, window=5, aligned=True))(*wide, *chunk[3:])
    assert np.abs(found - exact).max() <= 2.0**-7 * np.abs(v).max()  # weights and result: 8 bits


@pytest.mark.parametrize("window", [None, 5])
def test_packed_rows_are_trained_with_it(monkeypatch, window):
    """Two texts with padding between them, in blocks; the gradient, too."""
    monkeypatch.setattr(cudnn, "BLOCK", 8)
    monkeypatch.setattr(cudnn, "fits", lambda *a: True)  # in float32, too, which XLA multiplies
    q, k, v = (x[:, :LENGTH] for x in qkv())
    texts = [*range(7), -1, -1, *range(5), -1, -1]
    places = jnp.tile(jnp.array(texts), (4, 1))
    real = (places >= 0)[..., None, None]

    def total(backend, *arrays):
        found = attend(*arrays, places, places, window, aligned=True, backend=backend)
        return jnp.sum(jnp.where(real, found, 0) ** 2)

    (expected, plain), (found, gradient) = (
        jax.jit(jax.value_and_grad(functools.partial(total, backend), (0, 1, 2)))(q, k, v)
        for backend in (Backend(), H100_TRAINING)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(plain, gradient, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_cache_in_8_bits_is_widened_for_it():
    q, k, v = qkv(jnp.bfloat16)
    small = [QuantizedMatrix(*to_int8(x.astype(jnp.float32), 3, jnp)) for x in (k, v)]
    places = jnp.tile(jnp.arange(KEYS), (4, 1))
    look = functools.partial(attend, q_positions=places[:, -LENGTH:], kv_positions=places)
    look = functools.partial(look, window=None, origin=jnp.zeros(4, jnp.int32))
    expected = jax.jit(look)(q.astype(jnp.float32), *small)
    found = jax.jit(functools.partial(look, backend=H100))(q, *small)
    assert found.dtype == jnp.bfloat16
    assert np.abs(found - expected).max() <= 2.0**-6 * np.abs(v).max()
