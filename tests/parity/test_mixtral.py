"""Mixtures of experts against Transformers' Mixtral: files, logits, greedy text, and back."""

import json

import hf_reference
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers

import mistral_jax
from convert.to_orbax import to_orbax
from convert.to_torch import to_torch
from mistral_jax.checkpoint import adapters
from mistral_jax.checkpoint.lora import Lora, attach, init_adapters
from mistral_jax.training.loss import make_loss_fn
from mistral_jax.training.step import Batch

TOLERANCE = 1e-5
NEW_TOKENS = 24
# PEFT translates the names of Transformers 4, and warns that it finds no modules of these names.
PEFT_WARNS = pytest.mark.filterwarnings("ignore")
SHAPES = [(4, 2, None), (8, 2, 5), (5, 3, None), (3, 1, None)]  # experts, of a token, window


@pytest.fixture(params=SHAPES, ids=str)
def case(request, seed):
    """A random Mixtral of Transformers, and a generator."""
    experts, chosen, window = request.param
    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=window,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        max_position_embeddings=4096,
        attn_implementation="eager",
    )
    torch.manual_seed(seed + experts)
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return model, np.random.default_rng([seed, experts])


def load(folder, target, dtype="float32"):
    to_orbax(folder, target, overwrite=True)
    return mistral_jax.load(target, dtype=dtype)[:2]


def test_logits_and_greedy_text_are_those_of_transformers(case, tmp_path):
    theirs, rng = case
    theirs.save_pretrained(tmp_path / "hf")
    model, params = load(tmp_path / "hf", tmp_path / "ours")
    prompts = [rng.integers(61, size=length) for length in (1, 4, 5, 6, 17)]
    rows = tiny.forward(model, params, *tiny.ragged(prompts))[0]
    for row, prompt in zip(rows, prompts, strict=True):
        expected = hf_reference.logits(theirs, prompt)
        error = np.abs(row[: len(prompt)] - expected).max()
        assert error <= TOLERANCE * np.abs(expected).max(), f"{len(prompt)} tokens"

    greedy = mistral_jax.Sampling(temperature=0.0)
    prompts = [prompt.tolist() for prompt in prompts]
    ours = mistral_jax.generate(model, params, prompts, NEW_TOKENS, sampling=greedy, stop_ids=())
    for completion, prompt in zip(ours, prompts, strict=True):
        expected = hf_reference.greedy(theirs, prompt, NEW_TOKENS)
        logits = hf_reference.logits(theirs, [*prompt, *expected])[len(prompt) - 1 : -1]
        second, first = np.sort(logits, axis=-1)[:, -2:].T
        tied = first - second < 2 * TOLERANCE * np.abs(logits).max()
        certain = int(np.argmax(tied)) if tied.any() else NEW_TOKENS
        assert completion.tokens[:certain] == expected[:certain]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_equal_byte_for_byte(case, dtype, tmp_path):
    theirs, _ = case
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", shard_bytes=20_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert type(back) is type(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    fields = ("num_local_experts", "num_experts_per_tok", "sliding_window", "rope_parameters")
    assert [getattr(back.config, x) for x in fields] == [getattr(theirs.config, x) for x in fields]

    # The official format gives the same tree, and back.
    to_torch(tmp_path / "ours", tmp_path / "official", format="official")
    moe = json.loads((tmp_path / "official" / "params.json").read_text())["moe"]
    assert moe == {
        "num_experts": theirs.config.num_local_experts,
        "num_experts_per_tok": theirs.config.num_experts_per_tok,
    }
    ours = mistral_jax.load(tmp_path / "ours")[1]
    again = load(tmp_path / "official", tmp_path / "again", None)[1]
    jax.tree.map(np.testing.assert_array_equal, again, ours)


@PEFT_WARNS
@pytest.mark.parametrize(
    "targets", [("w1", "w2", "w3"), ("w1", "w2", "w3", "gate", "q_proj")], ids=len
)
def test_adapters_that_peft_saved_give_its_logits(case, targets, tmp_path):
    """PEFT stacks the adapters of experts, and w1 and w3 share one adapter."""
    theirs, rng = case
    theirs.save_pretrained(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "ours")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[*targets])
    adapted = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    model, params, _ = mistral_jax.load(tmp_path / "ours", lora=tmp_path / "adapter")
    prompt = rng.integers(61, size=11)
    expected = hf_reference.logits(adapted, prompt)
    found = tiny.alone(model, params, prompt)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@PEFT_WARNS
def test_peft_reads_adapters_of_experts(case, tmp_path):
    theirs, rng = case
    theirs.save_pretrained(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "ours")
    model, params, _ = mistral_jax.load(tmp_path / "ours")
    lora = Lora(
        rank=2, alpha=6.0, targets=("q_proj", "gate_proj", "up_proj", "down_proj", "router")
    )
    made = init_adapters(lora, params, jax.random.key(3))
    made = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), made)
    adapters.save(tmp_path / "adapter", model.config, lora, made)
    _, again = adapters.read(tmp_path / "adapter", model.config)
    jax.tree.map(np.testing.assert_array_equal, again, made)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    prompt = rng.integers(61, size=11)
    expected = hf_reference.logits(adapted, prompt)
    found = tiny.alone(model, attach(params, made, lora.scale), prompt)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_the_load_balancing_loss_is_that_of_transformers(case, tmp_path):
    theirs, rng = case
    theirs.save_pretrained(tmp_path / "hf")
    model, params = load(tmp_path / "hf", tmp_path / "ours")
    tokens, positions = tiny.ragged([rng.integers(61, size=length) for length in (9, 4)])
    with torch.no_grad():
        out = theirs(
            torch.tensor(np.asarray(tokens), dtype=torch.long),
            attention_mask=torch.tensor(np.asarray(positions) >= 0).long(),
            output_router_logits=True,
        )
    batch = Batch(tokens, positions, jnp.where(positions >= 0, tokens, -1))
    _, sums = make_loss_fn(model)(params, {}, batch, jax.random.key(0))
    found = float(sums["router_loss"] / sums["targets"])
    assert abs(found - float(out.aux_loss)) <= 1e-5 * found
