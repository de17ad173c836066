"""Adapters of the real PEFT, read and used by us, and ours by it; merged and beside the weights.

The bound is that of `test_live.py`: 1e-5 of the largest logit.
"""

import hf_reference
import jax
import numpy as np
import peft
import pytest
import reference
import tiny
import torch

import mistral_jax
from mistral_jax.checkpoint import adapters, checkpoint
from mistral_jax.checkpoint.lora import PROJECTIONS, Lora, apply, attach, init_adapters

TOLERANCE = 1e-5
CONFIG = tiny.OFFICIAL | {"n_layers": 3}
TEXT = np.arange(17) * 7 % CONFIG["vocab_size"]
KINDS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all and the output": {
        "target_modules": ["lm_head", *PROJECTIONS],
    },
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"v_proj": 11, "layers.2.self_attn.q_proj": 1},
    },
    # PEFT sorts its keys when it saves them.
    "patterns of many kinds": {
        "target_modules": "all-linear",
        "rank_pattern": {
            r"^model\.layers\.[02]\..*(gate|up)_proj": 2,
            "mlp.down_proj$": 3,
        },
        "alpha_pattern": {r"layers\.\d+\.self_attn\.[qk]_proj": 3, "lm_head|o_proj": 1, "m.*": 5},
    },
    "some layers": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "gaussian": {"target_modules": r".*\.1\..*(q|o)_proj", "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def model(seed):
    """The tensors of a random model, and ours of them."""
    tensors = reference.random_tensors(CONFIG, seed)
    return tensors, *tiny.from_official(CONFIG, tensors)


def close(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_used_as_peft_uses_it(model, kind, tmp_path):
    tensors, ours, params = model
    fields = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.25} | KINDS[kind]
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    theirs = peft.get_peft_model(hf_reference.build(CONFIG, tensors), config).eval()
    plain = hf_reference.logits(theirs, TEXT)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_" in name:
                tensor.normal_(std=0.15)  # A product as large as a kernel.
    expected = hf_reference.logits(theirs, TEXT)
    assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max()
    theirs.save_pretrained(tmp_path / "peft")
    checkpoint.save(tmp_path / "base", ours.config, params)
    for merge in (False, True):
        ours, used, _ = mistral_jax.load(tmp_path / "base", lora=tmp_path / "peft", merge=merge)
        close(tiny.alone(ours, used, TEXT), expected)
    # And so it is once we have saved it again.
    lora, found = adapters.read(tmp_path / "peft", ours.config)
    assert lora.dropout == 0.25
    adapters.save(tmp_path / "again", ours.config, lora, found)
    close(peft_logits(tensors, tmp_path / "again"), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=3, alpha=5.0, targets=("q_proj", "k_proj", "down_proj")),
        Lora(rank=8, alpha=4.0, rslora=True),
        Lora(rank=2, targets=("o_proj", "up_proj", "lm_head")),
    ],
)
def test_what_we_save_is_used_by_peft_as_we_use_it(model, lora, tmp_path):
    tensors, ours, params = model
    key = jax.random.key(3)
    made = jax.tree.map(
        lambda x: x + 0.15 * jax.random.normal(key, x.shape), init_adapters(lora, params, key)
    )
    expected = tiny.alone(ours, attach(params, made, lora.scale), TEXT)
    adapters.save(tmp_path / "ours", ours.config, lora, made, base="a/model")
    close(peft_logits(tensors, tmp_path / "ours"), expected)
    close(peft_logits(tensors, tmp_path / "ours", merge=True), expected)
    read, found = adapters.read(tmp_path / "ours", ours.config)
    close(tiny.alone(ours, apply(params, read, found), TEXT), expected)


def peft_logits(tensors, folder, merge=False):
    """Returns PEFT's logits with a folder of adapters; its warnings of tensors are errors."""
    theirs = peft.PeftModel.from_pretrained(hf_reference.build(CONFIG, tensors), folder)
    theirs = theirs.merge_and_unload() if merge else theirs
    return hf_reference.logits(theirs.eval(), TEXT)
