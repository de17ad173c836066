"""The multiplications and additions of a model's own arithmetic. It knows no program or device.

Two a weight and token, and 4 N H a pair of query and key that sees it (as in PaLM's appendix B,
arXiv 2204.02311). Masked scores, filling, lookups, and what is computed twice are not the model's.
"""

import numpy as np

from mistral_jax.config import ModelConfig


def of_weights(config: ModelConfig, count: float, scored: float) -> float:
    """Counts those of the matrices' products, forward.

    Args:
      config: the model.
      count: tokens.
      scored: those of them whose logits are wanted.
    """
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.embed_dim * (heads + 3 * config.mlp_dim)
    return 2 * (count * config.num_layers * layer + scored * config.vocab_size * config.embed_dim)


def of_attention(config: ModelConfig, count: float, seen: float) -> float:
    """Counts those of scores and of weighted sums, forward.

    Args:
      config: the model.
      count: tokens.
      seen: keys that each sees, in all layers together.
    """
    return 4 * count * seen * config.num_heads * config.head_dim


def keys_seen(config: ModelConfig, position: np.ndarray | int) -> np.ndarray | int:
    """Counts the keys that the token at a position sees, in all layers together."""
    layers = zip(config.windows, config.dilations, strict=True)
    reached = ((position // dilation + 1, window) for window, dilation in layers)
    return sum(np.minimum(keys, window or np.inf) for keys, window in reached)


def mean_seen(config: ModelConfig, length: int) -> float:
    """Returns the keys that a token of a text sees on average, in all layers together."""
    return np.mean(keys_seen(config, np.arange(length)))
