"""A backend is chosen once: nothing else asks for it, and each computes what the plain one does."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.config import CHECKOUT
from mistral_jax.model.cache import init_cache
from mistral_jax.ops import cudnn, flash, library, ring, splash, triton
from mistral_jax.ops.backend import PLAIN, Backend, ModelJit, default
from mistral_jax.parallel.sharding import read_layout

TEXT = np.arange(150) * 7 % 53
BACKENDS = {
    "this machine": default(),
    "a CPU without C++": Backend("cpu", "vnni", alone=True),
    "a GPU": Backend("gpu", "7.5", alone=True),
    "a GPU with cuDNN": Backend("gpu", "9.0", True, ("cudnn",)),
    "a GPU with all kernels": Backend("gpu", "9.0", True, ("cudnn", "cudnn-training", "triton")),
    "a TPU": Backend("tpu", alone=True, kernels=("splash", "flash")),
}


def logits(backend, dtype):
    """Reads a text at once, in a chunk through a cache, and by a token; returns all logits."""
    model, params = tiny.build(n_layers=1, sliding_window=48, head_dim=16)
    model = model.clone(backend=backend, dtype=jnp.dtype(dtype))
    places = np.arange(len(TEXT), dtype=np.int32)
    whole, _ = tiny.forward(model, params, TEXT[None], places[None])
    cache = init_cache(model.config, 1, len(TEXT), jnp.dtype(dtype))
    found = [whole[0]]
    for part in (slice(0, 149), slice(149, 150)):
        more, cache = tiny.forward(model, params, TEXT[None, part], places[None, part], cache)
        found.append(more[0])
    return np.concatenate(found).astype(np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_computes_what_the_plain_one_does(monkeypatch, name, dtype):
    # Kernels of other devices are interpreted, or their place is taken by XLA's product.
    kernels, taken = {splash: splash.attend, triton: triton.attend}, []

    def interpret(module, *arguments):
        taken.append(name)
        return kernels[module](*arguments, interpret=True)

    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(splash, "BLOCK", 128)
    for module in kernels:
        monkeypatch.setattr(module, "attend", functools.partial(interpret, module))
    expected = logits(PLAIN, dtype)
    with jax.numpy_dtype_promotion("standard"):
        found = logits(BACKENDS[name], dtype)
    # Activations of bfloat16 may be rounded the other way.
    bound = 1e-5 if dtype == "float32" else 2e-2
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()
    calls = {"a TPU": 2, "a GPU with all kernels": 1}
    assert len(taken) == calls.get(name, 0)


@pytest.mark.parametrize(
    ("window", "kept"),
    [
        (128, "float32"),
        pytest.param(128, "int8", marks=pytest.mark.slow),
        pytest.param(None, "float32", marks=pytest.mark.slow),
        (None, "int8"),
    ],
)
def test_on_a_tpu_every_chunk_size_gives_the_same_cache_and_logits(monkeypatch, window, kept):
    taken = []
    for module, name in ((flash, "attend"), (ring, "write")):
        kernel = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, of=kernel, **k: taken.append(of) or of(*a, interpret=True, **k)
        )
    model, params = tiny.build(
        n_layers=1, sliding_window=window, head_dim=128, n_heads=2, n_kv_heads=1
    )
    text = np.arange(300) * 7 % 53
    places = np.arange(len(text), dtype=np.int32)

    def read(model, size):
        cache = init_cache(model.config, 1, 384, jnp.dtype(kept), by_heads=model.backend.by_heads)
        found = []
        for start in range(0, len(text), size):
            part = np.zeros((1, size), np.int32)
            positions = np.full((1, size), -1, np.int32)
            count = min(size, len(text) - start)
            part[0, :count] = text[start : start + count]
            positions[0, :count] = places[start : start + count]
            logits, cache = tiny.forward(model, params, part, positions, cache)
            found.append(logits[0, :count])
        return np.concatenate(found), cache[0]

    expected, plain = read(model, 300)
    model = model.clone(backend=BACKENDS["a TPU"])
    for size in (100, 300):
        logits, layer = read(model, size)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(layer.positions, plain.positions)
        swapped = plain.replace(by_heads=True).ordered(plain.k, plain.v, plain.positions)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(
                x.astype(jnp.float32),
                y.astype(jnp.float32),
                rtol=0,
                atol=1 if x.dtype == jnp.int8 else 1e-5,
            ),
            layer,
            swapped,
        )
    assert len(taken) == 4


def test_nothing_else_asks_what_devices_there_are():
    """What is traced for a device must not depend on where it is traced."""
    for path in (CHECKOUT / "mistral_jax").rglob("*.py"):
        text, folder = path.read_text(encoding="utf-8"), path.parent.name
        assert "default_backend" not in text, path
        if folder == "model" or (folder == "ops" and path.name != "backend.py"):
            assert not re.search(r"devices\(|device_count", text), path
        if folder == "model":
            assert not re.search(
                r"\b(cpu|gpu|tpu|cuda|splash|flash|ragged|cudnn|triton|native)\b", text.lower()
            ), path


@pytest.mark.parametrize(
    ("platform", "count", "kernels"),
    [
        ("tpu", 1, ("splash", "flash", "ragged", "grouped")),
        ("tpu", 4, ("splash", "flash", "ragged", "grouped")),
        ("METAL", 1, ()),
        ("cuda", 1, ()),
    ],
)
def test_a_backend_is_that_of_its_devices(platform, count, kernels):
    found = Backend.of([SimpleNamespace(platform=platform)] * count)
    assert found.kernels == kernels
    assert found.alone == (count == 1)
    assert found.platform == {"cuda": "gpu"}.get(platform, platform)
    assert hash(found) == hash(Backend.of([SimpleNamespace(platform=platform)] * count))


@pytest.mark.parametrize(("platform", "count"), [("tpu", 1), ("tpu", 4), ("cuda", 4), ("cpu", 4)])
def test_training_over_several_tpus_alone_has_options(platform, count):
    options = Backend.of(
        [SimpleNamespace(platform=platform)] * count, planned=True
    ).training_options
    assert bool(options) == ((platform, count) == ("tpu", 4))
    assert all(name.startswith("xla_") and type(value) is str for name, value in options.items())


def test_each_tpu_exchanges_beside_its_work_by_options_that_it_knows():
    """A v5e has no SparseCore, and libtpu refuses the options of one chip for another."""
    found = {}
    for kind in ("TPU v4", "TPU v5 lite", "TPU v6 lite"):
        device = SimpleNamespace(platform="tpu", device_kind=kind)
        backend = Backend.of([device] * 4)
        found[kind] = set(backend.training_options) - set(backend.options)
        assert set(Backend.of([device]).training_options) == set(backend.options)
    assert len(found["TPU v4"]) == 1
    shared, v5e, v6e = found.values()
    assert v5e & v6e == shared
    assert all("sparse_core" in name for name in v6e - shared)
    assert v5e > shared


@pytest.mark.parametrize(
    ("kind", "given"), [("TPU v5 lite", True), ("TPU v6 lite", True), ("TPU v4", False)]
)
def test_programs_are_compiled_with_the_options_of_their_chip(monkeypatch, kind, given):
    backend, seen = Backend.of([SimpleNamespace(platform="tpu", device_kind=kind)]), []
    assert bool(backend.options) == given
    # Products of many rows are compiled in a third of the time with half of the vector memory.
    less = {"xla_tpu_scoped_vmem_limit_kib": "32768"} if kind == "TPU v5 lite" else {}
    assert backend.training_options == backend.options | less

    def jit(function, compiler_options, of=jax.jit, **options):
        seen.append(compiler_options)
        return of(function, **options)

    program = ModelJit(lambda model, x: x + 1, static_argnames="model")
    model = tiny.build()[0]
    monkeypatch.setattr(jax, "jit", jit)
    for chosen in (backend, PLAIN, backend, PLAIN):
        assert program(model.clone(backend=chosen), 1) == 2
    assert seen == ([backend.options, {}] if given else [{}])
    assert program._cache_size() == 2


def test_a_cpu_has_its_kernels_alone_and_without_a_mesh():
    here, layout = (
        Backend.of(jax.devices()[:1]),
        read_layout("tensor", tiny.build(vocab_size=56)[0].config, jax.devices()[:2]),
    )
    assert here == default()
    assert here.has_native == (library.load() is not None)
    assert here.is_one_cpu
    with jax.set_mesh(layout.mesh):
        assert not here.has_native
        assert not here.is_one_cpu
    assert layout.backend() == layout.backend(planned=True) == PLAIN
    assert Backend.of(jax.devices()[:1], planned=True) == PLAIN
