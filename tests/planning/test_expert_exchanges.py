"""A mixture of experts exchanges what its layout implies, and a plan counts what is active."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mistral_jax.checkpoint.names import count_parameters
from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import abstract_params, read_layout
from mistral_jax.planning import arithmetic, programs
from mistral_jax.planning.collectives import read
from mistral_jax.training.flops import of_weights

CONFIG = ModelConfig(
    vocab_size=768,
    num_layers=2,
    embed_dim=64,
    mlp_dim=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    sliding_window=None,
    num_experts=8,
    experts_per_token=2,
)
QUICK = [("expert", "prefill"), ("expert_tensor", "decode"), ("fsdp_expert", "train")]
NAMES = ("expert", "expert_tensor", "fsdp_expert", "tensor", "fsdp", "fsdp_tensor")


def counts(found):
    total = collections.Counter()
    for collective in found:
        total[collective.kind, collective.bytes, collective.group] += collective.times
    return total


@pytest.mark.parametrize(
    ("name", "program"),
    [
        pytest.param(name, program, marks=() if (name, program) in QUICK else pytest.mark.slow)
        for name in NAMES
        for program in programs.PROGRAMS
    ],
)
def test_devices_exchange_what_the_layout_implies_and_nothing_else(name, program):
    """No expert moves: tokens do, and only where rows share the experts' mesh axis."""
    assert len(jax.devices()) == 8
    layout = read_layout(name, CONFIG)
    model = Transformer(CONFIG, jnp.float32, layout.rules)
    of = programs.shapes(layout, 8, 32, "float32")
    compiled = programs.lower(program, model, layout, of).compile()
    found = [c for c in read(compiled.as_text(), 8) if c.dtype == "f32" and c.shape]
    if program == "decode":
        found = [c for c in found if c.loops]
    found, expected = counts(found), counts(arithmetic.exchanges(program, model, layout, of))
    extra = found - expected
    if program == "train" and "fsdp" in layout.mesh.shape:
        # The output's weights may be gathered once more on the way back.
        output = abstract_params(model, layout)["lm_head"]["kernel"]
        whole = arithmetic.size(output) * layout.parts("embed")
        extra -= collections.Counter({("all-gather", whole, layout.parts("embed")): 1})
    assert not expected - found
    assert not extra


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-8x22b", "mistral-7b-v0.3"])
def test_flops_are_those_of_active_parameters(name):
    config = ModelConfig.from_name(name)
    unused = config.embed_dim * (config.vocab_size + 2 * config.num_layers + 1)  # norms, lookup
    active = count_parameters(config, active=True) - unused
    assert of_weights(config, 1, 1) == 2 * active
    every = dataclasses.replace(config, experts_per_token=config.num_experts)
    assert of_weights(every, 1, 1) == 2 * (count_parameters(config) - unused)
