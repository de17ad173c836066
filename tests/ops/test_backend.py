"""A backend is chosen once: nothing else asks for it, and each computes what the plain one does."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.config import CHECKOUT
from mistral_jax.model.cache import init_cache
from mistral_jax.ops import cudnn, library, splash
from mistral_jax.ops.backend import PLAIN, Backend, default
from mistral_jax.parallel.sharding import read_layout

TEXT = np.arange(150) * 7 % 53
BACKENDS = {
    "this machine": default(),
    "a CPU without C++": Backend("cpu", "vnni", alone=True),
    "a GPU": Backend("gpu", "7.5", alone=True),
    "a GPU with cuDNN": Backend("gpu", "9.0", True, ("cudnn",)),
    "a TPU": Backend("tpu", alone=True, kernels=("splash",)),
}


def logits(backend, dtype):
    """Reads a text at once, in a chunk through a cache, and by a token; returns all logits."""
    model, params = tiny.build(n_layers=1, sliding_window=40)
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
    kernel, taken = splash.attend, []
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(
        splash, "attend", lambda *a: taken.append(name) or kernel(*a, interpret=True)
    )
    expected = logits(PLAIN, dtype)
    with jax.numpy_dtype_promotion("standard"):
        found = logits(BACKENDS[name], dtype)
    # Activations of bfloat16 may be rounded the other way.
    bound = 1e-5 if dtype == "float32" else 2e-2
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()
    assert len(taken) == (2 if name == "a TPU" else 0)


def test_nothing_else_asks_what_devices_there_are():
    """What is traced for a device must not depend on where it is traced."""
    for path in (CHECKOUT / "mistral_jax").rglob("*.py"):
        text, folder = path.read_text(encoding="utf-8"), path.parent.name
        assert "default_backend" not in text, path
        if folder == "model" or (folder == "ops" and path.name != "backend.py"):
            assert not re.search(r"devices\(|device_count", text), path
        if folder == "model":
            assert not re.search(r"\b(cpu|gpu|tpu|cuda|splash|cudnn|native)\b", text.lower()), path


@pytest.mark.parametrize(
    ("platform", "count", "kernels"),
    [("tpu", 1, ("splash",)), ("tpu", 4, ("splash",)), ("METAL", 1, ()), ("cuda", 1, ())],
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
