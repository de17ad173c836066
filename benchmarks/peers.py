"""One model in two programs: ours, and Transformers' on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
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
    for row in (row for group in names.groups(config) for row in group):
        tensor = state[row.name(official=False)].float().numpy()
        array = row.from_file(tensor, config, official=False)
        *parents, leaf = row.path.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = jnp.asarray(array, dtype)
    return Transformer(config, jnp.dtype(dtype)), jax.block_until_ready(params), theirs


def prompts(config: ModelConfig, rows: int, length: int) -> list[list[int]]:
    """Returns random token ids."""
    return np.random.default_rng(0).integers(3, config.vocab_size, (rows, length)).tolist()
