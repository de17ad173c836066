"""A GPU computes what a CPU computes in float32. Skipped without a GPU.

`make device` runs these tests on a machine with a GPU, without the other tests' settings. With
DEVICE_TESTS=cpu they run on a CPU with interpreted kernels, which checks the tests themselves.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mistral_jax as mj
from mistral_jax.engine.generate import generate
from mistral_jax.model.attention import attend
from mistral_jax.model.cache import init_cache
from mistral_jax.ops import cudnn, triton
from mistral_jax.ops.backend import PLAIN, Backend, default
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8

REHEARSAL = os.environ.get("DEVICE_TESTS") == "cpu"
HAS_GPU = jax.devices()[0].platform == "gpu"
KERNELS = ("cudnn", "cudnn-training", "triton")
# The shape of Mistral 7B's attention, or a small one.
HEADS, KV_HEADS, HEAD_DIM, SLOTS = (8, 2, 16, 256) if REHEARSAL else (32, 8, 128, 4096)

pytestmark = pytest.mark.skipif(not HAS_GPU and not REHEARSAL, reason="there is no GPU")


@pytest.fixture(scope="module")
def backend():
    """The backend of the GPU, or one with its kernels replaced by what a CPU can run."""
    if HAS_GPU:
        yield default()
        return
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(cudnn, "IMPLEMENTATION", "xla")
        patch.setattr(triton, "attend", functools.partial(triton.attend, interpret=True))
        yield Backend("gpu", "9.0", True, KERNELS)


def on_cpu(function, *arrays):
    """Calls a function of arrays on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.tree.map(np.asarray, function(*jax.device_put(arrays, cpu)))


def drawn(rows, length, keys, dtype=jnp.bfloat16):
    """Queries, keys and values, rounded to a dtype on the CPU."""
    rng = np.random.default_rng(0)
    shapes = ((length, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    return [rng.standard_normal((rows, *s, HEAD_DIM), np.float32).astype(dtype) for s in shapes]


def wide(x):
    return x if isinstance(x, QuantizedMatrix) else x.astype(jnp.float32)


def close(found, expected, bits):
    """Checks that the largest error is below 2 ** -bits of the largest number."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= 2.0**-bits * np.abs(expected).max()


def test_an_nvidia_gpu_has_all_kernels(backend):
    """Each was tried. A debug message of the logger `mistral_jax.ops` says why one is missing."""
    if backend.chip.startswith("gfx") or float(backend.chip) < 8:
        pytest.skip(f"compute capability {backend.chip}")
    assert backend.kernels == KERNELS


@pytest.mark.parametrize(
    ("dtype", "kept", "window"),
    [
        ("float32", "float32", None),
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "bfloat16", 100),
        ("bfloat16", "int8", None),
    ],
)
def test_decoding_reads_a_ring(backend, dtype, kept, window):
    own = np.array([3, 100, SLOTS // 2, SLOTS - 2, SLOTS - 1, 3 * SLOTS + 5, 70], np.int32)
    places = np.full((len(own), SLOTS), -1, np.int32)
    for row, last in enumerate(own):
        past = np.arange(max(0, last - SLOTS + 1), last + 1)
        places[row, past % SLOTS] = past
    q, k, v = drawn(len(own), 1, SLOTS, jnp.dtype(dtype))
    if kept == "int8":
        k, v = (QuantizedMatrix(*to_int8(x.astype(np.float32), 3)) for x in (k, v))

    def look(backend, q, k, v):
        return attend(q, k, v, own[:, None], places, window, backend=backend)

    expected = on_cpu(functools.partial(look, PLAIN), wide(q), wide(k), wide(v))
    found = jax.jit(functools.partial(look, backend))(q, k, v)
    close(found, expected, 16 if dtype == "float32" else 6)


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_chunk_of_a_prompt_reads_the_keys_before_it(backend, rows, window):
    length, keys = SLOTS // 8 * 5, SLOTS  # More than one block of queries.
    q, k, v = drawn(rows, length, keys)
    start = np.array([keys - length, 7], np.int32)[:rows]
    own = start[:, None] + np.arange(length, dtype=np.int32)
    own[-1, -9:] = -1  # A shorter text.
    places = np.broadcast_to(np.arange(keys, dtype=np.int32), (rows, keys))
    places = np.where(places <= own.max(1, keepdims=True), places, -1)
    real = own >= 0

    def look(backend, q, k, v):
        origin = jnp.zeros(rows, jnp.int32)
        return attend(q, k, v, own, places, window, origin=origin, backend=backend)

    expected = on_cpu(functools.partial(look, PLAIN), wide(q), wide(k), wide(v))
    found = np.asarray(jax.jit(functools.partial(look, backend))(q, k, v))
    close(found[real], expected[real], 6)


@pytest.mark.parametrize("window", [None, 200])
def test_training_on_packed_rows_has_the_same_gradient(backend, window):
    length = SLOTS // 2
    first = length // 3
    text = np.concatenate([np.arange(first), np.full(5, -1), np.arange(length - first - 5)])
    places = np.stack([text, np.arange(length)]).astype(np.int32)
    q, k, v = drawn(2, length, length)

    def total(backend, q, k, v):
        found = attend(q, k, v, places, places, window, aligned=True, backend=backend)
        real = (places >= 0)[..., None, None]
        return jnp.sum(jnp.where(real, found.astype(jnp.float32), 0) ** 2)

    def pull(backend, *arrays):
        return jax.value_and_grad(functools.partial(total, backend), (0, 1, 2))(*arrays)

    expected, plain = on_cpu(functools.partial(pull, PLAIN), wide(q), wide(k), wide(v))
    found, gradient = jax.jit(functools.partial(pull, backend))(q, k, v)
    close(found, expected, 6)
    for one, other in zip(gradient, plain, strict=True):
        close(one, other, 5)


@pytest.fixture(scope="module")
def nano():
    """The bundled model on the CPU, in float32."""
    with jax.default_device(jax.devices("cpu")[0]):
        model, params, tokenizer = mj.load()
    params = jax.device_put(params, jax.devices("cpu")[0])
    return model.clone(backend=PLAIN), params, tokenizer


@pytest.mark.parametrize(
    ("dtype", "kept", "bits"),
    [("float32", None, 9), ("bfloat16", None, 5), ("bfloat16", "int8", 4)],
)
def test_a_model_computes_the_same_logits(backend, nano, dtype, kept, bits):
    """In two chunks of a prompt and some steps, past the window."""
    model, params, tokenizer = nano
    ids = np.array([tokenizer.encode("def read_json(path):\n    with open(path) as file:\n" * 20)])
    ids = ids[:, :300].astype(np.int32)

    def read(model, params, dtype):
        cache = init_cache(
            model.config, 1, 320, jnp.dtype(model.kv_cache_dtype or dtype), model.backend.by_heads
        )
        run, logits = jax.jit(model.apply), []
        for start, stop in ((0, 200), (200, 296), (296, 297), (297, 298), (298, 299)):
            places = np.arange(start, stop, dtype=np.int32)[None]
            more, cache = run({"params": params}, ids[:, start:stop], places, cache)
            logits.append(np.asarray(more, np.float32)[0])
        return np.concatenate(logits)

    expected = on_cpu(lambda params: read(model, params, "float32"), params)
    other = model.clone(backend=backend, dtype=jnp.dtype(dtype), kv_cache_dtype=kept)
    typed = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
    close(read(other, jax.device_put(typed, jax.devices()[0]), dtype), expected, bits)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_greedy_text_is_that_of_the_cpu(backend, nano, quantize):
    """In float32; rows of several lengths, in an engine, past the window."""
    model, params, tokenizer = nano
    texts = ("def main", "import numpy as np\n" * (2 if REHEARSAL else 40), "x")
    prompts, count = [tokenizer.encode(text) for text in texts], 3 if REHEARSAL else 40
    loaded, on_gpu, _ = mj.load(dtype="float32", quantize=quantize)
    if REHEARSAL:  # It takes minutes to compile an interpreted kernel in the engine's loop.
        backend = Backend("gpu", "9.0", True, ("cudnn",))
    loaded = loaded.clone(backend=backend)
    found = [row.tokens for row in generate(loaded, on_gpu, prompts, count, temperature=0)]
    if quantize:
        params = jax.device_put(on_gpu, jax.devices("cpu")[0])
    with jax.default_device(jax.devices("cpu")[0]):
        expected = [row.tokens for row in generate(model, params, prompts, count, temperature=0)]
    # Two tokens may be equally likely to the rounding of float32, but not often.
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    assert same >= len(prompts) - 1
    assert all(one[:8] == other[:8] for one, other in zip(found, expected, strict=True))
