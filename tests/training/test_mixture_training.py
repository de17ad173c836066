"""LoRA, DPO and full training of a mixture of experts run through, and log how it is balanced."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mistral_jax.checkpoint import adapters, checkpoint
from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.run import train

PAIRS = [{"prompt": f"a{i}", "chosen": "good", "rejected": "bad"} for i in range(4)]
TEXTS = [{"text": f"def f{i}(x): return x"} for i in range(4)]
COMMON = {
    "context": 32,
    "rows": 2,
    "learning_rate": 1e-2,
    "steps": 2,
    "validate_every": 2,
    "save_every": 2,
}
LORA = {"rank": 2, "targets": ["q_proj", "gate_proj", "down_proj", "router"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of a small random mixture with the bundled tokenizer."""
    config = dataclasses.replace(
        ModelConfig.from_name("nano"),
        num_layers=2,
        embed_dim=16,
        mlp_dim=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        num_experts=4,
        experts_per_token=2,
    )
    token = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(Transformer(config).init(jax.random.key(0), token, token)["params"])
    path = tmp_path_factory.mktemp("mixture") / "base"
    checkpoint.save(path, config, params, checkpoint.BUNDLED / "tokenizer.model")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("lora", {"lora": LORA, "scan": True, "quantize": "int8"}),
        ("dpo", {"lora": LORA | {"dropout": 0.1}, "dpo": {"beta": 0.1}}),
        ("full", {"remat": "save_products"}),
    ],
)
def test_a_run_trains_and_logs_the_balance(base, kind, fields, tmp_path):
    file = tmp_path / "train.jsonl"
    rows = PAIRS if kind == "dpo" else TEXTS
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(file)], "validation": [str(file)]}
    recipe = Recipe.from_dict(COMMON | fields | {"checkpoint": str(base), "data": data})
    train(recipe, tmp_path / "run", lambda entry: None)
    curve = [json.loads(x) for x in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    balance = [entry["router_loss"] for entry in curve if "router_loss" in entry]
    assert balance
    assert all(1.9 < value < 4 for value in balance)
    assert any("validation_router_loss" in entry for entry in curve)
    if kind != "full":
        lora, tree = adapters.read(tmp_path / "run" / "adapter", checkpoint.manifest.read(base)[0])
        assert set(lora.targets) == set(LORA["targets"])
        assert tree["layers_1"]["moe"]["gate_proj"]["lora_a"].shape == (4, 2, 16)
        checkpoint.load(base, lora=tmp_path / "run" / "adapter", merge=True)
    else:
        checkpoint.load(tmp_path / "run" / "checkpoint")
