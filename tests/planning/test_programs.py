"""What is planned for a TPU is what a TPU would trace, text for text; no TPU is needed here."""

import collections
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mistral_jax.config import ModelConfig
from mistral_jax.engine import decode as steps
from mistral_jax.engine import prefill, scheduler
from mistral_jax.engine.generate import generate
from mistral_jax.model.cache import LayerCache
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import Backend
from mistral_jax.parallel.sharding import Layout, abstract_params, read_layout
from mistral_jax.planning import programs
from mistral_jax.training.step import make_train_step

CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=64,
    mlp_dim=96,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    rope_theta=1e4,
    sliding_window=64,
)
PROMPT, NEW = 512, 8


def devices(platform, count=1, **fields):
    """Returns stand-ins for devices that are only looked at."""
    return [SimpleNamespace(platform=platform, **fields)] * count


def layout_of(name):
    """Returns a layout, and one device's as the planner makes it."""
    if name is not None:
        return read_layout(name, CONFIG)
    return Layout(jax.make_mesh((1,), ("device",), devices=jax.devices()[:1]), ())


def tpu_text(traced):
    """Returns the text lowered for a TPU, with equal functions merged and numbered by their use.

    What JAX has traced before decides how it numbers functions, and which equal ones it shares.
    """
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    functions, merged = re.compile(r"  func\.func private @(\w+)(\(.*?\n  \}\n)", re.DOTALL), True
    while merged:
        first, merged = {}, False
        for function in functions.finditer(text):
            known = first.setdefault(function[2], function[1])
            if known != function[1]:
                text = text.replace(function[0], "")
                text = re.sub(rf"@{function[1]}\b", f"@{known}", text)
                merged = True
                break
    numbers = collections.defaultdict(itertools.count().__next__)
    return re.sub(r"@\w+_\d+\b", lambda name: f"@f{numbers[name[0]]}", text)


def in_order_of(backend, arguments):
    """Returns arguments whose caches have the order of axes that a backend's caches have."""

    def turn(x):
        if not isinstance(x, LayerCache) or x.by_heads == backend.by_heads:
            return x
        return x.replace(by_heads=True).ordered(x.k, x.v, x.positions)

    return jax.tree.map(turn, arguments, is_leaf=lambda x: isinstance(x, LayerCache))


def generated(monkeypatch, name, backend, rows, kv_cache_dtype):
    """Returns the texts of what `generate` runs, traced for a backend instead of this machine."""
    layout, texts = layout_of(name), {}
    model = Transformer(CONFIG, jnp.bfloat16, layout.rules, kv_cache_dtype=kv_cache_dtype)

    def traces(program, run):
        def traced(model, *arguments):
            given = in_order_of(backend, arguments)
            texts[program] = tpu_text(run.trace(model.clone(backend=backend), *given))
            return run(model, *arguments)

        return traced

    places = abstract_params(model, layout)
    where = jax.tree.map(lambda x: x.sharding if name else jax.devices()[0], places)
    params = jax.tree.map(
        lambda x, place: jax.device_put(jnp.zeros(x.shape, jnp.bfloat16), place), places, where
    )
    with monkeypatch.context() as patched:
        patched.setattr(prefill, "read_chunk", traces("prefill", prefill.read_chunk))
        patched.setattr(scheduler, "decode", traces("decode", steps.decode))
        generate(model, params, [[1 + row] * PROMPT for row in range(rows)], NEW)
    return texts


@pytest.mark.parametrize(
    ("name", "rows", "kv_cache_dtype"),
    [
        (None, 1, None),
        pytest.param(None, 2, "int8", marks=pytest.mark.slow),
        ("tensor", 1, None),
        pytest.param("data_tensor", 8, None, marks=pytest.mark.slow),
    ],
)
def test_what_is_planned_is_what_generate_traces(monkeypatch, name, rows, kv_cache_dtype):
    layout = layout_of(name)
    backend = Backend.of(devices("tpu", layout.mesh.size), planned=True)
    assert backend == Backend.of(devices("tpu", layout.mesh.size))
    expected = generated(monkeypatch, name, backend, rows, kv_cache_dtype)
    of = programs.shapes(layout, rows, PROMPT + NEW, "bfloat16", None, kv_cache_dtype)
    model = programs.model(CONFIG, layout, of).clone(backend=backend)
    for program, text in expected.items():
        planned = tpu_text(programs.trace(program, model, layout, of))
        assert planned == text, program
        # Both layers call one function.
        kernels = planned.count("stablehlo.custom_call @tpu_custom_call")
        assert kernels == (1 if program == "prefill" else 0)


def test_training_is_planned_with_the_options_of_its_devices(monkeypatch):
    made = []

    def make(*arguments, **fields):
        made.append(fields["options"])
        return make_train_step(*arguments, **{**fields, "options": None})

    monkeypatch.setattr(programs, "make_train_step", make)
    layout, backend = layout_of("fsdp"), Backend.of(devices("tpu", 8))
    of = programs.shapes(layout, 8, 128, "bfloat16", train=True)
    programs.trace("train", programs.model(CONFIG, layout, of).clone(backend=backend), layout, of)
    assert made == [backend.training_options]
    assert made[0]
