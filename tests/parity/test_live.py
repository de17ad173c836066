"""Live parity: fresh random models, by PyTorch and Transformers, through conversion and back.

`make parity` runs this. Bounds are those of `test_golden.py`; where no arithmetic is between two
sides, arrays must be equal to the bit.
"""

import json

import hf_reference
import jax
import numpy as np
import pytest
import reference
import safetensors.torch
import tiny
import torch
import transformers

import mistral_jax
from convert.to_orbax import to_orbax
from convert.to_torch import to_torch

TOLERANCE = 1e-5
NEW_TOKENS = 32


@pytest.fixture(params=range(4))
def case(request, seed):
    """A random official config, and tensors; all four together show every kind."""
    number = request.param
    rng = np.random.default_rng([seed, number])
    kv_heads, group = [(2, 1), (2, 3), (1, 4), (3, 2)][number]
    window = int(rng.integers(2, 9))
    config = {
        "dim": 6 * int(rng.integers(4, 7)),  # 6: so that 2 or 3 official files can share it
        "n_layers": 2,
        "head_dim": 2 * int(rng.integers(2, 7)),
        "hidden_dim": 6 * int(rng.integers(5, 10)),
        "n_heads": kv_heads * group,
        "n_kv_heads": kv_heads,
        "norm_eps": float(rng.choice([1e-5, 1e-6])),
        "vocab_size": 6 * int(rng.integers(7, 12)),
        "rope_theta": float(rng.choice([1e4, 1e6])),
        "sliding_window": [window, [None, window], None, window][number],
    }
    return config, reference.random_tensors(config, int(rng.integers(2**31)), tied=number == 3), rng


def load(folder, target, dtype="float32"):
    """Converts a folder and loads the checkpoint."""
    to_orbax(folder, target, overwrite=True)
    model, params, tokenizer = mistral_jax.load(target, dtype=dtype)
    assert tokenizer is None
    return model, params


def assert_same_logits(ours, theirs, rng):
    model, params = ours
    window = max(w or 0 for w in model.config.windows) or 5
    lengths = {1, window - 1, window, window + 1, 3 * window + 2}
    prompts = [rng.integers(model.config.vocab_size, size=length) for length in lengths]
    rows = tiny.forward(model, params, *tiny.ragged(prompts))[0]
    for row, prompt in zip(rows, prompts, strict=True):
        expected = hf_reference.logits(theirs, prompt)
        error = np.abs(row[: len(prompt)] - expected).max()
        assert error <= TOLERANCE * np.abs(expected).max(), f"{len(prompt)} tokens"


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_saved_model_has_the_same_logits_and_greedy_text(case, shard, tmp_path):
    config, tensors, rng = case
    theirs = hf_reference.build(config, tensors)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard == "8KB")
    model, params = load(tmp_path / "hf", tmp_path / "ours")
    assert_same_logits((model, params), theirs, rng)
    assert_same_trees(params, tiny.from_official(config, tensors)[1])

    prompts = [rng.integers(config["vocab_size"], size=length).tolist() for length in (1, 7, 19)]
    greedy = mistral_jax.Sampling(temperature=0.0)
    ours = mistral_jax.generate(model, params, prompts, NEW_TOKENS, sampling=greedy, stop_ids=())
    for completion, prompt in zip(ours, prompts, strict=True):
        expected = hf_reference.greedy(theirs, prompt, NEW_TOKENS)
        logits = hf_reference.logits(theirs, [*prompt, *expected])[len(prompt) - 1 : -1]
        second, first = np.sort(logits, axis=-1)[:, -2:].T
        tied = first - second < 2 * TOLERANCE * np.abs(logits).max()
        certain = int(np.argmax(tied)) if tied.any() else NEW_TOKENS  # up to a choice by rounding
        assert completion.tokens[:certain] == expected[:certain]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_saved_in_16_bits_is_the_same_model(case, dtype, tmp_path):
    config, tensors, rng = case
    theirs = hf_reference.build(config, tensors)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    stored = load(tmp_path / "hf", tmp_path / "ours", dtype=dtype)[1]
    model, params = mistral_jax.load(tmp_path / "ours", dtype="float32")[:2]
    assert_same_trees(jax.tree.map(lambda x: x.astype(dtype), params), stored)
    assert_same_logits((model, params), hf_reference.load(tmp_path / "hf"), rng)


def test_files_that_torch_saved_give_the_same_tree(case, tmp_path):
    config, tensors, _ = case
    theirs = hf_reference.build(config, tensors)
    theirs.save_pretrained(tmp_path / "hf")
    expected = load(tmp_path / "hf", tmp_path / "ours")[1]
    hf_config = (tmp_path / "hf" / "config.json").read_text()
    for name, state in hf_files(theirs).items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(hf_config)
        for file, part in state.items():
            torch.save(part, folder / file)
        if len(state) > 1:
            weight_map = {tensor: file for file, part in state.items() for tensor in part}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert_same_trees(load(folder, tmp_path / "ours")[1], expected)
    if "output.weight" in tensors:  # the official format has no tied output
        for parts in {1, config["n_kv_heads"]}:
            folder = official_folder(tmp_path / f"official{parts}", config, tensors, parts)
            assert_same_trees(load(folder, tmp_path / "ours")[1], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_the_model_that_was_converted(case, dtype, tmp_path):
    config, tensors, rng = case
    theirs = hf_reference.build(config, tensors)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    theirs = hf_reference.load(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", shard_bytes=8000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert back.dtype == getattr(torch, dtype)
    back = hf_reference.load(tmp_path / "back")
    assert type(back) is type(theirs)
    prompt = rng.integers(config["vocab_size"], size=30)
    np.testing.assert_array_equal(
        hf_reference.logits(back, prompt), hf_reference.logits(theirs, prompt)
    )
    if "output.weight" in tensors:
        to_torch(tmp_path / "ours", tmp_path / "official", format="official")
        state = safetensors.torch.load_file(tmp_path / "official" / "consolidated.safetensors")
        assert state.keys() == tensors.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, torch.from_numpy(tensors[name]).to(tensor.dtype)), name


def hf_files(model):
    """Returns the same weights in the ways in which torch files differ: {name: {file: state}}."""
    state = model.state_dict()
    names = sorted(state)
    odd = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}
    joined = torch.cat([t.flatten() for t in state.values()])
    views = dict(zip(state, joined.split([t.numel() for t in state.values()]), strict=True))
    return {
        "whole": {"pytorch_model.bin": state},  # an OrderedDict
        "strided": {"pytorch_model.bin": odd},
        "one_storage": {"pytorch_model.bin": {n: views[n].view_as(t) for n, t in state.items()}},
        "sharded": {
            f"pytorch_model-0000{i + 1}-of-00003.bin": {n: state[n] for n in names[i::3]}
            for i in range(3)
        },
    }


def official_folder(folder, config, tensors, parts):
    """Writes `consolidated.NN.pth`, with matrices divided as Llama's are."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(config))
    across = ("tok_embeddings", "wo", "w2")
    for part in range(parts):
        state = {}
        for name, tensor in tensors.items():
            axis = 1 if any(word in name.split(".") for word in across) else 0
            pieces = [tensor] if "norm" in name else np.array_split(tensor, parts, axis)
            state[name] = torch.from_numpy(pieces[part % len(pieces)].copy())
        torch.save(state, folder / f"consolidated.{part:02}.pth")
    return folder
