"""Damaged files of others: each is read, or refused in a sentence, in bounded time and memory.

DAMAGE_CASES=2100 DAMAGE_SEED=7 takes as many of each kind, and others.
"""

import json
import os
import random

import numpy as np
import pytest
import sources
import tiny
from bounds import bounded
from flax.traverse_util import flatten_dict
from mistral_jax.convert import architecture
from mistral_jax.convert.checks import match
from mistral_jax.convert.source import find
from mistral_jax.convert.to_orbax import _read
from mutations import damaged_bytes, damaged_json, damaged_safetensors, damaged_zip
from safetensors.numpy import save_file

from mistral_jax.checkpoint import adapters

CASES = int(os.environ.get("DAMAGE_CASES", "40"))
SEED = int(os.environ.get("DAMAGE_SEED", "0"))
CONFIG = tiny.from_official(tiny.OFFICIAL, sources.tensors())[0].config


def read_source(folder):
    """Does what a conversion does before it writes."""
    found = find(folder)
    described = architecture.read(found.config_file)
    matched = match(found, found.tensors(), described.config)
    for row, places in matched.items():
        array = _read(row, places, described.config, found.official, None)
        assert array.shape == row.shape(described.config)


def read_adapters(folder):
    lora, tree = adapters.read(folder, CONFIG)
    assert np.isfinite(lora.scale)
    for array in flatten_dict(tree).values():
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


def peft_folder(folder):
    folder.mkdir()
    names = [
        f"base_model.model.model.layers.{i}.self_attn.{module}" for i in (0, 1) for module in "qv"
    ]
    tensors = {}
    for name in names:
        rows = 32 if name.endswith("q") else 16
        tensors[f"{name}_proj.lora_A.weight"] = np.ones((4, 32), np.float32)
        tensors[f"{name}_proj.lora_B.weight"] = np.ones((rows, 4), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"self_attn.q_proj": 4, "layers.[01].self_attn.v_proj": 4},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3},
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))


def official_adapters(folder):
    folder.mkdir()
    tensors = {
        "layers.0.attention.wq.lora_A.weight": np.ones((4, 32), np.float32),
        "layers.0.attention.wq.lora_B.weight": np.ones((32, 4), np.float32),
    }
    save_file(tensors, folder / "lora.safetensors")
    described = {"dim": 32, "lora": {"enable": True, "rank": 4, "scaling": 2.0}}
    (folder / "params.json").write_text(json.dumps(described))


def source(format, parts=1, **fields):
    def make(folder):
        sources.write(folder, format, None, parts, **fields)

    return make


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
KINDS = ["full_attention", "sliding_attention"]
FILES = {  # What makes a folder, the file that is damaged, how, and what reads the folder.
    "safetensors": (
        source("hf-safetensors"),
        "model.safetensors",
        damaged_safetensors,
        read_source,
    ),
    "index": (
        source("hf-safetensors", 2),
        "model.safetensors.index.json",
        damaged_json,
        read_source,
    ),
    "bin": (source("hf-torch"), "pytorch_model.bin", damaged_zip, read_source),
    "pth": (source("official-torch"), "consolidated.00.pth", damaged_zip, read_source),
    "config": (
        source("hf-safetensors", layer_types=KINDS, **ROPE),
        "config.json",
        damaged_json,
        read_source,
    ),
    "params": (
        source("official-safetensors", lora={"enable": True, "scaling": 2.0}, moe=None),
        "params.json",
        damaged_json,
        read_source,
    ),
    "adapters": (peft_folder, "adapter_model.safetensors", damaged_safetensors, read_adapters),
    "adapters' config": (peft_folder, "adapter_config.json", damaged_json, read_adapters),
    "official adapters": (
        official_adapters,
        "lora.safetensors",
        damaged_safetensors,
        read_adapters,
    ),
    "official adapters' config": (official_adapters, "params.json", damaged_json, read_adapters),
}


@pytest.mark.parametrize("kind", FILES)
def test_damage_ends_in_a_sentence(tmp_path, kind):
    make, name, damage, read = FILES[kind]
    make(tmp_path / "x")
    file, taken = tmp_path / "x" / name, 0
    read(tmp_path / "x")
    whole, rng = file.read_bytes(), random.Random(f"{kind} {SEED}")
    for case in range(CASES):
        file.write_bytes(damage(rng, whole))
        outcome = None
        try:
            with bounded(5, 1 << 30):
                read(tmp_path / "x")
        except Exception as error:
            outcome = error
        taken += outcome is None
        refused = isinstance(outcome, ValueError | OSError) and str(outcome).strip()
        good = outcome is None or (refused and not isinstance(outcome, UnicodeError))
        assert good, f"case {case} of {kind}, kept as {file}: {outcome!r}"
    assert taken < CASES, "nothing was damaged"


def test_all_damage_of_bytes_is_survived(tmp_path):
    """Even where a file is only noise."""
    rng = random.Random(SEED)
    make, name, _, read = FILES["pth"]
    make(tmp_path / "x")
    for _ in range(CASES):
        (tmp_path / "x" / name).write_bytes(damaged_bytes(rng, rng.randbytes(300)))
        with pytest.raises(ValueError, match=name), bounded(5, 1 << 30):
            read(tmp_path / "x")
