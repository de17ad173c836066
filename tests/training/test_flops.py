"""FLOPs of training beside what XLA counts, and peaks by JAX's names."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.config import ModelConfig
from mistral_jax.model.attention import visible
from mistral_jax.parallel import hardware
from mistral_jax.training import flops
from mistral_jax.training.loss import cross_entropy

V01 = ModelConfig.from_name("mistral-7b-v0.1")
V03 = ModelConfig.from_name("mistral-7b-v0.3")


def test_a_token_costs_six_a_weight_and_twelve_a_pair():
    """PaLM's formula, appendix B: 6 N + 12 L H Q T, but for what causality and windows hide."""
    matrices = 7_241_732_096 - 32000 * 4096 - 65 * 4096  # no lookup, no norms
    found = flops.per_token(V01, 8192)
    mask = np.asarray(visible(jnp.arange(8192)[None], jnp.arange(8192)[None], 4096))
    assert found == 6 * matrices + 12 * 32 * 32 * 128 * mask.sum() / 8192
    full = flops.per_token(V03, 8192)
    matrices = 7_248_023_552 - 32768 * 4096 - 65 * 4096
    assert full == 6 * matrices + 12 * 32 * 32 * 128 * 8193 / 2


def compiled_flops(differentiated, context, length=1):
    """Returns what XLA counts in gradients of a tiny model, a token of a row of that context."""
    model, params = tiny.build(dim=64, hidden_dim=192, vocab_size=200, sliding_window=None)
    tokens, positions = tiny.ragged([list(range(context))] * length)

    def loss(chosen, others):
        merged = differentiated(chosen, others)
        logits, _ = model.apply({"params": merged}, tokens, positions)
        return cross_entropy(logits, tokens)[0]

    cost = jax.jit(jax.grad(loss)).lower(params, params).compile().cost_analysis()
    return model.config, cost["flops"] / tokens.size


def test_xla_counts_what_training_all_weights_needs_and_a_little_more():
    config, found = compiled_flops(lambda chosen, others: chosen, 64)
    assert 1 < found / flops.per_token(config, 64) < 1.3


def test_frozen_weights_save_a_third_of_the_matrices_and_none_of_attention():
    """Training the embedding alone, the gradient goes all the way back through frozen matrices."""

    def frozen(chosen, others):
        return others | {"embed": chosen["embed"]}

    config, found = compiled_flops(frozen, 64)
    assert 1 < found / flops.per_token(config, 64, adapters=True) < 1.3
    one = flops.per_token
    matrices = one(V03, 100) - one(V03, 100, adapters=True)
    attention = one(V03, 100) - 3 * matrices
    assert matrices == 2 * (7_248_023_552 - 32768 * 4096 - 65 * 4096)
    assert attention == pytest.approx(12 * 32 * 32 * 128 * 101 / 2)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_reference_costs_one_way_forward_more(adapters):
    more, less = (
        flops.per_token(V01, 512, adapters=adapters, reference=reference)
        for reference in (True, False)
    )
    assert 3 * (more - less) == pytest.approx(flops.per_token(V01, 512))


def devices(*kinds, platform="gpu"):
    return lambda: [SimpleNamespace(platform=platform, device_kind=kind) for kind in kinds]


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_the_peak_is_that_of_all_devices(monkeypatch, kind, teraflops):
    monkeypatch.setattr(jax, "devices", devices(kind, kind, kind))
    assert flops.peak() == 3 * teraflops * 1e12
    monkeypatch.setattr(jax, "devices", devices(kind, "GPU of tomorrow"))
    assert flops.peak() is None


def test_every_chip_has_names_and_shares_none():
    kinds = [chip.kinds for chip in hardware.known().values()]
    assert all(kinds)
    names = [name for some in kinds for name in some]
    assert len(names) == len(set(names))


def test_the_peak_of_a_cpu_is_measured():
    rates = flops.peak(), flops.peak()
    assert max(rates) < 10 * min(rates)  # others may use it too
    assert 1e9 < min(rates) < 1e14


def test_layers_have_windows_of_their_own():
    config = dataclasses.replace(V03, num_layers=2, sliding_window=(None, 4))
    both = flops.per_token(config, 16)
    one, other = (
        flops.per_token(dataclasses.replace(config, sliding_window=window), 16)
        for window in (None, 4)
    )
    assert both == pytest.approx((one + other) / 2)
