"""Defines the measured models by name, and random prompts."""

import numpy as np

from mistral_jax.config import ModelConfig

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


def prompts(config: ModelConfig, rows: int, length: int) -> list[list[int]]:
    """Returns random token ids."""
    return np.random.default_rng(0).integers(3, config.vocab_size, (rows, length)).tolist()
