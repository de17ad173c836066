"""One model in two programs: ours, and Transformers' on the same random weights."""

import json
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from mistral_jax.convert import architecture, names

from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer

MODELS = {
    "229M": ModelConfig(
        vocab_size=32000,
        num_layers=12,
        embed_dim=1024,
        mlp_dim=3584,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        rope_theta=1e4,
        sliding_window=1024,
    ),
    "nano": ModelConfig.from_name("nano"),
}


def build(config: ModelConfig, dtype: str):
    """Returns our model and params, and Transformers' model; torch and it are imported here."""
    import torch
    import transformers

    fields = architecture.to_hf(config) | {"dtype": dtype}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**fields)).eval()
    theirs = theirs.to(getattr(torch, dtype))
    state = theirs.state_dict()
    params = {}
    for row in names.rows(config):
        tensor = state[row.name(official=False)].float().numpy()
        params[row.path] = jnp.asarray(row.from_file(tensor, config, official=False), dtype)
    params = unflatten_dict(params, sep="/")
    return Transformer(config, jnp.dtype(dtype)), jax.block_until_ready(params), theirs


def report(about: dict, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Prints a JSON line of the rates of rounds in turns, but for the first, which compiles."""
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    line = about | {
        "tokens_per_second": round(statistics.median(ours[1:]), 1),
        "transformers": round(statistics.median(theirs[1:]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }
    print(json.dumps(line), flush=True)


def prompts(config: ModelConfig, rows: int, length: int) -> list[list[int]]:
    """Returns random token ids."""
    return np.random.default_rng(0).integers(3, config.vocab_size, (rows, length)).tolist()
